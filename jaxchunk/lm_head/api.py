"""The public loss: validates at the border, settles masks and the denominator, and hands over to an implementation."""

import dataclasses
import functools
import logging
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Float, Int

from jaxchunk.lm_head import checks, chunked, differentiation, dispatch, label_offset, reference, sharding
from jaxchunk.lm_head.chunks import live_labels, live_rows, split_rows
from jaxchunk.lm_head.metrics import LMHeadMetrics, metrics_of, undifferentiable
from jaxchunk.lm_head.rows import RowOptions, statistics_dtype
from jaxchunk.lm_head.sharding import AxisNames, Placement

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
    token_weights: Float[Array, "*batch"] | None = None,
    normalizer: ArrayLike | None = None,
    bias: Float[Array, " V"] | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    logit_softcap: float | None = None,
    logit_scale: ArrayLike = 1.0,
    weight_layout: str = "vd",
    compute_dtype: DTypeLike | None = None,
    accum_dtype: DTypeLike = jnp.float32,
    token_axis: AxisNames = None,
    vocab_axis: AxisNames = None,
    with_metrics: bool = False,
) -> Any:  # Float[Array, ""] or Float[Array, "*batch"]; a pair with LMHeadMetrics
    """Softmax cross-entropy of an LM head, `logits = hidden @ weight.T`, computed in token chunks.

    The tokens are split into `num_chunks` chunks that a `lax.scan` runs one after the other: logits of one chunk, loss
    and logit gradients in their place, both gradient GEMMs. At most T / num_chunks x V logits exist at a time, and
    compute-bound and memory-bound work alternate `num_chunks` times. Gradients are computed together with the loss
    (6*T*D*V FLOPs, nothing recomputed); without differentiation only the loss is computed (2*T*D*V), and a `hidden` or
    `weight` that is not differentiated costs no GEMM of its own.

    With `z = c tanh((logit_scale * logits + bias) / c)` (no tanh without a softcap c), the loss of a token is

        (1 - label_smoothing) * (lse(z) - z_label) + label_smoothing * (lse(z) - mean(z)) + z_loss * lse(z)^2

    docs/loss.md derives the gradients.

    Dtypes: statistics and loss are float32 (float64 for float64 operands), dW is accumulated in `accum_dtype`, and
    each gradient has the dtype of its primal. So pass the float32 master `weight` and let the loss cast it once.
    float32 operands are multiplied in full float32, never TF32.

    Autodiff: reverse mode, for hidden, weight, bias, token_weights, a traced normalizer and a traced logit_scale.
    First derivatives ("xla" has second ones too, the Pallas kernels have not). Forward mode (`jax.jvp`, `jax.jacfwd`,
    `jax.linearize`) raises JAX's error for custom_vjp, except with "reference" and without metrics.
    `reduction="none"` computes the logits again in the backward pass (8*T*D*V), because its cotangents have to be there
    before the sum over tokens; so does `jax.checkpoint` around the loss. With gradient accumulation take the gradient
    inside the loop over micro-batches, or every micro-batch's dW is kept. `vmap` works and multiplies the memory:
    leading dimensions of `hidden` are cheaper.

    Sharding: name mesh axes with `token_axis` and `vocab_axis`. Inside `jax.shard_map` (check_vma=True) over these
    axes, pass each device's tokens and its slice of the vocabulary: loss and denominator are those of all devices along
    `token_axis`, and gradients are summed over the devices that share an operand. Outside, with Auto or Explicit axes,
    pass whole arrays: the loss puts a `jax.shard_map` around itself, `hidden` sharded along its first dimension, each
    device's tokens in `num_chunks` chunks; a weight that is sharded otherwise (FSDP) is gathered once. Explicit axes
    need not be named. Inside `jax.shard_map` without named axes the loss is each device's own. Under plain `jax.jit`
    over Auto-sharded arrays without named axes XLA's partitioner decides, and gathers the operands of "pallas".

    Args:
      hidden: final hidden states, float, any number of leading dimensions. T is their product.
      weight: the vocabulary matrix, float. V need not be divisible by anything.
      labels: target ids in [0, V), or `ignore_index`. Other values are an error where they are known; in a jitted
        program they make the loss NaN.
      num_chunks: at least 1; need not divide T (chunks have ceil(T / num_chunks) tokens).
      implementation: "xla" (any device), "pallas" (NVIDIA GPU from Ampere on), "fused" (the same, bfloat16, not
        softcap together with smoothing; on Hopper with JAX 0.11 it wants D and V to be multiples of 16), "reference"
        (unchunked, float32, gradients by autodiff; ignores `num_chunks` and the dtypes), or None: "fused" on Hopper
        where it can do what is asked, else "pallas" where it can run, "xla" elsewhere. For tests "pallas_interpret" and
        "fused_interpret" (the Pallas kernels interpreted, slow) and "fused_xla" (the algorithm of "fused" over a plain
        kernel). A named implementation never falls back to another.
      ignore_index: tokens with this label contribute nothing, whatever their `hidden` holds.
      reduction: "mean" or "sum" over the tokens that are not ignored, or "none": a loss for each, 0 for ignored ones.
      token_weights: factor on each token's loss, not negative; a mask of bool or int will do. A weight of 0 leaves the
        token out like `ignore_index`, whatever its label and `hidden`, except in the gradient for `token_weights`. A
        mean divides by their sum.
      normalizer: for "mean", what the sum is divided by in place of this call's count of valid tokens (or sum of
        weights). With gradient accumulation pass the count over the whole batch. May be traced.
      bias: added to the scaled logits in float32.
      label_smoothing: share of the target spread over all V entries, in [0, 1).
      z_loss: coefficient of lse^2, not negative (PaLM's is 1e-4).
      logit_softcap: c above, greater than 0, or None (Gemma 2's is 30).
      logit_scale: factor on the logits, greater than 0: 1 / temperature. A traced scalar multiplies `hidden` instead.
      weight_layout: "vd" for a weight [V, D], "dv" for [D, V]. Neither is transposed in memory.
      compute_dtype: dtype of the GEMM operands and of the logits; None for `hidden`'s.
      accum_dtype: dtype in which dW is accumulated over chunks (float64 for float64 operands in any case).
      token_axis: mesh axis (or axes) that tokens are sharded over.
      vocab_axis: mesh axis (or axes) that the vocabulary is sharded over. They must divide V.
      with_metrics: whether `LMHeadMetrics` are returned too. A gradient through one raises.

    Returns:
      The loss, float32 (float64 for float64 operands): a scalar, 0 when every token is ignored; of the labels' shape
      with reduction "none". With metrics, (loss, metrics).

    Raises:
      TypeError: an operand has the wrong kind of dtype, or an option the wrong kind of value.
      ValueError: shapes do not match, an option is out of its domain, known labels are outside [0, V), a mesh axis does
        not exist or does not divide, or the named implementation cannot run here.

    Reference: "One Simple Trick for Improving the Performance of Energy-Limited Local Inference and Training",
    section 3.1 (the chunking); `lm_head/rows.py` has the arithmetic of a row. Label smoothing: Szegedy et al., 2016;
    z-loss: Chowdhery et al., 2022 (PaLM), section 5; softcap: Gemma Team, 2024 (Gemma 2), section 2.
    """
    given_labels = labels if isinstance(labels, Array) else np.asarray(labels)
    hidden, weight = checks.as_array("hidden", hidden), checks.as_array("weight", weight)
    labels = checks.as_labels(given_labels)
    compute_dtype = checks.as_dtype("compute_dtype", hidden.dtype if compute_dtype is None else compute_dtype)
    accum_dtype = checks.as_dtype("accum_dtype", accum_dtype)
    checks.check_operands(hidden, weight, labels, weight_layout)
    checks.check_dtypes(compute_dtype, accum_dtype)
    checks.check_num_chunks(num_chunks)
    checks.check_reduction(reduction, normalizer)
    vocab_dim = weight_layout.index("v")
    scale = None
    if isinstance(logit_scale, jax.core.Tracer):
        checks.check_traced_scale(logit_scale)
        scale, logit_scale = logit_scale, 1.0
    if bias is not None:
        bias = checks.as_array("bias", bias)
        checks.check_bias(bias, weight.shape[vocab_dim])
    if token_weights is not None:
        token_weights = checks.as_array("token_weights", token_weights)
        checks.check_token_weights(token_weights, labels)
        token_weights = token_weights.astype(statistics_dtype(compute_dtype))
    if normalizer is not None:
        normalizer = jnp.asarray(normalizer)
    operands = Operands(hidden, weight, labels, bias, token_weights, normalizer, scale)
    placement = sharding.place(token_axis, vocab_axis, operands, vocab_dim)
    options = RowOptions(
        vocab_size=weight.shape[vocab_dim] * sharding.slices(placement),
        logit_scale=checks.scale_in_range(logit_scale),
        softcap=checks.softcap_in_range(logit_softcap),
        label_smoothing=checks.smoothing_in_range(label_smoothing),
        z_loss=checks.z_loss_in_range(z_loss),
        metrics=with_metrics,
    )
    checks.check_label_values(given_labels, token_weights, options.vocab_size, ignore_index)
    columns = weight.shape[vocab_dim] // sharding.devices(placement.mesh, placement.vocab_axes)
    head = dispatch.Head(hidden.shape[-1], columns, vocab_dim, options)
    choice = dispatch.choose_implementation(implementation, compute_dtype=compute_dtype, head=head)
    dispatch.check_placement(choice, placement)
    if compute_dtype == jnp.float64:
        accum_dtype = compute_dtype
    settings = _Settings(num_chunks, choice, ignore_index, reduction, options, vocab_dim, compute_dtype, accum_dtype)
    loss, metrics = _loss(operands, settings, placement)
    return (loss, undifferentiable(metrics)) if with_metrics else loss


def token_log_probs(
    hidden: Float[Array, "*batch D"],
    weight: Float[Array, "V D"],
    labels: Int[Array, "*batch"],
    *,
    num_chunks: int = 1,
    implementation: str | None = None,
    ignore_index: int = -100,
    bias: Float[Array, " V"] | None = None,
    logit_softcap: float | None = None,
    logit_scale: ArrayLike = 1.0,
    weight_layout: str = "vd",
    compute_dtype: DTypeLike | None = None,
    accum_dtype: DTypeLike = jnp.float32,
    token_axis: AxisNames = None,
    vocab_axis: AxisNames = None,
) -> Float[Array, "*batch"]:
    """Log-probability of each label, `log softmax(logits)[label]`, computed in token chunks; for distillation and RL.

    Never positive, 0 where the label is `ignore_index`. Differentiable like `lm_head_loss` with reduction "none", which
    it is the negative of (the logits are computed again in the backward pass). Arguments and errors are those of
    `lm_head_loss`; the temperature is `1 / logit_scale`.
    """
    losses = lm_head_loss(
        hidden,
        weight,
        labels,
        num_chunks=num_chunks,
        implementation=implementation,
        ignore_index=ignore_index,
        reduction="none",
        bias=bias,
        logit_softcap=logit_softcap,
        logit_scale=logit_scale,
        weight_layout=weight_layout,
        compute_dtype=compute_dtype,
        accum_dtype=accum_dtype,
        token_axis=token_axis,
        vocab_axis=vocab_axis,
    )
    return 0 - losses  # not -losses: the log-probability of a certain or ignored label is 0, and not -0


class Operands(NamedTuple):
    """The arrays of a call, checked."""

    hidden: Float[Array, "*batch D"]
    weight: Float[Array, "V D"]
    labels: Int[Array, "*batch"]
    bias: Float[Array, " V"] | None
    token_weights: Float[Array, "*batch"] | None
    normalizer: Array | None
    scale: Array | None
    """A traced `logit_scale`."""


@dataclasses.dataclass(frozen=True)
class _Settings:
    """What is fixed when a call is traced, checked."""

    num_chunks: int
    choice: dispatch.Choice
    ignore_index: int
    reduction: str
    row_options: RowOptions
    vocab_dim: int
    compute_dtype: jnp.dtype
    accum_dtype: jnp.dtype


def _loss(operands: Operands, settings: _Settings, placement: Placement) -> tuple[Array, LMHeadMetrics | None]:
    if placement.mesh is None:
        return _loss_here(operands, settings, placement)
    return _loss_over_mesh(operands, settings, placement)


# Jitted here, or a call outside of jit would trace and compile anew every time.
@functools.partial(jax.jit, static_argnums=(1, 2))
def _loss_over_mesh(
    operands: Operands, settings: _Settings, placement: Placement
) -> tuple[Array, LMHeadMetrics | None]:
    return sharding.over_mesh(
        lambda local: _loss_here(local, settings, placement),
        placement,
        operands,
        settings.vocab_dim,
        per_token=settings.reduction == "none",
    )


def _loss_here(operands: Operands, settings: _Settings, placement: Placement) -> tuple[Array, LMHeadMetrics | None]:
    """The loss of this device's tokens, combined with that of the others where mesh axes are named."""
    hidden, weight, labels, bias, token_weights, normalizer, scale = operands
    shape, num_tokens = labels.shape, labels.size
    labels, hidden = labels.reshape(num_tokens), hidden.reshape(num_tokens, hidden.shape[-1])
    if token_weights is not None:
        token_weights = token_weights.reshape(num_tokens)
    row_labels, row_weight = _rows(labels, token_weights, normalizer, settings, placement.token_axes)
    valid = row_labels >= 0 if token_weights is None else (row_labels >= 0) & (token_weights != 0)
    if num_tokens == 0:  # one ignored token, so that no implementation meets an empty grid
        row_labels, row_weight, valid = jnp.full(1, -1), jnp.zeros(1, row_weight.dtype), jnp.zeros(1, bool)
        hidden = jnp.pad(hidden, ((0, 1), (0, 0)))
    if scale is not None:
        hidden = _scaled(hidden, scale, live_labels(hidden, row_labels, row_weight))
    implementation = settings.choice.implementation
    chunk_rows, chunks = split_rows(row_labels.size, settings.num_chunks, dispatch.rows_multiple(implementation))
    if chunks != settings.num_chunks and num_tokens and implementation != "reference":
        _logger.warning(
            "num_chunks=%d for %d tokens: using %d chunk(s) of %d token(s)",
            settings.num_chunks,
            num_tokens,
            chunks,
            chunk_rows,
        )
    dispatch.log_choice(settings.choice, chunk_rows, chunks)
    if implementation == "reference":
        by_rows = weight if settings.vocab_dim == 0 else weight.T
        loss, results = reference.token_losses(hidden, by_rows, bias, row_labels, row_weight, settings.row_options)
        loss = loss if settings.reduction == "none" else jnp.sum(loss)
    else:
        config = _implementation_config(settings, placement, chunk_rows, weighted=token_weights is not None)
        run = differentiation.token_losses if settings.reduction == "none" else differentiation.weighted_loss
        loss, results = run(config, hidden, weight, bias, row_labels, row_weight)
    metrics = None
    if settings.row_options.metrics:
        metrics = metrics_of(results, valid, settings.row_options.z_loss, placement.token_axes)
    return loss[:num_tokens].reshape(shape) if settings.reduction == "none" else loss, metrics


def _implementation_config(
    settings: _Settings, placement: Placement, chunk_rows: int, *, weighted: bool
) -> differentiation.LossConfig:
    """A chunked implementation with all that is fixed when the loss is traced."""
    implementation = settings.choice.implementation
    common: dict[str, Any] = {
        "chunk_rows": chunk_rows,
        "row_options": settings.row_options,
        "weighted": weighted,
        "compute_dtype": settings.compute_dtype,
        "accum_dtype": settings.accum_dtype,
        "token_axes": placement.token_axes,
        "vocab_axes": placement.vocab_axes,
    }
    if implementation in dispatch.FUSED:
        return label_offset.LabelOffsetConfig(
            exponentials=dispatch.exponentials(implementation),
            add_label_rows=dispatch.add_label_rows(implementation),
            **common,
        )
    return chunked.ChunkedConfig(
        row_kernels=dispatch.row_kernels(implementation), vocab_dim=settings.vocab_dim, **common
    )


@functools.partial(jax.jit, static_argnums=(3, 4))  # also for jax_debug_nans, which refuses the NaN of bad labels
def _rows(
    labels: Array,
    token_weights: Array | None,
    normalizer: Array | None,
    settings: _Settings,
    token_axes: tuple[str, ...],
) -> tuple[Int[Array, " T"], Float[Array, " T"]]:
    """Every row's label, -1 where it is ignored, and its weight in the sum, NaN where the label is out of range."""
    if labels.dtype.itemsize < 4:
        labels = labels.astype(jnp.int32)
    # Compared as they came: narrowed first, 2^32 + 5 would be label 5, and a large unsigned one might be ignore_index.
    limits = jnp.iinfo(labels.dtype)
    known = limits.min <= settings.ignore_index <= limits.max
    valid = labels != settings.ignore_index if known else jnp.ones(labels.shape, bool)
    in_range = (labels >= 0) & (labels < settings.row_options.vocab_size)
    labels = labels.astype(jnp.int32)
    if token_weights is not None:
        valid &= in_range | (token_weights != 0)  # a mask may cover labels that are none
        token_weights = jnp.where(valid, token_weights, 0)
    dtype = statistics_dtype(settings.compute_dtype)
    row_weight = jnp.ones((), dtype)
    if settings.reduction == "mean":
        if normalizer is not None:
            count = normalizer.astype(dtype)
        else:
            count = jnp.sum(valid if token_weights is None else token_weights).astype(dtype)
            count = lax.psum(count, token_axes) if token_axes else count
        row_weight = jnp.where(count == 0, 0.0, 1.0 / jnp.where(count == 0, 1.0, count))
    if token_weights is not None:
        row_weight = row_weight * token_weights
    row_labels = jnp.where(valid, jnp.where(in_range, labels, 0), -1)
    row_weight = jnp.where(valid, jnp.where(in_range, row_weight, jnp.nan), 0.0)
    return row_labels, row_weight


def _scaled(hidden: Array, scale: Array, row_labels: Array) -> Array:
    """`hidden` times the scale; 0 in rows that drop out, or their NaN would be in the gradient of the scale."""
    dtype = statistics_dtype(hidden.dtype)
    return live_rows(hidden, row_labels, dtype) * scale.astype(dtype)
