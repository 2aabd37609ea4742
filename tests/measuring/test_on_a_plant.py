"""Protocol and verdict on a simulated GPU, from dispatched work to the sentence: what is concluded is what is true.

Nothing here is a measurement of a device.
"""

import dataclasses
import itertools
import statistics

import pytest
from plant_rig import COMPUTE_S, MEMORY_S, Rig

from jaxchunk.bench import verdict
from jaxchunk.measuring.protocol import Protocol, measure, settle
from jaxchunk.telemetry.simulation.plant import Plant, chunked_iteration
from jaxchunk.telemetry.simulation.profiles import H200


def run(rig, variants, **options):
    protocol = Protocol(**({"repeats": 5, "calls": 30, "warmup_calls": 3, "settle_s": 10.0} | options))
    conditions = settle(variants, rig.monitor, protocol)
    return list(measure(variants, rig.monitor, protocol, conditions)), conditions


def braked():
    """Long bursts exceed a peak limit, which a fast brake answers and the clock recovers from slowly; else no limit."""
    controller = dataclasses.replace(
        H200.controller, power_limit_w=None, droop_mhz_per_w=0.0, up_mhz=15.0, period_s=0.05,
        peak_limit_w=980.0, peak_averaging_s=0.01, brake_fraction=0.25,
    )  # fmt: skip
    return dataclasses.replace(H200, controller=controller, activity_noise=0.0)


def test_joules_and_times_are_the_plants(monkeypatch):
    rig = Rig(monkeypatch, H200)
    measurements, conditions = run(rig, [rig.variant(n, a) for n, a in itertools.product((1, 16), (1.0, 0.6))])
    assert conditions.heater.startswith("random") and conditions.start_temperature_c > 40
    zero_s = rig.monitor.start_s
    for m in measurements:
        true_j = rig.device.true_energy_j(zero_s + m.start_s, zero_s + m.end_s) / m.calls
        assert abs(m.energy_j - true_j) <= m.energy_bound_j
        assert m.invalid_reason is None
        assert m.call_ends_s[-1] == pytest.approx(m.end_s - m.start_s, abs=0.006)  # a reading takes 3 ms of this time
        assert abs(m.start_temperature_c - conditions.start_temperature_c) <= 3.0
        assert m.throttle["sw_power_cap"] > 0.5 if m.factors["inputs"] == "random" else True
    # The first windows come while the rhythm of the counter is still being learnt: their bounds are up to twice that.
    assert statistics.median(m.energy_bound_j / m.energy_j for m in measurements) < 0.025
    rows = {(row.inputs, row.chunks): row for row in verdict.compare(measurements, 1, {}).rows}
    assert rows["random", 16].power_w_std.high < 0.7 * rows["random", 1].power_w_std.low  # the ripple falls
    assert rows["zero", 1].power_w.high < rows["random", 1].power_w.low
    assert rows["zero", 1].sm_clock_mhz.low > rows["random", 1].sm_clock_mhz.high


@pytest.mark.parametrize(("profile", "gains"), [(braked(), True), (H200, False)], ids=["fast brake", "power cap only"])
def test_the_verdict_is_the_plants_truth(monkeypatch, profile, gains):
    def iteration(num_chunks):
        return chunked_iteration(COMPUTE_S, MEMORY_S, num_chunks)

    truth = {n: Plant(profile).run([iteration(n)] * 400).time_s[200:].mean() for n in (1, 64)}
    assert (truth[64] < 0.99 * truth[1]) == gains
    rig = Rig(monkeypatch, profile)
    found = verdict.compare(run(rig, [rig.variant(n) for n in (1, 64)])[0], 1, {})
    assert found.rows[1].time_ratio.median == pytest.approx(truth[64] / truth[1], abs=0.01)
    assert ("64 chunks take" in found.sentences[0] and "% less (" in found.sentences[0]) == gains


def test_pinned_clocks_are_slow_without_a_reason(monkeypatch):
    rig = Rig(monkeypatch, H200)
    rig.plant.pin_clock(H200.min_clock_mhz)
    (measurement,), conditions = run(rig, [rig.variant(4)], repeats=1, calls=15)
    assert conditions.slow_without_reason > 0.8 and measurement.slow_without_reason > 0.8
