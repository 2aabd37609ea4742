"""A plant's instruments, and the truth test: what `Monitor` says of a plant's joules holds within its bound."""

import itertools
from dataclasses import replace

import numpy as np
import pytest

from jaxchunk.telemetry import CALLS, THROTTLE_REASONS, Monitor, NotSupported, ReadFailed, probe
from jaxchunk.telemetry.simulation.plant import Phase, Plant, chunked_iteration
from jaxchunk.telemetry.simulation.plant_device import PlantDevice
from jaxchunk.telemetry.simulation.profiles import GB10, H200, L40S
from jaxchunk.telemetry.simulation.simulated import ManualClock, drive

ABSENT = NotSupported("NVML_ERROR_NOT_SUPPORTED")
LOST = ReadFailed("NVML_ERROR_UNKNOWN")
PROFILES = pytest.mark.parametrize("profile", [H200, L40S, GB10], ids=lambda profile: profile.name)
WINDOWS_S = (0.4, 1.0, 5.0)


def instruments(profile, **changes):
    return replace(profile, instruments=replace(profile.instruments, **changes))


# Instantaneous power that is never stale: the mean over the last 25 ms.
def fresh(profile):
    return instruments(profile, renewal_s=0.0)


def rig(profile=H200, phases=(), *, time_s=0.0, seed=0, **options):
    plant = Plant(profile, seed=seed)
    plant.submit(phases)
    clock = ManualClock(time_s)
    return clock, PlantDevice(plant, clock, seed=seed, **options)


def steady(profile, num_chunks):
    compute_s, memory_s = {"H200": (0.051, 0.007), "L40S": (0.764, 0.032), "GB10": (0.55, 0.2)}[profile.name]
    return itertools.cycle(chunked_iteration(compute_s, memory_s, num_chunks))


def training(profile, num_chunks):
    """Steps of about 0.3 s, the head in chunks, with a little idle time after each."""
    layers, optimizer = Phase("compute", 0.2, 0.8), Phase("memory", 0.04)
    return itertools.cycle([layers, *chunked_iteration(0.051, 0.007, num_chunks), optimizer, Phase("idle", 0.004)])


def bursts(profile, num_chunks):
    """Work for about 1.5 s, then none for 0.7 s."""
    return itertools.cycle([*chunked_iteration(1.3, 0.2, 20 * num_chunks), Phase("idle", 0.7)])


# --- instruments


@PROFILES
def test_what_a_profile_answers(profile):
    _, device = rig(profile, call_time_s={})
    probes = probe(device)
    absent = {call for call, result in probes.items() if result.status == "not_supported"}
    assert absent == ({"power_limit_w", "power_samples_w"} if profile is GB10 else set())
    assert all(probes[call].supported for call in set(CALLS) - absent)
    assert device.calls == dict.fromkeys(CALLS, 1)
    assert device.name == f"simulated {profile.name}"
    assert device.uuid == f"GPU-simulated-{profile.name.lower()}"
    assert device.describe() == {"name": device.name, "uuid": device.uuid, "simulated": True}
    if profile is not GB10:
        assert device.power_limit_w() == profile.controller.power_limit_w


def test_a_call_that_the_profile_lacks():
    _, device = rig(instruments(H200, not_supported=frozenset({"temperature_c"})))
    with pytest.raises(NotSupported, match="NVML_ERROR_NOT_SUPPORTED"):
        device.temperature_c()


def test_the_counter_moves_only_at_its_ticks():
    clock, device = rig(phases=[Phase("compute", 9.0)], time_s=1.0, tick_phase_s=0.03, call_time_s={})
    before_j = device.total_energy_j()
    assert before_j == pytest.approx(device.true_energy_j(-100.0, 0.93), abs=1e-3)
    clock.advance(0.029)
    assert device.total_energy_j() == before_j
    clock.advance(0.002)
    assert device.total_energy_j() - before_j == pytest.approx(device.true_energy_j(0.93, 1.03), abs=2e-3)
    assert round(before_j * 1e3) == pytest.approx(before_j * 1e3, abs=1e-6)


def test_the_counter_restarts():
    clock, device = rig(time_s=2.04, reset_at_s=2.05, call_time_s={})
    assert device.total_energy_j() > 100 * 100.0
    clock.advance(0.15)
    assert device.total_energy_j() == pytest.approx(device.true_energy_j(2.05, 2.1), abs=1e-3)


def test_instantaneous_power_is_renewed_now_and_then():
    clock, device = rig(phases=[Phase("idle", 1.0), Phase("compute", 9.0)], time_s=0.99, renewal_phase_s=0.02)
    before_w = device.power_instant_w()
    clock.time_s = 1.015
    assert device.power_instant_w() == before_w
    clock.time_s = 1.025
    assert device.power_instant_w() == pytest.approx(device.true_energy_j(0.995, 1.02) / 0.025, abs=1e-3)
    assert device.power_instant_w() > before_w + 100.0


def test_instantaneous_power_without_averaging_or_renewal():
    clock, device = rig(instruments(H200, renewal_s=0.0, instant_averaging_s=0.0), [Phase("compute", 9.0)])
    clock.time_s = 0.1234
    assert device.power_instant_w() == pytest.approx(device.plant.power_w(0.1234), abs=1e-3)


def test_averaged_power_lags():
    _, device = rig(phases=[Phase("idle", 1.0), Phase("compute", 9.0)], time_s=1.5)
    idle_w = device.plant.power_w(-1.0)
    assert idle_w + 100.0 < device.power_average_w() < device.power_instant_w() - 100.0
    assert device.power_average_w() == pytest.approx(device.true_energy_j(0.5, 1.5), abs=1e-3)


def test_clock_temperature_and_throttling_are_the_plant_s():
    clock, device = rig(phases=[Phase("compute", 9.0)], time_s=5.0)
    clock_mhz, celsius = device.sm_clock_mhz(), device.temperature_c()
    assert clock_mhz == device.plant.clock_mhz(5.0) < 1700.0
    assert celsius == round(device.plant.temperature_c(5.0)) and celsius != device.plant.temperature_c(5.0)
    before_s = device.throttle_s()
    clock.advance(1.0)
    grown = {reason: seconds - before_s[reason] for reason, seconds in device.throttle_s().items()}
    assert grown == pytest.approx({"sw_power_cap": 1.0, "sw_thermal": 0.0, "hw_power_brake": 0.0})
    assert set(grown) <= set(THROTTLE_REASONS)
    assert device.sm_clock_max_mhz() == 1980.0


def test_calls_fail_and_recover():
    _, device = rig(failing={"temperature_c": LOST})
    with pytest.raises(ReadFailed, match="NVML_ERROR_UNKNOWN"):
        device.temperature_c()
    device.failing.clear()
    assert device.temperature_c() > 25.0
    assert device.calls["temperature_c"] == 2


def test_slow_calls_take_time_and_read_within_it():
    read_s = []
    for seed in range(20):
        clock, device = rig(phases=[Phase("compute", 9.0)], seed=seed, call_time_s={"power_average_w": 0.4})
        power_w = device.power_average_w()
        assert clock() == pytest.approx(0.4)
        times_s = np.linspace(0.0, 0.4, 401)
        means_w = np.array([device.true_energy_j(t - 1.0, t) for t in times_s])  # rises all the time
        read_s.append(times_s[np.abs(means_w - power_w).argmin()])
    assert min(read_s) < 0.1 and max(read_s) > 0.3


def test_a_failing_call_takes_its_time_too():
    clock, device = rig(failing={"power_average_w": LOST}, call_time_s={"power_average_w": 0.4})
    with pytest.raises(ReadFailed):
        device.power_average_w()
    assert clock() == pytest.approx(0.4)


def test_the_h200_s_counter_is_slow_to_read():
    clock, device = rig()
    device.total_energy_j()
    assert clock() == pytest.approx(0.0032)


def test_a_stuck_clock_is_seen_without_a_reason():
    clock, device = rig(GB10, [Phase("compute", 99.0)])
    device.plant.pin_clock(660.0)
    clock.time_s = 3.0
    assert device.sm_clock_mhz() == 660.0
    assert not any(device.throttle_s().values())


def test_a_device_reads_the_past_of_a_plant_that_has_run():
    plant = Plant(H200)
    plant.run([[Phase("compute", 1.0), Phase("idle", 1.0)]])
    clock = ManualClock(0.5)
    assert PlantDevice(plant, clock).power_instant_w() > 500.0
    clock.time_s = 1.8
    assert PlantDevice(plant, clock).power_instant_w() < 200.0


def test_chunks_flatten_the_readings():
    spread_w = {}
    for num_chunks in (1, 16):
        clock, device = rig(phases=steady(H200, num_chunks))
        readings_w = []
        while clock() < 20.0:
            clock.advance(0.1)
            readings_w.append(device.power_instant_w())
        spread_w[num_chunks] = np.std(readings_w[50:])
    assert spread_w[1] > 20.0 and spread_w[16] < 0.3 * spread_w[1]


# --- the truth test


def monitored(profile, phases, *, until_s=12.0, seed=0, missing=(), **options):
    """A monitor that has watched a plant: calls in `missing` were absent from the start."""
    clock, device = rig(
        profile,
        phases,
        seed=seed,
        failing=dict.fromkeys(missing, ABSENT),
        tick_phase_s=0.037 * (seed % 3),
        renewal_phase_s=0.021 * (seed % 5),
        **options,
    )
    monitor = Monitor(device, now=clock)
    drive(monitor.sampler.poll_once, clock, until_s, lateness_s=0.002, seed=seed)
    return clock, device, monitor


def random_windows(length_s, start_s, end_s, seed=0, count=40):
    starts_s = np.random.default_rng(seed).uniform(start_s, end_s - length_s, count)
    return [(float(start), float(start) + length_s) for start in starts_s]


def check(monitor, device, windows):
    """How many of the windows have an energy; asserts that none of them is wrong, and that the others say why."""
    known = 0
    for start_s, end_s in windows:
        window = monitor.window(start_s, end_s)
        if window.energy_j is None:
            assert window.energy_null_reason and window.energy_bound_j is None
            continue
        known += 1
        error_j = abs(window.energy_j - device.true_energy_j(start_s, end_s))
        assert error_j <= window.energy_bound_j, f"{start_s} to {end_s}: {error_j} J off, {window}"
    return known


@PROFILES
@pytest.mark.parametrize("workload", [steady, training, bursts])
@pytest.mark.parametrize("num_chunks", [1, 16])
def test_the_counter_s_joules_are_true_within_the_bound(profile, workload, num_chunks):
    known = dict.fromkeys(WINDOWS_S, 0)
    for seed in range(2):
        _, device, monitor = monitored(profile, workload(profile, num_chunks), seed=seed)
        assert monitor.energy_source == "nvml_total_energy"
        for length_s in WINDOWS_S:
            known[length_s] += check(monitor, device, random_windows(length_s, 1.5, 11.5, seed))
    assert all(count >= (40 if length_s < 1.0 else 60) for length_s, count in known.items())  # of 80


@PROFILES
@pytest.mark.parametrize("workload", [steady, training, bursts])
@pytest.mark.parametrize("num_chunks", [1, 16])
def test_joules_from_fresh_power_are_true_within_the_bound(profile, workload, num_chunks):
    phases = workload(profile, num_chunks)
    _, device, monitor = monitored(fresh(profile), phases, missing=["total_energy_j"])
    assert monitor.energy_source == "nvml_power_instant"
    known = [check(monitor, device, random_windows(length_s, 1.5, 11.5)) for length_s in WINDOWS_S]
    assert known[-1] >= 30 and sum(known) >= 60


@PROFILES
def test_joules_from_renewed_power_are_true_within_the_bound(profile):
    for workload, num_chunks in itertools.product([steady, training, bursts], [1, 16]):
        _, device, monitor = monitored(profile, workload(profile, num_chunks), missing=["total_energy_j"])
        known = [check(monitor, device, random_windows(length_s, 1.5, 11.5)) for length_s in WINDOWS_S]
        assert known[-1] >= 15 or workload is not steady  # ten readings a second resolve little of the others


@PROFILES
@pytest.mark.parametrize("workload", [steady, training, bursts])
@pytest.mark.parametrize("num_chunks", [1, 16])
def test_joules_from_averaged_power_are_true_within_the_bound(profile, workload, num_chunks):
    phases = workload(profile, num_chunks)
    _, device, monitor = monitored(profile, phases, missing=["total_energy_j", "power_instant_w"])
    assert monitor.energy_source == "nvml_power_average"
    known = [check(monitor, device, random_windows(length_s, 2.5, 11.0)) for length_s in WINDOWS_S]
    assert known[0] == 0  # shorter than the average
    if workload is not bursts:  # which an average cannot follow
        assert known[-1] >= 30


@PROFILES
def test_slow_counter_reads_keep_the_bound(profile):
    _, device, monitor = monitored(
        profile, training(profile, 4), call_time_s={"total_energy_j": 0.0075, "power_instant_w": 0.002}
    )
    for length_s in WINDOWS_S:
        known = check(monitor, device, random_windows(length_s, 1.5, 11.5))
        assert known >= 30 or length_s < 1.0


@PROFILES
def test_no_joules_over_a_reset(profile):
    _, device, monitor = monitored(profile, steady(profile, 4), reset_at_s=6.0)
    for length_s in (0.4, 1.0, 3.0):
        for windows in (random_windows(length_s, 1.5, 5.7), random_windows(length_s, 8.0, 11.5)):
            assert check(monitor, device, windows) >= 30
    for start_s, end_s in ((5.5, 6.5), (2.0, 11.0)):
        window = monitor.window(start_s, end_s)
        assert window.energy_j is None and "went backwards" in window.energy_null_reason


@PROFILES
@pytest.mark.parametrize("call", CALLS)
def test_one_call_fails_for_a_while(profile, call):
    """The energy is unknown, with the reason, where its own call fails; else it holds, and everything comes back."""
    clock, device, monitor = monitored(profile, steady(profile, 16), until_s=5.0)
    device.failing[call] = LOST
    drive(monitor.sampler.poll_once, clock, 7.0, lateness_s=0.002)
    del device.failing[call]
    drive(monitor.sampler.poll_once, clock, 12.0, lateness_s=0.002)
    around = monitor.window(4.5, 7.5)
    if call == "total_energy_j":
        assert around.energy_j is None and "NVML_ERROR_UNKNOWN" in around.energy_null_reason
    else:
        assert around.energy_j is not None
    for length_s in (0.4, 1.0, 3.0):
        # Without instantaneous power `CounterCurve` claims no bound for a power that swings within a tick.
        if call != "power_instant_w":
            check(monitor, device, random_windows(length_s, 1.5, 11.5))
        for windows in (random_windows(length_s, 1.5, 4.7), random_windows(length_s, 8.5, 11.5)):
            assert check(monitor, device, windows) >= 30


@PROFILES
@pytest.mark.parametrize("missing", [(), ("total_energy_j",)])
def test_no_joules_over_a_stalled_sampler(profile, missing):
    clock, device, monitor = monitored(fresh(profile), steady(profile, 16), until_s=5.0, missing=missing)
    clock.advance(2.5)
    drive(monitor.sampler.poll_once, clock, 12.0, lateness_s=0.002)
    for start_s, end_s in ((4.5, 8.5), (5.5, 7.0), (4.8, 5.3)):
        window = monitor.window(start_s, end_s)
        assert window.energy_j is None and window.energy_bound_j is None
        assert "no reading of" in window.energy_null_reason
    for length_s in (0.4, 1.0, 3.0):
        for windows in (random_windows(length_s, 1.5, 4.7), random_windows(length_s, 8.5, 11.5)):
            known = check(monitor, device, windows)
            assert known >= 20 or length_s < 1.0
