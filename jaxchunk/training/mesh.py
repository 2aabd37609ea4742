"""The devices of a run: a mesh from flags, where the state and the batches lie on it, and what does not fit."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Int, Int64, PRNGKeyArray

from jaxchunk.data import Batch
from jaxchunk.errors import InputError
from jaxchunk.models import qwen2
from jaxchunk.models.partition import AXES, TOKEN_AXES, batch_spec, in_use, partition_spec
from jaxchunk.training.config import TrainConfig


class Shards(NamedTuple):
    """Devices along each axis of the mesh."""

    data: int = 1
    fsdp: int = 1
    model: int = 1

    @property
    def of_a_batch(self) -> int:
        """Devices that see sequences of their own."""
        return self.data * self.fsdp

    def __str__(self) -> str:
        return " x ".join(f"{count} {axis}" for axis, count in self._asdict().items())


@dataclasses.dataclass(frozen=True)
class Devices:
    """The devices that a run trains on, of so many `available`. `mesh` is None for one alone: nothing is sharded."""

    used: tuple[jax.Device, ...]
    shards: Shards
    mesh: Mesh | None
    available: int

    @property
    def local(self) -> tuple[jax.Device, ...]:
        """Those of this process."""
        return tuple(device for device in self.used if device.process_index == jax.process_index())

    def describe(self) -> str:
        """A few words for people."""
        kind, count = self.used[0].device_kind, len(self.used)
        words = f"{kind} ({self.used[0].platform}), {count} of {self.available}"
        if self.mesh is not None:
            words += f", mesh {self.shards}"
        processes = len({device.process_index for device in self.used})
        return words + (f", {processes} processes" if processes > 1 else "")

    def rows(self, batch_size: int) -> Int64[np.ndarray, " rows"] | None:
        """Which sequences of a batch the devices of this process need, ascending; None for all of them."""
        if self.mesh is None or jax.process_count() == 1:
            return None
        slices = NamedSharding(self.mesh, batch_spec(self.mesh)).addressable_devices_indices_map((batch_size,)).values()
        everything = np.arange(batch_size)
        return np.unique(np.concatenate([everything[part[0]] for part in slices if part is not None]))

    def place_batch(self, batch: Batch, batch_size: int) -> dict[str, Array]:
        """A batch of which this process has `rows`, as arrays over the mesh."""
        assert self.mesh is not None
        sharding, rows = NamedSharding(self.mesh, batch_spec(self.mesh)), self.rows(batch_size)

        def place(values: np.ndarray) -> Array:
            def part(index: tuple[slice, ...] | None) -> np.ndarray:
                wanted = np.arange(batch_size)[index[0] if index else slice(None)]
                return values[wanted if rows is None else np.searchsorted(rows, wanted)]

            return jax.make_array_from_callback((batch_size, *values.shape[1:]), sharding, part)

        return {name: place(values) for name, values in batch.items()}

    def place_signal(self, number: int) -> Int[Array, " devices"]:
        """The number of this process on its devices, others' on theirs: one for each device of the mesh."""
        assert self.mesh is not None
        sharding = NamedSharding(self.mesh, PartitionSpec(AXES))
        own = np.full(len(self.used), number, np.int32)
        return jax.make_array_from_callback(own.shape, sharding, lambda index: own[index or slice(None)])

    def place_key(self, key: PRNGKeyArray) -> PRNGKeyArray:
        """A random key, the same on all devices."""
        assert self.mesh is not None
        bits, sharding = np.asarray(jax.random.key_data(key)), NamedSharding(self.mesh, PartitionSpec())
        placed = jax.make_array_from_callback(bits.shape, sharding, lambda _: bits)
        return jax.random.wrap_key_data(placed, impl=jax.random.key_impl(key))

    def place_param(self, path: tuple[Any, ...], values: np.ndarray) -> Array:
        """A whole parameter, as an array over the mesh, of which every device gets its part."""
        if self.mesh is None:
            return jnp.asarray(values)
        sharding = NamedSharding(self.mesh, partition_spec(path, self.mesh))
        return jax.make_array_from_callback(values.shape, sharding, lambda index: values[index or ...])


def choose_devices(config: TrainConfig, devices: Sequence[jax.Device]) -> Devices:
    """The devices that `--mesh_data`, `--mesh_fsdp` and `--mesh_model` ask for.

    Consecutive devices are together along the model axis first, then fsdp, then data: what talks most is closest.

    Args:
      config: the run.
      devices: all of all processes, those of a process one after the other, as `jax.devices()` gives them.

    Raises:
      InputError: the numbers do not fit the devices or the batch.
    """
    fsdp, model, available = config.mesh_fsdp, config.mesh_model, len(devices)
    if config.mesh_data is None and available % (fsdp * model):
        raise InputError(
            f"--mesh_fsdp {fsdp} x --mesh_model {model} are {fsdp * model} devices, which do not divide the "
            f"{available} that JAX finds ({devices[0].device_kind}): choose divisors, or give --mesh_data too"
        )
    data = available // (fsdp * model) if config.mesh_data is None else config.mesh_data
    count, given = data * fsdp * model, f"--mesh_data {data} x --mesh_fsdp {fsdp} x --mesh_model {model}"
    if count > available:
        raise InputError(
            f"{given} are {count} devices; JAX finds {available} ({devices[0].device_kind}): make them fewer"
        )
    processes = {device.process_index for device in devices}
    if count < available and len(processes) > 1:
        raise InputError(
            f"{given} are {count} devices of the {available} that {len(processes)} processes have; several processes "
            "must use all of theirs"
        )
    if config.batch_size % (data * fsdp):
        raise InputError(
            f"--batch_size is {config.batch_size}; {data} x {fsdp} devices (data x fsdp) each need the same number of "
            f"sequences: give a multiple of {data * fsdp}" + (", or --mesh_data 1" if fsdp * model == 1 else "")
        )
    if config.micro_batch_size is not None and config.micro_batch_size % (data * fsdp):
        raise InputError(
            f"--micro_batch_size is {config.micro_batch_size}, of all devices together; with {data} x {fsdp} devices "
            f"(data x fsdp) it must be a multiple of {data * fsdp}"
        )
    for name in ("lora_rank", "sample_every"):
        if count > 1 and (value := getattr(config, name)):
            raise InputError(f"--{name} is {value}, which needs one device alone; {given} are {count}: --mesh_data 1")
    if count > 1 and not isinstance(config.lmhead_chunks, int):
        raise InputError(
            f"--lmhead_chunks {config.lmhead_chunks} needs one device alone; {given} are {count}: a number"
        )
    used = tuple(devices[:count])
    shards = Shards(data, fsdp, model)
    grid = np.array(used, object).reshape(shards)
    mesh = Mesh(grid, AXES, axis_types=(AxisType.Auto,) * 3) if count > 1 else None
    return Devices(used, shards, mesh, available)


def check_model_fits(devices: Devices, model: qwen2.Qwen2Config, flag: str) -> None:
    """Refuses a model whose dimensions the mesh does not divide.

    Args:
      devices: of the run.
      model: the architecture.
      flag: how the user named it.

    Raises:
      InputError: naming the flag, the dimension and what would divide it.
    """
    in_words = {
        "mesh_fsdp": {f"a width of {model.hidden_size}": model.hidden_size},
        "mesh_model": {
            f"{model.num_key_value_heads} key/value heads": model.num_key_value_heads,
            f"a feed-forward width of {model.intermediate_size}": model.intermediate_size,
            f"a vocabulary of {model.vocab_size}": model.vocab_size,
        },
    }
    for (name, sizes), count in zip(in_words.items(), devices.shards[1:], strict=True):
        for words, size in sizes.items():
            if size % count:
                fitting = [str(n) for n in range(1, devices.available + 1) if math.gcd(*sizes.values()) % n == 0]
                raise InputError(
                    f"--{name} is {count}; {flag} has {words}, which {count} does not divide: "
                    f"use {' or '.join(fitting)}"
                )


def state_shardings(mesh: Mesh, state: Any) -> Any:
    """Where the arrays of a training state lie: parameters and their moments by the rules, scalars everywhere.

    Args:
      mesh: of the run.
      state: `TrainState` of arrays or shapes; whatever in it mirrors the parameters has their names at the end of its
        paths.
    """

    def sharding(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        return NamedSharding(mesh, partition_spec(path, mesh) if leaf.ndim else PartitionSpec())

    return jax.tree.map_with_path(sharding, state)


def param_specs(mesh: Mesh | AbstractMesh, params: qwen2.Params) -> Any:
    """The rules' spec of each parameter."""
    return jax.tree.map_with_path(lambda path, _: partition_spec(path, mesh), params)


def shared_over(spec: PartitionSpec) -> tuple[str, ...]:
    """The axes along which devices share a parameter and see sequences of their own; inside of the `jax.shard_map`."""
    return tuple(axis for axis in in_use(*TOKEN_AXES) if axis not in spec)
