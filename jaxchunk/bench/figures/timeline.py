"""The kernels of one iteration of the microbenchmark over power and clock."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from jaxchunk.bench.figures.folding import fold, milliseconds, renewal, resolution_note, valid_windows
from jaxchunk.bench.figures.microbench_run import MicrobenchRun
from jaxchunk.bench.figures.power import COLUMNS, PAIR_COLORS, chunks_label, draw_folded
from jaxchunk.bench.timeline import KINDS, KernelSpan
from jaxchunk.plotting.style import BLACK, BLUE, LIGHT_GREY, ORANGE, legend_above, tidy, write_titles

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_KIND_COLORS = {"gemm": BLUE, "softmax": ORANGE, "copy": BLACK, "other": LIGHT_GREY}  # four greys in print
_FOLDED = ("power_w", "sm_clock_mhz")


def one_iteration(spans: Sequence[KernelSpan], iteration_s: float, num_chunks: int) -> tuple[list[KernelSpan], float]:
    """The middle one of the calls in a timeline, from its first GEMM to the first GEMM of the next.

    How many calls there are is not written down. Every call has as many GEMMs, and every chunk of it; of the counts
    that allow this it is taken to be the one that makes a call last nearest to `iteration_s`.

    Args:
      spans: kernels of some calls, in order of their starts.
      iteration_s: seconds of an iteration, as measured without the profiler.
      num_chunks: chunks of an iteration.

    Returns:
      The spans, with `start_s` counted from the first GEMM, and the seconds from there to the next call (or, in a
      timeline's last call, to the end of its last kernel). Where no kernel is a GEMM, the first kernel stands for it.
    """
    anchors = [span for span in spans if span.kind == "gemm"] or list(spans)
    end_s = max(span.start_s + span.duration_s for span in spans)
    whole_s = end_s - anchors[0].start_s
    counts = [count for count in range(1, len(anchors) + 1) if len(anchors) % count == 0]
    counts = [count for count in counts if len(anchors) // count % num_chunks == 0] or counts
    calls = min(counts, key=lambda count: abs(math.log(max(whole_s, 1e-9) / count / iteration_s)))
    middle, of_one = (calls - 1) // 2, len(anchors) // calls
    first_s = anchors[middle * of_one].start_s
    last_s = anchors[(middle + 1) * of_one].start_s if middle + 1 < calls else end_s
    own = [span for span in spans if first_s <= span.start_s < last_s]
    shifted = [KernelSpan(span.name, span.kind, span.start_s - first_s, span.duration_s) for span in own]
    return shifted, last_s - first_s


def draw_timeline(figure: "Figure", run: MicrobenchRun) -> bool:
    """Kernels of an iteration of one chunk and of the best count, with folded power and clock below each.

    Returns:
      False where no timeline was recorded.
    """
    labels = [label for label in run.pair if label in run.timelines]
    if not labels:
        return False
    windows = {label: valid_windows(run.measurements, run.pair[label].variant) for label in labels}
    folds = {
        (label, column): folded
        for label in labels
        for column in _FOLDED
        if run.telemetry is not None and (folded := fold(run.telemetry, windows[label], column)) is not None
    }
    columns = [column for column in _FOLDED if any((label, column) in folds for label in labels)]
    heights = [0.55, *[1.0] * len(columns)] * len(labels)
    figure.set_size_inches(7, 1.5 + 1.05 * sum(heights))
    axes = list(figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0])
    captions, shown = [], set()
    rows = 1 + len(columns)
    for place, label in enumerate(labels):
        own = axes[place * rows : (place + 1) * rows]
        time_s = run.pair[label].time_s
        assert time_s is not None  # the pair is chosen by it
        spans, _ = one_iteration(run.timelines[label], time_s.median, run.pair[label].chunks)
        shown |= {span.kind for span in spans}
        _draw_kernels(own[0], spans)
        lines = _captions(run, label, folds)
        title = f"{chunks_label(run, label)}: {milliseconds(time_s.median)} per call"
        title += "; resolution: see below" if len(lines) > 1 else ""
        own[0].set_title(title, fontsize=9, loc="left")
        for axis, column in zip(own[1:], columns, strict=True):
            if (label, column) in folds:
                draw_folded(axis, folds[label, column], time_s.median * 1e3, PAIR_COLORS[label])
            axis.set_ylabel("{}\n({})".format(*COLUMNS[column]), fontsize=9)
            tidy(axis)
        captions += lines
    _share_limits(axes, rows)
    axes[0].set_xlim(left=0)
    axes[-1].set_xlabel("time since the first GEMM of an iteration (ms)")
    _legend(axes[0], [kind for kind in KINDS if kind in shown])
    title = f"{run.title}, {run.pair[labels[0]].inputs} inputs"
    write_titles(figure, title, ["kernels: one call under the profiler", *captions])
    return True


def _draw_kernels(axis: "Axes", spans: Sequence[KernelSpan]) -> None:
    for kind in KINDS:
        bars = [(span.start_s * 1e3, span.duration_s * 1e3) for span in spans if span.kind == kind]
        if bars:
            axis.broken_barh(bars, (0, 1), facecolors=_KIND_COLORS[kind], linewidth=0, label=kind)
    axis.set_ylim(0, 1)
    axis.set_yticks([])
    axis.set_ylabel("kernels", fontsize=9)
    axis.spines[["top", "right", "left"]].set_visible(False)


def _share_limits(axes: Sequence["Axes"], rows: int) -> None:
    """The same quantity on the same scale for both."""
    for row in range(1, rows):
        same = axes[row::rows]
        limits = [axis.get_ylim() for axis in same if axis.has_data()]
        for axis in same:
            axis.set_ylim(min(low for low, _ in limits), max(high for _, high in limits))


def _legend(axis: "Axes", kinds: Sequence[str]) -> None:
    from matplotlib.patches import Patch

    handles = [Patch(color=_KIND_COLORS[kind], label=kind) for kind in kinds]
    legend_above(axis, len(KINDS), handles=handles, handlelength=1, handletextpad=0.5)


def _captions(run: MicrobenchRun, label: str, folds: dict) -> list[str]:
    """What the folded curves stand on, and what they cannot show."""
    folded = next((folds[label, column] for column in _FOLDED if (label, column) in folds), None)
    if folded is None or run.telemetry is None:
        return []
    name, time_s = chunks_label(run, label), run.pair[label].time_s
    assert time_s is not None
    lines = [f"{name}: power and clock folded over {folded.iterations} iterations, from one completion to the next"]
    windows = valid_windows(run.measurements, run.pair[label].variant)
    note = resolution_note(renewal(run.telemetry, windows), time_s.median)
    return [*lines, f"{name}: {note}"] if note else lines
