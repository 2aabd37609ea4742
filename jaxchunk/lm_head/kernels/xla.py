"""Row kernels in plain jnp: they run wherever XLA does."""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from jaxchunk.lm_head import offset_rows, rows
from jaxchunk.lm_head.chunks import matmul
from jaxchunk.lm_head.kernels import Exponentials
from jaxchunk.lm_head.offset_rows import COMMON_OCTAVES, LARGEST_STORED
from jaxchunk.lm_head.rows import RowCoefficients, RowOptions, RowStatistics


def statistics(
    raw: Float[Array, "C V"], labels: Int[Array, " C"], bias: Float[Array, " V"] | None, options: RowOptions
) -> RowStatistics:
    """Statistics of every row."""
    z, _ = _transformed(raw, bias, options)
    is_label = _is_label(raw, labels)
    others = jnp.where(is_label, -jnp.inf, z)
    m = jnp.max(others, axis=1, initial=rows.initial_max(z.dtype))
    e = jnp.exp(others - m[:, None])
    z_y = jnp.take_along_axis(z, jnp.maximum(labels, 0)[:, None], axis=1, mode="clip")[:, 0]
    return RowStatistics(
        m=m,
        n=jnp.sum(e, axis=1),
        z_y=jnp.where(labels >= 0, z_y, 0),
        z_sum=jnp.sum(z, axis=1) if options.label_smoothing else None,
        q=jnp.sum(jnp.where(e > 0, e * (others - m[:, None]), 0), axis=1) if options.metrics else None,
    )


def gradients(
    raw: Float[Array, "C V"],
    labels: Int[Array, " C"],
    bias: Float[Array, " V"] | None,
    coefficients: RowCoefficients,
    options: RowOptions,
) -> Float[Array, "C V"]:
    """Gradient of every row's weighted loss with respect to `raw`."""
    z, slope = _transformed(raw, bias, options)
    gradient = jnp.exp(z - coefficients.shift[:, None]) * coefficients.factor[:, None]
    if coefficients.uniform is not None:
        gradient = gradient - coefficients.uniform[:, None]
    gradient = jnp.where(_is_label(raw, labels), coefficients.label_gradient[:, None], gradient)
    if slope is not None:
        gradient = gradient * slope
    return gradient.astype(raw.dtype)


def statistics_and_gradients(
    raw: Float[Array, "C V"],
    labels: Int[Array, " C"],
    row_weight: Float[Array, " C"],
    bias: Float[Array, " V"] | None,
    options: RowOptions,
) -> tuple[RowStatistics, Float[Array, "C V"]]:
    """Both, where nothing has to happen between them."""
    row = statistics(raw, labels, bias, options)
    return row, gradients(raw, labels, bias, rows.coefficients(row, row_weight, options), options)


def exponentials(
    x: Float[Array, "C D"],
    W: Float[Array, "V D"],
    offset: Float[Array, " C"],
    labels: Int[Array, " C"],
    bias: Float[Array, " V"] | None,
    options: RowOptions,
    *,
    store: bool = True,
) -> Exponentials:
    """`Exponentials` of a chunk; float32 logits may exist on the way."""
    raw = matmul(x, W, (1, 1), rows.statistics_dtype(x.dtype))
    z, slope = _transformed(raw, bias, options)
    # Near 0, where float32 has more digits than at -40: powers of 2 scale exactly.
    above = offset_rows.distance(z, offset[:, None] - COMMON_OCTAVES)
    above = jnp.where(_is_label(raw, labels), -jnp.inf, above)
    e = jnp.exp(above) * 2.0**-COMMON_OCTAVES
    largest = moment = None
    if options.metrics:
        largest = jnp.max(above, axis=1)
        moment = jnp.sum(jnp.where(e > 0, e * (above - largest[:, None]), 0), axis=1)
    E = None
    if store:
        E = jnp.minimum(e, LARGEST_STORED)
        E = (E if slope is None else E * slope).astype(x.dtype)
    return Exponentials(E, jnp.sum(e, axis=1), largest, moment)


def _transformed(raw: Array, bias: Array | None, options: RowOptions) -> tuple[Array, Array | None]:
    z = raw.astype(rows.statistics_dtype(raw.dtype))
    bias = None if bias is None else bias.astype(z.dtype)[None, :]
    math = rows.EXACT if raw.dtype.itemsize >= 4 else rows.Math(jnp.exp, jax.nn.sigmoid)
    return rows.transformed(z, bias, options, math)


def _is_label(raw: Array, labels: Array) -> Array:
    return jax.lax.broadcasted_iota(labels.dtype, raw.shape, 1) == labels[:, None]
