"""How the Mosaic GPU row kernel cuts rows into pieces, and through which slots of shared memory they pass."""

import dataclasses

import jax.numpy as jnp
from jax import Array, lax

from jaxchunk.lm_head.rows import RowOptions

LANES = 512  # columns that a warpgroup takes statistics of at a time: 8 bytes a thread

_CLUSTERS = (1, 2, 4, 8)


@dataclasses.dataclass(frozen=True)
class MosaicRowsConfig:
    """Tuning parameters.

    Attributes:
      piece: columns in a piece, a multiple of 512.
      slots: pieces that a block has room for, at most 32.
      stores: pieces that may be under way to memory before their slots are filled again.
      cluster: blocks that share a row, 1, 2, 4 or 8.
    """

    piece: int = 8192
    slots: int = 14
    stores: int = 2
    cluster: int = 1

    @property
    def shared_memory_bytes(self) -> int:
        """What pieces, statistics and barriers take of shared memory; a block has 227 KiB."""
        return 2 * self.slots * self.piece + 2 * 1024 + 8 * 3 * 32


def choose_config(V: int) -> MosaicRowsConfig | None:
    """The smallest cluster that leaves a quarter of the ring for the rows that follow; None if V is too large.

    On an H200 pieces of 8192 columns were 2.5% faster than ones of 4096 (V = 151936), and a cluster larger than needed
    took twice the time.
    """
    default = MosaicRowsConfig()
    piece = min(default.piece, max(LANES, 1 << (V - 1).bit_length()))
    slots = min(28, default.slots * default.piece // piece)
    for cluster in _CLUSTERS:
        if -(-V // piece) <= cluster * (slots * 3 // 4):
            return dataclasses.replace(default, piece=piece, slots=slots, cluster=cluster)
    return None


@dataclasses.dataclass(frozen=True)
class Ring:
    """Which rows and pieces a block works on, and which slots they pass through.

    Pieces of a block are counted through all of its rows: the `count`-th passes through slot `count % slots`.
    """

    C: int
    V: int
    config: MosaicRowsConfig
    options: RowOptions

    @property
    def pieces_of_row(self) -> int:
        """Pieces in a row, of all blocks."""
        return -(-self.V // self.config.piece)

    @property
    def pieces_at_most(self) -> int:
        """Pieces of a row that a block may have."""
        return -(-self.pieces_of_row // self.config.cluster)

    @property
    def rows_at_most(self) -> int:
        """Rows that may be in the ring whole."""
        return max(1, self.config.slots // max(1, self.pieces_of_row // self.config.cluster))

    @property
    def tail(self) -> int:
        """Columns in a row's last piece."""
        return self.V - (self.pieces_of_row - 1) * self.config.piece

    @property
    def has_room(self) -> bool:
        """Whether every block has pieces of a row, and slots for them beside those under way to memory."""
        config = self.config
        fills = config.piece % LANES == 0 and config.cluster <= self.pieces_of_row
        return fills and self.pieces_at_most + config.stores - 1 <= config.slots <= 32

    def num_rows(self) -> Array:
        """How many rows this cluster has."""
        return lax.div(self.C - 1 - lax.axis_index("row"), jnp.int32(lax.axis_size("row"))) + 1

    def row(self, visit: Array | int) -> Array:
        """The cluster's `visit`-th row; the last one for those beyond it."""
        row = jnp.int32(visit) * jnp.int32(lax.axis_size("row")) + lax.axis_index("row")
        return jnp.minimum(row, jnp.int32(self.C - 1))

    def num_pieces(self) -> Array:
        """How many pieces of a row this block has."""
        whole, rest = divmod(self.pieces_of_row, self.config.cluster)
        return jnp.int32(whole) + (lax.axis_index("part") < rest).astype(jnp.int32)

    def first_piece(self) -> Array:
        """The first piece of a row that this block has."""
        whole, rest = divmod(self.pieces_of_row, self.config.cluster)
        part = lax.axis_index("part")
        return part * whole + jnp.minimum(part, jnp.int32(rest))

    def slot(self, count: Array) -> Array:
        """The slot that this block's `count`-th piece passes through."""
        return lax.rem(count, jnp.int32(self.config.slots))

    def published(self, visit: Array) -> Array:
        """The barrier that says that the `visit`-th row's statistics are there."""
        return lax.rem(visit, jnp.int32(self.rows_at_most))
