"""Exponentials of a chunk in the epilogue of a GEMM, in Pallas Triton: for GPUs without wgmma (Ampere, Ada, DGX Spark).

What `mosaic.py` computes, with one program an output tile, operands read through pipelined loads and multiplied by
warp-level tensor-core instructions. Programs run in groups of row tiles, so that a tile of W read by one is in the L2
cache for the others of its group. It is right in JAX's interpreter and lowers for CUDA in the tests; how fast it is on
such a GPU has not been measured.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Float, Int

from jaxchunk.lm_head import rows
from jaxchunk.lm_head.kernels import LOG2_E, Exponentials, exponentials_of_parts, tuned
from jaxchunk.lm_head.offset_rows import LARGEST_STORED
from jaxchunk.lm_head.rows import RowOptions
from jaxchunk.lm_head.target import target_device
from jaxchunk.lm_head.varying import varying_alike

_MATH = rows.Math(jnp.exp, lambda x: 1.0 / (1.0 + jnp.exp(-x)))
_MOST_SHARED_MEMORY_BYTES = 227 * 1024  # that a program can have on any GPU


@dataclasses.dataclass(frozen=True)
class TritonTiles:
    """Tuning parameters, tiles and warps powers of two; the default takes 48 of the 99 KiB of shared memory of Ada.

    Attributes:
      tile_m: rows of an output tile.
      tile_n: columns of it.
      tile_k: how much of D is multiplied at a time.
      group: row tiles that run through the vocabulary together.
      num_warps: warps in a program.
      num_stages: operand tiles that are loaded ahead.
    """

    tile_m: int = 128
    tile_n: int = 128
    tile_k: int = 32
    group: int = 8
    num_warps: int = 8
    num_stages: int = 3

    @property
    def shared_memory_bytes(self) -> int:
        """What operands take of shared memory."""
        return 2 * self.num_stages * (self.tile_m + self.tile_n) * self.tile_k

    @property
    def obstacle(self) -> str | None:
        """Why no GPU can run the kernel with it, or None; a GPU's own limit is the compiler's to say."""
        for name in ("tile_m", "tile_n", "tile_k", "num_warps"):
            value = getattr(self, name)
            if value & (value - 1):
                return f"{name} is {value}; it must be a power of two"
        if min(self.tile_m, self.tile_n, self.tile_k) < 16:
            return f"{self} has tiles narrower than the 16 of a tensor core"
        if self.shared_memory_bytes > _MOST_SHARED_MEMORY_BYTES:
            return f"{self} takes {self.shared_memory_bytes} bytes of shared memory; no GPU has that"
        return None


def exponentials(
    x: Float[Array, "C D"],
    W: Float[Array, "V D"],
    offset: Float[Array, " C"],
    labels: Int[Array, " C"],
    bias: Float[Array, " V"] | None,
    options: RowOptions,
    *,
    store: bool = True,
    config: TritonTiles | None = None,
    interpret: bool = False,
) -> Exponentials:
    """`Exponentials` of a chunk (`kernels/__init__.py` has the contract): one GEMM, one write with `store`."""
    (C, D), V = x.shape, W.shape[0]
    config = config or choose_config(C, D, V)
    grid_m, grid_n = -(-C // config.tile_m), -(-V // config.tile_n)
    inputs = varying_alike(x, W, offset, labels, *([] if bias is None else [bias.astype(jnp.float32)]))
    out = functools.partial(jax.ShapeDtypeStruct, manual_axis_type=jax.typeof(inputs[0]).manual_axis_type)
    whole = [pl.BlockSpec(array.shape, lambda i, rank=array.ndim: (0,) * rank) for array in inputs]
    parts = (grid_n, C)
    parts_out = [(out(parts, jnp.float32), pl.BlockSpec(parts, lambda i: (0, 0)))] * (3 if options.metrics else 1)
    E_tile = pl.BlockSpec((config.tile_m, config.tile_n), lambda i: _tile(i, grid_m, grid_n, config.group))
    E_out = [(out((C, V), x.dtype), E_tile)] if store else []
    out_shape, out_specs = zip(*E_out, *parts_out, strict=True)
    outputs = pl.pallas_call(
        functools.partial(
            _kernel, shape=(C, V, D), config=config, options=options, has_bias=bias is not None, store=store
        ),
        grid=(grid_m * grid_n,),
        in_specs=whole,
        out_specs=out_specs,
        out_shape=out_shape,
        interpret=interpret,
        compiler_params=plgpu.CompilerParams(num_warps=config.num_warps, num_stages=config.num_stages),
        name="jaxchunk_exponentials",
    )(*inputs)
    E, (sums, *maxima_and_moments) = (outputs[0], outputs[1:]) if store else (None, outputs)
    return exponentials_of_parts(E, sums, maxima_and_moments)


def choose_config(C: int, D: int, V: int) -> TritonTiles:
    """What ran fastest nearest to this shape on this device, or the default: GPUs differ too much to share."""
    return tuned.choose("triton_gemm", TritonTiles, C, D, V, target_device().device_kind, any_device=False)


def _kernel(  # type: ignore[no-untyped-def]
    x_ref,
    W_ref,
    offset_ref,
    labels_ref,
    *refs,
    shape: tuple[int, int, int],
    config: TritonTiles,
    options: RowOptions,
    has_bias: bool,
    store: bool,
) -> None:
    bias_ref, out_refs = (refs[0], refs[1:]) if has_bias else (None, refs)
    E_ref, parts_refs = (out_refs[0], out_refs[1:]) if store else (None, out_refs)
    C, V, _ = shape
    m, n = _tile(pl.program_id(0), -(-C // config.tile_m), -(-V // config.tile_n), config.group)
    own_rows, columns = pl.ds(m * config.tile_m, config.tile_m), pl.ds(n * config.tile_n, config.tile_n)
    row = m * config.tile_m + lax.iota(jnp.int32, config.tile_m)
    column = n * config.tile_n + lax.iota(jnp.int32, config.tile_n)
    raw = _product(x_ref, W_ref, own_rows, columns, row < C, column < V, shape, config)
    offset = plgpu.load(offset_ref.at[own_rows], mask=row < C, other=jnp.inf)
    label = plgpu.load(labels_ref.at[own_rows], mask=row < C, other=-1)
    bias = None if bias_ref is None else plgpu.load(bias_ref.at[columns], mask=column < V, other=0.0)[None, :]

    if bias is None and options.softcap is None:
        (z, slope), scale = (raw, None), options.logit_scale * LOG2_E  # one multiply-add an element
    else:
        (z, slope), scale = rows.transformed(raw, bias, options, _MATH), LOG2_E
    is_counted = (column[None, :] != label[:, None]) & (column < V)[None, :]
    exponent = jnp.where(is_counted, z * scale - offset[:, None], -jnp.inf)
    e = jnp.exp2(exponent)
    parts = [jnp.sum(e, axis=1)]
    if options.metrics:
        top = jnp.max(exponent, axis=1)
        parts += [top, jnp.sum(jnp.where(e > 0, e * (exponent - top[:, None]), 0.0), axis=1)]
    for ref, value in zip(parts_refs, parts, strict=True):
        plgpu.store(ref.at[n, own_rows], value, mask=row < C)
    if E_ref is not None:
        e = jnp.minimum(e, LARGEST_STORED)
        stored = (e if slope is None else e * slope).astype(E_ref.dtype)
        plgpu.store(E_ref, stored, mask=(row < C)[:, None] & (column < V)[None, :])


def _tile(i: Array, grid_m: int, grid_n: int, group: int) -> tuple[Array, Array]:
    """The i-th output tile: groups of `group` row tiles, and in a group all rows of a column of tiles first."""
    per_group = jnp.int32(group * grid_n)
    first = lax.div(i, per_group) * group
    height = jnp.minimum(grid_m - first, group)
    within = lax.rem(i, per_group)
    return first + lax.rem(within, height), lax.div(within, height)


def _product(
    x_ref: Any,
    W_ref: Any,
    own_rows: Any,
    columns: Any,
    is_row: Array,
    is_column: Array,
    shape: tuple[int, int, int],
    config: TritonTiles,
) -> Float[Array, "tile_m tile_n"]:
    """A tile of x W^T, float32."""
    D, tile_k = shape[2], config.tile_k

    def step(k: Array, accumulator: Array) -> Array:
        depth = pl.ds(k * tile_k, tile_k)
        x_mask, W_mask = is_row[:, None], is_column[:, None]
        if D % tile_k:
            is_depth = (k * tile_k + lax.iota(jnp.int32, tile_k) < D)[None, :]
            x_mask, W_mask = x_mask & is_depth, W_mask & is_depth
        x_mask = jnp.broadcast_to(x_mask, (config.tile_m, tile_k))
        W_mask = jnp.broadcast_to(W_mask, (config.tile_n, tile_k))
        x = plgpu.load(x_ref.at[own_rows, depth], mask=x_mask, other=0.0)
        W = plgpu.load(W_ref.at[columns, depth], mask=W_mask, other=0.0)
        dimensions = (((1,), (1,)), ((), ()))
        return accumulator + lax.dot_general(x, W, dimensions, preferred_element_type=jnp.float32)

    zeros = jnp.zeros((config.tile_m, config.tile_n), jnp.float32)
    return lax.fori_loop(0, -(-D // tile_k), step, zeros)
