"""The figure of a sweep over chunk counts, with what `auto` chose."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxchunk.plotting.style import BLUE, SMALL, VERMILION, new_figure, tidy, write_titles


def plot_chunk_sweep(path: Path, rows: Sequence[Mapping[str, Any]], device: str) -> Path:
    """Draws `chunk_sweep.png` into a run's directory.

    Args:
      path: the directory.
      rows: of `bench.chunk_sweep`: a panel for each.
      device: its name.

    Returns:
      The figure's path.
    """
    columns = min(len(rows), 3)
    lines = -(-len(rows) // columns)
    figure = new_figure(3.6 * columns + 0.6, 2.6 * lines + 0.9)
    axes = np.atleast_1d(figure.subplots(lines, columns)).ravel()
    for axis, row in zip(axes, rows, strict=False):
        tidy(axis)
        known = {int(n): over for n, over in row["sweep_over_best"].items() if over is not None}
        middle = np.array([over["median"] for over in known.values()])
        ends = np.array([[over["low"] for over in known.values()], [over["high"] for over in known.values()]])
        errors = np.abs(ends - middle)
        axis.errorbar(list(known), middle, yerr=errors, color=BLUE, marker="o", markersize=4, capsize=3, linewidth=1)
        if (chosen := row["chosen"]) in known:
            axis.plot([chosen], [known[chosen]["median"]], "o", color=VERMILION, markersize=10, fillstyle="none")
        axis.axhspan(0.99, 1.01, color="#DDDDDD", alpha=0.5, linewidth=0)
        axis.set_xscale("log", base=2)
        axis.set_xticks(list(known), [str(n) for n in known], fontsize=SMALL)
        axis.minorticks_off()
        axis.set_xlabel("chunks")
        axis.set_ylabel(f"{row['objective']} / best")
        axis.set_title(f"{row['shape']}, {row['implementation']}", fontsize=SMALL)
    for axis in axes[len(rows) :]:
        axis.set_axis_off()
    write_titles(
        figure,
        f"{device}: an exhaustive sweep over chunk counts, and what auto chose (ring)",
        ["Medians over repeats with 95% bootstrap intervals; the band is 1% around the best of the sweep."],
    )
    target = path / "chunk_sweep.png"
    figure.savefig(target, dpi=150)
    return target
