"""Several devices as one."""

import dataclasses
import math
import types

import numpy as np
import pytest

from jaxchunk.telemetry import GroupMonitor, Monitor, NotSupported, ReadFailed, group, open_monitor
from jaxchunk.telemetry.device import DeviceNotFound
from jaxchunk.telemetry.simulation.simulated import Constant, ManualClock, SimulatedDevice, drive
from jaxchunk.telemetry.window import Window, summed

ABSENT = NotSupported("NVML_ERROR_NOT_SUPPORTED")


def rig(powers_w=(500.0, 300.0), failing=None):
    """A group on one clock, run for 6 s; `failing` is of the second device."""
    clock = ManualClock()
    devices = [
        SimulatedDevice(
            Constant(power_w),
            clock,
            tick_phase_s=0.03 * i,
            failing=failing if i == 1 else None,
            throttle_rates={"sw_power_cap": 0.25 * (i + 1), "sw_thermal": 0.0} | ({"hw_thermal": 0.0} if i else {}),
        )
        for i, power_w in enumerate(powers_w)
    ]
    monitor = GroupMonitor([Monitor(device, now=clock) for device in devices])
    run(monitor, clock, 6.0)
    return clock, devices, monitor


def run(monitor, clock, until_s):
    def poll_all():
        return min(member.sampler.poll_once() for member in monitor._monitors)

    drive(poll_all, clock, until_s)


def test_energies_bounds_and_powers_add_up():
    _, _, monitor = rig()
    window = monitor.window(1.0, 4.0)
    first, second = window.parts
    assert window.energy_j == first.energy_j + second.energy_j == pytest.approx(2400.0, rel=0.02)
    assert window.energy_bound_j == first.energy_bound_j + second.energy_bound_j
    assert abs(window.energy_j - 2400.0) <= window.energy_bound_j
    assert window.power_w == pytest.approx(800.0, rel=0.02)
    assert window.energy_null_reason is None and window.invalid_reason is None
    assert window.sm_clock_mhz == 1500.0 and window.temperature_c == 60.0
    assert window.throttle == {"sw_power_cap": pytest.approx(2.25), "sw_thermal": 0.0}  # what both of them count
    assert (window.start_s, window.end_s) == (1.0, 4.0)


def test_what_one_device_does_not_know_is_unknown_and_the_device_named():
    failing = dict.fromkeys(("total_energy_j", "power_instant_w", "power_average_w", "sm_clock_mhz"), ABSENT)
    _, _, monitor = rig(failing=failing)
    window = monitor.window(1.0, 4.0)
    assert window.energy_j is None and window.energy_bound_j is None and window.power_w is None
    assert window.sm_clock_mhz is None and window.energy_source is None
    assert window.energy_null_reason.startswith("device 1: total-energy counter: not supported")
    assert window.parts[0].energy_j == pytest.approx(1500.0, rel=0.02)


def test_two_reasons_are_both_told():
    def without(reason):
        return Window.unknown(0.0, 1.0, reason)

    reasons = summed([without("no counter"), without("the window is empty")]).energy_null_reason
    assert reasons == "device 0: no counter; device 1: the window is empty"
    _, _, monitor = rig()
    assert monitor.window(3.0, 3.0).energy_null_reason == "all devices: the window is empty"


def test_the_sum_has_the_lesser_source():
    _, _, monitor = rig(failing={"total_energy_j": ABSENT})
    window = monitor.window(1.0, 4.0)
    assert [part.energy_source for part in window.parts] == ["nvml_total_energy", "nvml_power_instant"]
    assert window.energy_source == "nvml_power_instant"


def test_summing_takes_the_highest_temperature_and_the_mean_clock():
    cold = Window(0.0, 1.0, 1.0, 0.5, None, None, None, 1000.0, 40.0, None, 0.2, rails_j={"cpu": 3.0})
    hot = dataclasses.replace(cold, sm_clock_mhz=1400.0, temperature_c=70.0, invalid_reason="no sample for 1.00 s")
    window = summed([cold, hot])
    assert (window.sm_clock_mhz, window.temperature_c) == (1200.0, 70.0)
    assert window.slow_without_reason_s == 0.4
    assert window.rails_j == {"cpu": 3.0}  # the host's, counted once
    assert window.throttle is None and window.power_w is None
    assert window.invalid_reason == "device 1: no sample for 1.00 s"


def test_of_narrows():
    _, _, monitor = rig((500.0, 300.0, 100.0))
    assert monitor.of([1]).window(1.0, 4.0).energy_j == pytest.approx(900.0, rel=0.02)
    pair = monitor.of([0, 2])
    assert isinstance(pair, GroupMonitor)
    assert pair.window(1.0, 4.0).energy_j == pytest.approx(1800.0, rel=0.02)
    assert monitor.of([1]).of([0]) is monitor.of([1])


@pytest.mark.parametrize("devices", [(), (2,), (-1,), (0, 5)])
def test_of_a_device_that_is_not_there(devices):
    _, _, monitor = rig()
    with pytest.raises(ValueError, match="places 0 to 1"):
        monitor.of(devices)


def test_a_single_monitor_has_place_0_only():
    monitor = Monitor(None)
    assert monitor.of([0]) is monitor
    with pytest.raises(ValueError, match="place 0"):
        monitor.of([1])


def test_errors_carry_the_place():
    clock, devices, monitor = rig()
    devices[1].failing["temperature_c"] = ReadFailed("lost")
    run(monitor, clock, 7.0)
    assert set(monitor.errors) == {"1: temperature_c"}
    assert monitor.errors["1: temperature_c"].last_reason == "lost"


def test_samples_and_facts_are_those_of_the_first():
    _, _, monitor = rig()
    assert set(monitor.samples(1.0, 2.0).power_w) == {500.0}
    facts = monitor.describe()
    assert facts["device"]["name"] == "simulated GPU" and len(facts["devices"]) == 2
    assert monitor.sampler_cpu_s == 0.0
    monitor.forget_before(5.0)
    assert all(member.samples().time_s[0] > 3.5 for member in monitor._monitors)


def test_ready_waits_for_every_device():
    clock, _, monitor = rig()
    assert monitor.ready(5.5) and monitor.wait_ready(5.5, 0.0)
    now_s = clock()
    monitor.of([0]).attend()
    run(monitor.of([0, 0]), clock, now_s + 0.45)  # the second is not read
    assert monitor.of([0]).ready(now_s) and not monitor.of([1]).ready(now_s)
    assert not monitor.ready(now_s)
    assert not monitor.wait_ready(now_s, 0.02)


def test_start_and_stop_are_those_of_all():
    monitors = [Monitor(SimulatedDevice(Constant(100.0), ManualClock())) for _ in range(2)]
    with GroupMonitor(monitors) as monitor:
        assert all(member.sampler._thread.is_alive() for member in monitors)
        threads = [member.sampler._thread for member in monitors]
        monitor.attend()
    assert not any(thread.is_alive() for thread in threads)
    monitor.stop()
    assert monitor.ready(math.inf)


def test_files_of_several_devices(tmp_path, monkeypatch):
    clock = ManualClock()
    monkeypatch.setattr(group, "find_device", lambda jax_device: SimulatedDevice(Constant(100.0), clock))
    jax_devices = [types.SimpleNamespace(platform="gpu", local_hardware_id=i) for i in range(3)]
    monitor = open_monitor(
        jax_devices, csv_path=tmp_path / "telemetry.csv", record_path=str(tmp_path / "run.jsonl"), rails=()
    )
    monitor.stop()
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [
        "run-gpu1.jsonl",
        "run-gpu2.jsonl",
        "run.jsonl",
        "telemetry-gpu1.csv",
        "telemetry-gpu2.csv",
        "telemetry.csv",
    ]


def test_one_device_needs_no_group(monkeypatch):
    def refuse(jax_device):
        raise DeviceNotFound("no driver")

    monkeypatch.setattr(group, "find_device", refuse)
    monitor = open_monitor([types.SimpleNamespace(platform="gpu", local_hardware_id=0)], rails=())
    assert isinstance(monitor, Monitor)
    assert monitor.window(0.0, 1.0).energy_null_reason == "NVML not available: no driver"
    assert np.isnan(monitor.samples().power_w).all()
