"""The figure of training in several ways in turn."""

import json
import math
from pathlib import Path

from jaxchunk.plotting.style import BLUE, GREEN, ORANGE, VERMILION, new_panels
from jaxchunk.run_dir import read_json_lines

_COLORS = (VERMILION, BLUE, GREEN, ORANGE)


def plot_training_arms(run_path: Path) -> Path:
    """Draws `training_arms.png`: time and joules a step, power and temperature of every piece, over the run's time.

    Args:
      run_path: a directory that `scripts/bench_train.py` wrote.

    Returns:
      The figure's path.
    """
    records = [r for r in read_json_lines(run_path / "records.jsonl") if r["invalid_reason"] is None]
    measures = (
        ("time_s", 1e3, "ms a step"),
        ("energy_j", 1.0, "J a step (GPU rail)"),
        ("power_w", 1.0, "power (W)"),
        ("temperature_c", 1.0, "temperature (°C)"),
    )
    chunks = {r["variant"]: r["factors"].get("chunks", math.inf) for r in records}
    names = sorted(chunks, key=lambda name: (chunks[name], name))
    panels = [measure for measure in measures if any(record[measure[0]] is not None for record in records)]
    figure, axes = new_panels(max(len(panels), 1))
    for axis, (field, scale, label) in zip(axes, panels, strict=False):
        axis.set_ylabel(label)
        for color, name in zip(_COLORS * len(names), names, strict=False):
            own = [r for r in records if r["variant"] == name and r[field] is not None]
            for i, record in enumerate(own):
                span_min = [record["start_s"] / 60, record["end_s"] / 60]
                axis.plot(
                    span_min, [record[field] * scale] * 2, color=color, linewidth=3, label=name if i == 0 else None
                )
    axes[0].legend(frameon=False)
    axes[-1].set_xlabel("time since the run began (min)")
    config = json.loads((run_path / "config.json").read_text())
    axes[0].set_title(
        f"{config['model']}, {config['batch_size']} x {config['seq_len']} tokens a step; every bar is one piece",
        fontsize=10,
    )
    path = run_path / "training_arms.png"
    figure.savefig(path, dpi=150)
    return path
