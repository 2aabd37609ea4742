"""Exponentials of a chunk in the epilogue of a GEMM, in Pallas Mosaic GPU: for Hopper (TMA, wgmma).

One warpgroup of every block moves tiles of x and W to shared memory by TMA; two others multiply them, turn their
float32 accumulators into exponentials, store these by TMA (if anybody is to read them) and leave sums and maxima of
their part of each row. A block stays on its multiprocessor and works through output tiles in an order that keeps W in
the L2 cache.

Two schedules of the two computing warpgroups:

    cooperative   both work on one output tile, half of it each; tensor cores rest while exponentials are taken
    pingpong      each has its own output tile: one takes exponentials while the other multiplies. They hand the tensor
                  cores to each other by a barrier, and take their operands from one ring in turn.

Tiles may stick out of the arrays at their ends: TMA reads zeros there and writes nothing. Columns are left out of sums
only in tiles that do, or that hold a label's column: a table, made before, says which.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Float, Int

from jaxchunk.lm_head import rows
from jaxchunk.lm_head.kernels import LOG2_E, Exponentials, exponentials_of_parts
from jaxchunk.lm_head.kernels.tiles import MosaicConfig, Tiles, choose_config
from jaxchunk.lm_head.offset_rows import LARGEST_STORED
from jaxchunk.lm_head.rows import RowOptions
from jaxchunk.lm_head.varying import varying_alike

ROWS_MULTIPLE, WIDTH_MULTIPLE, COLUMNS_MULTIPLE = 8, 16, 16  # of C, D and V: what TMA and wgmma can lay out

_MATH = rows.Math(jnp.exp, lambda x: 1.0 / (1.0 + jnp.exp(-x)))


def exponentials(
    x: Float[Array, "C D"],
    W: Float[Array, "V D"],
    offset: Float[Array, " C"],
    labels: Int[Array, " C"],
    bias: Float[Array, " V"] | None,
    options: RowOptions,
    *,
    store: bool = True,
    config: MosaicConfig | None = None,
    interpret: bool = False,
) -> Exponentials:
    """`Exponentials` of a chunk (`kernels/__init__.py` has the contract): one GEMM, one write with `store`."""
    (C, D), V = x.shape, W.shape[0]
    config = config or choose_config(C, D, V)
    if config.obstacle is not None:
        raise ValueError(config.obstacle)
    if C % ROWS_MULTIPLE or D % WIDTH_MULTIPLE or V % COLUMNS_MULTIPLE:
        raise ValueError(
            f"C is {C}, D {D} and V {V}; they must be multiples of "
            f"{ROWS_MULTIPLE}, {WIDTH_MULTIPLE} and {COLUMNS_MULTIPLE}"
        )
    cluster_m, cluster_n = config.cluster_tile
    grid_m, grid_n = -(-C // cluster_m), -(-V // cluster_n)
    to_tile = (0, grid_m * cluster_m - C)
    inputs = [
        x,
        W,
        jnp.pad(offset, to_tile, constant_values=jnp.inf),
        jnp.pad(labels, to_tile, constant_values=-1),
    ]
    inputs.append(_tiles_to_mask(inputs[3], V, grid_n * cluster_n, config))
    if bias is not None:
        inputs.append(jnp.pad(bias.astype(jnp.float32), (0, grid_n * cluster_n - V)))
    inputs = varying_alike(*inputs)
    out = functools.partial(jax.ShapeDtypeStruct, manual_axis_type=jax.typeof(inputs[0]).manual_axis_type)
    parts = out((grid_n * cluster_n // config.tile_n, grid_m * cluster_m), jnp.float32)
    cluster_size = 1 if config.cluster is None else 2
    tiles = Tiles(C, V, D, grid_m, grid_n, config, options, has_bias=bias is not None, store=store)
    E_type = [out((C, V), x.dtype)] if store else []
    outputs = plgpu.kernel(
        functools.partial(_kernel, tiles=tiles),
        out_type=[*E_type, *[parts] * (3 if options.metrics else 1)],
        grid=(min(2 if interpret else num_multiprocessors() // cluster_size, grid_m * grid_n),),
        grid_names=("block",),
        cluster=(cluster_size,),
        cluster_names=("cluster",),
        num_threads=3,
        thread_name="warpgroup",
        kernel_name="jaxchunk_exponentials",
        interpret=interpreter() if interpret else None,
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
    )(*inputs)
    E, (sums, *maxima_and_moments) = (outputs[0], outputs[1:]) if store else (None, outputs)
    return exponentials_of_parts(E, sums[:, :C], [parts[:, :C] for parts in maxima_and_moments])


def _tiles_to_mask(labels: Array, V: int, columns: int, config: MosaicConfig) -> Int[Array, "tiles_m tiles_n"]:
    """Which warpgroups' tiles hold the column of a label of theirs, or stick out of V: 1 or 0."""
    tile = lax.broadcasted_iota(labels.dtype, (labels.size, columns // config.tile_n), 1)
    holds = (lax.div(labels, jnp.int32(config.tile_n))[:, None] == tile) & (labels >= 0)[:, None]
    holds = jnp.any(holds.reshape(-1, config.tile_m, tile.shape[1]), axis=1)
    return (holds | ((tile[:1] + 1) * config.tile_n > V)).astype(jnp.int32)


def _kernel(x_ref, W_ref, offset_ref, labels_ref, mask_ref, *refs, tiles: Tiles) -> None:  # type: ignore[no-untyped-def]
    bias_ref, out_refs = (refs[0], refs[1:]) if tiles.has_bias else (None, refs)
    config = tiles.config
    block_m, block_n = config.block_tile
    slots = (2, config.store_slots, config.tile_m, config.store_n)

    @functools.partial(
        pl.run_scoped,
        x_smem=_shared((config.stages, block_m, config.tile_k), x_ref.dtype, tiles.D),
        W_smem=_shared((config.stages, block_n, config.tile_k), W_ref.dtype, tiles.D),
        E_smem=_shared(slots, out_refs[0].dtype, tiles.V) if tiles.store else None,
        filled=plgpu.Barrier(num_arrivals=2, num_barriers=config.barriers),
        drained=_drained_barrier(config),
        turns=plgpu.Barrier(num_barriers=2),
        collective_axes="warpgroup",
    )
    def _(x_smem: Any, W_smem: Any, E_smem: Any, filled: Any, drained: Any, turns: Any) -> None:
        warpgroup = lax.axis_index("warpgroup")

        @pl.when(warpgroup == 2)
        def _move() -> None:
            plgpu.set_max_registers(40, action="decrease")
            _load_operands(x_ref, W_ref, x_smem, W_smem, filled, drained, tiles)

        @pl.when(warpgroup < 2)
        def _work() -> None:
            plgpu.set_max_registers(232, action="increase")
            multiply = functools.partial(_product, x_smem, W_smem, filled, drained, turns, tiles)
            finish = functools.partial(_finish_tile, bias_ref, out_refs, E_smem, tiles)
            _compute(offset_ref, labels_ref, mask_ref, multiply, finish, turns, tiles)
            if tiles.store:
                plgpu.wait_smem_to_gmem(0)


def _load_operands(x_ref: Any, W_ref: Any, x_smem: Any, W_smem: Any, filled: Any, drained: Any, tiles: Tiles) -> None:
    """The moving warpgroup: fills the ring, always `stages` steps ahead of who drains it."""
    config = tiles.config
    block_m, block_n = config.block_tile

    def load_tile(i: Array, _: None) -> None:
        m, n = tiles.at(i)

        def load_step(k: Array, _: None) -> None:
            count = i * tiles.steps + k
            slot, depth = tiles.slot(count), pl.ds(k * config.tile_k, config.tile_k)

            @pl.when(count >= config.stages)
            def _wait() -> None:
                plgpu.barrier_wait(drained.at[tiles.barrier(count - config.stages)])

            for ref, part, smem, shared_along in (
                (x_ref, pl.ds(m, block_m), x_smem, "n"),
                (W_ref, pl.ds(n, block_n), W_smem, "m"),
            ):
                shared: Any = {"collective_axes": "cluster"} if config.cluster == shared_along else {}
                plgpu.copy_gmem_to_smem(ref.at[part, depth], smem.at[slot], filled.at[tiles.barrier(count)], **shared)

        lax.fori_loop(0, tiles.steps, load_step, None)

    num_tiles = tiles.of_this_block()
    lax.fori_loop(0, num_tiles, load_tile, None)
    for back in range(config.stages, 0, -1):  # a barrier must not end in a phase that nobody waited for
        count = num_tiles * tiles.steps - back

        @pl.when(count >= 0)
        def _drain(count: Array = count) -> None:
            plgpu.barrier_wait(drained.at[tiles.barrier(count)])


def _compute(
    offset_ref: Any,
    labels_ref: Any,
    mask_ref: Any,
    multiply: Callable[..., Array],
    finish: Callable[..., None],
    turns: Any,
    tiles: Tiles,
) -> None:
    """A computing warpgroup: its share of this block's tiles one after the other."""
    config, warpgroup = tiles.config, lax.axis_index("warpgroup")
    num_tiles = tiles.of_this_block()
    if config.is_pingpong:

        @pl.when((warpgroup == 1) & (num_tiles > 0))
        def _() -> None:
            plgpu.barrier_arrive(turns.at[0])

    def compute_tile(visit: Array, _: None) -> None:
        i = visit * 2 + warpgroup if config.is_pingpong else visit
        m, n = tiles.at(i)
        if not config.is_pingpong:
            m = m + warpgroup * config.tile_m if config.split == "m" else m
            n = n + warpgroup * config.tile_n if config.split == "n" else n
        own_rows = pl.ds(m, config.tile_m)
        offset, label = (_load(ref.at[own_rows], plgpu.Layout.WGMMA.reduce(1)) for ref in (offset_ref, labels_ref))
        is_masked = mask_ref[lax.div(m, jnp.int32(config.tile_m)), lax.div(n, jnp.int32(config.tile_n))] > 0
        raw = multiply(i, i + 1 < num_tiles)
        lax.cond(
            is_masked,
            lambda: finish(m, n, offset, label, raw),
            lambda: finish(m, n, offset, None, raw),
        )

    num_visits = lax.div(num_tiles + 1 - warpgroup, jnp.int32(2)) if config.is_pingpong else num_tiles
    lax.fori_loop(0, num_visits, compute_tile, None)


def _product(
    x_smem: Any, W_smem: Any, filled: Any, drained: Any, turns: Any, tiles: Tiles, i: Array, more_follow: Array
) -> Float[Array, "tile_m tile_n"]:
    """A warpgroup's tile of x W^T, float32."""
    config, warpgroup = tiles.config, lax.axis_index("warpgroup")
    own_rows: Any = slice(None)
    own_columns: Any = slice(None)
    if not config.is_pingpong and config.split == "m":
        own_rows = pl.ds(warpgroup * config.tile_m, config.tile_m)
    elif not config.is_pingpong:
        own_columns = pl.ds(warpgroup * config.tile_n, config.tile_n)

    def accumulate(accumulator: Any) -> Array:
        if config.is_pingpong:
            plgpu.barrier_wait(turns.at[warpgroup])

        def step(k: Array, _: None) -> None:
            count = i * tiles.steps + k
            slot = tiles.slot(count)
            plgpu.barrier_wait(filled.at[tiles.barrier(count)])
            plgpu.wgmma(accumulator, x_smem.at[slot, own_rows], W_smem.at[slot, own_columns].transpose((1, 0)))
            plgpu.wgmma_wait(1)

            @pl.when(k > 0)
            def _release() -> None:
                plgpu.barrier_arrive(drained.at[tiles.barrier(count - 1)])

        lax.fori_loop(0, tiles.steps, step, None)
        if config.is_pingpong:

            @pl.when(more_follow)
            def _pass_on() -> None:
                plgpu.barrier_arrive(turns.at[1 - warpgroup])

        plgpu.wgmma_wait(0)
        plgpu.barrier_arrive(drained.at[tiles.barrier(i * tiles.steps + tiles.steps - 1)])
        return accumulator[...]

    return pl.run_scoped(accumulate, plgpu.ACC((config.tile_m, config.tile_n), jnp.float32))


def _finish_tile(
    bias_ref: Any,
    out_refs: Any,
    E_smem: Any,
    tiles: Tiles,
    m: Array,
    n: Array,
    offset: Array,
    label: Array | None,
    raw: Array,
) -> None:
    """Exponentials of a warpgroup's tile, stored or not; sums (and for the metrics maxima and moments) of its rows.

    It goes on in steps of `store_n` columns, so that one's exponentials are taken while the one before is stored. With
    a `label` no column is counted that is a label's or outside of V.
    """
    config = tiles.config
    E_ref, parts_refs = (out_refs[0], out_refs[1:]) if tiles.store else (None, out_refs)
    part, own_rows = lax.div(n, jnp.int32(config.tile_n)), pl.ds(m, config.tile_m)
    parts: list[Array] = []
    for i in range(config.tile_n // config.store_n):
        start = n + i * config.store_n
        bias = None
        if bias_ref is not None:
            bias = _load(bias_ref.at[pl.ds(start, config.store_n)], plgpu.Layout.WGMMA.reduce(0))
        exponent, slope = _exponents(raw[:, i * config.store_n : (i + 1) * config.store_n], offset, bias, tiles)
        if label is not None:
            column = plgpu.broadcasted_iota(jnp.int32, exponent.shape, 1, layout=plgpu.Layout.WGMMA)
            is_counted = column != lax.broadcast_in_dim(label - start, exponent.shape, (0,))
            if tiles.V % config.cluster_tile[1]:
                is_counted &= column < tiles.V - start
            exponent = jnp.where(is_counted, exponent, -jnp.inf)
        e = jnp.exp2(exponent)
        new = [jnp.sum(e, axis=1)]
        if tiles.options.metrics:
            top = jnp.max(exponent, axis=1)
            below = exponent - lax.broadcast_in_dim(top, exponent.shape, (0,))
            new += [top, jnp.sum(jnp.where(e > 0, e * below, 0.0), axis=1)]
        parts = _combined(parts, new) if parts else new
        if E_ref is not None:
            e = jnp.minimum(e, LARGEST_STORED)
            slot = E_smem.at[lax.axis_index("warpgroup"), i % config.store_slots]
            _store(e if slope is None else e * slope, E_ref.at[own_rows, pl.ds(start, config.store_n)], slot, config)
    for ref, value in zip(parts_refs, parts, strict=True):
        ref[part, own_rows] = value


def _combined(a: list[Array], b: list[Array]) -> list[Array]:
    """Sums (and maxima, and moments about them) of two parts of each row."""
    if len(a) == 1:
        return [a[0] + b[0]]
    top = jnp.maximum(a[1], b[1])
    moments = [jnp.where(n > 0, moment + n * (own_top - top), 0.0) for n, own_top, moment in (a, b)]
    return [a[0] + b[0], top, moments[0] + moments[1]]


def _exponents(
    raw: Array, offset: Array, bias: Array | None, tiles: Tiles
) -> tuple[Float[Array, "tile_m store_n"], Float[Array, "tile_m store_n"] | None]:
    """(z - o) log2 e, with the softcap's slope."""
    options = tiles.options
    if bias is None and options.softcap is None:
        (z, slope), scale = (raw, None), options.logit_scale * LOG2_E  # one multiply-add an element
    else:
        bias = None if bias is None else lax.broadcast_in_dim(bias, raw.shape, (1,))
        (z, slope), scale = rows.transformed(raw, bias, options, _MATH), LOG2_E
    return z * scale - lax.broadcast_in_dim(offset, raw.shape, (0,)), slope


def _load(ref: Any, layout: Any) -> Array:
    """A vector from global memory, each thread its part."""
    return plgpu.load(ref, layout=layout, optimized=False)  # type: ignore[call-arg]  # JAX 0.10 wants an index


def _store(e: Array, E_ref: Any, slot: Any, config: MosaicConfig) -> None:
    """Writes a part of a tile by TMA, by way of a slot in shared memory."""
    plgpu.wait_smem_to_gmem(config.store_slots - 1, wait_read_only=True)
    slot[...] = e.astype(E_ref.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(slot, E_ref)


def interpreter() -> Any:
    """Parameters of JAX's interpreter on a CPU."""
    return plgpu.InterpretGPUParams(inline_mgpu="ignore")  # type: ignore[attr-defined]  # from JAX 0.11


def _drained_barrier(config: MosaicConfig) -> Any:
    """Where warpgroups say that they need a slot's operands no longer, to both blocks of a cluster."""
    warpgroups = 1 if config.is_pingpong else 2
    if config.cluster is None:
        return plgpu.Barrier(num_arrivals=warpgroups, num_barriers=config.barriers)
    return plgpu.ClusterBarrier(collective_axes=("cluster",), num_arrivals=warpgroups, num_barriers=config.barriers)


def _shared(shape: tuple[int, ...], dtype: Any, size: int) -> Any:
    """Shared memory in the layout that wgmma and TMA agree on, for tiles of an array with rows of `size` elements."""
    bytes_alike = math.gcd(shape[-1], size) * jnp.dtype(dtype).itemsize
    swizzle = plgpu.find_swizzle(bytes_alike * 8)
    tiling = plgpu.TilingTransform((8, swizzle // jnp.dtype(dtype).itemsize))
    return plgpu.SMEM(shape, dtype, transforms=(tiling, plgpu.SwizzleTransform(swizzle)))


def num_multiprocessors() -> int:
    """Of the device that traced code is meant for."""
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    return device.num_cores if device is not None else jax.extend.backend.get_default_device().core_count
