"""Row kernels in Pallas, lowered through Triton: one program a row, the row streamed in blocks.

The first pass reads the row once and keeps, in every lane, a running maximum and a running sum of exponentials; lanes
meet only once, at the end of the row. The second pass reads the row again, from its end (where the L2 cache still
holds it), and overwrites each logit with its gradient. Where something has to happen between the passes (a sum over
devices, a cotangent that comes later) each is a kernel of its own.

Why Triton: it is the one Pallas back end that covers every NVIDIA GPU since Ampere, DGX Spark's sm_121 included
(Mosaic GPU starts at Hopper, where `mosaic_rows.py` takes most of the work over). JAX has deprecated it since 0.11; the
kernels sit behind the functions of `kernels/__init__.py`, so that another back end can take its place.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Float, Int

from jaxchunk.lm_head import rows
from jaxchunk.lm_head.rows import RowCoefficients, RowOptions, RowStatistics
from jaxchunk.lm_head.varying import varying_alike

_LARGEST_OFFSET = 40.0  # exp(-2 * 40) is a normal float32


@dataclasses.dataclass(frozen=True)
class RowKernelConfig:
    """Tuning parameters.

    Attributes:
      block: columns a program handles at a time; a power of two.
      num_warps: warps in a program.
      num_stages: software-pipelining depth asked of Triton.
    """

    block: int = 2048
    num_warps: int = 4
    num_stages: int = 1


def statistics(
    raw: Float[Array, "C V"],
    labels: Int[Array, " C"],
    bias: Float[Array, " V"] | None,
    options: RowOptions,
    *,
    config: RowKernelConfig | None = None,
    interpret: bool = False,
) -> RowStatistics:
    """Statistics of every row: one read of the logits."""
    kernel, name = _first_pass_kernel, "jaxchunk_row_statistics"
    return _call(kernel, raw, [labels], bias, options, config, interpret, name=name, with_statistics=True)[0]


def gradients(
    raw: Float[Array, "C V"],
    labels: Int[Array, " C"],
    bias: Float[Array, " V"] | None,
    coefficients: RowCoefficients,
    options: RowOptions,
    *,
    config: RowKernelConfig | None = None,
    interpret: bool = False,
) -> Float[Array, "C V"]:
    """The logits' gradient written over the logits: one read and one write."""
    kernel, name = _second_pass_kernel, "jaxchunk_row_gradients"
    inputs = [labels, *(c for c in coefficients if c is not None)]
    return _call(kernel, raw, inputs, bias, options, config, interpret, name=name, with_gradients=True)[1]


def statistics_and_gradients(
    raw: Float[Array, "C V"],
    labels: Int[Array, " C"],
    row_weight: Float[Array, " C"],
    bias: Float[Array, " V"] | None,
    options: RowOptions,
    *,
    config: RowKernelConfig | None = None,
    interpret: bool = False,
) -> tuple[RowStatistics, Float[Array, "C V"]]:
    """Statistics, and the logits' gradient written over the logits: two reads and one write."""
    kernel, name = _both_passes_kernel, "jaxchunk_cross_entropy_rows"
    inputs = [labels, row_weight.astype(jnp.float32)]
    return _call(
        kernel, raw, inputs, bias, options, config, interpret, name=name, with_statistics=True, with_gradients=True
    )


def _call(
    kernel: Callable[..., None],
    raw: Array,
    per_row_inputs: Sequence[Array],
    bias: Array | None,
    options: RowOptions,
    config: RowKernelConfig | None,
    interpret: bool,
    *,
    name: str,
    with_statistics: bool = False,
    with_gradients: bool = False,
) -> tuple[Any, Any]:
    """A `pallas_call` over rows: the specs and aliases that the three kernels share."""
    config = config or RowKernelConfig()
    C, V = raw.shape
    per_row, row = pl.BlockSpec((1,), lambda t: (t,)), pl.BlockSpec((None, V), lambda t: (t, 0))
    inputs, in_specs = [raw, *per_row_inputs], [row] + [per_row] * len(per_row_inputs)
    if bias is not None:
        inputs.append(bias.astype(jnp.float32))
        in_specs.append(pl.BlockSpec((V,), lambda t: (0,)))
    inputs = varying_alike(*inputs)
    out = functools.partial(jax.ShapeDtypeStruct, manual_axis_type=jax.typeof(inputs[0]).manual_axis_type)
    num_statistics = (3 + bool(options.label_smoothing) + options.metrics) if with_statistics else 0
    out_shape, out_specs = [out((C,), jnp.float32)] * num_statistics, [per_row] * num_statistics
    if with_gradients:
        out_shape.append(out(raw.shape, raw.dtype))
        out_specs.append(row)
    exact = raw.dtype.itemsize >= 4
    how = _Row.of(V, config, options, has_bias=bias is not None, exact=exact, interpret=interpret)
    outputs = pl.pallas_call(
        functools.partial(kernel, row=how),
        grid=(C,),
        in_specs=in_specs,
        out_specs=out_specs,
        out_shape=out_shape,
        input_output_aliases={0: num_statistics} if with_gradients else {},
        interpret=interpret,
        compiler_params=plgpu.CompilerParams(num_warps=how.num_warps, num_stages=config.num_stages),
        name=name,
    )(*inputs)
    return (
        _statistics_of(outputs[:num_statistics], options) if with_statistics else None,
        outputs[-1] if with_gradients else None,
    )


@dataclasses.dataclass(frozen=True)
class _Row:
    """How a row is walked: full blocks, and a tail block that ends where the row ends and overlaps the one before."""

    num_columns: int
    block: int
    num_warps: int
    options: RowOptions
    has_bias: bool
    exact: bool  # logits are stored in 32 bits: nothing vanishes beside their rounding
    interpret: bool

    @classmethod
    def of(
        cls,
        num_columns: int,
        config: RowKernelConfig,
        options: RowOptions,
        *,
        has_bias: bool,
        exact: bool,
        interpret: bool,
    ) -> "_Row":
        block = min(config.block, 1 << (num_columns.bit_length() - 1))  # the largest power of two that fits
        num_warps = max(1, min(config.num_warps, block // 256))  # 8 elements a thread, 16 bytes of bf16
        return cls(num_columns, block, num_warps, options, has_bias, exact, interpret)

    @property
    def num_blocks(self) -> int:
        return self.num_columns // self.block

    @property
    def is_bounded(self) -> bool:
        """Whether the first pass needs no maximum; log n then carries an error of 1e-7 softcap."""
        softcap = self.options.softcap
        return softcap is not None and softcap <= _LARGEST_OFFSET and not self.options.metrics and not self.exact

    @property
    def math(self) -> rows.Math:
        """Special functions for the dtype that logits are stored in."""
        if self.exact:
            return rows.EXACT
        return rows.Math(jnp.exp, jax.nn.sigmoid) if self.interpret else rows.Math(approximate_exp, sigmoid)

    def walk(self, y: Array, step: Callable[..., Any], carry: Any) -> Any:
        """`carry = step(start, skip, carry)` over the row; `skip` marks the label's and repeated columns."""
        lanes = jax.lax.iota(jnp.int32, self.block)

        def full_block(i: Array, carry: Any) -> Any:
            return step(i * self.block, i * self.block + lanes == y, carry)

        carry = jax.lax.fori_loop(0, self.num_blocks, full_block, carry)
        if self.num_columns % self.block:
            start = self.num_columns - self.block
            column = start + lanes
            carry = step(start, (column == y) | (column < self.num_blocks * self.block), carry)
        return carry

    def walk_back(self, y: Array, step: Callable[..., None]) -> None:
        """`step(start, is_label, mask)` over the row from its end, where the L2 cache still holds it."""
        lanes = jax.lax.iota(jnp.int32, self.block)
        if self.num_columns % self.block:  # first, while what it shares with the last full block is still logits
            start = self.num_columns - self.block
            step(start, start + lanes == y, start + lanes >= self.num_blocks * self.block)

        def full_block(i: Array, _: None) -> None:
            start = (self.num_blocks - 1 - i) * self.block
            step(start, start + lanes == y, None)

        jax.lax.fori_loop(0, self.num_blocks, full_block, None)


def _both_passes_kernel(z_ref, y_ref, w_ref, *refs, row: "_Row") -> None:  # type: ignore[no-untyped-def]
    bias_ref, refs = (refs[0], refs[1:]) if row.has_bias else (None, refs)
    statistics = _first_pass(z_ref, y_ref[0], bias_ref, row)
    _store_statistics(statistics, refs[:-1])
    _second_pass(z_ref, y_ref[0], bias_ref, rows.coefficients(statistics, w_ref[0], row.options), refs[-1], row)


def _first_pass_kernel(z_ref, y_ref, *refs, row: "_Row") -> None:  # type: ignore[no-untyped-def]
    bias_ref, refs = (refs[0], refs[1:]) if row.has_bias else (None, refs)
    _store_statistics(_first_pass(z_ref, y_ref[0], bias_ref, row), refs)


def _second_pass_kernel(z_ref, y_ref, *refs, row: "_Row") -> None:  # type: ignore[no-untyped-def]
    *coefficient_refs, dz_ref = refs
    bias_ref = coefficient_refs.pop() if row.has_bias else None
    values = [ref[0] for ref in coefficient_refs] + [None] * (not row.options.label_smoothing)
    _second_pass(z_ref, y_ref[0], bias_ref, RowCoefficients(*values), dz_ref, row)


def _first_pass(z_ref: Any, y: Array, bias_ref: Any | None, row: "_Row") -> RowStatistics:
    # Read before the reductions below: behind their barrier another warp may already overwrite this column.
    z_y, _ = _load(z_ref, bias_ref, jnp.clip(y, 0, row.num_columns - 1), row)
    z_y = jnp.where(y >= 0, z_y, 0.0)
    first_pass = _bounded_first_pass if row.is_bounded else _online_first_pass
    statistics = first_pass(z_ref, y, bias_ref, row)
    z_sum = statistics.z_sum
    return statistics._replace(z_y=z_y, z_sum=None if z_sum is None else z_sum + z_y)


def _online_first_pass(z_ref: Any, y: Array, bias_ref: Any | None, row: "_Row") -> RowStatistics:
    """A running maximum and sums relative to it in every lane (all sums without the label's column)."""
    low, exp = rows.initial_max(jnp.float32), row.math.exp

    def accumulate(start: Array | int, skip: Array, carry: RowStatistics) -> RowStatistics:
        logits, _ = _load(z_ref, bias_ref, pl.ds(start, row.block), row)
        z = jnp.where(skip, -jnp.inf, logits)
        rise = z - carry.m
        e = exp(-jnp.abs(rise))  # one exponential serves the new term and the rescaling of the old ones
        rises = rise > 0
        z_sum, q = carry.z_sum, carry.q
        if z_sum is not None:
            z_sum = z_sum + jnp.where(skip, 0.0, logits)
        if q is not None:
            q = jnp.where(rises, (q - carry.n * rise) * e, q + e * jnp.maximum(rise, low))
        n = jnp.where(rises, carry.n * e + 1.0, carry.n + e)
        return RowStatistics(jnp.maximum(carry.m, z), n, carry.z_y, z_sum, q)

    zeros = jnp.zeros((row.block,), jnp.float32)
    lanes = row.walk(
        y,
        accumulate,
        RowStatistics(
            m=jnp.full((row.block,), low, jnp.float32),
            n=zeros,
            z_y=jnp.float32(0),
            z_sum=zeros if row.options.label_smoothing else None,
            q=zeros if row.options.metrics else None,
        ),
    )
    m = jnp.max(lanes.m)
    fall = lanes.m - m
    ratio = exp(fall)
    return RowStatistics(
        m=m,
        n=jnp.sum(lanes.n * ratio),
        z_y=lanes.z_y,
        z_sum=None if lanes.z_sum is None else jnp.sum(lanes.z_sum),
        q=None if lanes.q is None else jnp.sum((lanes.q + lanes.n * fall) * ratio),
    )


def _bounded_first_pass(z_ref: Any, y: Array, bias_ref: Any | None, row: "_Row") -> RowStatistics:
    """Where a softcap c bounds the logits, exp(z - c) can neither overflow nor vanish: no maximum is needed."""
    softcap, exp = row.options.softcap, row.math.exp
    assert softcap is not None

    def accumulate(start: Array | int, skip: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        z, _ = _load(z_ref, bias_ref, pl.ds(start, row.block), row)
        return carry[0] + jnp.where(skip, 0.0, exp(z - softcap)), carry[1] + jnp.where(skip, 0.0, z)

    zeros = jnp.zeros((row.block,), jnp.float32)
    n, z_sum = (jnp.sum(lanes) for lanes in row.walk(y, accumulate, (zeros, zeros)))
    # The log-sum-exp in the place of the maximum, so that n is 1; or 0, where the label's is the only column.
    m = softcap + jnp.log(jnp.maximum(n, jnp.finfo(jnp.float32).tiny))
    n = (n > 0).astype(jnp.float32)
    return RowStatistics(m, n, jnp.float32(0), z_sum if row.options.label_smoothing else None)


def _second_pass(
    z_ref: Any, y: Array, bias_ref: Any | None, coefficients: RowCoefficients, dz_ref: Any, row: "_Row"
) -> None:
    exp = row.math.exp

    def overwrite(start: Array | int, is_label: Array, mask: Array | None) -> None:
        z, slope = _load(z_ref, bias_ref, pl.ds(start, row.block), row)
        dz = exp(z - coefficients.shift) * coefficients.factor
        if coefficients.uniform is not None:
            dz = dz - coefficients.uniform
        dz = jnp.where(is_label, coefficients.label_gradient, dz)
        if slope is not None:
            dz = dz * slope
        plgpu.store(dz_ref.at[pl.ds(start, row.block)], dz.astype(dz_ref.dtype), mask=mask)

    row.walk_back(y, overwrite)


def _load(z_ref: Any, bias_ref: Any | None, where: Any, row: "_Row") -> tuple[Array, Array | None]:
    """Logits with the softcap's slope (`rows.transformed`), float32."""
    raw = plgpu.load(z_ref.at[where]).astype(jnp.float32)
    bias = None if bias_ref is None else plgpu.load(bias_ref.at[where])
    return rows.transformed(raw, bias, row.options, row.math)


def approximate_exp(x: Array) -> Array:
    """Exp by the GPU's own instruction, with a relative error of 1e-7 |x|; libdevice's takes eight instructions."""
    if x.ndim == 0:  # Pallas lowers no inline assembly of scalars
        return jnp.exp(x)
    return _instruction("ex2.approx.ftz.f32 $0, $1;", x * math.log2(math.e))


def sigmoid(x: Array) -> Array:
    """1 / (1 + exp(-x)) by the GPU's own instructions."""
    if x.ndim == 0:
        return 1.0 / (1.0 + jnp.exp(-x))
    return _instruction("rcp.approx.ftz.f32 $0, $1;", 1.0 + approximate_exp(-x))


def _instruction(asm: str, x: Array) -> Array:
    (result,) = plgpu.elementwise_inline_asm(
        asm, args=[x], constraints="=f,f", pack=1, result_shape_dtypes=[jax.ShapeDtypeStruct(x.shape, x.dtype)]
    )
    return result


def _statistics_of(values: Sequence[Any], options: RowOptions) -> RowStatistics:
    m, n, z_y, *rest = values
    z_sum = rest.pop(0) if options.label_smoothing else None
    return RowStatistics(m, n, z_y, z_sum, rest.pop(0) if options.metrics else None)


def _store_statistics(statistics: RowStatistics, refs: Sequence[Any]) -> None:
    for ref, value in zip(refs, (value for value in statistics if value is not None), strict=True):
        ref[0] = value
