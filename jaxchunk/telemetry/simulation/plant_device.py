"""A `Device` over a `Plant`: the simulated GPU as its imperfect instruments show it."""

import math
import random
from collections.abc import Mapping
from typing import Protocol

from jaxchunk.telemetry.device import NotSupported, PowerSamples, ReadError
from jaxchunk.telemetry.simulation.plant import IDLE_BEFORE_S, Plant


class AdjustableClock(Protocol):
    """A clock that a slow call can move on, such as `simulated.ManualClock`."""

    def __call__(self) -> float:
        """The time, in s."""

    def advance(self, seconds: float) -> None:
        """Moves on."""


class PlantDevice:
    """A `Device` that reads a plant at the time of a clock, advancing the plant where it has not come so far.

    The instruments are those of the profile (`profiles.InstrumentProfile`): an energy counter that moves at
    `tick_phase_s` + k * `tick_s` and restarts from 0 at `reset_at_s`; instantaneous power renewed at
    `renewal_phase_s` + k * `renewal_s`; averaged power that lags; the SM clock; whole degrees; throttle counters.

    `failing` maps a call's name to the error that it raises, `call_time_s` to the seconds that it takes (the clock
    moves on by as much, the value is that of a random instant in between): both may be changed at any time. A call
    that fails takes its time as well. `calls` counts the calls.
    """

    def __init__(
        self,
        plant: Plant,
        clock: AdjustableClock,
        *,
        tick_phase_s: float = 0.0,
        renewal_phase_s: float = 0.0,
        reset_at_s: float = math.inf,
        failing: Mapping[str, ReadError] | None = None,
        call_time_s: Mapping[str, float] | None = None,
        seed: int = 0,
    ):
        """Looks at a plant.

        Args:
          plant: what is measured.
          clock: the time, from 0 up; the plant is never advanced beyond it.
          tick_phase_s: shifts the ticks of the energy counter.
          renewal_phase_s: shifts the renewals of instantaneous power.
          reset_at_s: when the energy counter restarts.
          failing: calls that fail.
          call_time_s: seconds by call; by default the profile's `energy_call_s` for the energy counter, else none.
          seed: of the instants within slow calls.
        """
        self.name = f"simulated {plant.profile.name}"
        self.uuid = f"GPU-simulated-{plant.profile.name.lower()}"
        self.plant = plant
        self.failing = dict(failing or {})
        self.calls: dict[str, int] = {}
        self._instruments = plant.profile.instruments
        default_call_time_s = {"total_energy_j": self._instruments.energy_call_s}
        self.call_time_s = dict(default_call_time_s if call_time_s is None else call_time_s)
        self._clock = clock
        self._tick_phase_s = tick_phase_s
        self._renewal_phase_s = renewal_phase_s
        self._reset_at_s = reset_at_s
        self._random = random.Random(seed)

    def true_energy_j(self, start_s: float, end_s: float) -> float:
        """The joules that were really drawn."""
        self._advance()
        return self.plant.true_energy_j(start_s, end_s)

    def total_energy_j(self) -> float:
        """See `Device`; whole millijoules, as NVML."""
        tick_s = _latest(self._answer("total_energy_j"), self._instruments.tick_s, self._tick_phase_s)
        origin_s = self._reset_at_s if tick_s >= self._reset_at_s else -IDLE_BEFORE_S
        return _milli(self.plant.true_energy_j(origin_s, tick_s))

    def power_instant_w(self) -> float:
        """See `Device`; whole milliwatts, as NVML."""
        time_s = self._answer("power_instant_w")
        if self._instruments.renewal_s > 0.0:
            time_s = _latest(time_s, self._instruments.renewal_s, self._renewal_phase_s)
        if self._instruments.instant_averaging_s > 0.0:
            return self._mean_power_w(time_s, self._instruments.instant_averaging_s)
        return _milli(self.plant.power_w(time_s))

    def power_average_w(self) -> float:
        """See `Device`; whole milliwatts, as NVML."""
        return self._mean_power_w(self._answer("power_average_w"), self._instruments.averaging_s)

    def power_samples_w(self) -> PowerSamples:
        """See `Device`; whole milliwatts, as NVML; the mean over the time since the sample before."""
        now_s, every_s = self._answer("power_samples_w"), self._instruments.samples_every_s
        if every_s is None:
            raise NotSupported("NVML_ERROR_NOT_SUPPORTED")
        newest = math.floor(now_s / every_s)
        oldest = max(newest - self._instruments.samples_kept, math.ceil(-IDLE_BEFORE_S / every_s)) + 1
        times_s = [n * every_s for n in range(oldest, newest + 1)]
        return PowerSamples(now_s, [(t, self._mean_power_w(t, every_s)) for t in times_s])

    def sm_clock_mhz(self) -> float:
        """See `Device`; whole MHz."""
        return float(round(self.plant.clock_mhz(self._answer("sm_clock_mhz"))))

    def temperature_c(self) -> float:
        """See `Device`; whole degrees."""
        return float(round(self.plant.temperature_c(self._answer("temperature_c"))))

    def throttle_s(self) -> dict[str, float]:
        """See `Device`."""
        return self.plant.throttle_s(self._answer("throttle_s"))

    def power_limit_w(self) -> float:
        """See `Device`."""
        self._answer("power_limit_w")
        limit_w = self.plant.profile.controller.power_limit_w
        if limit_w is None:
            raise NotSupported("NVML_ERROR_NOT_SUPPORTED")
        return limit_w

    def sm_clock_max_mhz(self) -> float:
        """See `Device`."""
        self._answer("sm_clock_max_mhz")
        return self.plant.profile.max_clock_mhz

    def describe(self) -> dict[str, object]:
        """See `Device`."""
        return {"name": self.name, "uuid": self.uuid, "simulated": True}

    def _answer(self, call: str) -> float:
        """Spends the call's time and returns the instant whose value it reads."""
        self.calls[call] = self.calls.get(call, 0) + 1
        start_s, length_s = self._clock(), self.call_time_s.get(call, 0.0)
        if length_s > 0.0:
            self._clock.advance(length_s)
        if call in self.failing:
            raise self.failing[call]
        if call in self._instruments.not_supported:
            raise NotSupported("NVML_ERROR_NOT_SUPPORTED")
        self._advance()
        return start_s + self._random.random() * length_s

    def _advance(self) -> None:
        now_s = self._clock()
        if now_s > self.plant.time_s:
            self.plant.advance_to(now_s)

    def _mean_power_w(self, end_s: float, length_s: float) -> float:
        return _milli(self.plant.true_energy_j(end_s - length_s, end_s) / length_s)


def _latest(time_s: float, period_s: float, phase_s: float) -> float:
    """The latest phase + k * period that is not after a time."""
    return math.floor((time_s - phase_s) / period_s) * period_s + phase_s


def _milli(value: float) -> float:
    return math.floor(value * 1e3) / 1e3
