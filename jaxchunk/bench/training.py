"""The trainer at several chunk counts at thermal steady state, interleaved, and beside others' trainers if asked for.

One training run goes on throughout; from piece to piece its step is compiled for another chunk count. So every arm has
the same parameters, data and temperature, and a memory of one run is enough. With peers, ours is a process and each of
theirs is one (`step_process`): together they need more memory than there is.
"""

import dataclasses
import json
import logging
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax

from jaxchunk import data, plotting
from jaxchunk.bench import training_peers
from jaxchunk.bench.peers import ALL
from jaxchunk.bench.step_process import StepProcesses
from jaxchunk.bench.training_summary import summarize, table
from jaxchunk.compilation import keep_programs
from jaxchunk.errors import InputError, RunFailedError
from jaxchunk.measuring import harness
from jaxchunk.measuring.harness import BenchConfig, Benchmark
from jaxchunk.measuring.protocol import Measurement, Variant
from jaxchunk.models import qwen2
from jaxchunk.run_dir import RunDirectory
from jaxchunk.training import config as training_config
from jaxchunk.training.config import TrainConfig
from jaxchunk.training.mesh import choose_devices
from jaxchunk.training.plan import Plan, prepare
from jaxchunk.words import chunks_in_words

_logger = logging.getLogger("jaxchunk")
OURS = "jaxchunk"
_FROM_TRAINER = (
    *("model", "data", "seq_len", "batch_size", "micro_batch_size", "lmhead_impl", "elementwise", "remat", "seed"),
    "cache_dir",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingBenchConfig(BenchConfig):
    """Pieces of training at each chunk count, in turn."""

    chunks: tuple[int, ...] = (1, 4)
    """Chunk counts of the LM head; the first is what the others are compared with."""
    peers: tuple[str, ...] = ()
    """Training steps of others, in the same run: liger, transformers, torch_compile (weights, gradients and moments in
    bfloat16), liger_autocast, transformers_autocast (float32 weights), or all that can be imported here. Ours is
    compared with each. Qwen2 sizes only."""
    piece_s: float = 60.0
    """Least length of a piece in seconds; an arm gets --repeats of them, with as many steps in each arm."""
    model: Literal["tiny", "qwen2-0.5b", "qwen2-1.5b", "qwen2-7b"] = "tiny"
    """Size of the Qwen2 model."""
    data: str | None = None
    """Training text, as for train.py."""
    seq_len: int = 128
    """Tokens in a sequence."""
    batch_size: int = 8
    """Sequences in a step."""
    micro_batch_size: int | None = None
    """Sequences in a micro-batch. Default: as many as fit in memory. That of the peers is always found."""
    lmhead_impl: str | None = None
    """Implementation of the LM head's loss. Default: by device."""
    elementwise: Literal["pallas", "xla"] | None = None
    """Our norms and SwiGLU, as for train.py."""
    remat: qwen2.Remat = "none"
    """What our backward pass recomputes, as for train.py."""
    cache_dir: str | None = None
    """Where tokens and compiled programs are kept. Default: jaxchunk under the user's cache directory."""
    compilation_cache: bool = True
    """Take our programs from cache_dir where they were compiled before, with the kernels that were chosen then."""


def default_config(platform: str) -> TrainingBenchConfig:
    """Eight minutes an arm of Qwen2-0.5B on a GPU; the tiny model for some seconds on a CPU."""
    if platform == "gpu":
        trainer = training_config.default_config(platform)
        return TrainingBenchConfig(
            model=trainer.model, seq_len=trainer.seq_len, batch_size=trainer.batch_size, repeats=8, settle_s=60.0
        )
    return TrainingBenchConfig(piece_s=2.0, repeats=3, settle_s=0.0)


def run(config: TrainingBenchConfig, environment: Mapping[str, str]) -> None:
    """Measures, and writes records, summary, table and figure into the run's directory.

    Args:
      config: what to measure.
      environment: variables of the processes that train beside peers.

    Raises:
      InputError: a flag is out of its domain, or the directory, the data or the memory do not serve.
      RunFailedError: the loss became NaN or infinite, which changes what the GPU draws, or a process ended by itself.
      KeyboardInterrupt: it was interrupted; what was measured is kept and reported on.
    """
    harness.check_common(config)
    if len(set(config.chunks)) != len(config.chunks) or min(config.chunks, default=0) < 1:
        raise InputError(f"--chunks is {' '.join(map(str, config.chunks))}; give different counts from 1")
    if len(config.chunks) < 2 and not config.peers:
        raise InputError(f"--chunks is {' '.join(map(str, config.chunks))}; give two or more, or --peers")
    if not 0 < config.piece_s < math.inf:
        raise InputError(f"--piece_s is {config.piece_s}; it must be greater than 0, and finite")
    peers = training_peers.choose(config.peers)
    processes = StepProcesses({name: _command(name, config) for name in (OURS, *peers)}, environment)
    latest: dict[str, Any] = {}  # the metrics of each trainer's latest step

    def variants() -> list[Variant]:
        if not peers:
            return own_variants(config, latest)
        found: list[Variant] = []
        for name in (*peers, OURS):
            try:
                found += [_noting(variant, latest) for variant in processes.variants(name)]
            except RunFailedError as error:
                if name == OURS or ALL not in config.peers:
                    raise
                _logger.warning("%s is left out: %s", name, error)
        return found

    def report(directory: RunDirectory, measurements: Sequence[Measurement]) -> str:
        return _report(directory, measurements, config.batch_size * config.seq_len)

    protocol = harness.protocol_of(config, window_s=config.piece_s, same_calls=True)
    try:
        harness.run(Benchmark("training", config, protocol, variants, report, num_processes=2 if peers else 1))
    finally:
        processes.close()
    for name, metrics in latest.items():
        if not math.isfinite(loss := float(metrics.loss)):
            raise RunFailedError(f"the loss of {name} is {loss} at the end: take nothing from the figures of this run")


def own_variants(config: TrainingBenchConfig, latest: dict[str, Any]) -> list[Variant]:
    """One training state, and a step for each chunk count that moves it on; `latest` holds the newest metrics."""
    base = trainer_config(config)
    plans = [_prepare(base, chunks) for chunks in config.chunks]
    # Fewer chunks leave less room. The arms are to differ in their chunks only.
    smallest = min(plan.programs.memory_plan.micro_batch_size for plan in plans)
    base = dataclasses.replace(base, micro_batch_size=smallest)
    plans = [
        plan if plan.programs.memory_plan.micro_batch_size == smallest else _prepare(base, chunks)
        for plan, chunks in zip(plans, config.chunks, strict=True)
    ]
    shared: dict[str, Any] = {"state": plans[0].programs.init(jax.random.key(config.seed), None)}

    def stepping(train_step: Callable[..., Any]) -> Callable[[], Any]:
        def step() -> Any:
            shared["state"], latest[OURS] = train_step(shared["state"], next(plans[0].batches))
            return latest[OURS]

        return step

    return [
        Variant(
            chunks_in_words(chunks),
            stepping(plan.programs.train_step),
            factors={
                "chunks": chunks,
                "micro_batch_size": plan.programs.memory_plan.micro_batch_size,
                "memory_bytes": plan.programs.memory_plan.memory.total_bytes,
                "weights": "float32",
            },
        )
        for chunks, plan in zip(config.chunks, plans, strict=True)
    ]


def trainer_config(config: TrainingBenchConfig) -> TrainConfig:
    """The trainer's flags, without a chunk count; those that the benchmark does not have are its defaults."""
    base = training_config.default_config(jax.default_backend())
    return dataclasses.replace(base, **{name: getattr(config, name) for name in _FROM_TRAINER})


def keep_own_programs(config: TrainingBenchConfig) -> None:
    """Turns JAX's cache on, as the flags say; before the first compilation."""
    if config.compilation_cache:
        keep_programs(Path(config.cache_dir) if config.cache_dir else data.default_cache_dir())


def _command(name: str, config: TrainingBenchConfig) -> list[str]:
    return [sys.executable, "-m", "jaxchunk.bench.training_worker", name, json.dumps(dataclasses.asdict(config))]


def _noting(variant: Variant, latest: dict[str, Any]) -> Variant:
    def call() -> Any:
        latest[variant.name] = variant.call()
        return latest[variant.name]

    return dataclasses.replace(variant, call=call)


def _prepare(base: TrainConfig, chunks: int) -> Plan:
    arm = dataclasses.replace(base, lmhead_chunks=chunks, mesh_data=1)
    training_config.validate(arm)
    print(f"compiling {arm.model} with {chunks} chunk(s) ...", flush=True)
    return prepare(arm, choose_devices(arm, jax.devices()))


def _report(directory: RunDirectory, measurements: Sequence[Measurement], tokens: int) -> str:
    rows = summarize(measurements, tokens)
    directory.write_json("summary.json", {"arms": rows})
    (directory.path / "table.md").write_text(table(rows) + "\n")
    lines = [table(rows)]
    if rows and rows[0]["energy_null_reason"] is not None:
        lines.append(f"energy null: {rows[0]['energy_null_reason']}")
    return "\n".join([*lines, f"figure: {plotting.plot_training_arms(directory.path)}"])
