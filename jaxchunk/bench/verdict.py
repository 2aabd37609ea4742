"""What a microbenchmark says: per chunk count relative to one chunk, with intervals, and one plain sentence."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxchunk.measuring.protocol import Measurement
from jaxchunk.measuring.statistics import Interval, Quantity, energy_caveats, interval_of, ratio_of, ratio_of_best
from jaxchunk.measuring.tables import markdown

# The paper's figures, for comparison. Not measured by us: we have neither device.
PAPER = {
    "source": "One Simple Trick for Improving the Performance of Energy-Limited Local Inference and Training, sec. 3.2",
    "label": "the paper's figures, not measured here",
    "note": "by its watts, the joules of the L40S are those of ten calls",
    "DGX Spark": {
        "random": {"2 chunks": "+15% FLOPS", "16 chunks": "+21.63% FLOPS"},
        "zero": {"best": "+22.54% FLOPS"},
    },
    "L40S": {
        "random": {"1 chunk": "796 ms, 2747 J, 344.8 W", "4 chunks": "776 ms, 2712 J, 349.5 W"},
        "zero": {"1 chunk": "631 ms, 1687 J, 267 W", "4 chunks": "626 ms, 1682 J, 269 W"},
    },
}

# A change smaller than this is called no difference, however narrow its interval.
SMALLEST_DIFFERENCE = 1e-3


@dataclasses.dataclass(frozen=True)
class Row:
    """A variant. Intervals are 95% bootstrap intervals of the median over repeats; None is unknown.

    Attributes:
      variant: its name.
      inputs: random or zero.
      chunks: chunk count.
      softmax: who does the softmax.
      windows: valid windows.
      invalid_windows: windows that were not averaged.
      time_s: seconds a call.
      tflops: of the GEMMs.
      energy_j: joules a call, GPU rail.
      energy_bound_j: the largest bound of a window's error, a call.
      energy_null_reason: why there is no energy.
      power_w: mean power.
      power_w_std: ripple: standard deviation of the samples of power.
      sm_clock_mhz: mean SM clock.
      sm_clock_mhz_std: its ripple.
      temperature_c: at the window's end.
      throttled: share of the time in a clock-event reason, the largest of them.
      throttled_s: seconds of a call in that reason.
      throttle_reasons: mean share of each reason.
      slow_without_reason: share of the time with slow clocks and no reason.
      sampler_cpu_share: share of one core that telemetry took.
      sources_disagree: relative difference of the second energy source.
      time_ratio: over one chunk, by repeats.
      energy_ratio: likewise.
      power_ratio: likewise.
      ripple_ratio: likewise, of `power_w_std`.
      clock_ripple_ratio: likewise, of `sm_clock_mhz_std`.
      facts: memory, and what the compiled program shows.
    """

    variant: str
    inputs: str
    chunks: int
    softmax: str
    windows: int
    invalid_windows: int
    time_s: Interval | None
    tflops: Interval | None
    energy_j: Interval | None
    energy_bound_j: float | None
    energy_null_reason: str | None
    power_w: Interval | None
    power_w_std: Interval | None
    sm_clock_mhz: Interval | None
    sm_clock_mhz_std: Interval | None
    temperature_c: Interval | None
    throttled: Interval | None
    throttled_s: Interval | None
    throttle_reasons: dict[str, float] | None
    slow_without_reason: Interval | None
    sampler_cpu_share: Interval | None
    sources_disagree: Interval | None
    time_ratio: Interval | None
    energy_ratio: Interval | None
    power_ratio: Interval | None
    ripple_ratio: Interval | None
    clock_ripple_ratio: Interval | None
    facts: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """All rows, and the conclusion in words."""

    rows: list[Row]
    sentences: list[str]


def compare(measurements: Sequence[Measurement], flops: int, facts: Mapping[str, Mapping[str, Any]]) -> Comparison:
    """Rows in the order of inputs, softmax and chunks; sentences for each pair of inputs and softmax.

    Args:
      measurements: of a microbenchmark; `factors` say what each is.
      flops: of a call.
      facts: what else is known of each variant.
    """
    names = {m.variant: m.factors for m in measurements}
    order = sorted(names, key=lambda name: (names[name]["inputs"], names[name]["softmax"], names[name]["chunks"]))
    rows = []
    for name in order:
        kind = names[name]
        same = [n for n in names if all(names[n][key] == kind[key] for key in ("inputs", "softmax"))]
        base = next((n for n in same if names[n]["chunks"] == 1), None)
        rows.append(_row(measurements, name, base, flops, dict(facts.get(name, {}))))
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.inputs, row.softmax), []).append(row)
    return Comparison(rows, [_sentence(group, _chosen_blindly(measurements, group)) for group in groups.values()])


def pair_to_show(comparison: Comparison) -> dict[str, str | None]:
    """One chunk, and the fastest of the others, of the first kind of inputs: the two that the figures show."""
    first = [row for row in comparison.rows if row.inputs == _first_inputs(comparison)]
    softmax = first[0].softmax if first else None
    first = [row for row in first if row.softmax == softmax and row.time_s is not None]
    others = [row for row in first if row.chunks > 1]
    best = min(others, key=lambda row: row.time_s.median if row.time_s else 0.0, default=None)
    return {
        "1-chunk": next((row.variant for row in first if row.chunks == 1), None),
        "best": None if best is None else best.variant,
    }


def table(comparison: Comparison) -> str:
    """The rows as a Markdown table; an interval is the 95% bootstrap interval of the median over repeats."""
    return markdown(comparison.rows, _COLUMNS)


def paper_lines() -> str:
    """The paper's figures as Markdown, labelled as the paper's."""
    lines = [f"For comparison, {PAPER['label']} ({PAPER['source']}; {PAPER['note']}):", ""]
    for device in ("DGX Spark", "L40S"):
        for inputs, figures in PAPER[device].items():  # type: ignore[attr-defined]
            lines.append(f"- {device}, {inputs} inputs: " + "; ".join(f"{k}: {v}" for k, v in figures.items()))
    return "\n".join(lines)


def _row(measurements: Sequence[Measurement], name: str, base: str | None, flops: int, facts: dict[str, Any]) -> Row:
    every = [m for m in measurements if m.variant == name]
    own = [m for m in every if m.invalid_reason is None]

    def interval(quantity: Quantity) -> Interval | None:
        return interval_of(measurements, name, quantity)

    def ratio(quantity: Quantity) -> Interval | None:
        return None if base is None else ratio_of(measurements, name, base, quantity)

    factors = every[0].factors
    return Row(
        variant=name,
        inputs=factors["inputs"],
        chunks=factors["chunks"],
        softmax=factors["softmax"],
        windows=len(own),
        invalid_windows=len(every) - len(own),
        time_s=interval("time_s"),
        tflops=interval(lambda m: flops / m.time_s / 1e12),
        energy_j=interval("energy_j"),
        **energy_caveats(own),
        power_w=interval("power_w"),
        power_w_std=interval("power_w_std"),
        sm_clock_mhz=interval("sm_clock_mhz"),
        sm_clock_mhz_std=interval("sm_clock_mhz_std"),
        temperature_c=interval("temperature_c"),
        throttled=interval(_throttled),
        throttled_s=interval(lambda m: None if (share := _throttled(m)) is None else share * m.time_s),
        throttle_reasons=_mean_shares(own),
        slow_without_reason=interval("slow_without_reason"),
        sampler_cpu_share=interval("sampler_cpu_share"),
        sources_disagree=interval(_disagreement),
        time_ratio=ratio("time_s"),
        energy_ratio=ratio("energy_j"),
        power_ratio=ratio("power_w"),
        ripple_ratio=ratio("power_w_std"),
        clock_ripple_ratio=ratio("sm_clock_mhz_std"),
        facts=facts,
    )


def _chosen_blindly(measurements: Sequence[Measurement], rows: Sequence[Row]) -> Interval | None:
    base = next((row.variant for row in rows if row.chunks == 1), None)
    others = [row.variant for row in rows if row.chunks > 1]
    return None if base is None else ratio_of_best(measurements, others, base)


def _sentence(rows: Sequence[Row], blind: Interval | None) -> str:
    """The conclusion for one kind of inputs; `blind` is the time ratio of the best count where luck did not pick it."""
    name = f"{rows[0].inputs} inputs" + (f" ({rows[0].softmax})" if rows[0].softmax else "")
    base = next((row for row in rows if row.chunks == 1), None)
    others = [row for row in rows if row.chunks > 1 and row.time_ratio is not None]
    if base is None or base.time_s is None or not others:
        return f"{name}: no conclusion, for there is no measurement of one chunk to compare with"
    best = min(others, key=lambda row: row.time_ratio.median if row.time_ratio else 1.0)
    assert best.time_ratio is not None
    repeats = min(base.windows, best.windows)
    enough = "" if repeats >= 5 else f" Only {repeats} repeats: take none of this as settled."
    faster = _differs(best.time_ratio) and best.time_ratio.median < 1.0
    if faster and (blind is None or blind.high < 1.0):
        text = f"{name}: {best.chunks} chunks take {_percent(best.time_ratio)} time than one"
    elif all(row.time_ratio is not None and row.time_ratio.low > 1.0 for row in others):
        text = f"{name}: no chunk count is faster than one; the best, {best.chunks}, takes "
        text += f"{_percent(best.time_ratio)} time"
    elif faster and blind is not None:
        text = (
            f"{name}: no difference in time between one chunk and {best.chunks}, the best of the others, that is more "
            f"than the luck of the draw ({_percent(blind)} where each repeat's best is named by the other repeats)"
        )
    else:
        text = (
            f"{name}: no difference in time between one chunk and {best.chunks}, the best of the others "
            f"({_percent(best.time_ratio)})"
        )
    if best.energy_ratio is None:
        text += f"; energy is unknown ({base.energy_null_reason or best.energy_null_reason})"
    elif _differs(best.energy_ratio):
        text += f"; {_percent(best.energy_ratio)} energy"
    else:
        text += f"; no difference in energy ({_percent(best.energy_ratio)})"
    bounds = [r.energy_bound_j / r.energy_j.median for r in (base, best) if r.energy_bound_j and r.energy_j]
    if bounds and best.energy_ratio is not None:
        text += f" (each window's joules are known to {max(bounds):.1%})"
    if base.power_w_std is not None and best.power_w_std is not None:
        text += f"; power ripple {base.power_w_std.median:.0f} W against {best.power_w_std.median:.0f} W"
    return text + "." + enough


def _differs(ratio: Interval) -> bool:
    return ratio.excludes_one and abs(ratio.median - 1.0) >= SMALLEST_DIFFERENCE


def _percent(ratio: Interval) -> str:
    """`1.7% less (0.9% to 2.2%)`."""
    less = ratio.median <= 1.0
    edges = sorted((abs if ratio.excludes_one else float)((1 - r if less else r - 1)) for r in (ratio.low, ratio.high))
    change = abs(1 - ratio.median)
    return f"{change:.1%} {'less' if less else 'more'} ({edges[0]:.1%} to {edges[1]:.1%})"


def _first_inputs(comparison: Comparison) -> str | None:
    kinds = [row.inputs for row in comparison.rows]
    return "random" if "random" in kinds else next(iter(kinds), None)


def _mean_shares(own: Sequence[Measurement]) -> dict[str, float] | None:
    known = [m.throttle for m in own if m.throttle is not None]
    if not known:
        return None
    return {reason: sum(shares.get(reason, 0.0) for shares in known) / len(known) for reason in known[0]}


def _throttled(measurement: Measurement) -> float | None:
    return max(measurement.throttle.values(), default=0.0) if measurement.throttle else None


def _disagreement(measurement: Measurement) -> float | None:
    check = measurement.cross_check
    if check is None:
        return None
    return float(check["disagreement"] if isinstance(check, dict) else check.disagreement)


def _cell(value: Interval | None, scale: float, digits: int, *, interval: bool = False, unit: str = "") -> str:
    if value is None:
        return "null"
    return value.text(digits, scale, unit) if interval else f"{value.median * scale:.{digits}f}{unit}"


_COLUMNS: tuple[tuple[str, Callable[[Row], str]], ...] = (
    ("inputs", lambda row: row.inputs),
    ("softmax", lambda row: row.softmax),
    ("chunks", lambda row: str(row.chunks)),
    ("ms", lambda row: _cell(row.time_s, 1e3, 2)),
    ("TFLOP/s", lambda row: "null" if row.tflops is None else f"{row.tflops.median:.3g}"),
    ("time / 1 chunk", lambda row: _cell(row.time_ratio, 1, 4, interval=True)),
    ("J (GPU rail)", lambda row: _cell(row.energy_j, 1, 2)),
    ("energy / 1 chunk", lambda row: _cell(row.energy_ratio, 1, 4, interval=True)),
    ("W", lambda row: _cell(row.power_w, 1, 0)),
    ("power ripple, W", lambda row: _cell(row.power_w_std, 1, 1)),
    ("SM clock, MHz", lambda row: _cell(row.sm_clock_mhz, 1, 0)),
    ("clock ripple, MHz", lambda row: _cell(row.sm_clock_mhz_std, 1, 1)),
    ("°C", lambda row: _cell(row.temperature_c, 1, 0)),
    ("throttled", lambda row: _cell(row.throttled, 100, 0, unit="%")),
)
