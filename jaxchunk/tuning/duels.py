"""What windows of two counts say of them: the gap between their costs, and how far it can be believed."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from jaxchunk.tuning.intervals import MeanInterval, anytime_interval

_BENT = 0.25  # of a drift: how far one that saturates within a trip, closing 86% of its way, is from a line (0.24)


class Visit(NamedTuple):
    """What was seen of a count in a row: log costs of windows, the first of which was over at `start_s`."""

    num_chunks: int
    start_s: float
    costs: tuple[float, ...]


class Gap(NamedTuple):
    """Log cost of a count over the champion's, and half the width of its interval (at most 1, which says nothing)."""

    mean: float
    half: float


class Duel(NamedTuple):
    """Gap of a challenger's visit to the champion's before, to its next after, and to what lies between these in time.

    The last has no drift in it that is linear in time; it is a weighted mean of the other two. Its interval is wider by
    a part of the drift, for drift may be bent.
    """

    before: MeanInterval
    after: MeanInterval
    between: MeanInterval
    drift: float  # of the champion, from the one visit to the other


def last_of(num_chunks: int, visits: Sequence[Visit]) -> Visit:
    """The last visit to a count, which there has to be."""
    return next(visit for visit in reversed(visits) if visit.num_chunks == num_chunks)


def since_champion(visits: Sequence[Visit], after: Visit, error: float) -> dict[int, Duel]:
    """The duels of a trip by challenger: `visits`, and `after` them the champion once more.

    Interpolated place by place, so that the noise of all three visits is in the interval.
    """
    before = last_of(after.num_chunks, visits)
    found = {}
    for visit in visits[visits.index(before) + 1 :]:
        share = (visit.start_s - before.start_s) / (after.start_s - before.start_s)
        pairs = list(zip(before.costs, after.costs, strict=False))
        drift = sum(b - a for a, b in pairs) / max(1, len(pairs))
        between = interval_of(visit.costs, [(1 - share) * a + share * b for a, b in pairs], error)
        bent = _BENT * abs(drift)
        found[visit.num_chunks] = Duel(
            interval_of(visit.costs, before.costs, error),
            interval_of(visit.costs, after.costs, error),
            between._replace(low=between.low - bent, high=between.high + bent),
            drift,
        )
    return found


def interval_of(costs: Sequence[float], opponent: Sequence[float], error: float) -> MeanInterval:
    """Of log costs over an opponent's, place by place in their visits: what is left of the transient cancels."""
    return anytime_interval([a - b for a, b in zip(costs, opponent, strict=False)], error)


def gap_of(interval: MeanInterval) -> Gap:
    """What is remembered of an interval."""
    return Gap(interval.mean, min(1.0, interval.high - interval.mean))


def largest(first: Gap, second: MeanInterval) -> float:
    """The largest gap that two duels of the same counts leave open, each with a visit of its own to the champion.

    Windows of one visit say nothing of how visits differ. Intervals that do not overlap do: by what lies between them,
    and a third visit may be as far off once more.
    """
    low, high = first.mean - first.half, first.mean + first.half
    return max(high, second.high) + max(second.low - high, low - second.high, 0.0)


def alike(a: Gap, b: Gap, tolerance: float) -> bool:
    """Whether two gaps may be the same, but for a tolerance."""
    return abs(a.mean - b.mean) <= a.half + b.half + tolerance


def rebased(gaps: dict[int, Gap], old: int, new: int, gap: Gap) -> dict[int, Gap]:
    """Gaps to the champion, where `new` takes the place of `old`, over which it has a `gap`."""
    others = {n: Gap(g.mean - gap.mean, min(1.0, g.half + gap.half)) for n, g in gaps.items() if n != new}
    return others | {old: Gap(-gap.mean, gap.half)}


def percent(gap: MeanInterval) -> str:
    """In words: the cost over the champion's."""
    if not math.isfinite(gap.low):
        return f"{100 * math.expm1(gap.mean):+.2f}%"
    mean, low, high = (100 * math.expm1(min(value, 20.0)) for value in gap)
    return f"{mean:+.2f}% ({low:+.2f} to {high:+.2f})"


def in_words(champion: int, duels: dict[int, Duel]) -> str:
    """What a trip says: gaps with the drift in them, and without."""
    gaps = (
        f"{n} chunks cost {percent(duel.before)} as measured, {percent(duel.between)} with that drift taken out"
        for n, duel in duels.items()
    )
    drift = next(iter(duels.values())).drift  # the champion's
    return f"{champion} chunks cost {100 * math.expm1(drift):+.2f}% against their visit before; {', '.join(gaps)}"
