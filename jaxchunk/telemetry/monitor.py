"""The facade of the package: what a window of time cost in joules, watts, clocks and throttling."""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from jaxchunk.telemetry.curve import GAP_MIN_S, CumulativeCurve, Difference, unknown
from jaxchunk.telemetry.device import CALLS, Device, Probe, ReadFailed, probe
from jaxchunk.telemetry.rails import Rail
from jaxchunk.telemetry.reading import Reading
from jaxchunk.telemetry.recording import Header, RecordingFile, read_recording
from jaxchunk.telemetry.sampler import Sampler
from jaxchunk.telemetry.samples import SampleFile, SampleLog, Samples
from jaxchunk.telemetry.tracks import EnergySource, RailKind, ReadErrors, Tracks
from jaxchunk.telemetry.window import MAX_RELATIVE_BOUND, CrossCheck, Window

_SOURCES: tuple[tuple[EnergySource, str, str], ...] = (  # in order of preference
    ("nvml_total_energy", "total_energy_j", "total-energy counter"),
    ("nvml_power_instant", "power_instant_w", "instantaneous power"),
    ("nvml_power_average", "power_average_w", "averaged power"),
)


def choose_energy_source(probes: Mapping[str, Probe]) -> tuple[EnergySource | None, str]:
    """The best source that the probes found, and a sentence that says why not a better one."""
    passed_over: list[str] = []
    for source, call, label in _SOURCES:
        if probes[call].supported:
            return source, "; ".join([*passed_over, f"{label} works"])
        passed_over.append(f"{label}: {probes[call]}")
    return None, "; ".join(passed_over)


class Monitor:
    """Measures one device from the side; with no device it answers None to everything, with the reason.

    Use as a context manager, or call `start` and `stop`. Probing happens here, once; reading happens in one
    thread. A step's energy is known about two ticks of the counter (0.2 s) after the step: ask `ready` first,
    or `wait_ready`.
    """

    def __init__(
        self,
        device: Device | None,
        *,
        reason_if_none: str = "no device to measure",
        rails: Sequence[Rail] = (),
        csv_path: Path | str | None = None,
        append_csv: bool = False,
        record_path: Path | str | None = None,
        poll_period_s: float = 0.005,
        sample_period_s: float = 0.025,
        now: Callable[[], float] = time.perf_counter,
        cpu_time: Callable[[], float] = time.thread_time,
    ):
        """Probes the device.

        Args:
          device: what to read, or None.
          reason_if_none: why there is no device.
          rails: meters of the host, to be read as well.
          csv_path: where every raw sample goes (not written without a device).
          append_csv: go on with the file that is there.
          record_path: where every reading goes, for `Monitor.replay`.
          poll_period_s: how often the energy counter is looked at, at most.
          sample_period_s: mean time between samples of power, clock and temperature.
          now: the clock, in seconds.
          cpu_time: processor seconds of the calling thread.

        Raises:
          InputError: `csv_path` or `record_path` cannot be written.
        """
        self.now = now
        self.device = device
        self.probes: Mapping[str, Probe] = {} if device is None else probe(device)
        self.energy_source: EnergySource | None = None
        self.energy_source_reason = reason_if_none
        self._stopped = False
        self.start_s = now()
        if device is not None:
            self.energy_source, self.energy_source_reason = choose_energy_source(self.probes)
        rails = _working(rails)
        kinds = [RailKind(rail.name, rail.kind) for rail in rails]
        header = Header(
            device=None if device is None else device.describe(),
            reason_if_none=reason_if_none,
            probes=self.probes,
            rails=kinds,
            poll_period_s=poll_period_s,
            sample_period_s=sample_period_s,
        )
        self._file = SampleFile(csv_path, append=append_csv) if csv_path is not None and device is not None else None
        self._recording = None if record_path is None else RecordingFile(record_path, header)
        self._sampler: Sampler | None = None
        if device is not None or rails:
            self._sampler = Sampler(
                device,
                self.probes,
                _tracks(header, self.energy_source),
                now=now,
                poll_period_s=poll_period_s,
                sample_period_s=sample_period_s,
                rails=rails,
                sinks=[sink for sink in (self._file, self._recording) if sink is not None],
                cpu_time=cpu_time,
            )
        self._set_zero()

    @classmethod
    def replay(cls, path: Path | str) -> "Monitor":
        """The monitor of a recorded run, with the same windows, up to where the recording is cut off.

        Raises:
          InputError: the file cannot be read or is no recording.
        """
        header, readings = read_recording(path)
        device = None if header.device is None else RecordedDevice(header.device)
        until_s = -math.inf
        monitor = cls(None, reason_if_none=header.reason_if_none, now=lambda: until_s)
        monitor.device, monitor.probes, monitor._stopped = device, header.probes, True
        if device is not None:
            monitor.energy_source, monitor.energy_source_reason = choose_energy_source(header.probes)
        tracks = _tracks(header, monitor.energy_source)
        for reading in readings:
            if reading.call == "start":
                monitor.start_s = reading.start_s
            else:
                tracks.ingest(reading)
                until_s = max(until_s, reading.end_s)
        monitor._sampler = Sampler(None, {}, tracks, now=monitor.now, poll_period_s=1.0, sample_period_s=1.0)
        return monitor

    def _set_zero(self) -> None:
        if self._file is not None:
            self._file.zero_s = self.start_s
        if self._recording is not None:
            with suppress(OSError):  # a full disk is reported when the next reading is written
                self._recording.add(Reading("start", self.start_s, self.start_s, None))

    @property
    def sampler(self) -> Sampler | None:
        """The sampler, to be driven by hand with `poll_once` in place of `start`."""
        return self._sampler

    @property
    def errors(self) -> dict[str, ReadErrors]:
        """Calls that worked when probed and failed later: how often, and the last reason."""
        if self._sampler is None:
            return {}
        with self._sampler.reading() as tracks:
            return dict(tracks.errors)

    @property
    def sampler_cpu_s(self) -> float:
        """Processor seconds that reading has taken so far."""
        return 0.0 if self._sampler is None else self._sampler.cpu_s

    def start(self, elapsed_s: float = 0.0) -> Self:
        """Starts reading. `start_s`, the zero of the times in the CSV file, is now, or `elapsed_s` ago."""
        self.start_s = self.now() - elapsed_s
        self._set_zero()
        if self._sampler is not None:
            self._sampler.start()
        return self

    def stop(self) -> None:
        """Stops reading; windows of the past can still be asked for."""
        self._stopped = True
        if self._sampler is not None:
            self._sampler.stop()
        elif self._recording is not None:
            with suppress(OSError):
                self._recording.close()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def of(self, devices: Sequence[int]) -> "Monitor":
        """The monitor of the device at place 0, the only one; see `GroupMonitor.of`.

        Raises:
          ValueError: another one is asked for.
        """
        if tuple(devices) != (0,):
            raise ValueError(f"devices {tuple(devices)}: this monitor has one device, at place 0")
        return self

    def ready(self, end_s: float) -> bool:
        """Whether waiting would no longer change the window that ends at `end_s`. Never blocks."""
        if self._sampler is None or self._stopped:
            return True
        now_s = self.now()
        if now_s < end_s:
            return False
        with self._sampler.reading() as tracks:
            return all(curve.settled(end_s) or curve.outage(now_s) for curve in tracks.awaited)

    def attend(self) -> None:
        """Says that a window begins or ends about now: a counter that is dear to read is now worth reading."""
        if self._sampler is not None and not self._stopped:
            self._sampler.attend()

    def wait_ready(self, end_s: float, timeout_s: float) -> bool:
        """Sleeps until `ready(end_s)` or for `timeout_s` seconds; says which."""
        deadline_s = time.monotonic() + timeout_s
        while not self.ready(end_s):
            if time.monotonic() >= deadline_s:
                return False
            time.sleep(0.005)
        return True

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Reads nothing in between: windows that touch it are invalid. For finding out what reading costs."""
        if self._sampler is None:
            yield
            return
        self._sampler.pause()
        try:
            yield
        finally:
            self._sampler.resume()

    def window(self, start_s: float, end_s: float) -> Window:
        """What happened from `start_s` to `end_s`. Asked too early, the energy is None with that reason."""
        if self._sampler is None:
            return Window.unknown(start_s, end_s, self.energy_source_reason)
        with self._sampler.reading() as tracks:
            energy, source = self._energy(tracks, start_s, end_s)
            power_w = tracks.log.mean("power_w", start_s, end_s, reach_s=0.0)
            if energy.value is not None:
                power_w = energy.value / (end_s - start_s)
            return Window(
                start_s=start_s,
                end_s=end_s,
                energy_j=energy.value,
                energy_bound_j=energy.bound,
                energy_source=source,
                energy_null_reason=energy.null_reason,
                power_w=power_w,
                sm_clock_mhz=tracks.log.mean("sm_clock_mhz", start_s, end_s, reach_s=GAP_MIN_S),
                temperature_c=tracks.log.last("temperature_c", end_s, reach_s=end_s - start_s + GAP_MIN_S),
                throttle=_grown(tracks.throttle, start_s, end_s, at_most=end_s - start_s),
                slow_without_reason_s=None if tracks.slow is None else tracks.slow.difference(start_s, end_s).value,
                cross_check=_cross_check(tracks, energy, start_s, end_s),
                rails_j=_grown(tracks.rails, start_s, end_s),
                invalid_reason=None if self.device is None else _invalid(tracks, start_s, end_s),
            )

    def _energy(self, tracks: Tracks, start_s: float, end_s: float) -> tuple[Difference, EnergySource | None]:
        if tracks.energy is None:
            return unknown(self.energy_source_reason), None
        energy, source = tracks.energy_between(start_s, end_s)
        if energy.value is None or energy.bound is None:
            if energy.pending and self._stopped:
                energy = unknown("the sampler stopped before the window's end")
            elif energy.pending and tracks.energy.outage(self.now()):
                energy = unknown(tracks.energy.outage_reason(self.now()))
        elif energy.bound > MAX_RELATIVE_BOUND * energy.value:
            energy = unknown(
                f"the error bound of {energy.bound:.3g} J is more than {MAX_RELATIVE_BOUND:.0%} "
                f"of the {energy.value:.3g} J"
            )
        return energy, source

    def energy_ticks_s(self, start_s: float, end_s: float) -> list[float]:
        """Times between two times at which the energy is known best: the counter's ticks, or the samples of power."""
        if self._sampler is None:
            return []
        with self._sampler.reading() as tracks:
            return [] if tracks.energy is None else tracks.energy.knots_s(start_s, end_s)

    def samples(self, start_s: float = -math.inf, end_s: float = math.inf) -> Samples:
        """A copy of the raw samples between two times (all of them by default)."""
        if self._sampler is None:
            return SampleLog().between(start_s, end_s)
        with self._sampler.reading() as tracks:
            return tracks.log.between(start_s, end_s)

    def forget_before(self, time_s: float) -> None:
        """Frees what no window starting at or after `time_s` needs; a day of samples is 0.1 GB otherwise."""
        if self._sampler is not None:
            with self._sampler.reading() as tracks:
                tracks.forget_before(time_s)

    def describe(self) -> dict[str, object]:
        """The device, the probes and the choice of source, for `env.json`."""
        return {
            "device": None if self.device is None else self.device.describe(),
            "energy_source": self.energy_source,
            "energy_source_reason": self.energy_source_reason,
            "probes": {call: str(result) for call, result in self.probes.items()},
        }


class RecordedDevice:
    """The device of a recording: it has its names and answers no more."""

    def __init__(self, description: dict[str, Any]):
        self.name, self.uuid = str(description.get("name")), str(description.get("uuid"))
        self._description = description

    def describe(self) -> dict[str, object]:
        """See `Device`."""
        return dict(self._description)

    def __getattr__(self, call: str) -> Any:
        if call in CALLS:
            raise ReadFailed("this device is a recording")
        raise AttributeError(call)


def _tracks(header: Header, energy_source: EnergySource | None) -> Tracks:
    return Tracks(
        header.probes,
        energy_source,
        poll_period_s=header.poll_period_s,
        sample_period_s=header.sample_period_s,
        rails=header.rails,
    )


def _working(rails: Sequence[Rail]) -> list[Rail]:
    """The rails that can be read: often only root may."""
    working: dict[str, Rail] = {}
    for rail in rails:
        with suppress(Exception):
            rail.read()
            working.setdefault(rail.name, rail)  # a name that is there as joules and as watts: the joules come first
    return list(working.values())


def _grown(
    curves: Mapping[str, CumulativeCurve], start_s: float, end_s: float, *, at_most: float = math.inf
) -> dict[str, float] | None:
    grown = {name: curve.difference(start_s, end_s).value for name, curve in curves.items()}
    # Throttle counters move in steps of their own: what is interpolated can exceed the window, which time cannot.
    known = {name: min(value, at_most) for name, value in grown.items() if value is not None}
    return known or None


def _cross_check(tracks: Tracks, energy: Difference, start_s: float, end_s: float) -> CrossCheck | None:
    if tracks.comparison is None or tracks.power_source is None or not energy.value:
        return None
    other = tracks.comparison.difference(start_s, end_s)
    if other.value is None or other.bound is None:
        return None
    return CrossCheck(tracks.power_source, other.value, other.bound, other.value / energy.value - 1)


def _invalid(tracks: Tracks, start_s: float, end_s: float) -> str | None:
    pause_s = tracks.log.longest_pause_s(start_s, end_s)
    return f"no sample for {pause_s:.2f} s" if pause_s > GAP_MIN_S else None
