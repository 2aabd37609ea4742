"""The arms of a training pair differ in their chunks only."""

import types

import pytest

from jaxchunk.bench import training_pair
from jaxchunk.bench.training_pair import TrainingPairConfig
from jaxchunk.errors import InputError, RunFailedError


def test_all_arms_take_the_smallest_micro_batch(monkeypatch):
    """One chunk leaves less memory than four, and a larger micro-batch would be a second reason to be faster."""
    prepared = []

    def prepare(config, device):
        size = config.micro_batch_size or {1: 2, 4: 8}[config.lmhead_chunks]
        prepared.append((config.lmhead_chunks, size))
        programs = types.SimpleNamespace(
            memory_plan=types.SimpleNamespace(micro_batch_size=size),
            init=lambda key, params: 0,
            train_step=lambda state, batch: (state + 1, (config.lmhead_chunks, batch)),
        )
        return types.SimpleNamespace(programs=programs, batches=iter(range(100)))

    monkeypatch.setattr(training_pair, "prepare", prepare)
    one, four = training_pair._variants(TrainingPairConfig(chunks=(1, 4), data="synthetic"), {})
    assert prepared == [(1, 2), (4, 8), (4, 2)]
    assert one.factors == {"chunks": 1, "micro_batch_size": 2} and four.factors["micro_batch_size"] == 2
    assert [one.call(), four.call(), one.call()] == [(1, 0), (4, 1), (1, 2)]  # one stream of batches


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"piece_s": float("inf")}, "--piece_s is inf"),
        ({"piece_s": 0.0}, "--piece_s is 0.0"),
        ({"chunks": (4, 4)}, "--chunks is 4 4"),
        ({"chunks": (4,)}, "--chunks is 4;"),
    ],
)
def test_bad_flags_are_named(flags, words):
    with pytest.raises(InputError, match=words):
        training_pair.run(TrainingPairConfig(**flags))


def test_a_loss_that_is_not_finite_spoils_the_run(tmp_path, monkeypatch):
    def variants(config, latest):
        latest["metrics"] = types.SimpleNamespace(loss=float("nan"))
        return []

    monkeypatch.setattr(training_pair, "_variants", variants)
    monkeypatch.setattr(training_pair.harness, "run", lambda benchmark: benchmark.variants())
    with pytest.raises(RunFailedError, match="the loss is nan at the end"):
        training_pair.run(TrainingPairConfig(out_dir=str(tmp_path / "run"), settle_s=0.0))
