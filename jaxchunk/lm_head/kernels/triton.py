"""Row kernel in Pallas, lowered through Triton: one program a row, the row streamed in blocks.

The first pass reads the row once and keeps, in every lane, a running maximum and a running sum of exponentials; lanes
meet only once, at the end of the row. The second pass reads the row again, from its end (where the L2 cache still
holds it), and overwrites each logit with its gradient.

Why Triton: it is the one Pallas back end that covers every NVIDIA GPU since Ampere, DGX Spark's sm_121 included
(Mosaic GPU starts at Hopper). JAX has deprecated it since 0.11; the kernel sits behind the two functions of
`kernels/__init__.py`, so that another back end can take its place.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Float, Int

from jaxchunk.lm_head import rows


@dataclasses.dataclass(frozen=True)
class RowKernelConfig:
    """Tuning parameters.

    Attributes:
      block: columns a program handles at a time; a power of two.
      num_warps: warps in a program.
      num_stages: software-pipelining depth asked of Triton.
      reverse: whether the second pass walks the row from its end.
    """

    block: int = 2048
    num_warps: int = 8
    num_stages: int = 1
    reverse: bool = True


def losses(
    logits: Float[Array, "C V"],
    labels: Int[Array, " C"],
    *,
    config: RowKernelConfig | None = None,
    interpret: bool = False,
) -> Float[Array, " C"]:
    """Cross-entropy of every row: one read of the logits."""
    (loss,) = _call(logits, labels, None, config or RowKernelConfig(), interpret)
    return loss


def losses_and_gradients(
    logits: Float[Array, "C V"],
    labels: Int[Array, " C"],
    row_weight: Float[Array, " C"],
    *,
    config: RowKernelConfig | None = None,
    interpret: bool = False,
) -> tuple[Float[Array, " C"], Float[Array, "C V"]]:
    """Cross-entropy of every row and the logits' gradient, written over the logits: two reads and one write."""
    loss, dlogits = _call(logits, labels, row_weight, config or RowKernelConfig(), interpret)
    return loss, dlogits


def _call(
    logits: Array, labels: Array, row_weight: Array | None, config: RowKernelConfig, interpret: bool
) -> tuple[Array, ...]:
    C, V = logits.shape
    block = min(config.block, 1 << (V.bit_length() - 1))  # the largest power of two that fits in the row
    num_warps = max(1, min(config.num_warps, block // 256))  # 8 elements a thread, 16 bytes of bf16
    per_row = pl.BlockSpec((1,), lambda t: (t,))
    row = pl.BlockSpec((None, V), lambda t: (t, 0))
    inputs, in_specs = [logits, labels], [row, per_row]
    out_shape, out_specs = [jax.ShapeDtypeStruct((C,), jnp.float32)], [per_row]
    aliases = {}
    if row_weight is not None:
        inputs.append(row_weight.astype(jnp.float32))
        in_specs.append(per_row)
        out_shape.append(jax.ShapeDtypeStruct(logits.shape, logits.dtype))
        out_specs.append(row)
        aliases = {0: 1}
    return pl.pallas_call(
        functools.partial(_row_kernel, num_columns=V, block=block, reverse=config.reverse),
        grid=(C,),
        in_specs=in_specs,
        out_specs=out_specs,
        out_shape=out_shape,
        input_output_aliases=aliases,
        interpret=interpret,
        compiler_params=plgpu.CompilerParams(num_warps=num_warps, num_stages=config.num_stages),
        name="jaxchunk_cross_entropy_rows",
    )(*inputs)


def _row_kernel(z_ref, y_ref, *refs, num_columns: int, block: int, reverse: bool) -> None:  # type: ignore[no-untyped-def]
    """One row: `refs` is (loss,) or (row_weight, loss, dlogits)."""
    w_ref, loss_ref, dz_ref = refs if len(refs) == 3 else (None, *refs, None)
    y = y_ref[0]
    lanes = jax.lax.iota(jnp.int32, block)
    num_blocks = num_columns // block
    # The tail block ends where the row ends and overlaps the block before it: no access is out of bounds.
    tail_start, tail_done = num_columns - block, num_blocks * block
    has_tail = tail_done < num_columns

    def load(start: Array | int) -> Array:
        return plgpu.load(z_ref.at[pl.ds(start, block)]).astype(jnp.float32)

    def accumulate(start: Array | int, skip: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        m, n = carry
        z = jnp.where(skip, -jnp.inf, load(start))
        rise = z - m
        e = jnp.exp(-jnp.abs(rise))  # one exponential serves the new term and the rescaling of the old ones
        return jnp.maximum(m, z), jnp.where(rise > 0, n * e + 1.0, n + e)

    # Read before the reductions below: behind their barrier another warp may already overwrite this column.
    z_y = plgpu.load(z_ref.at[jnp.clip(y, 0, num_columns - 1)]).astype(jnp.float32)
    low = rows.initial_max(jnp.dtype(jnp.float32))
    carry = jnp.full((block,), low, jnp.float32), jnp.zeros((block,), jnp.float32)
    carry = jax.lax.fori_loop(
        0, num_blocks, lambda i, carry: accumulate(i * block, i * block + lanes == y, carry), carry
    )
    if has_tail:
        column = tail_start + lanes
        carry = accumulate(tail_start, (column == y) | (column < tail_done), carry)
    m = jnp.max(carry[0])
    n = jnp.sum(carry[1] * jnp.exp(carry[0] - m))
    row = rows.coefficients(m, n, z_y, jnp.float32(1.0) if w_ref is None else w_ref[0])
    loss_ref[0] = row.loss
    if dz_ref is None:
        return

    def overwrite(start: Array | int, mask: Array | None = None) -> None:
        softmax = jnp.exp(load(start) - row.shift) * row.factor
        dz = jnp.where(start + lanes == y, row.label_gradient, softmax)
        plgpu.store(dz_ref.at[pl.ds(start, block)], dz.astype(dz_ref.dtype), mask=mask)

    if has_tail:  # first, while the logits it shares with the last full block are still logits
        overwrite(tail_start, mask=tail_start + lanes >= tail_done)
    jax.lax.fori_loop(0, num_blocks, lambda i, _: overwrite((num_blocks - 1 - i if reverse else i) * block), None)
