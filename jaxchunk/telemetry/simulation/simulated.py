"""A simulated GPU: a power profile whose true joules are known, seen through imperfect instruments.

For tests of everything that is made of readings. No figure from it is a measurement of any device.
"""

import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from jaxchunk.telemetry.device import NotSupported, PowerSamples, ReadError


class PowerProfile(Protocol):
    """Power over time with its exact integral."""

    def power_w(self, time_s: float) -> float:
        """Power at a time."""

    def energy_j(self, time_s: float) -> float:
        """Joules from time 0."""


@dataclass(frozen=True)
class Constant:
    """The same power always."""

    level_w: float

    def power_w(self, time_s: float) -> float:
        """See `PowerProfile`."""
        return self.level_w

    def energy_j(self, time_s: float) -> float:
        """See `PowerProfile`."""
        return self.level_w * time_s


@dataclass(frozen=True)
class SquareWave:
    """`high_w` for the first `duty` of every period and `low_w` for the rest."""

    high_w: float
    low_w: float
    period_s: float
    phase_s: float = 0.0
    duty: float = 0.5

    def power_w(self, time_s: float) -> float:
        """See `PowerProfile`."""
        fraction = ((time_s + self.phase_s) / self.period_s) % 1.0
        return self.high_w if fraction < self.duty else self.low_w

    def energy_j(self, time_s: float) -> float:
        """See `PowerProfile`."""
        return self._from_phase_zero_j(time_s + self.phase_s) - self._from_phase_zero_j(self.phase_s)

    def _from_phase_zero_j(self, time_s: float) -> float:
        periods, fraction = divmod(time_s / self.period_s, 1.0)
        high = periods * self.duty + min(fraction, self.duty)
        low = periods * (1.0 - self.duty) + max(fraction - self.duty, 0.0)
        return (high * self.high_w + low * self.low_w) * self.period_s


@dataclass(frozen=True)
class Ramp:
    """From `from_w` at `start_s` linearly to `to_w` at `end_s`, constant before and after."""

    from_w: float
    to_w: float
    start_s: float
    end_s: float

    def power_w(self, time_s: float) -> float:
        """See `PowerProfile`."""
        fraction = (time_s - self.start_s) / (self.end_s - self.start_s)
        return self.from_w + (self.to_w - self.from_w) * min(max(fraction, 0.0), 1.0)

    def energy_j(self, time_s: float) -> float:
        """See `PowerProfile`."""
        inside_s = min(max(time_s - self.start_s, 0.0), self.end_s - self.start_s)
        slope = (self.to_w - self.from_w) / (self.end_s - self.start_s)
        after_s = max(time_s - self.end_s, 0.0)
        return self.from_w * time_s + slope * inside_s**2 / 2 + (self.to_w - self.from_w) * after_s


class ManualClock:
    """A clock that moves only when told to."""

    def __init__(self, time_s: float = 0.0):
        self.time_s = time_s

    def __call__(self) -> float:
        """The time, in s."""
        return self.time_s

    def advance(self, seconds: float) -> None:
        """Moves on."""
        self.time_s += seconds


class SimulatedDevice:
    """A `Device` over a `PowerProfile`; it is idle (`profile.power_w(0)`) before time 0.

    Its instruments: an energy counter that moves every `tick_s` (shifted by `tick_phase_s`) and restarts from 0
    at `reset_at_s`; exact instantaneous power; power averaged over the last `averaging_s`; where `samples_every_s` is
    given, `SAMPLES_KEPT` samples of its own, each the mean over the last `sample_mean_s` (0: at that instant), by a
    clock that is `samples_clock_s` ahead; throttle time that accrues at `throttle_rates` seconds a second. `failing`
    maps a call's name to the error that it raises, and may be changed at any time; `calls` counts the calls.
    """

    SAMPLES_KEPT = 120

    def __init__(
        self,
        profile: PowerProfile,
        clock: ManualClock,
        *,
        tick_s: float = 0.1,
        tick_phase_s: float = 0.0,
        averaging_s: float = 1.0,
        samples_every_s: float | None = None,
        sample_mean_s: float = 0.0,
        samples_clock_s: float = 1e9,
        reset_at_s: float = math.inf,
        throttle_rates: Mapping[str, float] | None = None,
        failing: Mapping[str, ReadError] | None = None,
    ):
        self.name = "simulated GPU"
        self.uuid = "GPU-simulated"
        self.profile = profile
        self.failing = dict(failing or {})
        self.calls: dict[str, int] = {}
        self._clock = clock
        self._tick_s = tick_s
        self._tick_phase_s = tick_phase_s
        self._averaging_s = averaging_s
        self._samples_every_s = samples_every_s
        self._sample_mean_s = sample_mean_s
        self.samples_clock_s = samples_clock_s
        self._reset_at_s = reset_at_s
        self._throttle_rates = dict(throttle_rates or {"sw_power_cap": 0.0, "sw_thermal": 0.0})

    def true_energy_j(self, start_s: float, end_s: float) -> float:
        """The joules that were really drawn."""
        return self._energy_j(end_s) - self._energy_j(start_s)

    def total_energy_j(self) -> float:
        """See `Device`; whole millijoules, as NVML."""
        self._answer("total_energy_j")
        ticks = math.floor((self._clock() - self._tick_phase_s) / self._tick_s)
        tick_s = ticks * self._tick_s + self._tick_phase_s
        origin_s = self._reset_at_s if tick_s >= self._reset_at_s else -100.0
        return math.floor(self.true_energy_j(origin_s, tick_s) * 1e3) / 1e3

    def power_instant_w(self) -> float:
        """See `Device`."""
        self._answer("power_instant_w")
        return self.profile.power_w(self._clock())

    def power_average_w(self) -> float:
        """See `Device`."""
        self._answer("power_average_w")
        now_s = self._clock()
        return self.true_energy_j(now_s - self._averaging_s, now_s) / self._averaging_s

    def power_samples_w(self) -> PowerSamples:
        """See `Device`; whole milliwatts, as NVML."""
        self._answer("power_samples_w")
        if self._samples_every_s is None:
            raise NotSupported("NVML_ERROR_NOT_SUPPORTED")
        newest = math.floor(self._clock() / self._samples_every_s)
        times_s = [n * self._samples_every_s for n in range(newest - self.SAMPLES_KEPT + 1, newest + 1)]
        return PowerSamples(
            self._clock() + self.samples_clock_s,
            [(t + self.samples_clock_s, math.floor(self._sample_w(t) * 1e3) / 1e3) for t in times_s],
        )

    def sm_clock_mhz(self) -> float:
        """See `Device`."""
        self._answer("sm_clock_mhz")
        return 1500.0

    def temperature_c(self) -> float:
        """See `Device`."""
        self._answer("temperature_c")
        return 60.0

    def throttle_s(self) -> dict[str, float]:
        """See `Device`."""
        self._answer("throttle_s")
        return {reason: rate * (self._clock() + 100.0) for reason, rate in self._throttle_rates.items()}

    def power_limit_w(self) -> float:
        """See `Device`."""
        self._answer("power_limit_w")
        return 700.0

    def sm_clock_max_mhz(self) -> float:
        """See `Device`."""
        self._answer("sm_clock_max_mhz")
        return 1800.0

    def describe(self) -> dict[str, object]:
        """See `Device`."""
        return {"name": self.name, "uuid": self.uuid, "simulated": True}

    def _sample_w(self, time_s: float) -> float:
        mean_s = self._sample_mean_s
        if mean_s > 0.0:
            return self.true_energy_j(time_s - mean_s, time_s) / mean_s
        return self.profile.power_w(max(time_s, 0.0))

    def _answer(self, call: str) -> None:
        self.calls[call] = self.calls.get(call, 0) + 1
        if call in self.failing:
            raise self.failing[call]

    def _energy_j(self, time_s: float) -> float:
        return self.profile.energy_j(time_s) if time_s >= 0 else self.profile.power_w(0.0) * time_s


def make_counter_dear(
    device: SimulatedDevice, clock: ManualClock, cpu: ManualClock, cost_s: float, generator: random.Random
) -> list[float]:
    """Lets every reading of the counter take `cost_s` of processor time and 0.4 to 1.8 times that of wall time.

    Returns:
      The times at which readings were over, as they come.
    """
    answer, over_s = device.total_energy_j, list[float]()

    def dear_answer() -> float:
        cpu.advance(cost_s)
        clock.advance(cost_s * generator.uniform(0.2, 0.9))
        try:
            return answer()
        finally:
            clock.advance(cost_s * generator.uniform(0.2, 0.9))
            over_s.append(clock())

    device.total_energy_j = dear_answer  # type: ignore[method-assign]
    return over_s


def drive(
    poll_once: Callable[[], float], clock: ManualClock, until_s: float, *, lateness_s: float = 0.0, seed: int = 0
) -> None:
    """Runs a `Sampler.poll_once` on a manual clock, waking up to `lateness_s` late, at random."""
    generator = random.Random(seed)
    while clock() < until_s:
        clock.advance(max(poll_once(), 1e-4) + generator.random() * lateness_s)
