"""Stretches of simulated time for a figure."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64

from jaxchunk.simulation.devices import SimulatedGpu
from jaxchunk.simulation.experiment import run_phases

STRETCH_S, EVERY_S = 20.0, 0.02


@dataclass(frozen=True)
class Recorded:
    """Power (mean since the last sample) and clock of one chunk count, sampled; arrays of shape [n]."""

    chunks: int
    time_s: Float64[np.ndarray, " n"]
    power_w: Float64[np.ndarray, " n"]
    clock_mhz: Float64[np.ndarray, " n"]


def traces(gpu: SimulatedGpu, chunk_counts: Sequence[int], *, seed: int) -> list[Recorded]:
    """The microbenchmark on random inputs, on a warm device.

    Raises:
      InputError: a chunk count that does not fit.
    """
    found = []
    for chunks in chunk_counts:
        phases = gpu.phases("microbenchmark", "random", chunks)
        plant, trace = run_phases(gpu, phases, seed=seed, measured_s=STRETCH_S)
        times_s = float(trace.start_s[0]) + np.arange(EVERY_S, STRETCH_S, EVERY_S)
        power_w = [plant.true_energy_j(t - EVERY_S, t) / EVERY_S for t in times_s]
        clock_mhz = [plant.clock_mhz(t) for t in times_s]
        found.append(Recorded(chunks, times_s - times_s[0], np.array(power_w), np.array(clock_mhz)))
    return found
