"""How the output of the Mosaic GPU kernel is cut into tiles, and who works on which."""

import dataclasses
from typing import Literal

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxchunk.lm_head.kernels import tuned
from jaxchunk.lm_head.rows import RowOptions
from jaxchunk.lm_head.target import target_device

SHARED_MEMORY_BYTES = 227 * 1024  # that a block can have on Hopper


@dataclasses.dataclass(frozen=True)
class MosaicConfig:
    """Tuning parameters.

    Attributes:
      tile_m: rows of a computing warpgroup's tile, a multiple of 64.
      tile_n: columns of it, a multiple of `store_n` up to 256.
      tile_k: how much of D a step of the pipeline multiplies, a multiple of 64 (or 32, 16).
      stages: steps for which the ring of operands has room.
      store_n: columns that one TMA store writes.
      store_slots: stores that may be under way in a warpgroup.
      grid_minor: the dimension ("m" rows, "n" columns) that the order of tiles runs along within a stripe.
      grid_width: tiles across a stripe.
      schedule: "cooperative" or "pingpong".
      split: with "cooperative", the dimension along which the two warpgroups lie.
      cluster: the dimension along which two blocks lie that read their common operand from memory once ("m": W,
        "n": x), or None.
    """

    tile_m: int = 128
    tile_n: int = 128
    tile_k: int = 64
    stages: int = 4
    store_n: int = 64
    store_slots: int = 1
    grid_minor: Literal["m", "n"] = "m"
    grid_width: int = 8
    schedule: Literal["cooperative", "pingpong"] = "cooperative"
    split: Literal["m", "n"] = "m"
    cluster: Literal["m", "n"] | None = None

    @property
    def is_pingpong(self) -> bool:
        """Whether each computing warpgroup has its own output tile."""
        return self.schedule == "pingpong"

    @property
    def barriers(self) -> int:
        """How many are needed to say that a slot is filled, and to say that it is drained (`Tiles.barrier`)."""
        return self.stages * (2 if self.is_pingpong else 1)

    @property
    def block_tile(self) -> tuple[int, int]:
        """Rows and columns of the output tile that the operands in one stage belong to."""
        halves = (1, 1) if self.is_pingpong else (2, 1) if self.split == "m" else (1, 2)
        return self.tile_m * halves[0], self.tile_n * halves[1]

    @property
    def cluster_tile(self) -> tuple[int, int]:
        """Rows and columns of what a cluster of blocks works on at a time."""
        block_m, block_n = self.block_tile
        return block_m * (1 + (self.cluster == "m")), block_n * (1 + (self.cluster == "n"))

    @property
    def shared_memory_bytes(self) -> int:
        """What operands and stores take of shared memory."""
        block_m, block_n = self.block_tile
        operands = 2 * self.stages * (block_m + block_n) * self.tile_k
        return operands + 2 * 2 * self.store_slots * self.tile_m * self.store_n + 2048

    @property
    def obstacle(self) -> str | None:
        """Why the kernel cannot run with it, or None."""
        if self.tile_m % 64:
            return f"tile_m is {self.tile_m}; it must be a multiple of 64"
        if self.tile_n > 256 or self.tile_n % self.store_n:
            return f"tile_n is {self.tile_n}; it must be a multiple of store_n, {self.store_n}, up to 256"
        if self.tile_k % 16:
            return f"tile_k is {self.tile_k}; it must be a multiple of 16"
        if self.shared_memory_bytes > SHARED_MEMORY_BYTES:
            return f"{self} takes {self.shared_memory_bytes} bytes of shared memory; there are {SHARED_MEMORY_BYTES}"
        return None


def choose_config(C: int, D: int, V: int) -> MosaicConfig:
    """What ran fastest nearest to this shape, on this device or else on another of its kind (`tuned.choose`)."""
    return tuned.choose("mosaic", MosaicConfig, C, D, V, target_device().device_kind, any_device=True)


@dataclasses.dataclass(frozen=True)
class Tiles:
    """The output as tiles: `grid_m` x `grid_n` of them, and the order in which clusters of blocks take them."""

    C: int
    V: int
    D: int
    grid_m: int
    grid_n: int
    config: MosaicConfig
    options: RowOptions
    has_bias: bool
    store: bool

    @property
    def steps(self) -> int:
        """Steps of the pipeline in a tile."""
        return -(-self.D // self.config.tile_k)

    def of_this_block(self) -> Array:
        """How many tiles this block has."""
        return lax.div(
            jnp.int32(self.grid_m * self.grid_n - 1) - lax.axis_index("block"), jnp.int32(lax.axis_size("block"))
        ) + jnp.int32(1)

    def at(self, i: Array) -> tuple[Array, Array]:
        """First row and column of this block's i-th tile."""
        config = self.config
        index = i * jnp.int32(lax.axis_size("block")) + lax.axis_index("block")
        minor = 0 if config.grid_minor == "m" else 1
        m, n = plgpu.planar_snake(index, (self.grid_m, self.grid_n), minor, config.grid_width)
        (block_m, block_n), (cluster_m, cluster_n) = config.block_tile, config.cluster_tile
        within = lax.axis_index("cluster")  # 0 where the cluster is one block
        m, n = m * cluster_m, n * cluster_n
        return (m, n + within * block_n) if config.cluster == "n" else (m + within * block_m, n)

    def slot(self, count: Array) -> Array:
        """Where the operands of this block's `count`-th step lie in shared memory."""
        return lax.rem(count, jnp.int32(self.config.stages))

    def barrier(self, count: Array) -> Array:
        """The barrier of that slot for the warpgroup whose tile the step belongs to, if there is but one.

        A warpgroup that skipped the other's phases of a barrier that they share could no longer tell one from the next.
        """
        if not self.config.is_pingpong:
            return self.slot(count)
        warpgroup = lax.rem(lax.div(count, jnp.int32(self.steps)), jnp.int32(2))
        return warpgroup * self.config.stages + self.slot(count)
