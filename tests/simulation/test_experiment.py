"""Simulated cases: reproducible, consistent, and with the effects that docs/simulation.md claims."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from jaxchunk.simulation import calibrate, devices, points, sweeps
from jaxchunk.simulation.experiment import median_row, run_case, run_cases

RESULTS = Path(__file__).parents[2] / "results" / "nvidia-h200"


def quick(name):
    """A built-in device that warms up in seconds, to the same temperature."""
    gpu = devices.load(name)
    thermal = replace(gpu.profile.thermal, time_constant_s=2.0)
    return replace(gpu, profile=replace(gpu.profile, thermal=thermal))


def speeds(gpu, inputs, chunks, measured_s=40.0):
    cases = [("microbenchmark", inputs, n) for n in chunks]
    return [row.speed for row in run_cases(gpu, cases, seeds=(0,), measured_s=measured_s).values()]


def test_a_case_is_reproducible_and_adds_up():
    gpu, case = quick("gb10"), ("training", "random", 4)
    row = run_case(gpu, case, seed=3, measured_s=8.0)
    assert row == run_case(gpu, case, seed=3, measured_s=8.0)
    assert row != run_case(gpu, case, seed=4, measured_s=8.0)
    assert row.energy_j == pytest.approx(row.power_w * row.time_s)
    assert row.wall_power_w == pytest.approx(row.power_w + gpu.wall.other_w)
    assert row.wall_energy_j == pytest.approx(row.wall_power_w * row.time_s)
    assert 0 <= row.hw_power_brake <= 1 and row.case == case


def test_chunks_help_the_spark_and_hardly_the_h200():
    one, sixteen = speeds(quick("gb10"), "random", (1, 16))
    assert 1.15 < sixteen / one < 1.3
    one, sixteen = speeds(quick("h200"), "random", (1, 16), 10.0)
    assert 0.97 < sixteen / one < 1.02


def test_zeros_are_braked_only_by_a_brake_that_counts_events():
    gpu = quick("gb10")
    controller = replace(gpu.profile.controller, peak_counts_events=False)
    reads_power = replace(gpu, profile=replace(gpu.profile, controller=controller))
    case = ("microbenchmark", "zero", 1)
    counting, reading = (run_case(g, case, seed=0, measured_s=30.0) for g in (gpu, reads_power))
    assert counting.hw_power_brake > 0.5 and reading.hw_power_brake == 0.0
    assert reading.speed > 1.15 * counting.speed


def test_a_limit_far_away_leaves_nothing_to_gain():
    gpu = quick("gb10")
    far = sweeps.distance(gpu, 4, (0,), 5.0).points[-1]
    assert far.x == 1.2 and far.gain == pytest.approx(1.0, abs=0.02)


def test_medians_over_seeds():
    rows = [run_case(quick("h200"), ("microbenchmark", "random", 4), seed=n, measured_s=1.0) for n in range(3)]
    middle = median_row(rows)
    assert middle.seed is None and middle.case == rows[0].case
    assert middle.time_s == sorted(row.time_s for row in rows)[1]


def test_points_are_what_our_records_say():
    micro = json.loads((RESULTS / "microbench" / "summary.json").read_text())["rows"]
    arms = json.loads((RESULTS / "training_pair" / "summary.json").read_text())["arms"]
    rows = {("microbenchmark", row["inputs"], row["chunks"]): row for row in micro}
    names = {"clock_mhz": "sm_clock_mhz", "clock_std_mhz": "sm_clock_mhz_std", "power_std_w": "power_w_std"}

    def measured(case, quantity):
        if case[0] == "training":
            arm = next(arm for arm in arms if arm["chunks"] == case[2])
            if quantity == "speed":
                return 1.0 / arm["time_ratio"]["median"]  # the ratio is paired by time, better than that of medians
            return arm[{"time_s": "step_time_s"}.get(quantity, names.get(quantity, quantity))]["median"]
        return 1.0 / rows[case]["time_s"][0] if quantity == "speed" else rows[case][names.get(quantity, quantity)][0]

    ours = points.load("h200")
    assert len(ours) > 20
    for point in ours:
        value = measured(point.case, point.quantity)
        value /= measured(point.reference, point.quantity) if point.reference else 1.0
        assert value == pytest.approx(point.value, rel=1e-4), point.label


def test_residuals_of_ratios_differences_and_missing_cases():
    base = points.load("gb10")[0]
    case, one = base.case, base.reference
    row = run_case(quick("h200"), ("microbenchmark", "random", 2), seed=0, measured_s=1.0)
    rows = {case: replace(row, speed=3.0, temperature_c=70.0), one: replace(row, speed=2.0, temperature_c=60.0)}
    warmer = replace(base, quantity="temperature_c", over=None, minus=base.over, value=8.0, tolerance=4.0)
    ratio, difference = points.residuals([base, warmer], rows)
    assert ratio["simulated"] == pytest.approx(1.5)
    assert difference["simulated"] == pytest.approx(10.0)
    assert difference["residual_in_tolerances"] == pytest.approx(0.5)
    assert points.residuals([base], {case: rows[case]})[0]["residual"] is None
    assert points.cases([base, warmer]) == [case, one]
    assert points.load("a file of mine.toml") == []


def test_the_fit_is_better_than_where_it_starts(monkeypatch):
    monkeypatch.setattr(calibrate, "MEASURED_S", 8.0)
    monkeypatch.setattr(calibrate, "SEEDS", (0,))
    found = calibrate.calibrate("l40s", max_evaluations=12)
    names, wanted = calibrate.FITTED["l40s"], [p for p in points.load("l40s") if p.role == "fitted"]
    tables = devices.tables("l40s", fitted=False)
    start = [math.log(devices.get_value(tables, name)) for name in names]
    assert found.objective < calibrate.objective(tables, names, start, "l40s", wanted)
    assert found.num_points == len(wanted) and found.values.keys() == set(names)
