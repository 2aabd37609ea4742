"""Sums of rows by label as in `label_rows.py`, in Pallas Triton: each row of x is read once, each sum added in place.

Rows are sorted by label, so that those of one label are a run. A program adds up what a segment of `_SEGMENT` sorted
rows has of a run, one row after the other. The sum of a run's first segment goes to its label's row of the total, the
others aside, and a second kernel adds these: one writer for every row and an order that is always the same. A run has
no length that makes it slow, as the runs of frequent words would be in the hands of one program each.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Float, Int

from jaxchunk.lm_head.rows import statistics_dtype
from jaxchunk.lm_head.varying import varying_alike

_SEGMENT = 64  # about the root of how often the most frequent word is in 64k: both loops are short
_MOST_COLUMNS = 1024  # of a row in a program


def add_label_rows(
    total: Float[Array, "V D"],
    labels: Int[Array, " T"],
    factors: Float[Array, " T"],
    x: Float[Array, "T D"],
    *,
    interpret: bool = False,
) -> Float[Array, "V D"]:
    """`total[y_t] += factors_t x_t` for all t whose label is not -1; sums of a label are float32 at least."""
    (V, D), T = total.shape, labels.size
    num_segments = pl.cdiv(T, _SEGMENT)
    labels = jnp.where(labels < 0, V, labels).astype(jnp.int32)
    labels = jnp.pad(labels, (0, num_segments * _SEGMENT - T), constant_values=V)
    y, order = lax.sort((labels, lax.iota(jnp.int32, labels.size)), num_keys=1)
    total, y, order, factors, x = varying_alike(total, y, order, factors, x)
    out = functools.partial(jax.ShapeDtypeStruct, manual_axis_type=jax.typeof(total).manual_axis_type)
    columns = min(_MOST_COLUMNS, pl.next_power_of_2(D))
    column_blocks = pl.cdiv(D, columns)
    options: dict[str, Any] = {
        "interpret": interpret,
        "compiler_params": plgpu.CompilerParams(num_warps=max(1, columns // 256), num_stages=1),
    }
    sums = functools.partial(_sum_segment, V=V, columns=columns)
    total, aside = pl.pallas_call(
        sums,
        grid=(labels.size, column_blocks),
        out_shape=[out((V, D), total.dtype), out((num_segments, D), statistics_dtype(total.dtype))],
        input_output_aliases={4: 0},
        name="jaxchunk_label_rows",
        **options,
    )(y, order, factors, x, total)
    return pl.pallas_call(
        functools.partial(_add_aside, V=V, columns=columns),
        grid=(num_segments, column_blocks),
        out_shape=out((V, D), total.dtype),
        input_output_aliases={2: 0},
        name="jaxchunk_label_rows_of_long_runs",
        **options,
    )(y, aside, total)


def _sum_segment(  # type: ignore[no-untyped-def]
    y_ref, order_ref, factors_ref, x_ref, total_ref, out_ref, aside_ref, *, V: int, columns: int
) -> None:
    """What this program's segment has of the run that begins at its row, or that goes on from the segment before."""
    del total_ref  # `out_ref` is the same memory
    t = pl.program_id(0)
    label, segment = y_ref[t], lax.div(t, jnp.int32(_SEGMENT))
    goes_on = _goes_on(y_ref, t)
    own, mask = _columns(x_ref.shape[1], columns)

    @pl.when((label < V) & (~goes_on | (lax.rem(t, jnp.int32(_SEGMENT)) == 0)))
    def _() -> None:
        end = (segment + 1) * _SEGMENT

        def is_mine(state: tuple[Array, Array]) -> Array:
            return (state[0] < end) & (y_ref[jnp.minimum(state[0], end - 1)] == label)

        def add_row(state: tuple[Array, Array]) -> tuple[Array, Array]:
            i, total = state
            row = order_ref[i]
            values = plgpu.load(x_ref.at[row, own], mask=mask, other=0).astype(total.dtype)
            return i + 1, total + factors_ref[row].astype(total.dtype) * values

        found = lax.while_loop(is_mine, add_row, (t, jnp.zeros(columns, aside_ref.dtype)))[1]

        @pl.when(goes_on)
        def _() -> None:
            plgpu.store(aside_ref.at[segment, own], found, mask=mask)

        @pl.when(~goes_on)
        def _() -> None:
            _add(out_ref, label, own, found, mask)


def _add_aside(y_ref, aside_ref, total_ref, out_ref, *, V: int, columns: int) -> None:  # type: ignore[no-untyped-def]
    """What later segments have of the run that ends this one, if it begins in this one."""
    del total_ref
    segment, num_segments = pl.program_id(0), aside_ref.shape[0]
    first = segment * _SEGMENT
    label = y_ref[first + _SEGMENT - 1]
    begins_before = (y_ref[first] == label) & _goes_on(y_ref, first)
    own, mask = _columns(out_ref.shape[1], columns)

    def is_mine(state: tuple[Array, Array]) -> Array:
        return (state[0] < num_segments) & (y_ref[jnp.minimum(state[0], num_segments - 1) * _SEGMENT] == label)

    def add_segment(state: tuple[Array, Array]) -> tuple[Array, Array]:
        i, total = state
        return i + 1, total + plgpu.load(aside_ref.at[i, own], mask=mask, other=0)

    start = segment + 1, jnp.zeros(columns, aside_ref.dtype)

    @pl.when((label < V) & ~begins_before & is_mine(start))
    def _() -> None:
        _add(out_ref, label, own, lax.while_loop(is_mine, add_segment, start)[1], mask)


def _goes_on(y_ref: Any, t: Array) -> Array:
    """Whether a sorted row has the label of the one before it."""
    return (t > 0) & (y_ref[jnp.maximum(t - 1, 0)] == y_ref[t])


def _columns(D: int, columns: int) -> tuple[Any, Array]:
    """This program's columns, and which of them there are."""
    start = pl.program_id(1) * columns
    return pl.ds(start, columns), start + lax.iota(jnp.int32, columns) < D


def _add(total_ref: Any, row: Array, columns: Any, values: Array, mask: Array) -> None:
    there = total_ref.at[row, columns]
    total = plgpu.load(there, mask=mask, other=0).astype(values.dtype) + values
    plgpu.store(there, total.astype(total_ref.dtype), mask=mask)
