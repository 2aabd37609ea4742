"""Intervals that hold however often one looks at them: the statistics of stopping early."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

_PRIOR_VARIANCE = 10.0  # of the mean in units of the standard deviation: tunes at which sizes the interval is close
_LEAST_STD = 1e-6  # identical values are a coarse clock's, not an exact world's


class MeanInterval(NamedTuple):
    """A mean and the interval that holds the true one."""

    mean: float
    low: float
    high: float

    def within(self, distance: float) -> bool:
        """Whether all of it is closer to 0 than that."""
        return -distance < self.low and self.high < distance


UNKNOWN = MeanInterval(0.0, -math.inf, math.inf)


def anytime_interval(values: Sequence[float], error: float) -> MeanInterval:
    """The mean of values as they come in, with an interval that is valid at every number of values at once.

    With probability 1 - `error` *all* of the intervals that are made as values are added hold the true mean, so that
    a measurement may go on until they say something. (An ordinary 95% interval that is looked at after every value
    misses sooner or later.) It inverts the mixture t-test of Lai (1976) and Gönen et al. (2005): under the mixture the
    likelihood ratio of the t statistic is a martingale for independent normal values of any variance (Wang and Ramdas,
    2025, "Anytime-valid t-tests and confidence sequences for Gaussian means with unknown variance"), and Ville's
    inequality bounds its maximum. With n values of standard deviation s, A = 1 + 10 n and K = (sqrt(A) / error)^(2/n),

        |mean - true mean| <= s sqrt((n - 1) u / n),   u = (K - 1) / (1 - K / A).

    Args:
      values: independent, of the same mean, about normal.
      error: probability that some interval misses.

    Returns:
      The mean and its interval; infinite where so few values say nothing.
    """
    n = len(values)
    if n < 2:
        return UNKNOWN if n == 0 else MeanInterval(float(values[0]), -math.inf, math.inf)
    mean, std = float(np.mean(values)), max(float(np.std(values, ddof=1)), _LEAST_STD)
    A = 1.0 + _PRIOR_VARIANCE * n
    K = math.exp(2.0 / n * (0.5 * math.log(A) - math.log(error)))
    if K >= A:
        return MeanInterval(mean, -math.inf, math.inf)
    half = std * math.sqrt((n - 1) / n * (K - 1.0) / (1.0 - K / A))
    return MeanInterval(mean, mean - half, mean + half)
