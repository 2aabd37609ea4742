"""A trace of a few steps: when it begins and ends, and that a run leaves one."""

import dataclasses
import gzip
from pathlib import Path

import jax.numpy as jnp
import pytest

from jaxchunk.training import trainer
from jaxchunk.training.trace import PROGRAM, StepTrace


@pytest.fixture
def profiler(monkeypatch):
    """What JAX's profiler was asked for."""
    asked = []
    monkeypatch.setattr("jax.profiler.start_trace", lambda directory, **_: asked.append("start"))
    monkeypatch.setattr("jax.profiler.stop_trace", lambda: asked.append("stop"))
    return asked


def follow(profiler, steps, dispatched, until=None):
    """The profiler's calls beside the steps, each of which is done when the next one is dispatched."""
    said = []
    with StepTrace(steps, Path("profile"), said.append, lambda: None) as trace:
        for step in dispatched:
            trace.before(step, state=jnp.zeros(()))
            profiler.append(step)
            if step > dispatched[0]:
                trace.after(step - 1)
            if step == until:
                return said
        trace.after(dispatched[-1])
    return said


def test_it_lasts_from_the_first_step_to_the_last(profiler):
    said = follow(profiler, (3, 4), range(1, 8))
    assert profiler == [1, 2, "start", 3, 4, "stop", 5, 6, 7]  # no other step is in it
    assert said[0].startswith("trace from step 3 to step 4: profile; ")


@pytest.mark.parametrize(
    ("steps", "dispatched", "expected"),
    [
        ((1, 1), [1], ["start", 1, "stop"]),
        ((3, 6), [5, 6, 7], ["start", 5, 6, "stop", 7]),  # of a run that goes on
        ((3, 6), [7, 8], [7, 8]),
        (None, [1, 2], [1, 2]),
    ],
)
def test_where_the_run_begins_or_ends_within_it(profiler, steps, dispatched, expected):
    follow(profiler, steps, dispatched)
    assert profiler == expected


def test_an_interrupt_ends_it(profiler):
    assert "to the end" in follow(profiler, (2, 9), range(1, 12), until=4)[0]
    assert profiler[-1] == "stop"


def test_a_run_leaves_a_trace(config, capsys):
    trainer.train(dataclasses.replace(config, steps=3, val_every=0, keep_checkpoints=0, profile_steps="2:2"))
    assert list((Path(config.out_dir) / "profile").rglob("perfetto_trace.json.gz"))
    with gzip.open(Path(config.out_dir) / "profile" / PROGRAM, "rt") as file:
        assert "/optimizer/" in file.read()
    assert "trace from step 2 to step 2" in capsys.readouterr().out
