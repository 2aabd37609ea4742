"""The fused LM head: exponentials are taken in the epilogue of the logits' GEMM, relative to the label's own logit.

Softmax needs an offset per row so that exp does not overflow. A cross-entropy row has one that is known before the
GEMM: its label's logit, one dot product of length D. One chunk of C tokens:

    z_y = <x, W[y]>                           [C]     float32
    E   = exp(x W^T - z_y - c)                [C, V]  from the GEMM's float32 accumulators; 0 in the label's column
    n   = sum_j E_j                           [C]     in the same epilogue, before E is rounded
    s   = n + e^-c,  f = w / s,  h = -w n/s   [C]     `offset_rows.py`
    dx  = f * (E W) + h * W[y]                [C, D]
    dW  = dW + E^T (f * x)                    [V, D]  fp32 carry, accumulated inside the GEMM

and after the loop dW[y] += h * x for all tokens. Logits are not stored and their gradients do not exist: E is written
once and read twice. c = 40 serves rows whose loss is up to 90 nats; a chunk in which one has more has its exponentials
computed again, that row's relative to a higher offset.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from jaxchunk.lm_head import offset_rows, rows
from jaxchunk.lm_head.chunks import added, live_labels, live_rows, matmul, own_labels, scan_chunks
from jaxchunk.lm_head.differentiation import Types, Wanted
from jaxchunk.lm_head.kernels import Exponentials
from jaxchunk.lm_head.label_rows import add_label_rows
from jaxchunk.lm_head.offset_rows import COMMON_RISE, LARGEST_SUM, OVERFLOW_RISE, OffsetStatistics
from jaxchunk.lm_head.rows import RowOptions, RowResults
from jaxchunk.lm_head.varying import varying_axes, varying_over


@dataclasses.dataclass(frozen=True)
class LabelOffsetConfig:
    """What is fixed when the loss is traced.

    Attributes:
      chunk_rows: C, tokens in a chunk.
      exponentials: the kernel (`kernels/__init__.py` has its contract).
      row_options: what is done to a row.
      weighted: whether rows other than ignored ones may have weight 0.
      compute_dtype: dtype of the GEMMs' operands and of E.
      accum_dtype: dtype of the dW carry.
      token_axes: mesh axes over which the loss is summed.
      vocab_axes: mesh axes over which the vocabulary is sliced.
    """

    chunk_rows: int
    exponentials: Callable[..., Exponentials]
    row_options: RowOptions
    weighted: bool
    compute_dtype: DTypeLike
    accum_dtype: DTypeLike
    token_axes: tuple[str, ...] = ()
    vocab_axes: tuple[str, ...] = ()

    def results(self, *operands: Any) -> tuple[RowResults, OffsetStatistics]:
        """As `LossConfig` says."""
        return _results(self, *operands)

    def gradients(
        self, types: Types, wanted: Wanted, *operands_and_statistics: Any
    ) -> tuple[RowResults, tuple[Array | None, Array | None, Array | None]]:
        """As `LossConfig` says."""
        return _gradients(self, types, wanted, *operands_and_statistics)


def _results(
    config: LabelOffsetConfig, hidden: Array, weight: Array, bias: Array | None, labels: Array, row_weight: Array
) -> tuple[RowResults, OffsetStatistics]:
    """Every row's results, with the statistics behind them: one GEMM a chunk, whose E is not read."""
    W = weight.astype(config.compute_dtype)
    z_mean_of = _mean_logits(config, W, bias)
    if config.weighted:
        labels = live_labels(hidden, labels, row_weight)

    def step(_: None, chunk: tuple[Array, Array]) -> tuple[None, tuple[RowResults, OffsetStatistics]]:
        x, y = chunk
        x = live_rows(x, y, config.compute_dtype)
        own = own_labels(y, W.shape[0], config.vocab_axes)
        z_y = _label_logits(config, x, W[own], bias, own)[0]
        row = _exponentials(config, x, W, bias, y, own, z_y, z_mean_of(x))[1]
        return None, (offset_rows.results(row, config.row_options), row)

    return scan_chunks(step, None, config.chunk_rows, hidden, labels)[1]


def _gradients(
    config: LabelOffsetConfig,
    types: Types,
    wanted: Wanted,
    hidden: Array,
    weight: Array,
    bias: Array | None,
    labels: Array,
    row_weight: Array,
    statistics: OffsetStatistics | None = None,
) -> tuple[RowResults, tuple[Array | None, Array | None, Array | None]]:
    """Results, and gradients of `sum_t row_weight[t] * loss[t]`, as `LossConfig` says."""
    options, vocab_axes, dtype = config.row_options, config.vocab_axes, config.compute_dtype
    dx_dtype = types.hidden.dtype
    if vocab_axes:  # dX is still to be summed, and rounding comes last
        dx_dtype = max(jnp.dtype(dx_dtype), jnp.dtype(config.accum_dtype), key=lambda dtype: dtype.itemsize)
    W = weight.astype(dtype)
    z_mean_of = _mean_logits(config, W, bias)
    W_sum = jnp.sum(W, axis=0, dtype=config.accum_dtype) if options.label_smoothing else None
    if config.weighted:
        labels = live_labels(hidden, labels, row_weight)

    def step(carry: tuple, chunk: tuple[Array, Array, Array, OffsetStatistics | None]) -> tuple[tuple, tuple]:
        dW, db = carry
        x, y, w, row = chunk
        x, own = live_rows(x, y, dtype), own_labels(y, W.shape[0], vocab_axes)
        W_y = W[own]
        z_y, slope = _label_logits(config, x, W_y, bias, own)
        E, row = _exponentials(config, x, W, bias, y, own, z_y, z_mean_of(x), row)
        f, h, u = offset_rows.coefficients(row, w, options)
        h = jnp.where(own >= 0, h if slope is None else h * slope, 0)
        dx = None
        if wanted.hidden:
            dx = f[:, None] * matmul(E, W, (1, 0), f.dtype) + h[:, None] * W_y.astype(f.dtype)
            dx = (dx if W_sum is None or u is None else dx - u[:, None] * W_sum[None]).astype(dx_dtype)
        if wanted.weight:
            fx = jnp.where(y[:, None] >= 0, f[:, None] * x.astype(f.dtype), 0).astype(dtype)
            dW = added(dW, matmul(E, fx, (0, 0), config.accum_dtype))
        if wanted.bias:
            db = added(db, jnp.sum(E.astype(f.dtype) * f[:, None], axis=0, dtype=config.accum_dtype))
        return (dW, db), (offset_rows.results(row, options), dx, h, u)

    carry: tuple[Array | None, ...] = (None, None)
    if config.chunk_rows < hidden.shape[0]:
        axes = varying_axes(hidden, weight, bias, labels, row_weight)
        carry = tuple(
            varying_over(jnp.zeros(shape, config.accum_dtype), axes) if is_wanted else None
            for shape, is_wanted in ((W.shape, wanted.weight), (W.shape[:1], wanted.bias))
        )
    operands = hidden, labels, row_weight, statistics
    (dW, db), (results, dx, h, u) = scan_chunks(step, carry, config.chunk_rows, *operands)
    own, x = own_labels(labels, W.shape[0], vocab_axes), live_rows(hidden, labels, dtype)
    if dW is not None:
        dW = add_label_rows(dW, own, h, x)
        if u is not None:
            dW = dW - jnp.sum(u[:, None] * x.astype(u.dtype), axis=0)[None]
        if types.weight.varying == varying_axes(dW):
            dW = dW.astype(types.weight.dtype)  # nothing is left to sum: kept as small as it will be
    if db is not None:
        db = add_label_rows(db[:, None], own, h, jnp.ones_like(h)[:, None])[:, 0]
        db = (db if u is None else db - jnp.sum(u)) / options.logit_scale
    return results, (dx, dW, db)


def _exponentials(
    config: LabelOffsetConfig,
    x: Array,
    W: Array,
    bias: Array | None,
    y: Array,
    own: Array,
    z_y: Array,
    z_mean: Array | None,
    row: OffsetStatistics | None = None,
) -> tuple[Array, OffsetStatistics]:
    """E of a chunk with the statistics of its rows; taken as they are where they are known."""

    def at(excess: Array, options: RowOptions) -> tuple[Array, Exponentials]:
        offset, excess = offset_rows.offset_and_excess(z_y, excess)
        E, n, largest, moment = config.exponentials(x, W, jnp.where(y >= 0, offset, jnp.inf), own, bias, options)
        if config.vocab_axes:
            if largest is not None and moment is not None:
                own_largest, largest = largest, lax.pmax(largest, config.vocab_axes)
                moment = moment + jnp.where(n > 0, n * (own_largest - largest), 0)
            n, moment = lax.psum((n, moment), config.vocab_axes)
        return excess, Exponentials(E, n, largest, moment)

    options = config.row_options
    if row is not None:
        return at(row.excess, options)[1].E, row
    excess, first = at(jnp.zeros_like(z_y), options)
    if first.largest is None:  # log n will do where n has not overflowed, and else a step to where maxima are taken
        rise = jnp.where(jnp.isinf(first.n), OVERFLOW_RISE, jnp.log(first.n))
        first = first._replace(largest=COMMON_RISE + rise)

    # A loop that hardly ever turns, where a `cond` would copy E on the way that is always taken.
    def again(state: tuple[Array, Exponentials]) -> tuple[Array, Exponentials]:
        excess, (_, n, largest, moment) = state
        assert largest is not None
        rise = jnp.where(n > LARGEST_SUM, largest - COMMON_RISE, 0)
        excess, new = at(excess + rise, dataclasses.replace(options, metrics=True))
        return excess, new if moment is not None else new._replace(moment=None)

    excess, (E, n, largest, moment) = lax.while_loop(
        lambda state: jnp.any(state[1].n > LARGEST_SUM), again, (excess, first)
    )
    assert largest is not None
    return E, OffsetStatistics(excess, n, z_y, z_mean, largest if options.metrics else None, moment)


def _label_logits(
    config: LabelOffsetConfig, x: Array, W_y: Array, bias: Array | None, own: Array
) -> tuple[Array, Array | None]:
    """Logits of the labels, with the softcap's slope there; 0 in ignored rows."""
    dtype = rows.statistics_dtype(x.dtype)
    raw = jnp.sum(x.astype(dtype) * W_y.astype(dtype), axis=1)
    b = None if bias is None else jnp.where(own >= 0, bias[own].astype(dtype), 0)
    raw = jnp.where(own >= 0, raw, 0)
    if config.vocab_axes:
        raw, b = lax.psum((raw, b), config.vocab_axes)
    return rows.transformed(raw, b, config.row_options, rows.EXACT)


def _mean_logits(config: LabelOffsetConfig, W: Array, bias: Array | None) -> Callable[[Array], Array | None]:
    """The mean of a row's logits as a function of x, with label smoothing: <x, mean of W's rows>."""
    options = config.row_options
    if not options.label_smoothing:
        return lambda x: None
    dtype = rows.statistics_dtype(config.compute_dtype)
    W_mean = jnp.sum(W, axis=0, dtype=dtype) * (options.logit_scale / options.vocab_size)
    b_mean = None if bias is None else jnp.sum(bias, dtype=dtype) / options.vocab_size
    if config.vocab_axes:
        W_mean, b_mean = lax.psum((W_mean, b_mean), config.vocab_axes)
    return lambda x: added(b_mean, jnp.sum(x.astype(dtype) * W_mean[None], axis=1))
