"""The figure of a training step's profile beside its roofline."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from jaxchunk.plotting.style import BLACK, BLUE, GREEN, GREY, LIGHT_GREY, ORANGE, VERMILION, new_figure, tidy

_COLORS = (BLUE, GREEN, VERMILION, ORANGE, GREY, BLACK)


def plot_step_profile(
    measured_s: Mapping[str, Mapping[str, float]], roofline_s: Mapping[str, float], title: str, path: Path
) -> Path:
    """Draws a bar a part, by class of kernel, above a bar of the roofline.

    Args:
      measured_s: seconds by part, then by class of kernel; classes in the same order in all.
      roofline_s: least seconds by part, of those parts that have them.
      title: of the figure.
      path: where it goes.

    Returns:
      The path.
    """
    parts = list(measured_s)
    figure = new_figure(8, 1.5 + 0.5 * len(parts))
    axis = figure.subplots()
    tidy(axis)
    kinds: Sequence[str] = list(dict.fromkeys(kind for by_kind in measured_s.values() for kind in by_kind))
    left_ms = [0.0] * len(parts)
    for color, kind in zip(_COLORS, kinds, strict=False):
        widths_ms = [1e3 * measured_s[part].get(kind, 0.0) for part in parts]
        axis.barh([i - 0.2 for i in range(len(parts))], widths_ms, 0.38, left=left_ms, color=color, label=kind)
        left_ms = [left + width for left, width in zip(left_ms, widths_ms, strict=True)]
    bounds_ms = [1e3 * roofline_s.get(part, 0.0) for part in parts]
    if any(bounds_ms):
        rows = [i + 0.2 for i in range(len(parts))]
        axis.barh(rows, bounds_ms, 0.38, color=LIGHT_GREY, edgecolor=GREY, label="roofline")
    axis.set_yticks(range(len(parts)), parts)
    axis.invert_yaxis()
    axis.set_xlabel("device time of a step (ms)")
    axis.set_title(title, fontsize=10)
    axis.legend(frameon=False)
    figure.savefig(path, dpi=150)
    return path
