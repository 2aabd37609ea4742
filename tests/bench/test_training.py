"""The arms of a training pair differ in their chunks only."""

import json
import sys
import types

import pytest

from jaxchunk.bench import training, training_peers
from jaxchunk.bench.training import TrainingBenchConfig
from jaxchunk.bench.training_summary import summarize, table
from jaxchunk.errors import InputError, RunFailedError
from jaxchunk.measuring.protocol import Measurement


def test_all_arms_take_the_smallest_micro_batch(monkeypatch):
    """One chunk leaves less memory than four, and a larger micro-batch would be a second reason to be faster."""
    prepared = []

    def prepare(config, device):
        size = config.micro_batch_size or {1: 2, 4: 8}[config.lmhead_chunks]
        prepared.append((config.lmhead_chunks, size))
        programs = types.SimpleNamespace(
            memory_plan=types.SimpleNamespace(
                micro_batch_size=size, memory=types.SimpleNamespace(total_bytes=10 * size)
            ),
            init=lambda key, params: 0,
            train_step=lambda state, batch: (state + 1, (config.lmhead_chunks, batch)),
        )
        return types.SimpleNamespace(programs=programs, batches=iter(range(100)))

    monkeypatch.setattr(training, "prepare", prepare)
    one, four = training.own_variants(TrainingBenchConfig(chunks=(1, 4), data="synthetic"), {})
    assert prepared == [(1, 2), (4, 8), (4, 2)]
    assert one.factors == {"chunks": 1, "micro_batch_size": 2, "memory_bytes": 20, "weights": "float32"}
    assert four.factors["micro_batch_size"] == 2
    assert [one.call(), four.call(), one.call()] == [(1, 0), (4, 1), (1, 2)]  # one stream of batches


def piece(variant, repeat, time_s, energy_j, **factors):
    unknown = dict.fromkeys(
        ("energy_null_reason", "power_w", "power_w_std", "sm_clock_mhz", "temperature_c", "throttle")
    )
    known = {"time_s": time_s, "energy_j": energy_j, "energy_bound_j": 1.0, "energy_source": "test"}
    return Measurement(variant=variant, repeat=repeat, calls=10, factors=factors, **known, **unknown)


def test_ours_is_compared_with_every_peer():
    drift = (1.0, 1.1, 0.9)  # cancels within a repeat
    pieces = [
        piece(name, repeat, d * time_s, d * energy_j, **factors)
        for repeat, d in enumerate(drift)
        for name, time_s, energy_j, factors in (
            ("Liger", 0.5, 300.0, {"peer": "liger", "memory_bytes": 68e9}),
            ("4 chunks", 0.4, 240.0, {"chunks": 4, "memory_bytes": 70e9}),
            ("1 chunk", 0.4, 270.0, {"chunks": 1}),
        )
    ]
    one, four, liger = rows = summarize(pieces, tokens=1000)
    assert [row["arm"] for row in rows] == ["1 chunk", "4 chunks", "Liger"]
    assert four["over_peers"]["Liger"]["tokens_per_s"]["low"] == pytest.approx(1.25)
    assert four["over_peers"]["Liger"]["energy_per_token"]["high"] == pytest.approx(0.8)
    assert liger["over_peers"] == {} and liger["time_ratio"]["median"] == pytest.approx(1.25)
    assert one["energy_j"] == pytest.approx(8100.0) and one["energy_per_token_j"]["median"] == pytest.approx(0.27)
    head, _, _, line, *_ = table(rows).splitlines()
    assert head.endswith("| tokens/s / Liger | mJ/token / Liger |")
    assert line.endswith("| 70.0 | 1.2500 | 0.8000 |")


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
        training.run(TrainingBenchConfig(**flags), {})


def test_a_loss_that_is_not_finite_spoils_the_run(tmp_path, monkeypatch):
    def variants(config, latest):
        latest["jaxchunk"] = types.SimpleNamespace(loss=float("nan"))
        return []

    monkeypatch.setattr(training, "own_variants", variants)
    monkeypatch.setattr(training.harness, "run", lambda benchmark: benchmark.variants())
    with pytest.raises(RunFailedError, match="the loss of jaxchunk is nan at the end"):
        training.run(TrainingBenchConfig(out_dir=str(tmp_path / "run"), settle_s=0.0), {})


def test_of_all_peers_one_that_fails_is_left_out(monkeypatch, caplog):
    """By the processes themselves: a fake of each, and of ours."""
    answer = json.dumps({"variants": [{"name": "x", "factors": {}}]})
    scripts = {
        "liger": "exit(4)",
        "transformers": f"print({answer!r}); input()",
        "jaxchunk": f"print({answer!r}); input()",
    }
    monkeypatch.setattr(training, "_command", lambda name, config: [sys.executable, "-c", scripts[name]])
    monkeypatch.setattr(training_peers, "choose", lambda names: ["liger", "transformers"])
    found = []
    monkeypatch.setattr(training.harness, "run", lambda benchmark: found.extend(benchmark.variants()))
    training.run(TrainingBenchConfig(peers=("all",), settle_s=0.0), {})
    assert len(found) == 2
    assert "liger is left out: liger: its process ended with status 4; what it said is above" in caplog.messages
    with pytest.raises(RunFailedError, match="liger: its process ended with status 4"):
        training.run(TrainingBenchConfig(peers=("liger",), settle_s=0.0), {})
