"""Several training runs side by side, from what they wrote."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_HEADER = (
    "run", "LM head", "chunks", "tokens/s: median (p10 to p90)", "mJ/token (total)", "power, W: mean, std",
    "SM clock, MHz: mean, std", "peak memory, GB", "validation loss",
)  # fmt: skip


def comparison_table(paths: Sequence[Path]) -> str:
    """A Markdown table with one row for each run's directory; what a run does not know is null.

    "std" is the standard deviation of the samples after the first steps: the ripple within and between steps.
    """
    lines = ["| " + " | ".join(_HEADER) + " |", "|" + "---|" * len(_HEADER)]
    for path in paths:
        config, summary = (_read(path / name) for name in ("config.json", "summary.json"))
        cells = _row(config, summary) if summary.get("steps") else ["no finished run", *[""] * (len(_HEADER) - 2)]
        lines.append("| " + " | ".join([path.name, *cells]) + " |")
    return "\n".join(lines)


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}


def _row(config: dict[str, Any], summary: dict[str, Any]) -> list[str]:
    tokens = config["batch_size"] * config["seq_len"]
    fast, slow = (tokens / seconds for seconds in summary["step_time_s_p10_p90"])
    energy = summary["energy_per_token_j"]
    bound = None if energy is None else summary["energy_bound_j"] / summary["energy_j"] * energy
    memory = summary["peak_memory_bytes"]
    return [
        config["lmhead_impl"] or "by device",
        str(config["lmhead_chunks"]),
        f"{summary['tokens_per_s_median']:,.0f} ({slow:,.0f} to {fast:,.0f})",
        "null" if energy is None or bound is None else f"{energy * 1e3:.3f} ± {bound * 1e3:.3f}",
        _pair(summary["power_w_mean"], summary["power_w_std"]),
        _pair(summary["sm_clock_mhz_mean"], summary["sm_clock_mhz_std"]),
        "null" if memory is None else f"{memory / 1e9:.1f}",
        f"{summary['val_loss']:.4f}" if "val_loss" in summary else "null",
    ]


def _pair(mean: float | None, std: float | None) -> str:
    return "null" if mean is None or std is None else f"{mean:.0f}, {std:.0f}"
