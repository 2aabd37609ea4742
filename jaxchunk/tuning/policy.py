"""Which chunk count the next steps run with, from what the last ones cost: `step(rules, state, observation)`.

A pure function: no clock, no device, no randomness. An observation is a *window*, some steps in a row with one count.

An *epoch* is a round trip. A champion is watched for some windows at thermal equilibrium; then every challenger is
visited in turn, settles, and is watched likewise; then the champion is visited again. Only then is judged (`duels`): a
challenger that is better than both visits of the champion, by more than a switch is worth, is adopted. Windows of one
visit say how well *that visit* is known: two visits to one count differ too, where the level drifts or jumps or a
controller cycles in another way. What the two of the champion say of drift is taken out by interpolation; a challenger
that is better only then gets a second look, beside the champion once more, and has to be better there again.

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
from jaxchunk.tuning.duels import Duel, Gap, Visit
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
      error: probability that the drift-free intervals of an epoch miss; a second look adds as much.
      worthwhile: a relative gain below this is not worth a switch.
      hopeless: a challenger is left once its visit has lost as much time as if it cost this much more all along, or
        once it is shown to cost this much more; a champion visited again, once it is by so much dearer than another.
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
      windows: signals of the visit's windows, and when on `clock_s` each was over; while committed the latest.
      seen: windows of the visit, unknown ones too.
      clock_s: seconds that all windows together took, of other counts too.
      visits: those of this epoch that are over, in order; the first is of the champion.
      second_look: whether the challenger that is visited, or was just now, had its turn before in this epoch.
      queue: challengers that are still to be visited in this epoch.
      gaps: by count, at the end of the last epoch that measured them, drift taken out.
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
    clock_s: float = 0.0
    visits: tuple[Visit, ...] = ()
    second_look: bool = False
    queue: tuple[int, ...] = ()
    gaps: tuple[tuple[int, Gap], ...] = ()
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
    clock_s = state.clock_s + seen.seconds
    state = dataclasses.replace(state, clock_s=clock_s, hold_s=max(0.0, state.hold_s - seen.seconds))
    if seen.num_chunks != state.current:
        return state, Decision(state.current)
    state = dataclasses.replace(state, phase_s=state.phase_s + seen.seconds)
    if state.exploring and state.current != state.champion:
        lost_s = seen.seconds * _share_lost(state, seen)
        state = dataclasses.replace(state, lost_s=state.lost_s + lost_s, excess_s=state.excess_s + max(0.0, lost_s))
    if state.phase == "committed":
        return _watch(rules, state, seen)
    state = dataclasses.replace(state, windows=(*state.windows, _signals(state, seen)), seen=state.seen + 1)
    if state.lost_s > rules.loss_s:
        return _leave(rules, state)
    if state.phase == "settle":
        return _settle(rules, state, seen)
    known, wanted = len(_visit_to_date(state).costs), rules.most_windows
    if state.current != state.champion and known >= rules.least_windows:
        wanted = known if _as_measured(rules, state).low > math.log1p(rules.hopeless) else wanted
    wanted *= 2 if state.drifted else 1  # so that a level shows that it stays
    if known < wanted and state.seen < 3 * wanted:
        return state, Decision(state.current)
    if not state.exploring:
        return _take_level(rules, state)
    if state.current != state.champion:
        return _leave(rules, state)
    if _returned(state):
        return _end_trip(rules, state)
    return _next_challenger(rules, dataclasses.replace(state, visits=(_visit_to_date(state),)))


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
    tuples |= {"visits": tuple(Visit(n, start_s, tuple(costs)) for n, start_s, costs in record["visits"])}
    return State(**tuples)


def _settle(rules: Rules, state: State, seen: Observation) -> tuple[State, Decision]:
    """Waits for thermal equilibrium: some constants, and then until the temperature stands still (within reason)."""
    if _returned(state) and state.seen >= rules.least_windows:
        _, low_enough = _best(rules, state, _duels(rules, state), rules.hopeless)
        if low_enough:
            return _end_trip(rules, state)
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


def _returned(state: State) -> bool:
    """Whether the visit is the champion's at the end of a trip."""
    return state.exploring and state.current == state.champion and len(state.visits) > 1


def _leave(rules: Rules, state: State) -> tuple[State, Decision]:
    """The visit to a challenger is over. What it says is of the way out, with drift in it."""
    gap = _as_measured(rules, state)
    reason = f"{state.current} chunks cost {duels.percent(gap)} against {state.champion}"
    if state.lost_s > rules.loss_s:
        reason += f", and have lost {state.lost_s:.1f} s"
    if state.epoch and len(state.visits) == 1:  # the first duel of a later epoch: is it worth going on?
        expected = dict(state.gaps)[state.current]
        alike = duels.alike(duels.gap_of(gap), expected, math.log1p(rules.worthwhile))
        reason += f"; it was {100 * math.expm1(expected.mean):+.2f}% before: "
        reason += "everything has moved alike" if alike else "all are visited again"
        state = dataclasses.replace(state, queue=() if alike else state.queue)
    return _next_challenger(rules, dataclasses.replace(state, visits=(*state.visits, _visit_to_date(state))), reason)


def _next_challenger(rules: Rules, state: State, reason: str | None = None) -> tuple[State, Decision]:
    """Visits the next of the queue; at its end goes back to the champion."""
    so_far = "" if reason is None else f"{reason}; "
    if state.queue:
        challenger, *rest = state.queue
        state = _visit(dataclasses.replace(state, queue=tuple(rest)), challenger)
        return state, Decision(challenger, "explore", f"{so_far}{challenger} chunks are tried against {state.champion}")
    if len(state.visits) == 1:
        return _commit(rules, state, reason)
    back = f"{so_far}{state.champion} chunks are visited again, to see what they cost now"
    return _visit(state, state.champion), Decision(state.champion, "return", back)


def _end_trip(rules: Rules, state: State) -> tuple[State, Decision]:
    """Back at the champion: what is better than both of its visits is adopted, after a second look what is so twice."""
    found = _duels(rules, state)
    best, confirmed = _best(rules, state, found, rules.worthwhile)
    gaps = dict(state.gaps) | {n: duels.gap_of(duel.between) for n, duel in found.items()}
    reason = duels.in_words(state.champion, found)
    if confirmed and best is not None:
        gaps = duels.rebased(gaps, state.champion, best, gaps[best])
        state = dataclasses.replace(state, champion=best, gaps=tuple(sorted(gaps.items())))
        return _commit(rules, state, f"{reason}: {best} adopted", adopted=True)
    state = dataclasses.replace(state, gaps=tuple(sorted(gaps.items())))
    if best is None or state.second_look:
        return _commit(rules, state, f"{reason}: no reason to switch")
    if abs(found[best].drift) > math.log1p(rules.hopeless):
        return _commit(rules, state, f"{reason}: its level has moved too far to tell")
    state = dataclasses.replace(state, visits=(*state.visits, _visit_to_date(state)), second_look=True)
    return _visit(state, best), Decision(best, "confirm", f"{reason}: {best} chunks are tried once more")


def _duels(rules: Rules, state: State) -> dict[int, Duel]:
    """Of the challengers visited since the champion was, the visit to which goes on."""
    return duels.since_champion(state.visits, _visit_to_date(state), _error(rules))


def _best(rules: Rules, state: State, found: dict[int, Duel], gain: float) -> tuple[int | None, bool]:
    """The best challenger that is better by a `gain` once drift is taken out, and whether that is confirmed.

    It is by both visits of the champion, whatever the drift was in between; or by a second trip, as by the first.
    """
    gain = math.log1p(gain)
    better = {n: duel for n, duel in found.items() if duel.between.high < -gain}
    confirmed = set()
    for n, duel in better.items():
        twice = (dict(state.gaps)[n], duel.between) if state.second_look else (duels.gap_of(duel.before), duel.after)
        confirmed |= {n} if duels.largest(*twice) < -gain else set()
    return min(confirmed or better, key=lambda n: better[n].between.mean, default=None), bool(confirmed)


def _commit(rules: Rules, state: State, reason: str | None, *, adopted: bool = False) -> tuple[State, Decision]:
    """The epoch is over, and its champion stays."""
    fruitless = max(0, state.fruitless + (-1 if adopted else 1)) if state.epoch else 0
    paid_s = state.excess_s / rules.exploration_share if state.epoch else 0.0
    hold_s = max(rules.hold_constants * rules.thermal_constant_s * 2**fruitless, paid_s)
    state = dataclasses.replace(
        state, exploring=False, fruitless=fruitless, hold_s=hold_s, excess_s=0.0, second_look=False,
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

    Just after an epoch, "before" is what the champion cost in it: a jump in between makes its duels worthless, and
    cannot be told from drift.
    """
    level = {}
    for name, signal in SIGNALS.items():
        values = [window[name] for window in state.windows if name in window]
        if len(values) >= rules.least_windows:
            level[name] = drift.baseline(values, signal.least_std)
            if state.drifted and not drift.steady(values, signal.change):
                return _visit(state, state.current), Decision(state.current)
    before = dict(state.reference)
    earlier = [visit.costs for visit in state.visits if visit.num_chunks == state.champion and len(visit.costs) > 1]
    if not before and earlier:
        before = {"cost": drift.baseline(earlier[0], SIGNALS["cost"].least_std)}
    moved = tuple(
        f"{name} {change_in_words(name, before[name].mean, now.mean)}"
        for name, now in level.items()
        if name in before and drift.apart(before[name], now, SIGNALS[name].change, rules.most_windows)
    )
    alarmed, first = bool(state.drifted), not state.reference
    state = dataclasses.replace(
        state, phase="committed", level=tuple(level.items()), reference=state.reference or tuple(level.items()),
        evidence=(), windows=_latest(rules, state.windows), visits=(), drifted=moved,
    )  # fmt: skip
    if not moved:
        steady = ("steady", "the level is what it was after the last epoch") if alarmed else (None, None)
        return state, Decision(state.current, *steady)
    why = f"the regime has changed {'during the epoch ' if first else ''}({', '.join(moved)})"
    if state.hold_s > 0:
        return state, Decision(state.current, "hold", f"{why}; no other count is tried for {state.hold_s:.0f} s more")
    if not _can_open(rules, state):
        return state, Decision(state.current, "hold", f"{why}; no other count is tried while costs are unknown")
    return _open_epoch(state, why)


def _watch(rules: Rules, state: State, seen: Observation) -> tuple[State, Decision]:
    """Committed: looks for drift, and opens the epoch that had to wait."""
    state = dataclasses.replace(state, windows=_latest(rules, (*state.windows, _signals(state, seen))))
    if state.drifted and _can_open(rules, state):
        return _open_epoch(state, f"the regime had changed ({', '.join(state.drifted)})")
    state = _with_level_of_cost(rules, state)
    level, evidence, alarms = dict(state.level), dict(state.evidence), []
    for name, value in seen.signals().items():
        if name in level:
            evidence[name], alarm = drift.updated(evidence.get(name, Cusum()), value, level[name], SIGNALS[name].change)
            alarms += [name] if alarm else []
    if not alarms:
        return dataclasses.replace(state, evidence=tuple(evidence.items())), Decision(state.current)
    state = dataclasses.replace(_visit(state, state.current), drifted=tuple(alarms))
    return state, Decision(state.current, "drift", f"{' and '.join(alarms)} drifted: waiting for a new level")


def _with_level_of_cost(rules: Rules, state: State) -> State:
    """Where costs were unknown when the level was taken: theirs, as soon as they are known."""
    costs = _visit_to_date(state).costs
    if "cost" in dict(state.level) or len(costs) < rules.most_windows:
        return state
    usual = ("cost", drift.baseline(costs, SIGNALS["cost"].least_std))
    reference = state.reference if "cost" in dict(state.reference) else (*state.reference, usual)
    return dataclasses.replace(state, level=(*state.level, usual), reference=reference)


def _can_open(rules: Rules, state: State) -> bool:
    """Whether it is time for an epoch, and known what the champion costs now."""
    return state.hold_s <= 0 and len(_visit_to_date(state).costs) >= rules.least_windows


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
        visits=(_visit_to_date(state),),
    )  # fmt: skip
    return state, Decision(challenger, "reopen", f"{why}; {challenger} chunks are tried against {state.champion}")


def _signals(state: State, seen: Observation) -> dict[str, float]:
    return {"over_s": state.clock_s, **seen.signals()}


def _latest(rules: Rules, windows: tuple[dict[str, float], ...]) -> tuple[dict[str, float], ...]:
    """What the champion is watched for at the beginning of an epoch, which may open at any time: no old costs."""
    windows = windows[-3 * rules.most_windows :]
    while sum("cost" in window for window in windows) > rules.most_windows:
        windows = windows[1:]
    return windows


def _visit_to_date(state: State) -> Visit:
    """What the visit that goes on says of costs."""
    known = [window for window in state.windows if "cost" in window]
    start_s = known[0]["over_s"] if known else state.clock_s
    return Visit(state.current, start_s, tuple(window["cost"] for window in known))


def _as_measured(rules: Rules, state: State) -> MeanInterval:
    """Gap of the challenger that is being visited to the champion's visit before."""
    before = duels.last_of(state.champion, state.visits)
    return duels.interval_of(_visit_to_date(state).costs, before.costs, _error(rules))


def _error(rules: Rules) -> float:
    return rules.error / max(1, len(rules.candidates) - 1)


def _share_lost(state: State, seen: Observation) -> float:
    """Of a challenger's window: what it cost beyond the champion; negative where it cost less."""
    costs = duels.last_of(state.champion, state.visits).costs
    if not costs or (log_cost := finite_log(seen.cost)) is None:
        return 0.0
    return -math.expm1(sum(costs) / len(costs) - log_cost)
