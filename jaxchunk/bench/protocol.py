"""How variants are compared: interleaved in random order, several repeats, windows long enough for the energy counter.

Every repeat runs each variant once, for a window of at least `window_s` seconds of back-to-back calls, in an order
shuffled anew. Ratios are formed within a repeat, so that a slow drift (temperature, another process) cancels; what is
reported is the median over repeats with a bootstrap interval.
"""

import dataclasses
import math
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxchunk.telemetry import Monitor, Window

_TICK_TIMEOUT_S = 1.0


@dataclasses.dataclass(frozen=True)
class Variant:
    """Something to measure.

    Attributes:
      name: of the variant.
      call: dispatches the work once and returns arrays that are ready when it is done.
      watched: whether all of its work is on the device that the monitor watches; if not, its energy is null.
    """

    name: str
    call: Callable[[], Any]
    watched: bool = True


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One variant in one repeat. Joules and watts are the GPU's own; None is unknown, with the reason beside it."""

    variant: str
    repeat: int
    calls: int
    time_s: float
    energy_j: float | None
    energy_bound_j: float | None
    energy_source: str | None
    energy_null_reason: str | None
    power_w: float | None
    power_w_std: float | None
    sm_clock_mhz: float | None
    temperature_c: float | None
    throttle: dict[str, float] | None


class Interval(NamedTuple):
    """A median and its 95% bootstrap interval."""

    median: float
    low: float
    high: float


def interleave(
    variants: Sequence[Variant], monitor: Monitor, *, repeats: int, window_s: float, seed: int = 0
) -> Iterator[Measurement]:
    """Measures every variant `repeats` times, yielding each measurement as it is made.

    `time_s` and `energy_j` are per call; `throttle` holds the share of the window spent in each clock-event reason.
    The first two calls of each variant (allocation, caches) are not measured.
    """
    monitor.wait_ready(monitor.now(), _TICK_TIMEOUT_S)  # no energy is known before the counter's first tick
    calls = {variant.name: _calls_in_window(variant, monitor, window_s) for variant in variants}
    shuffled = random.Random(seed)
    for repeat in range(repeats):
        for variant in shuffled.sample(list(variants), len(variants)):
            yield _measure(variant, monitor, repeat, calls[variant.name])


def bootstrap_median(values: Sequence[float], *, resamples: int = 2000, seed: int = 0) -> Interval:
    """Median of the values with the percentile bootstrap's 95% interval (Efron, 1979)."""
    data = np.asarray(values, float)
    picks = np.random.default_rng(seed).integers(0, len(data), (resamples, len(data)))
    low, high = np.percentile(np.median(data[picks], axis=1), [2.5, 97.5])
    return Interval(float(np.median(data)), float(low), float(high))


def ratios(measurements: Sequence[Measurement], name: str, baseline: str, field: str = "time_s") -> list[float]:
    """`field` of a variant over that of the baseline, repeat by repeat; empty where either is unknown."""

    def by_repeat(variant: str) -> dict[int, float]:
        return {
            m.repeat: getattr(m, field) for m in measurements if m.variant == variant and getattr(m, field) is not None
        }

    numerator, denominator = by_repeat(name), by_repeat(baseline)
    return [numerator[repeat] / denominator[repeat] for repeat in sorted(numerator.keys() & denominator.keys())]


def _calls_in_window(variant: Variant, monitor: Monitor, window_s: float) -> int:
    jax.block_until_ready(variant.call())
    start_s = monitor.now()
    jax.block_until_ready(variant.call())
    return max(1, math.ceil(window_s / (monitor.now() - start_s)))


def _measure(variant: Variant, monitor: Monitor, repeat: int, calls: int) -> Measurement:
    start_s = monitor.now()
    result = None
    for _ in range(calls):
        result = None  # before the call, so that two sets of results never exist at once
        result = variant.call()
    jax.block_until_ready(result)
    end_s = monitor.now()
    del result
    monitor.wait_ready(end_s, _TICK_TIMEOUT_S)
    window = monitor.window(start_s, end_s)
    if not variant.watched:
        reason = "work on several devices, of which one is watched"
        window = dataclasses.replace(window, energy_j=None, energy_bound_j=None, energy_null_reason=reason)
    power_w = monitor.samples(start_s, end_s).power_w
    return Measurement(
        variant=variant.name,
        repeat=repeat,
        calls=calls,
        time_s=(end_s - start_s) / calls,
        energy_j=_per_call(window.energy_j, calls),
        energy_bound_j=_per_call(window.energy_bound_j, calls),
        energy_source=window.energy_source,
        energy_null_reason=window.energy_null_reason,
        power_w=window.power_w,
        power_w_std=float(np.nanstd(power_w)) if np.isfinite(power_w).any() else None,
        sm_clock_mhz=window.sm_clock_mhz,
        temperature_c=window.temperature_c,
        throttle=_shares(window),
    )


def _per_call(total: float | None, calls: int) -> float | None:
    return None if total is None else total / calls


def _shares(window: Window) -> dict[str, float] | None:
    if window.throttle is None:
        return None
    return {reason: seconds / (window.end_s - window.start_s) for reason, seconds in window.throttle.items()}
