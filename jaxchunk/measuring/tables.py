"""Markdown tables of summaries, whose cells are medians with intervals."""

from collections.abc import Callable, Sequence
from typing import Any

from jaxchunk.measuring.statistics import Interval

Row = dict[str, Any]
Column = tuple[str, Callable[[Row], str]]
"""A title, and the cell of a row."""


def markdown(rows: Sequence[Row], columns: Sequence[Column]) -> str:
    """A table with a line a row."""
    lines = [" | ".join(title for title, _ in columns), "|".join("---" for _ in columns)]
    lines += [" | ".join(cell_of(row) for _, cell_of in columns) for row in rows]
    return "\n".join([f"| {lines[0]} |", f"|{lines[1]}|", *(f"| {line} |" for line in lines[2:])])


def as_dict(interval: Interval | None) -> dict[str, float] | None:
    """An interval as a summary keeps it."""
    return None if interval is None else interval._asdict()


def cell(value: dict[str, float] | None, scale: float, digits: int, *, interval: bool = False) -> str:
    """A median in units of 1 / `scale`, with its interval if asked for; "null" where it is not known."""
    if value is None:
        return "null"
    return Interval(**value).text(digits, scale) if interval else f"{value['median'] * scale:.{digits}f}"


def gigabytes(value: int | None) -> str:
    """Bytes in GB (1e9)."""
    return "null" if value is None else f"{value / 1e9:.2f}"
