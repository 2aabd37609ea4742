"""Simulated devices as files: a profile of the plant, a roofline, and the workloads that ran on the real one.

A file is TOML or JSON with the tables `profile` (the fields of `GpuProfile`), `roofline`, `microbenchmark` and, where
there is one, `training` and `wall`. `base` names a built-in device whose values stand where the file has none. The
fitted numbers of the built-in devices are in `data/fitted.json`, which `scripts/calibrate_simulation.py` writes.
"""

import dataclasses
import json
import tomllib
import types
import typing
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from jaxchunk.errors import InputError
from jaxchunk.models import qwen2
from jaxchunk.simulation import schedules
from jaxchunk.simulation.schedules import ELEMENT_BYTES, Roofline
from jaxchunk.telemetry.simulation.plant import Phase
from jaxchunk.telemetry.simulation.profiles import GpuProfile

BUILT_IN = ("gb10", "l40s", "h200")
Workload = Literal["microbenchmark", "training"]
Inputs = Literal["random", "zero"]


@dataclasses.dataclass(frozen=True)
class Microbenchmark:
    """Shape and dtypes of the paper's microbenchmark, as in `schedules.microbenchmark`."""

    m: int
    k: int
    n: int
    dtype: str
    sum_dtype: str

    def __post_init__(self) -> None:
        """Checks the sizes and dtypes."""
        for name in ("m", "k", "n"):
            _need(getattr(self, name) >= 1, f"microbenchmark.{name}", getattr(self, name), "at least 1")
        for name in ("dtype", "sum_dtype"):
            _need_dtype(f"microbenchmark.{name}", getattr(self, name))


@dataclasses.dataclass(frozen=True)
class Training:
    """Training of a Qwen2 model, as in `schedules.training_step`."""

    model: str
    batch_size: int
    seq_len: int
    dtype: str

    def __post_init__(self) -> None:
        """Checks the model, the sizes and the dtype."""
        _need(self.model in qwen2.SIZES, "training.model", repr(self.model), f"one of {', '.join(qwen2.SIZES)}")
        for name in ("batch_size", "seq_len"):
            _need(getattr(self, name) >= 1, f"training.{name}", getattr(self, name), "at least 1")
        _need_dtype("training.dtype", self.dtype)


@dataclasses.dataclass(frozen=True)
class Wall:
    """What the machine draws at the wall beyond the GPU's rail: constant, in W."""

    other_w: float

    def __post_init__(self) -> None:
        """Checks the number."""
        _need(0 <= self.other_w < float("inf"), "wall.other_w", self.other_w, "a number from 0 up")


@dataclasses.dataclass(frozen=True)
class SimulatedGpu:
    """A device and what runs on it.

    Attributes:
      profile: of the plant.
      roofline: durations at the profile's reference clock.
      microbenchmark: the one that ran on the real device.
      training: likewise; None where none did.
      wall: None where nothing is known of it.
    """

    profile: GpuProfile
    roofline: Roofline
    microbenchmark: Microbenchmark
    training: Training | None = None
    wall: Wall | None = None

    def __post_init__(self) -> None:
        """Checks that the device has a rate for every dtype that is asked of it."""
        for workload in (self.microbenchmark, self.training):
            rates = sorted(self.roofline.flops_per_s)
            if workload is not None and workload.dtype not in rates:
                raise InputError(f"roofline.flops_per_s has {', '.join(rates)}; a workload needs {workload.dtype}")

    def phases(self, workload: Workload, inputs: Inputs, num_chunks: int) -> list[Phase]:
        """One iteration of a workload.

        Raises:
          InputError: the device has no such workload, it does not run on such inputs, or the chunks do not fit.
        """
        if workload == "microbenchmark":
            activity = 1.0 if inputs == "random" else self.profile.zeros_activity
            shape = dataclasses.asdict(self.microbenchmark)
            return schedules.microbenchmark(self.roofline, num_chunks, activity=activity, **shape)
        if self.training is None or inputs != "random":
            raise InputError(f"{self.profile.name} has no training on {inputs} inputs; it needs a table `training`")
        return schedules.training_step(self.roofline, num_chunks, **dataclasses.asdict(self.training))


def load(device: str) -> SimulatedGpu:
    """A built-in device by its name, or one from a TOML or JSON file.

    Raises:
      InputError: no such device or file, a file that cannot be read, an unknown, missing or impossible value.
    """
    return build(tables(device), device)


def tables(device: str) -> dict[str, Any]:
    """The tables of a device, complete with those of its base and with fitted values, as plain values.

    Raises:
      InputError: as `load`, as far as files are concerned.
    """
    if device.lower() in BUILT_IN:
        own = tomllib.loads(_data(f"{device.lower()}.toml"))
        for name, value in json.loads(_data("fitted.json")).get(device.lower(), {}).get("values", {}).items():
            set_value(own, name, value)
        return own
    own = _read(Path(device))
    base = own.pop("base", None)
    if base is None:
        return own
    if not isinstance(base, str) or base.lower() not in BUILT_IN:
        raise InputError(f"{device}: base is {base!r}; it must be one of {', '.join(BUILT_IN)}")
    return _merged(tables(base), own)


def build(of: Mapping[str, Any], source: str) -> SimulatedGpu:
    """The device that tables describe; `source` names it in errors.

    Raises:
      InputError: an unknown, missing or impossible value.
    """
    try:
        return _build(SimulatedGpu, of, "")
    except InputError as error:
        raise InputError(f"device {source}: {error}") from None


def set_value(of: dict[str, Any], name: str, value: float) -> None:
    """Sets the value at a dotted name, such as "profile.controller.period_s"."""
    *path, last = name.split(".")
    for key in path:
        of = of[key]
    of[last] = value


def get_value(of: Mapping[str, Any], name: str) -> Any:
    """The value at a dotted name."""
    for key in name.split("."):
        of = of[key]
    return of


def _data(name: str) -> str:
    return (resources.files("jaxchunk.simulation") / "data" / name).read_text()


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise InputError(f"device {path} is neither one of {', '.join(BUILT_IN)} nor a file")
    try:
        text = path.read_text()
        value = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"device file {path} cannot be read: {error}") from None
    except ValueError as error:
        raise InputError(f"device file {path} is no {'JSON' if path.suffix == '.json' else 'TOML'}: {error}") from None
    if not isinstance(value, dict):
        raise InputError(f"device file {path} holds a {type(value).__name__}; it must hold tables")
    return value


def _merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    both = {
        key: _merged(below[key], value) if isinstance(value, dict) and isinstance(below.get(key), dict) else value
        for key, value in above.items()
    }
    return below | both


def _build(kind: Any, value: Any, where: str) -> Any:
    """`value` as a `kind`: a dataclass from a table, otherwise what it is, checked."""
    optional = [option for option in typing.get_args(kind) if option is not types.NoneType]
    if isinstance(kind, types.UnionType) and len(optional) == 1:
        return None if value is None or value == "none" else _build(optional[0], value, where)
    if dataclasses.is_dataclass(kind):
        return _build_table(typing.cast(type, kind), value, where)
    if typing.get_origin(kind) is dict and isinstance(value, dict):
        return {key: _build(float, item, f"{where}.{key}") for key, item in value.items()}
    if typing.get_origin(kind) is frozenset and isinstance(value, list):
        return frozenset(value)
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if kind in (int, str, bool) and type(value) is kind:
        return value
    needed = {float: "a number", int: "a whole number", str: "a text", bool: "true or false"}.get(kind, "a table")
    raise InputError(f"{where} is {value!r}; it must be {needed}")


def _build_table(kind: type, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise InputError(f"{where or 'the device'} is {value!r}; it must be a table")
    hints = typing.get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    prefix = f"{where}." if where else ""
    if unknown := sorted(value.keys() - fields.keys()):
        raise InputError(f"{prefix}{unknown[0]} is unknown; known are {', '.join(sorted(fields))}")
    required = [name for name, field in fields.items() if field.default is dataclasses.MISSING]
    if missing := [name for name in required if name not in value]:
        raise InputError(f'{prefix}{missing[0]} is missing; give it, or name a device to take it from: base = "gb10"')
    return kind(**{name: _build(hints[name], item, prefix + name) for name, item in value.items()})


def _need(holds: bool, name: str, value: object, needed: str) -> None:
    if not holds:
        raise InputError(f"{name} is {value}; it must be {needed}")


def _need_dtype(name: str, dtype: str) -> None:
    _need(dtype in ELEMENT_BYTES, name, repr(dtype), f"one of {', '.join(ELEMENT_BYTES)}")
