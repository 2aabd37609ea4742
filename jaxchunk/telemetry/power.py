"""Energy over time with an honest bound, from samples of power."""

import math
from array import array
from bisect import bisect_left
from collections import deque

import numpy as np

from jaxchunk.telemetry.curve import CumulativeCurve, Difference, unknown


class PowerCurve(CumulativeCurve):
    """Joules by the trapezoidal rule, with a knot (time, power, uncertainty u of the time) for each sample of power.

    Between two knots the power is taken to be linear. The bound of a window is the larger of

    - the sum of |dP| * (dt / 2 + u) over the intervals that it touches: the most a power can matter that stays
      between the two values around it;
    - `SIGMAS` * s * sqrt(sum of dt^2), s^2 half the mean squared step between neighbours among the knots of the
      window and `CONTEXT_SAMPLES` on each side: the error of an integral over a power that swings faster than
      the samples. For this the samples must be taken at random times, or they can be in step with the swing;

    plus the resolution of the power reading times the window's length. Each is what the samples show: a swing that none
    of them caught is not bounded.
    """

    SIGMAS = 3.0
    CONTEXT_SAMPLES = 16
    RESOLUTION_W = 1e-3  # NVML counts milliwatts

    def __init__(self, what: str, period_s: float):
        super().__init__(what, period_s)
        self._powers_w = array("d")
        self._uncertainty_s = array("d")

    def _add_knot(self, time_s: float, power_w: float, uncertainty_s: float, *, continuous: bool) -> None:
        energy_j = 0.0
        if self._times_s:
            energy_j = self._values[-1]
            if continuous:
                energy_j += (power_w + self._powers_w[-1]) / 2 * (time_s - self._times_s[-1])
        self._append(time_s, energy_j)
        self._powers_w.append(power_w)
        self._uncertainty_s.append(uncertainty_s)

    def _drop(self, count: int) -> None:
        count -= self.CONTEXT_SAMPLES
        if count > 0:
            super()._drop(count)
            del self._powers_w[:count]
            del self._uncertainty_s[:count]

    def _bound_j(self, start_s: float, end_s: float, stands_for_s: float) -> float:
        """The class's bound, and `stands_for_s` times the range: which part of so long a time a value stands for."""
        first, last = self._interval(start_s), bisect_left(self._times_s, end_s)
        lengths_s = np.diff(np.array(self._times_s[first : last + 1]))
        steps_w = np.diff(np.array(self._powers_w[first : last + 1]))
        uncertainty_s = np.maximum(*(np.array(self._uncertainty_s[f : f + len(steps_w)]) for f in (first, first + 1)))
        seen_j = float(np.sum(np.abs(steps_w) * (lengths_s / 2 + uncertainty_s)))
        around = slice(max(first - self.CONTEXT_SAMPLES, 0), last + 1 + self.CONTEXT_SAMPLES)
        near_w = self._powers_w[max(first - 1, 0) : last + 2]
        seen_late_j = stands_for_s * (max(near_w) - min(near_w))
        spread_w = math.sqrt(float(np.mean(np.diff(np.array(self._powers_w[around])) ** 2)) / 2)
        unseen_j = self.SIGMAS * spread_w * math.sqrt(float(np.sum(lengths_s**2)))
        return max(seen_j, unseen_j) + seen_late_j + self.RESOLUTION_W * (end_s - start_s)

    def _value_at(self, time_s: float) -> float:
        k = self._interval(time_s)
        length_s = self._times_s[k + 1] - self._times_s[k]
        elapsed_s = time_s - self._times_s[k]
        slope = (self._powers_w[k + 1] - self._powers_w[k]) / length_s
        return self._values[k] + elapsed_s * (self._powers_w[k] + slope * elapsed_s / 2)


class PowerIntegral(PowerCurve):
    """Joules by the trapezoidal rule from samples of power, with a knot at every new value.

    Many devices renew their power less often than it is read (an H200 every 100 ms). A repeated value is no new
    sample: a knot is where the value changes, between the last sample of the old value and the first of the new, and
    its uncertainty u half the distance between those. Only after a value has been the same for `HOLD` renewals, and
    `HOLD_S`, is it taken for a steady power and becomes a knot again.

    The bound is that of `PowerCurve`, for which the sampler adds jitter to the times of its samples. Where values are
    renewed less often than they are read, one renewal times the range of the knots in and next to the window is added
    (which part of the time between two renewals a value stands for is not known), and the bound is no less than
    `IN_STEP` of the energy: renewals at equal intervals can be in step with a swing for long (Yang et al., Part-time
    power measurements, 2024).

    Power that the device has averaged over the last `averaging_s` is late at both ends, and hides swings. A window
    shorter than the average has no value; a longer one has `averaging_s` * r more bound, r the range of the samples
    from one averaging time before the window to one after it, or `HIDDEN_SWING` of the window's mean power where
    that is more (a power that swings by +-40% every 80 ms needs less).
    """

    HIDDEN_SWING = 0.02
    IN_STEP = 0.08  # the largest error seen in simulated windows within 10% was 6.3%
    HOLD = 2.0
    HOLD_S = 0.2

    def __init__(self, period_s: float, *, averaging_s: float = 0.0):
        super().__init__("the power reading", period_s)
        self._period_s = period_s
        self._averaging_s = averaging_s
        self._last_sample: tuple[float, float] | None = None  # time and W
        self._repeated = False  # whether that sample only repeated the one before
        self._renewals_s: deque[float] = deque(maxlen=9)  # between the latest changes of the value
        self._changed_s = -math.inf

    def add(self, time_s: float, value: float) -> None:
        """Adds a sample: `value` W at `time_s`."""
        previous, continuous = self._last_sample, self._note_reading(time_s, time_s)
        if previous is not None and time_s <= previous[0]:
            return  # a clock too coarse to tell the two apart
        self._last_sample = time_s, value
        if previous is None or not continuous:
            self._add_knot(time_s, value, 0.0, continuous=continuous)
            self._repeated = False
        elif value != previous[1]:
            apart_s = time_s - previous[0] if self._repeated else 0.0
            self._renewals_s.append(time_s - self._changed_s)
            self._add_knot(time_s - apart_s / 2, value, apart_s / 2, continuous=True)
            self._changed_s, self._repeated = time_s, False
        else:
            self._repeated = True
            if time_s - self._times_s[-1] >= max(self.HOLD_S, self.HOLD * self._renewal_s()):
                self._add_knot(time_s, value, 0.0, continuous=True)

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
        bound_j = self._bound_j(start_s, end_s, self._renewal_s())
        if self._renewal_s() > 0:
            bound_j = max(bound_j, self.IN_STEP * energy_j)
        if self._averaging_s > 0:
            bound_j += self._averaging_bound_j(start_s, end_s, energy_j / (end_s - start_s))
        return Difference(energy_j, bound_j)

    def _renewal_s(self) -> float:
        """Time between two new values, 0 where every sample is one."""
        renewal_s = sorted(self._renewals_s)[len(self._renewals_s) // 2] if self._renewals_s else 0.0
        return renewal_s if renewal_s > 2 * self._period_s else 0.0

    def _averaging_bound_j(self, start_s: float, end_s: float, power_w: float) -> float:
        first = bisect_left(self._times_s, start_s - self._averaging_s)
        last = bisect_left(self._times_s, end_s + self._averaging_s)
        near_w = self._powers_w[first : last + 1]
        return self._averaging_s * max(max(near_w) - min(near_w), self.HIDDEN_SWING * power_w)
