"""The doctor in simulated time: what it finds out about devices whose true behaviour is known, and how it says so."""

import json
import math
import os
import subprocess
import sys
from unittest.mock import Mock

import numpy as np
import pytest

from jaxchunk.errors import InputError
from jaxchunk.telemetry import CALLS, DeviceNotFound, Monitor, NotSupported, ReadFailed, __main__
from jaxchunk.telemetry.doctor import Clocks, diagnose
from jaxchunk.telemetry.doctor_text import render
from jaxchunk.telemetry.rails import Rail, UnusedSensor
from jaxchunk.telemetry.simulation.simulated import Constant, ManualClock, Ramp, SimulatedDevice, SquareWave, drive

ABSENT = NotSupported("NVML_ERROR_NOT_SUPPORTED")
WAVE = SquareWave(700.0, 300.0, 0.4, phase_s=0.05)


class Bench:
    """A simulated device, its clock, and the processor time that its calls take."""

    def __init__(self, profile=WAVE, device=SimulatedDevice, **options):
        self.clock = ManualClock()
        self.cpu_s = 0.0
        self.device = device(profile, self.clock, **options)
        self.device.bench = self

    def diagnose(self, *rails, seconds=3.0, **options):
        clocks = Clocks(now=self.clock, sleep=self.clock.advance, cpu_s=lambda: self.cpu_s)
        return diagnose([self.device], rails, seconds=seconds, clocks=clocks, **options)

    def gpu(self, **options):
        return self.diagnose(**options)["gpus"][0]


class DearCounter(SimulatedDevice):
    """As on an H200: reading the counter takes 7.5 ms, 3.2 of them of processor time."""

    def total_energy_j(self):
        self._clock.advance(0.0075)
        self.bench.cpu_s += 0.0032
        return super().total_energy_j()


class Busy(SimulatedDevice):
    def compute_processes(self):
        return [(os.getpid(), 1), (123, 2**30), (456, None)]


def texts(diagnosis):
    text = render(diagnosis)
    assert max(map(len, text.splitlines())) <= 120
    assert json.loads(json.dumps(diagnosis, allow_nan=False)) == diagnosis
    return text


def test_the_rhythm_of_each_call():
    bench = Bench(samples_every_s=0.02)
    calls = bench.gpu()["calls"]
    assert set(calls) == set(CALLS)
    assert calls["power_samples_w"]["update_period_s"] == pytest.approx(0.02, abs=0.001)
    assert calls["power_samples_w"]["value"] in (300.0, 700.0) and calls["power_samples_w"]["unit"] == "W"
    assert all(call["status"] == "supported" and call["reason"] is None for call in calls.values())
    counter = calls["total_energy_j"]
    assert counter["update_period_s"] == pytest.approx(0.1, abs=0.001)
    assert counter["update_period_is_at_most"] is False
    assert counter["unit"] == "J" and counter["value"] > 0
    assert calls["power_instant_w"]["update_period_s"] == pytest.approx(0.2, abs=0.002)
    # Averaged power moves all the time: no more is known than how often it was looked at.
    average = calls["power_average_w"]
    assert average["update_period_is_at_most"] is True
    assert average["poll_period_s"] == pytest.approx(0.002)
    assert average["update_period_s"] == pytest.approx(0.002, rel=0.05)
    for call in ("sm_clock_mhz", "power_limit_w"):
        assert calls[call]["update_period_s"] is None
        assert calls[call]["update_period_s_null_reason"] == "constant during the probe"
    assert bench.clock() == pytest.approx(3.0, abs=0.01)


def test_a_dear_call_is_timed_and_looked_at_less_often():
    bench = Bench(device=DearCounter)
    counter = bench.gpu()["calls"]["total_energy_j"]
    assert counter["wall_s"] == pytest.approx(0.0075)
    assert counter["cpu_s"] == pytest.approx(0.0032)
    assert counter["poll_period_s"] == pytest.approx(0.015, abs=0.003)
    assert bench.device.calls["total_energy_j"] < 230 < bench.device.calls["power_instant_w"]
    # The distances seen are whole numbers of looks, some above and some below the tick.
    assert counter["update_period_s"] == pytest.approx(0.1, abs=0.002)
    assert counter["update_period_is_at_most"] is False


def test_a_reading_that_changed_once():
    gpu = Bench(Ramp(300.0, 700.0, 1.0005, 1.0005 + 1e-9)).gpu()
    assert gpu["calls"]["power_instant_w"]["update_period_s"] is None
    assert gpu["calls"]["power_instant_w"]["update_period_s_null_reason"] == "changed once during the probe"


def test_the_counters_resolution():
    fine = Bench(Ramp(101.3, 700.7, 0.0, 5.3)).gpu()["calls"]["total_energy_j"]
    assert fine["resolution_j"] == pytest.approx(0.001)
    assert 10.0 < fine["median_increment_j"] < 70.0

    class Coarse(SimulatedDevice):
        def total_energy_j(self):
            return super().total_energy_j() // 2.0 * 2.0

    assert Bench(Ramp(100.0, 700.0, 0.0, 5.0), Coarse).gpu()["calls"]["total_energy_j"]["resolution_j"] == 2.0


@pytest.mark.parametrize(
    ("options", "seconds", "words"), [({}, 0.35, "8 are needed"), ({"reset_at_s": 1.5}, 3.0, "backwards")]
)
def test_no_resolution_from_too_little(options, seconds, words):
    counter = Bench(**options).gpu(seconds=seconds)["calls"]["total_energy_j"]
    assert counter["resolution_j"] is None
    assert words in counter["resolution_j_null_reason"]


@pytest.mark.parametrize(
    ("missing", "source", "start"),
    [
        (
            (),
            "nvml_total_energy",
            "Energy will come from the total-energy counter because total-energy counter works; steps",
        ),
        (
            ("total_energy_j",),
            "nvml_power_instant",
            "Energy will come from the integral of instantaneous power because",
        ),
        (("total_energy_j", "power_instant_w"), "nvml_power_average", "Energy will come from the integral of averaged"),
        (
            ("total_energy_j", "power_instant_w", "power_average_w"),
            None,
            "there will be no energy, because of total-energy",
        ),
    ],
)
def test_the_sentence_at_the_end(missing, source, start):
    bench = Bench(failing=dict.fromkeys(missing, ABSENT))
    diagnosis = bench.diagnose()
    gpu = diagnosis["gpus"][0]
    assert gpu["energy_source"] == source
    assert " ".join(texts(diagnosis).split("\n\n")[-1].split()).startswith(f"GPU 0: {start}")
    for call in missing:
        described = gpu["calls"][call]
        assert (described["status"], described["reason"]) == ("not_supported", "NVML_ERROR_NOT_SUPPORTED")
        for key in ("value", "cpu_s", "wall_s", "update_period_s"):
            assert described[key] is None
        assert bench.device.calls[call] == 1  # what said no once is not asked again
    assert (gpu["min_step_s"] is None) == bool(missing)
    if missing:
        assert "counter only" in gpu["min_step_s_null_reason"]
        assert gpu["comparison"]["difference_percent"] is None
        assert "needs the total-energy counter" in gpu["comparison"]["difference_percent_null_reason"]


def test_the_shortest_step_is_true_of_the_monitor():
    """A power that swings by its mean, in every phase to the ticks: windows of that length are within 10%."""
    min_step_s = Bench(Ramp(100.0, 700.0, 0.0, 5.0)).gpu()["min_step_s"]
    assert min_step_s == pytest.approx((0.1 / 2 + 3 * 0.001) / 0.1, rel=0.02)
    clock = ManualClock()
    monitor = Monitor(SimulatedDevice(SquareWave(750.0, 250.0, 0.137), clock), now=clock)
    drive(monitor.sampler.poll_once, clock, 12.0)
    starts_s = np.linspace(3.0, 10.0, 60)
    enough = [monitor.window(start_s, start_s + 1.1 * min_step_s).energy_j for start_s in starts_s]
    assert None not in enough
    too_short = [monitor.window(start_s, start_s + 0.3 * min_step_s).energy_j for start_s in starts_s]
    assert None in too_short


def test_no_shortest_step_from_a_counter_that_stands_still():
    class Stuck(SimulatedDevice):
        def total_energy_j(self):
            return 1000.0

    gpu = Bench(device=Stuck).gpu()
    assert gpu["energy_source"] == "nvml_total_energy"
    assert gpu["min_step_s"] is None and "constant during the probe" in gpu["min_step_s_null_reason"]
    assert gpu["comparison"]["difference_percent"] is None
    assert "ticked less than twice" in gpu["comparison"]["difference_percent_null_reason"]


def test_the_sources_agree_and_disagree():
    comparison = Bench().gpu()["comparison"]
    assert abs(comparison["difference_percent"]) < 1.0
    assert comparison["counter_j"] == pytest.approx(500.0 * comparison["time_s"], rel=0.05)
    assert comparison["label"].startswith("load unknown, 2.")

    class Overstates(SimulatedDevice):
        def power_instant_w(self):
            return 1.1 * super().power_instant_w()

        def compute_processes(self):
            return []

    diagnosis = Bench(Constant(200.0), Overstates).diagnose()
    assert diagnosis["gpus"][0]["comparison"]["difference_percent"] == pytest.approx(10.0, abs=0.5)
    assert "(idle, 2." in texts(diagnosis) and "(+10." in texts(diagnosis)


def test_throttling_that_is_not_zero():
    diagnosis = Bench(throttle_rates={"sw_power_cap": 0.5, "sw_thermal": 0.0}).diagnose()
    throttling = diagnosis["gpus"][0]["throttling"]
    assert set(throttling) == {"sw_power_cap"}
    assert throttling["sw_power_cap"]["total_s"] == pytest.approx(0.5 * 103.0, abs=0.01)
    assert throttling["sw_power_cap"]["during_probe_s"] == pytest.approx(1.5, abs=0.01)
    assert "sw_power_cap 51.5" in texts(diagnosis)
    without = Bench(failing={"throttle_s": ReadFailed("NVML_ERROR_UNKNOWN")}).diagnose()
    assert without["gpus"][0]["throttling"] is None
    assert "Throttling unknown: failed (NVML_ERROR_UNKNOWN)" in texts(without)


def test_other_processes():
    diagnosis = Bench(device=Busy).diagnose()
    gpu = diagnosis["gpus"][0]
    assert gpu["other_processes"] == [{"pid": 123, "bytes": 2**30}, {"pid": 456, "bytes": None}]
    assert gpu["comparison"]["label"].startswith("2 other process(es)")
    assert "123 (1024 MiB), 456 (memory unknown)" in texts(diagnosis)
    assert Bench().gpu()["other_processes_null_reason"] == "the device cannot list them"

    for error, reason in (
        (ReadFailed("NVML_ERROR_NO_PERMISSION"), "NVML_ERROR_NO_PERMISSION"),
        (AttributeError("no such function"), "AttributeError: no such function"),
    ):
        bench = Bench()
        bench.device.compute_processes = Mock(side_effect=error)
        diagnosis = bench.diagnose()
        assert diagnosis["gpus"][0]["other_processes"] is None
        assert f"Other processes unknown: {reason}." in texts(diagnosis)


def test_readings_that_fail_after_the_probe_are_counted():
    class Flaky(SimulatedDevice):
        def temperature_c(self):
            if self._clock() >= 1.0:
                raise ReadFailed("NVML_ERROR_GPU_IS_LOST")
            return math.nan if self._clock() >= 0.5 else super().temperature_c()

    diagnosis = Bench(device=Flaky).diagnose()
    temperature = diagnosis["gpus"][0]["calls"]["temperature_c"]
    assert temperature["failures"] == pytest.approx(1250, abs=5)
    assert temperature["last_failure"] == "NVML_ERROR_GPU_IS_LOST"
    assert temperature["changes"] == 0
    assert "readings failed (NVML_ERROR_GPU_IS_LOST)" in " ".join(texts(diagnosis).split())


def test_identity():
    class Named(SimulatedDevice):
        def describe(self):
            facts = {"name": self.name, "uuid": self.uuid, "pci_bus_id": "00000000:1B:00.0", "driver_version": "580.95"}
            facts["slices"] = (1, 2)  # nothing that JSON has
            return facts | {"cuda_driver_version": None, "cuda_driver_version_null_reason": "NVML_ERROR_UNKNOWN"}

    class Broken(SimulatedDevice):
        def describe(self):
            raise OSError("no such device")

    diagnosis = Bench(device=Named).diagnose()
    assert diagnosis["gpus"][0]["cuda_driver_version_null_reason"] == "NVML_ERROR_UNKNOWN"
    assert "PCI 00000000:1B:00.0, driver 580.95, CUDA unknown" in texts(diagnosis)
    assert "SIMULATED" not in texts(diagnosis)
    simulated = Bench().diagnose()
    assert "SIMULATED: none of these figures is a measurement" in texts(simulated)
    assert simulated["gpus"][0]["driver_version_null_reason"] == "the device does not tell"
    broken = Bench(device=Broken).diagnose()
    assert "no such device" in broken["gpus"][0]["describe_null_reason"]
    texts(broken)


def test_a_probe_that_is_not_a_number_is_null_with_a_reason():
    class NotANumber(SimulatedDevice):
        def power_limit_w(self):
            return math.inf

    diagnosis = Bench(device=NotANumber).diagnose(seconds=0.1)
    limit = diagnosis["gpus"][0]["calls"]["power_limit_w"]
    assert limit["value"] is None and "inf" in limit["value_null_reason"]
    texts(diagnosis)


def test_the_hosts_meters(tmp_path):
    (tmp_path / "energy_uj").write_text("5000000\n")
    rails = [
        Rail("rapl:package-0", "cpu_package", "energy", tmp_path / "energy_uj", 10**10),
        Rail("spbm:" + "a_label_without_end" * 8, "board rail", "power", tmp_path / "power1_input"),
    ]
    diagnosis = Bench().diagnose(*rails, unused=[UnusedSensor("amdgpu:PPT", "only spbm is read")])
    package, board = diagnosis["rails"]
    assert (package["status"], package["value"], package["unit"], package["range_j"]) == (
        "supported",
        5.0,
        "J",
        10_000.0,
    )
    assert (board["status"], board["value"]) == ("failed", None) and "No such file" in board["reason"]
    assert diagnosis["unused_sensors"] == [{"name": "amdgpu:PPT", "reason": "only spbm is read"}]
    text = texts(diagnosis)
    assert "rapl:package-0" in text and "5 J" in text and "amdgpu:PPT: seen, not used: only spbm is read" in text


def test_two_gpus_are_polled_one_after_the_other():
    clock = ManualClock()
    devices = [SimulatedDevice(WAVE, clock), SimulatedDevice(WAVE, clock, failing=dict.fromkeys(CALLS, ABSENT))]
    clocks = Clocks(now=clock, sleep=clock.advance, cpu_s=clock)
    diagnosis = diagnose([*devices, devices[0]], seconds=1.0, clocks=clocks)
    assert clock() == pytest.approx(2.0, abs=0.02)  # a GPU that answers nothing is not waited for
    sentences = texts(diagnosis).split("\n\n")[-1]
    assert [f"GPU {number}: " in sentences for number in range(4)] == [True, True, True, False]


@pytest.mark.parametrize("seconds", [0.0, -1.0, math.nan, math.inf])
def test_seconds_that_are_none(seconds):
    with pytest.raises(InputError, match="positive number"):
        Bench().diagnose(seconds=seconds)


def run(monkeypatch, capsys, *flags):
    monkeypatch.setattr(sys, "argv", ["doctor", "doctor", *flags])
    __main__.main()
    return capsys.readouterr().out


def test_no_gpu_says_why(monkeypatch, capsys):
    def nothing(_):
        raise DeviceNotFound("NVML_ERROR_DRIVER_NOT_LOADED")

    monkeypatch.setattr(__main__, "all_devices", list)
    monkeypatch.setattr(__main__, "find_device", nothing)
    monkeypatch.setattr(__main__, "find_rails", list)
    monkeypatch.setattr(__main__, "find_unused", list)
    diagnosis = json.loads(run(monkeypatch, capsys, "--json"))
    assert diagnosis["gpus"] == [] and diagnosis["gpus_null_reason"] == "NVML_ERROR_DRIVER_NOT_LOADED"
    assert run(monkeypatch, capsys).startswith("No GPU: NVML_ERROR_DRIVER_NOT_LOADED.\n")
    monkeypatch.setattr(__main__, "find_device", lambda _: None)
    assert "although CUDA has one" in run(monkeypatch, capsys)


@pytest.mark.parametrize("name", ["h200", "l40s", "gb10"])
def test_a_simulated_gpu_never_looks_measured(monkeypatch, capsys, name):
    def host():
        raise AssertionError("the host's meters were read")

    for function in ("all_devices", "find_rails", "find_unused"):
        monkeypatch.setattr(__main__, function, host)
    (gpu,) = json.loads(run(monkeypatch, capsys, "--json", "--simulate", name))["gpus"]
    assert gpu["simulated"] is True and gpu["name"].startswith("simulated ")
    assert gpu["energy_source"] == "nvml_total_energy"
    assert (gpu["calls"]["power_limit_w"]["status"] == "supported") == (name != "gb10")
    assert abs(gpu["comparison"]["difference_percent"]) < 2.0
    text = run(monkeypatch, capsys, "--seconds", "1", "--simulate", name)
    assert "SIMULATED" in text and max(map(len, text.splitlines())) <= 120


def test_bad_seconds_are_one_line_and_status_2(monkeypatch, capsys):
    with pytest.raises(SystemExit) as caught:
        run(monkeypatch, capsys, "--seconds", "0", "--simulate", "h200")
    assert caught.value.code == 2
    assert capsys.readouterr().err == "error: seconds is 0.0, needed is a positive number\n"


def test_as_people_run_it_and_jax_stays_asleep():
    program = (
        "import runpy, sys; sys.argv = ['x', 'doctor', '--json', '--seconds', '0.1']; "
        "runpy.run_module('jaxchunk.telemetry', run_name='__main__'); "
        "from jax._src import xla_bridge; sys.exit(3 if xla_bridge.backends_are_initialized() else 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert set(json.loads(done.stdout)) >= {"gpus", "rails", "unused_sensors", "seconds"}
