"""Finds the fastest tiles of a fused kernel, shape by shape, and writes the table that kernels choose from.

A search (`descent`) evaluates configurations one by one; those that come close to the best are measured again, in turn
with each other and with cuBLAS's plain product, and the fastest of these is taken.
"""

import dataclasses
import datetime
import math
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import jax

from jaxchunk import environment
from jaxchunk.bench import descent, tuning_report
from jaxchunk.bench.kernel_timing import ChunkShape, KernelBench, parse_shape
from jaxchunk.bench.tunable_kernels import TunableKernel, kernel_named
from jaxchunk.bench.tuning_log import Bench, TuningLog
from jaxchunk.bench.tuning_report import brief
from jaxchunk.bench.tuning_table import check_table
from jaxchunk.errors import InputError, RunFailedError
from jaxchunk.lm_head import dispatch
from jaxchunk.measuring import harness, preflight
from jaxchunk.measuring.harness import OutputConfig
from jaxchunk.run_dir import RunDirectory, new_run_path
from jaxchunk.stop import StopRequest
from jaxchunk.telemetry import open_monitor

_CLOSE = 1.03  # to the best time of the search: measured again
_FIXED = ("kernel", "window_s", "seed")  # flags that must not differ between a run and its continuation


@dataclasses.dataclass(frozen=True, kw_only=True)
class TuneConfig(OutputConfig):
    """Tile configurations of the fused kernels."""

    shapes: tuple[str, ...] = ("8192x896x151936", "4096x4096x128256", "4096x3584x152064")
    """Rows of a chunk x width x vocabulary. The default: Qwen2-0.5B, Llama-3 8B, Qwen2.5 7B."""
    kernel: Literal["mosaic", "triton_gemm"] | None = None
    """Which kernel. Default: the one that "fused" takes on this device."""
    budget_s: float = 300.0
    """Time for the search at each shape, seconds; what an interrupted run spent counts."""
    window_s: float = 0.25
    """Length of a window of back-to-back calls, seconds; its first third does not count."""
    rounds: int = 5
    """Times that the best are measured again, in an order shuffled anew each time."""
    finalists: int = 8
    """At most so many of those within 3% of the best are measured again."""
    hang_s: float = 120.0
    """A configuration that takes longer than this, seconds, compilation included, hangs: the process ends, and
    --continue goes on without it."""
    seed: int = 0
    """Seed of the operands and of the order."""
    write_table: str | None = None
    """A table to put the results into as well, such as jaxchunk/lm_head/kernels/tuned.json. They are in the run's
    tuned.json anyway, which the environment variable JAXCHUNK_TUNED can name."""


@dataclasses.dataclass(frozen=True)
class Machine:
    """Where kernels run.

    Attributes:
      device: JAX's device_kind.
      kernels: that it can run, the one that "fused" takes first.
      describe: everything about it, for `env.json`, and warnings.
      bench: makes what evaluates a kernel at a shape.
    """

    device: str
    kernels: tuple[str, ...]
    describe: Callable[[], tuple[dict[str, Any], list[str]]]
    bench: Callable[[TunableKernel[Any], ChunkShape, TuneConfig], Bench]


def this_machine() -> Machine:
    """The GPU that JAX runs on.

    Raises:
      InputError: there is none.
    """
    if (platform := dispatch.default_platform()) not in ("gpu", "cuda"):
        raise InputError(f"tuning kernels needs an NVIDIA GPU, and JAX runs on {platform}")

    def describe() -> tuple[dict[str, Any], list[str]]:
        monitor = open_monitor(jax.devices()[0])
        return environment.describe_environment(monitor.describe()), preflight.other_processes(monitor)

    return Machine(
        jax.devices()[0].device_kind,
        ("mosaic", "triton_gemm") if dispatch.is_hopper() else ("triton_gemm",),
        describe,
        lambda kernel, shape, config: KernelBench(kernel, shape, window_s=config.window_s, seed=config.seed),
    )


def run(config: TuneConfig, machine: Machine | None = None) -> Path:
    """Tunes shape after shape; what is found is written down as it is.

    Args:
      config: the flags.
      machine: where kernels run; None is the GPU that JAX runs on.

    Returns:
      The run's directory, with `records.jsonl`, `table.md` and `tuned.json`.

    Raises:
      InputError: there is no GPU, a flag is out of its domain, or the directory or the table cannot be used.
      RunFailedError: a configuration took the device with it, or none works at some shape.
      KeyboardInterrupt: Ctrl-C or SIGTERM came; `--continue` goes on. The first lets a running attempt come to its end.
    """
    shapes = validate(config)
    machine = machine or this_machine()
    kernel = _kernel(config, shapes, machine)
    path = config.out_dir or new_run_path("tune-kernels")
    directory = RunDirectory(path, overwrite=config.overwrite, go_on=config.go_on)
    flags = dataclasses.asdict(config) | {"kernel": kernel.name}
    if directory.goes_on:
        harness.check_unchanged(directory, {name: flags[name] for name in _FIXED}, machine.device)
    with directory, StopRequest() as stop:
        about, warnings = machine.describe()
        for warning in warnings:
            print(f"warning: {warning}")
        if not (directory.path / "config.json").exists():
            directory.write_json("config.json", flags)
            directory.write_json("env.json", about | {"device_kind": machine.device})
        else:
            directory.append("continued.jsonl", {"unix_s": time.time(), "flags": flags, "env": about})
        failed = []
        try:
            for shape in shapes:
                log = _log(directory, kernel, shape, config, stop)
                if log.result() is not None:
                    print(f"{shape}: done before")
                elif not _tune(log, kernel, shape, config, machine):
                    failed.append(str(shape))
        except KeyboardInterrupt:
            print(f"interrupted: go on with the same flags and --continue --out_dir {directory.path}")
            raise
        finally:
            logs = {shape: _log(directory, kernel, shape, config, stop) for shape in shapes}
            table = None if config.write_table is None else Path(config.write_table)
            print(tuning_report.report(directory, kernel.name, machine.device, logs, table))
    if failed:
        raise RunFailedError(f"no configuration works at {', '.join(failed)}; records.jsonl has the reasons")
    return directory.path


def validate(config: TuneConfig) -> list[ChunkShape]:
    """Refuses what cannot run, and reads the shapes.

    Raises:
      InputError: naming the flag, its value and what is needed.
    """
    harness.check_output(config)
    harness.check_seed(config.seed)
    for name in ("budget_s", "window_s", "hang_s"):
        if not 0 < getattr(config, name) < math.inf:
            raise InputError(f"--{name} is {getattr(config, name)}; it must be greater than 0, and finite")
    for name in ("rounds", "finalists"):
        if getattr(config, name) < 1:
            raise InputError(f"--{name} is {getattr(config, name)}; it must be at least 1")
    shapes = [parse_shape(text) for text in config.shapes]
    if not shapes or len(set(shapes)) < len(shapes):
        raise InputError(f"--shapes is {' '.join(config.shapes)}; give each shape once")
    if config.write_table is not None:
        check_table(Path(config.write_table))
    return shapes


def _kernel(config: TuneConfig, shapes: Sequence[ChunkShape], machine: Machine) -> TunableKernel[Any]:
    name = config.kernel or machine.kernels[0]
    if name not in machine.kernels:
        raise InputError(
            f"--kernel {name} needs a Hopper GPU and JAX 0.11, and this is {machine.device}, JAX {jax.__version__}"
        )
    kernel = kernel_named(name)
    multiples = ", ".join(map(str, kernel.multiples))
    for shape in shapes:
        if any(size % multiple for size, multiple in zip(shape, kernel.multiples, strict=True)):
            raise InputError(f"--shapes has {shape}; for {name} its sizes must be multiples of {multiples}")
    return kernel


def _log(
    directory: RunDirectory, kernel: TunableKernel[Any], shape: ChunkShape, config: TuneConfig, stop: StopRequest
) -> TuningLog[Any]:
    return TuningLog(directory, str(shape), kernel.config_type, hang_s=config.hang_s, check=stop.check)


def _tune(
    log: TuningLog[Any], kernel: TunableKernel[Any], shape: ChunkShape, config: TuneConfig, machine: Machine
) -> bool:
    """Searches, then measures the best again; False where nothing works."""
    print(f"{shape}: operands and what is right for them ...", flush=True)
    with harness.memory_errors():
        bench = machine.bench(kernel, shape, config)
    known = {candidate: evaluation.milliseconds for candidate, evaluation in log.known().items()}
    if known:
        print(f"{shape}: known already: {tuning_report.outcomes(log)}", flush=True)
    best = min((milliseconds for milliseconds in known.values() if milliseconds is not None), default=math.inf)

    def evaluate(candidate: Any) -> float | None:
        nonlocal best
        milliseconds, found = log.evaluate(bench, candidate)
        if milliseconds is not None:
            best = min(best, milliseconds)
            found = f"{milliseconds:.3f} ms (best {best:.3f})"
        print(f"{shape}: {brief(candidate)}: {found}", flush=True)
        return milliseconds

    starts = list(dict.fromkeys((kernel.config_type(), kernel.chosen(*shape))))
    left_s = config.budget_s - log.spent_s()
    search = descent.search(kernel.space, starts, evaluate, budget_s=left_s, known=known)
    close = search.within(_CLOSE)[: config.finalists]
    if not close:
        return False
    print(f"{shape}: {len(close)} within {_CLOSE - 1:.0%} of the best, again in {config.rounds} rounds ...", flush=True)
    log.write("final", configs=[dataclasses.asdict(candidate) for candidate in close])
    for number in range(config.rounds):
        contestants = [None, *close]
        random.Random(f"{config.seed} {number}").shuffle(contestants)
        for contestant in contestants:
            log.time(bench, contestant, number)
    log.write("tuned", search_finished=search.finished, jax_version=jax.__version__, date=str(datetime.date.today()))
    return True
