"""Energy over time with an honest bound, from a counter that ticks; `power` has that from samples of power."""

import math
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Callable

from jaxchunk.telemetry.curve import CumulativeCurve, Difference
from jaxchunk.telemetry.ticks import TickGrid

# Smallest and largest power seen between two times, in W; None where there was no sample.
PowerRange = Callable[[float, float], tuple[float, float] | None]


def no_power_samples(start_s: float, end_s: float) -> None:
    """The `PowerRange` of a device whose instantaneous power cannot be read."""


class CounterCurve(CumulativeCurve):
    """Joules from a counter that moves in ticks, with a knot at every tick.

    A poll that sees a new value, after one that still saw the old value, puts the tick between the two: the
    knot's time is the middle and its uncertainty u half the distance (about half a poll period). Once the ticks'
    rhythm is known (`grid`), a single reading well inside of a period belongs to the tick before it, and u is the
    grid's error. The length of a tick is whatever it turns out to be; of ticks closer than `MIN_INTERVAL` times their
    uncertainties only some become knots, because the power between two such knots would be mostly error.

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
    KNOTS_BEYOND = 2  # the bound looks at the neighbour as well
    STALL_S = 3.0  # a counter that answers but has not moved for so long is not waited for

    def __init__(self, period_s: float, *, power_range: PowerRange = no_power_samples, resolution_j: float = 1e-3):
        super().__init__("the energy counter", period_s)
        self._power_range = power_range
        self._resolution_j = resolution_j
        self._uncertainty_s = array("d")
        self._last_reading: tuple[float, float, float] | None = None  # start, end, joules
        self._moved_s: float | None = None
        self._went_backwards = False  # and has not moved since
        self._verified_s = -math.inf  # up to here the grid is known to have been right
        self._trusts_grid = False  # whether there are knots behind it whose times are the grid's
        self.last_tick_s = -math.inf
        self.grid = TickGrid()

    def add_reading(self, start_s: float, end_s: float, energy_j: float) -> None:
        """Adds a poll: the read began at `start_s` and was over at `end_s`."""
        self._note_reading(start_s, end_s)
        previous, self._last_reading = self._last_reading, (start_s, end_s, energy_j)
        unmoved_since_s, self._moved_s = self._moved_s, end_s
        if end_s - start_s > self._gap_limit_s:
            self._add_break(start_s, end_s, f"a reading of {self.what} took {end_s - start_s:.2f} s")
        if previous is None:
            return  # when this value was reached is not known
        if start_s < previous[1]:  # the clock went backwards: these two readings say nothing together
            self.grid.forget()
        elif energy_j < previous[2]:
            # The reading before may have been the wrong one, and with it the last knot.
            since_s = min([previous[0], *self._times_s[-2:-1]])
            self._add_break(since_s, end_s, f"{self.what} went backwards (reset or driver reload)")
            self.grid.forget()
            self._went_backwards = True
        elif self._went_backwards and energy_j > previous[2]:
            # A counter that answered nonsense once is back at its value without a tick.
            self._add_break(previous[0], end_s, f"{self.what} went backwards (reset or driver reload)")
            self._went_backwards = False
        elif energy_j > previous[2]:
            self._add_change(previous[0], start_s, end_s, energy_j)
        else:
            self._moved_s = unmoved_since_s
            tick = self.grid.before(start_s, end_s)
            if tick is not None and unmoved_since_s is not None and tick[0] - tick[1] > unmoved_since_s:
                self.grid.forget()  # it had a tick since then
                self._lose_rhythm(end_s)

    def _add_change(self, previous_start_s: float, start_s: float, end_s: float, energy_j: float) -> None:
        period_s = self.grid.period_s
        if period_s is not None and end_s - previous_start_s > TickGrid.WIDEST * period_s:
            tick = self.grid.before(start_s, end_s)
            if tick is not None:
                self._add_tick(*tick, energy_j)
                self.last_tick_s, self._trusts_grid = tick[0], True
            return
        if not self.grid.add(previous_start_s, end_s):
            self._lose_rhythm(end_s)
        if self.grid.last_seen_s == end_s:
            self._verified_s, self._trusts_grid = end_s, False
        self.last_tick_s = (previous_start_s + end_s) / 2
        self._add_tick(self.last_tick_s, (end_s - previous_start_s) / 2, energy_j)

    def _lose_rhythm(self, end_s: float) -> None:
        if self._trusts_grid:
            self._add_break(self._verified_s, end_s, f"the ticks of {self.what} lost their rhythm")

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

    def stretch_around(self, start_s: float, end_s: float, least_s: float) -> tuple[float, float] | None:
        """Two knots with a window between them, `least_s` apart where the past goes back so far without a break.

        None where the curve does not reach beyond both ends of the window without a break.
        """
        if self._missing(start_s, end_s) is not None:
            return None
        first, last = bisect_right(self._times_s, start_s) - 1, bisect_left(self._times_s, end_s)
        to_s = self._times_s[last]
        while first > 0 and to_s - self._times_s[first] < least_s:
            if self._broken(self._times_s[first - 1], self._times_s[first]):
                break
            first -= 1
        return self._times_s[first], to_s

    def outage(self, now_s: float) -> bool:
        """As for any curve, and also where the counter answers but stands still."""
        return super().outage(now_s) or self._stalled(now_s)

    def outage_reason(self, now_s: float) -> str:
        """What to say of a window in an outage that has not ended."""
        if super().outage(now_s) or self._moved_s is None:
            return super().outage_reason(now_s)
        return f"{self.what} has not moved for {now_s - self._moved_s:.1f} s"

    def _stalled(self, now_s: float) -> bool:
        """Whether it is read and stands still (not: is left alone for long on purpose)."""
        if self._moved_s is None or self._last_reading is None or self._last_reading[1] <= self._moved_s:
            return False
        return now_s - self._moved_s > self.STALL_S

    def _add_tick(self, time_s: float, uncertainty_s: float, energy_j: float) -> None:
        if self._times_s:
            if time_s <= self._times_s[-1]:
                return  # a grid that has moved a little
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
