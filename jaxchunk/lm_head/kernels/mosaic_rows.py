"""A row kernel in Pallas Mosaic GPU that reads logits from memory once: for Hopper (TMA, clusters).

A row of 151936 bfloat16 logits takes 304 KB, a multiprocessor has 227 KB of shared memory. So a cluster of blocks, each
on a multiprocessor of its own, shares a row: every block keeps its part of the row in shared memory from the one read
of it to the one write. The part is cut into pieces, and shared memory is a ring of slots for pieces. Three warpgroups
follow each other around the ring:

    statistics   takes a row's maxima and sums of exponentials as its pieces arrive, and leaves those of this block's
                 part of the row in global memory, for all blocks of the cluster
    gradients    waits until every block has done so, and overwrites the row's pieces with their gradient
    moving       writes gradients to memory and brings the next rows' logits into the slots that this frees, by TMA

While gradients of a row are taken and written, the statistics of the rows after it are. Small rows leave room for
several of them.

Why nobody waits for ever:

    filled      A slot's logits have arrived: once for every piece that passes through the slot. Statistics and
                gradients wait for every one of these phases; the next begins when both are done with the piece.
    rewritten   A slot holds gradients: as often. The moving warpgroup waits for every phase, in the order of pieces.
    published   All blocks of the cluster have left their statistics of a row: once for every row. Gradients wait for
                every phase. There are as many of these barriers as rows fit into the ring, and rows take them in turn:
                a barrier's next phase needs this block's statistics of a row that does not fit into the ring before
                gradients have begun, and so waited for, the row of this phase.

A row's last piece is loaded before any of the row is freed, so the ring must hold a row and `stores - 1` pieces more.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax._src.pallas.mpmd import _mpmd_map  # plgpu.kernel offers no aliases, and a Ref cannot vary over mesh axes
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm
from jaxtyping import Float, Int

from jaxchunk.lm_head import rows
from jaxchunk.lm_head.kernels import LOG2_E
from jaxchunk.lm_head.kernels.mosaic import interpreter, num_multiprocessors
from jaxchunk.lm_head.kernels.row_ring import LANES, MosaicRowsConfig, Ring, choose_config
from jaxchunk.lm_head.kernels.tiles import SHARED_MEMORY_BYTES
from jaxchunk.lm_head.rows import RowOptions, RowStatistics
from jaxchunk.lm_head.varying import varying_alike

COLUMNS_MULTIPLE = 8  # of V: 16 bytes, which TMA moves at a time

_RECORD = 32  # float32 between the statistics of two parts of a row: 128 bytes, so that none shares a line of L1
_RECORD_USED = 8
_MATH = rows.Math(jnp.exp, lambda x: 1.0 / (1.0 + jnp.exp(-x)))


def statistics_and_gradients(
    raw: Float[Array, "C V"],
    labels: Int[Array, " C"],
    row_weight: Float[Array, " C"],
    bias: Float[Array, " V"] | None,
    options: RowOptions,
    *,
    config: MosaicRowsConfig | None = None,
    interpret: bool = False,
) -> tuple[RowStatistics, Float[Array, "C V"]]:
    """Statistics, and the gradient written over the logits (bfloat16): one read and one write."""
    C, V = raw.shape
    config = config or choose_config(V)
    assert bias is None and config is not None and raw.dtype == jnp.bfloat16 and V % COLUMNS_MULTIPLE == 0
    ring = Ring(C, V, config, options)
    if config.shared_memory_bytes > SHARED_MEMORY_BYTES or not ring.has_room:
        raise ValueError(f"{config} does not fit rows of {V} columns into {SHARED_MEMORY_BYTES} bytes")
    inputs = varying_alike(raw, labels, row_weight.astype(jnp.float32))
    out = functools.partial(jax.ShapeDtypeStruct, manual_axis_type=jax.typeof(inputs[0]).manual_axis_type)
    mesh = plgpu.Mesh(
        grid=(min(2 if interpret else num_multiprocessors() // config.cluster, C),),
        grid_names=("row",),
        cluster=(config.cluster,),
        cluster_names=("part",),
        num_threads=3,
        thread_name="warpgroup",
        kernel_name="jaxchunk_cross_entropy_rows",
    )
    kernel: Any = _mpmd_map(
        [(mesh, functools.partial(_kernel, ring=ring))],
        [out((C, config.cluster, _RECORD), jnp.float32), out((C, V), raw.dtype)],
        input_output_aliases={0: 1},
        interpret=interpreter() if interpret else False,
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            reduction_scratch_bytes=128,
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
        ),
        name="jaxchunk_cross_entropy_rows",
    )
    records, gradients = kernel(*inputs)
    return rows.merged([_unpacked(records[:, part], options) for part in range(config.cluster)]), gradients


def _kernel(z_ref: Any, labels_ref: Any, weights_ref: Any, records_ref: Any, dz_ref: Any, *, ring: Ring) -> None:
    config = ring.config

    @functools.partial(
        pl.run_scoped,
        pieces=plgpu.SMEM((config.slots, config.piece), z_ref.dtype),
        record=plgpu.SMEM((128,), jnp.float32),
        filled=plgpu.Barrier(num_barriers=config.slots),
        rewritten=plgpu.Barrier(num_barriers=config.slots),
        published=plgpu.ClusterBarrier(collective_axes=("part",), num_barriers=ring.rows_at_most),
        collective_axes="warpgroup",
    )
    def _(pieces: Any, record: Any, filled: Any, rewritten: Any, published: Any) -> None:
        warpgroup = lax.axis_index("warpgroup")

        @pl.when(warpgroup == 0)
        def _statistics() -> None:
            plgpu.set_max_registers(232, action="increase")
            _take_statistics(labels_ref, records_ref, pieces, record, filled, published, ring)

        @pl.when(warpgroup == 1)
        def _gradients() -> None:
            plgpu.set_max_registers(232, action="increase")
            _take_gradients(labels_ref, weights_ref, records_ref, pieces, filled, rewritten, published, ring)

        @pl.when(warpgroup == 2)
        def _move() -> None:
            plgpu.set_max_registers(40, action="decrease")
            _move_pieces(z_ref, dz_ref, pieces, filled, rewritten, ring)


def _move_pieces(z_ref: Any, dz_ref: Any, pieces: Any, filled: Any, rewritten: Any, ring: Ring) -> None:
    """The moving warpgroup: fills the ring, then writes out a piece and fills the slot of an earlier one in turn."""
    config, num_pieces = ring.config, ring.num_pieces()
    total = ring.num_rows() * num_pieces

    def move(count: Array, copy: Callable[[Any, Any, Any], None], ref: Any) -> None:
        row, piece = ring.row(lax.div(count, num_pieces)), ring.first_piece() + lax.rem(count, num_pieces)
        slot = ring.slot(count)

        def columns(size: int) -> None:
            start = pl.multiple_of(piece * config.piece, COLUMNS_MULTIPLE)
            copy(ref.at[row, pl.ds(start, size)], pieces.at[slot, pl.ds(0, size)], slot)

        if ring.tail == config.piece:
            columns(config.piece)
        else:
            is_last = piece == ring.pieces_of_row - 1
            pl.when(is_last)(lambda: columns(ring.tail))
            pl.when(jnp.logical_not(is_last))(lambda: columns(config.piece))

    def load(count: Array) -> None:
        @pl.when(count < total)
        def _() -> None:
            promise: Any = {"oob_mode": plgpu.OOBFillMode.PROMISE_IN_BOUNDS}  # a copy of bytes, of any length
            move(count, lambda ref, smem, slot: plgpu.copy_gmem_to_smem(ref, smem, filled.at[slot], **promise), z_ref)

    def step(count: Array, _: None) -> None:
        plgpu.barrier_wait(rewritten.at[ring.slot(count)])
        move(count, lambda ref, smem, slot: plgpu.copy_smem_to_gmem(smem, ref), dz_ref)
        plgpu.wait_smem_to_gmem(config.stores - 1, wait_read_only=True)
        done = count - (config.stores - 1)
        pl.when(done >= 0)(lambda: load(done + config.slots))

    lax.fori_loop(0, config.slots, lambda count, _: load(count), None)
    lax.fori_loop(0, total, step, None)
    plgpu.wait_smem_to_gmem(0)


def _take_statistics(
    labels_ref: Any, records_ref: Any, pieces: Any, record: Any, filled: Any, published: Any, ring: Ring
) -> None:
    """The warpgroup that takes statistics of this block's part of every row, and publishes them."""
    num_pieces, first = ring.num_pieces(), ring.first_piece()

    def take_row(visit: Array, label: Array) -> Array:
        row, next_label = ring.row(visit), labels_ref[ring.row(visit + 1)]  # read early: memory is far

        def take_piece(i: Array, carry: RowStatistics) -> RowStatistics:
            slot = ring.slot(visit * num_pieces + i)
            plgpu.barrier_wait(filled.at[slot])
            return _accumulated(carry, pieces.at[slot], (first + i) * ring.config.piece, label, ring)

        statistics = _of_lanes(lax.fori_loop(0, num_pieces, take_piece, _nothing_yet(ring.options)), ring.options)
        record[...] = _packed(statistics)
        plgpu.commit_smem()
        used = pl.ds(0, _RECORD_USED)
        plgpu.copy_smem_to_gmem(record.at[used], records_ref.at[row, lax.axis_index("part"), used])
        plgpu.wait_smem_to_gmem(0)
        _fence()
        plgpu.barrier_arrive(published.at[ring.published(visit)])
        return next_label

    lax.fori_loop(0, ring.num_rows(), take_row, labels_ref[ring.row(0)])


@plgpu.inline_mgpu()
def _fence(_: Any) -> None:
    """Orders what this thread knows of memory before what it does next, for all blocks.

    A barrier of a cluster orders memory within each block only: on an H200 2% of the rows were read before their other
    part had come. JAX's interpreter does all at once and ignores it.
    """
    llvm.inline_asm(ir.Type.parse("!llvm.void"), [], "fence.acq_rel.gpu;", "~{memory}", has_side_effects=True)


def _nothing_yet(options: RowOptions) -> RowStatistics:
    zeros = jnp.zeros((LANES,), jnp.float32)
    return RowStatistics(
        m=jnp.full((LANES,), rows.initial_max(jnp.float32), jnp.float32),
        n=zeros,
        z_y=jnp.float32(0),
        z_sum=zeros if options.label_smoothing else None,
        q=zeros if options.metrics else None,
    )


def _accumulated(carry: RowStatistics, piece: Any, start: Array, label: Array, ring: Ring) -> RowStatistics:
    """Statistics of lanes with those of a piece added; the label's logit is kept as the GEMM wrote it."""
    size = ring.config.piece
    position = label - start
    holds_label = (position >= 0) & (position < size)
    own = piece[jnp.clip(position, 0, size - 1)].astype(jnp.float32)
    carry = carry._replace(z_y=jnp.where(holds_label, own, carry.z_y))
    accumulate = functools.partial(_accumulate_lanes, piece=piece, ring=ring)
    return lax.cond(
        holds_label | (start + size > ring.V),
        lambda carry: accumulate(carry, counted=(position, ring.V - start)),
        lambda carry: accumulate(carry, counted=None),
        carry,
    )


def _accumulate_lanes(
    carry: RowStatistics, *, piece: Any, ring: Ring, counted: tuple[Array, Array] | None
) -> RowStatistics:
    """One maximum of a lane's columns in the piece, then sums relative to it.

    Args:
      carry: statistics so far.
      piece: logits.
      ring: geometry and options.
      counted: the label's position and the number of columns, where some are not to be counted.
    """
    options, low = ring.options, rows.initial_max(jnp.float32)
    logits, others = [], []
    for lane in range(0, ring.config.piece, LANES):
        z, _ = rows.transformed(piece[pl.ds(lane, LANES)].astype(jnp.float32), None, options, _MATH)
        logits.append(z)
        if counted is not None:
            column = plgpu.broadcasted_iota(
                jnp.int32, (LANES,), 0, layout=plgpu.Layout.WG_STRIDED((LANES,), vec_size=4)
            )
            label, size = (bound - lane for bound in counted)
            z = jnp.where((column != label) & (column < size), z, -jnp.inf)
        others.append(z)
    m = functools.reduce(jnp.maximum, others, carry.m)
    fall = carry.m - m
    ratio = jnp.exp2(fall * LOG2_E)
    n, z_sum = carry.n * ratio, carry.z_sum
    q = None if carry.q is None else (carry.q + carry.n * fall) * ratio
    for z, logit in zip(others, logits, strict=True):
        below = z - m
        e = jnp.exp2(below * LOG2_E)
        n = n + e
        if q is not None:
            q = q + e * jnp.maximum(below, low)
        if z_sum is not None:
            z_sum = z_sum + (logit if counted is None else jnp.where(z == logit, logit, 0.0))
    return RowStatistics(m, n, carry.z_y, z_sum, q)


def _of_lanes(lanes: RowStatistics, options: RowOptions) -> RowStatistics:
    """Statistics of all lanes together; all of them sums but m."""
    m = jnp.max(lanes.m)
    fall = lanes.m - m
    ratio = jnp.exp2(fall * LOG2_E)
    z_y, _ = rows.transformed(lanes.z_y, None, options, _MATH)
    return RowStatistics(
        m=m,
        n=jnp.sum(lanes.n * ratio),
        z_y=z_y,
        z_sum=None if lanes.z_sum is None else jnp.sum(lanes.z_sum) + z_y,
        q=None if lanes.q is None else jnp.sum((lanes.q + lanes.n * fall) * ratio),
    )


def _packed(statistics: RowStatistics) -> Float[Array, " 128"]:
    place = plgpu.broadcasted_iota(jnp.int32, (128,), 0, layout=plgpu.Layout.WG_STRIDED((128,), vec_size=1))
    values = [value for value in statistics if value is not None]
    return functools.reduce(
        lambda packed, item: jnp.where(place == item[0], item[1], packed),
        enumerate(values),
        jnp.zeros((128,), jnp.float32),
    )


def _unpacked(record: Any, options: RowOptions) -> RowStatistics:
    """What `_packed` left in a record, or in the last dimension of records."""
    z_sum, q = (3, 4) if options.label_smoothing else (None, 3)
    return RowStatistics(
        m=record[..., 0],
        n=record[..., 1],
        z_y=record[..., 2],
        z_sum=None if z_sum is None else record[..., z_sum],
        q=record[..., q] if options.metrics else None,
    )


def _take_gradients(
    labels_ref: Any,
    weights_ref: Any,
    records_ref: Any,
    pieces: Any,
    filled: Any,
    rewritten: Any,
    published: Any,
    ring: Ring,
) -> None:
    """The warpgroup that overwrites every row's pieces with their gradient, once the row's statistics are there."""
    num_pieces, first, options = ring.num_pieces(), ring.first_piece(), ring.options

    def take_row(visit: Array, own: tuple[Array, Array]) -> tuple[Array, Array]:
        (label, weight), row, following = own, ring.row(visit), ring.row(visit + 1)
        of_next = labels_ref[following], weights_ref[following]
        plgpu.barrier_wait(published.at[ring.published(visit)])
        _fence()
        parts = [_unpacked(records_ref.at[row, part], options) for part in range(ring.config.cluster)]
        coefficients = rows.coefficients(rows.merged(parts), weight, options)

        def take_piece(i: Array, _: None) -> None:
            slot, start = ring.slot(visit * num_pieces + i), (first + i) * ring.config.piece
            piece = pieces.at[slot]
            plgpu.barrier_wait(filled.at[slot])
            position = label - start
            overwrite = functools.partial(_overwrite, piece, coefficients, ring)
            lax.cond(
                (position >= 0) & (position < ring.config.piece), lambda: overwrite(position), lambda: overwrite(None)
            )
            plgpu.commit_smem()
            plgpu.barrier_arrive(rewritten.at[slot])

        lax.fori_loop(0, num_pieces, take_piece, None)
        return of_next

    row = ring.row(0)
    lax.fori_loop(0, ring.num_rows(), take_row, (labels_ref[row], weights_ref[row]))


def _overwrite(piece: Any, coefficients: rows.RowCoefficients, ring: Ring, label: Array | None) -> None:
    """Logits become gradients; what lies beyond the end of the row is never written out."""
    z, slope = rows.transformed(piece[...].astype(jnp.float32), None, ring.options, _MATH)
    dz = jnp.exp2((z - coefficients.shift) * LOG2_E) * coefficients.factor
    if coefficients.uniform is not None:
        dz = dz - coefficients.uniform
    if label is not None:
        layout = plgpu.Layout.WG_STRIDED((ring.config.piece,), vec_size=4)
        column = plgpu.broadcasted_iota(jnp.int32, dz.shape, 0, layout=layout)
        dz = jnp.where(column == label, coefficients.label_gradient, dz)
    if slope is not None:
        dz = dz * slope
    piece[...] = dz.astype(piece.dtype)
