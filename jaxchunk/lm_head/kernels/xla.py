"""Row kernel in plain jnp: runs wherever XLA does."""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from jaxchunk.lm_head import rows


def losses(logits: Float[Array, "C V"], labels: Int[Array, " C"]) -> Float[Array, " C"]:
    """Cross-entropy of every row."""
    z, _, statistics = _statistics(logits, labels)
    return rows.coefficients(*statistics, jnp.ones_like(labels, z.dtype)).loss


def losses_and_gradients(
    logits: Float[Array, "C V"], labels: Int[Array, " C"], row_weight: Float[Array, " C"]
) -> tuple[Float[Array, " C"], Float[Array, "C V"]]:
    """Cross-entropy of every row, and the gradient of `row_weight * loss` with respect to the logits."""
    z, is_label, statistics = _statistics(logits, labels)
    row = rows.coefficients(*statistics, row_weight)
    softmax = jnp.exp(z - row.shift[:, None]) * row.factor[:, None]
    dlogits = jnp.where(is_label, row.label_gradient[:, None], softmax)
    return row.loss, dlogits.astype(logits.dtype)


def _statistics(logits: Array, labels: Array) -> tuple[Array, Array, tuple[Array, Array, Array]]:
    z = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    is_label = jax.lax.broadcasted_iota(labels.dtype, z.shape, 1) == labels[:, None]
    others = jnp.where(is_label, -jnp.inf, z)
    m = jnp.max(others, axis=1, initial=rows.initial_max(z.dtype))
    n = jnp.sum(jnp.exp(others - m[:, None]), axis=1)
    z_y = jnp.take_along_axis(z, jnp.maximum(labels, 0)[:, None], axis=1, mode="clip")[:, 0]
    return z, is_label, (m, n, z_y)
