"""The figures of a report, as SVG that stands inside of HTML."""

import io
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from jaxchunk.plotting.style import legend_above, new_panels, run_style
from jaxchunk.report.run_records import RunRecords
from jaxchunk.training.records import WARMUP_STEPS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_BINS = 600  # along a line; more than a screen shows, and little enough for a page
_TIME_BINS, _SHORTEST_BIN_S = 120, 0.25  # of telemetry: each is a mean and a band


def loss_figure(runs: Sequence[RunRecords]) -> str | None:
    """Training loss by step with validations as dots, and how far it is from the first run's; None without a step."""
    if not (shown := _with_steps(runs)):
        return None
    figure, axes = new_panels(2 if len(shown) > 1 else 1, height=2.4)
    first = {record.step: record.loss for record in shown[0][1].steps}
    for index, run in shown:
        steps, losses = np.array([(record.step, record.loss) for record in run.steps], float).T
        axes[0].plot(*thinned(steps, losses), **run_style(index), linewidth=1, label=_legend_text(run))
        if run.validation:
            points = [(record["step"], record["val_loss"]) for record in run.validation]
            axes[0].plot(*np.array(points, float).T, "o", color=run_style(index)["color"], markersize=5)
        common = [(record.step, record.loss - first[record.step]) for record in run.steps if record.step in first]
        if len(shown) > 1 and common:
            axes[1].plot(*thinned(*np.array(common, float).T), **run_style(index), linewidth=1)
            axes[1].set_ylabel("less the first run's")
    axes[0].set_ylabel("loss (nats/token)")
    axes[-1].set_xlabel("step")
    return _finished(figure, axes[0], "loss")


def speed_figure(runs: Sequence[RunRecords]) -> str | None:
    """Tokens/s by step, scaled to what comes after the first steps; None where no run has a step."""
    if not (shown := _with_steps(runs)):
        return None
    figure, axis = _panel("tokens/s")
    steady = []
    for index, run in shown:
        steps, speeds = np.array([(record.step, record.tokens_per_s) for record in run.steps], float).T
        axis.plot(*thinned(steps, speeds), **run_style(index), linewidth=1, label=_legend_text(run))
        steady.append(speeds[WARMUP_STEPS:] if len(speeds) > 2 * WARMUP_STEPS else speeds)
    low, high = np.percentile(np.concatenate(steady), [0.5, 99.5])
    margin = 0.15 * (high - low) or 0.05 * high
    axis.set_ylim(max(0.0, low - margin), high + margin)
    axis.yaxis.set_major_formatter("{x:,.0f}")
    return _finished(figure, axis, "speed")


def energy_figure(runs: Sequence[RunRecords]) -> str | None:
    """Energy per token of steps (dots, with their bounds) and of stretches (lines); None where none is known."""
    figure, axis = _panel("energy (mJ/token)")
    drawn = False
    for index, run in enumerate(runs):
        color, tokens = run_style(index)["color"], run.tokens_per_step
        if tokens is None:
            continue
        points = [
            (record.step, record.energy_j, record.energy_bound_j or 0.0)
            for record in run.steps
            if record.energy_j is not None
        ]
        lines = [
            (s.first_step - 0.5, s.last_step + 0.5, s.energy_j / (s.last_step - s.first_step + 1))
            for s in run.stretches
            if s.energy_j is not None
        ]
        if points:
            step, energy, bound = np.array(_some(points), float).T
            scale = 1e3 / tokens
            step += 0.8 * ((index + 0.5) / len(runs) - 0.5)  # beside the other runs'
            axis.errorbar(step, energy * scale, bound * scale, fmt=".", color=color, elinewidth=0.5, markersize=3)
        for first, last, energy_j in lines:
            axis.plot([first, last], [energy_j * 1e3 / tokens] * 2, color=color, linewidth=2)
        if points or lines:
            axis.plot([], [], color=color, label=_legend_text(run))
            drawn = True
    return _finished(figure, axis, "energy") if drawn else None


def telemetry_figure(runs: Sequence[RunRecords]) -> str | None:
    """Power, temperature and SM clock since the first step: means and 10th to 90th percentiles; None without any."""
    shown = [(i, run) for i, run in enumerate(runs) if run.telemetry is not None and run.steps]
    if not shown:
        return None
    figure, axes = new_panels(3)
    end_s = max(run.steps[-1].time_s - run.start_s for _, run in shown)
    edges = np.linspace(0, end_s, min(_TIME_BINS, max(1, int(end_s / _SHORTEST_BIN_S))) + 1)
    middle = (edges[:-1] + edges[1:]) / 2
    columns = (("power_w", "power (W)"), ("temperature_c", "temperature (°C)"), ("sm_clock_mhz", "SM clock (MHz)"))
    for axis, (name, label) in zip(axes, columns, strict=True):
        axis.set_ylabel(label)
        for index, run in shown:
            assert run.telemetry is not None
            time_s = run.telemetry["time_s"]
            during = (time_s >= run.start_s) & (time_s <= run.steps[-1].time_s)
            values = run.telemetry.get(name, np.full_like(time_s, np.nan))[during]
            mean, low, high = binned(time_s[during] - run.start_s, values, edges)
            axis.fill_between(middle, low, high, color=run_style(index)["color"], alpha=0.15, linewidth=0)
            axis.plot(middle, mean, **run_style(index), linewidth=1, label=_legend_text(run))
    axes[-1].set_xlabel(f"time since the first step began (s); means of {edges[1]:.2g} s")
    return _finished(figure, axes[0], "telemetry")


def thinned(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A line with few points that looks the same: of each of many bins along it, the lowest and the highest point."""
    if len(x) <= 2 * _BINS:
        return x, y
    kept: list[int] = []
    for part in np.array_split(np.arange(len(x)), _BINS):
        values = y[part]
        bad = np.flatnonzero(~np.isfinite(values))[:1]  # a gap stays a gap
        ends = [np.argmin(np.nan_to_num(values, nan=np.inf)), np.argmax(np.nan_to_num(values, nan=-np.inf))]
        kept += sorted({int(part[i]) for i in (*ends, *bad)})
    return x[kept], y[kept]


def binned(time_s: np.ndarray, values: np.ndarray, edges: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean, 10th and 90th percentile of the samples between neighbouring edges; NaN where there are none."""
    known = np.isfinite(values)
    time_s, values = time_s[known], values[known]
    result = np.full((3, len(edges) - 1), np.nan)
    bins = np.digitize(time_s, edges) - 1
    for index in np.unique(bins[(bins >= 0) & (bins < len(edges) - 1)]):
        inside = values[bins == index]
        result[:, index] = (inside.mean(), *np.percentile(inside, [10, 90]))
    return result[0], result[1], result[2]


def _some(points: list[tuple[int, float, float]]) -> list[tuple[int, float, float]]:
    """At most `_BINS` of the points, evenly."""
    return points[:: -(-len(points) // _BINS)]


def _with_steps(runs: Sequence[RunRecords]) -> list[tuple[int, RunRecords]]:
    """With the run's index, which gives its colour."""
    return [(index, run) for index, run in enumerate(runs) if run.steps]


def _legend_text(run: RunRecords) -> str:
    """The label, kept from matplotlib's meanings of a dollar and of a leading underscore."""
    text = run.label.replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


def _panel(label: str) -> tuple["Figure", "Axes"]:
    figure, (axis,) = new_panels(1, height=2.4)
    axis.set_xlabel("step")
    axis.set_ylabel(label)
    return figure, axis


def _finished(figure: "Figure", axis: "Axes", name: str) -> str:
    """The figure as SVG, with names that nothing else on the page has, and no references to anything outside."""
    import matplotlib

    legend_above(axis, columns=4)
    file = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "font.family": "sans-serif"}):
        figure.savefig(file, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    svg = file.getvalue()
    return re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", svg[svg.index("<svg") :])
