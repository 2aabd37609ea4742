"""Cumulative quantities over time: knots, the places where they must not be interpolated, and differences."""

import math
from array import array
from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from typing import NamedTuple

# A pause between two readings is a gap when it is longer than both of these.
GAP_PERIODS = 2.5
GAP_MIN_S = 0.5


class Break(NamedTuple):
    """A stretch of time that no window may touch, and why."""

    start_s: float
    end_s: float
    reason: str


@dataclass(frozen=True)
class Difference:
    """How much a cumulative quantity grew over a window, with a bound on the error; or why that is unknown.

    `pending` says that it is unknown only because later readings are needed.
    """

    value: float | None
    bound: float | None
    null_reason: str | None = None
    pending: bool = False


def unknown(reason: str, *, pending: bool = False) -> Difference:
    """The difference that is not known, and why."""
    return Difference(None, None, reason, pending)


class CumulativeCurve:
    """A growing quantity known at knots (time, value), linear in between.

    Here every reading makes a knot and no bound is claimed; `jaxchunk.telemetry.energy` has the curves with
    bounds. A reading that is smaller than the one before (a reset, a driver reload), and a pause between
    readings of more than `GAP_PERIODS` periods and `GAP_MIN_S`, make a `Break`. A window that touches one, be it
    only through the knots around its ends, has no difference: nothing is interpolated over what was not seen.

    Times are seconds of one monotonic clock. Not safe for threads: the sampler holds a lock around it.
    """

    KNOTS_BEYOND = 1  # that must lie at or behind a window's end, for its difference to be settled

    def __init__(self, what: str, period_s: float):
        """Names the quantity for its reasons; `period_s` is how often it is meant to be read."""
        self.what = what
        self.last_error: str | None = None  # of a reading that failed, for the reason of the gap it may leave
        self._gap_limit_s = max(GAP_PERIODS * period_s, GAP_MIN_S)
        self._times_s = array("d")
        self._values = array("d")
        self._breaks: list[Break] = []
        self._last_read_s: float | None = None

    def add(self, time_s: float, value: float) -> None:
        """Adds a reading taken at `time_s`."""
        self._note_reading(time_s, time_s)
        if self._times_s and time_s <= self._times_s[-1]:
            return  # a clock too coarse to tell the two apart
        if self._values and value < self._values[-1]:
            self._add_break(self._times_s[-1], time_s, f"{self.what} went backwards (reset or driver reload)")
        self._append(time_s, value)

    def expect_every(self, period_s: float) -> None:
        """Readings will be so far apart on purpose: only a longer pause is a gap."""
        self._gap_limit_s = max(self._gap_limit_s, GAP_PERIODS * period_s)

    def difference(self, start_s: float, end_s: float) -> Difference:
        """Growth from `start_s` to `end_s`."""
        missing = self._missing(start_s, end_s)
        if missing is not None:
            return missing
        return Difference(self._value_at(end_s) - self._value_at(start_s), None)

    def settled(self, end_s: float) -> bool:
        """Whether later readings would no longer change the difference of a window that ends at `end_s`."""
        return len(self._times_s) >= self.KNOTS_BEYOND and self._times_s[-self.KNOTS_BEYOND] >= end_s

    def outage(self, now_s: float) -> bool:
        """Whether readings have been missing for so long that what follows is behind a gap whatever comes."""
        return self._last_read_s is not None and now_s - self._last_read_s > self._gap_limit_s

    def outage_reason(self, now_s: float) -> str:
        """What to say of a window in an outage that has not ended."""
        return self._gap_reason(now_s - (self._last_read_s or now_s))

    def knots_s(self, start_s: float, end_s: float) -> list[float]:
        """Times of the knots from `start_s` to `end_s`."""
        return list(self._times_s[bisect_left(self._times_s, start_s) : bisect_right(self._times_s, end_s)])

    def forget_before(self, time_s: float) -> None:
        """Drops what no window starting at or after `time_s` needs (it needs the interval before its own)."""
        count = bisect_right(self._times_s, time_s) - 2
        if count > 0:
            self._drop(count)
            self._breaks = [gap for gap in self._breaks if gap.end_s > self._times_s[0]]

    def __len__(self) -> int:
        return len(self._times_s)

    def _missing(self, start_s: float, end_s: float) -> Difference | None:
        """Why there is no difference over this window, or None where there is one."""
        if end_s <= start_s:
            return unknown("the window is empty")
        not_yet = unknown(f"{self.what} is not known up to the window's end yet", pending=True)
        if len(self._times_s) < 2:
            return not_yet
        if start_s < self._times_s[0]:
            ahead_s = self._times_s[0] - start_s
            return unknown(f"the window starts {ahead_s:.3f} s before the first known value of {self.what}")
        from_s = self._times_s[bisect_right(self._times_s, start_s) - 1]
        to_s = self._times_s[bisect_left(self._times_s, end_s)] if end_s <= self._times_s[-1] else end_s
        for gap in self._breaks:
            if gap.start_s < to_s and gap.end_s > from_s:
                return unknown(gap.reason)
        return not_yet if end_s > self._times_s[-1] else None

    def _append(self, time_s: float, value: float) -> None:
        self._times_s.append(time_s)
        self._values.append(value)

    def _drop(self, count: int) -> None:
        del self._times_s[:count]
        del self._values[:count]

    def _note_reading(self, start_s: float, end_s: float) -> bool:
        """Records that a reading took place; False where a gap lies before it."""
        last_s, self._last_read_s = self._last_read_s, end_s
        continuous = last_s is None or start_s - last_s <= self._gap_limit_s
        if last_s is not None and not continuous:
            self._add_break(last_s, start_s, self._gap_reason(start_s - last_s))
        if last_s is not None and start_s < last_s:
            self._add_break(start_s, math.nextafter(last_s, math.inf), "the clock went backwards")
        self.last_error = None
        return continuous

    def _gap_reason(self, length_s: float) -> str:
        why = f"; last error: {self.last_error}" if self.last_error else ""
        return f"no reading of {self.what} for {length_s:.2f} s{why}"

    def _add_break(self, start_s: float, end_s: float, reason: str) -> None:
        self._breaks.append(Break(start_s, end_s, reason))

    def _broken(self, start_s: float, end_s: float) -> bool:
        return any(gap.start_s < end_s and gap.end_s > start_s for gap in self._breaks)

    def _interval(self, time_s: float) -> int:
        """Index k with knot k <= time_s <= knot k + 1."""
        return max(min(bisect_right(self._times_s, time_s) - 1, len(self._times_s) - 2), 0)

    def _value_at(self, time_s: float) -> float:
        k = self._interval(time_s)
        fraction = (time_s - self._times_s[k]) / (self._times_s[k + 1] - self._times_s[k])
        return self._values[k] + fraction * (self._values[k + 1] - self._values[k])
