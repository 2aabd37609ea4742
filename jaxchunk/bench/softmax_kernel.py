"""Softmax over rows in Pallas, lowered through Triton: the memory-bound part of the microbenchmark.

It moves what the row kernel of the loss moves (`lm_head/kernels/triton.py`, whose manner it follows): one read for a
running maximum and sum in every lane, then a second read, from the row's end, that writes probabilities over logits.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Float

from jaxchunk.lm_head.kernels.triton import RowKernelConfig, approximate_exp
from jaxchunk.lm_head.rows import initial_max

KERNEL_NAME = "jaxchunk_softmax_rows"


def softmax_rows(
    logits: Float[Array, "C N"], *, config: RowKernelConfig | None = None, interpret: bool = False
) -> Float[Array, "C N"]:
    """Softmax of every row written over the logits: two reads and one write.

    Args:
      logits: bfloat16, float16 or float32; any number of columns. XLA copies them first where they are still needed.
      config: tuning parameters.
      interpret: run in JAX's interpreter, which needs no GPU.

    Returns:
      Probabilities in the dtype of the logits; exponentials and sums are float32.
    """
    config = config or RowKernelConfig()
    C, N = logits.shape
    block = min(config.block, 1 << (N.bit_length() - 1))  # the largest power of two that fits
    exp = jnp.exp if interpret or logits.dtype.itemsize >= 4 else approximate_exp
    row = pl.BlockSpec((None, N), lambda t: (t, 0))
    return pl.pallas_call(
        functools.partial(_softmax_kernel, num_columns=N, block=block, exp=exp),
        grid=(C,),
        in_specs=[row],
        out_specs=row,
        out_shape=jax.ShapeDtypeStruct(logits.shape, logits.dtype),
        input_output_aliases={0: 0},
        interpret=interpret,
        compiler_params=plgpu.CompilerParams(
            num_warps=max(1, min(config.num_warps, block // 256)),  # 8 elements a thread, 16 bytes of bf16
            num_stages=config.num_stages,
        ),
        name=KERNEL_NAME,
    )(logits)


def _softmax_kernel(z_ref: Any, p_ref: Any, *, num_columns: int, block: int, exp: Callable[[Array], Array]) -> None:
    """One row: full blocks, and a tail block that ends where the row ends and overlaps the one before."""
    num_blocks, tail = num_columns // block, num_columns - block
    is_new = tail + jax.lax.iota(jnp.int32, block) >= num_blocks * block  # of the tail's columns

    def load(start: Array | int) -> Array:
        return plgpu.load(z_ref.at[pl.ds(start, block)]).astype(jnp.float32)

    def accumulate(z: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        m, n = carry
        rise = z - m
        e = exp(-jnp.abs(rise))  # one exponential serves the new term and the rescaling of the old ones
        return jnp.maximum(m, z), jnp.where(rise > 0, n * e + 1.0, n + e)

    m, n = jnp.full((block,), initial_max(jnp.float32), jnp.float32), jnp.zeros((block,), jnp.float32)
    m, n = jax.lax.fori_loop(0, num_blocks, lambda i, carry: accumulate(load(i * block), carry), (m, n))
    if num_columns % block:
        m, n = accumulate(jnp.where(is_new, load(tail), -jnp.inf), (m, n))
    row_max = jnp.max(m)
    scale = 1.0 / jnp.sum(n * exp(m - row_max))

    def overwrite(start: Array | int, mask: Array | None) -> None:
        p = exp(load(start) - row_max) * scale
        plgpu.store(p_ref.at[pl.ds(start, block)], p.astype(p_ref.dtype), mask=mask)

    if num_columns % block:  # first, while what it shares with the last full block is still logits
        overwrite(tail, is_new)
    jax.lax.fori_loop(0, num_blocks, lambda i, _: overwrite((num_blocks - 1 - i) * block, None), None)
