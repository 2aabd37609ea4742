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

    Autodiff: reverse mode only, and first derivatives ("xla" has second ones, the Pallas kernel has not). Inside
    `jax.checkpoint` the three GEMMs run again; with gradient accumulation take the gradient inside the loop over
    micro-batches, or every micro-batch's dW is kept. `vmap` works and multiplies the memory: leading dimensions of
    `hidden` are cheaper. With operands sharded over an Auto mesh use "xla"; inside `jax.shard_map` and over Explicit
    mesh axes the loss is not supported yet.

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
      accum_dtype: dtype in which dW is accumulated over chunks (float64 for float64 operands in any case).

    Returns:
      The loss, a scalar of float32 (float64 for float64 operands); 0 when every token is ignored.

    Raises:
      TypeError: an operand has the wrong kind of dtype.
      ValueError: shapes do not match, an option is out of its domain, concrete labels are outside [0, V), or the named
        implementation cannot run here.

    Reference: "One Simple Trick for Improving the Performance of Energy-Limited Local Inference and Training",
    section 3.1 (the chunking); `lm_head/rows.py` has the arithmetic of a row.
    """
    _check_label_values(labels, weight, ignore_index)
    hidden, weight, labels = jnp.asarray(hidden), jnp.asarray(weight), jnp.asarray(labels)
    compute_dtype = jnp.dtype(hidden.dtype if compute_dtype is None else compute_dtype)
    _check_operands(hidden, weight, labels)
    _check_dtypes(compute_dtype, jnp.dtype(accum_dtype))
    _check_options(num_chunks, reduction, normalizer)
    vocab_size, num_tokens = weight.shape[0], labels.size
    choice = dispatch.choose_implementation(implementation, compute_dtype=compute_dtype)

    labels = labels.reshape(num_tokens)
    hidden = hidden.reshape(num_tokens, hidden.shape[-1])
    if num_tokens == 0:  # one ignored token, so that no implementation meets an empty grid
        num_tokens, labels, hidden = 1, jnp.full(1, ignore_index), jnp.pad(hidden, ((0, 1), (0, 0)))
    statistics_dtype = jnp.promote_types(compute_dtype, jnp.float32)
    row_labels, row_weight = _rows(labels, vocab_size, ignore_index, reduction, normalizer, statistics_dtype)
    chunk_rows, chunks = split_rows(num_tokens, num_chunks)
    if chunks != num_chunks and labels.size > 1 and choice.implementation != "reference":
        _logger.warning("num_chunks=%d for %d tokens: using %d of %d", num_chunks, num_tokens, chunks, chunk_rows)
    dispatch.log_choice(choice, chunk_rows, chunks)
    if choice.implementation == "reference":
        return reference.weighted_loss(hidden, weight, row_labels, row_weight)
    if compute_dtype == jnp.float64:
        accum_dtype = jnp.promote_types(accum_dtype, compute_dtype)
    config = chunked.ChunkedConfig(
        chunk_rows=chunk_rows,
        row_kernels=dispatch.row_kernels(choice.implementation),
        compute_dtype=compute_dtype,
        accum_dtype=jnp.promote_types(accum_dtype, jnp.float64)
        if compute_dtype == jnp.float64
        else jnp.dtype(accum_dtype),
    )
    return chunked.weighted_loss(config, hidden, weight, row_labels, row_weight)


def split_rows(num_tokens: int, num_chunks: int) -> tuple[int, int]:
    """Rows in a chunk and number of chunks: as even as can be, never more than `num_chunks`, none empty.

    Rounding the rows up may leave fewer chunks than asked for: 10 tokens in 7 chunks are 5 chunks of 2.
    """
    chunk_rows = -(-num_tokens // num_chunks)
    return chunk_rows, -(-num_tokens // chunk_rows)


def _rows(
    labels: Array,
    vocab_size: int,
    ignore_index: int,
    reduction: str,
    normalizer: ArrayLike | None,
    dtype: DTypeLike,
) -> tuple[Int[Array, " T"], Float[Array, " T"]]:
    """Every row's label, -1 where it is ignored, and its weight in the sum, NaN where the label is out of range."""
    if labels.dtype.itemsize < 4:
        labels = labels.astype(jnp.int32)
    # Compared as they came: narrowed first, 2^32 + 5 would be label 5, and a large unsigned one might be ignore_index.
    limits = jnp.iinfo(labels.dtype)
    valid = labels != ignore_index if limits.min <= ignore_index <= limits.max else jnp.ones(labels.shape, bool)
    in_range = (labels >= 0) & (labels < vocab_size)
    labels = labels.astype(jnp.int32)
    if reduction == "sum":
        scale = jnp.ones((), dtype)
    else:
        count = jnp.sum(valid).astype(dtype) if normalizer is None else jnp.asarray(normalizer, dtype)
        scale = jnp.where(count == 0, 0.0, 1.0 / jnp.where(count == 0, 1.0, count))
    row_labels = jnp.where(valid, jnp.where(in_range, labels, 0), -1)
    row_weight = jnp.where(valid, jnp.where(in_range, scale, jnp.nan), 0.0)
    return row_labels, row_weight


def _check_operands(hidden: Array, weight: Array, labels: Array) -> None:
    for name, array in (("hidden", hidden), ("weight", weight)):
        if array.dtype not in (jnp.bfloat16, jnp.float32, jnp.float64):
            raise TypeError(
                f"{name} has dtype {array.dtype}; it must be bfloat16, float32 or float64 "
                "(the gradients of a mean over many tokens underflow in float16)"
            )
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
        raise TypeError(f"compute_dtype is {compute_dtype}; it must be bfloat16, float32 or float64")
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
        _check_normalizer(normalizer)


def _check_normalizer(normalizer: ArrayLike) -> None:
    value = normalizer if isinstance(normalizer, Array) else np.asarray(normalizer)
    if value.ndim != 0:
        raise ValueError(f"normalizer has shape {value.shape}; it must be a scalar")
    real = jnp.issubdtype(value.dtype, jnp.integer) or jnp.issubdtype(value.dtype, jnp.floating)
    if not real or (not isinstance(value, jax.core.Tracer) and not 0 <= float(value) < np.inf):
        raise ValueError(f"normalizer is {normalizer}; it must be a finite number that is not negative")


def _check_label_values(labels: ArrayLike, weight: ArrayLike, ignore_index: int) -> None:
    """Checks labels whose values are known, before JAX narrows them to int32.

    Where a program is traced they are not known; a bad label turns the loss into NaN instead (`_rows`).
    """
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int | np.integer):
        raise TypeError(
            f"ignore_index is {ignore_index!r}; it must be a Python int (-100 where no label is to be ignored)"
        )
    unknown = isinstance(labels, jax.core.Tracer) or (isinstance(labels, Array) and not labels.is_fully_addressable)
    if unknown or jnp.ndim(weight) != 2 or not jnp.shape(weight)[0]:
        return
    values, vocab_size = np.asarray(labels), jnp.shape(weight)[0]
    if values.dtype.kind not in "iu":
        return  # refused by its dtype
    bad = values[(values != ignore_index) & ((values < 0) | (values >= vocab_size))]
    if bad.size:
        raise ValueError(
            f"labels hold {bad.size} values outside [0, {vocab_size}), the first is {bad.flat[0]}; "
            f"mark tokens to leave out with ignore_index ({ignore_index})"
        )
