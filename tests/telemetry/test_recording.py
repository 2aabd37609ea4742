"""Recordings: the same windows from the file as from the device."""

import dataclasses
import json
import random

import numpy as np
import pytest

from jaxchunk.errors import InputError
from jaxchunk.telemetry import Monitor, ReadFailed
from jaxchunk.telemetry.simulation.simulated import Constant, ManualClock, SimulatedDevice, SquareWave, drive

RUN_S = 20.0


class FakeRail:
    """A rail of 50 W, or its joules."""

    def __init__(self, name, kind, clock):
        self.name, self.kind, self._clock = name, kind, clock

    def read(self):
        if 7.0 < self._clock() < 7.3:
            raise ReadFailed("busy")
        return 50.0 if self.kind == "power" else 50.0 * self._clock()


def recorded(path, cost_s=0.0, run_s=RUN_S):
    """A run with failures, throttling and rails, stopped; its monitor."""
    clock, cpu, generator = ManualClock(), ManualClock(), random.Random(4)
    device = SimulatedDevice(SquareWave(700.0, 400.0, 0.7), clock, throttle_rates={"sw_power_cap": 0.3})
    rails = [FakeRail("cpu", "energy", clock), FakeRail("board", "power", clock)]
    monitor = Monitor(device, now=clock, cpu_time=cpu, rails=rails, record_path=path)
    answer = device.total_energy_j

    def dear_answer():
        cpu.advance(cost_s)
        clock.advance(cost_s * generator.uniform(0.9, 1.8))
        return answer()

    device.total_energy_j = dear_answer
    monitor.start_s = clock()
    drive(monitor.sampler.poll_once, clock, 5.0, lateness_s=0.002)
    device.failing.update(dict.fromkeys(("total_energy_j", "temperature_c"), ReadFailed("NVML_ERROR_GPU_IS_LOST")))
    drive(monitor.sampler.poll_once, clock, 6.0, lateness_s=0.002)
    device.failing.clear()
    for until_s in np.arange(8.0, run_s + 0.1, 2.0):
        drive(monitor.sampler.poll_once, clock, until_s, lateness_s=0.002)
        monitor.attend()
    monitor.stop()
    return monitor


def spans(count=150):
    generator = random.Random(9)
    starts_s = [generator.uniform(-1.0, RUN_S) for _ in range(count)]
    return [(start_s, start_s + generator.uniform(0.05, 6.0)) for start_s in starts_s]


@pytest.mark.parametrize("cost_s", [0.0, 0.0032, 0.006])
def test_a_replay_gives_equal_windows(tmp_path, cost_s):
    """With a dear counter too, whose readings are far apart on purpose."""
    path = tmp_path / "run.jsonl"
    live = recorded(path, cost_s)
    replayed = Monitor.replay(path)
    known = 0
    for span in spans():
        window = live.window(*span)
        assert replayed.window(*span) == window
        known += window.energy_j is not None
    assert known > (5 if cost_s > 0.004 else 30)
    assert {name: dataclasses.asdict(e) for name, e in replayed.errors.items()} == {
        name: dataclasses.asdict(e) for name, e in live.errors.items()
    }
    assert "temperature_c" in replayed.errors and "rail:cpu" in replayed.errors
    np.testing.assert_array_equal(replayed.samples().power_w, live.samples().power_w)
    assert replayed.describe() == json.loads(json.dumps(live.describe()))
    assert replayed.energy_source == live.energy_source and replayed.start_s == live.start_s
    assert replayed.ready(RUN_S)


def test_the_rails_are_recorded(tmp_path):
    recorded(tmp_path / "run.jsonl")
    rails_j = Monitor.replay(tmp_path / "run.jsonl").window(9.0, 15.0).rails_j
    assert rails_j == {"cpu": pytest.approx(300.0), "board": pytest.approx(300.0)}


def without_check(window):
    """The second source's bound looks at more of the samples after the window."""
    return dataclasses.replace(window, cross_check=None)


@pytest.mark.parametrize("share", [0.3, 0.5, 0.77])
def test_a_recording_that_is_cut_in_a_line(tmp_path, share):
    path = tmp_path / "run.jsonl"
    live = recorded(path)
    whole = path.read_bytes()
    end = whole.index(b"\n", int(len(whole) * share)) - 4
    path.write_bytes(whole[:end])
    replayed = Monitor.replay(path)
    last_s = json.loads(whole[:end].splitlines()[-2])["end_s"]
    before = 0
    for span in spans():
        window = replayed.window(*span)
        if span[1] < last_s - 1.0:
            assert without_check(window) == without_check(live.window(*span))
            before += window.energy_j is not None
        elif span[1] > last_s + 0.01:
            assert window.energy_j is None and window.energy_null_reason
    assert before > 10
    late = replayed.window(last_s - 0.1, last_s + 1.0)
    assert "the sampler stopped before the window's end" in late.energy_null_reason


def test_a_recording_without_a_device(tmp_path):
    path = tmp_path / "run.jsonl"
    Monitor(None, reason_if_none="no GPU here", record_path=path).stop()
    assert Monitor.replay(path).window(0.0, 1.0).energy_null_reason == "no GPU here"


@pytest.mark.parametrize(
    "content",
    [
        "",
        "not json\n",
        "[1, 2]\n",
        '{"step": 1}\n{"step": 2}\n',
        '{"jaxchunk_recording": 99}\n',
        '{"jaxchunk_recording": 1}\n',
        '{"jaxchunk_recording": 1, "probes": [], "rails": []}\n',
        '{"jaxchunk_recording": 1, "probes": {}, "rails": [], "surprise": 1}\n',
        "\x00\xff\x1b",
    ],
)
def test_a_wrong_file_is_an_input_error(tmp_path, content):
    path = tmp_path / "wrong.jsonl"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(InputError, match=r"wrong\.jsonl") as error:
        Monitor.replay(path)
    assert "\n" not in str(error.value)


def test_a_missing_file_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match="cannot read the recording"):
        Monitor.replay(tmp_path / "missing.jsonl")


@pytest.mark.parametrize("place", ["missing/run.jsonl", "."])
def test_a_path_that_cannot_be_written_is_an_input_error(tmp_path, place):
    clock = ManualClock()
    with pytest.raises(InputError, match="cannot write the recording"):
        Monitor(SimulatedDevice(Constant(500.0), clock), now=clock, record_path=tmp_path / place)


def test_a_full_line_of_nonsense_ends_the_replay(tmp_path):
    path = tmp_path / "run.jsonl"
    recorded(path)
    lines = path.read_text().splitlines()
    lines.insert(len(lines) // 2, '{"nonsense": 1}')
    path.write_text("\n".join(lines))
    assert Monitor.replay(path).window(RUN_S - 5.0, RUN_S - 2.0).energy_j is None
    assert Monitor.replay(path).window(1.0, 4.0).energy_j is not None


def test_what_is_written_is_there_before_the_end(tmp_path):
    """A kill loses a second at most."""
    path, clock = tmp_path / "run.jsonl", ManualClock()
    monitor = Monitor(SimulatedDevice(Constant(500.0), clock), now=clock, record_path=path)
    drive(monitor.sampler.poll_once, clock, 10.0)
    try:
        assert Monitor.replay(path).window(1.0, 8.0).energy_j == pytest.approx(3500.0, rel=0.02)
    finally:
        monitor.stop()
