"""The facade: which source and why, what a window says, and None with a reason for what is not known."""

import dataclasses
import json

import jax
import pytest

from jaxchunk.telemetry import CALLS, Monitor, NotSupported, ReadFailed, open_monitor
from jaxchunk.telemetry.simulation.simulated import Constant, ManualClock, SimulatedDevice, SquareWave, drive

ABSENT = NotSupported("NVML_ERROR_NOT_SUPPORTED")


def rig(profile=None, **device_options):
    clock = ManualClock()
    device = SimulatedDevice(profile or Constant(500.0), clock, **device_options)
    return clock, Monitor(device, now=clock)


@pytest.mark.parametrize(
    ("missing", "source", "reason"),
    [
        ((), "nvml_total_energy", "total-energy counter works"),
        (
            ("total_energy_j",),
            "nvml_power_instant",
            "total-energy counter: not supported (NVML_ERROR_NOT_SUPPORTED); instantaneous power works",
        ),
        (
            ("total_energy_j", "power_instant_w"),
            "nvml_power_average",
            "total-energy counter: not supported (NVML_ERROR_NOT_SUPPORTED); "
            "instantaneous power: not supported (NVML_ERROR_NOT_SUPPORTED); averaged power works",
        ),
        (
            ("total_energy_j", "power_instant_w", "power_average_w"),
            None,
            "total-energy counter: not supported (NVML_ERROR_NOT_SUPPORTED); "
            "instantaneous power: not supported (NVML_ERROR_NOT_SUPPORTED); "
            "averaged power: not supported (NVML_ERROR_NOT_SUPPORTED)",
        ),
    ],
)
def test_source_in_order_of_preference_with_the_reason(missing, source, reason):
    clock, monitor = rig(failing=dict.fromkeys(missing, ABSENT))
    assert monitor.energy_source == source
    assert monitor.energy_source_reason == reason
    drive(monitor.sampler.poll_once, clock, 4.0)
    window = monitor.window(1.5, 3.0)
    assert window.energy_source == source
    if source is None:
        assert window.energy_j is None and window.power_w is None
        assert window.energy_null_reason == reason
        assert window.sm_clock_mhz == 1500.0
    else:
        assert window.energy_j == pytest.approx(750.0, rel=0.03)
        assert window.energy_null_reason is None


def test_a_failed_probe_is_told_apart_from_not_supported():
    _, monitor = rig(failing={"total_energy_j": ReadFailed("NVML_ERROR_NO_PERMISSION")})
    assert monitor.energy_source_reason.startswith("total-energy counter: failed (NVML_ERROR_NO_PERMISSION);")


def test_a_device_that_answers_nothing():
    clock, monitor = rig(failing=dict.fromkeys(CALLS, ABSENT))
    drive(monitor.sampler.poll_once, clock, 2.0)
    assert monitor.ready(1.5)
    window = monitor.window(0.5, 1.5)
    known = {key for key, value in dataclasses.asdict(window).items() if value not in (None, ())}
    assert known == {"start_s", "end_s", "energy_null_reason"}


def test_a_cpu_device():
    monitor = open_monitor(jax.devices("cpu")[0], rails=())
    with monitor:
        start_s = monitor.now()
        end_s = monitor.now()
        assert monitor.ready(end_s) and monitor.wait_ready(end_s, 0.0)
        window = monitor.window(start_s, end_s)
    assert monitor.energy_source is None
    assert window.energy_null_reason == "JAX runs on cpu: no GPU to measure"
    known = {key for key, value in dataclasses.asdict(window).items() if value not in (None, ())}
    assert known == {"start_s", "end_s", "energy_null_reason"}
    assert monitor.samples().time_s.shape == (0,)
    assert monitor.describe()["device"] is None
    monitor.forget_before(end_s)


def test_an_energy_that_is_mostly_bound_is_withheld():
    clock, monitor = rig()
    drive(monitor.sampler.poll_once, clock, 4.0)
    short = monitor.window(2.0, 2.02)
    assert short.energy_j is None and short.energy_bound_j is None
    assert "error bound of" in short.energy_null_reason
    assert "J is more than 10% of the " in short.energy_null_reason
    assert short.power_w == pytest.approx(500.0)  # of the samples in it
    assert monitor.window(2.0, 2.5).energy_j == pytest.approx(250.0, rel=0.05)


def test_fast_swings_withhold_a_power_integral():
    clock, monitor = rig(SquareWave(700.0, 300.0, 0.0171), failing={"total_energy_j": ABSENT})
    drive(monitor.sampler.poll_once, clock, 4.0)
    assert monitor.window(1.0, 3.0).energy_j is None


def test_a_window_is_not_ready_before_its_ticks():
    clock, monitor = rig()
    drive(monitor.sampler.poll_once, clock, 1.8)
    monitor.attend()  # the throttle counters are read at once
    drive(monitor.sampler.poll_once, clock, 2.0)
    assert monitor.ready(1.75)
    for end_s in (1.99, 2.5):
        assert not monitor.ready(end_s)
        window = monitor.window(1.0, end_s)
        assert window.energy_j is None
        assert window.energy_null_reason == "the energy counter is not known up to the window's end yet"
    assert not monitor.wait_ready(1.99, timeout_s=0.01)
    early = monitor.window(1.0, 1.75)
    drive(monitor.sampler.poll_once, clock, 3.0)
    assert monitor.ready(1.99)
    assert monitor.window(1.0, 1.75) == early  # what was ready does not change
    assert monitor.window(1.0, 1.99).energy_j == pytest.approx(495.0, rel=0.05)


def test_an_outage_that_lasts_is_an_answer():
    clock, monitor = rig()
    drive(monitor.sampler.poll_once, clock, 2.0)
    clock.advance(1.5)
    assert monitor.ready(2.5)
    assert monitor.window(1.0, 2.5).energy_null_reason.startswith("no reading of the energy counter for 1.5")


def test_stopped_before_the_end():
    clock, monitor = rig()
    drive(monitor.sampler.poll_once, clock, 2.0)
    monitor.stop()
    assert monitor.ready(2.5)
    assert monitor.window(1.0, 2.5).energy_null_reason == "the sampler stopped before the window's end"
    assert monitor.window(0.5, 1.5).energy_j == pytest.approx(500.0, rel=0.05)


def test_empty_and_reversed_windows_are_unknown():
    clock, monitor = rig()
    drive(monitor.sampler.poll_once, clock, 2.0)
    for end_s in (1.0, 0.5):
        window = monitor.window(1.0, end_s)
        assert window.energy_null_reason == "the window is empty"
        assert window.throttle is None


def test_throttle_seconds_of_the_window():
    clock, monitor = rig(throttle_rates={"sw_power_cap": 0.25, "hw_thermal": 0.0})
    drive(monitor.sampler.poll_once, clock, 4.0)
    throttle = monitor.window(1.0, 3.0).throttle
    assert set(throttle) == {"sw_power_cap", "hw_thermal"}  # what the device does not count is left out
    assert throttle["sw_power_cap"] == pytest.approx(0.5)
    assert throttle["hw_thermal"] == 0.0


def test_throttle_seconds_never_exceed_the_window():
    """Seen on an H200: the counter's own steps made a 0.40 s window hold 0.51 s of power capping."""
    clock, monitor = rig(throttle_rates={"sw_power_cap": 1.2})
    drive(monitor.sampler.poll_once, clock, 4.0)
    assert monitor.window(1.0, 3.0).throttle == {"sw_power_cap": 2.0}


def test_a_window_between_two_samples_takes_the_nearest_clock():
    clock, monitor = rig()
    drive(monitor.sampler.poll_once, clock, 2.0)
    times_s = monitor.samples().time_s
    window = monitor.window(times_s[40] + 1e-4, times_s[41] - 1e-4)
    assert window.sm_clock_mhz == 1500.0 and window.temperature_c == 60.0
    assert window.power_w is None


def test_describe_is_json():
    _, monitor = rig(failing={"power_limit_w": ABSENT})
    facts = json.loads(json.dumps(monitor.describe()))
    assert facts["device"]["name"] == "simulated GPU"
    assert facts["energy_source"] == "nvml_total_energy"
    assert facts["probes"]["power_limit_w"] == "not supported (NVML_ERROR_NOT_SUPPORTED)"
    assert facts["probes"]["sm_clock_mhz"] == "supported"
