"""What the border of the loss refuses, in the user's words: what was given, what is needed."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

REDUCTIONS = ("mean", "sum", "none")
_DTYPES = (jnp.bfloat16, jnp.float32, jnp.float64)


def check_operands(hidden: Array, weight: Array, labels: Array, weight_layout: str) -> None:
    """Dtypes and shapes of the three arrays that every call has."""
    if weight_layout not in ("vd", "dv"):
        raise ValueError(f"weight_layout is {weight_layout!r}; it must be 'vd' or 'dv'")
    for name, array in (("hidden", hidden), ("weight", weight)):
        if array.dtype not in _DTYPES:
            raise TypeError(
                f"{name} has dtype {array.dtype}; it must be bfloat16, float32 or float64 "
                "(the gradients of a mean over many tokens underflow in float16)"
            )
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise TypeError(f"labels have dtype {labels.dtype}; they must be integer token ids")
    letters = "[V, D]" if weight_layout == "vd" else "[D, V]"
    if hidden.ndim < 1 or weight.ndim != 2:
        raise ValueError(
            f"hidden has shape {hidden.shape} and weight {weight.shape}; they must be [..., D] and {letters}"
        )
    vocab_dim = weight_layout.index("v")
    if hidden.shape[-1] != weight.shape[1 - vocab_dim]:
        where = "the last dimensions" if vocab_dim == 0 else "hidden's last dimension and weight's first"
        raise ValueError(
            f"hidden has shape {hidden.shape} and weight {weight.shape}: {where} must be equal "
            f"(weight_layout={weight_layout!r} is {letters}; there are 'vd' and 'dv')"
        )
    if labels.shape != hidden.shape[:-1]:
        raise ValueError(
            f"labels have shape {labels.shape}; for hidden {hidden.shape} they must be {hidden.shape[:-1]}"
        )
    if weight.shape[vocab_dim] < 1:
        raise ValueError(f"weight has shape {weight.shape}; the vocabulary must have at least one entry")


def as_array(name: str, value: Any) -> Array:
    """The operand as a JAX array."""
    try:
        return jnp.asarray(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name} is {value!r}; it must be an array of numbers") from None


def as_labels(labels: Array | np.ndarray) -> Array:
    """Labels as a JAX array; what is too large for it stays out of range: narrowed, 2^32 + 5 would be label 5."""
    if isinstance(labels, np.ndarray) and labels.dtype.kind in "iu":
        limits = jnp.iinfo(jax.dtypes.canonicalize_dtype(labels.dtype))
        labels = labels.clip(limits.min, limits.max)
    return as_array("labels", labels)


def as_dtype(name: str, value: Any) -> jnp.dtype:
    """The dtype that was named."""
    try:
        if value is None:
            raise TypeError
        return jnp.dtype(value)
    except TypeError:
        raise TypeError(f"{name} is {value!r}; it must be a floating-point dtype") from None


def check_dtypes(compute_dtype: jnp.dtype, accum_dtype: jnp.dtype) -> None:
    """The dtypes that can be chosen."""
    if compute_dtype not in _DTYPES:
        raise TypeError(f"compute_dtype is {compute_dtype}; it must be bfloat16, float32 or float64")
    if not jnp.issubdtype(accum_dtype, jnp.floating):
        raise TypeError(f"accum_dtype is {accum_dtype}; it must be floating point")


def check_num_chunks(num_chunks: Any) -> None:
    """At least 1, and known when the program is traced."""
    if isinstance(num_chunks, bool) or not isinstance(num_chunks, int | np.integer):
        raise TypeError(f"num_chunks is {num_chunks!r}; it must be a Python int (it shapes the program)")
    if num_chunks < 1:
        raise ValueError(f"num_chunks is {num_chunks}; it must be at least 1")


def check_reduction(reduction: str, normalizer: ArrayLike | None) -> None:
    """One of the three, and a denominator only where something is divided."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction is {reduction!r}; it must be 'mean', 'sum' or 'none'")
    if normalizer is None:
        return
    if reduction != "mean":
        raise ValueError(f"normalizer is given with reduction={reduction!r}; it belongs to 'mean'")
    value = normalizer if isinstance(normalizer, Array) else np.asarray(normalizer)
    if value.ndim != 0:
        raise ValueError(f"normalizer has shape {value.shape}; it must be a scalar")
    real = jnp.issubdtype(value.dtype, jnp.integer) or jnp.issubdtype(value.dtype, jnp.floating)
    if not real or (not isinstance(value, jax.core.Tracer) and not 0 <= float(value) < np.inf):
        raise ValueError(f"normalizer is {normalizer}; it must be a finite number that is not negative")


def smoothing_in_range(label_smoothing: Any) -> float:
    """`label_smoothing` as a float."""
    value = _number("label_smoothing", label_smoothing)
    if not 0 <= value < 1:
        raise ValueError(f"label_smoothing is {label_smoothing}; it must be at least 0 and less than 1")
    return value


def z_loss_in_range(z_loss: Any) -> float:
    """`z_loss` as a float."""
    value = _number("z_loss", z_loss)
    if not 0 <= _as_float32(value) < np.inf:
        raise ValueError(f"z_loss is {z_loss}; it must be a finite number that is not negative")
    return value


def softcap_in_range(logit_softcap: Any) -> float | None:
    """`logit_softcap` as a float, or None."""
    if logit_softcap is None:
        return None
    value = _number("logit_softcap", logit_softcap)
    if not 0 < _as_float32(value) < np.inf:
        raise ValueError(f"logit_softcap is {logit_softcap}; it must be a finite number greater than 0, or None")
    return value


def scale_in_range(logit_scale: Any) -> float:
    """`logit_scale` as a float."""
    value = _number("logit_scale", logit_scale)
    if not 0 < _as_float32(value) < np.inf:
        raise ValueError(f"logit_scale is {logit_scale}; it must be a finite number greater than 0")
    return value


def check_traced_scale(logit_scale: Array) -> None:
    """A scalar: its value is not known."""
    if logit_scale.ndim != 0:
        raise ValueError(f"logit_scale has shape {logit_scale.shape}; it must be a scalar")


def check_bias(bias: Array, vocab_size: int) -> None:
    """One number for each vocabulary entry."""
    if bias.dtype not in _DTYPES:
        raise TypeError(f"bias has dtype {bias.dtype}; it must be bfloat16, float32 or float64")
    if bias.shape != (vocab_size,):
        raise ValueError(f"bias has shape {bias.shape}; for a vocabulary of {vocab_size} it must be ({vocab_size},)")


def check_token_weights(token_weights: Array, labels: Array) -> None:
    """One number that is not negative for each token."""
    if jnp.issubdtype(token_weights.dtype, jnp.complexfloating):
        raise TypeError(f"token_weights have dtype {token_weights.dtype}; they must be real numbers, or a mask")
    if token_weights.shape != labels.shape:
        raise ValueError(
            f"token_weights have shape {token_weights.shape}; for labels {labels.shape} they must be {labels.shape}"
        )
    if not is_known(token_weights):
        return
    values = np.asarray(token_weights, np.float64)
    bad = values[~((values >= 0) & (values < np.inf))]
    if bad.size:
        raise ValueError(
            f"token_weights hold {bad.size} negative or non-finite values, the first is {bad.flat[0]}; "
            "they must be finite and at least 0"
        )


def check_label_values(labels: ArrayLike, token_weights: Array | None, vocab_size: int, ignore_index: Any) -> None:
    """Checks labels whose values are known, before JAX narrows them to int32.

    Where a program is traced they are not known; a bad label turns the loss into NaN instead.
    """
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int | np.integer):
        raise TypeError(
            f"ignore_index is {ignore_index!r}; it must be a Python int (-100 where no label is to be ignored)"
        )
    if not is_known(labels) or (token_weights is not None and not is_known(token_weights)):
        return
    values, counted = np.asarray(labels), True if token_weights is None else np.asarray(token_weights) != 0
    bad = values[(values != ignore_index) & ((values < 0) | (values >= vocab_size)) & counted]
    if bad.size:
        raise ValueError(
            f"labels hold {bad.size} values outside [0, {vocab_size}), the first is {bad.flat[0]}; "
            f"mark tokens to leave out with ignore_index ({ignore_index})"
        )


def is_known(values: ArrayLike) -> bool:
    """Whether the values can be looked at now: not traced, and all of them on this host."""
    return not isinstance(values, jax.core.Tracer) and not (
        isinstance(values, Array) and not values.is_fully_addressable
    )


def _as_float32(value: float) -> np.float32:
    with np.errstate(over="ignore", under="ignore"):
        return np.float32(value)


def _number(name: str, value: Any) -> float:
    if isinstance(value, Array) and not isinstance(value, jax.core.Tracer) and value.ndim == 0:
        value = value.item()
    if np.ndim(value) != 0:
        raise ValueError(f"{name} has shape {np.shape(value)}; it must be a scalar")
    if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
        raise TypeError(f"{name} is {value!r}; it must be a Python number (it shapes the program)")
    return float(value)
