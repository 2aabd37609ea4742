"""A run becomes a directory of Hugging Face's: the same parameters, and what can be wrong with it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxchunk import data
from jaxchunk.errors import InputError
from jaxchunk.models import hf, qwen2
from jaxchunk.models.rope import Llama3Rope
from jaxchunk.training import trainer
from jaxchunk.training.checkpoint import load_params
from jaxchunk.training.config import TrainConfig
from jaxchunk.training.export import export_run

SCRIPT = Path(__file__).parents[2] / "scripts" / "export_hf.py"
LLAMA = qwen2.Qwen2Config(
    300, 32, 2, 4, 2, 48, tie_word_embeddings=False, attention_bias=False, rope_theta=1e4,
    rope_scaling=Llama3Rope(8.0, 1.0, 4.0, 16), max_position_embeddings=64,
)  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Two steps from a Llama without a tokenizer of its own, on text with a tokenizer that is given."""
    path = tmp_path_factory.mktemp("run")
    (path / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 400)
    hf.save(LLAMA, qwen2.init(LLAMA, jax.random.key(0)), path / "llama")
    data.train_or_load_tokenizer(data.read_corpus(path / "text.txt"), 300, path).save(str(path / "bpe.json"))
    config = TrainConfig(
        hf_model=str(path / "llama"), tokenizer=str(path / "bpe.json"), data=str(path / "text.txt"), seq_len=16,
        batch_size=4, steps=2, val_batches=1, mesh_data=1, cache_dir=str(path / "cache"), out_dir=str(path / "run"),
    )  # fmt: skip
    trainer.train(config)
    return path / "run"


def test_an_export_has_the_parameters_of_the_run(run, tmp_path):
    assert export_run(run, tmp_path / "out") == 2
    config, params = hf.load(tmp_path / "out")
    saved = load_params(run)
    assert config == saved.model == LLAMA
    jax.tree.map(np.testing.assert_array_equal, params, saved.params)
    before = qwen2.init(LLAMA, jax.random.key(0))
    assert not np.array_equal(params["lm_head"], before["lm_head"])
    used = data.load_tokenizer(run.parent / "bpe.json")
    assert data.load_tokenizer(tmp_path / "out" / "tokenizer.json").get_vocab() == used.get_vocab()


def test_the_script_says_what_it_wrote(run, tmp_path):
    def export(*flags):
        command = [sys.executable, SCRIPT, *map(str, flags)]
        return subprocess.run(command, capture_output=True, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"})

    done = export(run, tmp_path / "out", "--dtype", "bfloat16", "--max_shard_size", 20000)
    assert done.returncode == 0, done.stderr
    assert "out: the parameters after step 2, in bfloat16" in done.stdout
    _, params = hf.load(tmp_path / "out")
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}
    assert (tmp_path / "out" / "model.safetensors.index.json").exists()
    again = export(run, tmp_path / "out")
    assert (again.returncode, again.stderr.count("\n")) == (2, 1)
    assert "is there already and is no empty directory" in again.stderr


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(InputError, match="holds no checkpoint"):
        export_run(tmp_path, tmp_path / "out")


def test_a_tokenizer_that_is_gone_is_named(run, tmp_path):
    environment = json.loads((run / "env.json").read_text())
    tokenizer = environment["data"]["tokenizer"]
    assert tokenizer == str(run.parent / "bpe.json")
    Path(tokenizer).rename(tmp_path / "elsewhere.json")
    try:
        with pytest.raises(
            InputError, match=r"bpe.json, the tokenizer of the run .*, is gone; give it with --tokenizer"
        ):
            export_run(run, tmp_path / "out")
        export_run(run, tmp_path / "out", tokenizer=tmp_path / "elsewhere.json")
    finally:
        (tmp_path / "elsewhere.json").rename(tokenizer)
    assert (tmp_path / "out" / "tokenizer.json").exists()
