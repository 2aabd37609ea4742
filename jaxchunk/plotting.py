"""Figures from the records of a run. Colour-blind safe, units on the axes, readable in print."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from jaxchunk.run_dir import read_json_lines

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FLOOR = "GEMM floor"  # the variant that the others are measured against

# Okabe and Ito's palette, which survives the common colour-vision deficiencies and grey-scale print.
BLUE, VERMILION, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#777777"


def plot_training(run_path: Path) -> Path:
    """Draws `training.png` from a run's records: loss, tokens/s, power, temperature and SM clock over time.

    Args:
      run_path: a directory that `train` wrote.

    Returns:
      The figure's path.
    """
    steps, validation = read_json_lines(run_path / "steps.jsonl"), read_json_lines(run_path / "validation.jsonl")
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


def plot_comparison(run_paths: Sequence[Path], path: Path) -> Path | None:
    """Draws several training runs side by side: ten seconds of power and of the SM clock, on common axes.

    Args:
      run_paths: directories that `train` wrote; those without telemetry are left out.
      path: where the figure goes.

    Returns:
      `path`, or None where no run has telemetry.
    """
    run_paths = [run_path for run_path in run_paths if _read_telemetry(run_path / "telemetry.csv") is not None]
    if not run_paths:
        return None
    figure = _figure(2 + 2.4 * len(run_paths), 5)
    axes = figure.subplots(2, len(run_paths), sharex=True, sharey="row", squeeze=False)
    for column, run_path in enumerate(run_paths):
        steps, telemetry = read_json_lines(run_path / "steps.jsonl"), _read_telemetry(run_path / "telemetry.csv")
        if not steps or telemetry is None:
            continue
        time_s = telemetry["time_s"] - steps[len(steps) // 2]["time_s"]
        shown = (time_s > -5) & (time_s < 5)
        for axis, (name, color) in zip(axes[:, column], (("power_w", VERMILION), ("sm_clock_mhz", BLUE)), strict=True):
            values = telemetry[name][shown]
            axis.plot(time_s[shown], values, color=color, linewidth=0.9)
            axis.text(0.03, 0.05, f"std {np.nanstd(values):.0f}", transform=axis.transAxes)
            axis.grid(alpha=0.3)
            axis.spines[["top", "right"]].set_visible(False)
        axes[0, column].set_title(run_path.name, fontsize=10)
    axes[0, 0].set_ylabel("power (W)")
    axes[1, 0].set_ylabel("SM clock (MHz)")
    figure.supxlabel("time from the middle of the run (s)", fontsize=10)
    figure.savefig(path, dpi=150)
    return path


def plot_lm_head(run_path: Path) -> Path:
    """Draws `lm_head.png` from a benchmark's summary: time, and energy where it is known, of every variant.

    Args:
      run_path: a directory that `scripts/bench_lm_head.py` wrote.

    Returns:
      The figure's path.
    """
    rows = json.loads((run_path / "summary.json").read_text())
    measures = [("time_s", 1e3, "time (ms)", BLUE), ("energy_j", 1.0, "energy (J, GPU rail)", VERMILION)]
    measures = [measure for measure in measures if any(row[measure[0]] for row in rows)]
    figure = _figure(4 * len(measures) + 2, 1 + 0.35 * len(rows))
    axes = np.atleast_1d(figure.subplots(1, len(measures), sharey=True))
    for axis, (field, scale, label, color) in zip(axes, measures, strict=True):
        known = [(i, row[field]) for i, row in enumerate(rows) if row[field]]
        medians = np.array([value["median"] for _, value in known]) * scale
        errors = np.array([[v["median"] - v["low"], v["high"] - v["median"]] for _, v in known]).T * scale
        axis.barh([i for i, _ in known], medians, xerr=errors, color=color, height=0.7, capsize=2)
        for i, value in known:
            if rows[i]["variant"] == FLOOR:
                axis.axvline(value["median"] * scale, color=GREY, linestyle="--", linewidth=1)
        axis.set_xlabel(label)
        axis.set_xlim(left=0)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_yticks(range(len(rows)), [row["variant"] for row in rows])
    axes[0].invert_yaxis()
    config = json.loads((run_path / "config.json").read_text())
    shape = f"T={config['tokens']} D={config['width']} V={config['vocab']} {config['dtype']}"
    figure.suptitle(f"LM head, forward and backward, {shape}\nbars: median and 95% bootstrap interval", fontsize=10)
    path = run_path / "lm_head.png"
    figure.savefig(path, dpi=150)
    return path


def _figure(width: float, height: float) -> "Figure":
    # The object interface: no global state, no display needed, nothing to close.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _panels(count: int) -> tuple["Figure", list["Axes"]]:
    figure = _figure(8, 1.2 + 1.6 * count)
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
