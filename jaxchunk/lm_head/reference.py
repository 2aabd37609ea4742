"""The oracle: unchunked, at least float32 throughout, gradients by autodiff."""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int


def weighted_loss(
    hidden: Float[Array, "T D"],
    weight: Float[Array, "V D"],
    labels: Int[Array, " T"],
    row_weight: Float[Array, " T"],
) -> Float[Array, ""]:
    """`sum_t row_weight[t] * cross_entropy(hidden[t] @ weight.T, labels[t])` with all T x V logits in memory.

    float32 or wider, whatever comes in; rows with label -1 contribute nothing.
    """
    dtype = jnp.promote_types(jnp.promote_types(hidden.dtype, weight.dtype), jnp.float32)
    live = labels >= 0
    x = jnp.where(live[:, None], hidden, 0).astype(dtype)
    logits = jnp.matmul(x, weight.astype(dtype).T, precision=jax.lax.Precision.HIGHEST)
    log_softmax = jax.nn.log_softmax(logits, axis=-1)
    loss = -jnp.take_along_axis(log_softmax, jnp.maximum(labels, 0)[:, None], axis=-1, mode="clip")[:, 0]
    return jnp.sum(jnp.where(live, row_weight * loss, 0))
