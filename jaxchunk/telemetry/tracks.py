"""What readings add up to: energy over time, throttle time, slow clocks, the host's rails, raw samples."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Literal

from jaxchunk.telemetry.curve import CumulativeCurve, Difference
from jaxchunk.telemetry.device import PowerSamples, Probe
from jaxchunk.telemetry.energy import CounterCurve, no_power_samples
from jaxchunk.telemetry.power import PowerIntegral
from jaxchunk.telemetry.power_samples import STRETCH_S, SampleCurve, distribute
from jaxchunk.telemetry.reading import Reading
from jaxchunk.telemetry.samples import SampleLog

# "nvml_energy_by_samples" are the counter's joules, distributed by the device's own samples of power.
EnergySource = Literal["nvml_total_energy", "nvml_energy_by_samples", "nvml_power_instant", "nvml_power_average"]

SAMPLE_CALLS = {"power_w": ("power_instant_w", "power_average_w"), "sm_clock_mhz": ("sm_clock_mhz",),
                "temperature_c": ("temperature_c",)}  # fmt: skip
THROTTLE_PERIOD_S = 0.5
RAIL_PERIOD_S = 0.1
# nvml.h, nvmlDeviceGetPowerUsage: "averaged over 1 sec interval" from Ampere on (except GA100).
POWER_AVERAGING_S = 1.0
# A clock below this share of the highest one, while less than that share of the time has a reason, is slow without one.
SLOW_CLOCK = 0.75
UNEXPLAINED = 0.05


@dataclasses.dataclass
class ReadErrors:
    """Failures of one call since the start, after a probe that worked."""

    count: int = 0
    last_reason: str = ""


@dataclasses.dataclass(frozen=True)
class RailKind:
    """A meter of the host: its name, and whether it gives joules or watts."""

    name: str
    kind: Literal["energy", "power"]


class Tracks:
    """Curves and samples, fed with readings in order of time. Not safe for threads: the sampler holds a lock around it.

    The same readings give the same tracks, be they read now or replayed from a file.
    """

    def __init__(
        self,
        probes: Mapping[str, Probe],
        energy_source: EnergySource | None,
        *,
        poll_period_s: float,
        sample_period_s: float,
        rails: Sequence[RailKind] = (),
    ):
        supported = {call for call, result in probes.items() if result.supported}
        self.errors: dict[str, ReadErrors] = {}
        self.log = SampleLog()
        self.power_source: EnergySource | None = None  # of the samples of power
        for call in SAMPLE_CALLS["power_w"]:
            if call in supported:
                self.power_source = "nvml_power_instant" if call == "power_instant_w" else "nvml_power_average"
                break
        self._sample_period_s = sample_period_s
        self.energy, self.comparison = self._energy_curves(energy_source, poll_period_s)
        self.energy_source = energy_source
        has_counter = isinstance(self.energy, CounterCurve)
        self.samples = SampleCurve() if has_counter and "power_samples_w" in supported else None
        self.throttle: dict[str, CumulativeCurve] = {}
        if "throttle_s" in supported:
            counters = probes["throttle_s"].value
            assert isinstance(counters, dict)
            self.throttle = {name: _slow_curve(f"throttle time ({name})") for name in counters}
        highest = probes["sm_clock_max_mhz"].value if "sm_clock_max_mhz" in supported else None
        self._sm_clock_max_mhz = highest if isinstance(highest, float) and math.isfinite(highest) else None
        known = self.throttle and self._sm_clock_max_mhz and "sm_clock_mhz" in supported
        self.slow = _slow_curve("time with slow clocks") if known else None
        self._explained_s: tuple[float, float, float] | None = None  # time, throttle seconds and slow seconds so far
        self.rails = {
            rail.name: CumulativeCurve(rail.name, RAIL_PERIOD_S)
            if rail.kind == "energy"
            else PowerIntegral(RAIL_PERIOD_S)
            for rail in rails
        }

    def _energy_curves(
        self, source: EnergySource | None, poll_period_s: float
    ) -> tuple[CounterCurve | PowerIntegral | None, PowerIntegral | None]:
        """The curve of the chosen source, and one of the power samples to compare a counter with."""
        integral = None
        if self.power_source is not None:
            averaging_s = POWER_AVERAGING_S if self.power_source == "nvml_power_average" else 0.0
            integral = PowerIntegral(self._sample_period_s, averaging_s=averaging_s)
        if source == "nvml_total_energy":
            # Averaged power hides the extremes that the bound needs.
            instant = self.power_source == "nvml_power_instant"
            power_range = self.log.power_range if instant else no_power_samples
            return CounterCurve(poll_period_s, power_range=power_range), integral
        return (integral, None) if source is not None else (None, None)

    @property
    def awaited(self) -> list[CumulativeCurve]:
        """The curves that a window waits for."""
        return [curve for curve in (self.energy, self.samples) if curve is not None] + list(self.throttle.values())

    @property
    def curves(self) -> list[CumulativeCurve]:
        """Every curve that a window asks."""
        others = [curve for curve in (self.comparison, self.slow) if curve is not None]
        return [*self.awaited, *others, *self.rails.values()]

    def energy_between(self, start_s: float, end_s: float) -> tuple[Difference, EnergySource | None]:
        """Joules over a window, and their source: of two that know them the one with the smaller bound."""
        assert self.energy is not None, "there is no source of energy"
        energy = self.energy.difference(start_s, end_s)
        if isinstance(self.energy, CounterCurve) and self.samples is not None and energy.bound is not None:
            shared = distribute(self.energy, self.samples, start_s, end_s)
            if shared.bound is not None and shared.bound < energy.bound:
                return shared, "nvml_energy_by_samples"
        return energy, self.energy_source

    def ingest(self, reading: Reading) -> None:
        """Takes in a reading; failures are counted and leave a hole, never a 0."""
        if reading.error is not None:
            errors = self.errors.setdefault(reading.call, ReadErrors())
            errors.count += 1
            errors.last_reason = reading.error
        if reading.call == "total_energy_j":
            self._ingest_energy(reading)
        elif reading.call == "power_samples_w":
            self._ingest_power_samples(reading)
        elif reading.call == "sample":
            self._ingest_sample(reading)
        elif reading.call == "throttle_s":
            self._ingest_throttle(reading)
        elif reading.call == "counter_pause" and isinstance(self.energy, CounterCurve):
            assert isinstance(reading.value, float)
            self.energy.expect_every(reading.value)
        elif reading.call.startswith("rail:"):
            rail = self.rails[reading.call.removeprefix("rail:")]
            if isinstance(reading.value, float):
                rail.add(reading.end_s, reading.value)
            else:
                rail.last_error = reading.error

    def forget_before(self, time_s: float) -> None:
        """Drops what no window starting at or after `time_s` needs."""
        margin_s = POWER_AVERAGING_S if self.samples is None else STRETCH_S  # what was just before enters the bound
        self.log.forget_before(time_s - margin_s)
        for curve in self.curves:
            curve.forget_before(time_s - margin_s)

    def _ingest_energy(self, reading: Reading) -> None:
        if not isinstance(self.energy, CounterCurve):
            return
        if isinstance(reading.value, float):
            self.energy.add_reading(reading.start_s, reading.end_s, reading.value)
        else:
            self.energy.last_error = reading.error

    def _ingest_power_samples(self, reading: Reading) -> None:
        if self.samples is None:
            return
        if isinstance(reading.value, PowerSamples):
            self.samples.add_samples(reading.start_s, reading.end_s, reading.value.samples)
        else:
            self.samples.last_error = reading.error

    def _ingest_sample(self, reading: Reading) -> None:
        """Power is the first that is read, so `end_s` is when power was; see `Sampler`."""
        assert isinstance(reading.value, dict)
        time_s = (reading.start_s + reading.end_s) / 2
        self.log.add(time_s, **{name: reading.value.get(name, math.nan) for name in SAMPLE_CALLS})
        integral = self.energy if isinstance(self.energy, PowerIntegral) else self.comparison
        if integral is None:
            return
        if "power_w" in reading.value:
            integral.add(time_s, reading.value["power_w"])
        elif self.power_source is not None:
            call = self.power_source.removeprefix("nvml_") + "_w"
            integral.last_error = self.errors[call].last_reason if call in self.errors else None

    def _ingest_throttle(self, reading: Reading) -> None:
        if not isinstance(reading.value, dict):
            return
        for name, curve in self.throttle.items():
            if name in reading.value:
                curve.add(reading.start_s, reading.value[name])
        if self.slow is None or self._sm_clock_max_mhz is None:
            return
        throttled_s = sum(reading.value.values())
        if self._explained_s is None:
            self._explained_s = reading.start_s, throttled_s, 0.0
        else:
            since_s, throttled_before_s, slow_s = self._explained_s
            length_s = reading.start_s - since_s
            if 0 <= length_s < THROTTLE_PERIOD_S / 2:  # a window's edge: throttle counters move in steps
                self.slow.add(reading.start_s, slow_s)
                return
            clock_mhz = self.log.mean("sm_clock_mhz", since_s, reading.start_s, reach_s=0.0)
            unexplained = throttled_s - throttled_before_s < UNEXPLAINED * length_s
            if clock_mhz is not None and clock_mhz < SLOW_CLOCK * self._sm_clock_max_mhz and unexplained:
                slow_s += length_s
            self._explained_s = reading.start_s, throttled_s, slow_s
        self.slow.add(reading.start_s, self._explained_s[2])


def _slow_curve(what: str) -> CumulativeCurve:
    return CumulativeCurve(what, THROTTLE_PERIOD_S)
