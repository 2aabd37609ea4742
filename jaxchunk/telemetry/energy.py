"""Energy over time with an honest bound: from a counter that ticks, or from samples of power."""

import math
from array import array
from bisect import bisect_left
from collections import deque
from collections.abc import Callable

import numpy as np

from jaxchunk.telemetry.curve import CumulativeCurve, Difference, unknown

# Smallest and largest power seen between two times, in W; None where there was no sample.
PowerRange = Callable[[float, float], tuple[float, float] | None]


def no_power_samples(start_s: float, end_s: float) -> None:
    """The `PowerRange` of a device whose instantaneous power cannot be read."""


class CounterCurve(CumulativeCurve):
    """Joules from a counter that moves in ticks, with a knot at every tick.

    A poll that sees a new value, after one that still saw the old value, puts the tick between the two: the
    knot's time is the middle and its uncertainty u half the distance (about half a poll period). The length of
    a tick is whatever it turns out to be; of ticks closer than `MIN_INTERVAL` times their uncertainties only
    some become knots, because the power between two such knots would be mostly error.

    Between knots the energy is interpolated linearly. The bound at a time t, at fraction a of an interval of
    length tau that holds dE joules, is the sum of

    - ((1 - a) * u_k + a * u_k+1) * P_max: the ticks were up to u away from where they were put. P_max is the
      larger of P_hi and of dE / (tau - u_k - u_k+1), the largest mean power these ticks allow;
    - (P_hi - P_lo) * a * (1 - a) * tau: the furthest that a power between P_lo and P_hi can bend the curve away
      from the straight line. P_lo and P_hi are the extremes of the mean powers of this interval and its two
      neighbours, and of the instantaneous power samples in them.

    What is assumed: the counter is exact at its ticks (a constant delay is not seen, and matters only where the
    power at both ends of a window differs), and P_lo..P_hi spans the power in the interval. Without instantaneous
    samples a power that swings within a tick, with equal means from tick to tick, is not bounded by this.

    A window is the difference of two such values and its bound the sum of theirs, plus the counter's resolution.
    """

    MIN_INTERVAL = 5.0
    LEARNING_TICKS = 6
    STALL_S = 3.0  # a counter that answers but has not moved for so long is not waited for

    def __init__(self, period_s: float, *, power_range: PowerRange = no_power_samples, resolution_j: float = 1e-3):
        super().__init__("the energy counter", period_s)
        self._power_range = power_range
        self._resolution_j = resolution_j
        self._uncertainty_s = array("d")
        self._last_value: float | None = None
        self._last_start_s = 0.0
        self._moved_s: float | None = None
        self._tick_seen_s = (-math.inf, math.inf)  # the latest tick was between these two times
        self._quiet_s: deque[float] = deque(maxlen=self.LEARNING_TICKS)  # seconds surely without a tick, before each

    def add_reading(self, start_s: float, end_s: float, energy_j: float) -> None:
        """Adds a poll: the read began at `start_s` and was over at `end_s`."""
        self._note_reading(start_s, end_s)
        previous_j, previous_start_s = self._last_value, self._last_start_s
        self._last_value, self._last_start_s = energy_j, start_s
        if energy_j != previous_j:
            self._moved_s = end_s
        if previous_j is None:
            return  # when this value was reached is not known
        if energy_j < previous_j:
            self._add_break(previous_start_s, end_s, f"{self.what} went backwards (reset or driver reload)")
        elif energy_j > previous_j:
            self._quiet_s.append(max(previous_start_s - self._tick_seen_s[1], 0.0))
            self._tick_seen_s = previous_start_s, end_s
            self._add_tick((previous_start_s + end_s) / 2, (end_s - previous_start_s) / 2, energy_j)

    def add(self, time_s: float, value: float) -> None:
        """Adds a poll that took no time."""
        self.add_reading(time_s, time_s, value)

    def difference(self, start_s: float, end_s: float) -> Difference:
        """Joules from `start_s` to `end_s`, with the bound of the class's docstring."""
        missing = self._missing(start_s, end_s)
        if missing is not None:
            return missing
        energy_j = self._value_at(end_s) - self._value_at(start_s)
        return Difference(energy_j, self._bound_j(start_s) + self._bound_j(end_s) + 2 * self._resolution_j)

    def settled(self, end_s: float) -> bool:
        """True one tick later than the curve reaches `end_s`: the bound looks at the neighbour as well."""
        return len(self._times_s) >= 2 and self._times_s[-2] >= end_s

    def outage(self, now_s: float) -> bool:
        """As for any curve, and also where the counter answers but stands still."""
        return super().outage(now_s) or self._stalled(now_s)

    def outage_reason(self, now_s: float) -> str:
        """What to say of a window in an outage that has not ended."""
        if super().outage(now_s) or self._moved_s is None:
            return super().outage_reason(now_s)
        return f"{self.what} has not moved for {now_s - self._moved_s:.1f} s"

    def _stalled(self, now_s: float) -> bool:
        return self._moved_s is not None and now_s - self._moved_s > self.STALL_S

    def earliest_next_tick_s(self) -> float:
        """Before this time no tick is expected: after each of the latest ticks, it was quiet for longer than this.

        -inf while that is not known. A tick that came sooner than expected was seen with no quiet time before it, so
        polling turns dense at once and stays so for the next `LEARNING_TICKS`.
        """
        if len(self._quiet_s) < self.LEARNING_TICKS:
            return -math.inf
        return self._tick_seen_s[0] + min(self._quiet_s)

    def _add_tick(self, time_s: float, uncertainty_s: float, energy_j: float) -> None:
        if self._times_s:
            surely_apart_s = self.MIN_INTERVAL * (self._uncertainty_s[-1] + uncertainty_s)
            if time_s - self._times_s[-1] <= surely_apart_s:
                return  # a fast counter, or a tick that a gap hides
        self._append(time_s, energy_j)
        self._uncertainty_s.append(uncertainty_s)

    def _drop(self, count: int) -> None:
        super()._drop(count)
        del self._uncertainty_s[:count]

    def _bound_j(self, time_s: float) -> float:
        k = self._interval(time_s)
        tau_s = self._times_s[k + 1] - self._times_s[k]
        a = (time_s - self._times_s[k]) / tau_s
        u0_s, u1_s = self._uncertainty_s[k], self._uncertainty_s[k + 1]
        lowest_w, highest_w = self._power_near(k)
        largest_mean_w = (self._values[k + 1] - self._values[k]) / (tau_s - u0_s - u1_s)
        power_w = max(highest_w, largest_mean_w)
        return power_w * ((1 - a) * u0_s + a * u1_s) + (highest_w - lowest_w) * a * (1 - a) * tau_s

    def _power_near(self, k: int) -> tuple[float, float]:
        """Smallest and largest power (W) in interval k and its neighbours."""
        first = last = k
        if k > 0 and not self._broken(self._times_s[k - 1], self._times_s[k]):
            first = k - 1
        if k + 2 < len(self._times_s) and not self._broken(self._times_s[k + 1], self._times_s[k + 2]):
            last = k + 1
        powers_w = [
            (self._values[i + 1] - self._values[i]) / (self._times_s[i + 1] - self._times_s[i])
            for i in range(first, last + 1)
        ]
        powers_w.extend(self._power_range(self._times_s[first], self._times_s[last + 1]) or ())
        return min(powers_w), max(powers_w)


class PowerIntegral(CumulativeCurve):
    """Joules by the trapezoidal rule from samples of power, with a knot at every sample.

    Between two samples the power is taken to be linear. The bound of a window is the larger of

    - the sum of |dP| * dt / 2 over the intervals that it touches: the most a power can matter that stays between
      the two samples around it;
    - `SIGMAS` * s * sqrt(sum of dt^2), s^2 half the mean squared step between neighbours among the samples of the
      window and `CONTEXT_SAMPLES` on each side: the error of an integral over a power that swings faster than
      the samples. For this the samples must be taken at random times, or they can be in step with the swing: the
      sampler adds jitter.

    plus the resolution of the power reading times the window's length. Each is what the samples show: a swing
    that none of them caught is not bounded.

    Power that the device has averaged over the last `averaging_s` is late at both ends, and hides swings. A window
    shorter than the average has no value; a longer one has `averaging_s` * r more bound, r the range of the samples
    from one averaging time before the window to one after it, or `HIDDEN_SWING` of the window's mean power where
    that is more (a power that swings by +-40% every 80 ms needs less).
    """

    SIGMAS = 3.0
    CONTEXT_SAMPLES = 16
    HIDDEN_SWING = 0.02

    def __init__(self, period_s: float, *, averaging_s: float = 0.0, resolution_w: float = 1e-3):
        super().__init__("the power reading", period_s)
        self._averaging_s = averaging_s
        self._resolution_w = resolution_w
        self._powers_w = array("d")

    def add(self, time_s: float, value: float) -> None:
        """Adds a sample: `value` W at `time_s`."""
        energy_j = 0.0
        continuous = self._note_reading(time_s, time_s)
        if self._times_s and time_s <= self._times_s[-1]:
            return  # a clock too coarse to tell the two apart
        if self._times_s:
            energy_j = self._values[-1]
            if continuous:
                energy_j += (value + self._powers_w[-1]) / 2 * (time_s - self._times_s[-1])
        self._append(time_s, energy_j)
        self._powers_w.append(value)

    def difference(self, start_s: float, end_s: float) -> Difference:
        """Joules from `start_s` to `end_s`, with the bound of the class's docstring."""
        missing = self._missing(start_s, end_s)
        if missing is not None:
            return missing
        if end_s - start_s < self._averaging_s:
            return unknown(
                f"the window of {end_s - start_s:.3f} s is shorter than the {self._averaging_s:g} s over which "
                "the device averages its power"
            )
        energy_j = self._value_at(end_s) - self._value_at(start_s)
        bound_j = self._bound_j(start_s, end_s)
        if self._averaging_s > 0:
            bound_j += self._averaging_bound_j(start_s, end_s, energy_j / (end_s - start_s))
        return Difference(energy_j, bound_j)

    def _drop(self, count: int) -> None:
        count -= self.CONTEXT_SAMPLES
        if count > 0:
            super()._drop(count)
            del self._powers_w[:count]

    def _bound_j(self, start_s: float, end_s: float) -> float:
        first, last = self._interval(start_s), bisect_left(self._times_s, end_s)
        lengths_s = np.diff(np.array(self._times_s[first : last + 1]))
        steps_w = np.diff(np.array(self._powers_w[first : last + 1]))
        seen_j = float(np.sum(np.abs(steps_w) * lengths_s)) / 2
        around = slice(max(first - self.CONTEXT_SAMPLES, 0), last + 1 + self.CONTEXT_SAMPLES)
        spread_w = math.sqrt(float(np.mean(np.diff(np.array(self._powers_w[around])) ** 2)) / 2)
        unseen_j = self.SIGMAS * spread_w * math.sqrt(float(np.sum(lengths_s**2)))
        return max(seen_j, unseen_j) + self._resolution_w * (end_s - start_s)

    def _averaging_bound_j(self, start_s: float, end_s: float, power_w: float) -> float:
        first = bisect_left(self._times_s, start_s - self._averaging_s)
        last = bisect_left(self._times_s, end_s + self._averaging_s)
        near_w = self._powers_w[first : last + 1]
        return self._averaging_s * max(max(near_w) - min(near_w), self.HIDDEN_SWING * power_w)

    def _value_at(self, time_s: float) -> float:
        k = self._interval(time_s)
        length_s = self._times_s[k + 1] - self._times_s[k]
        elapsed_s = time_s - self._times_s[k]
        slope = (self._powers_w[k + 1] - self._powers_w[k]) / length_s
        return self._values[k] + elapsed_s * (self._powers_w[k] + slope * elapsed_s / 2)
