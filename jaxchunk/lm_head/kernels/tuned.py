"""Tile configurations that ran fastest: a table of them, and the choice of the entry that is nearest to a shape.

The table is `tuned.json` beside this file, a list of objects with the fields of `Entry`; `scripts/tune_kernels.py`
writes it. A table of one's own goes in front of it: the environment variable JAXCHUNK_TUNED has its path.
"""

import dataclasses
import functools
import json
import logging
import math
import os
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol, TypeVar, get_args, get_type_hints

VARIABLE = "JAXCHUNK_TUNED"
SHIPPED = Path(__file__).with_name("tuned.json")
KERNELS = ("mosaic", "triton_gemm")

_WEIGHT_OF_D = 4.0  # D says how much the epilogue counts; C and V only how many tiles there are
_logger = logging.getLogger("jaxchunk")


class TileConfig(Protocol):
    """A frozen dataclass of tuning parameters: positive whole numbers, and strings (or None) from a `Literal`."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def obstacle(self) -> str | None:
        """Why the kernel cannot run with it, or None."""


Config = TypeVar("Config", bound=TileConfig)


@dataclasses.dataclass(frozen=True)
class Entry:
    """What ran fastest in one case.

    Attributes:
      kernel: one of `KERNELS`.
      device: JAX's device_kind.
      C: rows of a chunk.
      D: width of the hidden states.
      V: vocabulary size.
      config: fields of the kernel's configuration; those that are missing have their defaults.
      milliseconds: a call, median.
      over_cublas: that over cuBLAS's bfloat16 x W^T, measured in turn, median of the ratios.
      jax_version: it was measured with.
      date: of the measurement, YYYY-MM-DD.
    """

    kernel: str
    device: str
    C: int
    D: int
    V: int
    config: Mapping[str, int | str | None]
    milliseconds: float
    over_cublas: float
    jax_version: str
    date: str

    def __str__(self) -> str:
        return f"C={self.C} D={self.D} V={self.V} on {self.device}"


class Table(NamedTuple):
    """The entries of a table that can be used, and, in words, what is wrong with the rest of it."""

    entries: tuple[Entry, ...]
    complaints: tuple[str, ...]


def choose(kernel: str, config_type: type[Config], C: int, D: int, V: int, device: str, *, any_device: bool) -> Config:
    """The configuration of the nearest entry, or the default; says once for every case what it is and where from.

    Entries of the device go before those of others, nearer ones before farther ones, and of equals the user's before
    the package's.

    Args:
      kernel: one of `KERNELS`.
      config_type: of its configurations; without arguments it makes the default.
      C: rows of a chunk.
      D: width of the hidden states.
      V: vocabulary size.
      device: JAX's device_kind.
      any_device: whether what was tuned on another device will do.
    """
    return _choose(kernel, config_type, C, D, V, device, any_device, os.environ.get(VARIABLE) or None)


@functools.cache
def _choose(
    kernel: str, config_type: type[Config], C: int, D: int, V: int, device: str, any_device: bool, own: str | None
) -> Config:
    paths = [SHIPPED] if own is None else [Path(own), SHIPPED]
    candidates = [
        (entry, config)
        for path in paths
        for entry, config in _usable(path, kernel, config_type)
        if any_device or entry.device == device
    ]
    config, reason = config_type(), f"the default: no table has an entry for {device}"
    if candidates:
        nearest, config = min(candidates, key=lambda c: (c[0].device != device, distance(c[0], C, D, V)))
        reason = f"tuned for {nearest}: {nearest.milliseconds:.3f} ms, {nearest.over_cublas:.3f} times cuBLAS"
    _logger.info("lm_head_loss: exponentials of [%d, %d] x [%d, %d] by %s, %s (%s)", C, D, V, D, kernel, config, reason)
    return config


def distance(entry: Entry, C: int, D: int, V: int) -> float:
    """How far an entry is from a shape: logarithms of the ratios of the sizes, added up."""
    ratios = entry.C / C, entry.D / D, entry.V / V
    return sum(weight * abs(math.log(ratio)) for weight, ratio in zip((1.0, _WEIGHT_OF_D, 1.0), ratios, strict=True))


@functools.cache
def _usable(path: Path, kernel: str, config_type: type[Config]) -> list[tuple[Entry, Config]]:
    table = _read_once(path)
    usable = []
    for entry in table.entries:
        if entry.kernel != kernel:
            continue
        try:
            usable.append((entry, config_of(config_type, entry.config)))
        except ValueError as error:
            _logger.warning("%s: the entry for %s by %s is left out: %s", path, entry, kernel, error)
    return usable


@functools.cache
def _read_once(path: Path) -> Table:
    table = read_table(path)
    for complaint in table.complaints:
        _logger.warning("%s", complaint)
    return table


def read_table(path: Path) -> Table:
    """Reads a table; nothing is raised, and configurations are not looked into (`config_of`)."""
    try:
        records = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        return Table((), (f"{path} cannot be used as a table of tiles: {error}",))
    if not isinstance(records, list):
        return Table((), (f"{path} cannot be used as a table of tiles: it is no list of entries",))
    entries, complaints = [], []
    for number, record in enumerate(records, 1):
        problem = _problem(record)
        if problem is None:
            entries.append(Entry(**record))
        else:
            complaints.append(f"{path}: entry {number} is left out: {problem}")
    return Table(tuple(entries), tuple(complaints))


def config_of(config_type: type[Config], fields: Mapping[str, Any]) -> Config:
    """A configuration from its fields.

    Raises:
      ValueError: a field is unknown or out of its domain, or the kernel cannot run with it.
    """
    hints = get_type_hints(config_type)
    for name, value in fields.items():
        if name not in hints:
            raise ValueError(f"{config_type.__name__} has no field {name!r}")
        if hints[name] is int:
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} is {value!r}; it must be a whole number of at least 1")
        elif value not in (choices := _choices(hints[name])):
            raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(map(repr, choices))}")
    config = config_type(**fields)
    if config.obstacle is not None:
        raise ValueError(config.obstacle)
    return config


def _choices(hint: Any) -> tuple[Any, ...]:
    """What a `Literal`, or its union with None, allows."""
    if not isinstance(hint, types.UnionType) and type(None) not in get_args(hint):
        return get_args(hint)
    return tuple(value for part in get_args(hint) for value in (get_args(part) or (None,)))


def _problem(record: Any) -> str | None:
    if not isinstance(record, dict):
        return "it is no object"
    expected = {"config": dict, "C": int, "D": int, "V": int, "milliseconds": float, "over_cublas": float}
    names = {field.name for field in dataclasses.fields(Entry)}
    if unknown := record.keys() - names:
        return f"unknown fields {', '.join(sorted(unknown))}"
    if missing := names - record.keys():
        return f"it lacks {', '.join(sorted(missing))}"
    for name in sorted(names):
        value, wanted = record[name], expected.get(name, str)
        if wanted in (int, float):
            if type(value) not in (int, wanted) or not 0 < value < math.inf:
                return f"{name} is {value!r}; it must be a {'whole ' if wanted is int else ''}number greater than 0"
        elif not isinstance(value, wanted):
            return f"{name} is {value!r}; it must be {'an object' if wanted is dict else 'a string'}"
    return None if record["kernel"] in KERNELS else f"kernel is {record['kernel']!r}; choose from {', '.join(KERNELS)}"
