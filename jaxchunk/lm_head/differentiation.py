"""The loss of a chunked implementation as JAX differentiates it: gradients come with the loss, not after it.

The backward pass only multiplies by the cotangent, which under jit is a constant 1 that folds away (`weighted_loss`).
Cotangents that differ from token to token have to be there before the sum over tokens: then the logits are computed
again, 8*T*D*V (`token_losses`).

Under `jax.shard_map` a gradient is summed, in its accumulation dtype, over the devices that share its operand.
"""

import dataclasses
import functools
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_derivatives import SymbolicZero
from jax.typing import DTypeLike
from jaxtyping import Float, Int

from jaxchunk.lm_head.chunks import live_labels, wider
from jaxchunk.lm_head.rows import RowResults
from jaxchunk.lm_head.varying import summed_to, varying_axes


class LossConfig(Protocol):
    """What is fixed when the loss is traced, with what a chunked implementation does (`chunked`, `label_offset`).

    `results` gives every row's results and, in one pytree of arrays [T], the statistics that `gradients` can start
    from. `gradients` gives results, and gradients of `sum_t row_weight[t] * loss[t]` for hidden, weight and bias: per
    device, not yet summed over those that share an operand, in the dtype in which that sum is right; None for one that
    is not wanted.
    """

    @property
    def token_axes(self) -> tuple[str, ...]: ...  # noqa: D102

    def results(self, *operands: Any) -> tuple[RowResults, Any]: ...  # noqa: D102

    def gradients(  # noqa: D102
        self, types: "Types", wanted: "Wanted", *operands_and_statistics: Any
    ) -> tuple[RowResults, tuple[Array | None, Array | None, Array | None]]: ...


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _weighted_loss(
    config: LossConfig,
    hidden: Float[Array, "T D"],
    weight: Float[Array, "V D"],
    bias: Float[Array, " V"] | None,
    labels: Int[Array, " T"],
    row_weight: Float[Array, " T"],
) -> tuple[Float[Array, ""], RowResults]:
    """`sum_t row_weight[t] * loss[t]` and the rows' results; one GEMM when not differentiated.

    The results serve the metrics. They have no gradient: the caller refuses one.

    Args:
      config: static configuration.
      hidden: x, any float dtype.
      weight: W, any float dtype, [V, D] or [D, V]; cast to the compute dtype once, before the loop.
      bias: b, or None.
      labels: y in [0, V), or -1 for a row that contributes nothing whatever its `hidden` holds.
      row_weight: w, factor on each row's loss, 1/N for a mean over N tokens.
    """
    results, _ = config.results(hidden, weight, bias, labels, row_weight)
    return _sum_over_tokens(config, row_weight, results.loss), results


def _weighted_loss_forward(config: LossConfig, *operands: Any) -> tuple[Any, Any]:
    """The loss with its gradients at cotangent 1; a GEMM is left out where its gradient is not asked for."""
    types, wanted = _types(operands), _wanted(operands)
    *_, row_weight = values = _values(operands)
    results, gradients = config.gradients(types, wanted, *values)
    residuals = types, [_present(gradient) for gradient in (*gradients, results.loss if wanted.row_weight else None)]
    return (_sum_over_tokens(config, row_weight, results.loss), results), residuals


def _weighted_loss_backward(config: LossConfig, residuals: Any, cotangents: Any) -> tuple[Any, ...]:
    del config
    cotangent, _ = cotangents
    if isinstance(cotangent, SymbolicZero):
        return None, None, None, None, None
    types, gradients = residuals
    dx, dW, db, dw = (
        type_.gradient(cotangent * gradient.astype(cotangent.dtype)) if gradient.size else None
        for type_, gradient in zip(types, gradients, strict=True)
    )
    return dx, dW, db, None, dw


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _token_losses(
    config: LossConfig,
    hidden: Float[Array, "T D"],
    weight: Float[Array, "V D"],
    bias: Float[Array, " V"] | None,
    labels: Int[Array, " T"],
    row_weight: Float[Array, " T"],
) -> tuple[Float[Array, " T"], RowResults]:
    """`row_weight[t] * loss[t]` of every row and the rows' results; operands as in `weighted_loss`."""
    results, _ = config.results(hidden, weight, bias, labels, row_weight)
    return _weighted(row_weight, results.loss), results


def _token_losses_forward(config: LossConfig, *operands: Any) -> tuple[Any, Any]:
    wanted = _wanted(operands)
    *_, row_weight = values = _values(operands)
    results, statistics = config.results(*values)
    marks = [jnp.zeros(int(is_wanted)) for is_wanted in wanted]
    residuals = _types(operands), marks, values, statistics, results.loss
    return (_weighted(row_weight, results.loss), results), residuals


def _token_losses_backward(config: LossConfig, residuals: Any, cotangents: Any) -> tuple[Any, ...]:
    cotangent, _ = cotangents
    if isinstance(cotangent, SymbolicZero):
        return None, None, None, None, None
    types, marks, (hidden, weight, bias, labels, row_weight), statistics, loss = residuals
    wanted = Wanted(*(bool(mark.size) for mark in marks))
    dw = types.row_weight.gradient(_weighted(cotangent, loss)) if wanted.row_weight else None
    row_weight = cotangent * row_weight
    labels = live_labels(hidden, labels, row_weight)
    live = labels >= 0
    statistics = jax.tree.map(lambda field: jnp.where(live, field, 1), statistics)
    row_weight = jnp.where(live, row_weight, 0)
    _, gradients = config.gradients(types, wanted, hidden, weight, bias, labels, row_weight, statistics)
    dx, dW, db = (
        None if gradient is None else type_.gradient(gradient)
        for type_, gradient in zip(types[:3], gradients, strict=True)
    )
    return dx, dW, db, None, dw


_weighted_loss.defvjp(_weighted_loss_forward, _weighted_loss_backward, symbolic_zeros=True)
_token_losses.defvjp(_token_losses_forward, _token_losses_backward, symbolic_zeros=True)
# Jitted here, or a call outside of jit would trace and compile its scan anew every time.
weighted_loss = jax.jit(_weighted_loss, static_argnums=0)
token_losses = jax.jit(_token_losses, static_argnums=0)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class OperandType:
    """What the backward pass has to know of an operand to make its cotangent."""

    dtype: DTypeLike
    varying: frozenset[str]

    def gradient(self, value: Array) -> Array:
        """A gradient as the operand's cotangent: summed over the devices that share the operand, then rounded."""
        return summed_to(value, self.varying).astype(self.dtype)

    def dtype_per_device(self, accum_dtype: DTypeLike, shared_over: tuple[str, ...]) -> jnp.dtype:
        """Of a device's part of the gradient: where it is still to be summed over mesh axes, rounding comes last."""
        return wider(self.dtype, accum_dtype) if shared_over else jnp.dtype(self.dtype)

    def shrunk(self, value: Array) -> Array:
        """A device's part of the gradient; where nothing is left to sum, as small as it will be."""
        return value.astype(self.dtype) if self.varying == varying_axes(value) else value


class Types(NamedTuple):
    """One for every operand that has a gradient."""

    hidden: OperandType
    weight: OperandType
    bias: OperandType
    row_weight: OperandType


class Wanted(NamedTuple):
    """Whose gradients are asked for.

    It must not show in the structure of the residuals: JAX keeps one structure for all derivatives of a jitted program,
    and another one would fail, or end in wrong gradients. So what is missing is an array without elements.
    """

    hidden: bool
    weight: bool
    bias: bool
    row_weight: bool


def _types(operands: tuple[Any, ...]) -> Types:
    hidden, weight, bias, _, row_weight = operands
    arrays = (hidden, weight, hidden if bias is None else bias, row_weight)
    return Types(*(OperandType(array.value.dtype, varying_axes(array.value)) for array in arrays))


def _wanted(operands: tuple[Any, ...]) -> Wanted:
    hidden, weight, bias, _, row_weight = operands
    return Wanted(hidden.perturbed, weight.perturbed, bias is not None and bias.perturbed, row_weight.perturbed)


def _present(gradient: Array | None) -> Array:
    return jnp.zeros(0) if gradient is None else gradient


def _values(operands: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(None if operand is None else operand.value for operand in operands)


def _weighted(row_weight: Array, loss: Array) -> Array:
    return jnp.where(row_weight == 0, 0, row_weight * loss)


def _sum_over_tokens(config: LossConfig, row_weight: Array, loss: Array) -> Array:
    total = jnp.sum(_weighted(row_weight, loss))
    return lax.psum(total, config.token_axes) if config.token_axes else total
