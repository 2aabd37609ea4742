"""The figures of the LM-head benchmark, and of scoring through it."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxchunk.plotting.style import BLACK, BLUE, GREY, ORANGE, SMALL, VERMILION, new_figure, tidy, write_titles

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FLOOR = "GEMM floor"  # the variant that the others are measured against
AUTODIFF = "autodiff"  # all logits at once, gradients by autodiff
FLOAT32_LOGITS, BFLOAT16_LOGITS = "float32 logits", "bfloat16 logits"  # all at once, no gradients

_MEASURES = (("time_over_floor", "time / GEMM floor"), ("energy_over_floor", "energy (GPU rail) / GEMM floor"))
_KINDS = {"jaxchunk": BLUE, "peers": ORANGE, "XLA, all logits at once": GREY}


def plot_lm_head(run_path: Path) -> Path:
    """Draws `lm_head.png` from a benchmark's summary: time, and energy where it is known, of every variant.

    With peers, both are drawn as multiples of the floor.

    Args:
      run_path: a directory that `scripts/bench_lm_head.py` wrote.

    Returns:
      The figure's path.
    """
    config, rows = _read(run_path)
    path = run_path / "lm_head.png"
    if config.get("peers") and any(row["time_over_floor"] for row in rows):
        return plot_multiples_of_floor([run_path], path)
    measures = [("time_s", 1e3, "time (ms)", BLUE), ("energy_j", 1.0, "energy (J, GPU rail)", VERMILION)]
    measures = [measure for measure in measures if any(row[measure[0]] for row in rows)]
    figure = new_figure(4 * len(measures) + 2, 1 + 0.35 * len(rows))
    axes = np.atleast_1d(figure.subplots(1, len(measures), sharey=True))
    for axis, (field, scale, label, color) in zip(axes, measures, strict=True):
        known = [(i, row[field]) for i, row in enumerate(rows) if row[field]]
        medians = np.array([value["median"] for _, value in known]) * scale
        axis.barh(
            [i for i, _ in known], medians, xerr=_errors(known, scale), color=color, height=0.7, ecolor=BLACK, capsize=2
        )
        for i, value in known:
            if rows[i]["variant"] == FLOOR:
                axis.axvline(value["median"] * scale, color=GREY, linestyle="--", linewidth=1)
        axis.set_xlabel(label)
        axis.set_xlim(left=0)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_yticks(range(len(rows)), [row["variant"] for row in rows])
    axes[0].invert_yaxis()
    title = f"LM head, forward and backward, {_shape(config)} {config['dtype']}"
    figure.suptitle(f"{title}\nbars: median and 95% bootstrap interval", fontsize=10)
    figure.savefig(path, dpi=150)
    return path


def plot_multiples_of_floor(run_paths: Sequence[Path], path: Path) -> Path:
    """Draws time and energy of every variant as multiples of the three bare GEMMs, a row of panels a shape.

    Args:
      run_paths: directories that `scripts/bench_lm_head.py` wrote, one a shape.
      path: of the figure.

    Returns:
      `path`.
    """
    runs = [_read(run_path) for run_path in run_paths]
    panels = {_shape(config): rows for config, rows in runs}
    return _plot_multiples(
        panels, path, f"LM head, forward and backward, {runs[0][0]['dtype']}", "the three bare GEMMs"
    )


def plot_scoring(run_path: Path) -> Path | None:
    """Draws `scoring.png`: time and energy of scoring as multiples of the bare GEMM, a row of panels a shape.

    Args:
      run_path: a directory that `scripts/bench_scoring.py` wrote.

    Returns:
      The figure's path; None where the GEMM was not measured.
    """
    config, rows = _read(run_path)
    panels: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if row["time_over_floor"]:
            panels.setdefault(row["shape"], []).append(row | {"variant": row["method"]})
    if not panels:
        return None
    title = f"Log-probabilities of labels from hidden states [T, D], T x D x V, {config['dtype']}"
    return _plot_multiples(panels, run_path / "scoring.png", title, "the bare GEMM")


def _plot_multiples(panels: dict[str, list[dict[str, Any]]], path: Path, title: str, floor: str) -> Path:
    compared = [_fastest_first(rows) for rows in panels.values()]
    measures = [m for m in _MEASURES if any(row[m[0]] for rows in compared for row in rows)]
    counts = [max(len(rows), 1) for rows in compared]
    figure = new_figure(4 * len(measures) + 2, 1.3 + 0.45 * len(counts) + 0.27 * sum(counts))
    lines = figure.subplots(
        len(panels), len(measures), squeeze=False, sharex="col", sharey="row", gridspec_kw={"height_ratios": counts}
    )
    for line, rows, shape in zip(lines, compared, panels, strict=True):
        for axis, (field, _) in zip(line, measures, strict=True):
            _draw_multiples(axis, rows, field)
        line[0].set_yticks(range(len(rows)), [row["variant"] for row in rows], fontsize=SMALL)
        line[0].set_ylim(max(len(rows), 1) - 0.4, -0.6)
        line[0].set_title(shape, fontsize=9, loc="left")
    for axis, lowest, (field, label) in zip(lines[0], lines[-1], measures, strict=True):
        lowest.set_xlabel(label, fontsize=9)
        highest = max(row[field]["high"] for rows in compared for row in rows if row[field])
        axis.set_xlim(0, 1.16 * max(highest, 1.0))  # room for the numbers
    _legend(lines[0][-1], compared)
    caption = f"Bars: median and 95% bootstrap interval over interleaved repeats. Dashed: {floor}."
    write_titles(figure, title, [caption])
    figure.savefig(path, dpi=150)
    return path


def _draw_multiples(axis: "Axes", rows: Sequence[dict[str, Any]], field: str) -> None:
    known = [(i, row[field]) for i, row in enumerate(rows) if row[field]]
    if known:
        places, medians = [i for i, _ in known], [value["median"] for _, value in known]
        colors = [_KINDS[_kind(rows[i])] for i in places]
        axis.barh(
            places, medians, xerr=_errors(known), color=colors, height=0.7, ecolor=BLACK, capsize=2, error_kw={"lw": 1}
        )
    for i, value in known:
        beside: dict[str, Any] = {"xytext": (4, 0), "textcoords": "offset points", "va": "center", "fontsize": SMALL}
        axis.annotate(f"{value['median']:.3f}", (max(value["high"], 1.0), i), **beside)
    axis.axvline(1.0, color=BLACK, linestyle="--", linewidth=1)
    tidy(axis)
    axis.grid(axis="y", visible=False)
    axis.tick_params(labelsize=SMALL)
    axis.set_axisbelow(True)


def _legend(axis: "Axes", compared: Sequence[Sequence[dict[str, Any]]]) -> None:
    from matplotlib.patches import Patch

    present = {_kind(row) for rows in compared for row in rows}
    handles = [Patch(color=color, label=kind) for kind, color in _KINDS.items() if kind in present]
    axis.legend(
        handles=handles,
        loc="lower right",
        bbox_to_anchor=(1, 1),
        borderaxespad=0.2,
        frameon=False,
        fontsize=SMALL,
        ncols=len(handles),
        columnspacing=1.2,
    )


def _fastest_first(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    compared = [row for row in rows if row["variant"] != FLOOR and row["time_over_floor"]]
    return sorted(compared, key=lambda row: row["time_over_floor"]["median"])


def _kind(row: dict[str, Any]) -> str:
    if row["variant"] in (AUTODIFF, FLOAT32_LOGITS, BFLOAT16_LOGITS):
        return "XLA, all logits at once"
    return "peers" if row["is_peer"] else "jaxchunk"


def _errors(known: Sequence[tuple[int, dict[str, float]]], scale: float = 1.0) -> np.ndarray:
    return np.array([[v["median"] - v["low"], v["high"] - v["median"]] for _, v in known]).T * scale


def _shape(config: dict[str, Any]) -> str:
    return f"T={config['tokens']} D={config['width']} V={config['vocab']}"


def _read(run_path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    return json.loads((run_path / "config.json").read_text()), json.loads((run_path / "summary.json").read_text())
