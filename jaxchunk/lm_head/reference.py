"""The oracle: unchunked, at least float32 throughout, gradients by autodiff of the textbook formulas."""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from jaxchunk.lm_head.chunks import wider
from jaxchunk.lm_head.rows import RowOptions, RowResults, are_usable, statistics_dtype


def token_losses(
    hidden: Float[Array, "T D"],
    weight: Float[Array, "V D"],
    bias: Float[Array, " V"] | None,
    labels: Int[Array, " T"],
    row_weight: Float[Array, " T"],
    options: RowOptions,
) -> tuple[Float[Array, " T"], RowResults]:
    """`row_weight[t] * loss[t]` and the rows' results, with all T x V logits in memory.

    float32 or wider, whatever comes in; rows with label -1 contribute nothing.
    """
    dtype = statistics_dtype(wider(hidden.dtype, weight.dtype))
    # A row of weight 0 keeps its loss, for the gradient of its weight, unless there is none to speak of.
    live = (labels >= 0) & ((row_weight != 0) | are_usable(hidden))
    x = jnp.where(live[:, None], hidden, 0).astype(dtype)
    z = options.logit_scale * jnp.matmul(x, weight.astype(dtype).T, precision=jax.lax.Precision.HIGHEST)
    if bias is not None:
        z = z + bias.astype(dtype)[None, :]
    if options.softcap is not None:
        z = options.softcap * jnp.tanh(z / options.softcap)
    lse = jax.nn.logsumexp(z, axis=-1)
    log_softmax = jax.nn.log_softmax(z, axis=-1)
    loss = -_at_labels(log_softmax, labels)
    if options.label_smoothing:
        loss = (1 - options.label_smoothing) * loss + options.label_smoothing * (lse - jnp.mean(z, axis=-1))
    if options.z_loss:
        loss = loss + options.z_loss * lse**2
    return jnp.where(live, row_weight * loss, 0), RowResults(
        loss=loss,
        lse=lse,
        correct=_at_labels(z, labels) >= jnp.max(z, axis=-1),
        entropy=jnp.sum(jax.scipy.special.entr(jnp.exp(log_softmax)), axis=-1) if options.metrics else None,
    )


def _at_labels(values: Array, labels: Array) -> Array:
    return jnp.take_along_axis(values, jnp.maximum(labels, 0)[:, None], axis=-1, mode="clip")[:, 0]
