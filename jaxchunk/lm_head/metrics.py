"""Metrics of the LM head, from statistics that the loss computes anyway."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Bool, Float, Int

from jaxchunk.lm_head.rows import RowResults


class LMHeadMetrics(NamedTuple):
    """Means over the tokens that are neither ignored nor of weight 0; 0 where there is none. Not differentiable.

    Attributes:
      num_valid_tokens: how many they are.
      accuracy: share of tokens whose label's logit no other exceeds (a tie counts as correct).
      mean_lse: mean log-sum-exp of the logits.
      z_loss: mean of `z_loss * lse^2`.
      mean_entropy: mean entropy of the softmax, in nats.
      num_taken_twice: tokens of a loss above about 90 nats whose exponentials the fused implementations took again; 0
        with the others.
    """

    num_valid_tokens: Int[Array, ""]
    accuracy: Float[Array, ""]
    mean_lse: Float[Array, ""]
    z_loss: Float[Array, ""]
    mean_entropy: Float[Array, ""]
    num_taken_twice: Int[Array, ""]


def metrics_of(
    results: RowResults, valid: Bool[Array, " T"], z_loss: float, token_axes: tuple[str, ...]
) -> LMHeadMetrics:
    """Means of the rows' results over the valid rows of all devices along `token_axes`."""

    def total(values: Array) -> Array:
        local = jnp.sum(jnp.where(valid, values, 0), dtype=values.dtype)
        return lax.psum(local, token_axes) if token_axes else local

    count = total(valid.astype(jnp.int32))
    lse, taken_twice = results.lse, results.taken_twice
    if taken_twice is None:
        taken_twice = jnp.zeros_like(valid)
    assert results.entropy is not None and results.correct is not None

    def mean(values: Array) -> Array:
        return total(values) / jnp.maximum(count, 1).astype(lse.dtype)

    return LMHeadMetrics(
        count,
        accuracy=mean(results.correct.astype(lse.dtype)),
        mean_lse=mean(lse),
        z_loss=mean(z_loss * lse**2),
        mean_entropy=mean(results.entropy),
        num_taken_twice=total(taken_twice.astype(jnp.int32)),
    )


@jax.custom_vjp
def undifferentiable(metrics: LMHeadMetrics) -> LMHeadMetrics:
    """The metrics, guarded: a gradient through one raises instead of being silently zero."""
    return metrics


def _forward(metrics: Any) -> tuple[LMHeadMetrics, None]:
    return LMHeadMetrics(*(field.value for field in metrics)), None


def _backward(_: None, cotangents: Any) -> tuple[LMHeadMetrics]:
    asked = [
        name
        for name, cotangent in zip(LMHeadMetrics._fields, cotangents, strict=True)
        if not isinstance(cotangent, SymbolicZero)
    ]
    if asked:
        raise TypeError(
            f"the metrics of lm_head_loss are not differentiable, and a gradient through {', '.join(asked)} is asked "
            "for; return them as auxiliary output (has_aux=True), or pass them through jax.lax.stop_gradient"
        )
    return (LMHeadMetrics(*[None] * len(LMHeadMetrics._fields)),)  # type: ignore[arg-type]


undifferentiable.defvjp(_forward, _backward, symbolic_zeros=True)
