"""What the figures have in common: palette, empty figures, labels that keep clear of each other, telemetry."""

import csv
import itertools
import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.transforms import BboxBase

# Okabe and Ito's palette, which survives the common colour-vision deficiencies and grey-scale print.
BLUE, VERMILION, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#777777"
ORANGE, BLACK, LIGHT_GREY = "#E69F00", "#000000", "#D0D0D0"

_RUN_COLORS = (BLUE, VERMILION, GREEN, ORANGE, GREY, BLACK)
_RUN_DASHES = ("-", "--", ":", "-.")

_LABEL_DISTANCES = (9, 13, 18, 24)  # points
SMALL = 8  # points; nothing in a figure is smaller

Box = tuple[float, float, float, float]  # x0, y0, x1, y1 in pixels


def run_style(index: int) -> dict[str, Any]:
    """Colour and dashes of the run with this index (from 0), in every figure that it is in; 24 of them differ."""
    dashes, color = divmod(index, len(_RUN_COLORS))
    return {"color": _RUN_COLORS[color], "linestyle": _RUN_DASHES[dashes % len(_RUN_DASHES)]}


def new_figure(width: float, height: float) -> "Figure":
    """An empty figure of that many inches, with a layout that keeps labels apart."""
    # The object interface: no global state, no display needed, nothing to close.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def new_panels(count: int, *, height: float = 1.6) -> tuple["Figure", list["Axes"]]:
    """A figure with `count` panels of that many inches below each other that share their x axis."""
    figure = new_figure(8, 1.2 + height * count)
    axes = list(np.atleast_1d(figure.subplots(count, 1, sharex=True)))
    for axis in axes:
        tidy(axis)
    return figure, axes


def tidy(axis: "Axes") -> None:
    """A faint grid, and no frame where there is no scale."""
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)


def read_telemetry(path: Path) -> dict[str, np.ndarray] | None:
    """Columns of `telemetry.csv`, NaN where a field is empty; None where there is nothing to plot."""
    if not path.exists():
        return None
    with path.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if None not in row.values()]
    if not rows:
        return None
    return {name: np.array([float(row[name] or "nan") for row in rows]) for name in rows[0]}


def write_titles(figure: "Figure", title: str, caption: Sequence[str]) -> None:
    """A title above everything and lines of a caption below it, each broken where it would leave the figure."""

    def fitted(text: str, character_points: float) -> str:
        return "\n".join(textwrap.wrap(text, int(figure.get_figwidth() * 72 / character_points)))

    # The mean width of a character: titles have capitals and digits.
    figure.suptitle(fitted(title, 0.6 * 9), fontsize=9)
    lines = "\n".join(fitted(line, 0.525 * SMALL) for line in caption)
    figure.supxlabel(lines, x=0.01, ha="left", fontsize=SMALL, color="#444444")


def legend_above(axis: "Axes", columns: int, **options: Any) -> None:
    """The legend in a row above the axes, at the right: it covers nothing, wherever the data are."""
    options |= {"loc": "lower right", "bbox_to_anchor": (1, 1), "borderaxespad": 0.2}
    axis.legend(frameon=False, fontsize=9, ncols=columns, columnspacing=1.2, **options)


class LabelledPoint(NamedTuple):
    """A point with error bars and a short label; `x` and `y` are (median, low, high) in the axes' units."""

    text: str
    x: tuple[float, float, float]
    y: tuple[float, float, float]
    color: str


def label_points(figure: "Figure", axis: "Axes", points: Sequence[LabelledPoint]) -> None:
    """Writes each label beside its point, clear of other labels, points and error bars where there is room.

    To be called last: a label stays where it is put when the axes' limits change.
    """
    figure.draw_without_rendering()  # the layout settles: only now are pixels known
    scale = figure.dpi / 72
    taken = _drawn(axis, points, scale)
    frame = axis.get_window_extent()
    for point in points:
        marker = axis.transData.transform((point.x[0], point.y[0]))
        size = ((0.62 * SMALL * len(point.text) + 2) * scale, (0.8 * SMALL + 2) * scale)
        places = [
            (math.cos(angle) * distance, math.sin(angle) * distance)
            for distance, angle in itertools.product(_LABEL_DISTANCES, np.arange(1, 17, 2) * math.pi / 8)
        ]
        boxes = [_centred(marker[0] + dx * scale, marker[1] + dy * scale, size) for dx, dy in places]
        costs = [_cost(box, taken, frame) + math.hypot(*place) for box, place in zip(boxes, places, strict=True)]
        best = int(np.argmin(costs))
        taken.append((boxes[best], 1.0))
        style: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": SMALL, "color": point.color}
        if math.hypot(*places[best]) > 1.1 * _LABEL_DISTANCES[0]:  # far enough to be taken for another point's
            style["arrowprops"] = {"arrowstyle": "-", "color": point.color, "linewidth": 0.5, "shrinkA": 0}
        where = point.x[0], point.y[0]
        axis.annotate(point.text, where, xytext=places[best], textcoords="offset points", **style)


def _drawn(axis: "Axes", points: Sequence[LabelledPoint], scale: float) -> list[tuple[Box, float]]:
    """Boxes along everything that a label should keep clear of, and how much that matters."""
    drawn = []
    for point in points:
        (x, x0, x1), (y, y0, y1) = point.x, point.y
        marker, *ends = axis.transData.transform([(x, y), (x0, y), (x1, y), (x, y0), (x, y1)])
        drawn.append((_centred(marker[0], marker[1], (8 * scale, 8 * scale)), 1.0))
        drawn.append(((ends[0][0], marker[1] - 2 * scale, ends[1][0], marker[1] + 2 * scale), 1.0))
        drawn.append(((marker[0] - 2 * scale, ends[2][1], marker[0] + 2 * scale, ends[3][1]), 1.0))
    for line in axis.get_lines():
        if line.get_linestyle() == "None":  # markers and the caps of error bars
            continue
        corners = line.get_transform().transform(line.get_xydata())
        for start, end in itertools.pairwise(corners):
            steps = max(2, int(np.hypot(*(end - start)) / (3 * scale)))
            places = (start + (end - start) * i / steps for i in range(steps + 1))
            drawn += [(_centred(x, y, (scale, scale)), 0.5) for x, y in places]
    return drawn


def _centred(x: float, y: float, size: tuple[float, float]) -> Box:
    return x - size[0] / 2, y - size[1] / 2, x + size[0] / 2, y + size[1] / 2


def _cost(box: Box, taken: Sequence[tuple[Box, float]], frame: "BboxBase") -> float:
    """Pixels of the box that are taken, weighted, or lie outside the frame."""
    area = (box[2] - box[0]) * (box[3] - box[1])
    inside = _overlap(box, (frame.x0, frame.y0, frame.x1, frame.y1))
    return area - inside + sum(weight * _overlap(box, other) for other, weight in taken)


def _overlap(a: Box, b: Box) -> float:
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
