"""The paper's microbenchmark, with controls: what does running in chunks do on this device?"""

import dataclasses
import functools
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxchunk import device_memory, lm_head_loss
from jaxchunk.bench import verdict
from jaxchunk.bench.figures import plot_microbench
from jaxchunk.bench.hlo import softmax_kernels, softmax_survived, surviving_chunks
from jaxchunk.bench.microbench_config import (
    MicrobenchConfig,
    check_memory,
    flops_per_call,
    protocol_of,
    quickened,
    validate,
)
from jaxchunk.bench.softmax_workload import SoftmaxWorkload
from jaxchunk.bench.timeline import record_timeline
from jaxchunk.device_memory import compile_if_it_fits
from jaxchunk.errors import InputError
from jaxchunk.measuring import harness
from jaxchunk.measuring.harness import Benchmark
from jaxchunk.measuring.protocol import Measurement, Variant
from jaxchunk.plotting.style import read_telemetry
from jaxchunk.run_dir import RunDirectory
from jaxchunk.telemetry.wall_meter import Lag, WallMeter
from jaxchunk.words import chunks_in_words

_logger = logging.getLogger("jaxchunk")
_TIMELINE_CALLS = 3


def run(config: MicrobenchConfig) -> None:
    """Measures, and writes records, summary, table and figures into the run's directory.

    Raises:
      InputError: a flag is out of its domain, the directory cannot be used, or nothing fits in memory.
      KeyboardInterrupt: it was interrupted; what was measured is kept and reported on.
    """
    validate(config)
    config = quickened(config) if config.quick else config
    check_memory(config, device_memory.limit_bytes(jax.devices()[0]))
    programs = Programs(config)
    directory = harness.run(Benchmark("microbench", config, protocol_of(config), programs.variants, programs.report))
    if config.wall_meter is not None:
        print(_set_beside_wall(config.wall_meter, directory))


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
                label = chunks_in_words(num_chunks)
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
        peak_bytes = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")  # of the hungriest variant
        summary = dataclasses.asdict(comparison) | {"peak_memory_bytes": peak_bytes, "paper": verdict.PAPER}
        directory.write_json("summary.json", summary)
        table = verdict.table(comparison)
        page = [table, *comparison.sentences, verdict.paper_lines()]
        (directory.path / "table.md").write_text("\n\n".join(page) + "\n")
        if config.timeline and jax.default_backend() == "gpu":
            self._record_timelines(directory, comparison)
        lines = [table, *comparison.sentences]
        lines += [f"figure: {path}" for path in plot_microbench(directory.path)]
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
