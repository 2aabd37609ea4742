"""Figures from the records of a run. Colour-blind safe, units on the axes, readable in print."""

import csv
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from jaxchunk.run_dir import read_json_lines

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, which survives the common colour-vision deficiencies and grey-scale print.
BLUE, VERMILION, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#777777"


def plot_training(run_path: Path) -> Path:
    """Draws `training.png` from a run's records: loss, tokens/s, power, temperature and SM clock over time.

    Args:
      run_path: a directory that `train` wrote.

    Returns:
      The figure's path.
    """
    steps = read_json_lines(run_path / "steps.jsonl") if (run_path / "steps.jsonl").exists() else []
    validation = read_json_lines(run_path / "validation.jsonl") if (run_path / "validation.jsonl").exists() else []
    telemetry = _read_telemetry(run_path / "telemetry.csv")
    figure, axes = _panels(5 if telemetry else 2)
    time_s = [record["time_s"] for record in steps]
    axes[0].plot(time_s, [record["loss"] for record in steps], color=BLUE, linewidth=1, label="training")
    if validation:
        points = [record["time_s"] for record in validation], [record["val_loss"] for record in validation]
        axes[0].plot(*points, "o-", color=VERMILION, label="validation")
    axes[0].set_ylabel("loss (nats/token)")
    axes[0].legend(frameon=False)
    axes[1].plot(time_s, [record["tokens_per_s"] for record in steps], color=BLUE, linewidth=1)
    axes[1].set_ylim(bottom=0)
    axes[1].set_ylabel("tokens/s")
    title = str(run_path.name)
    if telemetry:
        _plot_telemetry(axes[2:], telemetry, time_s)
    elif steps:
        title += f"\nno power or clocks: {steps[-1]['energy_null_reason']}"
    axes[0].set_title(title, fontsize=10)
    axes[-1].set_xlabel("time since start (s)")
    path = run_path / "training.png"
    figure.savefig(path, dpi=150)
    return path


def _plot_telemetry(axes: list["Axes"], telemetry: dict[str, np.ndarray], step_time_s: list[float]) -> None:
    if step_time_s:  # compilation comes before the first step; a margin shows the rise
        shown = (telemetry["time_s"] > step_time_s[0] - 3) & (telemetry["time_s"] < step_time_s[-1] + 1)
        telemetry = {name: column[shown] for name, column in telemetry.items()}
    columns = (("power_w", "power (W)", VERMILION), ("temperature_c", "temperature (°C)", GREEN),
               ("sm_clock_mhz", "SM clock (MHz)", GREY))  # fmt: skip
    for axis, (name, label, color) in zip(axes, columns, strict=True):
        axis.plot(telemetry["time_s"], telemetry[name], color=color, linewidth=0.7)
        axis.set_ylabel(label)


def _panels(count: int) -> tuple["Figure", list["Axes"]]:
    # The object interface: no global state, no display needed, nothing to close.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 1.2 + 1.6 * count), layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(np.atleast_1d(figure.subplots(count, 1, sharex=True)))
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _read_telemetry(path: Path) -> dict[str, np.ndarray] | None:
    """Columns of `telemetry.csv`, NaN where a field is empty; None where there is nothing to plot."""
    if not path.exists():
        return None
    with path.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if None not in row.values()]
    if not rows:
        return None
    return {name: np.array([float(row[name] or "nan") for row in rows]) for name in rows[0]}
