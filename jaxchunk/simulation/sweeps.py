"""When does chunking help? One property of a device at a time is changed, and the gain of some chunks simulated."""

import dataclasses
from collections.abc import Callable, Sequence

from jaxchunk.simulation.devices import Inputs, SimulatedGpu, Workload
from jaxchunk.simulation.experiment import Row, gain, run_cases
from jaxchunk.simulation.points import Case
from jaxchunk.telemetry.simulation.profiles import GpuProfile, WorkProfile

WORKLOAD: Workload = "microbenchmark"
# Factors on the number of rows, on the memory phases' power over the compute phases', and on the limits.
ROW_FACTORS = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0, 2.0, 4.0)
POWER_RATIOS = (0.2, 0.35, 0.5, 0.65, 0.8, 0.95)
LIMIT_FACTORS = (0.85, 0.9, 0.95, 0.98, 1.0, 1.02, 1.05, 1.1, 1.2)


@dataclasses.dataclass(frozen=True)
class SweepPoint:
    """The gain of chunks with one property changed; `x` is that property, as `Sweep.x_label` says."""

    inputs: Inputs
    x: float
    gain: float


@dataclasses.dataclass(frozen=True)
class Sweep:
    """A property over its range. `own_x` is where the device itself is."""

    name: str
    x_label: str
    own_x: float
    points: list[SweepPoint]


def controller_s(profile: GpuProfile) -> float:
    """The time over which the limiter that reacts averages: the brake's where there is one, else the controller's."""
    controller = profile.controller
    return controller.averaging_s if controller.peak_limit_w is None else controller.peak_averaging_s


def period(gpu: SimulatedGpu, chunks: int, seeds: Sequence[int], measured_s: float) -> Sweep:
    """Over the length of an iteration in averaging times of the limiter: with more or fewer rows."""
    length_s = sum(phase.seconds_at_reference_clock for phase in gpu.phases(WORKLOAD, "random", 1))

    def changed(factor: float) -> SimulatedGpu:
        shape = dataclasses.replace(gpu.microbenchmark, m=max(int(gpu.microbenchmark.m * factor), chunks))
        return dataclasses.replace(gpu, microbenchmark=shape)

    periods = length_s / controller_s(gpu.profile)
    label = "iteration / averaging time of the limiter"
    return _sweep("period", label, changed, ROW_FACTORS, periods, periods, gpu, chunks, seeds, measured_s)


def power_ratio(gpu: SimulatedGpu, chunks: int, seeds: Sequence[int], measured_s: float) -> Sweep:
    """Over the dynamic power of memory-bound phases divided by that of compute-bound ones."""
    profile = gpu.profile

    def changed(ratio: float) -> SimulatedGpu:
        memory = WorkProfile(ratio * profile.compute.dynamic_w, profile.memory.clock_sensitivity)
        return dataclasses.replace(gpu, profile=dataclasses.replace(profile, memory=memory))

    own = profile.memory.dynamic_w / profile.compute.dynamic_w
    label = "power of memory / compute phases"
    return _sweep("power_ratio", label, changed, POWER_RATIOS, 1.0, own, gpu, chunks, seeds, measured_s)


def distance(gpu: SimulatedGpu, chunks: int, seeds: Sequence[int], measured_s: float) -> Sweep:
    """Over the limits on power, relative to the device's own."""
    profile = gpu.profile

    def scaled(limit_w: float | None, factor: float) -> float | None:
        return None if limit_w is None else limit_w * factor

    def changed(factor: float) -> SimulatedGpu:
        own = profile.controller
        controller = dataclasses.replace(
            own,
            power_limit_w=scaled(own.power_limit_w, factor),
            peak_limit_w=scaled(own.peak_limit_w, factor),
        )
        return dataclasses.replace(gpu, profile=dataclasses.replace(profile, controller=controller))

    label = "power limit / the device's own"
    return _sweep("distance", label, changed, LIMIT_FACTORS, 1.0, 1.0, gpu, chunks, seeds, measured_s)


def _sweep(
    name: str,
    x_label: str,
    changed: Callable[[float], SimulatedGpu],
    factors: Sequence[float],
    x_per_factor: float,
    own_x: float,
    gpu: SimulatedGpu,
    chunks: int,
    seeds: Sequence[int],
    measured_s: float,
) -> Sweep:
    found = []
    all_inputs: tuple[Inputs, ...] = ("random", "zero")
    for factor in factors:
        one = changed(factor)
        for inputs in all_inputs:
            cases: list[Case] = [(WORKLOAD, inputs, 1), (WORKLOAD, inputs, chunks)]
            rows: dict[Case, Row] = run_cases(one, cases, seeds=seeds, measured_s=measured_s)
            found.append(SweepPoint(inputs, factor * x_per_factor, gain(rows, cases[1], cases[0])))
    return Sweep(name, x_label, own_x, found)
