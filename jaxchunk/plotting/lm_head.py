"""The figure of the LM-head benchmark."""

import json
from pathlib import Path

import numpy as np

from jaxchunk.plotting.style import BLUE, GREY, VERMILION, new_figure

FLOOR = "GEMM floor"  # the variant that the others are measured against


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
    figure = new_figure(4 * len(measures) + 2, 1 + 0.35 * len(rows))
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
