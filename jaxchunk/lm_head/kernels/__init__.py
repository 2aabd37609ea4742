"""Row kernels: what reads and writes the logits of a chunk, one file per back end.

Every back end provides three functions of `raw[C, V]` (what the GEMM wrote), `labels[C]`, `bias[V]` or None and
`RowOptions`:

    statistics(raw, labels, bias, options) -> RowStatistics             one read
    gradients(raw, labels, bias, coefficients, options) -> draw[C, V]   one read, one write
    statistics_and_gradients(raw, labels, row_weight, bias, options) -> (RowStatistics, draw[C, V])

Statistics are in at least float32; `draw` has the dtype of `raw`. The Pallas kernels write it over the logits; XLA
leaves that to the compiler (on a GPU, JAX 0.11.2 holds both at once). A label of -1 matches no column: the row is
ignored (the caller gives it weight 0), or its label's column is in another slice of the vocabulary.

The fused implementation (`label_offset.py`) has one function of `x[C, D]`, `W[V, D]`, `offset[C]`, `labels[C]`,
`bias[V]` or None and `RowOptions`, which makes the logits and never stores them:

    exponentials(x, W, offset, labels, bias, options, *, store=True) -> Exponentials   one GEMM, one write

Without `store` there is no E, and nothing of its size is written; all else is the same.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from jaxchunk.lm_head.offset_rows import COMMON_OCTAVES

LOG2_E = math.log2(math.e)


class Exponentials(NamedTuple):
    """Exponentials of a chunk's logits z relative to an offset per row; the label's column is left out everywhere.

    Offsets are whole multiples of ln 2, o = `offset` ln 2 (`offset_rows.offset_and_excess`), or +inf.

    Attributes:
      E: [C, V], exp(z_j - o), at most LARGEST_STORED, times the softcap's slope, in the dtype of x; 0 in the label's
        column and in rows whose offset is +inf. None where it was not to be stored.
      n: [C], sum of exp(z_j - o), float32 and from float32 values.
      largest: [C], largest z_j - o + COMMON_RISE, for the metrics and far rows only; -inf in rows whose offset is +inf.
      moment: [C], sum of exp(z_j - o) (z_j - o + COMMON_RISE - largest), for the metrics only.
    """

    E: Array | None
    n: Array
    largest: Array | None
    moment: Array | None


def exponentials_of_parts(
    E: Float[Array, "C V"] | None, sums: Float[Array, "P C"], maxima_and_moments: Sequence[Float[Array, "P C"]]
) -> Exponentials:
    """Puts together what a kernel found of P parts of each row.

    Args:
      E: as in `Exponentials`.
      sums: of exp(z_j - o) over each part.
      maxima_and_moments: nothing without metrics; else the largest exponent of 2 of each part, and the sum of
        exp(z_j - o) times how far its exponent of 2 lies below that.
    """
    n = jnp.sum(sums, axis=0)
    if not maxima_and_moments:
        return Exponentials(E, n, None, None)
    maxima, moments = maxima_and_moments
    largest = jnp.max(maxima, axis=0)
    moment = jnp.sum(jnp.where(sums > 0, moments + sums * (maxima - largest[None]), 0), axis=0)
    return Exponentials(E, n, (largest + COMMON_OCTAVES) / LOG2_E, moment / LOG2_E)
