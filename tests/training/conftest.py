"""A model and a text so small that a whole run takes a moment; what was compiled once serves all runs like it."""

import dataclasses
import gc

import pytest

from jaxchunk import plotting
from jaxchunk.data import is_examples
from jaxchunk.models import qwen2
from jaxchunk.training import plan
from jaxchunk.training.config import TrainConfig

# No program depends on these.
UNCOMPILED = {
    name: getattr(TrainConfig(), name)
    for name in (
        *("data", "val_data", "out_dir", "cache_dir", "overwrite", "resume", "allow_changed_data", "seed"),
        *("val_every", "val_batches", "checkpoint_every", "keep_checkpoints", "max_bad_steps", "profile_steps", "log"),
        *("compilation_cache", "sample_every", "sample_prompts", "sample_tokens"),
        *("chunk_objective", "chunk_candidates", "chunk_budget_s", "chunk_thermal_s", "chunk_time_if_no_energy"),
    )
}


@pytest.fixture(scope="session")
def programs():
    """Compiled programs by what they depend on."""
    return {}


@pytest.fixture(autouse=True)
def figure(request, monkeypatch):
    """No figure, which takes as long as a run: tests with the marker `figure` have it drawn."""
    if request.node.get_closest_marker("figure") is None:
        monkeypatch.setattr(plotting, "plot_training", lambda run_path: run_path / "training.png")


@pytest.fixture(scope="module")
def no_coroutine_outlives_the_module():
    """Where Orbax meets an error, coroutines stay that it never awaits: they are not ours to close."""
    yield
    gc.collect()


@pytest.fixture
def config(tmp_path, monkeypatch, programs):
    monkeypatch.setitem(qwen2.SIZES, "tiny", qwen2.Qwen2Config(300, 32, 1, 4, 2, 48, tie_word_embeddings=True))
    compile_programs = plan.compile_programs

    def compile_once(config, model, execution, limit_bytes, devices):
        key = (
            *(dataclasses.replace(config, **UNCOMPILED), is_examples(config.data)),
            *(model, execution, limit_bytes, devices),
        )
        if key not in programs:
            programs[key] = compile_programs(config, model, execution, limit_bytes, devices)
        return programs[key]

    monkeypatch.setattr(plan, "compile_programs", compile_once)
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 400)
    return TrainConfig(
        data=str(text), cache_dir=str(tmp_path / "cache"), seq_len=16, batch_size=4, micro_batch_size=4, steps=12,
        val_every=5, val_batches=2, out_dir=str(tmp_path / "run"), mesh_data=1,
    )  # fmt: skip
