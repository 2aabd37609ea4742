"""What chunked implementations share: the loop over token chunks, and what is done to a chunk's rows and labels."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike


def scan_chunks(
    step: Callable[[Any, tuple], tuple[Any, Any]], carry: Any, chunk_rows: int, *arrays: Any
) -> tuple[Any, Any]:
    """Runs `step` over chunks of rows; a last chunk is filled up with rows of label -1 and weight 0.

    Filling up costs a copy of `hidden` (1/V of the logits' traffic); a second trace for the tail would cost a second
    set of compiled kernels. With one chunk there is no loop at all.
    """
    num_rows = arrays[0].shape[0]
    if chunk_rows == num_rows:
        return step(carry, arrays)
    num_chunks = -(-num_rows // chunk_rows)

    def split(array: Array) -> Array:
        fill = -1 if jnp.issubdtype(array.dtype, jnp.integer) else 0
        padding = [(0, num_chunks * chunk_rows - num_rows)] + [(0, 0)] * (array.ndim - 1)
        padded = jnp.pad(array, padding, constant_values=fill) if padding[0][1] else array
        return padded.reshape(num_chunks, chunk_rows, *array.shape[1:])

    chunks = jax.tree.map(split, arrays)
    if num_chunks == 1:
        carry, outputs = step(carry, jax.tree.map(lambda a: a[0], chunks))
        return carry, jax.tree.map(lambda a: a[:num_rows], outputs)
    carry, outputs = lax.scan(step, carry, chunks)
    return carry, jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:])[:num_rows], outputs)


def live_labels(hidden: Array, labels: Array, row_weight: Array) -> Array:
    """Rows of weight 0 drop out like ignored ones where `hidden` is not finite: a mask may cover NaN.

    The others stay: their losses are the gradients of their weights.
    """
    return jnp.where((row_weight == 0) & ~jnp.all(jnp.isfinite(hidden), axis=-1), -1, labels)


def live_rows(x: Array, y: Array, dtype: DTypeLike) -> Array:
    """Zeroes ignored rows: 0 * NaN in the dW GEMM would poison every gradient (fully masked attention gives NaN)."""
    return jnp.where(y[:, None] >= 0, x, 0).astype(dtype)


def own_labels(y: Array, columns: int, vocab_axes: tuple[str, ...]) -> Array:
    """Labels as columns of this device's slice of the vocabulary, -1 where they are in another's."""
    if not vocab_axes:
        return y
    y = y - columns * lax.axis_index(vocab_axes)
    return jnp.where((y >= 0) & (y < columns), y, -1)


def matmul(a: Array, b: Array, contract: tuple[int, int], out_dtype: DTypeLike) -> Array:
    """GEMM with fp32 accumulation; fp32 operands are never rounded to TF32."""
    exact = lax.Precision.HIGHEST if a.dtype.itemsize >= 4 else None
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    return lax.dot_general(a, b, dimensions, precision=exact, preferred_element_type=out_dtype)


def added(total: Array | None, update: Array) -> Array:
    """The sum, where there is something to add to."""
    return update if total is None else total + update
