"""Markdown tables of summaries, whose cells are medians with intervals."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

from jaxchunk.measuring.statistics import Interval

Row = dict[str, Any]
Column = tuple[str, Callable[[Row], str]]
"""A title, and the cell of a row."""
_Item = TypeVar("_Item")


def markdown(rows: Iterable[_Item], columns: Sequence[tuple[str, Callable[[_Item], str]]]) -> str:
    """A table with a line a row: titles, and what makes each cell of a row."""
    return markdown_of_cells(
        [title for title, _ in columns], ([cell_of(row) for _, cell_of in columns] for row in rows)
    )


def markdown_of_cells(titles: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table of cells that are text already."""
    rule = "|" + "---|" * len(titles)
    head, *body = (f"| {' | '.join(cells)} |" for cells in (titles, *lines))
    return "\n".join([head, rule, *body])


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
