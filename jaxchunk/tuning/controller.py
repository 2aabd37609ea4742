"""Feeds the policy: steps become windows, decisions become records. No device, no clock: only what it is told."""

import dataclasses
import json
from collections.abc import Callable
from typing import Any, NamedTuple

from jaxchunk.tuning import policy
from jaxchunk.tuning.objective import Objective, cost
from jaxchunk.tuning.observation import Observation
from jaxchunk.tuning.policy import Rules

_PAUSE_S = 1e-3  # between steps; less is rounding
EnergyOf = Callable[[float, float], float | None]  # joules between two times, or None


class StepSeen(NamedTuple):
    """A step that is done. Times are of any one clock, in seconds; None is unknown.

    `throttle_s` is the time in which the clock was held down for a stated reason.
    """

    step: int
    num_chunks: int
    start_s: float
    end_s: float
    sm_clock_mhz: float | None = None
    temperature_c: float | None = None
    throttle_s: float | None = None


class Controller:
    """Says what the next steps run with.

    Steps in a row with one count are a window. Left out are the first after a switch, since it began under the other
    count, and the first after a pause, which runs on a device that has rested: on an H200 it took 2% to 4% less.
    (Not two in a row, so that where all steps pause some are seen.) Energy is that of the window's
    stretches without a pause between steps, not of single steps.
    """

    def __init__(
        self,
        rules: Rules,
        objective: Objective,
        *,
        energy_of: EnergyOf = lambda start_s, end_s: None,
        record: Callable[[dict[str, Any]], None] = lambda record: None,
    ):
        """Begins with the first epoch.

        Args:
          rules: of the policy.
          objective: what a step is to cost little of.
          energy_of: joules between two times, for objectives with energy.
          record: takes every decision as a JSON value.
        """
        self._rules, self._objective, self._energy_of, self._record = rules, objective, energy_of, record
        self._state = policy.initial_state(rules)
        self._steps: list[StepSeen] = []
        self._joules: float | None = 0.0  # of stretches of the window that have ended
        self._stretch_s: tuple[float, float] | None = None
        self._after_switch = False
        self._end_s: float | None = None  # of the last step of the current count
        self._left_out = False  # that step

    @property
    def num_chunks(self) -> int:
        """For the next step."""
        return self._state.current

    @property
    def in_first_epoch(self) -> bool:
        """Whether no epoch has come to its end yet."""
        return self._state.epoch == 0 and self._state.exploring

    @property
    def first_epoch_s(self) -> float:
        """Least duration of the first epoch: a visit to each candidate, and one more to the champion."""
        visits = len(self._rules.candidates) + 1
        return visits * (self._rules.settle_constants + 1) * self._rules.thermal_constant_s

    def observe(self, seen: StepSeen) -> None:
        """Takes in a step that is done, in order."""
        if seen.num_chunks != self._state.current:
            return
        paused = self._end_s is not None and seen.start_s > self._end_s + _PAUSE_S
        if paused:
            self.end_stretch()
        self._left_out = self._after_switch or (paused and not self._left_out)
        self._after_switch, self._end_s = False, seen.end_s
        if self._left_out:
            return
        self._stretch_s = seen.start_s if self._stretch_s is None else self._stretch_s[0], seen.end_s
        self._steps.append(seen)
        if sum(step.end_s - step.start_s for step in self._steps) >= self._rules.window_s:
            self._decide()

    def end_stretch(self) -> None:
        """Steps pause here: the energy up to now is asked for, as it may not be known for long."""
        if self._stretch_s is None:
            return
        if self._objective != "time" and self._joules is not None:
            joules = self._energy_of(*self._stretch_s)
            self._joules = None if joules is None else self._joules + joules
        self._stretch_s = None

    def to_json(self) -> dict[str, Any]:
        """What `go_on_from` needs in another process."""
        return {"candidates": list(self._rules.candidates), "state": dataclasses.asdict(self._state)}

    def go_on_from(self, saved: dict[str, Any]) -> bool:
        """Takes up a state of `to_json`, unless the candidates or the policy are others now; says whether it did.

        The visit that it was in begins anew, for the device has rested.
        """
        remembered = {field.name for field in dataclasses.fields(policy.State)}
        if saved["candidates"] != list(self._rules.candidates) or saved["state"].keys() != remembered:
            return False
        self._state = policy.resumed(policy.state_from_json(json.loads(json.dumps(saved["state"]))))
        return True

    def _decide(self) -> None:
        self.end_stretch()
        steps, seconds = self._steps, sum(step.end_s - step.start_s for step in self._steps)
        joules = None if self._joules is None or self._objective == "time" else self._joules / len(steps)
        clock_mhz = _mean([step.sm_clock_mhz for step in steps])
        throttle_s = _mean([step.throttle_s for step in steps])
        window = Observation(
            steps[-1].num_chunks,
            seconds,
            cost(self._objective, seconds / len(steps), joules),
            steps[-1].temperature_c,
            clock_mhz,
            None if throttle_s is None else min(1.0, throttle_s * len(steps) / seconds),
        )
        before = self._state.current
        self._state, decision = policy.step(self._rules, self._state, window)
        self._steps, self._joules, self._after_switch = [], 0.0, decision.num_chunks != before
        if decision.event is not None:
            self._record(
                {
                    "step": steps[-1].step,
                    "time_s": steps[-1].end_s,
                    "event": decision.event,
                    "num_chunks": decision.num_chunks,
                    "reason": decision.reason,
                    "epoch": self._state.epoch,
                    "switches": self._state.switches,
                    "window": window._asdict(),
                }
            )


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None
