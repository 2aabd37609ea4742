"""Sums of rows by label, the same to the last bit every time: a scatter with repeated indices uses atomics on a GPU.

Rows are sorted by label, and summed within blocks of sorted rows by a GEMM with a matrix of ones and zeros; a label
whose rows go on over blocks has its parts brought together by a second, small GEMM. Then every label has one row, and
the scatter has no index twice. `kernels/triton_label_rows.py` does the same on a GPU.
"""

import math

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Int


def add_label_rows(
    total: Float[Array, "V D"], labels: Int[Array, " T"], factors: Float[Array, " T"], x: Float[Array, "T D"]
) -> Float[Array, "V D"]:
    """`total[y_t] += factors_t x_t` for all t whose label is not -1; in the dtype of `total`."""
    T, D = x.shape
    block = _block(T)
    num_blocks = -(-T // block)
    fill = (0, num_blocks * block - T)
    labels = jnp.pad(jnp.where(labels < 0, total.shape[0], labels), fill, constant_values=total.shape[0])
    order = jnp.argsort(labels, stable=True)
    y = labels[order].reshape(num_blocks, block)
    ordered = x.at[order].get(mode="fill", fill_value=0).reshape(num_blocks, block, D).astype(total.dtype)
    scale = factors.astype(total.dtype).at[order].get(mode="fill", fill_value=0).reshape(num_blocks, block)

    is_first = jnp.concatenate([jnp.ones((num_blocks, 1), bool), y[:, 1:] != y[:, :-1]], axis=1)
    place = jnp.cumsum(is_first, axis=1) - 1  # of a row's label among those of its block
    member = place[:, None, :] == lax.broadcasted_iota(place.dtype, (1, block, 1), 1)
    sums = jnp.einsum("bpt,btd->bpd", jnp.where(member, scale[:, None, :], 0), ordered, precision="highest")
    label_of = jnp.max(jnp.where(member, y[:, None, :], -1), axis=2)  # [block, place], -1 where there is none

    # The first label of a block may be the last one of the block before, or of several.
    last_label = y[:, -1]
    goes_on = jnp.concatenate([jnp.zeros(1, bool), last_label[:-1] == y[1:, 0]])
    is_start = ~goes_on | (place[:, -1] > 0)  # whether the last label of the block begins in it
    start = lax.cummax(jnp.where(is_start, jnp.arange(num_blocks), 0))  # the block where its last label begins
    owner = jnp.concatenate([start[:1], start[:-1]])
    gather = goes_on[None, :] & (owner[None, :] == jnp.arange(num_blocks)[:, None])
    rest = jnp.matmul(gather.astype(total.dtype), sums[:, 0], precision="highest")
    sums = sums.at[jnp.arange(num_blocks), place[:, -1]].add(rest, unique_indices=True, indices_are_sorted=True)
    label_of = label_of.at[:, 0].set(jnp.where(goes_on, -1, label_of[:, 0]))

    # Places without a label go to rows past the end, each to its own, and are dropped.
    nowhere = total.shape[0] + 1 + jnp.arange(label_of.size).reshape(label_of.shape)
    rows = jnp.where((label_of < 0) | (label_of >= total.shape[0]), nowhere, label_of)
    return total.at[rows.reshape(-1)].add(sums.reshape(-1, D), mode="drop", unique_indices=True)


def _block(T: int) -> int:
    """Rows in a block, for the fewest operations: T per row within blocks, (T / block)^2 between them."""
    return max(8, 1 << round(math.log2(2 * T) / 3))
