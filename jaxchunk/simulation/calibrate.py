"""Fits the few parameters of a built-in device that are fitted, to the points that are marked as fitted.

A Nelder-Mead search over logarithms, from the values in the device's file, with the same seeds of the plant in every
evaluation: the same result every time. The points marked as predicted are not looked at.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import optimize

from jaxchunk.errors import InputError
from jaxchunk.simulation import devices, points
from jaxchunk.simulation.experiment import run_cases
from jaxchunk.simulation.points import Point

# By device, the dotted names that are fitted, with what each is mostly decided by.
FITTED = {
    # The 2-chunk point, the two together, and how much a brake costs.
    "gb10": (
        "profile.controller.peak_limit_w",
        "profile.controller.peak_averaging_s",
        "profile.controller.brake_fraction",
    ),
    # The times and the power of zeros (uncapped), and the time of random data (at the cap).
    "l40s": ("roofline.flops_per_s.float32", "profile.compute.dynamic_w", "profile.zeros_activity"),
    # Time and clock of random data (at the cap); power and clock of zeros, whose clock a brake holds down.
    "h200": (
        "roofline.flops_per_s.bfloat16",
        "profile.compute.dynamic_w",
        "profile.zeros_activity",
        "profile.voltage_slope",
        "profile.controller.peak_limit_w",
        "profile.controller.brake_fraction",
    ),
}
SEEDS = (0, 1)
MEASURED_S = 60.0
FAILED = 1e6  # where a candidate is no possible device


@dataclass(frozen=True)
class Fit:
    """What a calibration found.

    Attributes:
      values: by dotted name.
      objective: sum over the fitted points of squared residuals in tolerances.
      num_points: how many those are.
      evaluations: simulations of all of them.
    """

    values: dict[str, float]
    objective: float
    num_points: int
    evaluations: int


def calibrate(device: str, *, max_evaluations: int = 120) -> Fit:
    """Fits a built-in device.

    Raises:
      InputError: it is not built in.
    """
    if device not in FITTED:
        raise InputError(f"device is {device!r}; calibrated are {', '.join(FITTED)}")
    names, tables = FITTED[device], devices.tables(device, fitted=False)
    wanted = [point for point in points.load(device) if point.role == "fitted"]
    start = np.log([devices.get_value(tables, name) for name in names])
    # Steps of 2%: the limits of brakes have effects within some percent.
    simplex = np.vstack([start, start + 0.02 * np.eye(len(names))])
    found = optimize.minimize(
        lambda logs: objective(tables, names, logs, device, wanted),
        start,
        method="Nelder-Mead",
        options={"initial_simplex": simplex, "maxfev": max_evaluations, "xatol": 1e-4, "fatol": 1e-2},
    )
    values = {name: float(f"{math.exp(log):.5g}") for name, log in zip(names, found.x, strict=True)}
    return Fit(values, float(found.fun), len(wanted), int(found.nfev))


def objective(
    tables: dict[str, Any], names: tuple[str, ...], logs: np.ndarray, device: str, wanted: list[Point]
) -> float:
    """The sum of squared residuals, in tolerances, with the named values set to exp(logs)."""
    for name, log in zip(names, logs, strict=True):
        devices.set_value(tables, name, math.exp(log))
    try:
        gpu = devices.build(tables, device)
    except InputError:
        return FAILED
    rows = run_cases(gpu, points.cases(wanted), seeds=SEEDS, measured_s=MEASURED_S)
    return sum(r["residual_in_tolerances"] ** 2 for r in points.residuals(wanted, rows))
