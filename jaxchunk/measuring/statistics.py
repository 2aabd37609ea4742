"""Medians, intervals and ratios of measurements."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxchunk.measuring.protocol import Measurement

_RESAMPLES = 2000


class Interval(NamedTuple):
    """A median and its 95% bootstrap interval."""

    median: float
    low: float
    high: float

    @property
    def excludes_one(self) -> bool:
        """Whether a ratio with this interval is told apart from 1."""
        return self.low > 1.0 or self.high < 1.0

    def text(self, digits: int, scale: float = 1.0, unit: str = "") -> str:
        """`1.017 (1.010 to 1.023)`; the median alone where the values do not differ, as a single one does not."""
        median, low, high = (f"{value * scale:.{digits}f}" for value in self)
        is_known = not math.isclose(self.low, self.high, rel_tol=1e-9)
        return f"{median}{unit} ({low} to {high})" if is_known else f"{median}{unit}"


def bootstrap_median(values: Sequence[float]) -> Interval:
    """Median of the values with the percentile bootstrap's 95% interval (Efron, 1979).

    Of five values it is about their range, which holds the true median in 94% of cases; fewer say less.
    """
    data = np.asarray(values, float)
    picks = np.random.default_rng(0).integers(0, len(data), (_RESAMPLES, len(data)))
    low, high = np.percentile(np.median(data[picks], axis=1), [2.5, 97.5])
    return Interval(float(np.median(data)), float(low), float(high))


Quantity = str | Callable[[Measurement], float | None]


def values_of(measurements: Sequence[Measurement], variant: str, quantity: Quantity = "time_s") -> dict[int, float]:
    """A quantity of a variant's valid measurements, by repeat; unknown ones are left out."""
    read = quantity if callable(quantity) else lambda m: getattr(m, quantity)
    own = [m for m in measurements if m.variant == variant and m.invalid_reason is None]
    return {m.repeat: value for m in own if (value := read(m)) is not None}


def interval_of(measurements: Sequence[Measurement], variant: str, quantity: Quantity = "time_s") -> Interval | None:
    """Median and interval of a quantity; None where it is not known in any repeat."""
    values = list(values_of(measurements, variant, quantity).values())
    return bootstrap_median(values) if values else None


def ratios(
    measurements: Sequence[Measurement], variant: str, baseline: str, quantity: Quantity = "time_s"
) -> list[float]:
    """A quantity of a variant over that of the baseline, repeat by repeat; empty where either is unknown.

    A ripple may be 0 (a clock that stands still): where the baseline's is, there is no ratio.
    """
    return list(_ratios_by_repeat(measurements, variant, baseline, quantity).values())


def ratio_of(
    measurements: Sequence[Measurement], variant: str, baseline: str, quantity: Quantity = "time_s"
) -> Interval | None:
    """Median and interval of the ratios; None where there are none."""
    relative = ratios(measurements, variant, baseline, quantity)
    return bootstrap_median(relative) if relative else None


def ratio_of_best(
    measurements: Sequence[Measurement], variants: Sequence[str], baseline: str, quantity: Quantity = "time_s"
) -> Interval | None:
    """Ratio to the baseline of the variant with the lowest one, free of the luck of being picked.

    The lowest of several medians is low by chance too: with five chunk counts that change nothing and five repeats, its
    interval lies below 1 in 6 to 10% of runs (simulated). So the ratio of each repeat is that of the variant that is
    the best in the *other* repeats, which brings it to 4 to 6%. None with fewer than two repeats.
    """
    by_variant = {name: _ratios_by_repeat(measurements, name, baseline, quantity) for name in variants}
    chosen = []
    for repeat in sorted({repeat for relative in by_variant.values() for repeat in relative}):
        elsewhere = {
            name: float(np.median(others))
            for name, relative in by_variant.items()
            if repeat in relative and (others := [value for r, value in relative.items() if r != repeat])
        }
        if elsewhere:
            chosen.append(by_variant[min(elsewhere, key=elsewhere.__getitem__)][repeat])
    return bootstrap_median(chosen) if chosen else None


def energy_caveats(own: Sequence[Measurement]) -> dict[str, Any]:
    """What must be known of the joules of a variant: the largest bound of a window's, and why one has none."""
    return {
        "energy_bound_j": max((m.energy_bound_j for m in own if m.energy_bound_j is not None), default=None),
        "energy_null_reason": next((m.energy_null_reason for m in own if m.energy_null_reason), None),
    }


def _ratios_by_repeat(
    measurements: Sequence[Measurement], variant: str, baseline: str, quantity: Quantity
) -> dict[int, float]:
    """A repeat that an interruption split has no ratio across the two pieces: what is to cancel may have changed."""
    numerator, denominator = (values_of(measurements, name, quantity) for name in (variant, baseline))
    pieces = {(m.variant, m.repeat): m.piece for m in measurements if m.invalid_reason is None}
    common = [r for r in sorted(numerator.keys() & denominator.keys()) if pieces[variant, r] == pieces[baseline, r]]
    return {repeat: numerator[repeat] / denominator[repeat] for repeat in common if denominator[repeat]}
