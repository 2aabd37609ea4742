"""Runs a workload on a simulated device at thermal steady state, and says what instruments would have read."""

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import numpy as np

from jaxchunk.simulation.devices import Inputs, SimulatedGpu, Workload
from jaxchunk.simulation.points import Case
from jaxchunk.telemetry.simulation.plant import Phase, Plant, Trace

AMBIENT_C = 25.0
WARM_UP_TIME_CONSTANTS = 2.0  # of the device's heat, before anything counts


@dataclass(frozen=True)
class Row:
    """Means over the measured time of one case; simulated.

    Ripples are standard deviations of what NVML would show: power over `instant_averaging_s` and the clock, read every
    `renewal_s`. `speed` is iterations a second; wall quantities are None where nothing is known of the wall.
    """

    workload: Workload
    inputs: Inputs
    chunks: int
    seed: int | None  # None: the median of seeds
    time_s: float
    speed: float
    energy_j: float
    power_w: float
    power_std_w: float
    clock_mhz: float
    clock_std_mhz: float
    temperature_c: float
    sw_power_cap: float  # shares of the time
    sw_thermal: float
    hw_power_brake: float
    wall_power_w: float | None = None
    wall_energy_j: float | None = None

    @property
    def case(self) -> Case:
        """Workload, inputs and number of chunks."""
        return self.workload, self.inputs, self.chunks


def run_case(gpu: SimulatedGpu, case: Case, *, seed: int, measured_s: float) -> Row:
    """Simulates one case.

    Args:
      gpu: the device.
      case: workload, inputs and number of chunks.
      seed: of the plant.
      measured_s: simulated time that counts; whole iterations, at least one.

    Raises:
      InputError: the device cannot do the case.
    """
    plant, trace = run_phases(gpu, gpu.phases(*case), seed=seed, measured_s=measured_s)
    start_s, end_s = float(trace.start_s[0]), float(trace.end_s[-1])
    length_s, iterations = end_s - start_s, len(trace.end_s)
    energy_j = float(trace.energy_j.sum())
    powers_w, clocks_mhz = as_read(gpu, plant, start_s, end_s)
    shares = {name: float(seconds.sum()) / length_s for name, seconds in trace.throttle_s.items()}
    wall_w = None if gpu.wall is None else gpu.wall.other_w + energy_j / length_s
    return Row(
        *case,
        seed=seed,
        time_s=length_s / iterations,
        speed=iterations / length_s,
        energy_j=energy_j / iterations,
        power_w=energy_j / length_s,
        power_std_w=float(powers_w.std()),
        clock_mhz=float(np.average(trace.clock_mhz, weights=trace.time_s)),
        clock_std_mhz=float(clocks_mhz.std()),
        temperature_c=float(trace.temperature_c.mean()),
        wall_power_w=wall_w,
        wall_energy_j=None if wall_w is None else wall_w * length_s / iterations,
        sw_power_cap=shares["sw_power_cap"],
        sw_thermal=shares["sw_thermal"],
        hw_power_brake=shares["hw_power_brake"],
    )


def run_phases(gpu: SimulatedGpu, phases: Sequence[Phase], *, seed: int, measured_s: float) -> tuple[Plant, Trace]:
    """Repeats an iteration on a warm device; the trace has the iterations of the measured time only."""
    profile = gpu.profile
    warm_w = profile.idle_w + 0.8 * profile.compute.dynamic_w
    start_c = min(AMBIENT_C + profile.thermal.resistance_c_per_w * warm_w, profile.controller.throttle_c)
    plant = Plant(profile, ambient_c=AMBIENT_C, start_temperature_c=start_c, seed=seed)
    warm_s = WARM_UP_TIME_CONSTANTS * profile.thermal.time_constant_s
    plant.run(_until(plant, phases, warm_s))
    return plant, plant.run(_until(plant, phases, plant.time_s + measured_s))


def as_read(gpu: SimulatedGpu, plant: Plant, start_s: float, end_s: float) -> tuple[np.ndarray, np.ndarray]:
    """Power (W) and clock (MHz) as NVML would show them at each renewal between two times; arrays of shape [n]."""
    instruments = gpu.profile.instruments
    mean_s = max(instruments.instant_averaging_s, 1e-3)
    every_s = instruments.renewal_s or 0.1
    times_s = start_s + mean_s + every_s * np.arange(max(int((end_s - start_s - mean_s) / every_s), 1))
    times_s = np.minimum(times_s, end_s)
    powers_w = np.array([plant.true_energy_j(t - mean_s, t) / mean_s for t in times_s])
    return powers_w, np.array([plant.clock_mhz(t) for t in times_s])


def run_cases(
    gpu: SimulatedGpu,
    cases: Iterable[Case],
    *,
    seeds: Sequence[int],
    measured_s: float,
    on_row: Callable[[Row], None] = lambda row: None,
) -> dict[Case, Row]:
    """The median row over seeds of each case; `on_row` gets every single one.

    Raises:
      InputError: the device cannot do a case.
    """
    medians = {}
    for case in cases:
        rows = [run_case(gpu, case, seed=seed, measured_s=measured_s) for seed in seeds]
        for row in rows:
            on_row(row)
        medians[case] = median_row(rows)
    return medians


def median_row(rows: Sequence[Row]) -> Row:
    """Field by field the median of rows of one case."""
    medians: dict[str, Any] = {}
    for field in fields(Row)[4:]:
        column = [getattr(row, field.name) for row in rows]
        medians[field.name] = None if column[0] is None else statistics.median(column)
    return replace(rows[0], seed=None, **medians)


def gain(rows: Mapping[Case, Row], case: Case, reference: Case) -> float:
    """Speed of one case over that of another; NaN where one is missing."""
    if case not in rows or reference not in rows:
        return math.nan
    return rows[case].speed / rows[reference].speed


def record(row: Row) -> dict[str, object]:
    """A row as a record, marked as what it is."""
    return {"simulation": True, **asdict(row)}


def _until(plant: Plant, phases: Sequence[Phase], end_s: float) -> Iterable[Sequence[Phase]]:
    yield phases
    while plant.time_s < end_s:
        yield phases
