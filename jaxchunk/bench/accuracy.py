"""How far a loss and its gradients are from exact ones, on a slice of the benchmark's operands.

Exact means float32 arithmetic at full precision on the operands as the GEMMs see them (a bfloat16 weight is rounded for
the exact result too), so that what is measured is the computation's own error and not that of its inputs.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

MOST_TOKENS = 2048
CONFIDENT_SCALE = 8  # a power of two: the scaled bfloat16 hidden states are exactly eight times the plain ones

Evaluate = Callable[[Array, Array, Array], tuple[Any, tuple[Any, Any]]]
"""Hidden states [S, D], weight [V, D] float32, labels [S] int to the mean loss, (dX [S, D], dW [V, D])."""


class Case(NamedTuple):
    """Operands of S <= 2048 tokens, and the exact mean loss and gradients, float32."""

    hidden: Float[Array, "S D"]
    weight: Float[Array, "V D"]
    labels: Int[Array, " S"]
    loss: Float[Array, ""]
    d_hidden: Float[Array, "S D"]
    d_weight: Float[Array, "V D"]


class Accuracy(NamedTuple):
    """What a variant's results on the slices were like.

    Attributes:
      errors: by case, relative errors of "loss", "d_hidden" and "d_weight" (norm of the difference over the norm).
      d_weight_dtype: that the variant returns dW in.
    """

    errors: dict[str, dict[str, float]]
    d_weight_dtype: str


def cases(hidden: Float[Array, "T D"], weight: Float[Array, "V D"], labels: Int[Array, " T"]) -> dict[str, Case]:
    """Two slices: "random" as given (logits as after initialisation), "confident" with logits x8 and argmax labels."""
    hidden, labels = hidden[:MOST_TOKENS], labels[:MOST_TOKENS]
    sharp = CONFIDENT_SCALE * hidden
    best = most_probable(sharp, weight)
    return {
        "random": Case(hidden, weight, labels, *exact(hidden, weight, labels)),
        "confident": Case(sharp, weight, best, *exact(sharp, weight, best)),
    }


@jax.jit
def exact(
    hidden: Float[Array, "S D"], weight: Float[Array, "V D"], labels: Int[Array, " S"]
) -> tuple[Float[Array, ""], Float[Array, "S D"], Float[Array, "V D"]]:
    """Mean cross-entropy and its gradients in float32; the label's column stays out of the sum, so nothing cancels."""
    x, W = hidden.astype(jnp.float32), _as_multiplied(weight, hidden.dtype)
    losses, is_label, others, s = _exact_rows(hidden, weight, labels)
    n = others.sum(axis=1, keepdims=True)
    d_logits = jnp.where(is_label, -n / s, others / s) / x.shape[0]
    return losses.mean(), _matmul(d_logits, W), _matmul(d_logits.T, x)


@jax.jit
def exact_log_probs(
    hidden: Float[Array, "S D"], weight: Float[Array, "V D"], labels: Int[Array, " S"]
) -> Float[Array, " S"]:
    """Log-probabilities of the labels in float32, as exact as the loss of `exact`."""
    return -_exact_rows(hidden, weight, labels)[0]


@jax.jit
def most_probable(hidden: Float[Array, "S D"], weight: Float[Array, "V D"]) -> Int[Array, " S"]:
    """The label with the largest logit, in float32."""
    return jnp.argmax(_logits(hidden, weight), axis=1)


def measure(evaluate: Evaluate, slices: Mapping[str, Case]) -> Accuracy:
    """Runs a variant once on every slice and compares.

    Args:
      evaluate: the variant, for operands of any number of tokens.
      slices: from `cases`.
    """
    errors, dtype = {}, ""
    for name, case in slices.items():
        loss, (d_hidden, d_weight) = evaluate(case.hidden, case.weight, case.labels)
        errors[name] = {
            "loss": float(_relative_error(loss, case.loss)),
            "d_hidden": float(_relative_error(d_hidden, case.d_hidden)),
            "d_weight": float(_relative_error(d_weight, case.d_weight)),
        }
        dtype = str(d_weight.dtype)
    return Accuracy(errors, dtype)


@jax.jit
def _relative_error(value: Array, expected: Array) -> Array:
    difference = value.astype(jnp.float32) - expected
    return jnp.sqrt(jnp.sum(difference**2) / jnp.sum(expected**2))


def _exact_rows(hidden: Array, weight: Array, labels: Array) -> tuple[Array, Array, Array, Array]:
    """Losses [S], which column is the label's [S, V], exponentials of the others [S, V], sum of all [S, 1]."""
    logits = _logits(hidden, weight)
    is_label = jnp.arange(weight.shape[0])[None, :] == labels[:, None]
    m = logits.max(axis=1, keepdims=True)
    others = jnp.where(is_label, 0.0, jnp.exp(logits - m))
    label = jnp.where(is_label, logits - m, 0.0).sum(axis=1, keepdims=True)
    n = others.sum(axis=1, keepdims=True)
    return jnp.logaddexp(0.0, jnp.log(n) - label)[:, 0], is_label, others, n + jnp.exp(label)


def _logits(hidden: Float[Array, "S D"], weight: Float[Array, "V D"]) -> Float[Array, "S V"]:
    return _matmul(hidden.astype(jnp.float32), _as_multiplied(weight, hidden.dtype).T)


def _as_multiplied(weight: Float[Array, "V D"], dtype: Any) -> Float[Array, "V D"]:
    """The weight in float32, rounded to the dtype that GEMMs see it in; XLA takes two casts for none."""
    limits = jnp.finfo(dtype)
    return jax.lax.reduce_precision(weight.astype(jnp.float32), exponent_bits=limits.nexp, mantissa_bits=limits.nmant)


def _matmul(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
