"""The policy on plants that are formulas: it converges, it answers a change, it never oscillates, it costs little."""

import dataclasses
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxchunk.tuning import policy
from jaxchunk.tuning.observation import Observation
from jaxchunk.tuning.policy import Rules, initial_state, state_from_json

RULES = Rules((1, 4, 16), thermal_constant_s=20.0)
EPOCH_S = 20.0 * (2 + 1) * 3  # a visit to each: two constants to settle, one to measure
HOUR_S = 3600.0
FOUND = [4, 16, 1, 4, 16]  # the first epoch


class Plant:
    """Costs by count and time, with noise, a level that all share, and one that each visit draws for itself."""

    def __init__(self, rules, costs, noise=0.003, level=lambda time_s: 1.0, seed=0, visits=0.0):
        self.rules, self.costs, self.noise, self.level, self.visits = rules, costs, noise, level, visits
        self.random = np.random.default_rng(seed)
        self.time_s, self.state = 0.0, initial_state(rules)
        self.path, self.events, self.spent_s, self.visit = [self.state.current], [], 0.0, 0.0

    def run(self, until_s):
        while self.time_s < until_s:
            n, seconds = self.state.current, self.rules.window_s
            costs = self.costs(self.time_s) if callable(self.costs) else self.costs
            self.spent_s += seconds * (1 - min(costs.values()) / costs[n])
            cost = costs[n] * self.level(self.time_s) * math.exp(self.visit + self.random.normal(0.0, self.noise))
            self.time_s += seconds
            self.state, decision = policy.step(self.rules, self.state, Observation(n, seconds, cost))
            assert decision.num_chunks == self.state.current in self.rules.candidates
            assert (decision.event is None) == (decision.reason is None)
            if decision.num_chunks != self.path[-1]:
                self.path.append(decision.num_chunks)
                self.visit = self.random.normal(0.0, self.visits)
            if decision.event is not None:
                self.events.append((self.time_s, decision.event, decision.reason))
        return self

    def most_switches(self):
        """As docs/chunk_choice.md has it: K + 1 an epoch, of which those that gain nothing become rare."""
        hold_s = self.rules.hold_constants * self.rules.thermal_constant_s
        epochs = 1 + 2 * self.kinds().count("adopt") + math.log2(1 + self.time_s / hold_s)
        return (len(self.rules.candidates) + 1) * min(epochs, 1 + self.time_s / hold_s)

    def kinds(self):
        return [event for _, event, _ in self.events]


def test_it_finds_the_best_in_one_epoch_and_stays():
    plant = Plant(RULES, {4: 1.0, 16: 0.95, 1: 0.97}).run(2 * EPOCH_S)
    assert plant.path == FOUND
    assert plant.kinds() == ["explore", "explore", "return", "adopt"]
    assert "16 chunks cost -" in plant.events[1][2] and "against 4: better" in plant.events[1][2]
    assert (
        "to confirm that 16 are better" in plant.events[2][2] and "on the way back too: adopted" in plant.events[3][2]
    )
    assert plant.run(8 * HOUR_S).path == FOUND and len(plant.events) == 4


def test_a_gain_that_is_not_worth_a_switch_is_left():
    plant = Plant(RULES, {4: 1.0, 16: 0.999, 1: 1.0}, noise=0.001).run(2 * EPOCH_S)
    assert plant.state.champion == 4 and plant.path == [4, 16, 1, 4]
    assert "no reason to switch" in plant.events[1][2]


@pytest.mark.parametrize(("cost", "noise"), [(1.1, 0.1), (2.0, 0.003)])
def test_a_visit_loses_no_more_than_it_may(cost, noise):
    """However noisy a count is, and however much dearer than the champion: nothing has to be shown to leave it."""
    plant = Plant(RULES, {4: 1.0, 16: 1.0, 1: cost}, noise=noise)
    for _ in range(1000):
        plant.run(plant.time_s + RULES.window_s)
        assert plant.state.lost_s < RULES.loss_s + RULES.window_s
    assert plant.state.champion == 4 and not plant.state.exploring
    assert "1 chunks cost +" in plant.events[-1][2] and "and have lost" in plant.events[-1][2]


def test_one_candidate_is_never_left():
    plant = Plant(Rules((8,)), {8: 1.0}, level=lambda t: 1.0 if t < 1000 else 1.2).run(HOUR_S)
    assert plant.path == [8] and plant.kinds()[-1] == "steady"


def test_a_change_that_all_share_costs_one_visit():
    """A room that becomes hot: everything is slower by 8%."""
    plant = Plant(RULES, {4: 1.0, 16: 0.95, 1: 0.96}, level=lambda t: 1.0 if t < 2000 else 1.08).run(2 * HOUR_S)
    assert plant.path == [*FOUND, 1, 16]
    assert plant.kinds()[4:] == ["drift", "reopen", "commit"]
    assert "the regime has changed (cost +" in plant.events[5][2]
    assert "everything has moved alike" in plant.events[6][2]


def test_a_change_of_the_ranking_is_found():
    before, after = {4: 1.0, 16: 0.95, 1: 0.96}, {4: 1.0, 16: 1.1, 1: 1.08}
    plant = Plant(RULES, lambda t: before if t < 2000 else after).run(2000 + 6 * EPOCH_S)
    assert plant.state.champion == 4 and plant.kinds()[4] == "drift"
    assert plant.state.switches == len(FOUND) - 1 + 4


def test_a_disturbance_that_ends_is_no_reason_to_try_anything():
    """Another process for a minute."""
    plant = Plant(RULES, {4: 1.0, 16: 0.95, 1: 0.96}, level=lambda t: 1.5 if 2000 < t < 2060 else 1.0).run(HOUR_S)
    assert plant.path == FOUND and plant.kinds()[4:] == ["drift", "steady"]
    # One window alone (a checkpoint, say) is not even noticed.
    plant = Plant(RULES, {4: 1.0, 16: 0.95, 1: 0.96}, level=lambda t: 3.0 if 2000 < t < 2001 else 1.0).run(HOUR_S)
    assert "drift" not in plant.kinds()


def test_a_regime_that_returns_before_its_turn_is_left_alone():
    """It changes during the hold after an epoch, and back."""
    rules = dataclasses.replace(RULES, hold_constants=40.0)
    plant = Plant(rules, {4: 0.95, 16: 1.0, 1: 0.96}, level=lambda t: 1.1 if 300 < t < 600 else 1.0).run(HOUR_S)
    assert plant.path == [4, 16, 1, 4]
    assert plant.kinds()[2:] == ["commit", "drift", "hold", "drift", "steady"]


def test_a_change_within_an_epoch_is_found_out():
    """Sixteen chunks only look better: they are measured after everything has become faster."""
    level = lambda t: 1.0 if t < 0.5 * EPOCH_S else 0.9  # noqa: E731
    plant = Plant(RULES, {4: 1.0, 16: 1.01, 1: 1.03}, level=level).run(2 * EPOCH_S)
    assert plant.path == [4, 16, 1, 4] and plant.state.champion == 4
    assert plant.kinds() == ["explore", "explore", "return", "commit", "hold"]
    assert "on the way back: no reason to switch" in plant.events[3][2]
    assert "changed during the epoch (cost -10" in plant.events[4][2]


def test_what_is_better_by_less_than_the_champions_visits_differ_is_left():
    """Everything becomes slower by 1% on the way: sixteen chunks seem to gain 1% first, and 2% in the end."""
    level = lambda t: 1.0 if t < 1.1 * EPOCH_S else 1.02  # noqa: E731
    plant = Plant(RULES, {4: 1.0, 16: 0.985, 1: 1.03}, level=level, noise=0.001).run(2 * EPOCH_S)
    assert plant.kinds()[:4] == ["explore", "explore", "return", "commit"], plant.events
    plant = Plant(RULES, {4: 1.0, 16: 0.985, 1: 1.03}, noise=0.001).run(2 * EPOCH_S)
    assert plant.state.champion == 16


def test_epochs_that_change_nothing_become_rare():
    """A room that is hot every other quarter of an hour, for a day."""
    level = lambda t: 1.0 + 0.05 * (int(t / 900) % 2)  # noqa: E731
    plant = Plant(RULES, {4: 0.95, 16: 1.0, 1: 1.0}, level=level).run(24 * HOUR_S)
    assert plant.kinds().count("drift") > 50 and "adopt" not in plant.kinds()
    assert 4 <= plant.kinds().count("reopen") <= math.log2(1 + 24 * HOUR_S / 200)


@pytest.mark.parametrize(("signal", "said"), [("temperature_c", "temperature +8.0 C"), ("clock_mhz", "clock -10.0%")])
def test_temperature_and_clock_are_reasons_too(signal, said):
    state, events = initial_state(RULES), []
    usual, later = {"temperature_c": 60.0, "clock_mhz": 1500.0}, {"temperature_c": 68.0, "clock_mhz": 1350.0}
    for window in range(1500):
        other = {name: (later if name == signal and window > 1000 else usual)[name] for name in usual}
        state, decision = policy.step(RULES, state, Observation(state.current, 1.0, 0.95, **other))
        events += [decision] if decision.event else []
    drift, reopen = events[-3:-1]
    assert (drift.event, reopen.event) == ("drift", "reopen") and said in reopen.reason


def test_unknown_costs_end_in_what_it_began_with():
    state = initial_state(RULES)
    for _ in range(3000):
        state, _ = policy.step(RULES, state, Observation(state.current, 1.0, None))
    assert (state.champion, state.current, state.exploring) == (4, 4, False)


def test_windows_of_another_count_take_time_only():
    state = initial_state(RULES)
    after, decision = policy.step(RULES, state, Observation(1, 1.0, 1.0))
    assert after == state and decision.num_chunks == 4


@pytest.mark.parametrize("until_s", [30.0, 100.0, EPOCH_S + 60, 2500.0])
def test_a_state_survives_json_at_any_time(until_s):
    plant = Plant(RULES, {4: 1.0, 16: 0.95, 1: 0.96}, level=lambda t: 1.0 if t < 2000 else 1.08).run(until_s)
    restored = state_from_json(json.loads(json.dumps(dataclasses.asdict(plant.state))))
    assert restored == plant.state
    seen = Observation(restored.current, 1.0, 1.0)
    assert policy.step(RULES, restored, seen) == policy.step(RULES, plant.state, seen)


counts = st.lists(st.sampled_from([1, 2, 4, 8, 16, 32]), min_size=1, max_size=5, unique=True)


@settings(max_examples=10, deadline=None)
@given(counts, st.data())
def test_on_a_stationary_plant_it_converges_to_what_is_as_good_as_the_best(candidates, data):
    costs = {n: data.draw(st.floats(0.8, 1.2)) for n in candidates}
    rules = Rules(tuple(candidates), thermal_constant_s=20.0)
    # One epoch: visits of three constants to each, to the champion twice, and to another that is adopted.
    plant = Plant(rules, costs, noise=0.002, seed=data.draw(st.integers(0, 999))).run(20.0 * 3 * (len(candidates) + 3))
    assert not plant.state.exploring
    assert costs[plant.state.current] <= min(costs.values()) * 1.008  # worthwhile, and an interval's half width
    switches = plant.state.switches
    assert switches == len(plant.path) - 1 <= len(candidates) + 1
    assert plant.run(6000).state.switches == switches


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.0, 0.05), st.floats(50.0, 800.0), st.floats(0.0, 0.05))
def test_whatever_the_plant_does_switches_are_bounded_and_never_go_back_and_forth(seed, noise, period_s, visits):
    """Levels and rankings that jump about at random, and visits that differ."""
    random = np.random.default_rng(seed)
    jumps = {n: random.uniform(0.8, 1.2, 200) for n in RULES.candidates}
    costs = lambda t: {n: jump[int(t / period_s) % 200] for n, jump in jumps.items()}  # noqa: E731
    plant = Plant(RULES, costs, noise=noise, seed=seed, visits=visits).run(6000)
    assert plant.state.switches <= plant.most_switches()
    tried = []
    for _, event, reason in plant.events:
        if event == "reopen":
            tried = []
        if event in ("explore", "reopen"):
            challenger = int(reason.split("; ")[-1].split()[0])
            assert challenger not in tried  # once an epoch
            tried.append(challenger)


@settings(max_examples=5, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.006, 0.02))
def test_counts_that_only_seem_to_differ_are_not_chased(seed, visits):
    """All cost the same, but no two visits do (a brake that cycles as it happens to); the level changes now and then.

    A policy that took windows of one visit at their word made 90 switches and more.
    """
    level = lambda t: 1.0 + 0.1 * (int(t / 1200) % 2)  # noqa: E731
    plant = Plant(RULES, {4: 1.0, 16: 1.0, 1: 1.0}, noise=1e-4, level=level, seed=seed, visits=visits)
    assert plant.run(8 * HOUR_S).state.switches <= min(60, plant.most_switches())


def test_exploring_costs_at_most_its_share():
    """A change every twenty minutes that always means something: the worst case."""
    costs = ({4: 1.0, 16: 0.95, 1: 0.97}, {4: 1.0, 16: 1.06, 1: 1.02})
    plant = Plant(RULES, {4: 1.0, 16: 0.95, 1: 0.97}).run(8 * HOUR_S)
    assert plant.spent_s < 0.003 * 8 * HOUR_S
    plant = Plant(RULES, lambda t: costs[0], level=lambda t: 1.0 + 0.05 * (int(t / 1200) % 2)).run(8 * HOUR_S)
    assert plant.spent_s < 0.003 * 8 * HOUR_S and "reopen" in plant.kinds()
