"""What chunked implementations share: how tokens are cut, the loop over chunks, what is done to rows and labels."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental.xla_metadata import set_xla_metadata
from jax.typing import DTypeLike

from jaxchunk.lm_head import rows


def split_rows(num_tokens: int, num_chunks: int, multiple: int = 1) -> tuple[int, int]:
    """Rows in a chunk and number of chunks: as even as can be, never more than `num_chunks`, none empty.

    Rounding the rows up, also to a multiple, may leave fewer chunks than asked for: 10 tokens in 7 chunks are 5 of 2.
    """
    chunk_rows = -(-num_tokens // (num_chunks * multiple)) * multiple
    return chunk_rows, -(-num_tokens // chunk_rows)


def scan_chunks(
    step: Callable[[Any, tuple], tuple[Any, Any]],
    carry: Any,
    chunk_rows: int,
    *arrays: Any,
    first_ahead: bool = False,
) -> tuple[Any, Any]:
    """Runs `step(carry, chunk) -> (carry, outputs)` over chunks of rows.

    A last chunk is filled up with rows of label -1 and weight 0: that costs a copy of `hidden` (1/V of the logits'
    traffic), where a trace of its own for the tail would cost a second set of compiled kernels. With one chunk there is
    no loop at all.

    Args:
      step: what is done to a chunk.
      carry: for the first chunk.
      chunk_rows: C.
      *arrays: pytrees of arrays [T, ...].
      first_ahead: run the first chunk before the loop, so that `carry` may be None: a dW is then written where it
        would be added to zeros, which spares one write and one read of it for another set of compiled kernels.

    Returns:
      The last carry, and outputs [T, ...].
    """
    num_rows = arrays[0].shape[0]
    if chunk_rows == num_rows:
        return step(carry, arrays)
    num_chunks = -(-num_rows // chunk_rows)

    def padded(array: Array) -> Array:
        fill = -1 if jnp.issubdtype(array.dtype, jnp.integer) else 0
        padding = [(0, num_chunks * chunk_rows - num_rows)] + [(0, 0)] * (array.ndim - 1)
        return jnp.pad(array, padding, constant_values=fill) if padding[0][1] else array

    def whole(outputs: Any) -> Any:
        return jax.tree.map(lambda a: a[:num_rows], outputs)

    arrays = jax.tree.map(padded, arrays)
    if num_chunks == 1:
        carry, outputs = step(carry, arrays)
        return carry, whole(outputs)
    if first_ahead:
        carry, outputs = _first_ahead(step, carry, chunk_rows, num_chunks, arrays)
        return carry, whole(outputs)
    chunks = jax.tree.map(lambda a: a.reshape(num_chunks, chunk_rows, *a.shape[1:]), arrays)
    carry, outputs = lax.scan(step, carry, chunks)
    return carry, whole(jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), outputs))


def _first_ahead(
    step: Callable[[Any, tuple], tuple[Any, Any]], carry: Any, chunk_rows: int, num_chunks: int, arrays: Any
) -> tuple[Any, Any]:
    """The chunks in turn, the first before the loop over the others; outputs are put into place as they come."""

    def chunk(i: Array | int) -> Any:
        return jax.tree.map(lambda a: lax.dynamic_slice_in_dim(a, i * chunk_rows, chunk_rows), arrays)

    def grown(output: Array) -> Array:
        return jnp.pad(output, [(0, (num_chunks - 1) * chunk_rows)] + [(0, 0)] * (output.ndim - 1))

    def body(state: tuple[Any, Any], i: Array) -> tuple[tuple[Any, Any], None]:
        carry, outputs = state
        carry, parts = step(carry, chunk(i))
        put = lambda a, part: lax.dynamic_update_slice_in_dim(a, part, i * chunk_rows, 0)  # noqa: E731
        return (carry, jax.tree.map(put, outputs, parts)), None

    carry, outputs = step(carry, chunk(0))
    # A loop over one chunk has to stay a loop too: unrolled, XLA holds two sets of logits and adds dW outside the GEMM.
    with set_xla_metadata(**{"skip-simplify-while-loops_trip-count-one": "true"} if num_chunks == 2 else {}):
        return lax.scan(body, (carry, jax.tree.map(grown, outputs)), jnp.arange(1, num_chunks))[0]


def live_labels(hidden: Array, labels: Array, row_weight: Array) -> Array:
    """Rows of weight 0 drop out like ignored ones where their logits may not be finite: a mask may cover NaN.

    The others stay: their losses are the gradients of their weights.
    """
    return jnp.where((row_weight == 0) & ~rows.are_usable(hidden), -1, labels)


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


def wider(a: DTypeLike, b: DTypeLike) -> jnp.dtype:
    """The dtype with more bytes; the first of two alike."""
    return max(jnp.dtype(a), jnp.dtype(b), key=lambda dtype: dtype.itemsize)


def added(total: Array | None, update: Array) -> Array:
    """The sum, where there is something to add to."""
    return update if total is None else total + update
