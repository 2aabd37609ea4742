"""When to read an energy counter that ticks: exactly enough, because on some GPUs a reading costs milliseconds."""

import math
import random
import statistics
from collections import deque

from jaxchunk.telemetry.energy import CounterCurve

# Share of one core that reading the counter may take once its rhythm is known.
CPU_SHARE = 0.006
# What learning a rhythm and reading around the ends of windows cost comes on top of that. In the long run it is never
# more than MAX_CPU_SHARE, except for MAX_DEBT_S seconds of processor time, once.
MAX_CPU_SHARE = 0.015
MAX_DEBT_S = 1.2
# Readings it takes to see a tick between two of them: one before, one after, and those that the grid's error asks for.
READINGS_PER_TICK = 2.5
# A grid is checked against two ticks in a row that are seen to happen at least so often, or as often as half the budget
# allows, and before its error exceeds this share of a period, while CPU_SHARE has not been exceeded by 0.55
# MAX_DEBT_S.
CHECK_S = 4.0
READINGS_PER_CHECK = 7.0
MAX_GRID_ERROR = 0.12


class CounterSchedule:
    """Times of readings, from what the readings before cost.

    Until the rhythm of the ticks is known the counter is polled every `poll_period_s`. Then every tick is seen between
    two readings if `CPU_SHARE` allows that. If not, single readings in the middle of every k-th period do, which belong
    to ticks whose times the grid knows; k is what the budget allows, and 1 while somebody needs a window's end
    (`attend`). A counter without a rhythm is polled as fast as the budget allows once `LEARNING_S` have been spent on
    it; learning is tried again after `RETRY_S`, then after twice that, and so on. Where MAX_DEBT_S is reached, half of
    it is saved before anything but single readings is done again.
    """

    LEARNING_S = 2.0
    RETRY_S = 60.0

    def __init__(self, poll_period_s: float):
        self._poll_period_s = poll_period_s
        self._random = random.Random(0)
        self._soonest_s = -math.inf  # for the next reading of a tick that is looked for
        self._costs_s: deque[float] = deque(maxlen=9)
        self._usual_reading_s = 0.0
        self._attend_until_s = -math.inf
        self._learning_since_s: float | None = None
        self._retry_s = self.RETRY_S
        self._debt_s = 0.0  # processor time beyond MAX_CPU_SHARE
        self._beyond_s = 0.0  # and beyond CPU_SHARE, up to MAX_DEBT_S
        self._saving = False
        self._paid_s = -math.inf

    def attend(self, now_s: float, curve: CounterCurve) -> float | None:
        """Every tick matters until the next two are known, and the last one too: power may change from now on.

        Returns:
          When the counter should be read: now, for the tick before, or behind the tick that is too near for that. None
          where there is no rhythm, or no budget.
        """
        period_s = curve.grid.period_s
        if period_s is None or self._debt_s >= MAX_DEBT_S:
            return None
        is_clear = curve.grid.before(now_s, now_s + self._usual_reading_s) is not None
        due_s = now_s if is_clear else curve.grid.nearest(now_s) + period_s / 2
        self._attend_until_s = due_s + 1.5 * period_s  # two readings more, and with them two ticks
        return due_s

    def next_s(self, curve: CounterCurve, start_s: float, end_s: float, cost_s: float) -> float:
        """The time of the next reading after one from `start_s` to `end_s` that took `cost_s` of processor time."""
        self._costs_s.append(cost_s)
        self._usual_reading_s += (end_s - start_s - self._usual_reading_s) / 8
        self._pay(end_s, cost_s)
        # At random: a fixed distance can divide the period, and then always leaves the same part of it open.
        self._soonest_s = max(start_s + self._random.uniform(0.7, 1.0) * self._poll_period_s, end_s)
        affordable_s = end_s + max(self._debt_s - MAX_DEBT_S, 0.0) / MAX_CPU_SHARE
        return max(self._wanted_s(curve, end_s), affordable_s)

    def _pay(self, end_s: float, cost_s: float) -> None:
        elapsed_s, self._paid_s = max(end_s - self._paid_s, 0.0), end_s
        self._debt_s = max(self._debt_s - elapsed_s * MAX_CPU_SHARE, 0.0) + cost_s
        self._beyond_s = min(max(self._beyond_s - elapsed_s * CPU_SHARE, 0.0) + cost_s, MAX_DEBT_S)
        self._saving = self._debt_s >= (MAX_DEBT_S / 2 if self._saving else MAX_DEBT_S)

    def _wanted_s(self, curve: CounterCurve, end_s: float) -> float:
        per_s = CPU_SHARE / max(statistics.median(self._costs_s), 1e-6)  # readings a second that the budget allows
        period_s = curve.grid.period_s
        if period_s is None:
            return end_s + (self._poll_period_s if self._learns(end_s) else max(self._poll_period_s, 1 / per_s))
        self._learning_since_s = None
        check_s = max(CHECK_S, READINGS_PER_CHECK / (per_s / 2))
        if per_s * period_s >= READINGS_PER_TICK or self._needs_check(curve, end_s, check_s):
            return self._before_next_tick(curve, end_s)
        periods = math.ceil(1 / ((per_s - READINGS_PER_CHECK / check_s) * period_s))
        return self._middle_of_period(curve, end_s, 1 if end_s < self._attend_until_s else periods)

    def _learns(self, end_s: float) -> bool:
        if self._learning_since_s is None:
            self._learning_since_s, self._retry_s = end_s, self.RETRY_S
        elif end_s - self._learning_since_s > self._retry_s and not self._saving:
            self._learning_since_s, self._retry_s = end_s, 2 * self._retry_s
        return 0 <= end_s - self._learning_since_s < self.LEARNING_S and not self._saving

    def _needs_check(self, curve: CounterCurve, end_s: float, check_s: float) -> bool:
        grid = curve.grid
        assert grid.period_s is not None
        if self._saving:
            return False
        uncertain = grid.error_s(end_s) > MAX_GRID_ERROR * grid.period_s
        return (uncertain and self._beyond_s < 0.55 * MAX_DEBT_S) or end_s - grid.last_seen_s > check_s

    def _before_next_tick(self, curve: CounterCurve, end_s: float) -> float:
        """Just before the tick that follows the last one seen; from there on, every poll period."""
        grid = curve.grid
        assert grid.period_s is not None
        # Not a tick that passed more than half a period ago: the reading of it is over.
        tick_s = grid.nearest(max(curve.last_tick_s + grid.period_s, end_s))
        return max(tick_s - grid.error_s(tick_s) - self._poll_period_s / 5, self._soonest_s)

    def _middle_of_period(self, curve: CounterCurve, end_s: float, periods: int) -> float:
        grid = curve.grid
        assert grid.period_s is not None
        middle_s = grid.nearest(end_s) + grid.period_s / 2  # half a period behind the tick nearest to this reading
        while middle_s <= end_s:
            middle_s += grid.period_s
        return middle_s + (periods - 1) * grid.period_s
