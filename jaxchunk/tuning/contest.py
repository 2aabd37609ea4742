"""Measures candidates against each other until they are told apart, or the time is up."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping

import jax

from jaxchunk.measuring.protocol import Conditions, Measurement, Protocol, Variant, measure, settle
from jaxchunk.stop import no_stop
from jaxchunk.telemetry import AnyMonitor
from jaxchunk.tuning.objective import Objective, cost
from jaxchunk.tuning.race import Rules, Standing, standing

BUDGETS_S: dict[Objective, float] = {"time": 30.0, "energy": 120.0, "edp": 120.0}
_ROUNDS_AIMED_AT = 10  # of all candidates; those that are dropped leave their time to the others
_WINDOW_S = {"time": (0.02, 0.5), "energy": (1.0, 2.0)}  # shortest and longest; a counter ticks every 0.1 s
_HEATING_SHARE = 0.1  # of the budget: a cold device's clocks rank programs wrongly
_WARMUP_SHARE = 0.25  # of a window's calls
_MOST_ROUNDS = 500


@dataclasses.dataclass(frozen=True)
class Contest:
    """What was measured.

    Attributes:
      standing: how it ended.
      measurements: all of them; `repeat` is the round, and `energy_j` is of whole ticks.
      seconds: that it took.
    """

    standing: Standing
    measurements: list[Measurement]
    seconds: float


def hold(
    variants: Mapping[int, Variant],
    monitor: AnyMonitor,
    objective: Objective,
    *,
    budget_s: float,
    rules: Rules,
    say: Callable[[str], None],
    check: Callable[[], None] = no_stop,
) -> Contest | None:
    """Measures all candidates in rounds, in an order shuffled anew each time, by the benchmarks' protocol.

    Args:
      variants: by candidate.
      monitor: started; for the time alone one without a device will do, and costs no waiting for a counter.
      objective: what is compared.
      budget_s: time for all of it; a window that would not end in it is not begun.
      rules: of the race.
      say: takes a line about the progress.
      check: called before every call of a variant; what it raises ends this.

    Returns:
      The contest; None where the objective was not known in any window.
    """
    began_s = monitor.now()
    deadline_s = began_s + budget_s
    protocol, conditions = _prepare(variants, monitor, objective, budget_s, check)
    names = {variant.name: n for n, variant in variants.items()}
    log_costs: dict[int, dict[int, float]] = {n: {} for n in variants}
    measurements: list[Measurement] = []
    stand = standing(log_costs, rules)
    longest_s, said_s = 0.0, began_s
    for round_ in range(_MOST_ROUNDS):
        order = measure(
            [variants[n] for n in stand.active],
            monitor,
            dataclasses.replace(protocol, seed=round_),
            conditions,
            check=check,
        )
        while monitor.now() + longest_s < deadline_s or not measurements:
            start_s = monitor.now()
            if (measurement := next(order, None)) is None:
                break
            longest_s = max(longest_s, monitor.now() - start_s)
            measurement = dataclasses.replace(
                measurement, repeat=round_, energy_j=_energy_of_whole_ticks_j(monitor, measurement)
            )
            measurements.append(measurement)
            value = cost(objective, measurement.time_s, measurement.energy_j)
            if value is not None and measurement.invalid_reason is None:
                log_costs[names[measurement.variant]][round_] = math.log(value)
        else:
            break
        monitor.forget_before(monitor.now() - 5.0)
        stand = standing(log_costs, rules)
        if stand.finished or (round_ == 0 and not any(log_costs.values())):
            break
        if monitor.now() - said_s > 5.0:
            said_s = monitor.now()
            say(f"{said_s - began_s:.0f} of at most {budget_s:.0f} s: {len(stand.active)} of {len(variants)} are left")
    if not any(log_costs.values()):
        return None
    return Contest(standing(log_costs, rules), measurements, monitor.now() - began_s)


def _prepare(
    variants: Mapping[int, Variant],
    monitor: AnyMonitor,
    objective: Objective,
    budget_s: float,
    check: Callable[[], None],
) -> tuple[Protocol, Conditions]:
    """Counts the calls of a window and brings the device to its working temperature.

    From then on it is kept there by work: every window has a warm-up that is long beside the pause before it. Waiting
    for a common temperature, as longer benchmarks do, would take most of the budget.
    """
    shortest_s, longest_s = _WINDOW_S["time" if objective == "time" else "energy"]
    share_s = (1 - _HEATING_SHARE) * budget_s / (_ROUNDS_AIMED_AT * len(variants))
    protocol = Protocol(
        repeats=1,
        window_s=min(max(share_s, shortest_s), longest_s) / (1 + _WARMUP_SHARE),
        temperature_tolerance_c=None,
    )
    heat_until_s = monitor.now() + _HEATING_SHARE * budget_s
    conditions = settle(list(variants.values()), monitor, protocol, check=check)
    for variant in itertools.cycle(variants.values()):
        if monitor.now() >= heat_until_s:
            break
        check()
        jax.block_until_ready(variant.call())
    warmup_calls = math.ceil(_WARMUP_SHARE * min(conditions.calls.values()))
    return dataclasses.replace(protocol, warmup_calls=warmup_calls), conditions


def _energy_of_whole_ticks_j(monitor: AnyMonitor, measurement: Measurement) -> float | None:
    """Joules of a call: mean power from the first to the last tick of the counter in the window, times its time.

    Between ticks the counter is interpolated; at ticks it is known. A window with too few of them keeps what it has.
    """
    start_s, end_s = monitor.start_s + measurement.start_s, monitor.start_s + measurement.end_s
    ticks_s = monitor.energy_ticks_s(start_s, end_s)
    if len(ticks_s) < 2 or ticks_s[-1] - ticks_s[0] < 0.5 * (end_s - start_s):
        return measurement.energy_j
    window = monitor.window(ticks_s[0], ticks_s[-1])
    if window.energy_j is None or window.power_w is None:
        return measurement.energy_j
    return window.power_w * measurement.time_s
