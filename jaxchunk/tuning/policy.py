"""Which chunk count the next steps run with, from what the last ones cost: `step(rules, state, observation)`.

A pure function: no clock, no device, no randomness. An observation is a *window*, some steps in a row with one count.

An *epoch* is a round trip. A champion is watched for some windows at thermal equilibrium; then every challenger is
visited in turn, settles, and its windows are compared with the champion's, place by place, until the interval of the
differences says whether it is better by more than a switch is worth (`intervals`, valid at every look). The best that
is becomes the contender, and is adopted only if it also beats a second visit to the champion at the end of the trip.
For windows of one visit say how well *that visit* is known: two visits to one count differ too, where the level moves
or a controller cycles in another way, and a difference that is not between the counts does not survive the return.

Between epochs the policy is *committed*: it stays, and watches cost, temperature and clock for a change of level
(`drift`). After one it settles again, and only where there is a new level that stays, and the last epoch is long enough
ago, opens the next epoch. That one begins with a single duel: where its outcome is what it was before, everything has
moved alike and the trip is over; else all challengers are visited again. Every epoch that changes nothing doubles the
time to the next: switches that gain nothing grow as the logarithm of time, whatever drifts.

docs/chunk_choice.md has the guarantees and what they rest on.
"""

import dataclasses
import math
from collections.abc import Collection
from typing import Any, Literal, NamedTuple

from jaxchunk.tuning import drift, duels
from jaxchunk.tuning.drift import Baseline, Cusum
from jaxchunk.tuning.duels import Gap
from jaxchunk.tuning.intervals import MeanInterval
from jaxchunk.tuning.observation import SIGNALS, Observation, change_in_words, finite_log

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
      error: probability that an interval of an epoch's way out misses; the way back adds as much.
      worthwhile: a relative gain below this is not worth a switch.
      hopeless: a challenger is left once its visit has lost as much time as if it cost this much more all along; a
        champion visited again, once it is shown to cost this much more than the contender.
      hold_constants: least time between two epochs, in thermal constants; doubled by every epoch that changes nothing.
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
    def loss_s(self) -> float:
        """Most that a visit to a challenger may lose."""
        return self.hopeless * (self.settle_constants + 1) * self.thermal_constant_s

    @property
    def window_s(self) -> float:
        """How long a window should be: the champion is watched for one thermal constant."""
        return self.thermal_constant_s / self.most_windows


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
      champion_costs: logarithms, of the champion's windows at the beginning of this epoch.
      contender: the best challenger of this epoch that is better than the champion then was.
      contender_costs: of its windows.
      queue: challengers that are still to be visited in this epoch.
      gaps: by count, as last measured.
      expected_gap: of the first challenger of an epoch that is not the first, from the one before.
      epoch: its number; 0 is the first.
      exploring: whether it is going on.
      fruitless: epochs after the first that changed nothing, less those that did.
      lost_s: time that the visit has lost against the champion.
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
    contender: int | None = None
    contender_costs: tuple[float, ...] = ()
    queue: tuple[int, ...] = ()
    gaps: tuple[tuple[int, Gap], ...] = ()
    expected_gap: Gap | None = None
    epoch: int = 0
    exploring: bool = True
    fruitless: int = 0
    lost_s: float = 0.0
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
        lost_s = seen.seconds * _share_lost(state, seen)
        state = dataclasses.replace(state, lost_s=state.lost_s + lost_s, excess_s=state.excess_s + max(0.0, lost_s))
    if state.phase == "committed":
        return _watch(state, seen)
    state = dataclasses.replace(state, windows=(*state.windows, seen.signals()), seen=state.seen + 1)
    if state.lost_s > rules.loss_s:
        return _judge(rules, state, _gap(rules, state))
    if state.phase == "settle":
        return _settle(rules, state, seen)
    if _in_duel(state):
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
    if _in_duel(state) and state.current == state.champion and state.seen >= rules.least_windows:
        gap = _gap(rules, state)
        if _largest(state, gap) < -math.log1p(rules.hopeless):
            return _judge(rules, state, gap)
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


def _in_duel(state: State) -> bool:
    """Whether the visit is compared with another: of a challenger, or the second one of a champion with a contender."""
    return state.exploring and (state.current != state.champion or state.contender is not None)


def _gap(rules: Rules, state: State) -> MeanInterval:
    """Of the challenger to the champion, one of which is being visited."""
    error, seen = rules.error / max(1, len(rules.candidates) - 1), _costs(state)
    if state.current == state.champion:
        return duels.interval_of(state.contender_costs, seen, error)
    return duels.interval_of(seen, state.champion_costs, error)


def _largest(state: State, gap: MeanInterval) -> float:
    """The largest gap that is left open; the contender's also has to be likely beside the one that it had before."""
    if state.current != state.champion or state.contender is None:
        return gap.high
    return duels.largest(dict(state.gaps)[state.contender], gap)


def _duel(rules: Rules, state: State) -> tuple[State, Decision]:
    """Compares the challenger with the champion, window by window, until it is shown to be useless or all are seen.

    One that is better is watched to the end, to have as many windows for the return; there it is taken at once.
    """
    returned, worthwhile = state.current == state.champion, math.log1p(rules.worthwhile)
    gap = _gap(rules, state)
    paired = min(len(_costs(state)), len(state.contender_costs if returned else state.champion_costs))
    over = paired >= rules.most_windows or state.seen >= 3 * rules.most_windows
    clear = gap.low > -worthwhile or (returned and _largest(state, gap) < -worthwhile)
    if not over and (paired < rules.least_windows or not clear):
        return state, Decision(state.current)
    return _judge(rules, state, gap)


def _judge(rules: Rules, state: State, gap: MeanInterval) -> tuple[State, Decision]:
    """A duel is over."""
    better = _largest(state, gap) < -math.log1p(rules.worthwhile)
    if state.current == state.champion and state.contender is not None:
        return _end_trip(rules, state, state.contender, gap, better)
    challenger, found = state.current, duels.gap_of(gap)
    reason = f"{challenger} chunks cost {duels.percent(gap)} against {state.champion}"
    if better:
        reason += ": better"
        if state.contender is None or found.mean < dict(state.gaps)[state.contender].mean:
            state = dataclasses.replace(state, contender=challenger, contender_costs=_costs(state))
    else:
        undecided = " (not told apart)" if gap.low <= -math.log1p(rules.worthwhile) else ""
        dear = f", and have lost {state.lost_s:.1f} s" if state.lost_s > rules.loss_s else ""
        reason += f"{undecided}{dear}: no reason to switch"
    state = dataclasses.replace(state, gaps=_sorted(dict(state.gaps) | {challenger: found}))
    if state.expected_gap is not None:  # the first duel of a later epoch: is it worth going on?
        alike = duels.alike(found, state.expected_gap, math.log1p(rules.worthwhile))
        reason += f"; it was {100 * math.expm1(state.expected_gap.mean):+.2f}% before: "
        reason += "everything has moved alike" if alike else "all are visited again"
        state = dataclasses.replace(state, expected_gap=None, queue=() if alike else state.queue)
    return _next_challenger(rules, state, reason)


def _end_trip(rules: Rules, state: State, contender: int, gap: MeanInterval, better: bool) -> tuple[State, Decision]:
    """Back at the champion: the contender has to be better than both of its visits."""
    reason = f"{contender} chunks cost {duels.percent(gap)} against {state.champion} on the way back"
    gaps, found = dict(state.gaps), duels.gap_of(gap)
    if not better:
        state = dataclasses.replace(state, gaps=_sorted(gaps | {contender: found}))
        return _commit(rules, state, f"{reason}: no reason to switch")
    gaps = duels.rebased(gaps, state.champion, contender, found)
    state = dataclasses.replace(state, champion=contender, champion_costs=state.contender_costs, gaps=_sorted(gaps))
    return _commit(rules, state, f"{reason} too: adopted")


def _sorted(gaps: dict[int, Gap]) -> tuple[tuple[int, Gap], ...]:
    return tuple(sorted(gaps.items()))


def _next_challenger(rules: Rules, state: State, reason: str | None = None) -> tuple[State, Decision]:
    """Visits the next of the queue; at its end goes back to the champion, to compare it or to stay."""
    so_far = "" if reason is None else f"{reason}; "
    if state.queue:
        challenger, *rest = state.queue
        state = _visit(dataclasses.replace(state, queue=tuple(rest)), challenger)
        return state, Decision(challenger, "explore", f"{so_far}{challenger} chunks are tried against {state.champion}")
    if state.contender is None:
        return _commit(rules, state, reason)
    back = f"{so_far}{state.champion} chunks are visited again to confirm that {state.contender} are better"
    return _visit(state, state.champion), Decision(state.champion, "return", back)


def _commit(rules: Rules, state: State, reason: str | None) -> tuple[State, Decision]:
    """The epoch is over, and its champion stays."""
    adopted = state.champion == state.contender
    fruitless = max(0, state.fruitless + (-1 if adopted else 1)) if state.epoch else 0
    paid_s = state.excess_s / rules.exploration_share if state.epoch else 0.0
    hold_s = max(rules.hold_constants * rules.thermal_constant_s * 2**fruitless, paid_s)
    state = dataclasses.replace(
        state, exploring=False, fruitless=fruitless, hold_s=hold_s, excess_s=0.0, contender=None, contender_costs=(),
        level=(), reference=(),
    )  # fmt: skip
    if state.current != state.champion:
        state = _visit(state, state.champion)
    stay = f"{state.champion} chunks stay; no other is tried for {hold_s:.0f} s"
    event = "adopt" if adopted else "commit"
    return state, Decision(state.champion, event, stay if reason is None else f"{reason}; {stay}")


def _visit(state: State, num_chunks: int) -> State:
    """The state with a new visit begun, to another count or the same."""
    return dataclasses.replace(
        state, current=num_chunks, switches=state.switches + (num_chunks != state.current), phase="settle",
        phase_s=0.0, settled_c=None, windows=(), seen=0, lost_s=0.0, evidence=(),
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
        f"{name} {change_in_words(name, before[name].mean, now.mean)}"
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
    first = state.fruitless % len(ranked)
    challenger, *others = ranked[first:] + ranked[:first]
    state = dataclasses.replace(
        _visit(state, challenger), exploring=True, epoch=state.epoch + 1, queue=tuple(others), drifted=(),
        expected_gap=gaps[challenger],
    )  # fmt: skip
    return state, Decision(challenger, "reopen", f"{why}; {challenger} chunks are tried against {state.champion}")


def _costs(state: State) -> tuple[float, ...]:
    return tuple(window["cost"] for window in state.windows if "cost" in window)


def _share_lost(state: State, seen: Observation) -> float:
    """Of a challenger's window: what it cost beyond the champion; negative where it cost less."""
    if not state.champion_costs or (log_cost := finite_log(seen.cost)) is None:
        return 0.0
    gap = log_cost - sum(state.champion_costs) / len(state.champion_costs)
    return -math.expm1(-gap)
