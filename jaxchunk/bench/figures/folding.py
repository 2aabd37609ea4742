"""Telemetry folded over the iterations of a benchmark: what happens within one, on average over many."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from jaxchunk.measuring.protocol import Measurement

_MOST_BINS = 40
_SAMPLES_A_BIN = 10  # fewer say little about a 10-90% band
_SLOW_RENEWAL = 1.5  # sampling intervals: a value that lasts longer is renewed more slowly than it is looked at


class Folded(NamedTuple):
    """A quantity over the phase of an iteration.

    Attributes:
      phase: centres of the bins, 0 (the iteration before is complete) to 1 (this one is), shape [bins].
      median: of the samples in each bin, NaN where there is none, shape [bins].
      low: their 10% quantile.
      high: their 90% quantile.
      samples: how many were folded.
      iterations: over how many iterations.
    """

    phase: np.ndarray
    median: np.ndarray
    low: np.ndarray
    high: np.ndarray
    samples: int
    iterations: int


class Renewal(NamedTuple):
    """How often a value is seen to change.

    Attributes:
      period_s: median time between changes.
      as_often_as_sampled: whether it may be renewed even more often, for it changes nearly from sample to sample.
    """

    period_s: float
    as_often_as_sampled: bool


def valid_windows(measurements: Sequence[Measurement], variant: str) -> list[Measurement]:
    """The measurements of a variant that count, in order of time."""
    own = [m for m in measurements if m.variant == variant and m.invalid_reason is None]
    return sorted(own, key=lambda m: m.start_s)


def between(telemetry: Mapping[str, np.ndarray], column: str, start_s: float, end_s: float) -> list[np.ndarray]:
    """Times and values of the known samples of a column from `start_s` to `end_s`, both of shape [samples]."""
    time_s, values = telemetry["time_s"], telemetry[column]
    kept = (time_s >= start_s) & (time_s <= end_s) & np.isfinite(values)
    return [time_s[kept], values[kept]]


def phases(window: Measurement, time_s: np.ndarray) -> np.ndarray:
    """Phase, 0 to 1, of each time within its iteration; NaN where no completion times were kept. Shape [times]."""
    if window.call_ends_s is None and window.calls > 1:
        return np.full(time_s.shape, np.nan)
    ends_s = np.array(window.call_ends_s or [window.end_s - window.start_s])
    edges_s = np.concatenate([[0.0], ends_s])
    passed_s = time_s - window.start_s
    iteration = np.clip(np.searchsorted(edges_s, passed_s, side="right") - 1, 0, len(ends_s) - 1)
    length_s = np.diff(edges_s)[iteration]
    with np.errstate(divide="ignore", invalid="ignore"):
        phase = (passed_s - edges_s[iteration]) / length_s
    return np.where(length_s > 0, np.clip(phase, 0.0, 1.0), np.nan)


def fold(telemetry: Mapping[str, np.ndarray], windows: Sequence[Measurement], column: str) -> Folded | None:
    """Folds a column of the telemetry over the iterations of some windows.

    Args:
      telemetry: columns of `telemetry.csv`, each of shape [samples].
      windows: of one variant.
      column: which one.

    Returns:
      The fold; None where nothing can be folded.
    """
    phase_parts, value_parts, iterations = [np.empty(0)], [np.empty(0)], 0
    for window in windows:
        time_s, values = between(telemetry, column, window.start_s, window.end_s)
        phase = phases(window, time_s)
        known = np.isfinite(phase)
        phase_parts.append(phase[known])
        value_parts.append(values[known])
        iterations += window.calls if known.any() else 0
    phase, values = np.concatenate(phase_parts), np.concatenate(value_parts)
    if not phase.size:
        return None
    bins = int(np.clip(phase.size // _SAMPLES_A_BIN, 1, _MOST_BINS))
    place = np.minimum((phase * bins).astype(int), bins - 1)
    quantiles = np.full((3, bins), np.nan)
    for i in np.unique(place):
        quantiles[:, i] = np.quantile(values[place == i], [0.1, 0.5, 0.9])
    low, median, high = quantiles
    return Folded((np.arange(bins) + 0.5) / bins, median, low, high, int(phase.size), iterations)


def renewal(telemetry: Mapping[str, np.ndarray], windows: Sequence[Measurement]) -> Renewal | None:
    """How often power is seen to change within the windows; None where it changes less than twice in each."""
    between_changes_s, between_samples_s = [np.empty(0)], [np.empty(0)]
    for window in windows:
        time_s, values = between(telemetry, "power_w", window.start_s, window.end_s)
        between_samples_s.append(np.diff(time_s))
        between_changes_s.append(np.diff(time_s[1:][np.diff(values) != 0]))
    changes_s = np.concatenate(between_changes_s)
    if not changes_s.size:
        return None
    period_s = float(np.median(changes_s))
    return Renewal(period_s, period_s <= _SLOW_RENEWAL * float(np.median(np.concatenate(between_samples_s))))


def milliseconds(time_s: float) -> str:
    """A time in ms to three digits, without an exponent where it is long."""
    return f"{time_s * 1e3:.3g} ms" if time_s < 0.9995 else f"{time_s * 1e3:.0f} ms"


def resolution_note(seen: Renewal | None, iteration_s: float) -> str | None:
    """What the renewal of power means for an iteration folded; None where it is fast enough."""
    if seen is None or seen.period_s <= iteration_s / 4:
        return None
    iteration = f"an iteration takes {milliseconds(iteration_s)}"
    if seen.as_often_as_sampled:
        return (
            f"power changed at nearly every sample, {milliseconds(seen.period_s)} apart; {iteration}: "
            "whether NVML resolves structure within it is not known"
        )
    return (
        f"NVML renews power every {milliseconds(seen.period_s)}; {iteration}: "
        "structure within an iteration is not resolved"
    )
