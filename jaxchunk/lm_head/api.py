"""The public loss: validates at the border, settles masks and the denominator, and hands over to an implementation."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Float, Int

from jaxchunk.lm_head import chunked, dispatch, reference

_logger = logging.getLogger("jaxchunk")


def lm_head_loss(
    hidden: Float[Array, "*batch D"],
    weight: Float[Array, "V D"],
    labels: Int[Array, "*batch"],
    *,
    num_chunks: int = 1,
    implementation: str | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    normalizer: ArrayLike | None = None,
    compute_dtype: DTypeLike | None = None,
    accum_dtype: DTypeLike = jnp.float32,
) -> Float[Array, ""]:
    """Softmax cross-entropy of an LM head, `logits = hidden @ weight.T`, computed in token chunks.

    The tokens are split into `num_chunks` chunks that a `lax.scan` runs one after the other: logits of one chunk, loss
    and logit gradients in their place, both gradient GEMMs. At most T / num_chunks x V logits exist at a time, and
    compute-bound and memory-bound work alternate `num_chunks` times. Gradients are computed together with the loss
    (6*T*D*V FLOPs, nothing recomputed); without differentiation only the loss is computed (2*T*D*V), and a `hidden` or
    `weight` that is not differentiated costs no GEMM of its own.

    Dtypes: statistics and loss are float32 (float64 for float64 operands), dW is accumulated in `accum_dtype`, and
    each gradient has the dtype of its primal. So pass the float32 master `weight` and let the loss cast it once.
    float32 operands are multiplied in full float32, never TF32.

    Autodiff: reverse mode only. Inside `jax.checkpoint` the three GEMMs run again; with gradient accumulation take the
    gradient inside the loop over micro-batches, or every micro-batch's dW is kept. `vmap` works and multiplies the
    memory: leading dimensions of `hidden` are cheaper.

    Args:
      hidden: final hidden states, float, any number of leading dimensions. T is their product.
      weight: the vocabulary matrix, float. V need not be divisible by anything.
      labels: target ids in [0, V), or `ignore_index`. Other values are an error where they are concrete; in a jitted
        program they make the loss NaN.
      num_chunks: at least 1; need not divide T (chunks have ceil(T / num_chunks) tokens).
      implementation: "xla" (any device), "pallas" (NVIDIA GPU), "reference" (unchunked, float32, gradients by autodiff;
        ignores `num_chunks` and the dtypes), "pallas_interpret" (the Pallas kernel interpreted, slow, for tests), or
        None: "pallas" on an NVIDIA GPU, "xla" elsewhere. A named implementation never falls back to another.
      ignore_index: tokens with this label contribute nothing, whatever their `hidden` holds.
      reduction: "mean" or "sum" over the tokens that are not ignored.
      normalizer: for "mean", what the sum is divided by in place of this call's count of valid tokens. With gradient
        accumulation or data parallelism pass the count over the whole batch. May be traced.
      compute_dtype: dtype of the GEMM operands and of the logits; None for `hidden`'s.
      accum_dtype: dtype in which dW is accumulated over chunks.

    Returns:
      The loss, a scalar of float32 (float64 for float64 operands); 0 when every token is ignored.

    Raises:
      TypeError: an operand has the wrong kind of dtype.
      ValueError: shapes do not match, an option is out of its domain, concrete labels are outside [0, V), or the named
        implementation cannot run here.

    Reference: "One Simple Trick for Improving the Performance of Energy-Limited Local Inference and Training",
    section 3.1 (the chunking); `lm_head/rows.py` has the arithmetic of a row.
    """
    hidden, weight, labels = jnp.asarray(hidden), jnp.asarray(weight), _as_labels(labels)
    compute_dtype = jnp.dtype(hidden.dtype if compute_dtype is None else compute_dtype)
    _check_operands(hidden, weight, labels)
    _check_dtypes(compute_dtype, jnp.dtype(accum_dtype))
    _check_options(num_chunks, reduction, normalizer)
    vocab_size, num_tokens = weight.shape[0], labels.size
    _check_concrete_labels(labels, vocab_size, ignore_index)
    choice = dispatch.choose_implementation(implementation, compute_dtype=compute_dtype)

    labels = labels.reshape(num_tokens).astype(jnp.int32)
    hidden = hidden.reshape(num_tokens, hidden.shape[-1])
    if num_tokens == 0:  # one ignored token, so that no implementation meets an empty grid
        num_tokens, labels, hidden = 1, jnp.full(1, ignore_index, jnp.int32), jnp.pad(hidden, ((0, 1), (0, 0)))
    row_labels, row_weight = _rows(labels, vocab_size, ignore_index, reduction, normalizer)
    chunk_rows = _chunk_rows(num_tokens, num_chunks)
    dispatch.log_choice(choice, chunk_rows, -(-num_tokens // chunk_rows))
    if choice.implementation == "reference":
        return reference.weighted_loss(hidden, weight, row_labels, row_weight)
    config = chunked.ChunkedConfig(
        chunk_rows=chunk_rows,
        row_kernels=dispatch.row_kernels(choice.implementation),
        compute_dtype=compute_dtype,
        accum_dtype=jnp.dtype(accum_dtype),
    )
    return chunked.weighted_loss(config, hidden, weight, row_labels, row_weight)


def _rows(
    labels: Array, vocab_size: int, ignore_index: int, reduction: str, normalizer: ArrayLike | None
) -> tuple[Int[Array, " T"], Float[Array, " T"]]:
    """Every row's label, -1 where it is ignored, and its weight in the sum, NaN where the label is out of range."""
    valid = labels != ignore_index
    in_range = (labels >= 0) & (labels < vocab_size)
    if reduction == "sum":
        scale = jnp.float32(1.0)
    else:
        count = jnp.sum(valid) if normalizer is None else jnp.asarray(normalizer)
        count = count.astype(jnp.float32)
        scale = jnp.where(count == 0, 0.0, 1.0 / jnp.where(count == 0, 1.0, count))
    row_labels = jnp.where(valid, jnp.where(in_range, labels, 0), -1)
    row_weight = jnp.where(valid, jnp.where(in_range, scale, jnp.nan), 0.0)
    return row_labels, row_weight


def _chunk_rows(num_tokens: int, num_chunks: int) -> int:
    if num_chunks > num_tokens:
        _logger.warning("num_chunks=%d for %d tokens: using %d", num_chunks, num_tokens, num_tokens)
    return -(-num_tokens // num_chunks)


def _as_labels(labels: ArrayLike) -> Array:
    """Labels as a JAX array, refusing what JAX would narrow in silence (int64 to int32)."""
    if isinstance(labels, np.ndarray) and labels.size and np.issubdtype(labels.dtype, np.integer):
        low, high, int32 = labels.min(), labels.max(), np.iinfo(np.int32)
        if low < int32.min or high > int32.max:
            raise ValueError(f"labels have values in [{low}, {high}]; they must fit in int32")
    return jnp.asarray(labels)


def _check_operands(hidden: Array, weight: Array, labels: Array) -> None:
    for name, array in (("hidden", hidden), ("weight", weight)):
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise TypeError(f"{name} has dtype {array.dtype}; it must be floating point")
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise TypeError(f"labels have dtype {labels.dtype}; they must be integer token ids")
    if hidden.ndim < 1 or weight.ndim != 2:
        raise ValueError(f"hidden has shape {hidden.shape} and weight {weight.shape}; they must be [..., D] and [V, D]")
    if hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"hidden has shape {hidden.shape} and weight {weight.shape}: the last dimensions must be equal "
            "(weight is [V, D], one row for each vocabulary entry)"
        )
    if labels.shape != hidden.shape[:-1]:
        raise ValueError(
            f"labels have shape {labels.shape}; for hidden {hidden.shape} they must be {hidden.shape[:-1]}"
        )
    if weight.shape[0] < 1:
        raise ValueError(f"weight has shape {weight.shape}; the vocabulary must have at least one entry")


def _check_dtypes(compute_dtype: jnp.dtype, accum_dtype: jnp.dtype) -> None:
    if compute_dtype not in (jnp.bfloat16, jnp.float32, jnp.float64):
        raise TypeError(
            f"the compute dtype is {compute_dtype}; it must be bfloat16, float32 or float64 "
            "(float16 gradients of a mean underflow: pass compute_dtype=jnp.bfloat16)"
        )
    if not jnp.issubdtype(accum_dtype, jnp.floating):
        raise TypeError(f"accum_dtype is {accum_dtype}; it must be floating point")


def _check_options(num_chunks: int, reduction: str, normalizer: ArrayLike | None) -> None:
    if isinstance(num_chunks, bool) or not isinstance(num_chunks, int | np.integer):
        raise TypeError(f"num_chunks is {num_chunks!r}; it must be a Python int (it shapes the program)")
    if num_chunks < 1:
        raise ValueError(f"num_chunks is {num_chunks}; it must be at least 1")
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction is {reduction!r}; it must be 'mean' or 'sum'")
    if normalizer is not None:
        if reduction != "mean":
            raise ValueError(f"normalizer is given with reduction={reduction!r}; it belongs to 'mean'")
        if jnp.ndim(normalizer) != 0:
            raise ValueError(f"normalizer has shape {jnp.shape(normalizer)}; it must be a scalar")
        if not isinstance(normalizer, jax.core.Tracer) and not np.asarray(normalizer) >= 0:
            raise ValueError(f"normalizer is {normalizer}; it must not be negative")


def _check_concrete_labels(labels: Array, vocab_size: int, ignore_index: int) -> None:
    """Under jit the values are unknown here; such labels turn the loss into NaN instead (`_rows`)."""
    if isinstance(labels, jax.core.Tracer) or not labels.is_fully_addressable:
        return
    values = np.asarray(labels)
    bad = values[(values != ignore_index) & ((values < 0) | (values >= vocab_size))]
    if bad.size:
        raise ValueError(
            f"labels hold {bad.size} values outside [0, {vocab_size}), the first is {bad.flat[0]}; "
            f"mark tokens to leave out with ignore_index ({ignore_index})"
        )
