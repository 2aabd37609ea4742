"""The paper's microbenchmark, with controls: what does running in chunks do on this device?"""

import dataclasses
import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxchunk import device_memory, lm_head_loss, plotting
from jaxchunk.bench import harness, verdict
from jaxchunk.bench.harness import BenchConfig, Benchmark
from jaxchunk.bench.hlo import softmax_kernels, softmax_survived, surviving_chunks
from jaxchunk.bench.protocol import Measurement, Protocol, Variant
from jaxchunk.bench.softmax_workload import DTYPES, INPUTS, SoftmaxWorkload
from jaxchunk.bench.timeline import record_timeline
from jaxchunk.device_memory import compile_if_it_fits
from jaxchunk.errors import InputError
from jaxchunk.lm_head import choose_implementation
from jaxchunk.plotting.style import read_telemetry
from jaxchunk.run_dir import RunDirectory
from jaxchunk.telemetry.wall_meter import Lag, WallMeter

_logger = logging.getLogger("jaxchunk")
WORKLOADS = ("softmax", "lm_head")
_QUICK_CHUNKS, _QUICK_WINDOW_S, _QUICK_WARMUP = (1, 4, 16), 2.0, 3
_TIMELINE_CALLS = 3


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


def run(config: MicrobenchConfig) -> None:
    """Measures, and writes records, summary, table and figures into the run's directory.

    Raises:
      InputError: a flag is out of its domain, the directory cannot be used, or nothing fits in memory.
      KeyboardInterrupt: it was interrupted; what was measured is kept and reported on.
    """
    validate(config)
    config = _quickened(config) if config.quick else config
    _check_memory(config, device_memory.limit_bytes(jax.devices()[0]))
    programs = Programs(config)
    directory = harness.run(Benchmark("microbench", config, protocol_of(config), programs.variants, programs.report))
    if config.wall_meter is not None:
        print(_set_beside_wall(config.wall_meter, directory))


def protocol_of(config: MicrobenchConfig) -> Protocol:
    """Windows of `iters` calls; with `quick`, of two seconds, for a call can take a second."""
    if config.quick:
        return harness.protocol_of(config, window_s=_QUICK_WINDOW_S, warmup_calls=min(config.warmup, _QUICK_WARMUP))
    return harness.protocol_of(config, calls=config.iters, warmup_calls=config.warmup)


def flops_per_call(config: MicrobenchConfig) -> int:
    """Of the GEMMs alone: two in the paper's workload, three in the LM head."""
    return (4 if config.workload == "softmax" else 6) * config.m * config.k * config.n


class Programs:
    """The compiled variants of a configuration, and what is known about them."""

    def __init__(self, config: MicrobenchConfig):
        self._config = config
        self._calls: dict[str, Variant] = {}
        self._facts: dict[str, dict[str, Any]] = {}
        self._softmax_kernels: dict[str, frozenset[str]] = {}

    def variants(self) -> list[Variant]:
        """Compiles every variant; what does not fit is left out with a word."""
        config, limit = self._config, device_memory.limit_bytes(jax.devices()[0])
        shape = f"M={config.m} K={config.k} N={config.n} {config.dtype}"
        print(f"{jax.devices()[0].device_kind}: {config.workload}, {shape}; compiling ...")
        operands = _Operands(config)
        for softmax in config.softmax:
            for num_chunks in config.chunks:
                call = _workload(config, softmax, num_chunks)
                compiled = compile_if_it_fits(_compiler(call, operands.of(config.inputs[0])), limit)
                label = f"{num_chunks} chunk{'s' if num_chunks > 1 else ''}"
                if isinstance(compiled, str):
                    _logger.warning("%s (%s) is left out: %s", label, softmax, compiled)
                    continue
                for inputs in config.inputs:
                    name = f"{inputs}, {label}" + (f", {softmax}" if len(config.softmax) > 1 else "")
                    factors = {"inputs": inputs, "chunks": num_chunks, "softmax": softmax}
                    self._add(name, compiled, operands, factors)
        if not self._calls:
            raise InputError("nothing fits in the device's memory; use smaller --m or --n")
        return list(self._calls.values())

    def _add(self, name: str, compiled: Any, operands: "_Operands", factors: dict[str, Any]) -> None:
        program, memory = compiled
        survived = surviving_chunks(program, 2 if self._config.workload == "softmax" else 3)
        self._facts[name] = {
            "chunks_in_hlo": survived,
            "softmax_in_hlo": softmax_survived(program) if self._config.workload == "softmax" else None,
            "memory_bytes": memory.total_bytes,
            "temporary_bytes": memory.temporary_bytes,
        }
        if survived != factors["chunks"]:
            _logger.warning("%s: the compiled program has %s chunks, not %s", name, survived, factors["chunks"])
        self._softmax_kernels[name] = softmax_kernels(program)
        inputs = factors["inputs"]
        self._calls[name] = Variant(
            name, lambda: program(*operands.of(inputs)), prepare=lambda: operands.of(inputs), factors=factors
        )

    def report(self, directory: RunDirectory, measurements: Sequence[Measurement]) -> str:
        """Summary, table, verdict and figures."""
        config = self._config
        comparison = verdict.compare(measurements, flops_per_call(config), self._facts)
        directory.write_json("summary.json", dataclasses.asdict(comparison) | {"paper": verdict.PAPER})
        table = verdict.table(comparison)
        page = [table, *comparison.sentences, verdict.paper_lines()]
        (directory.path / "table.md").write_text("\n\n".join(page) + "\n")
        if config.timeline and jax.default_backend() == "gpu":
            self._record_timelines(directory, comparison)
        lines = [table, *comparison.sentences]
        lines += [f"figure: {path}" for path in plotting.plot_microbench(directory.path)]
        return "\n".join(lines)

    def _record_timelines(self, directory: RunDirectory, comparison: verdict.Comparison) -> None:
        """Of one chunk and of the best count, where they are not there already; `timelines.json` names them."""
        shown = verdict.pair_to_show(comparison)
        before = directory.read_json("timelines.json") or {}
        for label, name in shown.items():
            path = directory.path / f"timeline-{label}.jsonl"
            if name not in self._calls or (path.exists() and before.get(label) == name):
                continue
            kernels = self._softmax_kernels[name]
            try:
                call = self._calls[name].call
                reason = record_timeline(call, path, calls=_TIMELINE_CALLS, softmax_kernels=kernels).null_reason
            except (RuntimeError, OSError, ValueError) as error:  # the profiler's; the figures go on without it
                reason = f"{type(error).__name__}: {error}"
            if reason is not None:
                _logger.warning("no timeline: %s", reason)
        directory.write_json("timelines.json", shown)


def _compiler(call: Any, arguments: tuple[Array, ...]) -> Callable[[], jax.stages.Compiled]:
    return lambda: jax.jit(call).lower(*arguments).compile()


def _workload(config: MicrobenchConfig, softmax: str, num_chunks: int) -> Any:
    """The function of one iteration. A scalar beside the result: its completion can be watched without holding it."""
    if config.workload == "softmax":
        workload = SoftmaxWorkload(config.m, config.k, config.n, config.dtype, softmax)

        def accumulate(a: Array, b: Array) -> tuple[Array, Array]:
            accumulator = workload.accumulate(a, b, num_chunks)
            return accumulator[0, 0], accumulator

        return accumulate
    loss = functools.partial(lm_head_loss, num_chunks=num_chunks, implementation=softmax)
    return jax.value_and_grad(loss, (0, 1))


class _Operands:
    """The operands of one kind of inputs at a time, so that only these take memory while it is measured."""

    def __init__(self, config: MicrobenchConfig):
        self._config = config
        self._inputs: str | None = None
        self._arrays: tuple[Array, ...] = ()

    def of(self, inputs: str) -> tuple[Array, ...]:
        """The operands; made anew, to the same bits, where the last ones asked for were others."""
        if inputs != self._inputs:
            self._arrays = ()  # before the new ones are made
            self._arrays = jax.block_until_ready(self._made(inputs))
            self._inputs = inputs
        return self._arrays

    def _made(self, inputs: str) -> tuple[Array, ...]:
        config = self._config
        workload = SoftmaxWorkload(config.m, config.k, config.n, config.dtype, "xla")
        a, b = workload.operands(inputs, config.seed, logit_std=config.logit_std)
        if config.workload == "softmax":
            return a, b
        labels = jax.random.randint(jax.random.key(config.seed), (config.m,), 0, config.n)
        return a, b.T.astype(jnp.float32), labels  # a trainer's master copy


def _quickened(config: MicrobenchConfig) -> MicrobenchConfig:
    chunks = config.chunks
    if len(chunks) > len(_QUICK_CHUNKS):
        chunks = _QUICK_CHUNKS if set(_QUICK_CHUNKS) <= set(chunks) else chunks[: len(_QUICK_CHUNKS)]
    return dataclasses.replace(config, chunks=chunks, inputs=config.inputs[:1], settle_s=min(config.settle_s, 5.0))


def _check_memory(config: MicrobenchConfig, limit_bytes: int | None) -> None:
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
            f"{num_chunks} {'chunk' if num_chunks == 1 else 'chunks'}, and {usable / 1e9:.1f} GB can be used; {advice}"
        )
        if num_chunks == max(config.chunks):
            raise InputError(obstacle)
        _logger.warning("warning: %s", obstacle)


def _halvings(n: int) -> Iterator[int]:
    while n > 1:
        n //= 2
        yield n


def _set_beside_wall(csv_path: str, directory: RunDirectory) -> str:
    """Joules at the wall in every window, beside those of the GPU's rail, and how far the clocks are apart."""
    meter = WallMeter.from_csv(csv_path)
    zero_unix_s = directory.read_json("run.json")["began_unix_s"]
    rows, walls = [], []
    for m in harness.read_measurements(directory.path):
        wall = meter.energy(zero_unix_s + m.start_s, zero_unix_s + m.end_s)
        walls.append(wall)
        gpu_j = None if m.energy_j is None else m.energy_j * m.calls
        rows.append({"variant": m.variant, "repeat": m.repeat, "gpu_j": gpu_j, "wall": wall._asdict()})
    lag = _lag_of(meter, directory.path / "telemetry.csv", zero_unix_s)
    directory.write_json("wall.json", {"lag": lag._asdict(), "windows": rows})
    clocks = f"its clock is {lag.lag_s:+.1f} s off the host's" if lag.lag_s is not None else lag.null_reason
    known = [wall.energy_j for wall in walls if wall.energy_j is not None]
    return (
        f"wall meter {csv_path}: {sum(known):.0f} J at the wall in {len(known)} of {len(rows)} windows (wall.json); "
        f"{clocks}"
    )


def _lag_of(meter: WallMeter, telemetry: Path, zero_unix_s: float) -> Lag:
    columns = read_telemetry(telemetry)
    if columns is None:
        return Lag(None, None, "without power of the GPU, whether the clocks agree is not known")
    known = np.isfinite(columns["power_w"])
    return meter.best_lag(zero_unix_s + columns["time_s"][known], columns["power_w"][known])


def _words(values: Sequence[Any]) -> str:
    return " ".join(map(str, values)) or "empty"
