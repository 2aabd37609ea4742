"""The policy of adaptive chunks in closed loop with a simulated GPU: a cold start, a hot room, a slower fan.

Training runs on a plant at each fixed count and once with the policy, through the same disturbances. Everything is
simulated; no figure from it is a measurement.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxchunk.simulation.devices import SimulatedGpu
from jaxchunk.telemetry.simulation.plant import PLANT_REASONS, Phase, Plant
from jaxchunk.tuning.controller import Controller, StepSeen
from jaxchunk.tuning.objective import Objective
from jaxchunk.tuning.policy import Rules

AMBIENT_C = 25.0
_MINUTE_S = 60.0
_LOOK_S = 1.0  # how often the controller is told what is done: it lags behind the device, as in the trainer


@dataclasses.dataclass(frozen=True)
class Disturbance:
    """What the device's surroundings are from a time on.

    Attributes:
      name: of it.
      constants: when, in the device's thermal constants.
      ambient_c: temperature of the air.
      resistance: of the cooler, as a multiple of the profile's.
    """

    name: str
    constants: float
    ambient_c: float = AMBIENT_C
    resistance: float = 1.0


SCENARIO = (
    Disturbance("cold start", 0.0),
    Disturbance("room at 35 °C", 45.0, ambient_c=35.0),
    Disturbance("slower fan: resistance + 15%", 90.0, ambient_c=35.0, resistance=1.15),
)
SCENARIO_CONSTANTS = 135.0  # its length


def _rooms_and_fans(*changes: tuple[float, float, float]) -> tuple[Disturbance, ...]:
    """A cold start, and then from some constants on a room of so many degrees and a cooler's resistance."""
    later = (Disturbance(f"{ambient_c:.0f} °C, x {factor}", at, ambient_c, factor) for at, ambient_c, factor in changes)
    return (SCENARIO[0], *later)


# Others of the same length, to see how much hangs on when and how large the disturbances of the first are.
SCENARIOS = {
    "standard": SCENARIO,
    "early": _rooms_and_fans((20.0, 35.0, 1.0), (60.0, 35.0, 1.15)),
    "close": _rooms_and_fans((60.0, 35.0, 1.0), (75.0, 35.0, 1.15)),
    "mild": _rooms_and_fans((45.0, 30.0, 1.0), (90.0, 30.0, 1.1)),
    "edge": _rooms_and_fans((45.0, 35.0, 1.0), (90.0, 35.0, 1.05)),
    "strong": _rooms_and_fans((45.0, 40.0, 1.0), (90.0, 40.0, 1.3)),
    "fan-first": _rooms_and_fans((30.0, 25.0, 1.3), (80.0, 35.0, 1.3)),
    "swing": _rooms_and_fans(*((20.0 * i, 25.0 + 10.0 * (i % 2), 1.15 if i > 4 else 1.0) for i in range(1, 7))),
}


class Step(NamedTuple):
    """A training step that was simulated."""

    num_chunks: int
    start_s: float
    end_s: float
    energy_j: float
    temperature_c: float
    clock_mhz: float


@dataclasses.dataclass(frozen=True)
class Run:
    """Steps of one run, and the decisions in it (none at a fixed count)."""

    steps: list[Step]
    decisions: list[dict[str, Any]]

    def at(self, time_s: float) -> int:
        """The count of the last step that began before a time."""
        return [step.num_chunks for step in self.steps if step.start_s < time_s][-1]

    def rates(self, edges_s: np.ndarray) -> np.ndarray:
        """Steps a second between neighbouring edges; a step that crosses one counts by its parts."""
        ends_s = np.array([0.0, *(step.end_s for step in self.steps)])
        done = np.interp(edges_s, ends_s, np.arange(len(ends_s)))
        return np.diff(done) / np.diff(edges_s)


def run_fixed(gpu: SimulatedGpu, num_chunks: int, *, scenario: Sequence[Disturbance], end_s: float, seed: int) -> Run:
    """Training at one count through a scenario."""
    return Run(_run(gpu, lambda: num_chunks, lambda step: None, scenario, end_s, seed), [])


def run_adaptive(
    gpu: SimulatedGpu, rules: Rules, objective: Objective, *, scenario: Sequence[Disturbance], end_s: float, seed: int
) -> Run:
    """Training with the policy."""
    decisions: list[dict[str, Any]] = []
    joules: dict[float, float] = {}  # until the end of a step

    def energy_of(start_s: float, end_s: float) -> float:
        return joules[end_s] - joules[start_s]

    controller = Controller(rules, objective, energy_of=energy_of, record=decisions.append)
    count = 0

    def observe(seen: "_Seen") -> None:
        nonlocal count
        count += 1
        joules[seen.step.start_s], joules[seen.step.end_s] = seen.joules_before, seen.joules_before + seen.step.energy_j
        n, start_s, end_s, _, temperature_c, clock_mhz = seen.step
        whole_c = float(round(temperature_c))  # as instruments read it
        controller.observe(StepSeen(count, n, start_s, end_s, clock_mhz, whole_c, seen.throttle_s))

    return Run(_run(gpu, lambda: controller.num_chunks, observe, scenario, end_s, seed), decisions)


class _Seen(NamedTuple):
    step: Step
    joules_before: float
    throttle_s: float


def _run(
    gpu: SimulatedGpu,
    num_chunks: Callable[[], int],
    observe: Callable[[_Seen], None],
    scenario: Sequence[Disturbance],
    end_s: float,
    seed: int,
) -> list[Step]:
    """One step after the other until one ends behind `end_s`; counts are asked for one step ahead, at dispatch."""
    plant = Plant(gpu.profile, ambient_c=scenario[0].ambient_c, seed=seed)
    phases: dict[int, list[Phase]] = {}
    done: list[tuple[int, float, float]] = []

    def work() -> Iterator[Phase]:
        ahead = num_chunks()
        while True:
            n, ahead, start_s = ahead, num_chunks(), plant.time_s
            if n not in phases:
                phases[n] = gpu.phases("training", "random", n)
            yield from phases[n]
            done.append((n, start_s, plant.time_s))

    plant.submit(work())
    steps: list[Step] = []
    starts = {d.constants * gpu.profile.thermal.time_constant_s: d for d in scenario}
    for look in itertools.count():
        time_s = look * _LOOK_S
        plant.advance_to(time_s)
        for start_s in [start_s for start_s in starts if start_s <= time_s]:
            _disturb(plant, gpu, starts.pop(start_s))
        for n, start_s, step_end_s in done:
            seen = _seen(plant, n, start_s, step_end_s)
            steps.append(seen.step)
            observe(seen)
        done.clear()
        if steps and steps[-1].end_s >= end_s:
            return steps
    raise AssertionError("looks never end")


def _disturb(plant: Plant, gpu: SimulatedGpu, disturbance: Disturbance) -> None:
    """A slower fan takes longer to settle too: the capacity is the same."""
    plant.ambient_c = disturbance.ambient_c
    thermal, factor = gpu.profile.thermal, disturbance.resistance
    changed = dataclasses.replace(
        thermal,
        resistance_c_per_w=factor * thermal.resistance_c_per_w,
        time_constant_s=factor * thermal.time_constant_s,
    )
    plant.profile = dataclasses.replace(gpu.profile, thermal=changed)


def _seen(plant: Plant, num_chunks: int, start_s: float, end_s: float) -> _Seen:
    before, after = plant.throttle_s(start_s), plant.throttle_s(end_s)
    times_s = np.linspace(start_s, end_s, 5)[1:]
    step = Step(
        num_chunks,
        start_s,
        end_s,
        plant.true_energy_j(start_s, end_s),
        plant.temperature_c(end_s),
        float(np.mean([plant.clock_mhz(float(time_s)) for time_s in times_s])),
    )
    throttle_s = sum(after[reason] - before[reason] for reason in PLANT_REASONS)
    return _Seen(step, plant.true_energy_j(0.0, start_s), throttle_s)


def compare(
    adaptive: Run, fixed: dict[int, Run], *, scenario: Sequence[Disturbance], constant_s: float, end_s: float
) -> dict[str, Any]:
    """The policy against every fixed count, and against an oracle that has the best of them after every disturbance.

    Args:
      adaptive: the run with the policy.
      fixed: the others, by count.
      scenario: what happened.
      constant_s: the device's thermal constant.
      end_s: of all runs.

    Returns:
      JSON values: switches; throughput over the oracle's, and over the best fixed count's, of the whole run; for each
      disturbance the best count, when 98% of the oracle's throughput is reached for good, and switches.
    """
    edges_s = np.arange(0.0, end_s + 1e-9, _MINUTE_S)
    ours, others = adaptive.rates(edges_s), {n: run.rates(edges_s) for n, run in fixed.items()}
    starts_s = [d.constants * constant_s for d in scenario]
    events, oracle = [], np.empty_like(ours)
    for disturbance, start_s, until_s in zip(scenario, starts_s, [*starts_s[1:], end_s], strict=True):
        own = (edges_s[:-1] >= start_s) & (edges_s[:-1] < until_s)
        best = max(others, key=lambda n, own=own: others[n][own].mean())  # type: ignore[misc]
        oracle[own] = others[best][own]
        late = [d for d in adaptive.decisions if start_s <= d["time_s"] < until_s]
        events.append(
            {
                "name": disturbance.name,
                "start_s": start_s,
                "best_chunks": best,
                "chunks_at_the_end": adaptive.at(until_s),
                "reaches_98_percent_after_s": _reached_s(ours[own], oracle[own]),
                "switches": sum(d["num_chunks"] != d["window"]["num_chunks"] for d in late),
            }
        )
    totals = {n: float(rates.mean()) for n, rates in others.items()}
    return {
        "switches": adaptive.decisions[-1]["switches"] if adaptive.decisions else 0,
        "throughput_over_oracle": float(ours.mean() / oracle.mean()),
        "throughput_over_best_fixed": float(ours.mean() / max(totals.values())),
        "best_fixed": max(totals, key=totals.__getitem__),
        "steps_per_s_fixed": {str(n): total for n, total in totals.items()},
        "events": events,
    }


def _reached_s(ours: np.ndarray, oracle: np.ndarray) -> float | None:
    """When every later stretch of five minutes has 98% of the oracle's steps; None: never. A step has its own noise."""
    length = min(5, len(ours))
    ratios = np.convolve(ours, np.ones(length), "valid") / np.convolve(oracle, np.ones(length), "valid")
    below = np.flatnonzero(ratios < 0.98)
    if below.size and below[-1] == len(ratios) - 1:
        return None
    return _MINUTE_S * float(below[-1] + 1) if below.size else 0.0
