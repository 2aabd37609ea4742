"""The arithmetic of one row of logits, shared by every chunked implementation.

Softmax cross-entropy of a row z with label y, written so that nothing cancels. The label's own column is kept
out of the row statistics:

    m = max_{j != y} z_j          n = sum_{j != y} exp(z_j - m)          a = z_y - m          s = n + e^a

    lse - z_y       = logaddexp(log n, a) - a              never negative
    softmax_j       = exp(z_j - m) / s                     j != y
    softmax_y - 1   = -n / s                               and never as that difference, which cancels

A softmax that includes the label loses the gradient of a row whose label stands 17 nats above the rest (fp32);
this form keeps it to the last bit up to 87 nats (beyond, exp(-a) is 0 in fp32), for the same number of passes.
docs/loss.md derives what the options add.
"""

import dataclasses
import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

_LARGEST_HIDDEN = 1e30  # beyond, logits may overflow
_LARGE_SOFTCAP = 100.0  # beyond, an error of 1e-7 c is no longer small

# (tanh(x) / x - 1) / x^2 as a polynomial in x^2, fitted at Chebyshev nodes; tanh is right to 1.7e-8 below the end.
_TANH_SERIES = (-0.00610495, 0.02100364, -0.0538525, 0.13332782, -0.33333329)
_TANH_SERIES_END = 0.625


@dataclasses.dataclass(frozen=True)
class RowOptions:
    """What is done to a row and asked of it, fixed when the loss is traced.

    Attributes:
      vocab_size: V, columns of the whole row (a kernel may hold only some of them).
      logit_scale: k, positive.
      softcap: c, positive, or None.
      label_smoothing: eps in [0, 1).
      z_loss: zeta, not negative.
      metrics: whether `RowResults.correct` and `RowResults.entropy` are wanted.
    """

    vocab_size: int
    logit_scale: float = 1.0
    softcap: float | None = None
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    metrics: bool = False


class RowStatistics(NamedTuple):
    """What one pass over a row of logits z leaves behind; every field has the rows' shape.

    Attributes:
      m: largest logit among the columns that are not the label's (at least `initial_max`); without metrics it may be
        larger than that, as long as n is at least 1.
      n: sum of exp(z_j - m) over them; at least 1, or 0 where there is none.
      z_y: the label's logit; 0 in a row whose label is not among the columns.
      z_sum: sum of all logits, with label smoothing only.
      q: sum of exp(z_j - m) * (z_j - m) over the columns that are not the label's, for the metrics only.
    """

    m: Array
    n: Array
    z_y: Array
    z_sum: Array | None = None
    q: Array | None = None


class RowResults(NamedTuple):
    """What is known of rows in the end; every field has the rows' shape.

    Attributes:
      loss: with smoothing and z-loss.
      lse: log-sum-exp of the logits.
      correct: bool, whether no logit is larger than the label's; None if not wanted.
      entropy: of the softmax, in nats; None if not wanted.
      taken_twice: bool, whether exponentials were taken again for a great loss; None if not wanted, or never done.
    """

    loss: Array
    lse: Array
    correct: Array | None
    entropy: Array | None
    taken_twice: Array | None = None


class RowCoefficients(NamedTuple):
    """What turns logits into the gradient of `row_weight * loss` with respect to what the GEMM wrote.

    It is `slope_j * (exp(z_j - shift) * factor - uniform)` off the label and `slope_y * label_gradient` on it, where
    `slope` is the softcap's derivative (`transformed`) and `uniform` is None without label smoothing.
    """

    shift: Array
    factor: Array
    label_gradient: Array
    uniform: Array | None


def statistics_dtype(dtype: Any) -> jnp.dtype:
    """What statistics of logits of this dtype are kept in."""
    return jnp.dtype(jnp.float64 if jnp.dtype(dtype) == jnp.float64 else jnp.float32)


def are_usable(hidden: Array) -> Array:
    """Whether each row of hidden states is finite and small enough for logits that are."""
    return jnp.all(jnp.abs(hidden) < _LARGEST_HIDDEN, axis=-1)


def initial_max(dtype: Any) -> float:
    """A finite stand-in for -inf, so that `z - m` stays defined in a row without any column but the label's."""
    return float(jnp.finfo(dtype).min) / 2


class Math(NamedTuple):
    """The special functions of a kernel, as exact as the logits that it reads deserve.

    Attributes:
      exp: the exponential.
      sigmoid: the logistic function, for a softcap by 2 sigmoid(2 u) - 1; None for one by tanh, right to the last
        digits also near 0, with a slope that is right also where the tanh is near 1. Where logits were stored in
        bfloat16, absolute errors of 1e-7 in both vanish beside their rounding (up to logits of six softcaps).
    """

    exp: Callable[[Array], Array]
    sigmoid: Callable[[Array], Array] | None


EXACT = Math(jnp.exp, None)


def transformed(raw: Array, bias: Array | None, options: RowOptions, math: Math) -> tuple[Array, Array | None]:
    """Logits `z = c tanh((k raw + bias) / c)` from what the GEMM wrote, and the softcap's slope (None without one).

    Args:
      raw: GEMM output, converted to the dtype of the statistics.
      bias: in that dtype, or None.
      options: scale k and softcap c.
      math: special functions.
    """
    u = raw if options.logit_scale == 1.0 else raw * options.logit_scale
    if bias is not None:
        u = u + bias
    if options.softcap is None:
        return u, None
    if math.sigmoid is None or options.softcap > _LARGE_SOFTCAP:
        e = jnp.exp(jnp.abs(u) * (-2.0 / options.softcap))  # 1 - t^2 would cancel where t is near 1
        return _softcapped(u, e, options.softcap), 4.0 * e / ((1.0 + e) * (1.0 + e))
    sigmoid = math.sigmoid(u * (2.0 / options.softcap))
    return sigmoid * (2.0 * options.softcap) - options.softcap, 4.0 * sigmoid * (1.0 - sigmoid)


def _softcapped(u: Array, e: Array, c: float) -> Array:
    """`c tanh(u / c)` where e = exp(-2 |u| / c), in float32 as what is subtracted from u or c, so that it rounds once.

    `c * tanh` rounds twice, and a compiler that contracts `c * tanh - shift` into one multiply-add rounds once: the
    label's logit and the others of its row then disagree by an ulp, on some processors only.
    """
    if u.dtype == jnp.float64:
        return c * jnp.tanh(u / c)
    x2 = (u / c) ** 2
    series = x2 * _TANH_SERIES[0] + _TANH_SERIES[1]
    for coefficient in _TANH_SERIES[2:]:
        series = series * x2 + coefficient
    near_0 = u + u * (x2 * series)
    capped = c - 2.0 * c * (e / (1.0 + e))
    return jnp.where(x2 < _TANH_SERIES_END**2, near_0, jnp.where(u < 0, -capped, capped))


def combined(statistics: RowStatistics, axis_names: tuple[str, ...]) -> RowStatistics:
    """Statistics of whole rows from those of their slices over mesh axes: one pmax, one psum."""
    m = lax.pmax(lax.stop_gradient(statistics.m), axis_names)  # any m will do: nothing depends on it
    return RowStatistics(m, *lax.psum(tuple(_relative_to(m, statistics))[1:], axis_names))


def merged(parts: Sequence[RowStatistics]) -> RowStatistics:
    """Statistics of whole rows from those of their parts, at least one."""
    m = functools.reduce(jnp.maximum, (part.m for part in parts))
    return functools.reduce(
        lambda a, b: jax.tree.map(operator.add, a, b)._replace(m=m), (_relative_to(m, part) for part in parts)
    )


def _relative_to(m: Array, statistics: RowStatistics) -> RowStatistics:
    """The sums of statistics with `m`, not less than theirs, in the place of their largest logit."""
    fall = statistics.m - m
    ratio = jnp.exp(fall)
    q = None if statistics.q is None else (statistics.q + statistics.n * fall) * ratio
    return statistics._replace(m=m, n=statistics.n * ratio, q=q)


class _Scaled(NamedTuple):
    """Statistics relative to `top`, the larger of m and z_y: nothing overflows, and one of n and `label` is 1 or more.

    `fall` is m - top.
    """

    top: Array
    fall: Array
    n: Array
    label: Array
    s: Array


def _scaled(statistics: RowStatistics) -> _Scaled:
    top = jnp.maximum(statistics.m, statistics.z_y)
    fall = statistics.m - top
    n, label = statistics.n * jnp.exp(fall), jnp.exp(statistics.z_y - top)
    return _Scaled(top, fall, n, label, n + label)


def results(statistics: RowStatistics, options: RowOptions) -> RowResults:
    """Losses of rows and what the metrics need."""
    row = _scaled(statistics)
    # One of the two is exact: label == 1 where the label leads, n >= 1 where it does not.
    log_s = jnp.log1p(row.n + (row.label - 1.0))
    lse = row.top + log_s
    cross_entropy = log_s + (row.top - statistics.z_y)
    loss = cross_entropy
    if statistics.z_sum is not None:
        loss = loss + options.label_smoothing * (statistics.z_y - statistics.z_sum / options.vocab_size)
    if options.z_loss:
        loss = loss + options.z_loss * lse**2
    correct = entropy = None
    if statistics.q is not None:
        correct = statistics.z_y >= statistics.m  # sum_j p_j (lse - z_j): no term is negative
        others = row.n * (log_s - row.fall) - statistics.q * jnp.exp(row.fall)
        own = jnp.where(row.label > 0, row.label * cross_entropy, 0)  # a bias of -inf on the label: 0 * inf
        entropy = (own + others) / row.s
    return RowResults(loss, lse, correct, entropy)


def coefficients(statistics: RowStatistics, row_weight: Array, options: RowOptions) -> RowCoefficients:
    """Gradient coefficients of rows whose loss is multiplied by `row_weight`."""
    row = _scaled(statistics)
    weight = row_weight if options.logit_scale == 1.0 else row_weight * options.logit_scale
    over_s = weight / row.s
    factor, label_gradient, uniform = over_s, -weight * (row.n / row.s), None
    if options.z_loss:
        pull = 2.0 * options.z_loss * (row.top + jnp.log(row.s))
        factor = factor + over_s * pull
        label_gradient = label_gradient + over_s * row.label * pull
    if options.label_smoothing:
        uniform = weight * (options.label_smoothing / options.vocab_size)
        label_gradient = label_gradient + weight * (options.label_smoothing * (1.0 - 1.0 / options.vocab_size))
    return RowCoefficients(row.top, factor, label_gradient, uniform)
