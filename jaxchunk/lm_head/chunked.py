"""The chunked LM head: a `lax.scan` over token chunks that computes gradients together with the loss.

One chunk of C tokens, in the letters of the code:

    z  = x W^T                    [C, V]  logits, in the compute dtype
    dz = w * dloss(z, y)/dz       [C, V]  a row kernel, in place of z
    dx = dz W                     [C, D]
    dW = dW + dz^T x              [V, D]  fp32 carry, accumulated inside the GEMM

Three GEMMs, 6*T*D*V FLOPs: nothing is recomputed (`differentiation.py` has the derivative). Each chunk alternates
compute-bound and memory-bound work, and that alternation is what flattens a GPU's power draw. It is a `lax.scan` and
not a Python loop because XLA may reorder the iterations of the latter, which destroys both the memory bound and the
alternation.

Under `jax.shard_map` the same code runs on every device's tokens and slice of the vocabulary. Row statistics are
combined over `vocab_axes`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from jaxchunk.lm_head import rows
from jaxchunk.lm_head.chunks import added, live_labels, live_rows, matmul, own_labels, scan_chunks
from jaxchunk.lm_head.differentiation import Types, Wanted
from jaxchunk.lm_head.rows import RowOptions, RowResults, RowStatistics
from jaxchunk.lm_head.varying import varying_axes, varying_over


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

    def results(self, *operands: Any) -> tuple[RowResults, RowStatistics]:
        """As `LossConfig` says."""
        return _results(self, *operands)

    def gradients(
        self, types: Types, wanted: Wanted, *operands_and_statistics: Any
    ) -> tuple[RowResults, tuple[Array | None, Array | None, Array | None]]:
        """As `LossConfig` says."""
        return _gradients(self, types, wanted, *operands_and_statistics)


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
        labels = live_labels(hidden, labels, row_weight)

    def step(_: None, chunk: tuple[Array, Array]) -> tuple[None, tuple[RowResults, RowStatistics]]:
        x, y = chunk
        z = _logits(config, live_rows(x, y, config.compute_dtype), W)
        row = _whole_row(config, config.row_kernels.statistics(z, _own(config, y, W), bias, config.row_options))
        return None, (rows.results(row, config.row_options), row)

    return scan_chunks(step, None, config.chunk_rows, hidden, labels)[1]


def _gradients(
    config: ChunkedConfig,
    types: Types,
    wanted: Wanted,
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
    dx_dtype = types.hidden.dtype_per_device(config.accum_dtype, config.vocab_axes)
    W = weight.astype(config.compute_dtype)
    kernels, options = config.row_kernels, config.row_options
    if config.weighted:
        labels = live_labels(hidden, labels, row_weight)

    def step(carry: tuple, chunk: tuple[Array, Array, Array, RowStatistics | None]) -> tuple[tuple, tuple]:
        dW, db = carry
        x, y, w, row = chunk
        x = live_rows(x, y, config.compute_dtype)
        z, y = _logits(config, x, W), _own(config, y, W)
        if row is None and not config.vocab_axes:
            row, dz = kernels.statistics_and_gradients(z, y, w, bias, options)
        else:  # something lies between the two passes: a sum over devices, or a cotangent
            if row is None:
                row = _whole_row(config, kernels.statistics(z, y, bias, options))
            dz = kernels.gradients(z, y, bias, rows.coefficients(row, w, options), options)
        dx = matmul(dz, W, (1, config.vocab_dim), dx_dtype) if wanted.hidden else None
        if wanted.weight:
            pair = ((dz, x), (x, dz))[config.vocab_dim]
            dW = added(dW, matmul(*pair, (0, 0), config.accum_dtype))
        if wanted.bias:
            db = added(db, jnp.sum(dz, axis=0, dtype=config.accum_dtype))
        return (dW, db), (rows.results(row, options), dx)

    carry: tuple[Array | None, ...] = (None, None)
    if config.chunk_rows < hidden.shape[0]:
        axes = varying_axes(hidden, weight, bias, labels, row_weight)
        carry = tuple(
            varying_over(jnp.zeros(shape, config.accum_dtype), axes) if is_wanted else None
            for shape, is_wanted in ((W.shape, wanted.weight), (W.shape[config.vocab_dim], wanted.bias))
        )
    (dW, db), (results, dx) = scan_chunks(step, carry, config.chunk_rows, hidden, labels, row_weight, statistics)
    if dW is not None:
        dW = types.weight.shrunk(dW)
    if db is not None and options.logit_scale != 1.0:
        db = db / options.logit_scale
    return results, (dx, dW, db)


def _own(config: ChunkedConfig, y: Array, W: Array) -> Array:
    return own_labels(y, W.shape[config.vocab_dim], config.vocab_axes)


def _whole_row(config: ChunkedConfig, statistics: RowStatistics) -> RowStatistics:
    return rows.combined(statistics, config.vocab_axes) if config.vocab_axes else statistics


def _logits(config: ChunkedConfig, x: Array, W: Array) -> Array:
    return matmul(x, W, (1, 1 - config.vocab_dim), W.dtype)
