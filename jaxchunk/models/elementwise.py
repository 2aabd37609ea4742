"""What lies between the matrix products of a block, each as one Pallas kernel a direction (lowered through Triton).

XLA takes a norm apart into reductions and products of its own, and the gradients of both factors of SwiGLU into two
kernels: on an H200 the norms of Qwen2-0.5B took twice the time of their bytes (docs/training_step.md). Here every array
goes through memory once in each direction. Arithmetic is float32 whatever the arrays are.

The kernels do what `qwen2.rms_norm` and `jax.nn.silu(gate) * up` do, to the rounding of the results.

Letters: T rows (tokens), D model width, F feed-forward width.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Float

from jaxchunk.lm_head.kernels.triton import sigmoid
from jaxchunk.lm_head.varying import varying_alike

_GATE_BLOCK = 4096  # elements of SwiGLU that a program handles, where the number of rows lets it
_WARP_OF_NORM = 1024  # elements of a row that a warp has: up to that width its threads meet without a barrier
_NORM_STEPS = 16  # of the norm's gradient in a program, which leaves one row of partial sums for the weight
_MIN_COLUMNS = 64


def residual_norm(
    x: Float[Array, "*batch D"],
    delta: Float[Array, "*batch D"] | None,
    weight: Float[Array, " D"],
    eps: float,
    *,
    interpret: bool = False,
) -> tuple[Float[Array, "*batch D"], Float[Array, "*batch D"]]:
    """The residual stream with a branch added to it, and its root-mean-square norm (arXiv:1910.07467).

    The stream is returned without a branch too: what comes back for it in the backward pass is added in the kernel.

    Args:
      x: residual stream.
      delta: what a branch adds to it; None for nothing.
      weight: of the norm.
      eps: added to the mean square.
      interpret: run in Pallas's interpreter.

    Returns:
      `x + delta`, rounded to the dtype of `x`, and the norm of that.
    """
    D = x.shape[-1]
    given = [a.reshape(-1, D) for a in (x, *(() if delta is None else (delta,)))]
    *given, weight = varying_alike(*given, weight)
    stream, normed = _residual_norm(given[0], None if delta is None else given[1], weight, eps, interpret)
    return stream.reshape(x.shape), normed.reshape(x.shape)


def swiglu(gate_up: Float[Array, "*batch 2F"], *, interpret: bool = False) -> Float[Array, "*batch F"]:
    """`silu(gate) * up` (arXiv:2002.05202), the two side by side as one matrix product with both weights leaves them.

    Args:
      gate_up: gate in the first F columns, up in the others; `can_gate(F)`.
      interpret: run in Pallas's interpreter.
    """
    *batch, columns = gate_up.shape
    return _swiglu(gate_up.reshape(-1, 2, columns // 2), interpret).reshape(*batch, columns // 2)


def swiglu_gradient(
    gate_up: Float[Array, "*batch 2F"], cotangent: Float[Array, "*batch F"], *, interpret: bool = False
) -> tuple[Float[Array, "*batch 2F"], Float[Array, "*batch F"]]:
    """The gradient of `swiglu`, and what `swiglu` gave, for a backward pass that has not kept it."""
    shape, F = cotangent.shape, cotangent.shape[-1]
    gate_up, cotangent = varying_alike(gate_up.reshape(-1, 2, F), cotangent.reshape(-1, F))
    gradient, product = _swiglu_gradient(gate_up, cotangent, True, interpret)
    return gradient.reshape(*shape[:-1], 2 * F), product.reshape(shape)


def can_gate(num_columns: int) -> bool:
    """Whether `swiglu` can take F columns: its blocks are powers of two, and narrow ones would not fill a warp."""
    return _power_of_two_in(num_columns) >= _MIN_COLUMNS


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _residual_norm(x: Array, delta: Array | None, weight: Array, eps: float, interpret: bool) -> tuple[Array, Array]:
    return _residual_norm_forward(x, delta, weight, eps, interpret)[0]


def _residual_norm_forward(
    x: Array, delta: Array | None, weight: Array, eps: float, interpret: bool
) -> tuple[tuple[Array, Array], tuple[Array, Array, Array, tuple[()] | None]]:
    (T, D), out = x.shape, _like(x)
    rows = _rows_of_norm(T, D)
    block, vector = pl.BlockSpec((rows, D), lambda i: (i, 0)), pl.BlockSpec((D,), lambda i: (0,))
    has_delta = delta is not None
    outputs = pl.pallas_call(
        functools.partial(_norm_kernel, eps=eps, has_delta=has_delta),
        grid=(T // rows,),
        in_specs=[block] * (1 + has_delta) + [vector],
        out_specs=[block] * (1 + has_delta) + [pl.BlockSpec((rows,), lambda i: (i,))],
        out_shape=[out((T, D), x.dtype)] * (1 + has_delta) + [out((T,), jnp.float32)],
        interpret=interpret,
        compiler_params=plgpu.CompilerParams(num_warps=max(1, rows * _padded(D) // _WARP_OF_NORM), num_stages=1),
        name="jaxchunk_residual_norm",
    )(x, *((delta,) if has_delta else ()), weight)
    stream, (normed, scale) = (outputs[0] if has_delta else x), outputs[-2:]
    return (stream, normed), (stream, scale, weight, () if has_delta else None)


def _residual_norm_backward(
    eps: float,
    interpret: bool,
    kept: tuple[Array, Array, Array, tuple[()] | None],
    cotangents: tuple[Array, Array],
) -> tuple[Array, Array | None, Array]:
    del eps
    stream, scale, weight, branch = kept
    (T, D), out = stream.shape, _like(stream)
    rows = _rows_of_norm(T, D)
    steps = min(T // rows, _NORM_STEPS)
    block, vector = pl.BlockSpec((rows * steps, D), lambda i: (i, 0)), pl.BlockSpec((D,), lambda i: (0,))
    programs = pl.cdiv(T, rows * steps)  # the last one may have fewer steps
    dx, partial = pl.pallas_call(
        functools.partial(_norm_gradient_kernel, rows=rows, steps=steps, all_steps=T // rows),
        grid=(programs,),
        in_specs=[block, pl.BlockSpec((rows * steps,), lambda i: (i,)), vector, block, block],
        out_specs=[block, pl.BlockSpec((None, D), lambda i: (i, 0))],
        out_shape=[out((T, D), stream.dtype), out((programs, D), jnp.float32)],
        interpret=interpret,
        compiler_params=plgpu.CompilerParams(num_warps=max(1, rows * _padded(D) // _WARP_OF_NORM), num_stages=2),
        name="jaxchunk_residual_norm_gradient",
    )(stream, scale, weight, *cotangents)
    return dx, None if branch is None else dx, jnp.sum(partial, axis=0).astype(weight.dtype)


_residual_norm.defvjp(_residual_norm_forward, _residual_norm_backward)


def _norm_kernel(x_ref, *refs, eps: float, has_delta: bool) -> None:  # type: ignore[no-untyped-def]
    delta_ref, refs = (refs[0], refs[1:]) if has_delta else (None, refs)
    w_ref, *stream_refs, normed_ref, scale_ref = refs
    rows, D = x_ref.shape
    everything = slice(None), pl.ds(0, _padded(D))
    mask, mask_of_row = _columns(rows, D)
    x = plgpu.load(x_ref.at[everything], mask=mask, other=0.0)
    if delta_ref is not None:
        delta = plgpu.load(delta_ref.at[everything], mask=mask, other=0.0)
        x = (x.astype(jnp.float32) + delta.astype(jnp.float32)).astype(x_ref.dtype)
        plgpu.store(stream_refs[0].at[everything], x, mask=mask)
    x = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.sum(x * x, axis=1) / D + eps)
    scale_ref[:] = scale
    w = plgpu.load(w_ref.at[everything[1]], mask=mask_of_row, other=0.0).astype(jnp.float32)
    normed = x * scale[:, None] * w[None, :]
    plgpu.store(normed_ref.at[everything], normed.astype(normed_ref.dtype), mask=mask)


def _norm_gradient_kernel(*refs: Any, rows: int, steps: int, all_steps: int) -> None:
    x_ref, scale_ref, w_ref, d_stream_ref, d_normed_ref, dx_ref, dw_ref = refs
    D = x_ref.shape[1]
    columns, (mask, mask_of_row) = pl.ds(0, _padded(D)), _columns(rows, D)
    w = plgpu.load(w_ref.at[columns], mask=mask_of_row, other=0.0).astype(jnp.float32)

    def step(i: Array, dw: Array) -> Array:
        where = pl.ds(i * rows, rows), columns
        x, d_stream, d_normed = (
            plgpu.load(ref.at[where], mask=mask, other=0.0).astype(jnp.float32)
            for ref in (x_ref, d_stream_ref, d_normed_ref)
        )
        scale = plgpu.load(scale_ref.at[where[0]])[:, None]
        x = x * scale
        direction = d_normed * w[None, :]
        along = jnp.sum(direction * x, axis=1) / D
        dx = d_stream + scale * (direction - x * along[:, None])
        plgpu.store(dx_ref.at[where], dx.astype(dx_ref.dtype), mask=mask)
        return dw + d_normed * x

    own_steps = jnp.minimum(steps, all_steps - pl.program_id(0) * steps)
    dw = jax.lax.fori_loop(0, own_steps, step, jnp.zeros((rows, _padded(D)), jnp.float32))
    plgpu.store(dw_ref.at[columns], jnp.sum(dw, axis=0), mask=mask_of_row)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _swiglu(gate_up: Array, interpret: bool) -> Array:
    T, _, F = gate_up.shape
    grid, pair, single = _gate_blocks(T, F)
    return pl.pallas_call(
        functools.partial(_swiglu_kernel, interpret=interpret),
        grid=grid,
        in_specs=[pair],
        out_specs=single,
        out_shape=_like(gate_up)((T, F), gate_up.dtype),
        interpret=interpret,
        compiler_params=plgpu.CompilerParams(num_warps=_gate_warps(T, F), num_stages=1),
        name="jaxchunk_swiglu",
    )(gate_up)


def _swiglu_forward(gate_up: Array, interpret: bool) -> tuple[Array, Array]:
    return _swiglu(gate_up, interpret), gate_up


def _swiglu_backward(interpret: bool, gate_up: Array, cotangent: Array) -> tuple[Array]:
    return (_swiglu_gradient(gate_up, cotangent, False, interpret)[0],)


_swiglu.defvjp(_swiglu_forward, _swiglu_backward)


def _swiglu_gradient(gate_up: Array, cotangent: Array, with_product: bool, interpret: bool) -> list[Array]:
    T, _, F = gate_up.shape
    grid, pair, single = _gate_blocks(T, F)
    out = _like(gate_up)
    return pl.pallas_call(
        functools.partial(_swiglu_gradient_kernel, interpret=interpret),
        grid=grid,
        in_specs=[pair, single],
        out_specs=[pair, single][: 1 + with_product],
        out_shape=[out(gate_up.shape, gate_up.dtype), out((T, F), gate_up.dtype)][: 1 + with_product],
        interpret=interpret,
        compiler_params=plgpu.CompilerParams(num_warps=_gate_warps(T, F), num_stages=1),
        name="jaxchunk_swiglu_gradient",
    )(gate_up, cotangent)


def _swiglu_kernel(gate_up_ref, out_ref, *, interpret: bool) -> None:  # type: ignore[no-untyped-def]
    gate, up = (gate_up_ref[:, half, :].astype(jnp.float32) for half in range(2))
    out_ref[...] = (gate * _logistic(gate, interpret) * up).astype(out_ref.dtype)


def _swiglu_gradient_kernel(gate_up_ref, d_ref, out_ref, *product_refs, interpret: bool) -> None:  # type: ignore[no-untyped-def]
    gate, up = (gate_up_ref[:, half, :].astype(jnp.float32) for half in range(2))
    d, share = d_ref[...].astype(jnp.float32), _logistic(gate, interpret)
    silu = gate * share
    out_ref[:, 0, :] = (d * up * (share + silu * (1.0 - share))).astype(out_ref.dtype)
    out_ref[:, 1, :] = (d * silu).astype(out_ref.dtype)
    for product_ref in product_refs:
        product_ref[...] = (silu * up).astype(product_ref.dtype)


def _logistic(x: Array, interpret: bool) -> Array:
    return jax.nn.sigmoid(x) if interpret else sigmoid(x)


def _gate_shape(T: int, F: int) -> tuple[int, int]:
    """Rows and columns that a program has: about `_GATE_BLOCK` elements, fewer where T has few factors of two."""
    columns = min(_power_of_two_in(F), 1024)
    return min(_power_of_two_in(T), max(1, _GATE_BLOCK // columns)), columns


def _gate_blocks(T: int, F: int) -> tuple[tuple[int, int], pl.BlockSpec, pl.BlockSpec]:
    """Grid, and blocks of [T, 2, F] and of [T, F]."""
    rows, columns = _gate_shape(T, F)
    pair = pl.BlockSpec((rows, 2, columns), lambda i, j: (i, 0, j))
    return (T // rows, F // columns), pair, pl.BlockSpec((rows, columns), lambda i, j: (i, j))


def _gate_warps(T: int, F: int) -> int:
    """Two loads of 16 bytes a thread."""
    return max(1, math.prod(_gate_shape(T, F)) // 512)


def _rows_of_norm(T: int, D: int) -> int:
    return min(_power_of_two_in(T), max(1, _WARP_OF_NORM // _padded(D)))


def _padded(D: int) -> int:
    """Columns of a block that holds a row: blocks are powers of two."""
    return 1 << (D - 1).bit_length()


def _columns(rows: int, D: int) -> tuple[Array, Array]:
    """Marks what is a row's in a padded block, and in one row of it."""
    size = _padded(D)
    return jax.lax.broadcasted_iota(jnp.int32, (rows, size), 1) < D, jax.lax.iota(jnp.int32, size) < D


def _power_of_two_in(size: int) -> int:
    return size & -size


def _like(array: Array) -> Any:
    return functools.partial(jax.ShapeDtypeStruct, manual_axis_type=jax.typeof(array).manual_axis_type)
