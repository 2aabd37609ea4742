"""The chunked LM head: a `lax.scan` over token chunks that computes gradients together with the loss.

One chunk of C tokens, in the letters of the code:

    z  = x W^T                    [C, V]  logits, in the compute dtype
    dz = w * dloss(z, y)/dz       [C, V]  a row kernel, in place of z
    dx = dz W                     [C, D]
    dW = dW + dz^T x              [V, D]  fp32 carry, accumulated inside the GEMM

Three GEMMs, 6*T*D*V FLOPs: nothing is recomputed. The backward pass only multiplies by the cotangent, which under
jit is a constant 1 that folds away. Each chunk alternates compute-bound and memory-bound work, and that
alternation is what flattens a GPU's power draw. It is a `lax.scan` and not a Python loop because XLA may reorder
the iterations of the latter, which destroys both the memory bound and the alternation.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike
from jaxtyping import Float, Int


class RowKernels(NamedTuple):
    """The two entry points of a kernel file (`kernels/__init__.py` has their contract)."""

    losses: Callable[[Array, Array], Array]
    losses_and_gradients: Callable[[Array, Array, Array], tuple[Array, Array]]


@dataclasses.dataclass(frozen=True)
class ChunkedConfig:
    """What is fixed when the loss is traced.

    Attributes:
      chunk_rows: C, tokens in a chunk.
      row_kernels: what turns logits into losses and gradients (`kernels/__init__.py` has the contract).
      compute_dtype: dtype of the GEMMs' operands and of the logits.
      accum_dtype: dtype of the dW carry.
    """

    chunk_rows: int
    row_kernels: RowKernels
    compute_dtype: DTypeLike
    accum_dtype: DTypeLike


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _weighted_loss(
    config: ChunkedConfig,
    hidden: Float[Array, "T D"],
    weight: Float[Array, "V D"],
    labels: Int[Array, " T"],
    row_weight: Float[Array, " T"],
) -> Float[Array, ""]:
    """`sum_t row_weight[t] * cross_entropy(hidden[t] @ weight.T, labels[t])`; one GEMM when not differentiated.

    Args:
      config: static configuration.
      hidden: x, any float dtype.
      weight: W, any float dtype; cast to the compute dtype once, before the loop.
      labels: y in [0, V), or -1 for a row that contributes nothing whatever its `hidden` holds.
      row_weight: w, factor on each row's loss, 1/N for a mean over N tokens.
    """
    W = weight.astype(config.compute_dtype)

    def step(_: None, chunk: tuple[Array, Array]) -> tuple[None, Array]:
        x, y = chunk
        return None, config.row_kernels.losses(_logits(_live_rows(x, y, config), W), y)

    _, loss = _scan_chunks(step, None, config.chunk_rows, hidden, labels)
    return _weighted_sum(row_weight, loss)


def _forward(
    config: ChunkedConfig, hidden: Any, weight: Any, labels: Any, row_weight: Any
) -> tuple[Array, tuple[Array | None, Array | None, Array]]:
    """The loss with its gradients at cotangent 1; a GEMM is left out where its gradient is not asked for."""
    want_dx, want_dw = hidden.perturbed, weight.perturbed
    W = weight.value.astype(config.compute_dtype)

    def step(dW: Array | None, chunk: tuple[Array, Array, Array]) -> tuple[Array | None, tuple]:
        x, y, w = chunk
        x = _live_rows(x, y, config)
        loss, dz = config.row_kernels.losses_and_gradients(_logits(x, W), y, w)
        dx = _matmul(dz, W, (1, 0), hidden.value.dtype) if want_dx else None
        if want_dw:
            update = _matmul(dz, x, (0, 0), config.accum_dtype)
            dW = update if dW is None else dW + update
        return dW, (loss, dx)

    single_chunk = config.chunk_rows >= hidden.value.shape[0]
    carry = jnp.zeros(W.shape, config.accum_dtype) if want_dw and not single_chunk else None
    dW, (loss, dx) = _scan_chunks(step, carry, config.chunk_rows, hidden.value, labels.value, row_weight.value)
    dW = None if dW is None else dW.astype(weight.value.dtype)
    return _weighted_sum(row_weight.value, loss), (dx, dW, loss)


def _backward(config: ChunkedConfig, residuals: tuple, cotangent: Array) -> tuple[Any, ...]:
    del config
    if isinstance(cotangent, jax.custom_derivatives.SymbolicZero):
        return None, None, None, None
    dx, dW, loss = residuals
    dx, dW = (None if d is None else (cotangent * d).astype(d.dtype) for d in (dx, dW))
    return dx, dW, None, cotangent * loss


_weighted_loss.defvjp(_forward, _backward, symbolic_zeros=True)
# Jitted here, or a call outside of jit would trace and compile its scan anew every time.
weighted_loss = jax.jit(_weighted_loss, static_argnums=0)


def _scan_chunks(
    step: Callable[[Any, tuple], tuple[Any, Any]], carry: Any, chunk_rows: int, *arrays: Array
) -> tuple[Any, Any]:
    """Runs `step` over chunks of rows; a tail chunk is filled up with rows of label -1 and weight 0.

    Filling up costs a copy of `hidden` (1/V of the logits' traffic); a second trace for the tail would cost a second
    set of compiled kernels. With one chunk there is no loop at all.
    """
    num_rows = arrays[0].shape[0]
    if chunk_rows >= num_rows:
        return step(carry, arrays)
    num_chunks = -(-num_rows // chunk_rows)

    def split(array: Array) -> Array:
        fill = -1 if jnp.issubdtype(array.dtype, jnp.integer) else 0
        padding = [(0, num_chunks * chunk_rows - num_rows)] + [(0, 0)] * (array.ndim - 1)
        padded = jnp.pad(array, padding, constant_values=fill) if padding[0][1] else array
        return padded.reshape(num_chunks, chunk_rows, *array.shape[1:])

    carry, outputs = lax.scan(step, carry, tuple(split(array) for array in arrays))
    return carry, jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:])[:num_rows], outputs)


def _live_rows(x: Array, y: Array, config: ChunkedConfig) -> Array:
    """Zeroes ignored rows: 0 * NaN in the dW GEMM would poison every gradient (fully masked attention gives NaN)."""
    return jnp.where(y[:, None] >= 0, x, 0).astype(config.compute_dtype)


def _logits(x: Array, W: Array) -> Array:
    return _matmul(x, W, (1, 1), W.dtype)


def _matmul(a: Array, b: Array, contract: tuple[int, int], out_dtype: DTypeLike) -> Array:
    """GEMM with fp32 accumulation; fp32 operands are never rounded to TF32."""
    exact = lax.Precision.HIGHEST if a.dtype.itemsize >= 4 else None
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    return lax.dot_general(a, b, dimensions, precision=exact, preferred_element_type=out_dtype)


def _weighted_sum(row_weight: Array, loss: Array) -> Array:
    return jnp.sum(jnp.where(row_weight == 0, 0, row_weight * loss))
