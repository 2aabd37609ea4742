"""Which chunk count the next steps run with, from what the last ones cost: `step(rules, state, observation)`.

A pure function: no clock, no device, no randomness. An observation is a *window*, some steps in a row with one count.

An *epoch* finds the best count by duels. A champion is watched for some windows at thermal equilibrium; then every
challenger is visited in turn, settles, and its windows are compared with the champion's, place by place, until the
interval of the differences says whether it is better by more than a switch is worth (`intervals`, valid at every look).
A challenger that is becomes the champion; all others are visited once and left.

Between epochs the policy is *committed*: it stays, and watches cost, temperature and clock for a change of level
(`drift`). After one it settles again, and only where there is a new level that stays, and the last epoch is long enough
ago to have paid for itself, opens the next epoch. That one begins with a single duel: where its outcome is what it was
before, everything has moved alike and the epoch ends; else all challengers are visited again. An epoch that has found
a new champion is followed by one that begins with the old one: if the level moved between their two visits, it shows.

docs/chunk_choice.md has the guarantees and what they rest on.
"""

import dataclasses
import math
from collections.abc import Collection
from typing import Any, Literal, NamedTuple

from jaxchunk.tuning import drift
from jaxchunk.tuning.drift import Baseline, Cusum
from jaxchunk.tuning.intervals import MeanInterval, anytime_interval
from jaxchunk.tuning.observation import SIGNALS, Observation, finite_log

Phase = Literal["settle", "measure", "committed"]


@dataclasses.dataclass(frozen=True)
class Rules:
    """What the policy is told.

    Attributes:
      candidates: the counts that it may choose.
      thermal_constant_s: in which the device's temperature comes 63% of the way to its new level.
      settle_constants: after a switch nothing is compared for so many thermal constants.
      least_windows: in a duel before it is decided.
      most_windows: of the champion and in a duel.
      error: probability that an epoch decides some duel wrongly.
      worthwhile: a relative gain below this is not worth a switch.
      hopeless: a challenger that is shown to cost this much more while it still settles is left at once.
      hold_constants: least time between two epochs, in thermal constants.
      exploration_share: largest share of the time that epochs after the first may cost in the long run.
    """

    candidates: tuple[int, ...]
    thermal_constant_s: float = 30.0
    settle_constants: float = 2.0
    least_windows: int = 6
    most_windows: int = 20
    error: float = 0.05
    worthwhile: float = 0.005
    hopeless: float = 0.03
    hold_constants: float = 10.0
    exploration_share: float = 0.003

    @property
    def window_s(self) -> float:
        """How long a window should be: the champion is watched for one thermal constant."""
        return self.thermal_constant_s / self.most_windows


class Gap(NamedTuple):
    """Log cost of a count over the champion's, and half the width of its interval (at most 1, which says nothing)."""

    mean: float
    half: float


class Decision(NamedTuple):
    """What the next steps run with. `event` names what happened, `reason` says why; None where nothing did."""

    num_chunks: int
    event: str | None = None
    reason: str | None = None


@dataclasses.dataclass(frozen=True)
class State:
    """Everything that the policy remembers; JSON values but for tuples (`state_from_json`).

    Attributes:
      current: the count that steps run with.
      champion: the best so far.
      phase: of the visit to `current`.
      phase_s: seconds in it.
      settled_c: the temperature a thermal constant ago, to see whether it still moves.
      windows: signals of the visit's windows.
      seen: windows of the visit, unknown ones too.
      champion_costs: logarithms, of the champion's windows in this epoch.
      queue: challengers that are still to be visited in this epoch.
      gaps: by count, as last measured.
      expected_gap: of the first challenger of an epoch that is not the first, from the one before.
      epoch: its number; 0 is the first.
      exploring: whether it is going on.
      fruitless: epochs in a row that found everything as before.
      dethroned: the champion that the last epoch began with and replaced, until it has been tried again.
      excess_s: time that this epoch has lost on worse counts.
      hold_s: before the next epoch may open.
      level: baselines of signals since they last changed, by name, while committed.
      reference: those just after the last epoch.
      evidence: of drift, by name.
      drifted: what has been alarmed about since, or empty.
      switches: so far.
    """

    current: int
    champion: int
    phase: Phase = "settle"
    phase_s: float = 0.0
    settled_c: float | None = None
    windows: tuple[dict[str, float], ...] = ()
    seen: int = 0
    champion_costs: tuple[float, ...] = ()
    queue: tuple[int, ...] = ()
    gaps: tuple[tuple[int, Gap], ...] = ()
    expected_gap: Gap | None = None
    epoch: int = 0
    exploring: bool = True
    fruitless: int = 0
    dethroned: int | None = None
    excess_s: float = 0.0
    hold_s: float = 0.0
    level: tuple[tuple[str, Baseline], ...] = ()
    reference: tuple[tuple[str, Baseline], ...] = ()
    evidence: tuple[tuple[str, Cusum], ...] = ()
    drifted: tuple[str, ...] = ()
    switches: int = 0


def first_count(candidates: Collection[int]) -> int:
    """The count to begin with: the middle one, which is the least likely to be far off."""
    return sorted(candidates)[len(candidates) // 2]


def initial_state(rules: Rules) -> State:
    """The first epoch, beginning at `first_count`; the others follow by their distance to it."""
    start = first_count(rules.candidates)
    others = sorted((n for n in rules.candidates if n != start), key=lambda n: (abs(math.log2(n / start)), -n))
    return State(start, start, queue=tuple(others))


def step(rules: Rules, state: State, seen: Observation) -> tuple[State, Decision]:
    """Takes in a window and decides.

    Args:
      rules: the same every time.
      state: from the last call, or `initial_state`.
      seen: a window. One of another count than `state.current` (its steps were on their way) only takes time.
    """
    state = dataclasses.replace(state, hold_s=max(0.0, state.hold_s - seen.seconds))
    if seen.num_chunks != state.current:
        return state, Decision(state.current)
    state = dataclasses.replace(state, phase_s=state.phase_s + seen.seconds)
    if state.exploring and state.current != state.champion:
        state = dataclasses.replace(state, excess_s=state.excess_s + seen.seconds * _share_lost(state, seen))
    if state.phase == "committed":
        return _watch(state, seen)
    state = dataclasses.replace(state, windows=(*state.windows, seen.signals()), seen=state.seen + 1)
    if state.phase == "settle":
        return _settle(rules, state, seen)
    if state.current != state.champion:
        return _duel(rules, state)
    wanted = rules.most_windows * (2 if state.drifted else 1)  # twice, so that a level shows that it stays
    if len(_costs(state)) < wanted and state.seen < 3 * wanted:
        return state, Decision(state.current)
    if state.exploring:
        return _next_challenger(rules, dataclasses.replace(state, champion_costs=_costs(state)))
    return _take_level(rules, state)


def resumed(state: State) -> State:
    """The state with its visit begun anew: a device that has rested has to settle, and its level is in doubt."""
    drifted = state.drifted if state.exploring else (*state.drifted, "resumed")
    return dataclasses.replace(_visit(state, state.current), drifted=drifted)


def state_from_json(record: dict[str, Any]) -> State:
    """The state from `dataclasses.asdict`, through JSON."""
    pairs: dict[str, Any] = {"level": Baseline, "reference": Baseline, "evidence": Cusum, "gaps": Gap}
    tuples: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in record.items()
    }
    tuples |= {name: tuple((key, kind(*values)) for key, values in record[name]) for name, kind in pairs.items()}
    expected = record["expected_gap"]
    tuples |= {"expected_gap": None if expected is None else Gap(*expected)}
    return State(**tuples)


def _settle(rules: Rules, state: State, seen: Observation) -> tuple[State, Decision]:
    """Waits for thermal equilibrium: some constants, and then until the temperature stands still (within reason)."""
    gap = _gap(rules, state) if state.current != state.champion else None
    if gap is not None and state.seen >= rules.least_windows and gap.low > math.log1p(rules.hopeless):
        return _no_switch(rules, state, gap)
    constant_s, least = rules.thermal_constant_s, rules.settle_constants
    constants, before = state.phase_s / constant_s, (state.phase_s - seen.seconds) / constant_s
    if math.floor(constants) > math.floor(before):
        moved = (
            state.settled_c is not None
            and seen.temperature_c is not None
            and abs(seen.temperature_c - state.settled_c) >= SIGNALS["temperature"].change / 2
        )
        state = dataclasses.replace(state, settled_c=seen.temperature_c)
        if constants >= 3 * least or (constants >= least and not moved):
            state = dataclasses.replace(state, phase="measure", phase_s=0.0, windows=(), seen=0, settled_c=None)
    return state, Decision(state.current)


def _gap(rules: Rules, state: State) -> MeanInterval:
    """Of the challenger's windows to the champion's, place by place, in logarithms of cost."""
    differences = [a - b for a, b in zip(_costs(state), state.champion_costs, strict=False)]
    return anytime_interval(differences, rules.error / max(1, len(rules.candidates) - 1))


def _duel(rules: Rules, state: State) -> tuple[State, Decision]:
    """Compares the challenger with the champion, window by window, and decides once that is clear."""
    gap, worthwhile = _gap(rules, state), math.log1p(rules.worthwhile)
    paired = min(len(_costs(state)), len(state.champion_costs))
    over = paired >= rules.most_windows or state.seen >= 3 * rules.most_windows
    if paired < rules.least_windows and not over:
        return state, Decision(state.current)
    if gap.high < -worthwhile:
        return _adopt(state, gap)
    if gap.low <= -worthwhile and not over:
        return state, Decision(state.current)
    return _no_switch(rules, state, gap)


def _adopt(state: State, gap: MeanInterval) -> tuple[State, Decision]:
    """The challenger becomes the champion, and stays where it is."""
    half = min(1.0, gap.high - gap.mean)
    gaps = {n: Gap(g.mean - gap.mean, min(1.0, g.half + half)) for n, g in state.gaps}
    gaps[state.champion] = Gap(-gap.mean, half)
    gaps.pop(state.current, None)
    reason = f"{state.current} chunks cost {_percent(gap)} against {state.champion}: adopted"
    first = state.dethroned is None or state.dethroned == state.current
    state = dataclasses.replace(
        state, champion=state.current, gaps=tuple(sorted(gaps.items())), fruitless=0, expected_gap=None,
        dethroned=state.champion if first else state.dethroned,
    )  # fmt: skip
    return state, Decision(state.current, "adopt", reason)


def _no_switch(rules: Rules, state: State, gap: MeanInterval) -> tuple[State, Decision]:
    """The challenger is left."""
    undecided = " (not told apart)" if gap.low <= -math.log1p(rules.worthwhile) else ""
    reason = f"{state.current} chunks cost {_percent(gap)} against {state.champion}{undecided}: no reason to switch"
    found = Gap(gap.mean, min(1.0, gap.high - gap.mean))
    state = dataclasses.replace(state, gaps=tuple(sorted((dict(state.gaps) | {state.current: found}).items())))
    if state.expected_gap is not None:
        state, compared = _compare_with_before(state, found, math.log1p(rules.worthwhile), state.expected_gap)
        reason += compared
    return _next_challenger(rules, state, reason)


def _compare_with_before(state: State, found: Gap, worthwhile: float, expected: Gap) -> tuple[State, str]:
    """After the first duel of a later epoch: is it worth going on?"""
    confirms = state.dethroned == state.current
    state = dataclasses.replace(state, expected_gap=None, dethroned=None if confirms else state.dethroned)
    said = f"; it was {100 * math.expm1(expected.mean):+.2f}% before: "
    if abs(found.mean - expected.mean) <= found.half + expected.half + worthwhile:
        fruitless = state.fruitless if confirms else state.fruitless + 1
        return dataclasses.replace(state, queue=(), fruitless=fruitless), f"{said}everything has moved alike"
    return dataclasses.replace(state, fruitless=0), f"{said}all are visited again"


def _next_challenger(rules: Rules, state: State, reason: str | None = None) -> tuple[State, Decision]:
    """Visits the next of the queue; at its end, the champion for good."""
    if state.queue:
        challenger, *rest = state.queue
        state = _visit(dataclasses.replace(state, queue=tuple(rest)), challenger)
        explore = f"{challenger} chunks are tried against {state.champion}"
        return state, Decision(challenger, "explore", explore if reason is None else f"{reason}; {explore}")
    paid_s = state.excess_s / rules.exploration_share if state.epoch else 0.0
    hold_s = max(rules.hold_constants * rules.thermal_constant_s * 2**state.fruitless, paid_s)
    state = dataclasses.replace(
        _visit(state, state.champion), exploring=False, hold_s=hold_s, excess_s=0.0, level=(), reference=()
    )
    commit = f"{state.champion} chunks stay; no other is tried for {hold_s:.0f} s"
    return state, Decision(state.champion, "commit", commit if reason is None else f"{reason}; {commit}")


def _visit(state: State, num_chunks: int) -> State:
    """The state with a new visit begun, to another count or the same."""
    return dataclasses.replace(
        state, current=num_chunks, switches=state.switches + (num_chunks != state.current), phase="settle",
        phase_s=0.0, settled_c=None, windows=(), seen=0, evidence=(),
    )  # fmt: skip


def _take_level(rules: Rules, state: State) -> tuple[State, Decision]:
    """A committed champion has been watched at equilibrium: is its level the one of its epoch?

    Just after an epoch, "before" is what the champion cost in it: a change in between makes its duels worthless.
    """
    level = {}
    for name, signal in SIGNALS.items():
        values = [window[name] for window in state.windows if name in window]
        if len(values) >= rules.least_windows:
            level[name] = drift.baseline(values, signal.least_std)
            if state.drifted and not drift.steady(values, signal.change):
                return _visit(state, state.current), Decision(state.current)
    before = dict(state.reference)
    if not before and len(state.champion_costs) > 1:
        before = {"cost": drift.baseline(state.champion_costs, SIGNALS["cost"].least_std)}
    moved = tuple(
        f"{name} {_moved(name, before[name].mean, now.mean)}"
        for name, now in level.items()
        if name in before and drift.apart(before[name], now, SIGNALS[name].change, rules.most_windows)
    )
    alarmed, first = bool(state.drifted), not state.reference
    state = dataclasses.replace(
        state, phase="committed", level=tuple(level.items()), reference=state.reference or tuple(level.items()),
        evidence=(), windows=(), champion_costs=_costs(state)[-rules.most_windows :] or state.champion_costs,
        drifted=moved,
    )  # fmt: skip
    if not moved:
        steady = ("steady", "the level is what it was after the last epoch") if alarmed else (None, None)
        return state, Decision(state.current, *steady)
    why = f"the regime has changed {'during the epoch ' if first else ''}({', '.join(moved)})"
    if state.hold_s > 0:
        return state, Decision(state.current, "hold", f"{why}; no other count is tried for {state.hold_s:.0f} s more")
    return _open_epoch(state, why)


def _watch(state: State, seen: Observation) -> tuple[State, Decision]:
    """Committed: looks for drift, and opens the epoch that had to wait."""
    if state.hold_s <= 0 and state.drifted:
        return _open_epoch(state, f"the regime had changed ({', '.join(state.drifted)})")
    if state.hold_s <= 0 and state.dethroned is not None:
        return _open_epoch(state, "a new champion is put to the test once more")
    level, evidence, alarms = dict(state.level), dict(state.evidence), []
    for name, value in seen.signals().items():
        if name in level:
            evidence[name], alarm = drift.updated(evidence.get(name, Cusum()), value, level[name], SIGNALS[name].change)
            alarms += [name] if alarm else []
    if not alarms:
        return dataclasses.replace(state, evidence=tuple(evidence.items())), Decision(state.current)
    state = dataclasses.replace(_visit(state, state.current), drifted=tuple(alarms))
    return state, Decision(state.current, "drift", f"{' and '.join(alarms)} drifted: waiting for a new level")


def _open_epoch(state: State, why: str) -> tuple[State, Decision]:
    """Tries one challenger first, another one each time nothing had changed, the nearest before the others."""
    gaps = dict(state.gaps)
    ranked = sorted(gaps, key=lambda n: gaps[n].mean)
    if not ranked:  # one candidate
        return dataclasses.replace(state, drifted=()), Decision(state.current, "steady", f"{why}; there is no other")
    first = state.fruitless % len(ranked) if state.dethroned is None else ranked.index(state.dethroned)
    challenger, *others = ranked[first:] + ranked[:first]
    state = dataclasses.replace(
        _visit(state, challenger), exploring=True, epoch=state.epoch + 1, queue=tuple(others), drifted=(),
        expected_gap=gaps[challenger],
    )  # fmt: skip
    return state, Decision(challenger, "reopen", f"{why}; {challenger} chunks are tried against {state.champion}")


def _costs(state: State) -> tuple[float, ...]:
    return tuple(window["cost"] for window in state.windows if "cost" in window)


def _share_lost(state: State, seen: Observation) -> float:
    """Of a challenger's window: what it cost beyond the champion."""
    if not state.champion_costs or (log_cost := finite_log(seen.cost)) is None:
        return 0.0
    gap = log_cost - sum(state.champion_costs) / len(state.champion_costs)
    return max(0.0, -math.expm1(-gap))


def _percent(gap: MeanInterval) -> str:
    if not math.isfinite(gap.low):
        return f"{100 * math.expm1(gap.mean):+.2f}%"
    mean, low, high = (100 * math.expm1(min(value, 20.0)) for value in gap)
    return f"{mean:+.2f}% ({low:+.2f} to {high:+.2f})"


def _moved(name: str, before: float, after: float) -> str:
    if name == "temperature":
        return f"{after - before:+.1f} C"
    if name == "throttle":
        return f"{100 * (after - before):+.0f}% of the time"
    return f"{100 * math.expm1(after - before):+.1f}%"
