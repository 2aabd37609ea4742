"""Coordinate descent over configurations that are frozen dataclasses, within a budget of time.

A dimension is a set of replacements of one or several fields, tried one by one with everything else as it is. What
depends on a replaced field follows it (`Space.adapted`), so that a tile is not judged by a pipeline made for another.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Generic, NamedTuple

from jaxchunk.lm_head.kernels.tuned import Config


@dataclasses.dataclass(frozen=True)
class Space(Generic[Config]):
    """What may be tried.

    Attributes:
      dimensions: by name, the replacements to try: fields and their values.
      adapted: brings fields that depend on the dimension that was replaced in line with it.
    """

    dimensions: Mapping[str, Sequence[Mapping[str, Any]]]
    adapted: Callable[[Config, str], Config]

    def neighbours(self, config: Config, dimension: str) -> Iterator[Config]:
        """Configurations that differ in one dimension (and what follows from it) and that the kernel can run with."""
        for replacement in self.dimensions[dimension]:
            candidate = self.adapted(dataclasses.replace(config, **replacement), dimension)
            if candidate != config and candidate.obstacle is None:
                yield candidate


class Search(NamedTuple):
    """How a search ended.

    Attributes:
      costs: of every configuration that was tried, or known; None where it does not work.
      finished: False where the time was over first.
    """

    costs: dict[Any, float | None]
    finished: bool

    def within(self, factor: float) -> list[Any]:
        """Configurations that cost at most `factor` times what the best does, the best first."""
        working = {config: cost for config, cost in self.costs.items() if cost is not None}
        bound = factor * min(working.values(), default=0.0)
        return sorted((config for config, cost in working.items() if cost <= bound), key=working.__getitem__)


class _TimeIsOverError(Exception):
    pass


def search(
    space: Space[Config],
    starts: Sequence[Config],
    evaluate: Callable[[Config], float | None],
    *,
    budget_s: float,
    known: Mapping[Config, float | None] | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Search:
    """Descends from every start, the best first, until no single dimension improves on it.

    Args:
      space: what may be tried.
      starts: where to begin; all are evaluated first.
      evaluate: the cost of a configuration, or None where it does not work; asked once for each.
      budget_s: no evaluation begins after so many seconds.
      known: costs that need no evaluation.
      clock: seconds.
    """
    costs = dict(known or {})
    end_s = clock() + budget_s

    def cost(config: Config) -> float:
        if config not in costs:
            if clock() >= end_s:
                raise _TimeIsOverError
            costs[config] = evaluate(config)
        value = costs[config]
        return math.inf if value is None else value

    try:
        for start in sorted(starts, key=cost):
            _descend(space, start, cost)
    except _TimeIsOverError:
        return Search(costs, finished=False)
    return Search(costs, finished=True)


def _descend(space: Space[Config], current: Config, cost: Callable[[Config], float]) -> None:
    improved = True
    while improved:
        improved = False
        for dimension in space.dimensions:
            best = min(space.neighbours(current, dimension), key=cost, default=current)
            if cost(best) < cost(current):
                current, improved = best, True
