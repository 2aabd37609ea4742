"""What is trained: a size or a checkpoint, and the tokenizer that goes with it."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxchunk import data
from jaxchunk.errors import InputError
from jaxchunk.models import hf, qwen2
from jaxchunk.models.rope import Llama3Rope
from jaxchunk.run_dir import read_json_lines
from jaxchunk.training import trainer
from jaxchunk.training.config import TrainConfig
from jaxchunk.training.model import choose_model

MODEL = qwen2.Qwen2Config(300, 32, 2, 4, 2, 48, tie_word_embeddings=True, max_position_embeddings=64)
TEXT = "the quick brown fox jumps over the lazy dog\n" * 400


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A BPE trained on the text, 300 entries at most."""
    path = tmp_path_factory.mktemp("tokenizer")
    (path / "text.txt").write_text(TEXT)
    loaded = data.train_or_load_tokenizer(data.read_corpus(path / "text.txt"), 300, path)
    loaded.save(str(path / "tokenizer.json"))
    return path / "tokenizer.json"


@pytest.fixture
def checkpoint(tmp_path, tokenizer):
    """In bfloat16, with its tokenizer."""
    params = qwen2.init(MODEL, jax.random.key(7), jnp.bfloat16)
    hf.save(MODEL, params, tmp_path / "checkpoint", tokenizer=tokenizer)
    return tmp_path / "checkpoint"


@pytest.fixture
def config(tmp_path, checkpoint):
    (tmp_path / "text.txt").write_text(TEXT)
    return TrainConfig(
        hf_model=str(checkpoint), data=str(tmp_path / "text.txt"), cache_dir=str(tmp_path / "cache"), seq_len=16,
        batch_size=4, steps=2, val_batches=1, mesh_data=1, out_dir=str(tmp_path / "run"),
    )  # fmt: skip


def losses(config):
    trainer.train(config)
    return [record["loss"] for record in read_json_lines(Path(config.out_dir) / "steps.jsonl")]


def test_training_begins_with_the_weights_and_the_tokenizer_of_the_checkpoint(config, checkpoint, capsys):
    first, second = losses(config)
    assert second < first
    dataset = data.load_dataset(config.data, checkpoint / "tokenizer.json", 300, Path(config.cache_dir))
    split = data.split(dataset, config.seq_len, config.val_fraction)
    batch = next(iter(data.train_batches(split.train, config.batch_size, config.seed)))
    logits = qwen2.logits(*hf.load(checkpoint), jnp.asarray(batch["tokens"]))
    log_probs = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), batch["labels"][..., None], axis=-1)
    assert first == pytest.approx(-log_probs.mean(), rel=1e-5)
    environment = json.loads((Path(config.out_dir) / "env.json").read_text())
    assert environment["chosen"]["checkpoint"] == str(checkpoint)
    assert hf.parse_config(environment["chosen"]["model"], "env.json") == MODEL
    assert environment["data"]["tokenizer"] == str(checkpoint / "tokenizer.json")
    assert f"checkpoint, weights from {checkpoint}, 0.0 M parameters" in capsys.readouterr().out


def test_the_seed_orders_the_data_and_changes_no_weights(config):
    first = losses(dataclasses.replace(config, data="synthetic", lr=1e-30))
    again = losses(dataclasses.replace(config, data="synthetic", lr=1e-30, seed=1, overwrite=True))
    assert first != again
    np.testing.assert_allclose(first, again, rtol=0.02)  # other tokens, the same weights


def test_a_model_without_attention_biases_is_trained_too(config, tmp_path, tokenizer):
    llama = dataclasses.replace(MODEL, attention_bias=False, rope_scaling=Llama3Rope(8.0, 1.0, 4.0, 16))
    hf.save(llama, qwen2.init(llama, jax.random.key(7)), tmp_path / "llama", tokenizer=tokenizer)
    first, second = losses(dataclasses.replace(config, hf_model=str(tmp_path / "llama")))
    assert second < first


def test_sizes_have_names_and_no_checkpoint():
    model = choose_model(TrainConfig())
    assert (model.flag, model.config, model.checkpoint) == ("--model tiny", qwen2.SIZES["tiny"], None)
    with pytest.raises(InputError, match="--seq_len is 40000; --model tiny has 32768 positions"):
        choose_model(TrainConfig(seq_len=40000))


def refuse(config, words):
    with pytest.raises(InputError, match=words) as caught:
        trainer.train(config)
    assert "\n" not in str(caught.value)
    assert not Path(config.out_dir).exists()


def test_sequences_longer_than_the_checkpoint_is_for_are_refused(config):
    refuse(dataclasses.replace(config, seq_len=65), r"--seq_len is 65; --hf_model .*checkpoint has 64 positions")


def test_what_is_no_checkpoint_is_refused(config, tmp_path):
    refuse(dataclasses.replace(config, hf_model=str(tmp_path / "none")), "there is no directory .*none")
    (tmp_path / "empty").mkdir()
    refuse(dataclasses.replace(config, hf_model=str(tmp_path / "empty")), r"cannot read .*empty.config.json")


def test_weights_that_are_not_finite_are_refused_before_anything_is_written(config, checkpoint):
    path = checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-2] + b"\xff\x7f")  # a NaN in bfloat16
    refuse(config, "values that are NaN or infinite as float32")


def test_text_needs_the_tokenizer_of_the_checkpoint(config, checkpoint):
    (checkpoint / "tokenizer.json").unlink()
    refuse(config, "--hf_model .* has no tokenizer.json, which its vocabulary needs: give it with --tokenizer")


def test_another_tokenizer_is_refused(config, tokenizer, tmp_path):
    content = json.loads(tokenizer.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    other = tmp_path / "other.json"
    other.write_text(json.dumps(content))
    refuse(
        dataclasses.replace(config, tokenizer=str(other)),
        r"--tokenizer .*other.json does not have the ids of the checkpoint's \(.*\) for 2 of \d+ tokens, such as 'a'",
    )


def test_a_tokenizer_with_more_tokens_is_taken_as_far_as_the_model_has_rows(config, tokenizer, tmp_path):
    larger = data.load_tokenizer(tokenizer)
    larger.add_special_tokens(["<|chat|>"])
    larger.save(str(tmp_path / "larger.json"))
    assert len(losses(dataclasses.replace(config, tokenizer=str(tmp_path / "larger.json")))) == 2
    larger.add_tokens([f"word{i}" for i in range(300)])
    larger.save(str(tmp_path / "larger.json"))
    config = dataclasses.replace(config, tokenizer=str(tmp_path / "larger.json"), out_dir=str(tmp_path / "other"))
    refuse(config, "has ids up to .*, but the model's vocabulary has 300 entries")


def test_tokens_of_a_larger_vocabulary_are_refused(config, tmp_path):
    data.write_tokens(tmp_path / "tokens.bin", np.arange(2000) % 301, 301)
    refuse(
        dataclasses.replace(config, data=str(tmp_path / "tokens.bin")), "of a vocabulary of 301, the model's has 300"
    )
    data.write_tokens(tmp_path / "tokens.bin", np.arange(2000) % 300, 300)
    assert len(losses(dataclasses.replace(config, data=str(tmp_path / "tokens.bin")))) == 2


def test_a_run_goes_on_without_the_directory_that_it_began_from(config, checkpoint, tokenizer, capsys):
    """To the bit; only the tokenizer is needed again, and the flag must still be the same."""
    config = dataclasses.replace(config, steps=3, checkpoint_every=2)
    whole = losses(config)
    path = Path(config.out_dir)
    shutil.rmtree(path / "checkpoints" / "3")
    shutil.rmtree(checkpoint)
    config = dataclasses.replace(config, resume=True)
    with pytest.raises(
        InputError, match=r"--hf_model .*checkpoint is gone, and with it its tokenizer.json, .*--tokenizer"
    ):
        trainer.train(config)
    with pytest.raises(InputError, match=r"--hf_model is None, was .*checkpoint, and the run would become another one"):
        trainer.train(dataclasses.replace(config, hf_model=None))
    capsys.readouterr()
    assert losses(dataclasses.replace(config, tokenizer=str(tokenizer), model="qwen2-0.5b")) == whole
    assert "checkpoint, weights of step 2, 0.0 M parameters" in capsys.readouterr().out
