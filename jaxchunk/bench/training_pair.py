"""The trainer at several chunk counts at thermal steady state: the paper's training experiment, interleaved.

One training run goes on throughout; from piece to piece its step is compiled for another chunk count. So every arm has
the same parameters, data and temperature, and a memory of one run is enough.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax

from jaxchunk import plotting
from jaxchunk.bench import harness
from jaxchunk.bench.harness import BenchConfig, Benchmark
from jaxchunk.bench.protocol import Measurement, Variant
from jaxchunk.bench.statistics import Interval, interval_of, ratio_of
from jaxchunk.errors import InputError, RunFailedError
from jaxchunk.run_dir import RunDirectory
from jaxchunk.training import config as training_config
from jaxchunk.training.config import TrainConfig
from jaxchunk.training.mesh import choose_devices
from jaxchunk.training.plan import Plan, prepare


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingPairConfig(BenchConfig):
    """Pieces of training at each chunk count, in turn."""

    chunks: tuple[int, ...] = (1, 4)
    """Chunk counts of the LM head; the first is what the others are compared with."""
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
    """Sequences in a micro-batch. Default: as many as fit in memory."""
    lmhead_impl: str | None = None
    """Implementation of the LM head's loss. Default: by device."""


def default_config(platform: str) -> TrainingPairConfig:
    """Eight minutes an arm of Qwen2-0.5B on a GPU; the tiny model for some seconds on a CPU."""
    if platform == "gpu":
        trainer = training_config.default_config(platform)
        return TrainingPairConfig(
            model=trainer.model, seq_len=trainer.seq_len, batch_size=trainer.batch_size, repeats=8, settle_s=60.0
        )
    return TrainingPairConfig(piece_s=2.0, repeats=3, settle_s=0.0)


def run(config: TrainingPairConfig) -> None:
    """Measures, and writes records, summary, table and figure into the run's directory.

    Raises:
      InputError: a flag is out of its domain, or the directory, the data or the memory do not serve.
      RunFailedError: the loss became NaN or infinite, which changes what the GPU draws.
      KeyboardInterrupt: it was interrupted; what was measured is kept and reported on.
    """
    harness.check_common(config)
    if len(config.chunks) < 2 or len(set(config.chunks)) != len(config.chunks) or min(config.chunks) < 1:
        raise InputError(f"--chunks is {' '.join(map(str, config.chunks))}; give two or more different counts from 1")
    if not 0 < config.piece_s < math.inf:
        raise InputError(f"--piece_s is {config.piece_s}; it must be greater than 0, and finite")
    protocol = harness.protocol_of(config, window_s=config.piece_s, same_calls=True)
    tokens = config.batch_size * config.seq_len
    latest: dict[str, Any] = {}  # the metrics of the latest step
    harness.run(
        Benchmark(
            "training-pair",
            config,
            protocol,
            lambda: _variants(config, latest),
            lambda directory, measurements: _report(directory, measurements, config, tokens),
        )
    )
    if "metrics" in latest and not math.isfinite(loss := float(latest["metrics"].loss)):
        raise RunFailedError(f"the loss is {loss} at the end: take nothing from the figures of this run")


def _variants(config: TrainingPairConfig, latest: dict[str, Any]) -> list[Variant]:
    """One training state, and a step for each chunk count that moves it on."""
    base = training_config.default_config(jax.default_backend())
    names = ("model", "data", "seq_len", "batch_size", "micro_batch_size", "lmhead_impl", "seed")
    base = dataclasses.replace(base, **{name: getattr(config, name) for name in names})
    plans = [_prepare(base, chunks) for chunks in config.chunks]
    # Fewer chunks leave less room. The arms are to differ in their chunks only.
    smallest = min(plan.programs.memory_plan.micro_batch_size for plan in plans)
    base = dataclasses.replace(base, micro_batch_size=smallest)
    plans = [
        plan if plan.programs.memory_plan.micro_batch_size == smallest else _prepare(base, chunks)
        for plan, chunks in zip(plans, config.chunks, strict=True)
    ]
    shared: dict[str, Any] = {"state": plans[0].programs.init(jax.random.key(config.seed))}

    def stepping(train_step: Callable[..., Any]) -> Callable[[], Any]:
        def step() -> Any:
            shared["state"], latest["metrics"] = train_step(shared["state"], next(plans[0].batches))
            return latest["metrics"]

        return step

    return [
        Variant(
            _name(chunks),
            stepping(plan.programs.train_step),
            factors={"chunks": chunks, "micro_batch_size": plan.programs.memory_plan.micro_batch_size},
        )
        for chunks, plan in zip(config.chunks, plans, strict=True)
    ]


def _prepare(base: TrainConfig, chunks: int) -> Plan:
    arm = dataclasses.replace(base, lmhead_chunks=chunks, mesh_data=1)
    training_config.validate(arm)
    print(f"compiling {arm.model} with {chunks} chunk(s) ...", flush=True)
    return prepare(arm, choose_devices(arm, jax.devices()))


def summarize(measurements: Sequence[Measurement], config: TrainingPairConfig, tokens: int) -> list[dict[str, Any]]:
    """One row an arm: totals over its valid pieces, medians, and ratios to the first arm.

    Args:
      measurements: of the pieces.
      config: of the pair.
      tokens: in a step.
    """
    rows, base = [], _name(config.chunks[0])
    for chunks in config.chunks:
        name = _name(chunks)
        own = [m for m in measurements if m.variant == name and m.invalid_reason is None]
        if not own:
            continue
        joules = [m.energy_j * m.calls for m in own if m.energy_j is not None]
        bounds = [m.energy_bound_j * m.calls for m in own if m.energy_bound_j is not None]
        known = len(joules) == len(own)
        steps = sum(m.calls for m in own)
        rows.append(
            {
                "chunks": chunks,
                "pieces": len(own),
                "steps": steps,
                "time_s": sum(m.time_s * m.calls for m in own),
                "energy_j": sum(joules) if known else None,
                "energy_bound_j": sum(bounds) if known else None,
                "energy_null_reason": next((m.energy_null_reason for m in own if m.energy_null_reason), None),
                "energy_per_token_j": sum(joules) / (steps * tokens) if known else None,
                "temperature_at_end_c": max(own, key=lambda m: m.end_s).temperature_c,
                "step_time_s": _dict(interval_of(measurements, name)),
                "tokens_per_s": _dict(interval_of(measurements, name, lambda m: tokens / m.time_s)),
                "power_w": _dict(interval_of(measurements, name, "power_w")),
                "power_w_std": _dict(interval_of(measurements, name, "power_w_std")),
                "sm_clock_mhz": _dict(interval_of(measurements, name, "sm_clock_mhz")),
                "time_ratio": _dict(ratio_of(measurements, name, base)),
                "energy_ratio": _dict(ratio_of(measurements, name, base, "energy_j")),
            }
        )
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as a Markdown table; an interval is the 95% bootstrap interval of the median over pieces."""
    lines = [
        "| chunks | pieces | minutes | steps | ms a step | time / first | kJ (GPU rail) | mJ/token | energy / first "
        "| W | power ripple, W | °C at the end |",
        "|" + "---|" * 12,
    ]
    for row in rows:
        energy_kj = None if row["energy_j"] is None else (row["energy_j"] / 1e3, row["energy_bound_j"] / 1e3)
        cells = [
            str(row["chunks"]),
            str(row["pieces"]),
            f"{row['time_s'] / 60:.1f}",
            str(row["steps"]),
            f"{row['step_time_s']['median'] * 1e3:.1f}",
            _ratio(row["time_ratio"]),
            "null" if energy_kj is None else f"{energy_kj[0]:.1f} ± {energy_kj[1]:.1f}",
            "null" if row["energy_per_token_j"] is None else f"{row['energy_per_token_j'] * 1e3:.3f}",
            _ratio(row["energy_ratio"]),
            _median(row["power_w"]),
            _median(row["power_w_std"]),
            "null" if row["temperature_at_end_c"] is None else f"{row['temperature_at_end_c']:.0f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _report(
    directory: RunDirectory, measurements: Sequence[Measurement], config: TrainingPairConfig, tokens: int
) -> str:
    rows = summarize(measurements, config, tokens)
    directory.write_json("summary.json", {"arms": rows})
    (directory.path / "table.md").write_text(table(rows) + "\n")
    lines = [table(rows)]
    if rows and rows[0]["energy_null_reason"] is not None:
        lines.append(f"energy null: {rows[0]['energy_null_reason']}")
    return "\n".join([*lines, f"figure: {plotting.plot_training_pair(directory.path)}"])


def _name(chunks: int) -> str:
    return f"{chunks} chunk{'s' if chunks > 1 else ''}"


def _dict(interval: Interval | None) -> dict[str, float] | None:
    return None if interval is None else interval._asdict()


def _ratio(interval: dict[str, float] | None) -> str:
    if interval is None:
        return "null"
    return f"{interval['median']:.4f} ({interval['low']:.4f} to {interval['high']:.4f})"


def _median(interval: dict[str, float] | None) -> str:
    return "null" if interval is None else f"{interval['median']:.0f}"
