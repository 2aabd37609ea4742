"""What pieces of training come to: rows, and a table of them."""

from collections.abc import Sequence
from typing import Any

from jaxchunk.measuring.protocol import Measurement
from jaxchunk.measuring.statistics import interval_of, ratio_of
from jaxchunk.measuring.tables import as_dict, cell, markdown_of_cells


def summarize(measurements: Sequence[Measurement], tokens: int) -> list[dict[str, Any]]:
    """One row an arm, ours first, by chunks: totals over its valid pieces, medians, ratios to the first and to peers.

    Args:
      measurements: of the pieces.
      tokens: in a step.
    """
    factors = {m.variant: m.factors for m in measurements}
    ours = sorted((name for name in factors if "chunks" in factors[name]), key=lambda name: factors[name]["chunks"])
    peers = sorted(name for name in factors if "chunks" not in factors[name])
    rows = [_row(measurements, name, factors[name], (ours or peers)[0], peers, tokens) for name in (*ours, *peers)]
    return [row for row in rows if row is not None]


def _row(
    measurements: Sequence[Measurement],
    name: str,
    factors: dict[str, Any],
    base: str,
    peers: Sequence[str],
    tokens: int,
) -> dict[str, Any] | None:
    own = [m for m in measurements if m.variant == name and m.invalid_reason is None]
    if not own:
        return None
    joules = [m.energy_j * m.calls for m in own if m.energy_j is not None]
    bounds = [m.energy_bound_j * m.calls for m in own if m.energy_bound_j is not None]
    known = len(joules) == len(own)
    steps = sum(m.calls for m in own)

    def per_token(m: Measurement) -> float | None:
        return None if m.energy_j is None else m.energy_j / tokens

    return {
        "arm": name,
        "chunks": factors.get("chunks"),
        "peer": factors.get("peer"),
        "weights": factors.get("weights"),
        "micro_batch_size": factors.get("micro_batch_size"),
        "memory_bytes": factors.get("memory_bytes"),
        "pieces": len(own),
        "steps": steps,
        "time_s": sum(m.time_s * m.calls for m in own),
        "energy_j": sum(joules) if known else None,
        "energy_bound_j": sum(bounds) if known else None,
        "energy_null_reason": next((m.energy_null_reason for m in own if m.energy_null_reason), None),
        "energy_per_token_j": as_dict(interval_of(measurements, name, per_token)),
        "temperature_at_end_c": max(own, key=lambda m: m.end_s).temperature_c,
        "step_time_s": as_dict(interval_of(measurements, name)),
        "tokens_per_s": as_dict(interval_of(measurements, name, lambda m: tokens / m.time_s)),
        "power_w": as_dict(interval_of(measurements, name, "power_w")),
        "power_w_std": as_dict(interval_of(measurements, name, "power_w_std")),
        "sm_clock_mhz": as_dict(interval_of(measurements, name, "sm_clock_mhz")),
        "time_ratio": as_dict(ratio_of(measurements, name, base)),
        "energy_ratio": as_dict(ratio_of(measurements, name, base, "energy_j")),
        "over_peers": {
            peer: {
                "tokens_per_s": as_dict(ratio_of(measurements, name, peer, lambda m: 1 / m.time_s)),
                "energy_per_token": as_dict(ratio_of(measurements, name, peer, "energy_j")),
            }
            for peer in peers
            if peer != name
        },
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as a Markdown table; an interval is the 95% bootstrap interval of the median over pieces."""
    peers = [row["arm"] for row in rows if row["peer"] is not None]
    heads = ["", "pieces", "minutes", "steps", "ms a step", "time / first", "tokens/s", "kJ (GPU rail)", "mJ/token"]
    heads += ["energy / first", "W", "power ripple, W", "°C at the end", "micro-batch", "memory, GB"]
    heads += [f"{what} / {peer}" for peer in peers for what in ("tokens/s", "mJ/token")]
    lines = []
    for row in rows:
        energy_kj = None if row["energy_j"] is None else (row["energy_j"] / 1e3, row["energy_bound_j"] / 1e3)
        cells = [
            row["arm"],
            str(row["pieces"]),
            f"{row['time_s'] / 60:.1f}",
            str(row["steps"]),
            f"{row['step_time_s']['median'] * 1e3:.1f}",
            _interval(row["time_ratio"]),
            f"{row['tokens_per_s']['median']:,.0f}",
            "null" if energy_kj is None else f"{energy_kj[0]:.1f} ± {energy_kj[1]:.1f}",
            _median(row["energy_per_token_j"], 1e3, ".3f"),
            _interval(row["energy_ratio"]),
            _median(row["power_w"]),
            _median(row["power_w_std"]),
            "null" if row["temperature_at_end_c"] is None else f"{row['temperature_at_end_c']:.0f}",
            str(row["micro_batch_size"]),
            "null" if row["memory_bytes"] is None else f"{row['memory_bytes'] / 1e9:.1f}",
        ]
        over = [row["over_peers"].get(peer, {}) for peer in peers]
        cells += [_interval(ratio.get(what)) for ratio in over for what in ("tokens_per_s", "energy_per_token")]
        lines.append(cells)
    text = markdown_of_cells(heads, lines)
    if peers:
        text += "\n\nMemory: what our compiled program needs, parameters and moments with it; torch's peak for others."
    return text


def _interval(interval: dict[str, float] | None) -> str:
    return cell(interval, 1.0, 4, interval=True)


def _median(interval: dict[str, float] | None, scale: float = 1.0, digits: str = ".0f") -> str:
    return "null" if interval is None else f"{interval['median'] * scale:{digits}}"
