"""The figure of a simulated device: when chunking helps, beside what was measured."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxchunk.plotting.style import (
    BLACK,
    BLUE,
    GREY,
    LIGHT_GREY,
    ORANGE,
    SMALL,
    VERMILION,
    new_figure,
    tidy,
    write_titles,
)
from jaxchunk.words import chunks_in_words

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from jaxchunk.simulation.traces import Recorded

_COLORS = {"random": BLUE, "zero": ORANGE}
_SHOWN_TOLERANCES = 8.0  # residuals beyond are drawn at the edge, with their number


def plot_simulation(run_path: Path, summary: dict[str, Any], recorded: Sequence["Recorded"]) -> Path:
    """Draws `simulation.png`.

    Args:
      run_path: where to.
      summary: what `summary.json` of a simulation holds.
      recorded: power and clock over time, for some chunk counts.

    Returns:
      The figure's path.
    """
    figure = new_figure(13, 8.2 + 0.19 * len(summary["measured"]))
    grid = figure.add_gridspec(3, 3, height_ratios=(1.2, 1, 0.3 + 0.07 * len(summary["measured"])))
    speed, power, clock = (figure.add_subplot(grid[0, i]) for i in range(3))
    swept = [figure.add_subplot(grid[1, i]) for i in range(3)]
    residual = figure.add_subplot(grid[2, :])
    _speeds(speed, summary)
    _over_time(power, recorded, "power_w", "power (W)", "B  power, means of 20 ms")
    _over_time(clock, recorded, "clock_mhz", "SM clock (MHz)", "C  SM clock")
    for letter, axis, sweep in zip("DEF", swept, summary["sweeps"], strict=True):
        _sweep(axis, sweep, summary["compare_chunks"], letter)
    _residuals(residual, summary["measured"])
    fit = summary["fit"]
    fitted = f"{len(fit['values'])} parameters fitted to {fit['num_points']} points. " if fit else ""
    write_titles(
        figure,
        f"SIMULATION of {summary['device']}: when chunks help",
        [
            f"{fitted}Squares are measurements (the paper's, or ours on the H200): filled ones were fitted, hollow "
            "ones predicted. Lines and everything else are simulated; nothing simulated was measured."
        ],
    )
    path = run_path / "simulation.png"
    figure.savefig(path, dpi=130)
    return path


def _speeds(axis: "Axes", summary: dict[str, Any]) -> None:
    tidy(axis)
    for workload, inputs, color in (
        ("microbenchmark", "random", BLUE),
        ("microbenchmark", "zero", ORANGE),
        ("training", "random", VERMILION),
    ):
        rows = [row for row in summary["rows"] if (row["workload"], row["inputs"]) == (workload, inputs)]
        rows.sort(key=lambda row: row["chunks"])
        label = workload if workload == "training" else f"{workload}, {inputs}"
        if rows:
            chunks, gains = [row["chunks"] for row in rows], [row["speed_over_1"] for row in rows]
            axis.plot(chunks, gains, color=color, marker=".", label=label)
        for point in summary["measured"]:
            over = point["over"]
            if (point["workload"], point["inputs"], point["quantity"]) != (workload, inputs, "speed"):
                continue
            if over == {"inputs": inputs, "chunks": 1}:
                _square(axis, point["chunks"], point["value"], color, point["role"])
    if other := summary["brake_that_reads_power"]:
        chunks, gains = [row["chunks"] for row in other], [row["speed_over_1"] for row in other]
        axis.plot(chunks, gains, color=ORANGE, linestyle=":", label="zero, if the brake reads power")
    axis.axhline(1.0, color=LIGHT_GREY, zorder=0)
    axis.set_xscale("log", base=2)
    ticks = sorted({row["chunks"] for row in summary["rows"]})
    axis.set_xticks(ticks, [str(tick) for tick in ticks])
    axis.set_xlabel("chunks")
    axis.set_ylabel("speed / speed at 1 chunk")
    axis.set_title("A  speed against chunks", fontsize=9, loc="left")
    low, high = axis.get_ylim()
    axis.set_ylim(low, high + 0.5 * (high - low))  # room for the legend
    axis.legend(frameon=False, fontsize=SMALL, loc="upper left")


def _square(axis: "Axes", x: float, y: float, color: str, role: str) -> None:
    face = color if role == "fitted" else "white"
    axis.plot(x, y, marker="s", markersize=7, color=color, markerfacecolor=face, linestyle="None", zorder=5)


def _over_time(axis: "Axes", recorded: Sequence["Recorded"], field: str, label: str, title: str) -> None:
    tidy(axis)
    for stretch, color in zip(recorded, (VERMILION, BLUE), strict=False):
        name = chunks_in_words(stretch.chunks)
        axis.plot(stretch.time_s, getattr(stretch, field), color=color, linewidth=0.8, label=name)
    axis.set_xlabel("time (s)")
    axis.set_ylabel(label)
    axis.set_title(title, fontsize=9, loc="left")
    axis.legend(frameon=False, fontsize=SMALL, loc="lower right", bbox_to_anchor=(1, 1), ncols=2, borderaxespad=0)


def _sweep(axis: "Axes", sweep: dict[str, Any], chunks: int, letter: str) -> None:
    tidy(axis)
    for inputs, color in _COLORS.items():
        own = [point for point in sweep["points"] if point["inputs"] == inputs]
        axis.plot(
            [point["x"] for point in own], [point["gain"] for point in own], color=color, marker=".", label=inputs
        )
    axis.axvline(sweep["own_x"], color=GREY, linestyle="--", linewidth=1, label="this device")
    axis.axhline(1.0, color=LIGHT_GREY, zorder=0)
    if sweep["name"] == "period":
        axis.set_xscale("log", base=2)
    axis.set_xlabel(sweep["x_label"])
    axis.set_ylabel(f"speed at {chunks} chunks / at 1")
    titles = {
        "period": "chunk period against controller",
        "power_ratio": "memory-to-compute power ratio",
        "distance": "distance to the limit",
    }
    axis.set_title(f"{letter}  {titles[sweep['name']]}", fontsize=9, loc="left")
    axis.legend(frameon=False, fontsize=SMALL)


def _residuals(axis: "Axes", measured: Sequence[dict[str, Any]]) -> None:
    tidy(axis)
    axis.set_title("G  simulated minus measured", fontsize=9, loc="left")
    if not measured:
        axis.text(0.5, 0.5, "nothing was measured on this device", ha="center", transform=axis.transAxes)
        axis.set_axis_off()
        return
    for y, point in enumerate(reversed(measured)):
        off = point["residual_in_tolerances"]
        shown = math.copysign(min(abs(off), _SHOWN_TOLERANCES), off)
        axis.plot([0, shown], [y, y], color=LIGHT_GREY, linewidth=1, zorder=1)
        _square(axis, shown, y, _COLORS[point["inputs"]], point["role"])
        axis.text(-_SHOWN_TOLERANCES - 0.4, y, point["label"], va="center", ha="right", fontsize=SMALL)
        text = f"{point['value']:.4g} measured, {point['simulated']:.4g} simulated"
        axis.text(
            _SHOWN_TOLERANCES + 0.4, y, text, va="center", fontsize=SMALL, color=BLACK if off == shown else VERMILION
        )
    axis.axvspan(-1, 1, color=LIGHT_GREY, alpha=0.4, zorder=0)
    axis.set_xlim(-_SHOWN_TOLERANCES - 11, _SHOWN_TOLERANCES + 7)
    axis.set_xticks(range(-8, 9, 2))
    axis.set_yticks([])
    axis.spines["left"].set_visible(False)
    axis.set_xlabel("residual, in tolerances of the point (at the edge: larger)")
