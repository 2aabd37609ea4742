"""Windows against the true joules of a simulated plant: the bound holds, and it is not vacuous."""

import random

import numpy as np
import pytest

from jaxchunk.telemetry import Monitor, NotSupported
from jaxchunk.telemetry.energy import CounterCurve
from jaxchunk.telemetry.power import PowerIntegral
from jaxchunk.telemetry.simulation.simulated import Constant, ManualClock, Ramp, SimulatedDevice, SquareWave, drive

ABSENT = NotSupported("NVML_ERROR_NOT_SUPPORTED")
SOURCES = {
    "nvml_total_energy": {},
    "nvml_power_instant": {"total_energy_j": ABSENT},
    "nvml_power_average": {"total_energy_j": ABSENT, "power_instant_w": ABSENT},
}
RUN_S = 6.0


def windows(source, profile, seed, *, tick_s=0.1, count=40, shortest_s=0.2, failing=None):
    """(|error|, bound, true joules) of random windows of one simulated run."""
    generator = random.Random(seed)
    clock = ManualClock()
    device = SimulatedDevice(
        profile,
        clock,
        tick_s=tick_s,
        tick_phase_s=generator.random() * tick_s,
        failing=SOURCES[source] | (failing or {}),
    )
    monitor = Monitor(device, now=clock)
    assert monitor.energy_source == source
    drive(monitor.sampler.poll_once, clock, RUN_S, lateness_s=generator.choice([0.0, 0.003]), seed=seed)
    results = []
    for _ in range(count):
        length_s = generator.uniform(shortest_s, 3.0)
        start_s = generator.uniform(0.5, RUN_S - 0.3 - length_s)
        # The curve itself, because the monitor hides energies with a large bound.
        found = monitor.sampler.tracks.energy.difference(start_s, start_s + length_s)
        assert found.null_reason is None
        true_j = device.true_energy_j(start_s, start_s + length_s)
        results.append((abs(found.value - true_j), found.bound, true_j))
    return np.array(results).T


def shortest_window_s(source):
    return 1.0 if source == "nvml_power_average" else 0.2


@pytest.mark.parametrize("tick_s", [0.1, 0.103, 0.02, 0.004])
@pytest.mark.parametrize("source", SOURCES)
def test_constant_power_always_within_the_bound(source, tick_s):
    for seed in range(8):
        power_w = random.Random(seed).uniform(20.0, 900.0)
        error_j, bound_j, _ = windows(
            source, Constant(power_w), seed, tick_s=tick_s, shortest_s=shortest_window_s(source)
        )
        assert (error_j <= bound_j).all()


@pytest.mark.parametrize("source", SOURCES)
def test_the_bound_is_below_a_tenth_for_a_second_of_constant_power(source):
    clock = ManualClock()
    monitor = Monitor(SimulatedDevice(Constant(500.0), clock, failing=SOURCES[source]), now=clock)
    drive(monitor.sampler.poll_once, clock, RUN_S, lateness_s=0.002)
    for start_s in np.linspace(0.5, 4.0, 29):
        window = monitor.window(start_s, start_s + 1.0)
        assert window.energy_j == pytest.approx(500.0, rel=0.05)
        assert window.energy_bound_j < 50.0
        assert window.power_w == pytest.approx(window.energy_j)


@pytest.mark.parametrize("source", SOURCES)
def test_square_waves_within_the_bound(source):
    results = []
    for seed in range(30):
        generator = random.Random(100 + seed)
        wave = SquareWave(700.0, 300.0, generator.uniform(0.005, 0.080), generator.random())
        results.append(windows(source, wave, seed, shortest_s=shortest_window_s(source)))
    error_j, bound_j, true_j = np.concatenate(results, axis=1)
    assert (error_j <= bound_j).mean() >= 0.99
    if source == "nvml_total_energy":
        # A second or more of it is still worth reporting.
        long = true_j > 500.0
        assert (bound_j[long] < 0.1 * true_j[long]).mean() > 0.95


def test_a_square_wave_in_step_with_the_samples():
    """Its period is the sampling period: without jitter every sample would see the same power."""
    for period_s in (0.0125, 0.025, 0.005):
        wave = SquareWave(700.0, 300.0, period_s)
        error_j, bound_j, _ = windows("nvml_power_instant", wave, seed=1, shortest_s=1.0)
        assert (error_j <= bound_j).all()
        assert bound_j.max() > 0


@pytest.mark.parametrize("source", SOURCES)
def test_ramps_within_the_bound(source):
    for seed in range(8):
        ramp = Ramp(300.0, 700.0, 1.0, random.Random(seed).uniform(1.2, 5.0))
        error_j, bound_j, _ = windows(source, ramp, seed, shortest_s=shortest_window_s(source))
        assert (error_j <= bound_j).mean() >= 0.99


def test_without_power_samples_the_neighbouring_ticks_bound_a_ramp():
    ramp = Ramp(300.0, 700.0, 1.0, 3.0)
    error_j, bound_j, _ = windows("nvml_total_energy", ramp, 3, failing={"power_instant_w": ABSENT})
    assert (error_j <= bound_j).all()


def test_the_uncertainty_of_a_tick_is_half_the_distance_of_its_polls():
    curve = CounterCurve(0.01, resolution_j=0.0)
    for i in range(200):  # polls every 10 ms; a tick of 50 J every 100 ms
        curve.add(i * 0.01, 50.0 * (i // 10))
    # At a knot, only the tick's own 5 ms matter: largest mean power 50 J / 90 ms at each end.
    knot_s = 0.095
    found = curve.difference(knot_s + 0.1, knot_s + 1.1)
    assert found.value == pytest.approx(500.0)
    assert found.bound == pytest.approx(2 * 0.005 * 50.0 / 0.09, rel=1e-6)


def test_a_slow_read_widens_the_uncertainty():
    def bound_j(read_s):
        curve = CounterCurve(0.01, resolution_j=0.0)
        for i in range(200):
            curve.add_reading(i * 0.01, i * 0.01 + read_s, 50.0 * (i // 10))
        return curve.difference(0.5, 1.5).bound

    assert bound_j(0.004) > bound_j(0.0) * 1.3


def test_swings_inside_an_interval_widen_the_bound_through_the_power_samples():
    def bound_j(power_range):
        curve = CounterCurve(0.01, power_range=power_range)
        for i in range(200):
            curve.add(i * 0.01, 50.0 * (i // 10))
        return curve.difference(0.545, 1.545).bound  # middle of an interval: the largest curvature

    steady, swinging = bound_j(lambda a, b: (500.0, 500.0)), bound_j(lambda a, b: (300.0, 700.0))
    # (P_hi - P_lo) a (1 - a) tau = 400 * 0.25 * 0.1 = 10 J at each end, and a larger power beside it.
    assert swinging - steady >= 20.0


def test_counter_reset_blocks_only_the_windows_across_it():
    clock = ManualClock()
    device = SimulatedDevice(Constant(500.0), clock, reset_at_s=3.0)
    monitor = Monitor(device, now=clock)
    drive(monitor.sampler.poll_once, clock, RUN_S)
    across = monitor.window(2.5, 3.5)
    assert across.energy_j is None and across.energy_bound_j is None
    assert "went backwards" in across.energy_null_reason
    for start_s in (1.5, 3.5):
        assert monitor.window(start_s, start_s + 1.0).energy_j == pytest.approx(500.0, rel=0.05)


@pytest.mark.parametrize("source", SOURCES)
def test_a_stalled_sampler_makes_the_window_null(source):
    clock = ManualClock()
    monitor = Monitor(SimulatedDevice(Constant(500.0), clock, failing=SOURCES[source]), now=clock)
    drive(monitor.sampler.poll_once, clock, 2.5)
    clock.advance(1.0)
    drive(monitor.sampler.poll_once, clock, 7.0)
    for window in [(1.0, 5.5), (2.9, 4.2), (1.2, 3.0)]:
        result = monitor.window(*window)
        assert result.energy_j is None
        assert "no reading of the" in result.energy_null_reason
    assert monitor.window(1.0, 2.2).energy_j == pytest.approx(600.0, rel=0.05)
    assert monitor.window(4.0, 5.2).energy_j == pytest.approx(600.0, rel=0.05)


def test_an_interval_that_holds_a_gap_is_not_interpolated():
    curve = CounterCurve(0.01)
    times_s = [i * 0.01 for i in range(256)] + [4.0 + i * 0.01 for i in range(100)]
    for time_s in times_s:
        curve.add(time_s, 50.0 * (int(time_s * 1000 + 0.5) // 100))
    # The gap begins at 2.55 s, after the tick at 2.5 s: a window may end up to that tick.
    assert curve.difference(1.0, 2.49).value == pytest.approx(745.0, rel=0.02)
    assert curve.difference(1.0, 2.53).null_reason == "no reading of the energy counter for 1.45 s"
    assert curve.difference(4.05, 4.5).value is None  # before the first tick behind the gap
    assert curve.difference(4.2, 4.6).value == pytest.approx(200.0, rel=0.05)


def test_what_is_settled_does_not_change():
    clock = ManualClock()
    device = SimulatedDevice(Ramp(300.0, 700.0, 1.9, 2.1), clock)
    monitor = Monitor(device, now=clock)
    drive(monitor.sampler.poll_once, clock, 2.0)
    curve = monitor.sampler.tracks.energy
    settled = {end_s: curve.difference(1.0, end_s) for end_s in np.linspace(1.5, 2.0, 51) if curve.settled(end_s)}
    assert 1.7 < max(settled) < 1.9
    drive(monitor.sampler.poll_once, clock, 3.0)
    for end_s, before in settled.items():
        assert curve.difference(1.0, end_s) == before


def test_a_window_shorter_than_the_average_has_no_energy():
    integral = PowerIntegral(0.025, averaging_s=1.0)
    for i in range(200):
        integral.add(i * 0.025, 500.0)
    assert "0.400 s is shorter than the 1 s" in integral.difference(1.5, 1.9).null_reason
    assert integral.difference(1.5, 3.5).value == pytest.approx(1000.0)


@pytest.mark.parametrize("kind", ["counter", "integral"])
def test_forgetting_changes_no_later_window(kind):
    def filled():
        curve = CounterCurve(0.01) if kind == "counter" else PowerIntegral(0.01)
        for i in range(2000):
            power_w = 500.0 + 100.0 * (i % 7)
            ticks = i // 10
            curve.add(i * 0.01, 50.0 * ticks + 20.0 * (ticks % 3) if kind == "counter" else power_w)
        return curve

    whole, trimmed = filled(), filled()
    trimmed.forget_before(15.0)
    assert len(trimmed) < len(whole) / 3
    kept, reference = trimmed.difference(15.0, 17.0), whole.difference(15.0, 17.0)
    assert kept.value == pytest.approx(reference.value, rel=1e-12)
    assert kept.bound == pytest.approx(reference.bound, rel=1e-12)
