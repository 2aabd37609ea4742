"""Has the level of a signal changed since its baseline was taken? Page's two-sided CUSUM, as a pure function."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

_FALSE_ALARM_WINDOWS = 1e6  # mean number of windows between false alarms of a signal
_LEAST_ALLOWANCE = 0.5  # in standard deviations: a change of one is then noticed the soonest


class Baseline(NamedTuple):
    """Where a signal was when nothing was wrong: mean and standard deviation of its windows."""

    mean: float
    std: float


class Cusum(NamedTuple):
    """Evidence, in standard deviations, that the signal is above or below its baseline."""

    above: float = 0.0
    below: float = 0.0


def baseline(values: Sequence[float], least_std: float) -> Baseline:
    """The baseline of some windows; `least_std` stands in where they happen to be alike."""
    return Baseline(float(np.mean(values)), max(float(np.std(values, ddof=1)), least_std))


def apart(a: Baseline, b: Baseline, change: float, windows: int) -> bool:
    """Whether two baselines of so many windows are different levels: by half a `change`, and by more than noise."""
    return abs(a.mean - b.mean) > max(change / 2, 3 * math.hypot(a.std, b.std) / math.sqrt(windows))


def steady(values: Sequence[float], change: float) -> bool:
    """Whether windows in a row are of one level: their two halves differ by less than half a `change`, or by noise.

    The noise is taken from the differences of neighbours, which one step between two levels hardly enlarges.
    """
    half = len(values) // 2
    noise = float(np.median(np.abs(np.diff(values)))) / (0.6745 * math.sqrt(2))
    apart = abs(float(np.mean(values[:half])) - float(np.mean(values[half:])))
    return apart <= max(change / 2, 3 * noise * math.sqrt(4 / len(values)))


def updated(cusum: Cusum, value: float, usual: Baseline, change: float) -> tuple[Cusum, bool]:
    """Adds a window; says whether the level is now taken to have changed.

    The sums grow by what a value is off beyond an allowance of half the smallest `change` of interest (or half a
    standard deviation), and alarm at a threshold that Wald's bound puts so high that independent normal values cross
    it falsely once in a million windows. One window alone adds at most half of the threshold: an outlier is no change.

    Args:
      cusum: of the windows before.
      value: of the window.
      usual: the baseline.
      change: the smallest change of level that matters.
    """
    allowance = max(change / 2 / usual.std, _LEAST_ALLOWANCE)
    # Both sides alarm: each half as often. Mean run length >= (exp(2 k h) - 1 - 2 k h) / (2 k^2) without the overshoot.
    threshold = math.log(4 * allowance**2 * _FALSE_ALARM_WINDOWS + 1) / (2 * allowance)
    off = (value - usual.mean) / usual.std
    above = max(0.0, cusum.above + min(off - allowance, threshold / 2))
    below = max(0.0, cusum.below + min(-off - allowance, threshold / 2))
    return Cusum(above, below), max(above, below) >= threshold * (1 - 1e-9)
