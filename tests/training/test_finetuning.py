"""Fine-tuning end to end: packed examples, adapters on a frozen base, samples, resumption, exports."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxchunk import data
from jaxchunk.data.chat import CHATML
from jaxchunk.errors import InputError
from jaxchunk.models import hf, lora, qwen2
from jaxchunk.run_dir import read_json_lines
from jaxchunk.training import trainer
from jaxchunk.training.checkpoint import load_params
from jaxchunk.training.config import TrainConfig, validate
from jaxchunk.training.export import export_adapters, export_run
from jaxchunk.training.flops import training_flops_per_token
from jaxchunk.training.memory import estimate_bytes
from jaxchunk.training.step import init_state, make_optimizer, make_train_step, summed_loss

MODEL = qwen2.Qwen2Config(300, 32, 1, 4, 2, 48, tie_word_embeddings=True)
FP32 = qwen2.Execution(compute_dtype=jnp.float32)


@pytest.fixture
def config(config, tmp_path):
    lines = [json.dumps({"prompt": f"{n} and one is", "completion": f" {n + 1}."}) for n in range(40)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
    return dataclasses.replace(
        config, data=str(tmp_path / "pairs.jsonl"), seq_len=48, batch_size=4, steps=6, val_every=3, checkpoint_every=2,
        sample_every=3, sample_tokens=5, lmhead_chunks=1,
    )  # fmt: skip


@pytest.fixture
def base(tmp_path, config):
    """A checkpoint in bfloat16 with a tokenizer."""
    dataset = data.load_dataset(config.data, None, 300, Path(config.cache_dir))
    shutil.copyfile(dataset.tokenizer_path, tmp_path / "tokenizer.json")
    hf.save(
        MODEL,
        qwen2.init(MODEL, jax.random.key(7), jnp.bfloat16),
        tmp_path / "base",
        tokenizer=tmp_path / "tokenizer.json",
    )
    return tmp_path / "base"


def lines(config, name):
    return read_json_lines(Path(config.out_dir) / name)


def learned(config):
    """Everything that does not depend on the time of day."""
    steps = [(record["step"], record["loss"], record["grad_norm"]) for record in lines(config, "steps.jsonl")]
    others = [
        [{name: value for name, value in record.items() if name != "time_s"} for record in lines(config, file)]
        for file in ("validation.jsonl", "samples.jsonl")
    ]
    params = jax.tree.map(lambda a: np.asarray(a).tobytes(), load_params(config.out_dir).params)
    return steps, others, params


def test_a_run_on_examples_validates_and_samples(config, capsys):
    summary = trainer.train(config)
    steps, validation, samples = (lines(config, f"{name}.jsonl") for name in ("steps", "validation", "samples"))
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert [record["step"] for record in validation] == [3, 6]
    assert all(r["val_perplexity"] == pytest.approx(np.exp(r["val_loss"])) for r in validation)
    assert summary["val_perplexity"] == validation[-1]["val_perplexity"]
    split = data.split(data.load_dataset(config.data, None, 300, Path(config.cache_dir)), 48)
    learnt = sum(int((row["labels"] != data.IGNORE_INDEX).sum()) for row in split.validation)
    assert {record["tokens"] for record in validation} == {learnt}
    assert [record["step"] for record in samples] == [3, 3, 6, 6]
    assert all("and one is" in record["prompt"] and 1 <= record["tokens"] <= 5 for record in samples)
    environment = json.loads((Path(config.out_dir) / "env.json").read_text())
    packing = environment["data"]["packing"]["train"]
    assert packing == {"examples": 38, "rows": len(split.train), "efficiency": split.train.efficiency}
    out = capsys.readouterr().out
    assert f"38 examples in {len(split.train)} sequences ({split.train.efficiency:.1%} full) to train on" in out
    assert "perplexity" in out and "after '" in out


def test_packed_batches_train_as_examples_by_themselves(config):
    """Loss and gradients of a batch are those of its examples, one in each row."""
    dataset = data.load_dataset(config.data, None, 300, Path(config.cache_dir))
    packed = next(data.train_batches(data.split(dataset, 48).train, 4, 0))
    assert packed["segment_ids"].max() > 1
    alone = {name: [] for name in ("tokens", "labels")}
    for tokens, labels, segments in zip(*(packed[name] for name in (*alone, "segment_ids")), strict=True):
        for segment in range(1, segments.max() + 1):
            for name, values, filler in (("tokens", tokens, 0), ("labels", labels, data.IGNORE_INDEX)):
                own = values[segments == segment]
                alone[name].append(np.pad(own, (0, 48 - len(own)), constant_values=filler))
    alone = jax.tree.map(np.stack, alone, is_leaf=lambda leaf: isinstance(leaf, list))
    count = (packed["labels"] != data.IGNORE_INDEX).sum()
    assert count == (alone["labels"] != data.IGNORE_INDEX).sum() > 0

    @jax.jit
    def loss_and_gradients(batch):
        params = qwen2.init(MODEL, jax.random.key(0))
        return jax.value_and_grad(lambda params: summed_loss(config, MODEL, FP32, params, batch, count))(params)

    for a, b in zip(*map(jax.tree.leaves, (loss_and_gradients(packed), loss_and_gradients(alone))), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_a_run_that_is_resumed_packs_and_samples_as_one_that_was_not(config, tmp_path):
    whole = dataclasses.replace(config, out_dir=str(tmp_path / "whole"))
    trainer.train(whole)
    trainer.train(config)
    shutil.rmtree(Path(config.out_dir) / "checkpoints" / "6")  # as a kill leaves it: step 4 is the last
    trainer.train(dataclasses.replace(config, resume=True))
    assert learned(config) == learned(whole)


def test_held_out_data_of_its_own(config, tmp_path, capsys):
    (tmp_path / "other.jsonl").write_text(json.dumps({"prompt": "90 and one is", "completion": " 91."}))
    trainer.train(dataclasses.replace(config, val_data=str(tmp_path / "other.jsonl"), sample_every=0))
    tokenizer = data.load_tokenizer(data.load_dataset(config.data, None, 300, Path(config.cache_dir)).tokenizer_path)
    expected = len(tokenizer.encode(" 91.").ids) + 1
    assert {record["tokens"] for record in lines(config, "validation.jsonl")} == {expected}
    assert "40 examples in" in capsys.readouterr().out
    with pytest.raises(InputError, match=r"nothing says which tokenizer made the tokens of --data synthetic"):
        (tmp_path / "other.txt").write_text("some text " * 99)
        trainer.train(
            dataclasses.replace(config, data="synthetic", val_data=str(tmp_path / "other.txt"), overwrite=True)
        )
    with pytest.raises(InputError, match=r"both must be .jsonl files of examples, or neither"):
        validate(dataclasses.replace(config, val_data="text.txt"))


def test_prompts_of_a_file(config, tmp_path):
    chat = [{"role": "user", "content": "7"}, {"role": "assistant", "content": "left out"}]
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"messages": chat}) + "\n" + json.dumps({"prompt": "5 and"}))
    (tmp_path / "prompts.txt").write_text("6 and\n\n7 and one is\n")
    for name, first, second in (
        ("prompts.jsonl", "<|im_start|>user\n7<|im_end|>\n<|im_start|>assistant\n", "5 and"),
        ("prompts.txt", "6 and", "7 and one is"),
    ):
        trainer.train(dataclasses.replace(config, steps=1, sample_prompts=str(tmp_path / name), overwrite=True))
        prompts = [record["prompt"] for record in lines(config, "samples.jsonl")]
        assert prompts[0].endswith(first) and prompts[1] == second
    for change, words in (
        ({"sample_tokens": 40000}, r"make \d+ tokens; the model has 32768 positions"),
        ({"data": "synthetic"}, "--sample_every needs a tokenizer"),
        ({"sample_prompts": str(tmp_path / "nowhere.jsonl")}, "cannot read"),
    ):
        with pytest.raises(InputError, match=words):
            trainer.train(dataclasses.replace(config, overwrite=True, **change))


@pytest.fixture
def adapted(config, base):
    return dataclasses.replace(
        config,
        hf_model=str(base),
        lora_rank=2,
        lora_targets=("q", "v", "up"),
        weight_decay=0.0,
        compute_dtype="bfloat16",
    )


def test_adapters_are_trained_and_saved_alone(adapted, base, capsys):
    trainer.train(adapted)
    assert "adapters of rank 2, alpha 4, on q, v, up; the model is frozen" in capsys.readouterr().out
    losses = [record["loss"] for record in lines(adapted, "steps.jsonl")]
    assert losses[-1] < losses[0]
    saved = load_params(adapted.out_dir)
    shapes = lora.adapter_shapes(adapted.adapters, MODEL)
    assert jax.tree.map(jnp.shape, saved.adapters) == jax.tree.map(lambda leaf: leaf.shape, shapes)
    _, before = hf.load(base, jnp.float32)
    changed = jax.tree.map(lambda a, b: not np.array_equal(a, b), saved.params, before)
    assert {name for name, is_changed in changed["layers"].items() if is_changed} == {
        "q_weight",
        "v_weight",
        "up_weight",
    }
    assert not changed["embedding"] and not changed["final_norm"]
    kept = sum(
        path.stat().st_size for path in (Path(adapted.out_dir) / "checkpoints" / "6").rglob("*") if path.is_file()
    )
    assert kept < 4 * qwen2.num_params(MODEL)


def test_adapters_are_resumed_to_the_bit_on_the_same_base_only(adapted, base, tmp_path):
    whole = dataclasses.replace(adapted, out_dir=str(tmp_path / "whole"))
    trainer.train(whole)
    trainer.train(adapted)
    shutil.rmtree(Path(adapted.out_dir) / "checkpoints" / "6")
    resumed = dataclasses.replace(adapted, resume=True)
    base.rename(tmp_path / "kept")
    hf.save(MODEL, qwen2.init(MODEL, jax.random.key(8), jnp.bfloat16), base, tokenizer=tmp_path / "tokenizer.json")
    with pytest.raises(InputError, match=r"--hf_model .*base are not what the adapters of step 4 were trained on"):
        trainer.train(resumed)
    shutil.rmtree(base)
    with pytest.raises(InputError, match="there is no directory"):
        trainer.train(resumed)
    (tmp_path / "kept").rename(base)
    with pytest.raises(InputError, match="--lora_rank is 4, was 2"):
        trainer.train(dataclasses.replace(resumed, lora_rank=4))
    trainer.train(resumed)
    assert learned(adapted) == learned(whole)


def test_a_step_changes_the_adapters_alone_and_only_they_have_moments():
    config = TrainConfig(lora_rank=2, lr=1e-2, lmhead_chunks=2)
    frozen = qwen2.init(MODEL, jax.random.key(0))
    state = init_state(make_optimizer(config), lora.init(config.adapters, MODEL, jax.random.key(1)), frozen)
    tokens = jax.random.randint(jax.random.key(2), (4, 9), 0, 300)
    step = jax.jit(make_train_step(config, MODEL, FP32, make_optimizer(config), 2))
    after, metrics = step(state, {"tokens": tokens, "labels": tokens})
    expected = summed_loss(config, MODEL, FP32, frozen, {"tokens": tokens, "labels": tokens}, tokens.size)
    assert metrics.loss == pytest.approx(float(expected), rel=1e-5)  # that of the base model
    jax.tree.map(np.testing.assert_array_equal, after.frozen, frozen)
    assert float(jnp.abs(after.params["layers"]["down_lora_b"]).max()) > 0
    moments = sum(leaf.size for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim)
    assert moments == 2 * sum(leaf.size for leaf in jax.tree.leaves(state.params))


def test_exports_of_adapters(adapted, base, tmp_path):
    trainer.train(adapted)
    assert export_run(Path(adapted.out_dir), tmp_path / "merged") == 6
    _, merged = hf.load(tmp_path / "merged", jnp.float32)
    saved = load_params(adapted.out_dir)
    jax.tree.map(np.testing.assert_array_equal, merged, saved.params)
    assert export_adapters(Path(adapted.out_dir), tmp_path / "peft") == 6
    about = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert (about["r"], about["lora_alpha"], about["base_model_name_or_path"]) == (2, 4.0, str(base))
    assert about["target_modules"] == ["q_proj", "v_proj", "up_proj"]
    tensors = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    name = "base_model.model.model.layers.0.mlp.up_proj.lora_{}.weight"
    a, b = tensors[name.format("A")], tensors[name.format("B")]
    assert a.shape == (2, 32) and b.shape == (48, 2) and len(tensors) == 6
    _, before = hf.load(base, jnp.float32)
    np.testing.assert_allclose(
        before["layers"]["up_weight"][0] + 2 * (b @ a).T, saved.params["layers"]["up_weight"][0], rtol=1e-5, atol=1e-7
    )


def test_a_run_without_adapters_has_none_to_export(config, tmp_path):
    trainer.train(dataclasses.replace(config, steps=1, sample_every=0))
    with pytest.raises(InputError, match="trained the model and no adapters"):
        export_adapters(Path(config.out_dir), tmp_path / "peft")


def test_a_tokenizer_of_chats_is_exported_with_its_template(base):
    about = json.loads((base / "tokenizer_config.json").read_text())
    assert (about["chat_template"], about["eos_token"]) == (CHATML, "<|im_end|>")
    tokenizer = data.load_tokenizer(base / "tokenizer.json")
    stops = json.loads((base / "generation_config.json").read_text())["eos_token_id"]
    assert stops == [tokenizer.token_to_id(name) for name in ("<|endoftext|>", "<|im_end|>")]


def test_what_adapters_save_is_counted():
    model = qwen2.SIZES["qwen2-0.5b"]
    whole, adapted = TrainConfig(compute_dtype="bfloat16"), TrainConfig(compute_dtype="bfloat16", lora_rank=8)
    saved = estimate_bytes(whole, model, 8) - estimate_bytes(adapted, model, 8)
    assert saved == 16 * qwen2.num_params(model)
    attention = 6.0 * model.num_hidden_layers * 128 * model.hidden_size
    full, frozen = (training_flops_per_token(model, 128, frozen=frozen) for frozen in (False, True))
    assert (frozen - attention) / (full - attention) == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"lora_rank": -1}, "--lora_rank is -1; it must not be negative"),
        ({"lora_rank": 4, "lora_alpha": 0.0}, "--lora_alpha is 0.0; it must be greater than 0"),
        ({"lora_rank": 4, "lora_targets": ()}, "--lora_targets names no projection"),
        ({"sample_tokens": 0}, "--sample_tokens is 0; it must be at least 1"),
    ],
)
def test_flags_that_cannot_be(change, words):
    with pytest.raises(InputError, match=words):
        validate(dataclasses.replace(TrainConfig(), **change))
