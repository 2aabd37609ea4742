"""How variants are compared: interleaved in random order, matched in temperature, several repeats.

Every repeat runs each variant once, in an order shuffled anew: to the common starting temperature, warm-up calls, then
a window of back-to-back calls. Ratios are formed within a repeat, so that a slow drift (temperature, another process)
cancels; what is reported is the median over repeats with a bootstrap interval (`statistics`).
"""

import contextlib
import dataclasses
import math
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxchunk.stop import no_stop
from jaxchunk.telemetry import AnyMonitor, CompletionWatcher, CrossCheck, Window

_TICK_TIMEOUT_S = 1.0
_HEATING_CALLS_S = 0.5  # heat for so long between two looks at the temperature
_SETTLED_C = 1.0  # a temperature that rises less than this in _SETTLED_S is taken as steady
_SETTLED_S = 5.0
_MOST_CALL_ENDS = 400  # more are not kept
_WATCHABLE_BYTES = 1 << 20  # a result this small may stay alive until it is complete
_ATTEMPTS = 2  # at a window that turns out invalid


@dataclasses.dataclass(frozen=True)
class Variant:
    """Something to measure.

    Attributes:
      name: of the variant.
      call: dispatches the work once and returns arrays that are ready when it is done.
      devices: places, in the monitor, of the devices that it runs on.
      prepare: to be called before a series of calls, or None: what it does is not measured.
      watched: whether telemetry is read during its window; without, its energy is null.
      factors: what distinguishes it from the others, for the records.
      heats_itself: whether it brings the device to the common temperature by itself, after `prepare`, because another
        one's work could not be done in its place without undoing that.
    """

    name: str
    call: Callable[[], Any]
    devices: tuple[int, ...] = (0,)
    prepare: Callable[[], Any] | None = None
    watched: bool = True
    factors: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    heats_itself: bool = False


@dataclasses.dataclass(frozen=True)
class Protocol:
    """How variants are measured.

    Attributes:
      repeats: windows of each variant.
      window_s: least length of a window, where `calls` does not say it.
      calls: calls in a window, or None.
      warmup_calls: calls just before a window.
      temperature_tolerance_c: how far from the common temperature a window may start; None does not look at it.
      settle_s: longest time spent on reaching that temperature, each time; twice that before the first window.
      seed: of the order.
      same_calls: whether the windows of all variants have as many calls, so that their totals can be compared.
    """

    repeats: int = 5
    window_s: float = 1.0
    calls: int | None = None
    warmup_calls: int = 2
    temperature_tolerance_c: float | None = 2.0
    settle_s: float = 20.0
    seed: int = 0
    same_calls: bool = False


@dataclasses.dataclass(frozen=True)
class Conditions:
    """What was settled before the first window, so that a run that is continued measures under the same conditions.

    Attributes:
      calls: in a window of each variant.
      heater: the variant that draws the most power.
      start_temperature_c: that every window starts near; None where there is no temperature, or it does not matter.
      slow_without_reason: share of the heater's time with slow clocks and no reason for it; None where unknown.
    """

    calls: dict[str, int]
    heater: str
    start_temperature_c: float | None
    slow_without_reason: float | None


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One variant in one repeat. Joules and watts are the GPU's own; None is unknown, with the reason beside it.

    `time_s` and `energy_j` are per call; `throttle` and `slow_without_reason` are shares of the window; `start_s`
    and `end_s` are times of `telemetry.csv`; `call_ends_s` are completion times of the calls, from the window's
    start; `sampler_cpu_share` is the share of one core that telemetry took; `piece` counts how often the run was
    gone on with. A measurement with an `invalid_reason` is kept and not averaged.
    """

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
    sm_clock_mhz_std: float | None = None
    start_temperature_c: float | None = None
    slow_without_reason: float | None = None
    cross_check: CrossCheck | dict[str, Any] | None = None
    rails_j: dict[str, float] | None = None
    invalid_reason: str | None = None
    start_s: float = 0.0
    end_s: float = 0.0
    call_ends_s: list[float] | None = None
    sampler_cpu_share: float | None = None
    piece: int = 0
    factors: dict[str, Any] = dataclasses.field(default_factory=dict)


def settle(
    variants: Sequence[Variant], monitor: AnyMonitor, protocol: Protocol, *, check: Callable[[], None] = no_stop
) -> Conditions:
    """Runs every variant once, counts the calls of a window, and heats the device up to the common temperature.

    Args:
      variants: what to compare.
      monitor: started.
      protocol: how.
      check: called before every call of a variant; what it raises ends this.
    """
    variants = [_checked(variant, check) for variant in variants]
    monitor.wait_ready(monitor.now(), _TICK_TIMEOUT_S)  # no energy is known before the counter's first tick
    calls = {
        variant.name: protocol.calls or _calls_in_window(variant, monitor, protocol.window_s) for variant in variants
    }
    if protocol.same_calls:
        calls = dict.fromkeys(calls, max(calls.values()))
    heater = variants[0]
    if _temperature_c(monitor) is None or protocol.temperature_tolerance_c is None:
        return Conditions(calls, heater.name, None, None)
    if not any(variant.heats_itself for variant in variants):
        powers_w = []
        for variant in variants:
            start_s = monitor.now()
            _run_for(variant, monitor, _HEATING_CALLS_S)
            powers_w.append(monitor.of(variant.devices).window(start_s, monitor.now()).power_w or 0.0)
        heater = variants[int(np.argmax(powers_w))]
    start_s = monitor.now()
    _heat_until_steady(heater, monitor, 2 * protocol.settle_s)
    end_s, own = monitor.now(), monitor.of(heater.devices)
    monitor.attend()
    own.wait_ready(end_s, _TICK_TIMEOUT_S)
    window = own.window(start_s, end_s)
    slow_share = _share(window, window.slow_without_reason_s)
    temperature_c = _temperature_c(monitor)
    if temperature_c is not None:
        temperature_c -= protocol.temperature_tolerance_c / 2  # within reach of every window
    return Conditions(calls, heater.name, temperature_c, slow_share)


def measure(
    variants: Sequence[Variant],
    monitor: AnyMonitor,
    protocol: Protocol,
    conditions: Conditions,
    *,
    done: Sequence[Measurement] = (),
    piece: int = 0,
    check: Callable[[], None] = no_stop,
) -> Iterator[Measurement]:
    """Measures every variant `repeats` times, yielding each measurement as it is made.

    Args:
      variants: what to compare.
      monitor: started.
      protocol: how.
      conditions: from `settle`, or from the run that is continued.
      done: measurements of that run; they are not made again.
      piece: how often the run was gone on with.
      check: called before every call of a variant, and while the device cools; what it raises ends this.
    """
    variants = [_checked(variant, check) for variant in variants]
    heater = next((variant for variant in variants if variant.name == conditions.heater), variants[0])
    finished = {(m.variant, m.repeat) for m in done}
    longest_s = 2 * protocol.settle_s  # a run that goes on may find the device cold
    monitor.wait_ready(monitor.now(), _TICK_TIMEOUT_S)  # as in `settle`
    for repeat in range(protocol.repeats):
        order = random.Random(f"{protocol.seed}/{repeat}").sample(list(variants), len(variants))
        for variant in order:
            if (variant.name, repeat) in finished:
                continue
            for attempt in range(_ATTEMPTS):
                if variant.prepare is not None and variant.heats_itself:
                    variant.prepare()
                by = variant if variant.heats_itself else heater
                start_c = _reach_temperature(by, monitor, protocol, conditions.start_temperature_c, longest_s, check)
                longest_s = protocol.settle_s
                measurement = _measure(variant, monitor, protocol, repeat, conditions.calls[variant.name], start_c)
                if measurement.invalid_reason is None or attempt == _ATTEMPTS - 1:
                    yield dataclasses.replace(measurement, piece=piece)
                    break


def _checked(variant: Variant, check: Callable[[], None]) -> Variant:
    def call() -> Any:
        check()
        return variant.call()

    return dataclasses.replace(variant, call=call)


def _calls_in_window(variant: Variant, monitor: AnyMonitor, window_s: float) -> int:
    times_s = []
    for _ in range(3):  # the first may compile or load something; a slow one would make the window too short
        start_s = monitor.now()
        jax.block_until_ready(variant.call())
        times_s.append(monitor.now() - start_s)
    return max(1, math.ceil(window_s / min(times_s)))


def _measure(
    variant: Variant, monitor: AnyMonitor, protocol: Protocol, repeat: int, calls: int, start_c: float | None
) -> Measurement:
    began_s, cpu_s = monitor.now(), monitor.sampler_cpu_s
    with contextlib.nullcontext() if variant.watched else monitor.paused():
        start_s, end_s, ends_s = _timed_calls(variant, monitor, protocol.warmup_calls, calls)
    sampler_cpu_s = monitor.sampler_cpu_s - cpu_s
    sampler_cpu_share = None if monitor.device is None else sampler_cpu_s / (monitor.now() - began_s)
    own = monitor.of(variant.devices)
    own.wait_ready(end_s, _TICK_TIMEOUT_S)
    window = own.window(start_s, end_s)
    samples = own.samples(start_s, end_s)
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
        power_w_std=_std(samples.power_w),
        sm_clock_mhz=window.sm_clock_mhz,
        sm_clock_mhz_std=_std(samples.sm_clock_mhz),
        temperature_c=window.temperature_c,
        start_temperature_c=start_c,
        throttle=_shares(window),
        slow_without_reason=_share(window, window.slow_without_reason_s),
        cross_check=window.cross_check,
        rails_j=window.rails_j,
        invalid_reason=window.invalid_reason if variant.watched else None,
        start_s=start_s - monitor.start_s,
        end_s=end_s - monitor.start_s,
        call_ends_s=None if ends_s is None else [round(end - start_s, 5) for end in ends_s],
        sampler_cpu_share=sampler_cpu_share,
        factors=dict(variant.factors),
    )


def _timed_calls(
    variant: Variant, monitor: AnyMonitor, warmup: int, calls: int
) -> tuple[float, float, list[float] | None]:
    """Runs warm-up calls, then dispatches the measured ones in one go: start and end of these, and when each was done.

    The ends of single calls are noticed by another thread, on the smallest array of each result, because what is
    watched stays alive until then; where that one is large, they are not known.
    """
    if variant.prepare is not None:
        variant.prepare()
    for _ in range(warmup):
        result = variant.call()
        jax.block_until_ready(result)
        del result
    watcher = CompletionWatcher(monitor.now)
    try:
        monitor.attend()
        result, watched = None, 0
        start_s = monitor.now()
        for i in range(calls):
            result = None  # before the call, so that two sets of results never exist at once
            result = variant.call()
            smallest = min(jax.tree.leaves(result), key=lambda leaf: leaf.nbytes, default=())
            if 1 < calls <= _MOST_CALL_ENDS and getattr(smallest, "nbytes", 0) <= _WATCHABLE_BYTES:
                watcher.watch(i, smallest)
                watched += 1
        jax.block_until_ready(result)
        end_s = monitor.now()
        monitor.attend()
        del result
        ends_s = [watcher.wait(i) for i in range(watched)]
    finally:
        watcher.close()
    return start_s, end_s, ends_s or None


def _reach_temperature(
    heater: Variant,
    monitor: AnyMonitor,
    protocol: Protocol,
    target_c: float | None,
    longest_s: float,
    check: Callable[[], None],
) -> float | None:
    """Heats with work, or waits, until the device is near the target or the time is up; says where it then is."""
    temperature_c, start_s = _temperature_c(monitor), monitor.now()
    if target_c is None or protocol.temperature_tolerance_c is None:
        return temperature_c
    while temperature_c is None and monitor.now() - start_s < _TICK_TIMEOUT_S:  # the sampler has only just begun
        time.sleep(0.01)
        temperature_c = _temperature_c(monitor)
    while temperature_c is not None and monitor.now() - start_s < longest_s:
        check()
        if temperature_c < target_c - protocol.temperature_tolerance_c:
            _run_for(heater, monitor, _HEATING_CALLS_S)
        elif temperature_c > target_c + protocol.temperature_tolerance_c:
            time.sleep(_HEATING_CALLS_S / 5)
        else:
            break
        temperature_c = _temperature_c(monitor)
    return temperature_c


def _heat_until_steady(heater: Variant, monitor: AnyMonitor, longest_s: float) -> None:
    start_s = marked_s = monitor.now()
    marked_c = _temperature_c(monitor)
    while monitor.now() - start_s < longest_s:
        _run_for(heater, monitor, _HEATING_CALLS_S)
        if monitor.now() - marked_s >= _SETTLED_S:
            temperature_c = _temperature_c(monitor)
            if temperature_c is None or marked_c is None or temperature_c - marked_c < _SETTLED_C:
                return
            marked_s, marked_c = monitor.now(), temperature_c


def _run_for(variant: Variant, monitor: AnyMonitor, seconds: float) -> None:
    start_s = monitor.now()
    while monitor.now() - start_s < seconds:
        jax.block_until_ready(variant.call())


def _temperature_c(monitor: AnyMonitor) -> float | None:
    temperatures_c = monitor.samples(monitor.now() - 1.0).temperature_c
    known = temperatures_c[np.isfinite(temperatures_c)]
    return float(known[-1]) if known.size else None


def _per_call(total: float | None, calls: int) -> float | None:
    return None if total is None else total / calls


def _std(values: np.ndarray) -> float | None:
    return float(np.nanstd(values)) if np.isfinite(values).sum() > 1 else None


def _device_seconds(window: Window) -> float:
    """The window's length, times its devices where there are several: their throttle seconds are added up."""
    return (window.end_s - window.start_s) * max(len(window.parts), 1)


def _share(window: Window, seconds: float | None) -> float | None:
    return None if seconds is None else seconds / _device_seconds(window)


def _shares(window: Window) -> dict[str, float] | None:
    if window.throttle is None:
        return None
    return {reason: seconds / _device_seconds(window) for reason, seconds in window.throttle.items()}
