"""The arithmetic of one row of logits, shared by every chunked implementation.

Softmax cross-entropy of a row z with label y, written so that nothing cancels. The label's own column is kept
out of the row statistics:

    m = max_{j != y} z_j          n = sum_{j != y} exp(z_j - m)          a = z_y - m

    loss            = logaddexp(log n, a) - a              never negative
    dloss/dz_j      = exp(z_j - m) / (n + e^a)             j != y
    dloss/dz_y      = -n / (n + e^a)                       and not softmax_y - 1, which cancels for confident labels

A softmax that includes the label loses the gradient of a row whose label stands 17 nats above the rest (fp32);
this form keeps it to the last bit up to 87 nats (beyond, exp(-a) is 0 in fp32), for the same number of passes.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array


class RowCoefficients(NamedTuple):
    """What turns a row of logits into its loss and gradient; every field has the rows' shape.

    The gradient of `row_weight * loss` is `exp(z_j - shift) * factor` off the label and `label_gradient` on it.
    """

    loss: Array
    shift: Array
    factor: Array
    label_gradient: Array


def initial_max(dtype: jnp.dtype) -> float:
    """A finite stand-in for -inf, so that `z - m` stays defined in a row without any column but the label's."""
    return float(jnp.finfo(dtype).min) / 2


def coefficients(m: Array, n: Array, z_y: Array, row_weight: Array) -> RowCoefficients:
    """Loss and gradient coefficients of rows from the statistics of their columns other than the label's.

    Args:
      m: largest logit among the other columns (at least `initial_max`).
      n: sum of exp(z_j - m) over the other columns; at least 1, or 0 where there is no other column.
      z_y: the label's logit.
      row_weight: factor on the row's loss.
    """
    a = z_y - m
    scale = jnp.maximum(a, 0.0)  # whichever of e^a and n dominates is scaled to 1 or more: no overflow
    n_scaled = n * jnp.exp(-scale)
    label_scaled = jnp.exp(a - scale)
    s = n_scaled + label_scaled
    # One of the two is exact: label_scaled == 1 where the label leads, n >= 1 where it does not.
    loss = jnp.log1p(n_scaled + (label_scaled - 1.0)) + (scale - a)
    return RowCoefficients(loss, m + scale, row_weight / s, -row_weight * (n_scaled / s))
