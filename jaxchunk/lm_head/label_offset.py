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
once and read twice, and only where there are gradients: the loss alone is in n, and stores nothing of the size of
logits. c = 40 serves rows whose loss is up to 90 nats. Rows with more are set aside and gone through after the loop,
relative to their largest logits; whether there are any is asked once, for all chunks.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from jaxchunk.lm_head import offset_rows, rows
from jaxchunk.lm_head.chunks import added, live_labels, live_rows, matmul, own_labels, scan_chunks
from jaxchunk.lm_head.differentiation import Types, Wanted
from jaxchunk.lm_head.kernels import Exponentials
from jaxchunk.lm_head.label_rows import add_label_rows
from jaxchunk.lm_head.offset_rows import COMMON_RISE, LARGEST_SUM, OffsetStatistics
from jaxchunk.lm_head.rows import RowOptions, RowResults

_ROWS_SET_ASIDE = 1024  # at most so many are gone through at a time


@dataclasses.dataclass(frozen=True)
class LabelOffsetConfig:
    """What is fixed when the loss is traced.

    Attributes:
      chunk_rows: C, tokens in a chunk.
      exponentials: the kernel (`kernels/__init__.py` has its contract).
      add_label_rows: adds rows to those of their labels in dW (`label_rows.py`).
      row_options: what is done to a row.
      weighted: whether rows other than ignored ones may have weight 0.
      compute_dtype: dtype of the GEMMs' operands and of E.
      accum_dtype: dtype of the dW carry.
      token_axes: mesh axes over which the loss is summed.
      vocab_axes: mesh axes over which the vocabulary is sliced.
    """

    chunk_rows: int
    exponentials: Callable[..., Exponentials]
    add_label_rows: Callable[..., Array]
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
    """Every row's results, with the statistics behind them: one GEMM a chunk, of which no E is stored."""
    W = weight.astype(config.compute_dtype)
    z_mean_of = _mean_logits(config, W, bias)
    if config.weighted:
        labels = live_labels(hidden, labels, row_weight)

    def step(carry: None, chunk: tuple[Array, Array], *, far: bool = False) -> tuple[None, tuple[Any, Array]]:
        x, y = chunk
        x = live_rows(x, y, config.compute_dtype)
        own = own_labels(y, W.shape[0], config.vocab_axes)
        z_y = _label_logits(config, x, W[own], bias, own)[0]
        _, row, is_far = _exponentials(config, x, W, bias, y, own, z_y, z_mean_of(x), far=far, store=False)
        return carry, ((offset_rows.results(row, config.row_options), row), is_far)

    outputs, is_far = scan_chunks(step, None, config.chunk_rows, hidden, labels)[1]
    results, row = _with_far_rows(step, None, outputs, is_far, config, hidden, labels)[1]
    return _counted(results, is_far, config), row


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
    dx_dtype = types.hidden.dtype_per_device(config.accum_dtype, vocab_axes)
    W = weight.astype(dtype)
    z_mean_of = _mean_logits(config, W, bias)
    W_sum = jnp.sum(W, axis=0, dtype=config.accum_dtype) if options.label_smoothing else None
    if config.weighted:
        labels = live_labels(hidden, labels, row_weight)

    def step(
        carry: tuple | None, chunk: tuple[Array, Array, Array, OffsetStatistics | None], *, far: bool = False
    ) -> tuple[tuple, tuple[Any, Array]]:
        dW, db = carry or (None, None)
        x, y, w, row = chunk
        x, own = live_rows(x, y, dtype), own_labels(y, W.shape[0], vocab_axes)
        W_y = W[own]
        z_y, slope = _label_logits(config, x, W_y, bias, own)
        E, row, is_far = _exponentials(config, x, W, bias, y, own, z_y, z_mean_of(x), row, far=far, store=True)
        assert E is not None
        f, h, u = offset_rows.coefficients(row, jnp.where(is_far, 0, w), options)
        h = jnp.where(own >= 0, h if slope is None else h * slope, 0)
        dx = None
        if wanted.hidden:
            dx = f[:, None] * matmul(E, W, (1, 0), f.dtype) + h[:, None] * W_y.astype(f.dtype)
            dx = dx if W_sum is None or u is None else dx - u[:, None] * W_sum[None]
            dx = jnp.where(is_far[:, None], 0, dx).astype(dx_dtype)  # 0 times a product that may have overflowed
        if wanted.weight:
            fx = jnp.where(y[:, None] >= 0, f[:, None] * x.astype(f.dtype), 0).astype(dtype)
            dW = added(dW, matmul(E, fx, (0, 0), config.accum_dtype))
        if wanted.bias:
            db = added(db, jnp.sum(E.astype(f.dtype) * f[:, None], axis=0, dtype=config.accum_dtype))
        return (dW, db), ((offset_rows.results(row, options), dx, h, u), is_far)

    operands = hidden, labels, row_weight, statistics
    carry, (outputs, is_far) = scan_chunks(step, None, config.chunk_rows, *operands, first_ahead=True)
    if statistics is None:
        carry, outputs = _with_far_rows(step, carry, outputs, is_far, config, *operands)
    (dW, db), (results, dx, h, u) = carry, outputs
    own, x = own_labels(labels, W.shape[0], vocab_axes), live_rows(hidden, labels, dtype)
    if dW is not None:
        dW = config.add_label_rows(dW, own, h, x)
        if u is not None:
            dW = dW - jnp.sum(u[:, None] * x.astype(u.dtype), axis=0)[None]
        dW = types.weight.shrunk(dW)
    if db is not None:
        db = add_label_rows(db[:, None], own, h, jnp.ones_like(h)[:, None])[:, 0]
        db = (db if u is None else db - jnp.sum(u)) / options.logit_scale
    return _counted(results, is_far, config), (dx, dW, db)


def _with_far_rows(
    step: Callable[..., tuple[Any, tuple[Any, Array]]],
    carry: Any,
    outputs: Any,
    is_far: Array,
    config: LabelOffsetConfig,
    *operands: Any,
) -> tuple[Any, Any]:
    """Carry and outputs when `step` has gone through the rows that were set aside, a block of them at a time.

    A loop that hardly ever turns. It holds dW like the one over chunks, where a `cond` would copy it.
    """
    num_rows, block = is_far.size, min(_ROWS_SET_ASIDE, config.chunk_rows)

    def gathered(array: Array, at: Array) -> Array:
        fill = -1 if jnp.issubdtype(array.dtype, jnp.integer) else 0
        return array.at[at].get(mode="fill", fill_value=fill)

    def again(state: tuple[Any, Any, Array]) -> tuple[Any, Any, Array]:
        carry, outputs, left = state
        (at,) = jnp.nonzero(left, size=block, fill_value=num_rows)
        carry, (found, _) = step(carry, jax.tree.map(lambda array: gathered(array, at), operands), far=True)
        outputs = jax.tree.map(lambda whole, part: whole.at[at].set(part, mode="drop"), outputs, found)
        return carry, outputs, left.at[at].set(False, mode="drop")

    carry, outputs, _ = lax.while_loop(lambda state: jnp.any(state[2]), again, (carry, outputs, is_far))
    return carry, outputs


def _counted(results: RowResults, is_far: Array, config: LabelOffsetConfig) -> RowResults:
    return results._replace(taken_twice=is_far) if config.row_options.metrics else results


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
    *,
    far: bool,
    store: bool,
) -> tuple[Array | None, OffsetStatistics, Array]:
    """E of a chunk, the statistics of its rows (as they are where they are known), and which rows are to be set aside.

    Without `store` there is no E. Rows that are set aside have finite entries in it, and an n that is as good as any.
    With `far` there are none: every row is relative to its largest logit.
    """

    def at(excess: Array, options: RowOptions, *, store: bool) -> tuple[Array, Exponentials]:
        offset, excess = offset_rows.offset_and_excess(z_y, excess)
        offset = jnp.where(y >= 0, offset, jnp.inf)
        E, n, largest, moment = config.exponentials(x, W, offset, own, bias, options, store=store)
        if config.vocab_axes:
            if largest is not None:
                own_largest, largest = largest, lax.pmax(largest, config.vocab_axes)
                if moment is not None:
                    moment = moment + jnp.where(n > 0, n * (own_largest - largest), 0)
            n, moment = lax.psum((n, moment), config.vocab_axes)
        return excess, Exponentials(E, n, largest, moment)

    options, excess, none = config.row_options, jnp.zeros_like(z_y), jnp.zeros(y.shape, bool)
    if row is not None:
        return at(row.excess, options, store=store)[1].E, row, none
    if far:
        excess, first = at(excess, dataclasses.replace(options, metrics=True), store=False)
        assert first.largest is not None
        excess = jnp.where(y >= 0, excess + (first.largest - COMMON_RISE), 0)
    excess, (E, n, largest, moment) = at(excess, options, store=store)
    is_far = none if far else n > LARGEST_SUM
    n = jnp.where(is_far, 1, n)
    return E, OffsetStatistics(excess, n, z_y, z_mean, largest, moment), is_far


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
