"""What the loss is judged by: problems, a float64 oracle in NumPy, and the unchunked computation in the same dtype."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

IGNORE = -100


class Problem(NamedTuple):
    hidden: jax.Array
    weight: jax.Array
    labels: jax.Array


class Result(NamedTuple):
    loss: np.ndarray
    d_hidden: np.ndarray
    d_weight: np.ndarray


def problem(T=33, D=24, V=97, dtype=jnp.float32, *, scale=1.0, ignored=0.2, seed=0) -> Problem:
    """Random operands whose logits have a standard deviation of `scale`; a share of the labels is ignored."""
    keys = jax.random.split(jax.random.key(seed), 4)
    hidden = jax.random.normal(keys[0], (T, D)).astype(dtype)
    weight = (scale * jax.random.normal(keys[1], (V, D)) / np.sqrt(D)).astype(dtype)
    labels = jax.random.randint(keys[2], (T,), 0, V)
    return Problem(hidden, weight, jnp.where(jax.random.uniform(keys[3], (T,)) < ignored, IGNORE, labels))


def oracle(p: Problem, *, reduction="mean", normalizer=None, cotangent=1.0) -> Result:
    """Loss and gradients in float64 from the formulas, not from autodiff."""
    x, W = (np.asarray(a, np.float64) for a in (p.hidden, p.weight))
    y = np.asarray(p.labels)
    rows = np.flatnonzero(y != IGNORE)
    z = x @ W.T
    z_max = z.max(axis=1, keepdims=True)
    lse = z_max[:, 0] + np.log(np.exp(z - z_max).sum(axis=1))
    count = max(len(rows), 1) if normalizer is None else normalizer
    factor = np.zeros(len(y))
    factor[rows] = cotangent / (count if reduction == "mean" else 1)
    dz = np.exp(z - lse[:, None])
    dz[rows, y[rows]] -= 1
    dz *= factor[:, None]
    loss = np.sum((lse[rows] - z[rows, y[rows]]) * factor[rows]) / cotangent
    return Result(loss, dz @ W, dz.T @ x)


def same_dtype_baseline(p: Problem) -> Result:
    """What people write: logits in the operands' dtype, statistics in float32, autodiff, unchunked."""

    def loss(hidden, weight):
        info = jnp.finfo(hidden.dtype)
        logits = jnp.dot(hidden, weight.T, precision="highest", preferred_element_type=jnp.float32)
        # Logits as they are in memory; XLA would elide a plain cast to bfloat16 and back.
        logits = jax.lax.reduce_precision(logits, info.nexp, info.nmant)
        valid = p.labels != IGNORE
        picked = jnp.take_along_axis(logits, jnp.where(valid, p.labels, 0)[:, None], axis=1)[:, 0]
        per_token = jax.nn.logsumexp(logits, axis=1) - picked
        return jnp.sum(jnp.where(valid, per_token, 0)) / jnp.maximum(jnp.sum(valid), 1)

    value, (dx, dW) = jax.jit(jax.value_and_grad(loss, (0, 1)))(p.hidden, p.weight)
    return Result(*(np.asarray(a, np.float64) for a in (value, dx, dW)))


def relative_error(value, exact) -> float:
    value, exact = np.asarray(value, np.float64), np.asarray(exact, np.float64)
    return float(np.linalg.norm(value - exact) / max(np.linalg.norm(exact), 1e-300))


def assert_as_exact(result: Result, exact: Result, baseline: Result, dtype) -> None:
    """STYLE.md's rule: at most 2x (gradients) or 3x (loss) as wrong as the unchunked computation, plus an epsilon.

    The epsilon is that of the precision in which the quantity leaves the computation: the gradients' own dtype, and
    float32 for the loss.
    """
    for name, factor, epsilon in (
        ("loss", 3, jnp.finfo(jnp.float32).eps),
        ("d_hidden", 2, jnp.finfo(dtype).eps / 4),
        ("d_weight", 2, jnp.finfo(dtype).eps / 4),
    ):
        error = relative_error(getattr(result, name), getattr(exact, name))
        allowed = factor * relative_error(getattr(baseline, name), getattr(exact, name)) + epsilon
        assert error <= allowed, f"{name}: relative error {error:.3g}, allowed {allowed:.3g}"
