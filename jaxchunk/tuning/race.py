"""Which of several candidates is the best, from costs measured in rounds: successive elimination, as a pure function.

Ratios are formed within a round, so that what all candidates share at a time (temperature, another process) cancels.
"""

import itertools
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from jaxchunk.tuning.intervals import UNKNOWN, MeanInterval, anytime_interval

LogCosts = Mapping[int, Mapping[int, float]]  # by candidate, then by round


class Rules(NamedTuple):
    """When a race has an end.

    Attributes:
      error: probability, over the whole race, that a candidate is dropped that is at least as good as all others.
      tolerance: relative difference in cost that nobody cares about.
    """

    error: float = 0.05
    tolerance: float = 0.005


class Standing(NamedTuple):
    """How a race stands.

    Attributes:
      leader: the lowest mean cost among those that are left.
      active: those that are not known to be worse than another.
      to_leader: log of the cost over the leader's, of every candidate (the leader's own is 0).
      finished: whether more rounds would change nothing that matters.
    """

    leader: int
    active: tuple[int, ...]
    to_leader: dict[int, MeanInterval]
    finished: bool


def standing(log_costs: LogCosts, rules: Rules) -> Standing:
    """Who is left, and whether it is over.

    With probability 1 - `rules.error` no candidate is dropped, at whatever round one looks, that is at least as good
    as all others (each of the K (K - 1) / 2 intervals misses with its share of that probability).

    Args:
      log_costs: natural logarithms of costs; a candidate that has been dropped need not be measured any more.
      rules: of the race.
    """
    names = list(log_costs)
    error = rules.error / max(1, len(names) * (len(names) - 1) // 2)
    differences = {(a, b): _difference(log_costs[a], log_costs[b], error) for a, b in itertools.permutations(names, 2)}
    active = [a for a in names if not any(differences[a, b].low > 0 for b in names if b != a)]
    rounds = set.intersection(*(set(log_costs[a]) for a in active))
    means = {a: float(np.mean([log_costs[a][r] for r in rounds])) if rounds else 0.0 for a in active}
    leader = min(active, key=means.__getitem__)
    to_leader = {a: MeanInterval(0.0, 0.0, 0.0) if a == leader else differences[a, leader] for a in names}
    equal = all(to_leader[a].within(rules.tolerance) for a in active)
    return Standing(leader, tuple(active), to_leader, len(active) == 1 or equal)


class Verdict(NamedTuple):
    """The candidate that is taken, and why, in a sentence."""

    winner: int
    reason: str


def verdict(now: Standing, memory_bytes: Mapping[int, int], rules: Rules, what: str) -> Verdict:
    """The end of a race: the best, or of those that are not told apart the one with the smallest memory.

    Where the race was cut short, those that are estimated to be worse by more than the tolerance are not taken, though
    the intervals could not exclude them.

    Args:
      now: how the race stands.
      memory_bytes: by candidate.
      rules: of the race.
      what: the cost's name.
    """
    others = {a: d for a, d in now.to_leader.items() if a != now.leader}
    if len(now.active) == 1:
        if not others:
            return Verdict(now.leader, "the only candidate")
        next_best = min(others, key=lambda a: others[a].mean)
        return Verdict(now.leader, f"least {what}; next is {_relative(next_best, others[next_best])}")
    close = [a for a in now.active if now.to_leader[a].mean <= rules.tolerance]
    winner = min(close, key=lambda a: (memory_bytes[a], a))
    names = ", ".join(map(str, sorted(now.active)))
    if now.finished:
        return Verdict(
            winner,
            f"no difference in {what} between {names} chunks (all within {rules.tolerance:.1%}): "
            f"{winner} takes the least memory of them",
        )
    open_ = "; ".join(_relative(a, others[a]) for a in sorted(now.active) if a != now.leader)
    how = (
        "the least by estimate"
        if len(close) == 1
        else f"the least memory of those estimated within {rules.tolerance:.1%}"
    )
    return Verdict(
        winner,
        f"no difference in {what} could be shown between {names} chunks in the time given (against {now.leader}: "
        f"{open_}): {winner} takes {how}",
    )


def _difference(a: Mapping[int, float], b: Mapping[int, float], error: float) -> MeanInterval:
    rounds = sorted(a.keys() & b.keys())
    return anytime_interval([a[r] - b[r] for r in rounds], error) if rounds else UNKNOWN


def _relative(name: int, log_ratio: MeanInterval) -> str:
    mean, low, high = (100 * np.expm1(np.clip(value, -10, 10)) for value in log_ratio)
    known = np.isfinite([log_ratio.low, log_ratio.high]).all()
    return f"{name} at {mean:+.2f}%" + (f" ({low:+.2f} to {high:+.2f})" if known else " (no interval yet)")
