"""The thread that reads a device: one, and asleep nearly all the time."""

import itertools
import math
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Protocol

from jaxchunk.telemetry.device import Device, PowerSamples, Probe, ReadError, ReadFailed, Value, read
from jaxchunk.telemetry.energy import CounterCurve
from jaxchunk.telemetry.power_samples import READ_S, READ_SHARE, SampleReader
from jaxchunk.telemetry.rails import Rail
from jaxchunk.telemetry.reading import Reading
from jaxchunk.telemetry.schedule import CounterSchedule
from jaxchunk.telemetry.tracks import RAIL_PERIOD_S, SAMPLE_CALLS, THROTTLE_PERIOD_S, Tracks

ATTENDED_SAMPLES_S = 0.1  # after the end of a window the device has the two samples more that its energy needs
STOP_TIMEOUT_S = 10.0  # a driver that has lost its GPU can keep a call for ever
RETRY_S = 0.1  # after an error in the sampler itself


class Sink(Protocol):
    """A file that readings go to; its errors are counted under `name`."""

    name: str

    def add(self, reading: Reading) -> None:
        """Takes a reading. Raises OSError where the disk refuses."""

    def close(self) -> None:
        """Writes what is buffered. Raises OSError where the disk refuses."""


class Sampler:
    """Reads what the probes found to work, each thing at its period, into `tracks` and into files.

    `poll_once` does what is due; the thread only calls it and sleeps, and tests call it with a clock of their
    own. A reading that fails is counted and leaves a hole: it is never 0 and never ends the thread.
    The samples of power are taken at random intervals of `sample_period_s` +- 50%, because a fixed one can fall
    in step with a device whose power swings at the rhythm of its kernels.
    """

    def __init__(
        self,
        device: Device | None,
        probes: Mapping[str, Probe],
        tracks: Tracks,
        *,
        now: Callable[[], float],
        poll_period_s: float,
        sample_period_s: float,
        rails: Sequence[Rail] = (),
        sinks: Sequence[Sink] = (),
        cpu_time: Callable[[], float] = time.thread_time,
    ):
        self._device = device
        self._supported = {call for call, result in probes.items() if result.supported}
        self.tracks = tracks
        self._now = now
        self._cpu_time = cpu_time
        self._sample_period_s = sample_period_s
        self._rails = list(rails)
        self._sinks = list(sinks)
        self._random = random.Random(0)
        self._schedule = CounterSchedule(poll_period_s)
        self._lock = threading.Lock()
        self._stop, self._wake, self._running = threading.Event(), threading.Event(), threading.Event()
        self._running.set()
        self._thread: threading.Thread | None = None
        self.cpu_s = 0.0
        self._due_s: dict[str, float] = {}
        self._polled_s = -math.inf
        self._sample_reader = SampleReader()
        self._counter_pause_s = 0.0
        if device is not None:
            self._due_s["sample"] = -math.inf
        if isinstance(tracks.energy, CounterCurve):
            self._due_s["counter"] = -math.inf
        if tracks.samples is not None:
            self._due_s["power_samples"] = -math.inf
        if tracks.throttle:
            self._due_s["throttle"] = -math.inf
        if self._rails:
            self._due_s["rails"] = -math.inf

    @contextmanager
    def reading(self) -> Iterator[Tracks]:
        """Holds the sampler still while its curves and samples are looked at."""
        with self._lock:
            yield self.tracks

    def attend(self) -> None:
        """Says that a window begins or ends about now: the counter's next ticks are worth their price."""
        with self._lock:
            curve = self.tracks.energy
            if isinstance(curve, CounterCurve):
                due_s = self._schedule.attend(self._now(), curve)
                if due_s is not None:
                    self._due_s["counter"] = min(self._due_s["counter"], due_s)
            if "throttle" in self._due_s:
                self._due_s["throttle"] = -math.inf
            if "power_samples" in self._due_s:
                self._due_s["power_samples"] = min(self._due_s["power_samples"], self._now() + ATTENDED_SAMPLES_S)
            self._wake.set()

    def start(self) -> None:
        """Starts the thread."""
        if self._thread is None and self._due_s:
            self._thread = threading.Thread(target=self._run, name="jaxchunk-telemetry", daemon=True)
            self._thread.start()

    def pause(self) -> None:
        """Reads nothing until `resume`."""
        self._running.clear()

    def resume(self) -> None:
        """Reads again."""
        self._running.set()

    def stop(self) -> None:
        """Ends the thread and closes the files. What was read stays."""
        self._stop.set()
        self._running.set()
        self._wake.set()
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.join(STOP_TIMEOUT_S)
            if thread.is_alive():
                self._count_error("sampler", f"a reading had not ended {STOP_TIMEOUT_S:g} s after the stop")
        for sink in list(self._sinks):
            with self._disk_errors(sink):
                sink.close()
        self._sinks.clear()

    def _run(self) -> None:
        while not self._stop.is_set():
            self._running.wait()
            start_s = self._cpu_time()
            try:
                wait_s = self.poll_once()
            except Exception as error:  # a defect is reported: it does not end the measurement in silence
                self._count_error("sampler", f"{type(error).__name__}: {error}")
                wait_s = RETRY_S
            self.cpu_s += self._cpu_time() - start_s
            self._wake.wait(wait_s)
            self._wake.clear()

    def poll_once(self) -> float:
        """Does what is due now and returns the seconds until something is due again."""
        now_s = self._now()
        if now_s < self._polled_s:  # the clock went backwards; the curves say so at the next reading
            self._due_s.update(dict.fromkeys(self._due_s, now_s))
        self._polled_s = now_s
        if now_s >= self._due_s.get("counter", math.inf):
            self._read_counter()
        if self._is_due("sample", self._sample_period_s * (0.5 + self._random.random())):
            self._sample()
        if self._is_due("power_samples", self._power_samples_period_s()):
            self._keep(self._sample_reader.new(self._read("power_samples_w")))
        if self._is_due("throttle", THROTTLE_PERIOD_S):
            self._keep(self._read("throttle_s"))
        if self._is_due("rails", RAIL_PERIOD_S):
            for rail in self._rails:
                self._keep(self._ask(f"rail:{rail.name}", rail.read))
        return max(min(self._due_s.values(), default=math.inf) - self._now(), 0.0)

    def _is_due(self, task: str, period_s: float) -> bool:
        now_s = self._now()
        if now_s < self._due_s.get(task, math.inf):
            return False
        # After a stall the schedule starts anew; there is no catching up.
        late = now_s - self._due_s[task] > period_s
        self._due_s[task] = (now_s if late else self._due_s[task]) + period_s
        return True

    def _read_counter(self) -> None:
        start_s = self._cpu_time()
        reading = self._read("total_energy_j")
        cost_s = self._cpu_time() - start_s
        self._keep(reading)
        with self._lock:
            curve = self.tracks.energy
            assert isinstance(curve, CounterCurve)
            due_s = self._due_s["counter"] = self._schedule.next_s(curve, reading.start_s, reading.end_s, cost_s)
        if due_s - reading.end_s > self._counter_pause_s:
            self._counter_pause_s = due_s - reading.end_s
            self._keep(Reading("counter_pause", reading.end_s, reading.end_s, self._counter_pause_s))

    def _power_samples_period_s(self) -> float:
        kept_s = self._sample_reader.kept_s
        return min(READ_SHARE * kept_s, READ_S) if kept_s else READ_S

    def _sample(self) -> None:
        """Power, clock and temperature as one reading, which lasts as long as that of the power."""
        sample: dict[str, float] = {}
        start_s = end_s = self._now()
        for name, calls in SAMPLE_CALLS.items():
            call = next((call for call in calls if call in self._supported), None)
            if call is None:
                continue
            reading = self._read(call)
            if name == "power_w":
                end_s = reading.end_s
            if isinstance(reading.value, float):
                sample[name] = reading.value
            else:
                self._keep(reading)
        self._keep(Reading("sample", start_s, end_s, sample))

    def _read(self, call: str) -> Reading:
        device = self._device
        assert device is not None
        return self._ask(call, lambda: read(device, call))

    def _ask(self, call: str, question: Callable[[], Value]) -> Reading:
        start_s = self._now()
        try:
            value = _finite(question())
        except ReadError as error:
            return Reading(call, start_s, self._now(), None, error.reason)
        except Exception as error:  # of a rail, or of an answer that is no number
            return Reading(call, start_s, self._now(), None, f"{type(error).__name__}: {error}")
        return Reading(call, start_s, self._now(), value)

    def _keep(self, reading: Reading) -> None:
        with self._lock:
            self.tracks.ingest(reading)
        for sink in list(self._sinks):
            with self._disk_errors(sink):
                sink.add(reading)

    @contextmanager
    def _disk_errors(self, sink: Sink) -> Iterator[None]:
        """A full disk ends the file, not the measurement."""
        try:
            yield
        except Exception as error:
            self._count_error(sink.name, str(error))
            if sink in self._sinks:
                self._sinks.remove(sink)
            with suppress(Exception):
                sink.close()

    def _count_error(self, name: str, reason: str) -> None:
        with self._lock:
            self.tracks.ingest(Reading(name, self._now(), self._now(), None, reason))


def _finite(value: Value) -> Value:
    """Plain floats.

    Raises:
      ReadFailed: one of them is infinite or not a number.
    """
    if isinstance(value, PowerSamples):
        if not all(math.isfinite(number) for number in (value.asked_s, *itertools.chain(*value.samples))):
            raise ReadFailed("a sample of power is not a finite number")
        return value
    numbers = {name: float(x) for name, x in value.items()} if isinstance(value, dict) else {"": float(value)}
    for name, number in numbers.items():
        if not math.isfinite(number):
            raise ReadFailed(f"the answer is {number}" + (f" for {name}" if name else ""))
    return numbers if isinstance(value, dict) else numbers[""]
