"""Power, clock and temperature of the microbenchmark: folded over an iteration, and as they were sampled."""

from typing import TYPE_CHECKING, Any

import numpy as np

from jaxchunk.bench.figures.folding import Folded, between, fold, renewal, resolution_note, valid_windows
from jaxchunk.bench.figures.microbench_run import MicrobenchRun
from jaxchunk.measuring.protocol import Measurement
from jaxchunk.plotting.style import BLUE, ORANGE, SMALL, tidy, write_titles
from jaxchunk.words import chunks_in_words

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLUMNS = {"power_w": ("power", "W"), "sm_clock_mhz": ("SM clock", "MHz"), "temperature_c": ("temperature", "°C")}
PAIR_COLORS = {"1-chunk": ORANGE, "best": BLUE}  # far apart in grey as well
_STRETCH_S = 10.0


def draw_power(figure: "Figure", run: MicrobenchRun) -> bool:
    """One chunk beside the best count: left folded over an iteration, right a stretch of raw samples.

    Returns:
      False where no window has samples.
    """
    telemetry = run.telemetry
    if telemetry is None:
        return False
    windows = {label: valid_windows(run.measurements, row.variant) for label, row in run.pair.items()}
    every = [window for own in windows.values() for window in own]
    columns = [column for column in COLUMNS if any(_has(telemetry, window, column) for window in every)]
    if not columns:
        return False
    figure.set_size_inches(7, 1.6 + 1.6 * len(columns))
    axes = figure.subplots(len(columns), 2, sharex="col", sharey="row", squeeze=False)
    captions, last_s, unresolved = [], 0.0, False
    for place, (label, own) in enumerate(windows.items()):
        name = chunks_label(run, label)
        stretch = _stretch(telemetry, own, columns[0])
        for (left, right), column in zip(axes, columns, strict=True):
            folded = fold(telemetry, own, column)
            if folded is not None:
                draw_folded(left, folded, 1.0, PAIR_COLORS[label], name)
            if stretch is not None:
                time_s, values = between(telemetry, column, *stretch)
                last_s = max(last_s, stretch[1] - stretch[0])
                right.plot(time_s - stretch[0], values, color=PAIR_COLORS[label], linewidth=1, label=name)
                if values.size:
                    text = f"{name}: std {np.std(values):.1f} {COLUMNS[column][1]}"
                    _write_std(right, text, place, PAIR_COLORS[label])
        captions.append(fold_caption(name, fold(telemetry, own, columns[0]), own))
        note = resolution_note(renewal(telemetry, own), _iteration_s(run, label))
        captions += [f"{name}: {note}"] if note else []
        unresolved |= note is not None
    _finish(axes, columns, last_s, unresolved)
    write_titles(figure, f"{run.title}, {_inputs(run)} inputs", captions)
    return True


def chunks_label(run: MicrobenchRun, label: str) -> str:
    """`1 chunk`, `4 chunks`."""
    return chunks_in_words(run.pair[label].chunks)


def draw_folded(axis: "Axes", folded: Folded, scale: float, color: str, name: str | None = None) -> None:
    """A fold's median as a line and its band, over the phase times `scale`."""
    known = np.isfinite(folded.median)
    x = folded.phase[known] * scale
    axis.fill_between(x, folded.low[known], folded.high[known], color=color, alpha=0.25, linewidth=0)
    axis.plot(x, folded.median[known], color=color, linewidth=1.4, label=name)


def fold_caption(name: str, folded: Folded | None, windows: list[Measurement]) -> str:
    """How many samples a fold stands on, or why there is none."""
    if folded is None:
        return f"{name}: not folded, for no completion times of iterations were kept"
    return f"{name}: {folded.samples} samples in {folded.iterations} iterations of {len(windows)} windows"


def _finish(axes: np.ndarray, columns: list[str], last_s: float, unresolved: bool) -> None:
    """Labels, limits and legend of all panels, shape [columns, 2]."""
    for (left, right), column in zip(axes, columns, strict=True):
        left.set_ylabel("{} ({})".format(*COLUMNS[column]))
        tidy(left)
        tidy(right)
        low, high = left.get_ylim()
        left.set_ylim(low, high + 0.2 * (high - low))  # room for what is written inside
    doubt = "\n(resolution: see below)" if unresolved else ""
    axes[0, 0].set_title(f"folded over an iteration: median, 10-90% band{doubt}", fontsize=9)
    axes[0, 1].set_title("raw samples, the middle window", fontsize=9)
    axes[-1, 0].set_xlabel("phase of an iteration")
    axes[-1, 0].set_xlim(0, 1)
    axes[-1, 1].set_xlabel("time (s)")
    axes[-1, 1].set_xlim(0, last_s or 1.0)
    if axes[0, 0].lines:
        axes[0, 0].legend(frameon=False, fontsize=SMALL, loc="upper right", ncols=2)


def _iteration_s(run: MicrobenchRun, label: str) -> float:
    time_s = run.pair[label].time_s
    assert time_s is not None  # the pair is chosen by it
    return time_s.median


def _inputs(run: MicrobenchRun) -> str:
    return next(iter(run.pair.values())).inputs


def _has(telemetry: dict[str, np.ndarray], window: Measurement, column: str) -> bool:
    return bool(between(telemetry, column, window.start_s, window.end_s)[0].size)


def _stretch(telemetry: dict[str, np.ndarray], windows: list[Measurement], column: str) -> tuple[float, float] | None:
    """Start and end of the middle of the middle window that has samples."""
    windows = [window for window in windows if _has(telemetry, window, column)]
    if not windows:
        return None
    window = windows[len(windows) // 2]
    middle_s, half_s = (window.start_s + window.end_s) / 2, min(_STRETCH_S, window.end_s - window.start_s) / 2
    return middle_s - half_s, middle_s + half_s


def _write_std(axis: "Axes", text: str, place: int, color: str) -> None:
    style: dict[str, Any] = {"ha": "left" if place == 0 else "right", "va": "top", "fontsize": SMALL}
    box = {"facecolor": "white", "edgecolor": color, "linewidth": 1, "pad": 1.5}
    axis.text(0.02 if place == 0 else 0.98, 0.97, text, transform=axis.transAxes, bbox=box, **style)
