"""Figures of the microbenchmark: what chunks do to throughput, power, energy, and the kernels of an iteration."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxchunk.bench.figures.microbench_run import MicrobenchRun, read_microbench
from jaxchunk.bench.figures.power import draw_power
from jaxchunk.bench.figures.timeline import draw_timeline
from jaxchunk.bench.verdict import Row
from jaxchunk.measuring.statistics import Interval, ratios, values_of
from jaxchunk.plotting.style import (
    BLUE,
    GREY,
    SMALL,
    VERMILION,
    LabelledPoint,
    label_points,
    legend_above,
    new_figure,
    tidy,
    write_titles,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_DPI = 200
_COLORS = {"random": BLUE, "zero": VERMILION}
_MARKERS = ("o", "s", "^", "D")
_INTERVAL = "intervals: 95% bootstrap of the median over repeats"
_DODGE = 0.22  # octaves between series at the same chunk count


def plot_microbench(run_path: Path) -> list[Path]:
    """Draws the figures of a microbenchmark; those for which there is no data are left out.

    `throughput.png`, `power.png`, `energy_time.png`, `period.png`, `timeline.png`. A run that was killed has figures of
    what was measured.

    Args:
      run_path: a directory that `scripts/microbench.py` wrote.

    Returns:
      The figures' paths.

    Raises:
      InputError: the directory holds no microbenchmark, or nothing was measured.
    """
    run = read_microbench(run_path)
    drawings: dict[str, Callable[[Figure, MicrobenchRun], bool]] = {
        "throughput": draw_throughput,
        "power": draw_power,
        "energy_time": draw_energy_time,
        "period": draw_period,
        "timeline": draw_timeline,
    }
    paths = []
    for name, draw in drawings.items():
        figure = new_figure(7, 4)
        if draw(figure, run):
            paths.append(run_path / f"{name}.png")
            figure.savefig(paths[-1], dpi=_DPI)
    return paths


def draw_throughput(figure: "Figure", run: MicrobenchRun) -> bool:
    """GEMM throughput per chunk count, from zero and relative to one chunk; False where nothing was measured."""
    series = run.series
    if not series:
        return False
    figure.set_size_inches(7, 3.4)
    related = {key: [row for row in rows if row.time_ratio is not None] for key, rows in series.items()}
    with_change = any(len(rows) > 1 for rows in related.values())
    axes = list(np.atleast_1d(figure.subplots(1, 1 + with_change)))
    in_tera = max(row.tflops.high for rows in series.values() for row in rows if row.tflops) >= 1
    scale, unit = (1.0, "TFLOP/s") if in_tera else (1e3, "GFLOP/s")
    for place, (key, rows) in enumerate(series.items()):
        dodge = 2 ** (_DODGE * (place - (len(series) - 1) / 2))
        style = _style(run, key, place)
        dots = [[value * scale for value in _throughputs(run, row)] for row in rows]
        _draw_intervals(axes[0], rows, [row.tflops for row in rows], dots, scale=scale, dodge=dodge, style=style)
        if with_change and related[key]:
            base = next((row.variant for row in rows if row.chunks == 1), "")
            repeats = [ratios(run.measurements, row.variant, base) for row in related[key]]
            dots = [[100 / ratio - 100 for ratio in repeat] for repeat in repeats]
            changes = [_speedup(row.time_ratio, 100.0, -100.0) for row in related[key]]
            _draw_intervals(axes[1], related[key], changes, dots, scale=1.0, dodge=dodge, style=style)
    axes[0].set_ylim(0, axes[0].get_ylim()[1] * 1.05)
    axes[0].set_ylabel(f"GEMM throughput ({unit})")
    if with_change:
        axes[1].axhline(0, color=GREY, linewidth=1)
        axes[1].set_ylabel("change against 1 chunk (%)")
    _chunk_ticks(axes, sorted({row.chunks for rows in series.values() for row in rows}))
    legend_above(axes[0], 2)
    write_titles(figure, run.title, [f"dots: single repeats; {_INTERVAL}"])
    return True


def draw_energy_time(figure: "Figure", run: MicrobenchRun) -> bool:
    """Energy against time of a call, a panel for each kind of inputs; False where no energy is known."""
    series = {key: [row for row in rows if row.energy_j is not None] for key, rows in run.series.items()}
    series = {key: rows for key, rows in series.items() if rows}
    if not series:
        return False
    kinds = list(dict.fromkeys(inputs for inputs, _ in series))
    figure.set_size_inches(max(5.0, 1 + 3.2 * len(kinds)), 3.8)
    axes = dict(zip(kinds, np.atleast_1d(figure.subplots(1, len(kinds))), strict=True))
    points: dict[str, list[LabelledPoint]] = {inputs: [] for inputs in kinds}
    for place, (key, rows) in enumerate(series.items()):
        time_ms = [_scaled(row.time_s, 1e3) for row in rows]
        energy_j = [_scaled(row.energy_j) for row in rows]
        _draw_crosses(axes[key[0]], time_ms, energy_j, _style(run, key, place))
        triples = zip(rows, time_ms, energy_j, strict=True)
        points[key[0]] += [LabelledPoint(str(row.chunks), x, y, _COLORS.get(key[0], GREY)) for row, x, y in triples]
    several = len({softmax for _, softmax in series}) > 1
    for inputs, axis in axes.items():
        axis.margins(0.18)
        _draw_iso_power(axis)
        tidy(axis)
        axis.grid(False)  # the lines of constant power are the grid
        axis.set_title(f"{inputs} inputs", fontsize=10, pad=16)
        axis.set_xlabel("time per call (ms)")
        if several:
            axis.legend(frameon=False, fontsize=SMALL)
    axes[kinds[0]].set_ylabel("energy per call (J, GPU rail)")
    legend = "numbers: chunks; grey: constant mean power; the axes do not start at 0"
    write_titles(figure, run.title, [f"{legend}; {_INTERVAL}"])
    for inputs, axis in axes.items():
        label_points(figure, axis, points[inputs])
    return True


def draw_period(figure: "Figure", run: MicrobenchRun) -> bool:
    """Speed-up over one chunk against the period of the chunks; False where there is nothing to compare."""
    series = {key: [row for row in rows if row.time_ratio is not None] for key, rows in run.series.items()}
    series = {key: rows for key, rows in series.items() if len(rows) > 1}
    if not series:
        return False
    figure.set_size_inches(5.5, 3.8)
    axis, points = figure.subplots(), []
    for place, (key, rows) in enumerate(series.items()):
        period_ms = [_scaled(row.time_s, 1e3 / row.chunks) for row in rows]
        speedup = [_scaled(_speedup(row.time_ratio)) for row in rows]
        _draw_crosses(axis, period_ms, speedup, _style(run, key, place))
        triples = zip(rows, period_ms, speedup, strict=True)
        points += [LabelledPoint(str(row.chunks), x, y, _COLORS.get(key[0], GREY)) for row, x, y in triples]
    axis.set_xscale("log")
    _plain_log_ticks(axis)
    axis.axhline(1, color=GREY, linewidth=1)
    axis.margins(0.08, 0.15)
    tidy(axis)
    axis.set_xlabel("chunk period: time per call / chunks (ms)")
    axis.set_ylabel("speed-up over 1 chunk")
    legend_above(axis, 2)
    write_titles(figure, run.title, [f"numbers: chunks; the y axis does not start at 0; {_INTERVAL}"])
    label_points(figure, axis, points)
    return True


def _style(run: MicrobenchRun, key: tuple[str, str], place: int) -> dict[str, Any]:
    return {
        "color": _COLORS.get(key[0], GREY),
        "marker": _MARKERS[place % len(_MARKERS)],
        "label": run.series_label(*key),
    }


def _throughputs(run: MicrobenchRun, row: Row) -> list[float]:
    """Of every valid repeat, in TFLOP/s."""
    return [run.flops / time_s / 1e12 for time_s in values_of(run.measurements, row.variant).values()]


def _speedup(ratio: Interval | None, scale: float = 1.0, offset: float = 0.0) -> Interval:
    """`scale` / ratio + `offset`: the reciprocal turns the interval round."""
    assert ratio is not None
    return Interval(*(scale / value + offset for value in (ratio.median, ratio.high, ratio.low)))


def _scaled(value: Interval | None, scale: float = 1.0) -> Interval:
    assert value is not None
    return Interval(*(edge * scale for edge in value))


def _bars(values: Sequence[Interval]) -> np.ndarray:
    """Lengths of error bars, below and above, shape [2, points]."""
    return np.array([[v.median - v.low, v.high - v.median] for v in values]).T


def _draw_intervals(
    axis: "Axes",
    rows: Sequence[Row],
    values: Sequence[Interval | None],
    dots: Sequence[Sequence[float]],
    *,
    scale: float,
    dodge: float,
    style: dict[str, Any],
) -> None:
    """Medians with error bars over the chunk count, and the repeats beside them."""
    x = [row.chunks * dodge for row in rows]
    known = [_scaled(value, scale) for value in values]
    axis.errorbar(x, [v.median for v in known], yerr=_bars(known), linewidth=1.2, capsize=2.5, markersize=4.5, **style)
    beside = 2 ** (_DODGE * 0.45)
    places = [place * beside for place, own in zip(x, dots, strict=True) for _ in own]
    axis.plot(
        places, [dot for own in dots for dot in own], ".", color=style["color"], alpha=0.3, markersize=4, zorder=1
    )


def _draw_crosses(axis: "Axes", x: Sequence[Interval], y: Sequence[Interval], style: dict[str, Any]) -> None:
    """Points with error bars in both directions, joined faintly in order of the chunk counts."""
    middle = [v.median for v in x], [v.median for v in y]
    axis.plot(*middle, color=style["color"], alpha=0.3, linewidth=1)
    axis.errorbar(
        *middle, xerr=_bars(x), yerr=_bars(y), linestyle="none", elinewidth=1, capsize=2, markersize=4.5, **style
    )


def _chunk_ticks(axes: Sequence["Axes"], counts: Sequence[int]) -> None:
    for axis in axes:
        axis.set_xscale("log", base=2)
        axis.set_xticks(counts, [str(count) for count in counts])
        axis.minorticks_off()
        axis.set_xlabel("chunks")
        tidy(axis)


def _plain_log_ticks(axis: "Axes") -> None:
    """1, 2, 5, 10 in place of powers: the range is short."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _draw_iso_power(axis: "Axes") -> None:
    """Faint lines of constant power within the limits of the axes (ms, J), with the watts at their ends."""
    from matplotlib.ticker import MaxNLocator

    (x0, x1), (y0, y1) = axis.get_xlim(), axis.get_ylim()
    lowest_w, highest_w = 1e3 * y0 / x1, 1e3 * y1 / x0
    for power_w in MaxNLocator(7, steps=[1, 2, 2.5, 5, 10]).tick_values(lowest_w, highest_w):
        slope = power_w / 1e3  # joules a millisecond
        enters, leaves = max(x0, y0 / slope if slope > 0 else x0), min(x1, y1 / slope if slope > 0 else x1)
        if leaves - enters < 0.15 * (x1 - x0):  # off the axes, or only a corner of them
            continue
        axis.plot([enters, leaves], [slope * enters, slope * leaves], color=GREY, alpha=0.35, linewidth=0.8, zorder=0)
        right = slope * x1 <= y1
        text, place = f"{power_w:g} W", ((x1, slope * x1) if right else (leaves, y1))
        style: dict[str, Any] = {"ha": "left", "va": "center"} if right else {"ha": "center", "va": "bottom"}
        axis.annotate(
            text,
            place,
            xytext=(2, 0) if right else (0, 1),
            textcoords="offset points",
            color=GREY,
            fontsize=SMALL,
            **style,
        )
    axis.set_xlim(x0, x1)
    axis.set_ylim(y0, y1)
