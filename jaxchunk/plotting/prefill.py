"""The figure of the prefill benchmark: what chunks change, by length and chunk count (the paper's figure 5)."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from jaxchunk.plotting.style import SMALL, new_figure, write_titles

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = dict[str, Any]


class _Panel(NamedTuple):
    field: str
    title: str
    least_scale: float  # percent that the colours span at least: less than it is hardly seen


_PANELS = (
    _Panel("time_ratio", "latency saved (%)", 2.0),
    _Panel("energy_ratio", "energy saved, GPU rail (%)", 2.0),
    _Panel("power_ripple_ratio", "power ripple removed (%)", 20.0),
    _Panel("clock_ripple_ratio", "clock ripple removed (%)", 20.0),
)


def plot_prefill(run_path: Path) -> Path | None:
    """Draws `prefill.png` from a benchmark's summary: improvements over one chunk, of which more is better.

    Args:
      run_path: a directory that `scripts/prefill.py` wrote.

    Returns:
      The figure's path; None where nothing was measured beside one chunk.
    """
    config = json.loads((run_path / "config.json").read_text())
    rows = json.loads((run_path / "summary.json").read_text())
    rows = [row for row in rows if row["peer"] is None and row["chunks"] > 1]
    panels = [panel for panel in _PANELS if any(row[panel.field] for row in rows)]
    if not panels:
        return None
    lengths, counts = (sorted({row[name] for row in rows}) for name in ("seq_len", "chunks"))
    columns = min(2, len(panels))
    lines = -(-len(panels) // columns)
    figure = new_figure(columns * (2.2 + 0.8 * len(lengths)), 1.2 + lines * (1.2 + 0.45 * len(counts)))
    axes = list(np.ravel(figure.subplots(lines, columns, squeeze=False)))
    for axis, panel in zip(axes, panels, strict=False):
        _draw(figure, axis, panel, rows, lengths, counts)
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    model = config["hf_model"] or config["model"]
    title = f"Prefill in chunks over one chunk: {model}, {config['dtype']}, batch of {config['batch_size']}"
    caption = "Medians over interleaved repeats. Bold: the 95% bootstrap interval excludes no change."
    write_titles(figure, title, [caption])
    path = run_path / "prefill.png"
    figure.savefig(path, dpi=150)
    return path


def _draw(
    figure: "Figure",
    axis: "Axes",
    panel: _Panel,
    rows: Sequence[Row],
    lengths: Sequence[int],
    counts: Sequence[int],
) -> None:
    saved = np.full((len(counts), len(lengths)), np.nan)
    bold = np.zeros(saved.shape, bool)
    for row in rows:
        if (ratio := row[panel.field]) is not None:
            place = counts.index(row["chunks"]), lengths.index(row["seq_len"])
            saved[place] = 100 * (1 - ratio["median"])
            bold[place] = row["windows"] > 1 and (ratio["high"] < 1 or ratio["low"] > 1)  # one has no interval
    scale = max(panel.least_scale, float(np.nanmax(np.abs(saved))))
    image = axis.imshow(saved, cmap="RdBu", vmin=-scale, vmax=scale, aspect="auto")
    for (i, j), value in np.ndenumerate(saved):
        if np.isfinite(value):
            color = "white" if abs(value) > 0.6 * scale else "black"
            weight = "bold" if bold[i, j] else "normal"
            axis.text(j, i, f"{value:+.1f}", ha="center", va="center", fontsize=SMALL, color=color, weight=weight)
    axis.set_xticks(range(len(lengths)), [_short(length) for length in lengths], fontsize=SMALL)
    axis.set_yticks(range(len(counts)), list(map(str, counts)), fontsize=SMALL)
    axis.set_xlabel("tokens", fontsize=9)
    axis.set_ylabel("chunks", fontsize=9)
    axis.set_title(panel.title, fontsize=9, loc="left")
    figure.colorbar(image, ax=axis).ax.tick_params(labelsize=SMALL)


def _short(length: int) -> str:
    return f"{length // 1024}k" if length % 1024 == 0 else str(length)
