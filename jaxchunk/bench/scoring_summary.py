"""What the scoring benchmark reports: a row for every variant, a table, and how fast our default is in words."""

import dataclasses
from collections.abc import Sequence

from jaxchunk.measuring.protocol import Measurement, Variant
from jaxchunk.measuring.statistics import energy_caveats, interval_of, ratio_of
from jaxchunk.measuring.tables import Column, Row, as_dict, cell, gigabytes, markdown
from jaxchunk.plotting import FLOAT32_LOGITS, FLOOR

NOTE = (
    "Errors: the largest difference to float32 arithmetic of a log-probability, in nats, on up to {rows} rows of each "
    "shape; confident labels are the argmax of logits x8."
)


@dataclasses.dataclass(frozen=True)
class Scoring:
    """A way to score, compiled for a shape.

    Attributes:
      variant: its name and its call; `factors` has "shape" and "method".
      temporary_bytes: of its temporaries (operands and results not counted); None is unknown.
      errors: by case, the largest error of a log-probability in nats; None where it computes none.
      is_default: whether it is what `jaxchunk.inference.score` does on this device.
      is_peer: whether it is somebody else's.
    """

    variant: Variant
    temporary_bytes: int | None
    errors: dict[str, float] | None = None
    is_default: bool = False
    is_peer: bool = False


def name_in(shape: str, method: str) -> str:
    """Name of the variant that is this method at this shape."""
    return f"{shape}, {method}"


def summarize(measurements: Sequence[Measurement], scorings: Sequence[Scoring]) -> list[Row]:
    """A row a variant: medians with intervals, ratios to the bare GEMM and to float32 logits of the same shape."""
    rows = []
    for scoring in scorings:
        name, factors = scoring.variant.name, scoring.variant.factors
        row: Row = {"variant": name, **factors, "is_default": scoring.is_default, "is_peer": scoring.is_peer}
        row |= {"temporary_bytes": scoring.temporary_bytes, "errors": scoring.errors}
        for field in ("time_s", "energy_j", "power_w", "sm_clock_mhz"):
            row[field] = as_dict(interval_of(measurements, name, field))
        for label, method in (("floor", FLOOR), ("float32", FLOAT32_LOGITS)):
            for field, quantity in (("time_s", "time"), ("energy_j", "energy")):
                ratio = ratio_of(measurements, name, name_in(factors["shape"], method), field)
                row[f"{quantity}_over_{label}"] = as_dict(ratio)
        rows.append(row | energy_caveats([m for m in measurements if m.variant == name]))
    return rows


def table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table; an interval is the 95% bootstrap interval of the median over repeats."""
    return markdown(rows, _COLUMNS)


def sentences(rows: Sequence[Row]) -> list[str]:
    """For each shape how fast `score` is beside float32 logits, and how fast the bare GEMM; why energy is null."""
    said = []
    for shape in dict.fromkeys(row["shape"] for row in rows):
        here = {row["method"]: row for row in rows if row["shape"] == shape}
        ours = next((row for row in here.values() if row["is_default"]), None)
        if ours is None or ours["time_over_float32"] is None:
            said.append(f"{shape}: no conclusion: it takes both the default of `score` and {FLOAT32_LOGITS}")
            continue
        floor = here.get(FLOOR, {}).get("time_over_float32")
        said.append(
            f"{shape}: {ours['method']}, the default of `score`, has {_speed(ours['time_over_float32'])} times the "
            f"speed of {FLOAT32_LOGITS}, and {gigabytes(ours['temporary_bytes'])} GB of temporaries"
            + (f"; the logits' GEMM alone has {_speed(floor)} times that speed" if floor else "")
        )
    reason = next((row["energy_null_reason"] for row in rows if row["energy_null_reason"]), None)
    return [*said, *([f"energy null: {reason}"] if reason else [])]


def _speed(time_ratio: dict[str, float]) -> str:
    median, low, high = (1 / time_ratio[name] for name in ("median", "high", "low"))
    return f"{median:.2f} ({low:.2f} to {high:.2f})"


def _error(row: Row, case: str) -> str:
    return "-" if row["errors"] is None else f"{row['errors'][case]:.1e}"


_COLUMNS: tuple[Column, ...] = (
    ("T x D x V", lambda row: row["shape"]),
    ("variant", lambda row: row["method"]),
    ("ms", lambda row: cell(row["time_s"], 1e3, 2)),
    ("time / GEMM floor", lambda row: cell(row["time_over_floor"], 1, 3, interval=True)),
    (f"time / {FLOAT32_LOGITS}", lambda row: cell(row["time_over_float32"], 1, 3, interval=True)),
    ("J (GPU rail)", lambda row: cell(row["energy_j"], 1, 2)),
    (f"energy / {FLOAT32_LOGITS}", lambda row: cell(row["energy_over_float32"], 1, 3, interval=True)),
    ("W", lambda row: cell(row["power_w"], 1, 0)),
    ("temporaries, GB", lambda row: gigabytes(row["temporary_bytes"])),
    ("largest error", lambda row: _error(row, "random")),
    ("with confident labels", lambda row: _error(row, "confident")),
)
