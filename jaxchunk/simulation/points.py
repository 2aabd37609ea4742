"""Measured points (the paper's, and ours) and how a simulation compares with them."""

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from typing import Any, Literal

from jaxchunk.simulation.devices import Inputs, Workload
from jaxchunk.words import chunks_in_words

Case = tuple[Workload, Inputs, int]  # and the number of chunks


@dataclass(frozen=True)
class Point:
    """A quantity of a case, or its ratio to (`over`) or its difference from (`minus`) the same workload's other case.

    `quantity` is a field of a simulated row (`experiment.Row`); `tolerance` is in the unit of `value`.
    """

    device: str
    workload: Workload
    inputs: Inputs
    chunks: int
    quantity: str
    value: float
    tolerance: float
    role: Literal["fitted", "predicted"]
    source: str
    over: dict[str, Any] | None = None
    minus: dict[str, Any] | None = None

    @property
    def case(self) -> Case:
        """The case that the point is about."""
        return self.workload, self.inputs, self.chunks

    @property
    def reference(self) -> Case | None:
        """The case that it is compared with."""
        other = self.over or self.minus
        return (self.workload, other["inputs"], other["chunks"]) if other else None

    @property
    def label(self) -> str:
        """What it is, in words."""
        text = f"{self.workload}, {self.inputs}, {chunks_in_words(self.chunks)}: {self.quantity}"
        if other := self.over or self.minus:
            what = chunks_in_words(other["chunks"])
            what += "" if other["inputs"] == self.inputs else f" ({other['inputs']})"
            text += f" {'over' if self.over else 'minus'} {what}"
        return text


def load(device: str) -> list[Point]:
    """The points of a built-in device; none for a device that is not built in."""
    text = (resources.files("jaxchunk.simulation") / "data" / "points.toml").read_text()
    return [Point(**point) for point in tomllib.loads(text)["point"] if point["device"] == device.lower()]


def cases(points: Sequence[Point]) -> list[Case]:
    """Every case that the points need, each once."""
    wanted = [case for point in points for case in (point.case, point.reference) if case is not None]
    return list(dict.fromkeys(wanted))


def simulated(point: Point, rows: Mapping[Case, Any]) -> float | None:
    """The point's value in a simulation; None where a case or its quantity is missing."""
    value = getattr(rows.get(point.case), point.quantity, None)
    if value is None or point.reference is None:
        return value
    other = getattr(rows.get(point.reference), point.quantity, None)
    if other is None:
        return None
    return float(value / other if point.over else value - other)


def residuals(points: Sequence[Point], rows: Mapping[Case, Any]) -> list[dict[str, Any]]:
    """Points beside their simulated values, as records; `residual` is simulated minus measured."""
    records = []
    for point in points:
        value = simulated(point, rows)
        off = None if value is None else value - point.value
        in_tolerances = None if off is None else off / point.tolerance
        records.append(
            {
                "label": point.label,
                **asdict(point),
                "simulated": value,
                "residual": off,
                "residual_in_tolerances": in_tolerances,
            }
        )
    return records
