"""The facade of the package: what a window of time cost in joules, watts, clocks and throttling."""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from jaxchunk.telemetry.curve import GAP_MIN_S, Difference, unknown
from jaxchunk.telemetry.device import Device, Probe, ReadError, probe
from jaxchunk.telemetry.nvml import JaxDevice, find_device
from jaxchunk.telemetry.sampler import EnergySource, ReadErrors, Sampler
from jaxchunk.telemetry.samples import SampleLog, Samples

# An energy whose bound is larger than this fraction of it is not reported.
MAX_RELATIVE_BOUND = 0.10

_SOURCES: tuple[tuple[EnergySource, str, str], ...] = (  # in order of preference
    ("nvml_total_energy", "total_energy_j", "total-energy counter"),
    ("nvml_power_instant", "power_instant_w", "instantaneous power"),
    ("nvml_power_average", "power_average_w", "averaged power"),
)


@dataclass(frozen=True)
class Window:
    """What happened on the device from `start_s` to `end_s` (times of `Monitor.now()`).

    Joules and watts are those of the GPU's own rail: not of the wall socket. None means unknown, never zero;
    `energy_null_reason` says why there is no energy.
    """

    start_s: float
    end_s: float
    energy_j: float | None
    energy_bound_j: float | None  # the error of energy_j is at most this (see jaxchunk.telemetry.energy)
    energy_source: EnergySource | None
    energy_null_reason: str | None
    power_w: float | None  # energy_j / time; without energy the mean of the power samples
    sm_clock_mhz: float | None  # mean of the samples, or the nearest one
    temperature_c: float | None  # the last sample
    throttle: dict[str, float] | None  # seconds by clock-event reason; reasons that are unknown are left out


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
        csv_path: Path | str | None = None,
        poll_period_s: float = 0.005,
        sample_period_s: float = 0.025,
        now: Callable[[], float] = time.perf_counter,
    ):
        """Probes the device.

        Args:
          device: what to read, or None.
          reason_if_none: why there is no device.
          csv_path: where every raw sample goes (not written without a device).
          poll_period_s: how often the energy counter is looked at; its ticks are found to half of this.
          sample_period_s: mean time between samples of power, clock and temperature.
          now: the clock, in seconds.

        Raises:
          InputError: `csv_path` cannot be written.
        """
        self.now = now
        self.device = device
        self.probes: Mapping[str, Probe] = {}
        self.energy_source: EnergySource | None = None
        self.energy_source_reason = reason_if_none
        self._sampler: Sampler | None = None
        self._stopped = False
        self.start_s = now()
        if device is not None:
            self.probes = probe(device)
            self.energy_source, self.energy_source_reason = choose_energy_source(self.probes)
            self._sampler = Sampler(
                device,
                self.probes,
                self.energy_source,
                now=now,
                poll_period_s=poll_period_s,
                sample_period_s=sample_period_s,
                csv_path=csv_path,
            )

    @property
    def sampler(self) -> Sampler | None:
        """The sampler, to be driven by hand with `poll_once` in place of `start`."""
        return self._sampler

    @property
    def errors(self) -> dict[str, ReadErrors]:
        """Calls that worked when probed and failed later: how often, and the last reason."""
        return {} if self._sampler is None else dict(self._sampler.errors)

    def start(self) -> Self:
        """Starts reading. From now on `start_s` is the zero of the times in the CSV file."""
        self.start_s = self.now()
        if self._sampler is not None:
            self._sampler.start(self.start_s)
        return self

    def stop(self) -> None:
        """Stops reading; windows of the past can still be asked for."""
        self._stopped = True
        if self._sampler is not None:
            self._sampler.stop()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def ready(self, end_s: float) -> bool:
        """Whether waiting would no longer change the window that ends at `end_s`. Never blocks."""
        if self._sampler is None or self._stopped:
            return True
        now_s = self.now()
        if now_s < end_s:
            return False
        with self._sampler.reading() as sampler:
            curves = [*sampler.throttle.values(), *([] if sampler.energy is None else [sampler.energy])]
            return all(curve.settled(end_s) or curve.outage(now_s) for curve in curves)

    def wait_ready(self, end_s: float, timeout_s: float) -> bool:
        """Sleeps until `ready(end_s)` or for `timeout_s` seconds; says which."""
        deadline_s = time.monotonic() + timeout_s
        while not self.ready(end_s):
            if time.monotonic() >= deadline_s:
                return False
            time.sleep(0.005)
        return True

    def window(self, start_s: float, end_s: float) -> Window:
        """What happened from `start_s` to `end_s`. Asked too early, the energy is None with that reason."""
        if self._sampler is None:
            nothing = (None,) * 4
            return Window(start_s, end_s, None, None, None, self.energy_source_reason, *nothing)
        with self._sampler.reading() as sampler:
            energy = self._energy(sampler, start_s, end_s)
            power_w = sampler.log.mean("power_w", start_s, end_s, reach_s=0.0)
            if energy.value is not None:
                power_w = energy.value / (end_s - start_s)
            return Window(
                start_s=start_s,
                end_s=end_s,
                energy_j=energy.value,
                energy_bound_j=energy.bound,
                energy_source=self.energy_source,
                energy_null_reason=energy.null_reason,
                power_w=power_w,
                sm_clock_mhz=sampler.log.mean("sm_clock_mhz", start_s, end_s, reach_s=GAP_MIN_S),
                temperature_c=sampler.log.last("temperature_c", end_s, reach_s=end_s - start_s + GAP_MIN_S),
                throttle=_throttle(sampler, start_s, end_s),
            )

    def _energy(self, sampler: Sampler, start_s: float, end_s: float) -> Difference:
        if sampler.energy is None:
            return unknown(self.energy_source_reason)
        energy = sampler.energy.difference(start_s, end_s)
        if energy.value is None or energy.bound is None:
            if energy.pending and self._stopped:
                return unknown("the sampler stopped before the window's end")
            if energy.pending and sampler.energy.outage(self.now()):
                return unknown(sampler.energy.outage_reason(self.now()))
            return energy
        if energy.bound > MAX_RELATIVE_BOUND * energy.value:
            return unknown(
                f"the error bound of {energy.bound:.3g} J is more than {MAX_RELATIVE_BOUND:.0%} "
                f"of the {energy.value:.3g} J"
            )
        return energy

    def samples(self, start_s: float = -math.inf, end_s: float = math.inf) -> Samples:
        """A copy of the raw samples between two times (all of them by default)."""
        if self._sampler is None:
            return SampleLog().between(start_s, end_s)
        with self._sampler.reading() as sampler:
            return sampler.log.between(start_s, end_s)

    def forget_before(self, time_s: float) -> None:
        """Frees what no window starting at or after `time_s` needs; a day of samples is 0.1 GB otherwise."""
        if self._sampler is not None:
            with self._sampler.reading() as sampler:
                sampler.forget_before(time_s)

    def describe(self) -> dict[str, object]:
        """The device, the probes and the choice of source, for `env.json`."""
        return {
            "device": None if self.device is None else self.device.describe(),
            "energy_source": self.energy_source,
            "energy_source_reason": self.energy_source_reason,
            "probes": {call: str(result) for call, result in self.probes.items()},
        }


def _throttle(sampler: Sampler, start_s: float, end_s: float) -> dict[str, float] | None:
    grown = {reason: curve.difference(start_s, end_s).value for reason, curve in sampler.throttle.items()}
    # The counters move in steps of their own: what is interpolated can exceed the window, which time cannot.
    known = {reason: min(seconds, end_s - start_s) for reason, seconds in grown.items() if seconds is not None}
    return known or None


def open_monitor(jax_device: JaxDevice, *, csv_path: Path | str | None = None) -> Monitor:
    """A monitor of a JAX device, whatever it is: on a CPU, or without NVML, one that knows why it knows nothing.

    Raises:
      InputError: `csv_path` cannot be written.
    """
    if jax_device.platform not in ("gpu", "cuda"):
        return Monitor(None, reason_if_none=f"JAX runs on {jax_device.platform}: no GPU to measure")
    try:
        device = find_device(jax_device)
    except ReadError as error:
        return Monitor(None, reason_if_none=f"NVML not available: {error.reason}")
    return Monitor(device, csv_path=csv_path)
