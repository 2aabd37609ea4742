"""The times at which a counter is read: what they cost, and what they see."""

import random

import numpy as np
import pytest

from jaxchunk.telemetry import Monitor, ReadFailed
from jaxchunk.telemetry.schedule import (
    CHECK_S,
    CPU_SHARE,
    MAX_CPU_SHARE,
    MAX_DEBT_S,
    READINGS_PER_CHECK,
    CounterSchedule,
)
from jaxchunk.telemetry.simulation.simulated import Constant, ManualClock, SimulatedDevice, drive, make_counter_dear

POLL_S = 0.005


def rig(cost_s, **device_options):
    """A simulated counter; every reading takes `cost_s` of processor time and up to 1.8 times that of wall time."""
    clock, cpu = ManualClock(), ManualClock()
    device = SimulatedDevice(Constant(600.0), clock, **device_options)
    readings_s = make_counter_dear(device, clock, cpu, cost_s, random.Random(7))
    return clock, cpu, device, Monitor(device, now=clock, cpu_time=cpu), readings_s


def without_rhythm(device, clock):
    """Makes the counter move at random times, 0.1 s apart in the mean."""
    generator, ticks_s = random.Random(3), [0.0]
    while ticks_s[-1] < 400.0:
        ticks_s.append(ticks_s[-1] + generator.expovariate(10.0))
    device.total_energy_j, dear = (
        lambda: (dear(), 600.0 * ticks_s[np.searchsorted(ticks_s, clock()) - 1])[1],
        device.total_energy_j,
    )


@pytest.mark.parametrize("cost_s", [0.0, 0.0002, 0.001, 0.0032, 0.006, 0.01, 0.02, 0.05])
@pytest.mark.parametrize("tick_s", [0.1, 0.02])
def test_the_budget_holds_whatever_a_reading_costs(cost_s, tick_s):
    clock, cpu, _, monitor, _ = rig(cost_s, tick_s=tick_s)
    drive(monitor.sampler.poll_once, clock, 100.0, lateness_s=0.001)
    spent_s = cpu()
    assert spent_s <= MAX_DEBT_S + 100.0 * MAX_CPU_SHARE + 2 * cost_s
    drive(monitor.sampler.poll_once, clock, 200.0, lateness_s=0.001)
    assert cpu() <= MAX_DEBT_S + 200.0 * MAX_CPU_SHARE + 2 * cost_s
    if monitor.sampler.tracks.energy.grid.period_s is not None and cost_s <= 0.0032:
        assert cpu() - spent_s <= 100.0 * 1.1 * CPU_SHARE


@pytest.mark.parametrize("cost_s", [0.0032, 0.01])
@pytest.mark.parametrize("trouble", ["fails", "stands still", "no rhythm", "phase jumps"])
def test_trouble_does_not_break_the_budget(cost_s, trouble):
    clock, cpu, device, monitor, _ = rig(cost_s)
    if trouble == "no rhythm":
        without_rhythm(device, clock)
    drive(monitor.sampler.poll_once, clock, 10.0, lateness_s=0.001)
    for until_s in np.arange(13.0, 160.0, 3.0):
        if trouble == "fails":
            device.failing["total_energy_j"] = ReadFailed("NVML_ERROR_GPU_IS_LOST")
        elif trouble == "stands still":
            device._tick_s = 1e6
        elif trouble == "phase jumps":
            device._tick_phase_s += 0.041
        drive(monitor.sampler.poll_once, clock, until_s, lateness_s=0.001)
    assert cpu() <= MAX_DEBT_S + 160.0 * MAX_CPU_SHARE + cost_s


@pytest.mark.parametrize(("cost_s", "tick_s"), [(0.0, 0.1), (0.0002, 0.1), (0.0004, 0.1), (0.002, 1.0), (0.0, 0.02)])
def test_a_counter_that_the_budget_allows_is_seen_at_every_tick(cost_s, tick_s):
    clock, _, _, monitor, _ = rig(cost_s, tick_s=tick_s)
    drive(monitor.sampler.poll_once, clock, 60.0)
    curve = monitor.sampler.tracks.energy
    knots_s, uncertainty_s = np.array(curve._times_s), np.array(curve._uncertainty_s)
    late = knots_s > 20.0
    assert uncertainty_s[late].max() < 0.008  # so every one of them was seen between two polls;
    assert np.diff(knots_s[late]).max() < max(1.5 * tick_s, 0.05)  # of ticks every 20 ms some are no knots


def test_a_dear_counter_is_not_read_at_every_tick():
    clock, _, _, monitor, readings_s = rig(0.0032)
    drive(monitor.sampler.poll_once, clock, 60.0)
    late = [time_s for time_s in readings_s if time_s > 10.0]
    assert 0.7 < len(late) / 50.0 / (CPU_SHARE / 0.0032) < 1.1


def test_its_grid_is_checked_in_time():
    clock, _, _, monitor, _ = rig(0.0032)
    grid = monitor.sampler.tracks.energy.grid
    drive(monitor.sampler.poll_once, clock, 5.0)
    while clock() < 100.0:
        drive(monitor.sampler.poll_once, clock, clock() + 0.1)
        assert clock() - grid.last_seen_s < max(CHECK_S, READINGS_PER_CHECK * 0.0032 / (CPU_SHARE / 2)) + 1.0


@pytest.mark.parametrize("cost_s", [0.0032, 0.01, 0.05])
def test_a_counter_without_a_rhythm_costs_its_budget_and_has_an_energy(cost_s):
    clock, cpu, device, monitor, readings_s = rig(cost_s)
    without_rhythm(device, clock)
    drive(monitor.sampler.poll_once, clock, 300.0)
    learning = [time_s for time_s in readings_s if time_s < CounterSchedule.LEARNING_S]
    assert len(learning) > 15  # it was tried
    later = [time_s for time_s in readings_s if 3.0 < time_s < 20.0]
    assert len(later) <= 1.1 * 17.0 * CPU_SHARE / cost_s + 1
    assert cpu() <= MAX_DEBT_S + 300.0 * MAX_CPU_SHARE + cost_s
    window = monitor.window(5.0, 240.0)  # the pauses are on purpose: they are no gaps
    assert window.energy_j is not None, window.energy_null_reason
    assert abs(window.energy_j - 600.0 * 235.0) <= window.energy_bound_j


def test_attending_reads_the_next_ticks():
    clock, _, _, monitor, readings_s = rig(0.0032)
    drive(monitor.sampler.poll_once, clock, 8.0)
    for now_s in np.arange(9.0, 40.0, 5.0):
        drive(monitor.sampler.poll_once, clock, now_s)
        now_s = clock()
        monitor.attend()
        drive(monitor.sampler.poll_once, clock, now_s + 0.8)
        ticks = {int(time_s / 0.1) for time_s in readings_s if now_s < time_s <= now_s + 0.3}
        assert len(ticks) >= 2  # of three
        assert monitor.ready(now_s)  # without it 0.8 s are seldom enough


@pytest.mark.parametrize("cost_s", [0.0032, 0.01])
def test_attending_all_the_time_does_not_break_the_budget(cost_s):
    clock, cpu, _, monitor, _ = rig(cost_s)
    while clock() < 200.0:
        monitor.attend()
        drive(monitor.sampler.poll_once, clock, clock() + 0.05)
    assert cpu() <= MAX_DEBT_S + 200.0 * MAX_CPU_SHARE + 2 * cost_s


def test_attending_before_a_rhythm_is_known_changes_nothing():
    clock, _, _, monitor, readings_s = rig(0.0)
    drive(monitor.sampler.poll_once, clock, 0.2)
    monitor.attend()
    drive(monitor.sampler.poll_once, clock, 0.5)
    assert np.diff(readings_s[2:]).max() < 2 * POLL_S


def test_a_rhythm_that_was_lost_is_learnt_again_much_later():
    clock, _, device, monitor, _ = rig(0.0032)
    drive(monitor.sampler.poll_once, clock, 10.0)
    device.failing["total_energy_j"] = ReadFailed("NVML_ERROR_GPU_IS_LOST")
    drive(monitor.sampler.poll_once, clock, 400.0)
    device.failing.clear()
    drive(monitor.sampler.poll_once, clock, 700.0)
    assert monitor.sampler.tracks.energy.grid.period_s == pytest.approx(0.1, rel=0.01)
    assert monitor.window(680.0, 690.0).energy_j == pytest.approx(6000.0, rel=0.02)
