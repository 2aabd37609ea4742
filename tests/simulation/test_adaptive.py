"""Adaptive chunks in closed loop with a simulated GPU. Nothing here is a measurement of a device."""

import dataclasses
import json

import numpy as np
import pytest

from jaxchunk.errors import InputError
from jaxchunk.simulation import adaptive, adaptive_run, devices
from jaxchunk.simulation.adaptive import Disturbance, Run, Step
from jaxchunk.simulation.adaptive_run import SimulateControllerConfig
from jaxchunk.tuning.policy import Rules

CONSTANT_S = 10.0
SCENARIO = (Disturbance("cold start", 0.0), Disturbance("hot room", 25.0, ambient_c=33.0, resistance=1.01))


@pytest.fixture(scope="module")
def gpu():
    """The simulated Spark with a fourth of its heat capacity: a minute is worth four."""
    spark = devices.load("gb10")
    thermal = dataclasses.replace(spark.profile.thermal, time_constant_s=CONSTANT_S)
    return dataclasses.replace(spark, profile=dataclasses.replace(spark.profile, thermal=thermal))


def test_it_leaves_what_the_brake_punishes(gpu):
    rules = Rules((1, 4), thermal_constant_s=CONSTANT_S, most_windows=12)
    options = {"scenario": SCENARIO, "end_s": 640.0, "seed": 0}
    ours = adaptive.run_adaptive(gpu, rules, "edp", **options)
    fixed = {n: adaptive.run_fixed(gpu, n, **options) for n in (1, 4)}
    found = adaptive.compare(ours, fixed, scenario=SCENARIO, constant_s=CONSTANT_S, end_s=640.0)
    assert {step.num_chunks for step in ours.steps} == {1, 4}
    assert found["switches"] == sum(
        a.num_chunks != b.num_chunks for a, b in zip(ours.steps, ours.steps[1:], strict=False)
    )
    assert found["switches"] < 10 and found["switches"] == sum(event["switches"] for event in found["events"])
    best = found["best_fixed"]
    assert found["events"][-1]["chunks_at_the_end"] == best
    assert best == 4 and found["steps_per_s_fixed"]["1"] < 0.96 * found["steps_per_s_fixed"]["4"]
    assert found["throughput_over_best_fixed"] > 0.95 and not any(step.num_chunks == 1 for step in ours.steps[-10:])
    before = next(step for step in reversed(fixed[4].steps) if step.end_s < 250.0)
    assert fixed[4].steps[-1].temperature_c > before.temperature_c + 4  # the hot room
    assert np.all(np.diff([step.end_s for step in ours.steps]) > 0) and ours.steps[-1].end_s >= 640.0


def test_it_is_compared_with_the_best_after_every_disturbance():
    def run(times_s):
        ends_s = np.cumsum(times_s)
        return [Step(1, end - time, end, 1.0, 60.0, 1500.0) for end, time in zip(ends_s, times_s, strict=True)]

    fixed = {1: Run(run([1.0] * 300 + [2.0] * 151), []), 4: Run(run([1.5] * 401), [])}
    ours = Run(run([1.5] * 40 + [1.0] * 240 + [1.5] * 201), [])
    scenario = [Disturbance("a", 0.0), Disturbance("b", 10.0)]
    found = adaptive.compare(ours, fixed, scenario=scenario, constant_s=30.0, end_s=600.0)
    assert [event["best_chunks"] for event in found["events"]] == [1, 4]
    assert found["throughput_over_oracle"] == pytest.approx(480 / 500, rel=0.01)
    assert [event["reaches_98_percent_after_s"] for event in found["events"]] == [None, 0.0]  # of the first, too short
    assert found["best_fixed"] == 1 and found["switches"] == 0


def test_the_script_writes_records_and_a_figure(gpu, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(adaptive_run.devices, "load", lambda name: gpu)
    path = tmp_path / "run"
    adaptive_run.run(SimulateControllerConfig(candidates=(1, 4), constants=15.0, out_dir=str(path)))
    summary = json.loads((path / "summary.json").read_text())
    assert summary["what"].startswith("SIMULATION") and [e["name"] for e in summary["events"]] == ["cold start"]
    bins = json.loads((path / "bins.json").read_text())
    assert set(bins["throughput"]) == {"1", "4", "adaptive"} and len(bins["time_s"]) == len(bins["num_chunks"]) == 5
    decisions = [json.loads(line) for line in (path / "chunks.jsonl").read_text().splitlines()]
    assert decisions[0]["event"] == "explore" and all(decision["reason"] for decision in decisions)
    assert (path / "controller.png").read_bytes().startswith(b"\x89PNG")
    assert '"what": "SIMULATION' in capsys.readouterr().out


def test_the_spread_has_every_scenario_and_seed(gpu, tmp_path, monkeypatch):
    monkeypatch.setattr(adaptive_run.devices, "load", lambda name: gpu)
    monkeypatch.setattr(adaptive, "SCENARIOS", {"standard": SCENARIO[:1], "two": SCENARIO[:1]})
    options = {"candidates": (1, 4), "constants": 12.0, "out_dir": str(tmp_path / "run")}
    found = adaptive_run.run(SimulateControllerConfig(seed=3, spread=2, **options))["switches"]
    lines = [json.loads(line) for line in (tmp_path / "run/spread.jsonl").read_text().splitlines()]
    wanted = [(name, seed) for name in ("standard", "two") for seed in (3, 4)]
    assert [(line["scenario"], line["seed"]) for line in lines] == wanted
    assert [line["switches"] for line in lines] == found["standard"] + found["two"]
    assert sum(found["standard"]) > 0 and found["standard"] == found["two"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"candidates": (0, 1)}, "--candidates is 0 1"),
        ({"constants": 0.0}, "--constants is 0"),
        ({"scenario": "flood"}, "--scenario is flood; choose from standard, early"),
        ({"device": "l40s"}, "has no training"),
        ({"device": "tpu"}, "neither one of"),
    ],
)
def test_what_cannot_be_simulated(changes, said):
    with pytest.raises(InputError, match=said):
        adaptive_run.run(SimulateControllerConfig(**changes))
