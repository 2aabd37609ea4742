"""Windows out of steps: what belongs to one, what does not, and what energy they have."""

import dataclasses

import pytest

from jaxchunk.tuning.controller import Controller, StepSeen
from jaxchunk.tuning.policy import Rules

RULES = Rules((1, 4), thermal_constant_s=20.0)  # windows of 1 s


class Feed:
    """Steps of 0.3 s, of power 100 W; every decision that was made of them."""

    def __init__(self, objective="time", energy_of=lambda start_s, end_s: 100.0 * (end_s - start_s), rules=RULES):
        self.asked, self.records, self.time_s, self.step = [], [], 0.0, 0

        def ask(start_s, end_s):
            self.asked.append((start_s, end_s))
            return energy_of(start_s, end_s)

        self.controller = Controller(rules, objective, energy_of=ask, record=self.records.append)

    def run(self, steps, seconds=0.3, pause_s=0.0, num_chunks=None):
        for _ in range(steps):
            self.step += 1
            seen = StepSeen(
                self.step,
                num_chunks or self.controller.num_chunks,
                self.time_s,
                self.time_s + seconds,
                1500.0,
                60.0,
                0.1,
            )
            self.time_s += seconds + pause_s
            self.controller.observe(seen)
        return self


def test_a_window_is_steps_of_one_count_and_the_first_after_a_switch_is_left_out():
    feed = Feed().run(4 * 40)  # settles for 40 s
    assert feed.records == [] and feed.controller.num_chunks == 4
    while not feed.records:
        feed.run(1)
    (record,) = feed.records
    assert (record["event"], record["num_chunks"], record["switches"], record["epoch"]) == ("explore", 1, 1, 0)
    window = record["window"]
    assert window["num_chunks"] == 4 and window["seconds"] == pytest.approx(1.2)
    assert window["cost"] == pytest.approx(0.3) and window["throttle_share"] == pytest.approx(1 / 3)
    assert (window["temperature_c"], window["clock_mhz"]) == (60.0, 1500.0)
    before = feed.controller.to_json()
    feed.run(4, num_chunks=4)  # on their way when it was decided
    feed.run(4)  # of which the first is left out, so that no window is whole
    assert feed.controller.to_json() == before
    feed.run(1)
    assert feed.controller.to_json() != before and feed.asked == []


@pytest.mark.parametrize(("objective", "expected"), [("energy", 30.0), ("edp", 9.0)])
def test_energy_is_of_stretches_without_a_pause(objective, expected):
    feed = Feed(objective)
    feed.run(2)
    feed.controller.end_stretch()
    feed.time_s += 5.0  # a validation
    feed.run(1, seconds=0.9)  # after which a step is slow
    feed.run(2)
    assert [round(end - start, 9) for start, end in feed.asked] == [0.6, 0.6]
    feed.run(4 * 60)
    assert feed.records[0]["window"]["cost"] == pytest.approx(expected)


def test_a_pause_that_nobody_announced_ends_a_stretch_too():
    """Every other step is left out for the pause before it, and not all."""
    feed = Feed("energy").run(7, pause_s=1.0)
    assert [round(start / 1.3) for start, _ in feed.asked] == [0, 2, 4, 6]
    assert all(end - start == pytest.approx(0.3) for start, end in feed.asked)


def test_a_slow_step_after_a_checkpoint_is_in_no_window():
    costs = []
    for slow_s in (0.3, 3.0):
        feed = Feed().run(4 * 50)
        feed.controller.end_stretch()
        feed.time_s += 1.0
        feed.run(1, seconds=slow_s).run(4 * 100)
        costs.append([record["reason"] for record in feed.records])
    assert costs[0] == costs[1] and len(costs[0]) == 2


def test_unknown_energy_is_no_cost():
    feed = Feed("energy", energy_of=lambda start_s, end_s: None).run(4 * 110)
    assert feed.records[0]["event"] == "explore" and feed.records[0]["window"]["cost"] is None


def test_it_goes_on_in_another_process_with_a_visit_begun_anew():
    feed = Feed().run(4 * 70)
    saved = feed.controller.to_json()
    other = Feed()
    assert other.controller.go_on_from(saved) and other.controller.num_chunks == 1
    assert other.controller.to_json()["state"]["phase"] == "settle"
    assert other.controller.to_json()["state"]["visits"] == saved["state"]["visits"] != ()
    assert not Feed(rules=dataclasses.replace(RULES, candidates=(1, 4, 16))).controller.go_on_from(saved)
    earlier = saved | {"state": {name: value for name, value in saved["state"].items() if name != "fruitless"}}
    assert not Feed().controller.go_on_from(earlier)  # of a policy that remembers other things
