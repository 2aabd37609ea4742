"""Row-wise work in chunks, so that compute-bound and memory-bound parts alternate: the LM head's trick for others."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_derivatives import SymbolicZero
from jax.typing import DTypeLike

from jaxchunk.lm_head.chunks import split_rows
from jaxchunk.lm_head.varying import varying_axes, varying_over

Stage = Callable[..., Any]


def interleave(
    stages: Stage | Sequence[Stage],
    rows: Any,
    shared: Any = None,
    *,
    num_chunks: int,
    axis: int = 0,
    sums: bool = False,
    remat: bool = False,
    accum_dtype: DTypeLike = jnp.float32,
) -> Any:
    """Runs stages on one chunk of rows after the other instead of each stage on all rows.

    A GPU that does all of a compute-bound stage (a matrix product) and then all of a memory-bound one (a softmax, an
    activation, a permutation) draws its highest power for as long as the first takes. In chunks the two alternate, and
    what lies between them is a chunk in size. The arithmetic is the same. The chunks are a `lax.scan`, because XLA may
    reorder a Python loop's; with one chunk there is no loop.

    Differentiable in reverse mode, for `rows` and for `shared`. What the chunks add to the gradient of `shared` is
    added up in `accum_dtype`. In the backward pass the chunks come in the opposite order.

    Args:
      stages: functions, or one. The first gets `(chunk of rows, shared)`, every other one `(result so far, shared)`.
        Each row of a result must depend on the same row of the chunk alone, and any number of rows must do.
      rows: array or pytree of arrays with the same length T along `axis`; they are cut into chunks.
      shared: pytree that every chunk gets whole, such as weights.
      num_chunks: number of chunks, from 1 to T. Chunks have ceil(T / num_chunks) rows, the last one what is left
        (run after the loop, for it has another shape); there may be fewer chunks than that where T is small.
      axis: of the rows, in `rows` and in the results. Other axes than the first cost a copy of rows and results.
      sums: whether the last stage returns `(results, sums)`: sums are of any shape, and those of all chunks are added
        up in `accum_dtype` (inside of the matrix product, where XLA can: its result is then added to nothing else).
      remat: recompute a chunk in the backward pass instead of keeping what its gradient needs; then what lies between
        the stages is never held for more than a chunk, for one more run of the stages.
      accum_dtype: dtype in which gradients of `shared`, and `sums`, are added up.

    Returns:
      The last stage's result for all rows; with `sums`, `(results, sums)`.

    Raises:
      ValueError: `num_chunks` is out of range, the rows' lengths differ, or a result does not have the chunk's rows.
    """
    leaves = jax.tree.leaves(rows)
    lengths = {leaf.shape[axis] if -leaf.ndim <= axis < leaf.ndim else -1 for leaf in leaves}
    num_rows = min(lengths, default=-1)
    if len(lengths) != 1 or num_rows < 0:
        shapes = ", ".join(str(leaf.shape) for leaf in leaves)
        raise ValueError(f"rows have the shapes {shapes or 'of nothing'}; they need one length along axis {axis}")
    if not 1 <= num_chunks <= num_rows:
        raise ValueError(f"num_chunks is {num_chunks}; for {num_rows} rows it must be from 1 to {num_rows}")
    run = _composed([stages] if callable(stages) else list(stages), sums, axis)
    chunk_rows, _ = split_rows(num_rows, num_chunks)
    if chunk_rows == num_rows:
        result = run(rows, shared)
        return (result[0], _wide(result[1], accum_dtype)) if sums else result
    leaves, tree = jax.tree.flatten(shared)
    axes = varying_axes(*jax.tree.leaves(rows))  # inside of a jax.shard_map: what is summed over them is summed once
    zeros = [varying_over(_zeros_for_cotangents(accum_dtype, a), axes) if _is_float(a) else None for a in leaves]
    fixed = [varying_over(_without_cotangent(a), axes) if _is_float(a) else a for a in leaves]

    def step(chunk: Any, zeros: list[Array | None]) -> Any:
        pairs = zip(fixed, zeros, strict=True)
        return run(chunk, jax.tree.unflatten(tree, [a if z is None else _with_cotangent_of(a, z) for a, z in pairs]))

    step = jax.checkpoint(step) if remat else step
    return _in_chunks(step, rows, zeros, num_rows, chunk_rows, axis, sums, accum_dtype)


def _composed(stages: list[Stage], sums: bool, axis: int) -> Stage:
    def run(chunk: Any, shared: Any) -> Any:
        result = functools.reduce(lambda value, stage: stage(value, shared), stages, chunk)
        expected = jax.tree.leaves(chunk)[0].shape[axis]
        for leaf in jax.tree.leaves(result[0] if sums else result):
            if not (-leaf.ndim <= axis < leaf.ndim and leaf.shape[axis] == expected):
                raise ValueError(
                    f"of a chunk of {expected} rows the stages made {leaf.shape}; axis {axis} must have {expected} too"
                )
        return result

    return run


def _wide(tree: Any, accum_dtype: DTypeLike) -> Any:
    """Floating leaves in at least `accum_dtype`."""
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, _at_least(accum_dtype, jnp.result_type(leaf))), tree)


# Cotangents of a loop's constants are added up in the constants' dtype. So a weight's values go into the loop without a
# gradient, and beside them zeros in `accum_dtype`, which no stage reads (XLA drops them) and which get the cotangents.


@jax.custom_jvp
def _without_cotangent(leaf: Any) -> Any:
    """`lax.stop_gradient` for first derivatives only: the first ones themselves depend on the values."""
    return leaf


@functools.partial(_without_cotangent.defjvp, symbolic_zeros=True)
def _without_cotangent_jvp(primals: tuple[Any], tangents: tuple[Any]) -> tuple[Any, SymbolicZero]:
    del tangents
    (leaf,) = primals
    return leaf, SymbolicZero(jax.typeof(leaf).to_tangent_aval())


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _zeros_for_cotangents(accum_dtype: DTypeLike, leaf: Any) -> Array:
    zeros = jnp.zeros(jnp.shape(leaf), _at_least(accum_dtype, jnp.result_type(leaf)))
    return varying_over(zeros, varying_axes(jnp.asarray(leaf)))


_zeros_for_cotangents.defvjp(
    lambda accum_dtype, leaf: (_zeros_for_cotangents(accum_dtype, leaf), jnp.zeros(0, jnp.result_type(leaf))),
    lambda accum_dtype, empty, cotangent: (cotangent.astype(empty.dtype),),
)


@jax.custom_vjp
def _with_cotangent_of(leaf: Any, zeros: Array) -> Any:
    return leaf


_with_cotangent_of.defvjp(
    lambda leaf, zeros: (leaf, jnp.zeros(0, jnp.result_type(zeros))),
    lambda empty, cotangent: (None, cotangent.astype(empty.dtype)),
)


def _in_chunks(
    step: Stage, rows: Any, shared: Any, num_rows: int, chunk_rows: int, axis: int, sums: bool, accum_dtype: DTypeLike
) -> Any:
    whole_chunks = num_rows // chunk_rows

    def cut(leaf: Array) -> Array:
        leaf = jnp.moveaxis(leaf, axis, 0)[: whole_chunks * chunk_rows]
        leaf = leaf.reshape(whole_chunks, chunk_rows, *leaf.shape[1:])
        return jnp.moveaxis(leaf, 1, axis + 1 if axis >= 0 else axis)

    def joined(leaf: Array) -> Array:
        leaf = jnp.moveaxis(leaf, axis + 1 if axis >= 0 else axis, 1)
        return jnp.moveaxis(leaf.reshape(-1, *leaf.shape[2:]), 0, axis)

    def body(total: Any, chunk: Any) -> tuple[Any, Any]:
        result, part = step(chunk, shared) if sums else (step(chunk, shared), None)
        return jax.tree.map(lambda a, b: a + b.astype(a.dtype), total, part), result

    chunks = jax.tree.map(cut, rows)
    zeros = None
    if sums:
        first = jax.eval_shape(step, jax.tree.map(lambda a: a[0], chunks), shared)[1]
        axes = varying_axes(*jax.tree.leaves(rows))
        zeros = jax.tree.map(lambda s: varying_over(jnp.zeros(s.shape, _at_least(accum_dtype, s.dtype)), axes), first)
    total, results = lax.scan(body, zeros, chunks)
    results = jax.tree.map(joined, results)
    if whole_chunks * chunk_rows < num_rows:
        rest = jax.tree.map(lambda a: lax.slice_in_dim(a, whole_chunks * chunk_rows, num_rows, axis=axis), rows)
        total, last = body(total, rest)
        results = jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis), results, last)
    return (results, total) if sums else results


def _is_float(leaf: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(leaf), jnp.floating)


def _at_least(accum_dtype: DTypeLike, dtype: jnp.dtype) -> jnp.dtype:
    return jnp.promote_types(dtype, accum_dtype) if jnp.issubdtype(dtype, jnp.floating) else dtype
