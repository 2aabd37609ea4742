"""A simulated GPU as a closed loop: work decides the power, power and temperature the clock, the clock the time.

Only physics: `plant_device` reads it through imperfect instruments. No figure from it is a measurement.
"""

import math
import random
from array import array
from bisect import bisect_left
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64

from jaxchunk.errors import InputError
from jaxchunk.telemetry.simulation.profiles import GpuProfile, Kind

# The reasons for a lower clock that the plant knows, a subset of `device.THROTTLE_REASONS`. One at most is active.
PLANT_REASONS = ("sw_power_cap", "sw_thermal", "hw_power_brake")

# Power is constant over steps of at most this.
MAX_STEP_S = 1e-3
# Before time 0 the device was idle for so long, and its counters count from there.
IDLE_BEFORE_S = 100.0


@dataclass(frozen=True)
class Phase:
    """A stretch of one kind of work.

    `seconds_at_reference_clock` is how long it takes at the profile's reference clock ("idle": by the wall clock);
    `activity` scales its dynamic power: 1 for random operands, less for zeros.

    Raises:
      InputError: a negative or infinite number, or a kind that does not exist.
    """

    kind: Kind
    seconds_at_reference_clock: float
    activity: float = 1.0

    def __post_init__(self) -> None:
        """Checks the numbers."""
        if self.kind not in ("compute", "memory", "idle"):
            raise InputError(f"phase of kind {self.kind!r}, needed is compute, memory or idle")
        for label in ("seconds_at_reference_clock", "activity"):
            if not 0 <= getattr(self, label) < math.inf:
                raise InputError(f"phase with {label} {getattr(self, label)}, needed is a number from 0 up")


def chunked_iteration(
    compute_s: float, memory_s: float, num_chunks: int, *, activity: float = 1.0, overhead_s: float = 0.0
) -> list[Phase]:
    """One iteration of GEMM, softmax, GEMM in equal chunks.

    Args:
      compute_s: seconds of all GEMMs at the reference clock.
      memory_s: seconds of all softmax passes at the reference clock.
      num_chunks: how many chunks.
      activity: of all phases.
      overhead_s: idle seconds that each chunk adds.

    Raises:
      InputError: `num_chunks` is less than 1, or a time is no number from 0 up.
    """
    if num_chunks < 1:
        raise InputError(f"num_chunks is {num_chunks}, needed is at least 1")
    gemm = Phase("compute", compute_s / num_chunks / 2, activity)
    softmax = Phase("memory", memory_s / num_chunks, activity)
    overhead = [Phase("idle", overhead_s)] if overhead_s else []
    return [gemm, softmax, gemm, *overhead] * num_chunks


@dataclass(frozen=True)
class Trace:
    """What happened in each of n iterations; arrays of shape [n], exact to the integration."""

    start_s: Float64[np.ndarray, " n"]
    end_s: Float64[np.ndarray, " n"]
    energy_j: Float64[np.ndarray, " n"]
    clock_mhz: Float64[np.ndarray, " n"]  # mean over the iteration's time
    clock_std_mhz: Float64[np.ndarray, " n"]  # standard deviation over the iteration's time
    temperature_c: Float64[np.ndarray, " n"]  # at the iteration's end
    throttle_s: dict[str, Float64[np.ndarray, " n"]]  # for each of PLANT_REASONS

    @property
    def time_s(self) -> Float64[np.ndarray, " n"]:
        """Seconds that each iteration took."""
        return self.end_s - self.start_s

    @property
    def power_w(self) -> Float64[np.ndarray, " n"]:
        """Mean power of each iteration; NaN for one that took no time."""
        time_s = self.time_s
        return np.divide(self.energy_j, time_s, out=np.full_like(time_s, math.nan), where=time_s > 0)


class _Curve:
    """A quantity known at growing times, linear in between."""

    def __init__(self, value: float):
        self.times_s = array("d", [-IDLE_BEFORE_S])
        self.values = array("d", [value])

    def add(self, time_s: float, value: float) -> None:
        self.times_s.append(time_s)
        self.values.append(value)

    def at(self, time_s: float) -> float:
        k = max(bisect_left(self.times_s, time_s), 1)
        fraction = (self.times_s[k] - time_s) / (self.times_s[k] - self.times_s[k - 1])
        return self.values[k] - fraction * (self.values[k] - self.values[k - 1])

    def at_each(self, times_s: np.ndarray) -> np.ndarray:
        return np.interp(times_s, np.array(self.times_s), np.array(self.values))


class _History:
    """What a plant did, from `IDLE_BEFORE_S` before time 0 on: power step by step, the rest from change to change."""

    def __init__(self, power_w: float, temperature_c: float, clock_mhz: float):
        self.energy = _Curve(0.0)
        self.powers_w = array("d", [power_w])  # of the step that ends at each knot of `energy`
        self.temperature = _Curve(temperature_c)
        self.clock = _Curve(0.0)  # integrals over time, in MHz s and MHz^2 s
        self.clock_squared = _Curve(0.0)
        self.clocks_mhz = array("d", [clock_mhz])  # of the interval that ends at each knot of `clock`
        self.throttle = {reason: _Curve(0.0) for reason in PLANT_REASONS}
        self.add_step(0.0, power_w * IDLE_BEFORE_S, power_w)
        self.add_interval(0.0, temperature_c, clock_mhz, None)

    def add_step(self, end_s: float, energy_j: float, power_w: float) -> None:
        self.energy.add(end_s, energy_j)
        self.powers_w.append(power_w)

    def add_interval(self, end_s: float, temperature_c: float, clock_mhz: float, reason: str | None) -> None:
        """Adds the time since the last interval, through which the clock and the reason were the same."""
        length_s = end_s - self.clock.times_s[-1]
        if length_s <= 0.0:
            return
        self.temperature.add(end_s, temperature_c)
        self.clock.add(end_s, self.clock.values[-1] + clock_mhz * length_s)
        self.clock_squared.add(end_s, self.clock_squared.values[-1] + clock_mhz**2 * length_s)
        self.clocks_mhz.append(clock_mhz)
        for name, curve in self.throttle.items():
            curve.add(end_s, curve.values[-1] + (length_s if name == reason else 0.0))

    def trace(self, edges_s: np.ndarray) -> Trace:
        """The trace of the iterations between neighbouring edges."""
        start_s, end_s = edges_s[:-1], edges_s[1:]
        time_s = np.where(end_s > start_s, end_s - start_s, math.nan)
        mean_mhz = np.diff(self.clock.at_each(edges_s)) / time_s
        variance = np.diff(self.clock_squared.at_each(edges_s)) / time_s - mean_mhz**2
        return Trace(
            start_s=start_s,
            end_s=end_s,
            energy_j=np.diff(self.energy.at_each(edges_s)),
            clock_mhz=mean_mhz,
            clock_std_mhz=np.sqrt(np.maximum(variance, 0.0)),
            temperature_c=self.temperature.at_each(end_s),
            throttle_s={reason: np.diff(curve.at_each(edges_s)) for reason, curve in self.throttle.items()},
        )


class Plant:
    """A GPU that works off phases, integrated over steps of at most `MAX_STEP_S`; deterministic for a seed.

    Two ways of use. Offline: `run(iterations)` goes through a schedule as fast as possible and returns a `Trace`.
    Online: `submit(phases)` queues work (an endless iterator may be given), and `advance_to(time_s)` moves time on;
    without work it is idle. Everything since `IDLE_BEFORE_S` before time 0 can be asked for afterwards: a minute takes
    about 2 MB. The seed decides when the controller's periods begin and how each phase's activity deviates.
    """

    def __init__(
        self,
        profile: GpuProfile,
        *,
        ambient_c: float = 25.0,
        start_temperature_c: float | None = None,
        seed: int = 0,
    ):
        """Starts idle at time 0, at the maximum clock.

        Args:
          profile: the device.
          ambient_c: temperature of the air, in degrees Celsius.
          start_temperature_c: of the die at time 0; by default where an idle device stays.
          seed: of everything random.
        """
        self.profile = profile
        self.ambient_c = ambient_c
        self._random = random.Random(seed)
        self._time_s = 0.0
        self._work: deque[Iterator[Phase]] = deque()
        self._kind: Kind = "idle"
        self._activity = self._peak_activity = 0.0
        self._remaining_s = 0.0  # of the current phase, at the reference clock
        self._temperature_c = profile.idle_steady_c(ambient_c) if start_temperature_c is None else start_temperature_c
        self._power_w = self._peak_w = profile.idle_power_w(self._temperature_c)
        self._clock_mhz = profile.max_clock_mhz
        self._pinned = False
        self._reason: str | None = None
        self._next_control_s = (1.0 - self._random.random()) * profile.controller.period_s
        self._brake_ready_s = 0.0
        self._rates: dict[tuple[Kind, float], tuple[float, float]] = {}
        self._history = _History(self._power_w, self._temperature_c, self._clock_mhz)

    @property
    def time_s(self) -> float:
        """How far the plant has been advanced."""
        return self._time_s

    def submit(self, phases: Iterable[Phase]) -> None:
        """Queues work behind what is queued; a phase is taken from the iterable only when its turn comes."""
        self._work.append(iter(phases))

    def run(self, iterations: Iterable[Iterable[Phase]]) -> Trace:
        """Does iterations one after the other, from now until the last is done.

        Raises:
          InputError: work is still queued.
        """
        if self._take_phase():
            raise InputError("run was called with work still queued, needed is an idle plant")
        edges_s = [self._time_s]
        for phases in iterations:
            self._work.append(iter(phases))
            self._integrate(math.inf)
            edges_s.append(self._time_s)
        self._end_interval()
        return self._history.trace(np.array(edges_s))

    def advance_to(self, time_s: float) -> None:
        """Moves time on to `time_s`, working on what is queued and idle after that.

        Raises:
          InputError: `time_s` is infinite or has passed.
        """
        if not self._time_s <= time_s < math.inf:
            raise InputError(f"advance to {time_s} s at {self._time_s} s, needed is a time from there on")
        self._integrate(time_s)
        self._end_interval()

    def pin_clock(self, clock_mhz: float | None) -> None:
        """A fault: from now on the clock stays at `clock_mhz` and no reason accrues. None ends it.

        Raises:
          InputError: a clock that the profile does not have.
        """
        low_mhz, high_mhz = self.profile.min_clock_mhz, self.profile.max_clock_mhz
        if clock_mhz is not None and not low_mhz <= clock_mhz <= high_mhz:
            raise InputError(f"clock pinned at {clock_mhz} MHz, needed is {low_mhz} to {high_mhz}")
        self._pinned = clock_mhz is not None
        self._set_clock(self._clock_mhz if clock_mhz is None else clock_mhz, None)

    def true_energy_j(self, start_s: float, end_s: float) -> float:
        """The joules drawn between two times."""
        return self._history.energy.at(self._known(end_s)) - self._history.energy.at(self._known(start_s))

    def power_w(self, time_s: float) -> float:
        """Power in the step that contains, or ends at, a time."""
        return self._history.powers_w[bisect_left(self._history.energy.times_s, self._known(time_s))]

    def clock_mhz(self, time_s: float) -> float:
        """The SM clock at a time; where it changes, the one before."""
        return self._history.clocks_mhz[bisect_left(self._history.clock.times_s, self._known(time_s))]

    def temperature_c(self, time_s: float) -> float:
        """The temperature of the die at a time, in degrees Celsius."""
        return self._history.temperature.at(self._known(time_s))

    def throttle_s(self, time_s: float) -> dict[str, float]:
        """Seconds in each of `PLANT_REASONS` until a time."""
        self._known(time_s)
        return {reason: curve.at(time_s) for reason, curve in self._history.throttle.items()}

    def _known(self, time_s: float) -> float:
        if not -IDLE_BEFORE_S <= time_s <= self._time_s:
            raise InputError(f"asked about {time_s} s, known is {-IDLE_BEFORE_S} s to {self._time_s} s")
        return time_s

    def _take_phase(self) -> bool:
        """Makes the next phase with work in it the current one; False where there is none."""
        while self._remaining_s <= 0.0:
            if not self._work:
                return False
            phase = next(self._work[0], None)
            if phase is None:
                self._work.popleft()
                continue
            noise = self.profile.activity_noise
            self._kind, self._remaining_s = phase.kind, phase.seconds_at_reference_clock
            deviation = max(self._random.gauss(1.0, noise), 0.0) if noise else 1.0
            self._activity = phase.activity * deviation
            self._peak_activity = deviation if self.profile.controller.peak_counts_events else self._activity
        return True

    def _integrate(self, until_s: float) -> None:
        """To `until_s`, or where that is infinite until no work is left."""
        while self._time_s < until_s:
            working = self._take_phase()
            if not working and until_s == math.inf:
                return
            start_s, end_s = self._time_s, min(until_s, self._next_control_s)
            rate, dynamic_w = self._rate_and_power(self._kind if working else "idle")
            last = working and self._remaining_s <= rate * (end_s - start_s)
            if last:
                end_s = start_s + self._remaining_s / rate
            braked = self._steps(end_s, dynamic_w * self._activity, dynamic_w * self._peak_activity)
            if working:
                finished = last and self._time_s == end_s
                self._remaining_s = 0.0 if finished else self._remaining_s - rate * (self._time_s - start_s)
            if braked:
                self._brake()
            if self._time_s >= self._next_control_s:
                self._control()

    def _rate_and_power(self, kind: Kind) -> tuple[float, float]:
        """Progress rate and dynamic power (W, activity 1) at the clock of now."""
        key = kind, self._clock_mhz
        if key not in self._rates:
            profile = self.profile
            self._rates[key] = profile.progress_rate(*key), profile.dynamic_power_w(*key)
        return self._rates[key]

    def _steps(self, end_s: float, dynamic_w: float, seen_w: float) -> bool:
        """Integrates at one clock to `end_s`; True where the peak limit was exceeded, and maybe before `end_s`.

        `seen_w` is the dynamic power as the brake sees it.
        """
        profile, controller, thermal = self.profile, self.profile.controller, self.profile.thermal
        peak_limit_w = math.inf if controller.peak_limit_w is None or self._pinned else controller.peak_limit_w
        start_s, length_s = self._time_s, end_s - self._time_s
        count = max(math.ceil(length_s / MAX_STEP_S - 1e-6), 1)
        step_s = length_s / count
        # Implicit steps of the first-order lags: stable for any length, and exact without a lag.
        lag = step_s / (profile.electrical_lag_s + step_s) if step_s > 0.0 else 0.0
        peak_lag = step_s / (controller.peak_averaging_s + step_s)
        cooling = step_s / thermal.time_constant_s
        leakage, at_zero_w = profile.leakage_w_per_c, profile.idle_power_w(0.0) + dynamic_w
        ambient_c, resistance = self.ambient_c, thermal.resistance_c_per_w
        unseen_w = dynamic_w - seen_w
        power_w, peak_w, temperature_c = self._power_w, self._peak_w, self._temperature_c
        energy_j, add_step = self._history.energy.values[-1], self._history.add_step
        time_s, braked = start_s, False
        for i in range(1, count + 1):
            power_w += lag * (at_zero_w + leakage * temperature_c - power_w)
            energy_j += power_w * step_s
            temperature_c += cooling * (resistance * power_w - (temperature_c - ambient_c))
            peak_w += peak_lag * (power_w - unseen_w - peak_w)
            time_s = end_s if i == count else start_s + i * step_s
            add_step(time_s, energy_j, power_w)
            if peak_w > peak_limit_w and time_s >= self._brake_ready_s:
                braked = True
                break
        self._time_s, self._power_w, self._peak_w, self._temperature_c = time_s, power_w, peak_w, temperature_c
        return braked

    def _brake(self) -> None:
        controller = self.profile.controller
        self._brake_ready_s = self._time_s + controller.brake_holdoff_s
        self._set_clock(self._clock_mhz * (1.0 - controller.brake_fraction), "hw_power_brake")

    def _control(self) -> None:
        """One period of the controller, as `ControllerProfile` says."""
        controller = self.profile.controller
        self._next_control_s += controller.period_s
        if self._pinned:
            self._end_interval()  # between two ends the temperature is taken to be linear
            return
        start_s = self._time_s - controller.averaging_s
        mean_w = self.true_energy_j(start_s, self._time_s) / controller.averaging_s
        limit_w = math.inf if controller.power_limit_w is None else controller.power_limit_w
        excess_w, excess_c = mean_w - limit_w, self._temperature_c - controller.throttle_c
        power_down = controller.power_gain_mhz_per_w * excess_w if excess_w > 0.0 else 0.0
        thermal_down = controller.thermal_gain_mhz_per_c * excess_c if excess_c > 0.0 else 0.0
        clock_mhz, reason = self._clock_mhz, self._reason
        if power_down or thermal_down:
            step_mhz = self.profile.clock_step_mhz
            down_mhz = math.ceil(max(power_down, thermal_down) / step_mhz) * step_mhz
            clock_mhz -= min(down_mhz, controller.max_down_mhz)
            reason = "sw_thermal" if thermal_down > power_down else "sw_power_cap"
        elif excess_w < -controller.power_margin_w and excess_c < -controller.thermal_margin_c:
            clock_mhz += controller.up_mhz
        load_w = max(mean_w - self.profile.idle_power_w(self._temperature_c), 0.0)
        droop_mhz = controller.droop_mhz_per_w * load_w
        # To the nearest step: a device that cools without work shall not droop.
        ceiling_mhz = self._on_grid(self.profile.max_clock_mhz - droop_mhz + self.profile.clock_step_mhz / 2)
        self._set_clock(min(clock_mhz, ceiling_mhz), reason if clock_mhz < ceiling_mhz else None)

    def _set_clock(self, clock_mhz: float, reason: str | None) -> None:
        self._end_interval()
        self._clock_mhz = clock_mhz if self._pinned else self._on_grid(clock_mhz)
        self._reason = reason

    def _on_grid(self, clock_mhz: float) -> float:
        """The highest possible clock that is not above: whole steps below the maximum, never below the minimum."""
        highest_mhz, step_mhz = self.profile.max_clock_mhz, self.profile.clock_step_mhz
        steps = max(math.ceil((highest_mhz - clock_mhz) / step_mhz - 1e-6), 0)
        return max(highest_mhz - steps * step_mhz, self.profile.min_clock_mhz)

    def _end_interval(self) -> None:
        self._history.add_interval(self._time_s, self._temperature_c, self._clock_mhz, self._reason)
