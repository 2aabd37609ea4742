"""What the prefill benchmark reports: a row for every variant, a table, and what it says about the paper's claim."""

from collections.abc import Sequence
from typing import Any

from jaxchunk.measuring.protocol import Measurement
from jaxchunk.measuring.statistics import Interval, energy_caveats, interval_of, ratio_of, ratio_of_best
from jaxchunk.measuring.tables import Column, Row, as_dict, cell, markdown

PAPER = (
    "The paper's figure, not measured here: at most 1.6% less latency, near 32k tokens, for Llama 8B in vLLM (\"One "
    'Simple Trick for Improving the Performance of Energy-Limited Local Inference and Training", figure 5).'
)
_QUANTITIES = ("time_s", "energy_j", "power_w", "power_w_std", "sm_clock_mhz", "sm_clock_mhz_std", "temperature_c")
_RATIOS = {
    "time_ratio": "time_s",
    "energy_ratio": "energy_j",
    "power_ripple_ratio": "power_w_std",
    "clock_ripple_ratio": "sm_clock_mhz_std",
}


def summarize(measurements: Sequence[Measurement]) -> list[Row]:
    """A row a variant, by length, ours by chunk count and then the peer: medians and ratios to one chunk, as intervals.

    Of a peer the ratios are to our one chunk as well. `power_w_std` and `sm_clock_mhz_std` are the ripple: standard
    deviations of the samples in a window.
    """
    factors = {m.variant: m.factors for m in measurements}
    order = sorted(
        factors, key=lambda name: (factors[name]["seq_len"], factors[name]["peer"] or "", factors[name]["chunks"])
    )
    return [_row(measurements, name, _baseline(factors, name)) for name in order]


def table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table; an interval is the 95% bootstrap interval of the median over repeats."""
    return markdown(rows, _COLUMNS)


def sentences(measurements: Sequence[Measurement], rows: Sequence[Row]) -> list[str]:
    """For each length whether chunks help in time, free of the luck of being picked; why energy is null; the paper."""
    said = []
    for seq_len in dict.fromkeys(row["seq_len"] for row in rows):
        own = [row for row in rows if row["seq_len"] == seq_len and row["peer"] is None]
        base = next((row["variant"] for row in own if row["chunks"] == 1), None)
        others = [row for row in own if row["chunks"] > 1 and row["time_ratio"] is not None]
        blind = base and ratio_of_best(measurements, [row["variant"] for row in others], base)
        if not blind:
            said.append(f"{seq_len} tokens: no conclusion: it takes one chunk, another count, and two repeats")
            continue
        best = min(others, key=lambda row: row["time_ratio"]["median"])
        said.append(f"{seq_len} tokens: {_verdict(best['chunks'], blind)}")
    reason = next((row["energy_null_reason"] for row in rows if row["energy_null_reason"]), None)
    return [*said, *([f"energy null: {reason}"] if reason else []), PAPER]


def _verdict(chunks: int, blind: Interval) -> str:
    interval = f"{blind.low - 1:+.2%} to {blind.high - 1:+.2%} of its time"
    if blind.high < 1:
        return f"the best count, {chunks}, is faster than one chunk ({interval})"
    if blind.low > 1:
        return f"no count is faster than one chunk; the best, {chunks}, is slower ({interval})"
    return f"no difference between one chunk and the best of the other counts, {chunks} ({interval})"


def _row(measurements: Sequence[Measurement], name: str, base: str | None) -> Row:
    own = [m for m in measurements if m.variant == name]
    row: Row = {"variant": name, **own[0].factors, "windows": len(own)}
    for field in _QUANTITIES:
        row[field] = as_dict(interval_of(measurements, name, field))
    tokens = own[0].factors["batch_size"] * own[0].factors["seq_len"]
    row["tokens_per_s"] = as_dict(interval_of(measurements, name, lambda m: tokens / m.time_s))
    for label, field in _RATIOS.items():
        row[label] = None if base is None else as_dict(ratio_of(measurements, name, base, field))
    return row | energy_caveats(own)


def _baseline(factors: dict[str, dict[str, Any]], name: str) -> str | None:
    """Our one chunk at the same length."""
    seq_len = factors[name]["seq_len"]
    same = [n for n, f in factors.items() if f["seq_len"] == seq_len and f["peer"] is None and f["chunks"] == 1]
    return same[0] if same else None


_COLUMNS: tuple[Column, ...] = (
    ("tokens", lambda row: str(row["seq_len"])),
    ("chunks", lambda row: str(row["chunks"]) if row["peer"] is None else row["peer"]),
    ("ms", lambda row: cell(row["time_s"], 1e3, 2)),
    ("tokens/s", lambda row: cell(row["tokens_per_s"], 1, 0)),
    ("time / 1 chunk", lambda row: cell(row["time_ratio"], 1, 4, interval=True)),
    ("J (GPU rail)", lambda row: cell(row["energy_j"], 1, 2)),
    ("energy / 1 chunk", lambda row: cell(row["energy_ratio"], 1, 4, interval=True)),
    ("W", lambda row: cell(row["power_w"], 1, 0)),
    ("power ripple, W", lambda row: cell(row["power_w_std"], 1, 1)),
    ("SM clock, MHz", lambda row: cell(row["sm_clock_mhz"], 1, 0)),
    ("clock ripple, MHz", lambda row: cell(row["sm_clock_mhz_std"], 1, 1)),
    ("°C", lambda row: cell(row["temperature_c"], 1, 0)),
)
