"""A benchmark's directory: interrupted, gone on with, refused."""

import dataclasses
import json
import math
import signal
import threading
import time

import jax
import jax.numpy as jnp
import pytest

from jaxchunk.errors import InputError
from jaxchunk.measuring import harness, preflight
from jaxchunk.measuring.harness import BenchConfig, Benchmark
from jaxchunk.measuring.protocol import Conditions, Protocol, Variant
from jaxchunk.telemetry import Monitor, ReadFailed
from jaxchunk.telemetry.simulation.simulated import Constant, ManualClock, SimulatedDevice

PROTOCOL = Protocol(repeats=3, calls=2, warmup_calls=1, temperature_tolerance_c=None)


class Work:
    """Two variants; Ctrl-C comes at the given calls."""

    def __init__(self, *interrupt_at):
        self.calls, self._interrupt_at = 0, interrupt_at

    def variants(self):
        return [Variant("a", self._call), Variant("b", self._call)]

    def _call(self):
        self.calls += 1
        if self.calls in self._interrupt_at:
            signal.raise_signal(signal.SIGINT)
        return jnp.zeros(())


def benchmark(path, work, *, protocol=PROTOCOL, reports=None, **flags):
    def report(directory, measurements):
        if reports is not None:
            reports.append(len(measurements))
        return f"{len(measurements)} windows"

    config = BenchConfig(out_dir=str(path), settle_s=0.0, **flags)
    return Benchmark("test", config, protocol, work.variants, report)


def records(path):
    return [json.loads(line) for line in (path / "records.jsonl").read_text().splitlines()]


def test_an_interrupted_run_keeps_what_it_has_says_so_and_goes_on(tmp_path, capsys):
    path, reports, work = tmp_path / "run", [], Work(9)
    with pytest.raises(KeyboardInterrupt):
        harness.run(benchmark(path, work, reports=reports))
    assert work.calls == 9
    kept = len(records(path))
    assert 0 < kept < 6 and reports == [kept]
    said = capsys.readouterr().out
    assert f"interrupted: {kept} of 6 windows are measured and kept" in said and "--continue --out_dir" in said

    with (path / "records.jsonl").open("a") as file:
        file.write('{"variant": "a", "rep')  # a kill in the middle of a line
    time.sleep(0.05)
    harness.run(benchmark(path, Work(), reports=reports, go_on=True))
    found = records(path)
    assert sorted((r["variant"], r["repeat"]) for r in found) == [(v, r) for v in "ab" for r in range(3)]
    assert reports[-1] == 6
    times_s = [record["start_s"] for record in found]
    assert times_s == sorted(times_s) and times_s[kept] - times_s[kept - 1] > 0.05  # one clock for the whole run
    assert [record["piece"] for record in found] == [0] * kept + [1] * (6 - kept)
    run = json.loads((path / "run.json").read_text())
    assert len(run["continued"]) == 1 and run["continued"][0]["env"]["jaxchunk"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_waits_for_what_python_is_in_the_middle_of(tmp_path, monkeypatch, number):
    """A thread's start, in which an exception would leave a lock in disorder and end the program with another error."""
    started = []

    class Thread(threading.Thread):
        def start(self):
            super().start()
            started.append(self)
            if len(started) == 5:
                signal.raise_signal(number)

    monkeypatch.setattr(threading, "Thread", Thread)
    path, reports = tmp_path / "run", []
    with pytest.raises(KeyboardInterrupt):
        harness.run(benchmark(path, Work(), reports=reports))
    assert len(started) == 5 and reports == [len(records(path))]
    assert not any(thread.is_alive() for thread in started)


def test_a_stop_in_the_last_window_is_not_forgotten(tmp_path):
    path, reports, work = tmp_path / "run", [], Work()
    harness.run(benchmark(path, work, reports=reports))
    calls, path = work.calls, tmp_path / "again"
    with pytest.raises(KeyboardInterrupt):
        harness.run(benchmark(path, Work(calls), reports=reports))
    assert reports == [6, 6]


def test_a_second_stop_does_not_wait(tmp_path):
    class Slow(Work):
        def _call(self):
            super()._call()
            if self.calls == 9:
                time.sleep(0.01)
                signal.raise_signal(signal.SIGINT)
                raise AssertionError("the second came and nothing happened")

    path, reports = tmp_path / "run", []
    with pytest.raises(KeyboardInterrupt):
        harness.run(benchmark(path, Slow(9), reports=reports))
    assert reports == [len(records(path))] and 0 < reports[0] < 6


def test_going_on_with_a_finished_run_measures_nothing_and_reports_again(tmp_path):
    path, reports, work = tmp_path / "run", [], Work()
    harness.run(benchmark(path, Work(), reports=reports))
    harness.run(benchmark(path, work, reports=reports, go_on=True))
    assert reports == [6, 6] and work.calls == 0


def test_more_repeats_can_be_asked_of_a_run_that_is_there(tmp_path):
    path = tmp_path / "run"
    harness.run(benchmark(path, Work()))
    more = dataclasses.replace(PROTOCOL, repeats=4)
    harness.run(benchmark(path, Work(), protocol=more, go_on=True, repeats=4))
    assert len(records(path)) == 8


def test_another_configuration_is_another_run(tmp_path):
    path = tmp_path / "run"
    harness.run(benchmark(path, Work()))
    with pytest.raises(InputError, match=r"has --seed 0, and now it is 7"):
        harness.run(benchmark(path, Work(), go_on=True, seed=7))
    with pytest.raises(InputError, match="already holds a run"):
        harness.run(benchmark(path, Work()))


def test_another_benchmark_is_another_run(tmp_path):
    path = tmp_path / "run"
    harness.run(benchmark(path, Work()))
    other = dataclasses.replace(benchmark(path, Work(), go_on=True), name="other")
    with pytest.raises(InputError, match="is of the benchmark test, not of other"):
        harness.run(other)


def test_another_kind_of_device_is_another_run(tmp_path):
    path = tmp_path / "run"
    harness.run(benchmark(path, Work()))
    env = json.loads((path / "env.json").read_text())
    (path / "env.json").write_text(json.dumps(env | {"device_kind": "NVIDIA Other"}))
    with pytest.raises(InputError, match=f"begun on NVIDIA Other, and this is {jax.devices()[0].device_kind}"):
        harness.run(benchmark(path, Work(), go_on=True))


def test_a_run_that_is_not_there_is_begun_with_a_word(tmp_path, capsys):
    harness.run(benchmark(tmp_path / "run", Work(), go_on=True))
    assert f"{tmp_path / 'run'} holds no run to go on with: a new one begins" in capsys.readouterr().out


def test_what_changed_since_the_run_was_begun_is_warned_of(tmp_path, caplog):
    path = tmp_path / "run"
    harness.run(benchmark(path, Work()))
    assert not (path / "warnings.jsonl").exists()
    harness.run(benchmark(path, Work(), go_on=True))
    assert not (path / "warnings.jsonl").exists()
    env = json.loads((path / "env.json").read_text())
    (path / "env.json").write_text(json.dumps(env | {"packages": {"jax": "0.1"}, "gpu": {"device": {"uuid": "GPU-1"}}}))
    harness.run(benchmark(path, Work(), go_on=True))
    packages, gpu = sorted(
        (json.loads(line)["warning"] for line in (path / "warnings.jsonl").read_text().splitlines()), reverse=True
    )
    assert packages.startswith("packages: the run was begun with {'jax': '0.1'}, and goes on with {'jax': ")
    assert gpu == "GPU: the run was begun with GPU-1, and goes on with None"
    assert gpu in caplog.text


def test_windows_away_from_the_common_temperature_are_warned_of(tmp_path):
    path = tmp_path / "run"
    harness.run(benchmark(path, Work()))
    conditions = json.loads((path / "conditions.json").read_text())
    (path / "conditions.json").write_text(json.dumps(conditions | {"start_temperature_c": 60.0}))
    lines = records(path)
    starts_c = [57.0, 58.0, 62.0, 63.0, None, 60.0]
    lines = [json.dumps(line | {"start_temperature_c": c}) for line, c in zip(lines, starts_c, strict=True)]
    (path / "records.jsonl").write_text("\n".join(lines) + "\n")
    warm = dataclasses.replace(PROTOCOL, temperature_tolerance_c=2.0)
    harness.run(benchmark(path, Work(), protocol=warm, go_on=True))
    (warning,) = (path / "warnings.jsonl").read_text().splitlines()
    assert "2 of 6 windows began more than 2 " in warning


def test_memory_that_runs_out_is_one_line_and_keeps_the_records(tmp_path):
    def refuse():
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 4 bytes.\nand so on")

    path, work = tmp_path / "run", Work()
    work.variants = lambda: [
        Variant("a", work._call),
        Variant("b", lambda: refuse() if work.calls > 8 else work._call()),
    ]
    with pytest.raises(InputError, match=r"too little memory for this shape \(RESOURCE_EXHAUSTED.* 4 bytes\.\)"):
        harness.run(benchmark(path, work))
    assert records(path)
    with pytest.raises(InputError, match="too little memory"):
        harness.run(dataclasses.replace(benchmark(tmp_path / "other", work), variants=refuse))
    assert not (tmp_path / "other").exists()

    def break_down():
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")

    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        harness.run(dataclasses.replace(benchmark(tmp_path / "other", work), variants=break_down))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"repeats": 0}, "--repeats is 0"),
        ({"settle_s": -1.0}, "--settle_s is -1.0"),
        ({"settle_s": math.inf}, "--settle_s is inf"),
        ({"settle_s": math.nan}, "--settle_s is nan"),
        ({"seed": -1}, "--seed is -1"),
        ({"seed": 10**20}, "--seed is 100000000000000000000"),
        ({"go_on": True}, "--continue needs --out_dir"),
        ({"go_on": True, "out_dir": "x", "overwrite": True}, "--continue and --overwrite exclude each other"),
    ],
)
def test_bad_flags_are_named(flags, words):
    with pytest.raises(InputError, match=words):
        harness.check_common(BenchConfig(**flags))


def monitor_with(processes):
    device = SimulatedDevice(Constant(500.0), ManualClock())
    if processes is not None:
        device.compute_processes = processes
    return Monitor(device, now=ManualClock())


def lost():
    raise ReadFailed("NVML_ERROR_NO_PERMISSION")


def test_other_processes_are_warned_of(monkeypatch):
    monkeypatch.setattr(preflight.os, "getpid", lambda: 7)
    assert preflight.other_processes(monitor_with(lambda: [(7, 10)])) == []
    (warning,) = preflight.other_processes(monitor_with(lambda: [(7, 10), (9, 3_000_000_000), (11, None)]))
    assert warning.startswith("2 other process(es) on the GPU, holding 3.0 GB")
    # In a container the numbers are the host's: one process is this one.
    assert preflight.other_processes(monitor_with(lambda: [(4711, 10)])) == []
    assert preflight.other_processes(monitor_with(lambda: [(4711, 10), (4712, 10)]))[0].startswith("1 other")
    assert "NVML_ERROR_NO_PERMISSION" in preflight.other_processes(monitor_with(lost))[0]
    assert preflight.other_processes(monitor_with(None)) == []
    assert preflight.other_processes(Monitor(None)) == []


def test_clocks_that_stay_low_without_a_reason_are_warned_of():
    monitor = monitor_with(None)
    (warning,) = preflight.stuck_clocks(monitor, Conditions({}, "a", 60.0, 0.9))
    assert "three quarters of its 1800 MHz for 90% of the time" in warning
    for share in (0.1, None):
        assert preflight.stuck_clocks(monitor, Conditions({}, "a", 60.0, share)) == []
