"""Flags of the microbenchmark, what they default to, and which of them cannot be."""

import dataclasses
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jaxchunk import device_memory
from jaxchunk.bench.softmax_workload import DTYPES, INPUTS, SoftmaxWorkload
from jaxchunk.errors import InputError
from jaxchunk.lm_head import choose_implementation
from jaxchunk.measuring import harness
from jaxchunk.measuring.harness import BenchConfig
from jaxchunk.measuring.protocol import Protocol
from jaxchunk.words import chunks_in_words

_logger = logging.getLogger("jaxchunk")
WORKLOADS = ("softmax", "lm_head")
_QUICK_CHUNKS, _QUICK_WINDOW_S, _QUICK_WARMUP = (1, 4, 16), 2.0, 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class MicrobenchConfig(BenchConfig):
    """Matmul, softmax in place, accumulating matmul, in chunks."""

    workload: str = "softmax"
    """softmax: the paper's (A B, softmax, A^T times that). lm_head: the loss and its gradients, with T=M, D=K, V=N."""
    m: int = 2048
    """M, rows; they are what is chunked."""
    k: int = 128
    """K, the width."""
    n: int = 8192
    """N, columns."""
    chunks: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    """Chunk counts to measure."""
    inputs: tuple[str, ...] = ("random", "zero")
    """Operands: zeros draw less power at the same arithmetic, a control for everything that is not power."""
    softmax: tuple[str, ...] = ("xla",)
    """Who does the softmax: pallas (one kernel in place; NVIDIA GPUs), xla. For lm_head: the implementation."""
    dtype: str = "float32"
    """Of the operands."""
    logit_std: float = 1.0
    """Standard deviation of the logits of random operands."""
    warmup: int = 10
    """Iterations before each window."""
    iters: int = 100
    """Iterations in a window."""
    quick: bool = False
    """About two minutes on a GPU: at most three chunk counts (of 1 4 16 where three of --chunks are not given), the
    first of --inputs, windows of two seconds in place of --iters."""
    timeline: bool = True
    """Record the kernels of one iteration with JAX's profiler at the end (GPUs only)."""
    wall_meter: str | None = None
    """CSV of a wall-socket meter (timestamp, W) that covers the run, to be set beside the GPU's own joules."""


def default_config(platform: str) -> MicrobenchConfig:
    """The paper's shape on a GPU, one that takes a minute on a CPU."""
    if platform == "gpu":
        return MicrobenchConfig(m=32768, k=2048, n=131072, softmax=("pallas",), dtype="bfloat16")
    return MicrobenchConfig(repeats=5, iters=10, warmup=2, settle_s=0.0)


def validate(config: MicrobenchConfig) -> None:
    """Refuses what cannot run.

    Raises:
      InputError: naming the flag, its value and what is needed.
    """
    harness.check_common(config)
    for name, least in (("m", 1), ("k", 1), ("n", 1), ("iters", 1), ("warmup", 0)):
        if getattr(config, name) < least:
            raise InputError(f"--{name} is {getattr(config, name)}; it must be at least {least}")
    if not config.chunks or min(config.chunks) < 1 or max(config.chunks) > config.m:
        raise InputError(f"--chunks is {_words(config.chunks)}; give counts from 1 to --m, {config.m}")
    allowed = {"workload": WORKLOADS, "inputs": INPUTS, "dtype": DTYPES, "softmax": ("pallas", "xla")}
    for name, choices in allowed.items():
        given = getattr(config, name)
        given = (given,) if isinstance(given, str) else given
        if not given or not set(given) <= set(choices):
            raise InputError(f"--{name} is {_words(given)}; choose from {', '.join(choices)}")
    for softmax in config.softmax:
        try:
            choose_implementation(softmax, compute_dtype=config.dtype)
        except ValueError as error:
            raise InputError(f"--softmax: {error}") from None
    if (
        config.wall_meter is not None
        and not Path(config.wall_meter).exists()
        and not Path(config.wall_meter).parent.exists()
    ):
        raise InputError(f"--wall_meter is {config.wall_meter}; there is no such directory")


def protocol_of(config: MicrobenchConfig) -> Protocol:
    """Windows of `iters` calls; with `quick`, of two seconds, for a call can take a second."""
    if config.quick:
        return harness.protocol_of(config, window_s=_QUICK_WINDOW_S, warmup_calls=min(config.warmup, _QUICK_WARMUP))
    return harness.protocol_of(config, calls=config.iters, warmup_calls=config.warmup)


def flops_per_call(config: MicrobenchConfig) -> int:
    """Of the GEMMs alone, two in the paper's workload and three in the LM head; padding and softmax do not count."""
    return (4 if config.workload == "softmax" else 6) * config.m * config.k * config.n


def quickened(config: MicrobenchConfig) -> MicrobenchConfig:
    """What `quick` leaves of a configuration."""
    chunks = config.chunks
    if len(chunks) > len(_QUICK_CHUNKS):
        chunks = _QUICK_CHUNKS if set(_QUICK_CHUNKS) <= set(chunks) else chunks[: len(_QUICK_CHUNKS)]
    return dataclasses.replace(config, chunks=chunks, inputs=config.inputs[:1], settle_s=min(config.settle_s, 5.0))


def check_memory(config: MicrobenchConfig, limit_bytes: int | None) -> None:
    """Says before anything is compiled what is needed and what would fit.

    One chunk needs the most, and without it there is nothing to compare with: where it alone does not fit, that is a
    warning.

    Raises:
      InputError: not even the largest chunk count fits.
    """
    if limit_bytes is None or config.workload != "softmax":
        return

    def needed(n: int, num_chunks: int) -> int:
        workload = SoftmaxWorkload(config.m, config.k, n, config.dtype, config.softmax[0])
        return workload.memory_bytes(num_chunks)

    usable = device_memory.usable(limit_bytes)
    for num_chunks in (max(config.chunks), min(config.chunks)):
        if needed(config.n, num_chunks) <= usable:
            continue
        fits = next((n for n in _halvings(config.n) if needed(n, num_chunks) <= usable), None)
        advice = f"--n {fits} would fit" if fits else "use a smaller --m as well"
        obstacle = (
            f"--m {config.m} --k {config.k} --n {config.n} needs about {needed(config.n, num_chunks) / 1e9:.1f} GB at "
            f"{chunks_in_words(num_chunks)}, and {usable / 1e9:.1f} GB can be used; {advice}"
        )
        if num_chunks == max(config.chunks):
            raise InputError(obstacle)
        _logger.warning("warning: %s", obstacle)


def _halvings(n: int) -> Iterator[int]:
    while n > 1:
        n //= 2
        yield n


def _words(values: Sequence[Any]) -> str:
    return " ".join(map(str, values)) or "empty"
