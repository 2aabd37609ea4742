"""The arithmetic of one row of logits relative to its label's: what `label_offset.py` does between GEMMs.

A row z with label y has the offset o = z_y + c, a whole multiple of ln 2. Sums leave the label's column out:

    n = sum_{j != y} exp(z_j - o)        s = n + e^-c

    lse - z_y       = log s + c = softplus(log n + c)      never negative
    softmax_j       = exp(z_j - o) / s                     j != y
    softmax_y - 1   = -n / s                               and never as that difference, which cancels

c is near 58 ln 2 = 40, so that n fits float32 from labels 47 nats above the rest (n is 0 beyond: so is the gradient, to
1e-20) to a loss of 128 nats. Above 90 there is little left of the factor 1/s: c is raised to where the largest logit
is. What c has beyond 58 ln 2, its excess, is kept instead of c, for it is small and powers of 2 are exact.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxchunk.lm_head.rows import RowOptions, RowResults

COMMON_OCTAVES = 58  # powers of 2
COMMON_RISE = COMMON_OCTAVES * math.log(2.0)
LARGEST_SUM = math.exp(50.0)  # of n
LARGEST_STORED = 2.0**127  # of E: bfloat16 has it, and 0 times it is 0
_LN2_HIGH = 355.0 / 512.0  # times a whole number below 2^15 it is a float32
_LN2_LOW = math.log(2.0) - _LN2_HIGH
_LARGEST_FACTOR = 1e17  # times 2^58 e it is a float32
_TIE = 1e-6  # the label's logit and the others are sums in different orders: closer ones are as good as equal


class OffsetStatistics(NamedTuple):
    """What is known of rows once their exponentials are taken; every field has the rows' shape.

    Attributes:
      excess: c - COMMON_RISE; c is how far the offset lies above the label's logit.
      n: sum of exp(z_j - z_y - c) over the columns that are not the label's.
      z_y: the label's logit; 0 in an ignored row.
      z_mean: mean of the logits, with label smoothing only.
      largest: largest z_j - z_y - excess over the columns that are not the label's, for the metrics only.
      moment: sum of exp(z_j - z_y - c) (z_j - z_y - excess - largest) over them, for the metrics only.
    """

    excess: Array
    n: Array
    z_y: Array
    z_mean: Array | None
    largest: Array | None
    moment: Array | None


def offset_and_excess(z_y: Array, excess: Array) -> tuple[Array, Array]:
    """The offset in octaves, a whole number, for about this excess, and the excess that it has exactly.

    A kernel takes 2^(z log2 e - offset), and a whole offset is not rounded on the way to it.
    """
    octaves = jnp.round((z_y + excess) * math.log2(math.e))
    return octaves + COMMON_OCTAVES, (octaves * _LN2_HIGH - z_y) + octaves * _LN2_LOW


def distance(z: Array, offset: Array) -> Array:
    """`z - offset ln 2`, for kernels that take exp; -inf where the offset is +inf."""
    return jnp.where(offset == jnp.inf, -jnp.inf, (z - offset * _LN2_HIGH) - offset * _LN2_LOW)


class OffsetCoefficients(NamedTuple):
    """What turns exponentials E into the gradient of `row_weight * loss` with respect to what the GEMM wrote.

    It is `factor * E_j - uniform` in every column, E_y being 0, and `label_gradient` (times the softcap's slope) on top
    of it in the label's; `uniform` is None without label smoothing.
    """

    factor: Array
    label_gradient: Array
    uniform: Array | None


def results(row: OffsetStatistics, options: RowOptions) -> RowResults:
    """Losses of rows and what the metrics need."""
    cross_entropy = _cross_entropy(row)
    lse = row.z_y + cross_entropy
    loss = cross_entropy
    if row.z_mean is not None:
        loss = loss + options.label_smoothing * (row.z_y - row.z_mean)
    if options.z_loss:
        loss = loss + options.z_loss * lse**2
    correct = entropy = None
    if row.moment is not None and row.largest is not None:
        correct = row.largest + row.excess <= _TIE * (COMMON_RISE + jnp.abs(row.z_y))
        label = _label(row)  # entropy: sum_j p_j (lse - z_j), the label's term apart
        s = row.n + label
        root = jnp.exp(-0.5 * row.largest)  # twice, for the whole might underflow
        others = jnp.where(row.n > 0, row.n * jnp.log(s * root * 2.0**COMMON_OCTAVES * root), 0) - row.moment
        entropy = (label * cross_entropy + others) / s
    return RowResults(loss, lse, correct, entropy)


def coefficients(row: OffsetStatistics, row_weight: Array, options: RowOptions) -> OffsetCoefficients:
    """Gradient coefficients of rows whose loss is multiplied by `row_weight`."""
    label = _label(row)
    s = row.n + label
    weight = row_weight if options.logit_scale == 1.0 else row_weight * options.logit_scale
    factor, label_gradient, uniform = weight / s, -weight * (row.n / s), None
    if options.z_loss:
        pull = 2.0 * options.z_loss * (row.z_y + _cross_entropy(row))
        factor, label_gradient = factor + factor * pull, label_gradient + factor * pull * label
    if options.label_smoothing:
        uniform = weight * (options.label_smoothing / options.vocab_size)
        label_gradient = label_gradient + weight * options.label_smoothing
    return OffsetCoefficients(factor, label_gradient, uniform)


def _cross_entropy(row: OffsetStatistics) -> Array:
    """The loss without options, log1p(n e^c) where that is finite: log n + c would round its digits away."""
    usual = (row.n < _LARGEST_FACTOR) & (row.excess < 1)
    small = jnp.log1p(jnp.where(usual, row.n, 0.0) * 2.0**COMMON_OCTAVES * jnp.exp(jnp.where(usual, row.excess, 0.0)))
    large = jax.nn.softplus(jnp.log(jnp.where(usual, 1.0, row.n)) + COMMON_RISE + row.excess)
    return jnp.where(usual, small, large)


def _label(row: OffsetStatistics) -> Array:
    """e^-c, the label's own exponential."""
    return jnp.exp(-row.excess) * 2.0**-COMMON_OCTAVES
