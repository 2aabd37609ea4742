"""The rhythm of a counter's ticks, so that a counter that is dear to read need not be read at every moment."""

import math

import numpy as np


class TickGrid:
    """Ticks at `phase + n * period`, learnt from ticks that were each seen to lie between two times.

    All lines `time = phase + n * period` that pass between the two times of every remembered tick are possible. The
    grid is their middle; `error_s` is half the spread of the possible phases at the last tick, and half the spread of
    the possible periods for every tick since. Jitter widens it: where no line fits, twice the most by
    which a tick misses the least-squares line, and always `SLACK_S` for what has not shown yet.

    Where the periods that are possible are within `COMMON_WITHIN` of each other and one of them is a common one, it is
    taken to be that one, up to `DRIFT`: the few ticks of the beginning leave the period so open that the error would
    grow by half of one within seconds. A tick that contradicts it excludes it for good.

    There is no grid (`period_s` is None) before `LEARNING` ticks were seen, and for ticks that keep no rhythm (an error
    of more than `MAX_ERROR` periods). A tick that was seen where the grid has none makes it learn anew.
    """

    LEARNING = 8
    MEMORY = 32
    MEMORY_S = 120.0  # over which the device's clock is taken to keep its pace
    REFIT_EVERY = 4
    SLACK_S = 1e-3
    MAX_ERROR = 0.2
    WIDEST = 0.5  # of a period; a tick that is known less well is not learnt from
    COMMON_PERIODS_S = (0.01, 0.02, 0.025, 0.05, 0.1, 0.2, 0.25, 0.5, 1.0)  # timers of drivers run at round periods
    COMMON_WITHIN = 0.1  # so well, in periods, a period must be known before it is taken to be a common one
    DRIFT = 1e-4  # of the device's clock against ours
    NARROW = 0.2  # of a period; so well a tick must be known to confirm the grid, unless `USUAL` asks for less
    USUAL = 1.25  # of the median width of the ticks that the grid was learnt from
    REFIT_S = 1.0

    def __init__(self) -> None:
        self.period_s: float | None = None
        self.last_seen_s = -math.inf
        self._last_s = -math.inf
        self._ticks: list[tuple[float, float]] = []
        self._unused = 0  # ticks that the grid does not know of yet
        self._fitted_s = -math.inf
        self._common_period_s: float | None = None  # the common period that the grid has
        self._contradicted: set[float] = set()  # common periods that a tick contradicted
        self._usual_s = 0.0
        self._origin_s = 0.0  # of the last tick seen, on the grid
        self._origin_error_s = 0.0
        self._period_error_s = 0.0

    def add(self, earliest_s: float, latest_s: float) -> bool:
        """A tick was seen between two times. False where the grid had none there, or is too old, and is given up.

        The grid is confirmed up to `last_seen_s` by two ticks in a row: one alone may be where the grid has one by
        chance. A tick that is known too badly says nothing.
        """
        middle_s, half_s = (earliest_s + latest_s) / 2, (latest_s - earliest_s) / 2
        kept = True
        if self.period_s is not None:
            expected_s = self.nearest(middle_s)
            error_s = self.error_s(expected_s)
            if abs(expected_s - middle_s) > half_s + error_s:
                if self._common_period_s is not None:
                    self._contradicted.add(self._common_period_s)
                self.forget()
                kept = False
            elif error_s > self.period_s / 2:  # which of the ticks this is nobody knows: only the period is kept
                self._ticks.clear()
                self._origin_s, self._origin_error_s = middle_s, half_s + self.SLACK_S
                kept = False
            elif 2 * half_s > min(
                max(self.NARROW * self.period_s, self.USUAL * self._usual_s), self.WIDEST * self.period_s
            ):
                return kept
        self._remember(earliest_s, latest_s)
        in_a_row = self.period_s is None or round((middle_s - self._last_s) / self.period_s) == 1
        self._last_s = middle_s
        if in_a_row:
            self.last_seen_s = latest_s
        self._unused += 1
        due = self._unused >= self.REFIT_EVERY or latest_s - self._fitted_s > self.REFIT_S
        if len(self._ticks) >= self.LEARNING and (self.period_s is None or due):
            self._fit()
            self._unused, self._fitted_s = 0, latest_s
        return kept

    def forget(self) -> None:
        """Learns anew."""
        self._ticks.clear()
        self.period_s = None

    def nearest(self, time_s: float) -> float:
        """The tick that is nearest to a time."""
        assert self.period_s is not None, "there is no grid"
        return self._origin_s + round((time_s - self._origin_s) / self.period_s) * self.period_s

    def error_s(self, tick_s: float) -> float:
        """How far the true tick may be from the grid's at `tick_s`."""
        assert self.period_s is not None, "there is no grid"
        ticks_since = abs(tick_s - self._origin_s) / self.period_s
        return self._origin_error_s + ticks_since * self._period_error_s

    def before(self, start_s: float, end_s: float) -> tuple[float, float] | None:
        """The tick that a reading from `start_s` to `end_s` has seen last, and its error.

        None where there is no grid, or where a tick may fall into the reading.
        """
        if self.period_s is None:
            return None
        tick_s = self.nearest(start_s)
        if tick_s > start_s:
            tick_s -= self.period_s
        error_s = self.error_s(tick_s)
        sure = tick_s + error_s <= start_s and tick_s + self.period_s - error_s >= end_s
        return (tick_s, error_s) if sure else None

    def _remember(self, earliest_s: float, latest_s: float) -> None:
        """Keeps old ticks rather than crowded ones: they say most of the period."""
        ticks = self._ticks
        ticks.append((earliest_s, latest_s))
        while latest_s - ticks[0][1] > self.MEMORY_S:
            ticks.pop(0)
        if len(ticks) > self.MEMORY and self.period_s is None:
            ticks.pop(0)  # a rhythm is learnt from ticks in a row
        elif len(ticks) > self.MEMORY:
            ticks.pop(min(range(1, len(ticks) - 1), key=lambda i: ticks[i + 1][0] - ticks[i - 1][0]))

    def _fit(self) -> None:
        earliest_s, latest_s = np.array(self._ticks).T
        middle_s = (earliest_s + latest_s) / 2
        period_s = self.period_s or float(np.median(np.diff(middle_s)))
        narrow = latest_s - earliest_s <= self.WIDEST * period_s
        earliest_s, latest_s, middle_s = earliest_s[narrow], latest_s[narrow], middle_s[narrow]
        if len(middle_s) < self.LEARNING:
            return
        self._usual_s = float(np.median(latest_s - earliest_s))
        apart_s = np.diff(middle_s)
        steps = np.round(apart_s / period_s)
        if period_s <= 0 or np.any(steps < 1):
            self.period_s = None
            return
        if self.period_s is None and np.any(steps > 1):
            # Behind a gap nobody knows yet how many ticks were in it: several periods would fit.
            since = int(np.flatnonzero(steps > 1)[-1]) + 1
            if len(middle_s) - since < self.LEARNING:
                return
            earliest_s, latest_s, middle_s = earliest_s[since:], latest_s[since:], middle_s[since:]
            steps = steps[since:]
        n = np.concatenate([[0], np.cumsum(steps)]) - np.sum(steps)  # 0 at the last tick, negative before
        shortest_s, longest_s = _periods(n, earliest_s, latest_s)
        jitter_s = 0.0
        if shortest_s > longest_s:
            line_s = np.polyval(np.polyfit(n, middle_s, 1), n)
            jitter_s = max(float(np.max(earliest_s - line_s)), float(np.max(line_s - latest_s)))
        earliest_s, latest_s = earliest_s - 2 * jitter_s - self.SLACK_S, latest_s + 2 * jitter_s + self.SLACK_S
        shortest_s, longest_s = _periods(n, earliest_s, latest_s)
        self._common_period_s = None if jitter_s else self._common_among(shortest_s, longest_s)
        if self._common_period_s is not None:
            shortest_s = max(shortest_s, self._common_period_s * (1 - self.DRIFT))
            longest_s = min(longest_s, self._common_period_s * (1 + self.DRIFT))
        first_s, last_s = float(np.max(earliest_s - n * shortest_s)), float(np.min(latest_s - n * longest_s))
        self._origin_s, self._origin_error_s = (first_s + last_s) / 2, (last_s - first_s) / 2
        self._period_error_s = (longest_s - shortest_s) / 2
        period_s = (shortest_s + longest_s) / 2
        self.period_s = period_s if self._origin_error_s <= self.MAX_ERROR * period_s else None

    def _common_among(self, shortest_s: float, longest_s: float) -> float | None:
        """The common period among the possible ones."""
        possible = (p for p in self.COMMON_PERIODS_S if p not in self._contradicted and shortest_s <= p <= longest_s)
        return next((p for p in possible if longest_s - shortest_s <= self.COMMON_WITHIN * p), None)


def _periods(n: np.ndarray, earliest_s: np.ndarray, latest_s: np.ndarray) -> tuple[float, float]:
    """Shortest and longest period of the lines through all ticks; the wrong way round where there is no line."""
    i, j = np.triu_indices(len(n), 1)
    shortest_s = np.max((earliest_s[j] - latest_s[i]) / (n[j] - n[i]))
    return float(shortest_s), float(np.min((latest_s[j] - earliest_s[i]) / (n[j] - n[i])))
