"""Figures of training runs: one over time, several side by side."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxchunk.plotting.style import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    VERMILION,
    new_figure,
    new_panels,
    read_telemetry,
    run_style,
    tidy,
)
from jaxchunk.run_dir import read_json_lines

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_GAP_S = 5.0  # without samples: a run that was stopped and gone on with; no line is drawn over it


def plot_training(run_path: Path) -> Path:
    """Draws `training.png` from a run's records: loss, tokens/s, power, temperature and SM clock over time.

    The chunk count too, where it changed.

    Args:
      run_path: a directory that `train` wrote.

    Returns:
      The figure's path.
    """
    steps, validation = read_json_lines(run_path / "steps.jsonl"), read_json_lines(run_path / "validation.jsonl")
    decisions, telemetry = read_json_lines(run_path / "chunks.jsonl"), read_telemetry(run_path / "telemetry.csv")
    figure, axes = new_panels(2 + bool(decisions) + 3 * bool(telemetry))
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
    if decisions and steps:
        _plot_chunks(axes[2], decisions, time_s)
    title = str(run_path.name)
    if telemetry:
        _plot_telemetry(axes[-3:], telemetry, time_s)
    elif steps:
        title += f"\nno power or clocks: {steps[-1]['energy_null_reason']}"
    axes[0].set_title(title, fontsize=10)
    axes[-1].set_xlabel("time since start (s)")
    path = run_path / "training.png"
    figure.savefig(path, dpi=150)
    return path


def _plot_chunks(axis: "Axes", decisions: Sequence[dict[str, Any]], step_time_s: list[float]) -> None:
    """Counts by the times of the policy's decisions, which take effect a few steps later; dotted where none changed."""
    times_s = [step_time_s[0], *(decision["time_s"] for decision in decisions), step_time_s[-1]]
    counts = [decisions[0]["window"]["num_chunks"], *(decision["num_chunks"] for decision in decisions)]
    axis.step(times_s, [*counts, counts[-1]], where="post", color=BLACK)
    for before, decision in zip(counts, decisions, strict=False):
        if decision["num_chunks"] == before:
            axis.axvline(decision["time_s"], color=GREY, linewidth=0.8, linestyle=":")
    axis.set_yscale("log", base=2)
    axis.set_yticks(sorted(set(counts)), [str(count) for count in sorted(set(counts))])
    axis.minorticks_off()
    axis.set_ylabel("chunks")


def _plot_telemetry(axes: list["Axes"], telemetry: dict[str, np.ndarray], step_time_s: list[float]) -> None:
    if step_time_s:  # compilation comes before the first step; a margin shows the rise
        shown = (telemetry["time_s"] > step_time_s[0] - 3) & (telemetry["time_s"] < step_time_s[-1] + 1)
        telemetry = {name: column[shown] for name, column in telemetry.items()}
    columns = (("power_w", "power (W)", VERMILION), ("temperature_c", "temperature (°C)", GREEN),
               ("sm_clock_mhz", "SM clock (MHz)", GREY))  # fmt: skip
    after_gap = np.diff(telemetry["time_s"], prepend=telemetry["time_s"][:1]) > _GAP_S
    for axis, (name, label, color) in zip(axes, columns, strict=True):
        axis.plot(telemetry["time_s"], np.where(after_gap, np.nan, telemetry[name]), color=color, linewidth=0.7)
        axis.set_ylabel(label)


def plot_comparison(run_paths: Sequence[Path], path: Path) -> Path | None:
    """Draws several training runs side by side: ten seconds of power and of the SM clock, on common axes.

    Args:
      run_paths: directories that `train` wrote; those without telemetry are left out.
      path: where the figure goes.

    Returns:
      `path`, or None where no run has telemetry.
    """
    run_paths = [run_path for run_path in run_paths if read_telemetry(run_path / "telemetry.csv") is not None]
    if not run_paths:
        return None
    figure = new_figure(2 + 2.4 * len(run_paths), 5)
    axes = figure.subplots(2, len(run_paths), sharex=True, sharey="row", squeeze=False)
    for column, run_path in enumerate(run_paths):
        steps, telemetry = read_json_lines(run_path / "steps.jsonl"), read_telemetry(run_path / "telemetry.csv")
        if not steps or telemetry is None:
            continue
        time_s = telemetry["time_s"] - steps[len(steps) // 2]["time_s"]
        shown = (time_s > -5) & (time_s < 5)
        for axis, (name, color) in zip(axes[:, column], (("power_w", VERMILION), ("sm_clock_mhz", BLUE)), strict=True):
            values = telemetry[name][shown]
            axis.plot(time_s[shown], values, color=color, linewidth=0.9)
            axis.text(0.03, 0.05, f"std {np.nanstd(values):.0f}", transform=axis.transAxes)
            tidy(axis)
        axes[0, column].set_title(run_path.name, fontsize=10)
    axes[0, 0].set_ylabel("power (W)")
    axes[1, 0].set_ylabel("SM clock (MHz)")
    figure.supxlabel("time from the middle of the run (s)", fontsize=10)
    figure.savefig(path, dpi=150)
    return path


def plot_losses(run_paths: Sequence[Path], path: Path) -> Path | None:
    """Draws the training losses of several runs over each other, and how far they are from those of the first.

    Args:
      run_paths: directories that `train` wrote; one that has no steps yet is left out.
      path: where the figure goes.

    Returns:
      `path`, or None where fewer than two runs have steps.
    """
    losses = {}
    for run_path in run_paths:
        if steps := read_json_lines(run_path / "steps.jsonl"):
            losses[run_path.name] = {record["step"]: record["loss"] for record in steps}
    if len(losses) < 2:
        return None
    figure, (above, below) = new_panels(2)
    first = next(iter(losses.values()))
    for index, (name, loss) in enumerate(losses.items()):
        above.plot(list(loss), list(loss.values()), **run_style(index), linewidth=0.9, label=name)
        common = [step for step in loss if step in first]
        difference = np.array([loss[step] - first[step] for step in common])
        label = f"rms {np.sqrt(np.mean(difference**2)):.4f}" if common and loss is not first else None
        below.plot(common, difference, **run_style(index), linewidth=0.9, label=label)
    above.set_ylabel("loss (nats/token)")
    above.legend(frameon=False)
    below.set_ylabel("less the first run's")
    below.legend(frameon=False)
    below.set_xlabel("step")
    figure.savefig(path, dpi=150)
    return path
