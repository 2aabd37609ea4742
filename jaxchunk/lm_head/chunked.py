"""The chunked LM head: a `lax.scan` over token chunks that computes gradients together with the loss.

One chunk of C tokens, in the letters of the code:

    z  = x W^T                    [C, V]  logits, in the compute dtype
    dz = w * dloss(z, y)/dz       [C, V]  a row kernel, in place of z
    dx = dz W                     [C, D]
    dW = dW + dz^T x              [V, D]  fp32 carry, accumulated inside the GEMM

Three GEMMs, 6*T*D*V FLOPs: nothing is recomputed. The backward pass only multiplies by the cotangent, which under
jit is a constant 1 that folds away (`weighted_loss`). Cotangents that differ from token to token have to be there
before the sum over tokens: then the logits are computed again, 8*T*D*V (`token_losses`). Each chunk alternates
compute-bound and memory-bound work, and that alternation is what flattens a GPU's power draw. It is a `lax.scan` and
not a Python loop because XLA may reorder the iterations of the latter, which destroys both the memory bound and the
alternation.

Under `jax.shard_map` the same code runs on every device's tokens and slice of the vocabulary. Row statistics are
combined over `vocab_axes`; a gradient is summed, in its accumulation dtype, over the devices that share its operand.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_derivatives import SymbolicZero
from jax.typing import DTypeLike
from jaxtyping import Float, Int

from jaxchunk.lm_head import rows
from jaxchunk.lm_head.rows import RowOptions, RowResults, RowStatistics
from jaxchunk.lm_head.varying import summed_to, varying_axes, varying_over


class RowKernels(NamedTuple):
    """The entry points of a kernel file (`kernels/__init__.py` has their contract)."""

    statistics: Callable[..., RowStatistics]
    gradients: Callable[..., Array]
    statistics_and_gradients: Callable[..., tuple[RowStatistics, Array]]


@dataclasses.dataclass(frozen=True)
class ChunkedConfig:
    """What is fixed when the loss is traced.

    Attributes:
      chunk_rows: C, tokens in a chunk.
      row_kernels: what turns logits into statistics and gradients.
      row_options: what is done to a row.
      weighted: whether rows other than ignored ones may have weight 0.
      vocab_dim: the dimension of `weight` that is V, 0 or 1; the other one is D.
      compute_dtype: dtype of the GEMMs' operands and of the logits.
      accum_dtype: dtype of the dW carry.
      token_axes: mesh axes over which the loss is summed.
      vocab_axes: mesh axes over which the vocabulary is sliced.
    """

    chunk_rows: int
    row_kernels: RowKernels
    row_options: RowOptions
    weighted: bool
    vocab_dim: int
    compute_dtype: DTypeLike
    accum_dtype: DTypeLike
    token_axes: tuple[str, ...] = ()
    vocab_axes: tuple[str, ...] = ()


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _weighted_loss(
    config: ChunkedConfig,
    hidden: Float[Array, "T D"],
    weight: Float[Array, "V D"],
    bias: Float[Array, " V"] | None,
    labels: Int[Array, " T"],
    row_weight: Float[Array, " T"],
) -> tuple[Float[Array, ""], RowResults]:
    """`sum_t row_weight[t] * loss[t]` and the rows' results; one GEMM when not differentiated.

    The results serve the metrics. They have no gradient: the caller refuses one.

    Args:
      config: static configuration.
      hidden: x, any float dtype.
      weight: W, any float dtype, [V, D] or [D, V]; cast to the compute dtype once, before the loop.
      bias: b, or None.
      labels: y in [0, V), or -1 for a row that contributes nothing whatever its `hidden` holds.
      row_weight: w, factor on each row's loss, 1/N for a mean over N tokens.
    """
    results, _ = _results(config, hidden, weight, bias, labels, row_weight)
    return _sum_over_tokens(config, row_weight, results.loss), results


def _weighted_loss_forward(config: ChunkedConfig, *operands: Any) -> tuple[Any, Any]:
    """The loss with its gradients at cotangent 1; a GEMM is left out where its gradient is not asked for."""
    types, wanted = _types(operands), _wanted(operands)
    *_, row_weight = values = _values(operands)
    results, gradients = _gradients(config, types, wanted, *values)
    residuals = types, [_present(gradient) for gradient in (*gradients, results.loss if wanted.row_weight else None)]
    return (_sum_over_tokens(config, row_weight, results.loss), results), residuals


def _weighted_loss_backward(config: ChunkedConfig, residuals: Any, cotangents: Any) -> tuple[Any, ...]:
    del config
    cotangent, _ = cotangents
    if isinstance(cotangent, SymbolicZero):
        return None, None, None, None, None
    types, gradients = residuals
    dx, dW, db, dw = (
        type_.gradient(cotangent * gradient.astype(cotangent.dtype)) if gradient.size else None
        for type_, gradient in zip(types, gradients, strict=True)
    )
    return dx, dW, db, None, dw


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _token_losses(
    config: ChunkedConfig,
    hidden: Float[Array, "T D"],
    weight: Float[Array, "V D"],
    bias: Float[Array, " V"] | None,
    labels: Int[Array, " T"],
    row_weight: Float[Array, " T"],
) -> tuple[Float[Array, " T"], RowResults]:
    """`row_weight[t] * loss[t]` of every row and the rows' results; operands as in `weighted_loss`."""
    results, _ = _results(config, hidden, weight, bias, labels, row_weight)
    return _weighted(row_weight, results.loss), results


def _token_losses_forward(config: ChunkedConfig, *operands: Any) -> tuple[Any, Any]:
    wanted = _wanted(operands)
    *_, row_weight = values = _values(operands)
    results, statistics = _results(config, *values)
    marks = [jnp.zeros(int(is_wanted)) for is_wanted in wanted]
    residuals = _types(operands), marks, values, statistics, results.loss
    return (_weighted(row_weight, results.loss), results), residuals


def _token_losses_backward(config: ChunkedConfig, residuals: Any, cotangents: Any) -> tuple[Any, ...]:
    cotangent, _ = cotangents
    if isinstance(cotangent, SymbolicZero):
        return None, None, None, None, None
    types, marks, (hidden, weight, bias, labels, row_weight), statistics, loss = residuals
    wanted = _Wanted(*(bool(mark.size) for mark in marks))
    dw = types.row_weight.gradient(_weighted(cotangent, loss)) if wanted.row_weight else None
    row_weight = cotangent * row_weight
    labels = _live_labels(hidden, labels, row_weight)
    live = labels >= 0
    statistics = jax.tree.map(lambda field: jnp.where(live, field, 1), statistics)
    row_weight = jnp.where(live, row_weight, 0)
    _, gradients = _gradients(config, types, wanted, hidden, weight, bias, labels, row_weight, statistics)
    dx, dW, db = (
        None if gradient is None else type_.gradient(gradient)
        for type_, gradient in zip(types[:3], gradients, strict=True)
    )
    return dx, dW, db, None, dw


_weighted_loss.defvjp(_weighted_loss_forward, _weighted_loss_backward, symbolic_zeros=True)
_token_losses.defvjp(_token_losses_forward, _token_losses_backward, symbolic_zeros=True)
# Jitted here, or a call outside of jit would trace and compile its scan anew every time.
weighted_loss = jax.jit(_weighted_loss, static_argnums=0)
token_losses = jax.jit(_token_losses, static_argnums=0)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Type:
    """What the backward pass has to know of an operand to make its cotangent."""

    dtype: DTypeLike
    varying: frozenset[str]

    def gradient(self, value: Array) -> Array:
        """A gradient as the operand's cotangent: summed over the devices that share the operand, then rounded."""
        return summed_to(value, self.varying).astype(self.dtype)


class _Types(NamedTuple):
    hidden: _Type
    weight: _Type
    bias: _Type
    row_weight: _Type


class _Wanted(NamedTuple):
    """Whose gradients are asked for.

    It must not show in the structure of the residuals: JAX keeps one structure for all derivatives of a jitted program,
    and another one would fail, or end in wrong gradients. So what is missing is an array without elements.
    """

    hidden: bool
    weight: bool
    bias: bool
    row_weight: bool


def _types(operands: tuple[Any, ...]) -> _Types:
    hidden, weight, bias, _, row_weight = operands
    arrays = (hidden, weight, hidden if bias is None else bias, row_weight)
    return _Types(*(_Type(array.value.dtype, varying_axes(array.value)) for array in arrays))


def _wanted(operands: tuple[Any, ...]) -> _Wanted:
    hidden, weight, bias, _, row_weight = operands
    return _Wanted(hidden.perturbed, weight.perturbed, bias is not None and bias.perturbed, row_weight.perturbed)


def _present(gradient: Array | None) -> Array:
    return jnp.zeros(0) if gradient is None else gradient


def _values(operands: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(None if operand is None else operand.value for operand in operands)


def _results(
    config: ChunkedConfig,
    hidden: Array,
    weight: Array,
    bias: Array | None,
    labels: Array,
    row_weight: Array,
) -> tuple[RowResults, RowStatistics]:
    """Every row's results, with the statistics behind them: one GEMM and one read of the logits a chunk."""
    W = weight.astype(config.compute_dtype)
    if config.weighted:
        labels = _live_labels(hidden, labels, row_weight)

    def step(_: None, chunk: tuple[Array, Array]) -> tuple[None, tuple[RowResults, RowStatistics]]:
        x, y = chunk
        z = _logits(config, _live_rows(config, x, y), W)
        row = _whole_row(config, config.row_kernels.statistics(z, _own(config, y, W), bias, config.row_options))
        return None, (rows.results(row, config.row_options), row)

    return _scan_chunks(step, None, config.chunk_rows, hidden, labels)[1]


def _gradients(
    config: ChunkedConfig,
    types: _Types,
    wanted: _Wanted,
    hidden: Array,
    weight: Array,
    bias: Array | None,
    labels: Array,
    row_weight: Array,
    statistics: RowStatistics | None = None,
) -> tuple[RowResults, tuple[Array | None, Array | None, Array | None]]:
    """Results, and gradients of `sum_t row_weight[t] * loss[t]` for hidden, weight and bias.

    Gradients are per device, not yet summed over those that share an operand, in the dtype in which that sum is right.

    Args:
      config: static configuration.
      types: of the operands.
      wanted: a gradient that is not asked for is None and costs nothing.
      hidden: x.
      weight: W.
      bias: b, or None.
      labels: y, or -1.
      row_weight: w.
      statistics: where they are known already, of the same operands.
    """
    dx_dtype = types.hidden.dtype
    if config.vocab_axes:  # dX is still to be summed, and rounding comes last
        dx_dtype = max(jnp.dtype(dx_dtype), jnp.dtype(config.accum_dtype), key=lambda dtype: dtype.itemsize)
    W = weight.astype(config.compute_dtype)
    kernels, options = config.row_kernels, config.row_options
    if config.weighted:
        labels = _live_labels(hidden, labels, row_weight)

    def step(carry: tuple, chunk: tuple[Array, Array, Array, RowStatistics | None]) -> tuple[tuple, tuple]:
        dW, db = carry
        x, y, w, row = chunk
        x = _live_rows(config, x, y)
        z, y = _logits(config, x, W), _own(config, y, W)
        if row is None and not config.vocab_axes:
            row, dz = kernels.statistics_and_gradients(z, y, w, bias, options)
        else:  # something lies between the two passes: a sum over devices, or a cotangent
            if row is None:
                row = _whole_row(config, kernels.statistics(z, y, bias, options))
            dz = kernels.gradients(z, y, bias, rows.coefficients(row, w, options), options)
        dx = _matmul(dz, W, (1, config.vocab_dim), dx_dtype) if wanted.hidden else None
        if wanted.weight:
            pair = ((dz, x), (x, dz))[config.vocab_dim]
            dW = _added(dW, _matmul(*pair, (0, 0), config.accum_dtype))
        if wanted.bias:
            db = _added(db, jnp.sum(dz, axis=0, dtype=config.accum_dtype))
        return (dW, db), (rows.results(row, options), dx)

    carry: tuple[Array | None, ...] = (None, None)
    if config.chunk_rows < hidden.shape[0]:
        axes = varying_axes(hidden, weight, bias, labels, row_weight)
        carry = tuple(
            varying_over(jnp.zeros(shape, config.accum_dtype), axes) if is_wanted else None
            for shape, is_wanted in ((W.shape, wanted.weight), (W.shape[config.vocab_dim], wanted.bias))
        )
    (dW, db), (results, dx) = _scan_chunks(step, carry, config.chunk_rows, hidden, labels, row_weight, statistics)
    if dW is not None and types.weight.varying == varying_axes(dW):
        dW = dW.astype(types.weight.dtype)  # nothing is left to sum: kept as small as it will be
    if db is not None and options.logit_scale != 1.0:
        db = db / options.logit_scale
    return results, (dx, dW, db)


def _scan_chunks(
    step: Callable[[Any, tuple], tuple[Any, Any]], carry: Any, chunk_rows: int, *arrays: Any
) -> tuple[Any, Any]:
    """Runs `step` over chunks of rows; a tail chunk is filled up with rows of label -1 and weight 0.

    Filling up costs a copy of `hidden` (1/V of the logits' traffic); a second trace for the tail would cost a second
    set of compiled kernels. With one chunk there is no loop at all.
    """
    num_rows = arrays[0].shape[0]
    if chunk_rows >= num_rows:
        return step(carry, arrays)
    num_chunks = -(-num_rows // chunk_rows)

    def split(array: Array) -> Array:
        fill = -1 if jnp.issubdtype(array.dtype, jnp.integer) else 0
        padding = [(0, num_chunks * chunk_rows - num_rows)] + [(0, 0)] * (array.ndim - 1)
        padded = jnp.pad(array, padding, constant_values=fill) if padding[0][1] else array
        return padded.reshape(num_chunks, chunk_rows, *array.shape[1:])

    carry, outputs = lax.scan(step, carry, jax.tree.map(split, arrays))
    return carry, jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:])[:num_rows], outputs)


def _live_labels(hidden: Array, labels: Array, row_weight: Array) -> Array:
    """Rows of weight 0 drop out like ignored ones where `hidden` is not finite: a mask may cover NaN.

    The others stay: their losses are the gradients of their weights.
    """
    return jnp.where((row_weight == 0) & ~jnp.all(jnp.isfinite(hidden), axis=-1), -1, labels)


def _live_rows(config: ChunkedConfig, x: Array, y: Array) -> Array:
    """Zeroes ignored rows: 0 * NaN in the dW GEMM would poison every gradient (fully masked attention gives NaN)."""
    return jnp.where(y[:, None] >= 0, x, 0).astype(config.compute_dtype)


def _own(config: ChunkedConfig, y: Array, W: Array) -> Array:
    """Labels as columns of this device's slice of the vocabulary, -1 where they are in another's."""
    if not config.vocab_axes:
        return y
    columns = W.shape[config.vocab_dim]
    y = y - columns * lax.axis_index(config.vocab_axes)
    return jnp.where((y >= 0) & (y < columns), y, -1)


def _whole_row(config: ChunkedConfig, statistics: RowStatistics) -> RowStatistics:
    return rows.combined(statistics, config.vocab_axes) if config.vocab_axes else statistics


def _logits(config: ChunkedConfig, x: Array, W: Array) -> Array:
    return _matmul(x, W, (1, 1 - config.vocab_dim), W.dtype)


def _matmul(a: Array, b: Array, contract: tuple[int, int], out_dtype: DTypeLike) -> Array:
    """GEMM with fp32 accumulation; fp32 operands are never rounded to TF32."""
    exact = lax.Precision.HIGHEST if a.dtype.itemsize >= 4 else None
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    return lax.dot_general(a, b, dimensions, precision=exact, preferred_element_type=out_dtype)


def _added(total: Array | None, update: Array) -> Array:
    return update if total is None else total + update


def _weighted(row_weight: Array, loss: Array) -> Array:
    return jnp.where(row_weight == 0, 0, row_weight * loss)


def _sum_over_tokens(config: ChunkedConfig, row_weight: Array, loss: Array) -> Array:
    total = jnp.sum(_weighted(row_weight, loss))
    return lax.psum(total, config.token_axes) if config.token_axes else total
