"""Runs a kernel of the fused implementation with a configuration: is it right, and how long does a call take?

A window is *sustained*: back-to-back calls, of which the first third does not count. On a GPU at its power limit a
burst after a pause runs at clocks that last for some milliseconds only, and ranks kernels wrongly.
"""

import dataclasses
import functools
import math
import re
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Int

from jaxchunk.bench.tunable_kernels import TunableKernel
from jaxchunk.errors import InputError, RunFailedError, first_line
from jaxchunk.lm_head import offset_rows
from jaxchunk.lm_head.kernels import Exponentials, xla
from jaxchunk.lm_head.rows import RowOptions

_CHECKED_ROWS = 16  # whose exponentials are compared one by one; of all others it is the sums
_REFERENCE_ROWS = 128  # that have float32 logits at a time
_ESTIMATING_CALLS = 3
_LEAST_CALLS = 3


class ChunkShape(NamedTuple):
    """C rows of a chunk, D width, V vocabulary."""

    C: int
    D: int
    V: int

    def __str__(self) -> str:
        return f"{self.C}x{self.D}x{self.V}"


def parse_shape(text: str) -> ChunkShape:
    """A shape from its flag.

    Raises:
      InputError: it is not written as shapes are.
    """
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)x([1-9]\d*)", text)
    if match is None:
        raise InputError(f"--shapes has {text!r}; write rows of a chunk x width x vocabulary, 8192x896x151936")
    return ChunkShape(*map(int, match.groups()))


class Evaluation(NamedTuple):
    """Milliseconds of a call; or None, and the problem in words."""

    milliseconds: float | None
    problem: str | None = None


class Expected(NamedTuple):
    """What is known to be right, from float32 logits.

    Attributes:
      sums: [C], n of every row.
      rows: [R], some rows.
      E: [R, V], their exponentials.
    """

    sums: Array
    rows: Array
    E: Array


class KernelBench:
    """A kernel at one shape, on operands as after initialisation."""

    def __init__(self, kernel: TunableKernel[Any], shape: ChunkShape, *, window_s: float, seed: int):
        """Makes the operands, and what is right for them, on the default device.

        Args:
          kernel: to run.
          shape: of a chunk.
          window_s: length of a window; a third of it does not count.
          seed: of the operands.
        """
        self._kernel, self._window_s = kernel, window_s
        self._options = RowOptions(shape.V)
        self._operands = _operands(shape, seed)
        self._expected = _expected(*self._operands, self._options)
        self._programs: dict[Any, Callable[..., Any]] = {}

    def evaluate(self, config: Any) -> Evaluation:
        """Compiles, checks, and times a window.

        Raises:
          RunFailedError: the device does not work any more.
        """
        try:
            problem = self._wrong(self._program(config)(*self._operands))
            return Evaluation(None, problem) if problem else Evaluation(1e3 * self.call_s(config))
        except Exception as error:  # whatever a compiler or a driver has to say about one configuration
            _check_device(config)
            return Evaluation(None, first_line(error, with_type=True)[:300])

    def call_s(self, config: Any | None) -> float:
        """Seconds of a call in a sustained window; of cuBLAS's bfloat16 x W^T where `config` is None."""
        program = self._program(config)
        return sustained_call_s(lambda: program(*self._operands), self._window_s)

    def _program(self, config: Any | None) -> Callable[..., Any]:
        if config not in self._programs:
            function: Callable[..., Any] = _plain_product
            if config is not None:
                function = functools.partial(self._kernel.exponentials, config=config)
                function = functools.partial(_with_options, function, self._options)
            self._programs[config] = jax.jit(function).lower(*self._operands).compile()
        return self._programs[config]

    def _wrong(self, found: Exponentials) -> str | None:
        errors = _errors(found, self._expected)
        sums_bound = 1e-4
        # E is rounded to bfloat16, 2^-9 at random; a store that is lost shows by its share of the row.
        bounds = {
            "sums": sums_bound,
            "E": 1e-2,
            "sums of E": sums_bound + 2.0**-6 / math.sqrt(self._operands[1].shape[0]),
        }
        for name, bound in bounds.items():
            if not float(errors[name]) <= bound:
                return f"wrong: {name} off by {float(errors[name]):.1e} of themselves, more than {bound:.1e}"
        return None


def sustained_call_s(call: Callable[[], Any], window_s: float, clock: Callable[[], float] = time.perf_counter) -> float:
    """Seconds of a call when calls go on for `window_s`, without the first third of them."""

    def run(calls: int) -> float:
        start_s, result = clock(), None
        for _ in range(calls):
            del result  # before the call, so that two sets of results never exist at once
            result = call()
        jax.block_until_ready(result)
        return clock() - start_s

    run(1)
    estimate_s = run(_ESTIMATING_CALLS) / _ESTIMATING_CALLS
    calls = max(_LEAST_CALLS, math.ceil(window_s / max(estimate_s, 1e-6)))
    uncounted = math.ceil(calls / 3)
    run(uncounted)
    return run(calls - uncounted) / (calls - uncounted)


def _operands(shape: ChunkShape, seed: int) -> tuple[Array, Array, Array, Array]:
    """Hidden states, weight, offsets and labels."""
    keys = jax.random.split(jax.random.key(seed), 3)
    x = jax.random.normal(keys[0], (shape.C, shape.D), jnp.bfloat16)
    W = (0.02 * jax.random.normal(keys[1], (shape.V, shape.D))).astype(jnp.bfloat16)
    labels = jax.random.randint(keys[2], (shape.C,), 0, shape.V)
    z_y = jnp.sum(x.astype(jnp.float32) * W[labels].astype(jnp.float32), axis=1)
    offset, _ = offset_rows.offset_and_excess(z_y, jnp.zeros_like(z_y))
    return x, W, offset, labels


@functools.partial(jax.jit, static_argnames="options")
def _expected(
    x: Float[Array, "C D"],
    W: Float[Array, "V D"],
    offset: Float[Array, " C"],
    labels: Int[Array, " C"],
    options: RowOptions,
) -> Expected:
    def sum_of(row: tuple[Array, Array, Array]) -> Array:
        own_x, own_offset, label = (part[None] for part in row)
        return xla.exponentials(own_x, W, own_offset, label, None, options, store=False).n[0]

    rows = jnp.linspace(0, x.shape[0] - 1, min(_CHECKED_ROWS, x.shape[0])).astype(jnp.int32)
    sums = lax.map(sum_of, (x, offset, labels), batch_size=_REFERENCE_ROWS)
    E = xla.exponentials(x[rows], W, offset[rows], labels[rows], None, options).E
    assert E is not None
    return Expected(sums, rows, E)


@jax.jit
def _errors(found: Exponentials, expected: Expected) -> dict[str, Array]:
    """Largest relative errors; NaN where there is any."""
    assert found.E is not None
    sums_of_E = jnp.sum(found.E, axis=1, dtype=jnp.float32)
    E, right = found.E[expected.rows].astype(jnp.float32), expected.E.astype(jnp.float32)
    return {
        "sums": jnp.max(jnp.abs(found.n - expected.sums) / expected.sums),
        "E": jnp.max(jnp.where(right > 0, jnp.abs(E - right) / right, jnp.where(E == 0, 0, jnp.inf))),
        "sums of E": jnp.max(jnp.abs(sums_of_E - found.n) / found.n),
    }


def _with_options(
    exponentials: Callable[..., Exponentials], options: RowOptions, x: Array, W: Array, offset: Array, labels: Array
) -> Exponentials:
    return exponentials(x, W, offset, labels, None, options)


def _plain_product(x: Float[Array, "C D"], W: Float[Array, "V D"], *_: Array) -> Float[Array, "C V"]:
    return jnp.matmul(x, W.T)


def _check_device(config: Any) -> None:
    """Tells a configuration that fails from one that takes the device with it."""
    try:
        jax.block_until_ready(jnp.zeros(8) + 1)
    except jax.errors.JaxRuntimeError as error:
        raise RunFailedError(
            f"after {dataclasses.asdict(config)} the device does not work any more: {first_line(error)}"
        ) from None
