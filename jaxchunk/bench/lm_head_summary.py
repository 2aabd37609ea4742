"""What the LM-head benchmark reports: a row for every variant, and tables of rows."""

import dataclasses
from collections.abc import Sequence

from jaxchunk.bench.accuracy import Accuracy
from jaxchunk.measuring.protocol import Measurement, Variant
from jaxchunk.measuring.statistics import energy_caveats, interval_of, ratio_of
from jaxchunk.measuring.tables import Column, Row, as_dict, cell, gigabytes, markdown
from jaxchunk.plotting import AUTODIFF, FLOOR


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled variant.

    Attributes:
      variant: its name and its call.
      temporary_bytes: of its temporaries on one device (operands, loss and gradients not counted); None is unknown.
      plain: name of the plain variant that it is compared with, or None.
      one_chunk: name of the variant that differs from it in having one chunk, or None.
      accuracy: of its results; None where that is not measured.
      is_peer: whether it is somebody else's.
    """

    variant: Variant
    temporary_bytes: int | None
    plain: str | None = None
    one_chunk: str | None = None
    accuracy: Accuracy | None = None
    is_peer: bool = False


def summarize(measurements: Sequence[Measurement], programs: Sequence[Program]) -> list[Row]:
    """One row a variant: medians with intervals, and ratios to its baselines (None where those are missing)."""
    rows = []
    for program in programs:
        name = program.variant.name
        row: Row = {"variant": name, "temporary_bytes": program.temporary_bytes, "is_peer": program.is_peer}
        for field in ("time_s", "energy_j", "power_w", "power_w_std", "sm_clock_mhz"):
            row[field] = as_dict(interval_of(measurements, name, field))
        baselines = {"floor": FLOOR, "autodiff": AUTODIFF, "plain": program.plain, "one_chunk": program.one_chunk}
        for label, baseline in baselines.items():
            for field, quantity in (("time_s", "time"), ("energy_j", "energy")):
                row[f"{quantity}_over_{label}"] = as_dict(ratio_of(measurements, name, baseline or "", field))
        row["errors"] = program.accuracy and program.accuracy.errors
        row["d_weight_dtype"] = program.accuracy and program.accuracy.d_weight_dtype
        rows.append(row | energy_caveats([m for m in measurements if m.variant == name]))
    return rows


def table(rows: Sequence[Row]) -> str:
    """The summary as a Markdown table; an interval is the 95% bootstrap interval of the median."""
    return markdown(rows, _with_errors(rows, _COLUMNS))


def table_of_shapes(rows_by_shape: dict[str, list[Row]]) -> str:
    """Variants at several shapes in one table: what compares them with the floor, and their errors."""
    rows = [{"shape": shape} | row for shape, shape_rows in rows_by_shape.items() for row in shape_rows]
    left_out = ("time / autodiff", "time / plain", "W")
    columns = [column for column in _COLUMNS if column[0] not in left_out]
    columns.append(("time, energy / 1 chunk", _over_one_chunk))
    return markdown(rows, _with_errors(rows, [("T x D x V", lambda row: row["shape"]), *columns]))


def _with_errors(rows: Sequence[Row], columns: Sequence[Column]) -> list[Column]:
    if all(row["errors"] is None for row in rows):
        return list(columns)
    return [
        *columns,
        ("dW is", lambda row: row["d_weight_dtype"] or "-"),
        ("errors of loss, dX, dW", lambda row: _errors(row, "random")),
        ("with confident labels", lambda row: _errors(row, "confident")),
    ]


def _errors(row: Row, case: str) -> str:
    if row["errors"] is None:
        return "-"
    return ", ".join(f"{row['errors'][case][name]:.1e}" for name in ("loss", "d_hidden", "d_weight"))


def _over_one_chunk(row: Row) -> str:
    if row["time_over_one_chunk"] is None:
        return "-"
    return ", ".join(cell(row[f"{quantity}_over_one_chunk"], 1, 3) for quantity in ("time", "energy"))


_COLUMNS: tuple[Column, ...] = (
    ("variant", lambda row: row["variant"]),
    ("ms", lambda row: cell(row["time_s"], 1e3, 2)),
    ("time / GEMM floor", lambda row: cell(row["time_over_floor"], 1, 3, interval=True)),
    ("time / autodiff", lambda row: cell(row["time_over_autodiff"], 1, 2)),
    ("time / plain", lambda row: cell(row["time_over_plain"], 1, 3, interval=True)),
    ("J", lambda row: cell(row["energy_j"], 1, 2)),
    ("energy / GEMM floor", lambda row: cell(row["energy_over_floor"], 1, 3, interval=True)),
    ("W", lambda row: cell(row["power_w"], 1, 0)),
    ("temporaries, GB", lambda row: gigabytes(row["temporary_bytes"])),
)
