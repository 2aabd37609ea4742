"""The sampler's thread: errors in it, other threads beside it, and its end."""

import math
import threading
import time

from jaxchunk.telemetry import Monitor
from jaxchunk.telemetry.simulation.simulated import Constant, ManualClock, SimulatedDevice, drive


class WallPacedDevice(SimulatedDevice):
    """A simulated device on the real clock."""

    def __init__(self):
        super().__init__(Constant(500.0), time.perf_counter, tick_s=0.02)


def test_an_error_in_the_sampler_is_counted_and_the_thread_goes_on():
    device = WallPacedDevice()
    with Monitor(device) as monitor:
        ingest, failures = monitor.sampler.tracks.ingest, iter([KeyError("defect")] * 2)

        def defective(reading):
            error = next(failures, None) if reading.call == "sample" else None
            if error is not None:
                raise error
            ingest(reading)

        monitor.sampler.tracks.ingest = defective
        time.sleep(0.4)
        assert monitor.sampler._thread.is_alive()
        assert monitor.errors["sampler"].count == 2
        assert monitor.errors["sampler"].last_reason == "KeyError: 'defect'"
        assert len(monitor.samples().time_s) > 1


def test_other_threads_may_ask_at_any_time():
    monitor = Monitor(WallPacedDevice()).start()
    failures = []

    def ask():
        try:
            end_s = time.perf_counter() + 0.3
            while time.perf_counter() < end_s:
                now_s = monitor.now()
                monitor.attend()
                monitor.window(now_s - 0.1, now_s)
                monitor.ready(now_s)
                monitor.forget_before(now_s - 5.0)
                assert isinstance(monitor.errors, dict)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=ask) for _ in range(3)]
    stops = [threading.Thread(target=monitor.stop) for _ in range(3)]
    for thread in threads:
        thread.start()
    time.sleep(0.1)
    for thread in stops:
        thread.start()
    for thread in [*threads, *stops]:
        thread.join(5.0)
        assert not thread.is_alive()
    assert failures == []
    monitor.stop()


def test_stopping_before_the_start_and_after(tmp_path):
    monitor = Monitor(WallPacedDevice(), csv_path=tmp_path / "telemetry.csv")
    monitor.stop()
    monitor.stop()
    monitor.start()
    monitor.stop()
    assert monitor.ready(math.inf)


def test_a_stop_does_not_wait_for_a_reading_for_ever(monkeypatch):
    monkeypatch.setattr("jaxchunk.telemetry.sampler.STOP_TIMEOUT_S", 0.1)
    device, release = WallPacedDevice(), threading.Event()
    monitor = Monitor(device)
    device.total_energy_j = lambda: float(release.wait(5.0))
    monitor.start()
    time.sleep(0.05)
    start_s = time.perf_counter()
    monitor.stop()
    assert time.perf_counter() - start_s < 2.0
    assert "a reading had not ended" in monitor.errors["sampler"].last_reason
    release.set()


def test_one_file_that_fails_to_close_does_not_keep_the_other_open(tmp_path):
    clock, path = ManualClock(), tmp_path / "run.jsonl"
    device = SimulatedDevice(Constant(500.0), clock)
    monitor = Monitor(device, now=clock, csv_path=tmp_path / "telemetry.csv", record_path=path)
    drive(monitor.sampler.poll_once, clock, 1.0)
    first, second = monitor.sampler._sinks
    close = first.close

    def refuse():
        close()
        raise OSError("disk full")

    first.close = refuse
    monitor.stop()
    assert second._file.closed
    assert monitor.errors["telemetry.csv"].last_reason == "disk full"
