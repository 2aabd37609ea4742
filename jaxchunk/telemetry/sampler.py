"""The thread that reads a device: one, and asleep nearly all the time."""

import math
import random
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from jaxchunk.telemetry.curve import CumulativeCurve
from jaxchunk.telemetry.device import Device, Probe, ReadError, Reading, read
from jaxchunk.telemetry.energy import CounterCurve, PowerIntegral, no_power_samples
from jaxchunk.telemetry.samples import SampleFile, SampleLog

EnergySource = Literal["nvml_total_energy", "nvml_power_instant", "nvml_power_average"]

THROTTLE_PERIOD_S = 0.1
MAX_QUIET_S = 0.25  # longest the energy counter is left alone between two ticks; well below what counts as a gap
# nvml.h, nvmlDeviceGetPowerUsage: "averaged over 1 sec interval" from Ampere on (except GA100).
POWER_AVERAGING_S = 1.0


@dataclass
class ReadErrors:
    """Failures of one call since the start, after a probe that worked."""

    count: int = 0
    last_reason: str = ""


class Sampler:
    """Reads what the probes found to work, each thing at its period, into curves and samples.

    `poll_once` does what is due; the thread only calls it and sleeps, and tests call it with a clock of their
    own. A reading that fails is counted in `errors` and leaves a hole: it is never 0 and never ends the thread.
    The samples of power are taken at random intervals of `sample_period_s` +- 50%, because a fixed one can fall
    in step with a device whose power swings at the rhythm of its kernels.
    """

    def __init__(
        self,
        device: Device,
        probes: Mapping[str, Probe],
        energy_source: EnergySource | None,
        *,
        now: Callable[[], float],
        poll_period_s: float,
        sample_period_s: float,
        csv_path: Path | str | None = None,
        seed: int = 0,
    ):
        self._device = device
        self._supported = {call for call, result in probes.items() if result.supported}
        self._now = now
        self._poll_period_s = poll_period_s
        self._sample_period_s = sample_period_s
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._last_energy_j = math.nan
        self._start_s: float | None = None
        self._file = None if csv_path is None else SampleFile(csv_path)
        self.errors: dict[str, ReadErrors] = {}
        self.log = SampleLog()
        self.energy = self._energy_curve(energy_source)
        self.throttle: dict[str, CumulativeCurve] = {}
        if "throttle_s" in self._supported:
            counters = probes["throttle_s"].value
            assert isinstance(counters, dict)
            self.throttle = {
                reason: CumulativeCurve(f"throttle time ({reason})", THROTTLE_PERIOD_S) for reason in counters
            }
        self._due_s = {"sample": -math.inf}
        if isinstance(self.energy, CounterCurve):
            self._due_s["poll"] = -math.inf
        if self.throttle:
            self._due_s["throttle"] = -math.inf

    def _energy_curve(self, source: EnergySource | None) -> CounterCurve | PowerIntegral | None:
        if source == "nvml_total_energy":
            # Averaged power hides the extremes that the bound needs.
            instant = "power_instant_w" in self._supported
            power_range = self.log.power_range if instant else no_power_samples
            return CounterCurve(self._poll_period_s, power_range=power_range)
        if source == "nvml_power_instant":
            return PowerIntegral(self._sample_period_s)
        if source == "nvml_power_average":
            return PowerIntegral(self._sample_period_s, averaging_s=POWER_AVERAGING_S)
        return None

    @contextmanager
    def reading(self) -> Iterator["Sampler"]:
        """Holds the sampler still while its curves and samples are looked at."""
        with self._lock:
            yield self

    def forget_before(self, time_s: float) -> None:
        """Drops what no window starting at or after `time_s` needs."""
        margin_s = POWER_AVERAGING_S  # samples just before a window enter its bound
        self.log.forget_before(time_s - margin_s)
        for curve in (*self.throttle.values(), *([] if self.energy is None else [self.energy])):
            curve.forget_before(time_s - margin_s)

    def start(self, zero_s: float) -> None:
        """Starts the thread; times in the file are counted from `zero_s`."""
        if self._thread is not None:
            return
        self._start_s = zero_s
        self._thread = threading.Thread(target=self._run, name="jaxchunk-telemetry", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread and closes the file. What was read stays."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._file is not None:
            try:
                self._file.close()
            except OSError as error:
                self._count_error("telemetry.csv", str(error))
            self._file = None

    def _run(self) -> None:
        while not self._stop.wait(self.poll_once()):
            pass

    def poll_once(self) -> float:
        """Does what is due now and returns the seconds until something is due again."""
        if self._start_s is None:
            self._start_s = self._now()
        if isinstance(self.energy, CounterCurve) and self._is_due("poll", self._poll_period_s):
            self._poll_counter(self.energy)
        if self._is_due("sample", self._sample_period_s * (0.5 + self._random.random())):
            self._sample()
        if self._is_due("throttle", THROTTLE_PERIOD_S):
            self._read_throttle()
        return max(min(self._due_s.values()) - self._now(), 0.0)

    def _is_due(self, task: str, period_s: float) -> bool:
        now_s = self._now()
        if now_s < self._due_s.get(task, math.inf):
            return False
        # After a stall the schedule starts anew; there is no catching up.
        late = now_s - self._due_s[task] > period_s
        self._due_s[task] = (now_s if late else self._due_s[task]) + period_s
        return True

    def _poll_counter(self, curve: CounterCurve) -> None:
        start_s = self._now()
        energy_j = self._read("total_energy_j")
        end_s = self._now()
        self._last_energy_j = _number(energy_j)
        with self._lock:
            if isinstance(energy_j, float):
                curve.add_reading(start_s, end_s, energy_j)
                # The call takes 3 ms of processor time on an H200: none are spent where no tick is expected.
                quiet_s = min(curve.earliest_next_tick_s() - end_s, MAX_QUIET_S)
                self._due_s["poll"] = max(self._due_s["poll"], end_s + quiet_s)
            else:
                curve.last_error = self.errors["total_energy_j"].last_reason

    def _sample(self) -> None:
        power_call = "power_instant_w" if "power_instant_w" in self._supported else "power_average_w"
        start_s = self._now()
        power = self._read(power_call)
        time_s = (start_s + self._now()) / 2
        sample = {
            "power_w": _number(power),
            "sm_clock_mhz": _number(self._read("sm_clock_mhz")),
            "temperature_c": _number(self._read("temperature_c")),
        }
        with self._lock:
            self.log.add(time_s, **sample)
            if isinstance(self.energy, PowerIntegral):
                if isinstance(power, float):
                    self.energy.add(time_s, power)
                elif power_call in self.errors:
                    self.energy.last_error = self.errors[power_call].last_reason
        if self._file is not None:
            row = sample | {"total_energy_j": self._last_energy_j}
            self._write(self._file, time_s - (self._start_s or 0.0), row)

    def _read_throttle(self) -> None:
        time_s = self._now()
        counters = self._read("throttle_s")
        with self._lock:
            for reason, curve in self.throttle.items():
                if isinstance(counters, dict) and reason in counters:
                    curve.add(time_s, counters[reason])

    def _read(self, call: str) -> Reading | None:
        """One reading, or None where the probe found the call missing or it fails now."""
        if call not in self._supported:
            return None
        try:
            return read(self._device, call)
        except ReadError as error:
            self._count_error(call, error.reason)
            return None

    def _write(self, file: SampleFile, since_start_s: float, row: dict[str, float]) -> None:
        """A full disk ends the file, not the measurement."""
        try:
            file.add(since_start_s, row)
        except OSError as error:
            self._count_error("telemetry.csv", str(error))
            self._file = None
            with suppress(OSError):
                file.close()

    def _count_error(self, call: str, reason: str) -> None:
        errors = self.errors.setdefault(call, ReadErrors())
        errors.count += 1
        errors.last_reason = reason


def _number(reading: Reading | None) -> float:
    return reading if isinstance(reading, float) else math.nan
