"""What `auto` chooses, and beside it an exhaustive sweep: is the choice as good as the best, and what did it take?"""

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxchunk.bench import lm_head
from jaxchunk.bench.figures.chunk_sweep import plot_chunk_sweep
from jaxchunk.bench.lm_head import LMHeadBenchConfig
from jaxchunk.errors import InputError
from jaxchunk.lm_head import Head, choose_implementation
from jaxchunk.measuring import harness
from jaxchunk.measuring.harness import BenchConfig
from jaxchunk.measuring.protocol import Measurement
from jaxchunk.measuring.statistics import interval_of, ratio_of
from jaxchunk.measuring.tables import Column, Row, as_dict, cell, markdown
from jaxchunk.run_dir import RunDirectory, new_run_path
from jaxchunk.telemetry import open_monitor
from jaxchunk.tuning import ChunkChoice, Objective, candidate_counts, choose_num_chunks
from jaxchunk.tuning.objective import MEANINGS, cost

_PATTERN = re.compile(r"([1-9]\d*)x([1-9]\d*)x([1-9]\d*)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChunkSweepConfig(BenchConfig):
    """The chunk count of the LM head, chosen by measuring."""

    shapes: tuple[str, ...] = ("2048x128x4096",)
    """Tokens x width x vocabulary."""
    objectives: tuple[Objective, ...] = ("time",)
    """What to choose by: time, energy, edp (energy times time)."""
    implementation: str | None = None
    """Implementation of the loss. Default: by device."""
    dtype: str = "float32"
    """Dtype of the hidden states; the weight is float32."""
    candidates: tuple[int, ...] = ()
    """Chunk counts. Default: powers of two and counts between them that leave enough rows in a chunk."""
    budget_s: float | None = None
    """Longest time that a choice may take besides compilation. Default: 30 s for time, 120 s for energy and edp."""
    memory_gb: float | None = None
    """Most memory for temporaries, GB."""
    sweep: bool = False
    """Also measure every candidate --repeats times in windows of --window_s, and compare the choice with the best."""
    window_s: float = 2.0
    """Length of a window of the sweep, seconds."""


def default_config(platform: str) -> ChunkSweepConfig:
    """The head shapes of Qwen2-0.5B, Llama-3 8B and Qwen2.5 7B on a GPU, a small one on a CPU."""
    if platform == "gpu":
        shapes = ("65536x896x151936", "16384x4096x128256", "8192x3584x152064")
        return ChunkSweepConfig(shapes=shapes, objectives=("time", "energy"), dtype="bfloat16")
    return ChunkSweepConfig(window_s=0.3, repeats=3, settle_s=0.0, budget_s=6.0)


class Shape(NamedTuple):
    """T tokens, D width, V vocabulary."""

    T: int
    D: int
    V: int

    def __str__(self) -> str:
        return f"{self.T}x{self.D}x{self.V}"


def run(config: ChunkSweepConfig) -> Path:
    """Chooses at every shape, and with `--sweep` measures everything there.

    Returns:
      The directory, with `choices.json`; of a sweep also `table.md`, `chunk_sweep.png`, and a run of the LM-head
      benchmark for every shape.

    Raises:
      InputError: a flag is out of its domain, there is no energy for an objective, or nothing fits.
      KeyboardInterrupt: it was interrupted; `--continue` goes on.
    """
    shapes = validate(config)
    path = config.out_dir or new_run_path("choose-chunks")
    with RunDirectory(path, overwrite=config.overwrite, go_on=config.go_on) as directory:
        directory.write_json("config.json", dataclasses.asdict(config))
        choices: dict[str, dict[str, Any]] = {}
        rows: list[Row] = []
        for shape in shapes:
            chosen = {name: _choose(shape, name, config, directory.path) for name in config.objectives}
            choices[str(shape)] = {name: choice.as_dict() for name, choice in chosen.items()}
            directory.write_json("choices.json", choices)
            if config.sweep:
                measurements = _sweep(shape, config, directory.path)
                rows += [_row(shape, choice, measurements) for choice in chosen.values()]
                directory.write_json("summary.json", rows)
                (directory.path / "table.md").write_text(table(rows) + "\n")
        if rows:
            print(table(rows))
            print(f"figure: {plot_chunk_sweep(directory.path, rows, jax.devices()[0].device_kind)}")
        print(f"records: {directory.path}")
    return directory.path


def validate(config: ChunkSweepConfig) -> list[Shape]:
    """Refuses what cannot run, and reads the shapes.

    Raises:
      InputError: naming the flag, its value and what is needed.
    """
    harness.check_common(config)
    matches = [_PATTERN.fullmatch(text) for text in config.shapes]
    if not matches or None in matches or len(set(config.shapes)) < len(config.shapes):
        given = " ".join(config.shapes)
        raise InputError(f"--shapes is {given!r}; give tokens x width x vocabulary, each once: 65536x896x151936")
    if not config.objectives:
        raise InputError("--objectives is empty; give time, energy or edp")
    shapes = [Shape(*map(int, match.groups())) for match in matches if match is not None]
    monitor = open_monitor(jax.devices()[0])  # probes, and reads nothing
    if monitor.energy_source is None and set(config.objectives) != {"time"}:
        raise InputError(f"--objectives has energy, and there is no source of it ({monitor.energy_source_reason})")
    return shapes


def _counts(shape: Shape, config: ChunkSweepConfig) -> tuple[int, ...]:
    return tuple(sorted(set(config.candidates or candidate_counts(shape.T))))


def _choose(shape: Shape, objective: Objective, config: ChunkSweepConfig, path: Path) -> ChunkChoice:
    """Kept in the run's own directory, so that a run that goes on does not measure again, and no other run counts."""
    print(f"{shape}, {MEANINGS[objective]}: choosing ...", flush=True)
    choice = choose_num_chunks(
        jax.ShapeDtypeStruct((shape.T, shape.D), jnp.dtype(config.dtype)),
        jax.ShapeDtypeStruct((shape.V, shape.D), jnp.float32),
        objective=objective,
        candidates=_counts(shape, config),
        memory_budget_bytes=None if config.memory_gb is None else int(config.memory_gb * 1e9),
        budget_s=config.budget_s,
        cache_dir=path / "cache",
        implementation=config.implementation,
    )
    print(f"{choice.table()}\n{choice.num_chunks} chunks: {choice.reason}", flush=True)
    return choice


def _sweep(shape: Shape, config: ChunkSweepConfig, path: Path) -> list[Measurement]:
    common = {field.name: getattr(config, field.name) for field in dataclasses.fields(BenchConfig)}
    own = path / str(shape)
    implementation = choose_implementation(
        config.implementation, compute_dtype=config.dtype, head=Head(shape.D, shape.V)
    ).implementation
    bench = LMHeadBenchConfig(
        **common | {"out_dir": str(own), "overwrite": False, "go_on": own.exists()},
        tokens=shape.T,
        width=shape.D,
        vocab=shape.V,
        chunks=_counts(shape, config),
        implementations=(implementation,),
        dtype=config.dtype,
        window_s=config.window_s,
    )
    if not harness.is_complete(own, config.repeats):
        lm_head.run(bench)
    return harness.read_measurements(own)


def _row(shape: Shape, choice: ChunkChoice, measurements: Sequence[Measurement]) -> Row:
    """The choice's cost over that of every count in the sweep; more than 1: the sweep has found a better one."""

    def quantity(measurement: Measurement) -> float | None:
        return cost(choice.objective, measurement.time_s, measurement.energy_j)

    names = {
        n: name
        for n in (c.num_chunks for c in choice.candidates)
        if interval_of(measurements, name := lm_head.variant_name(choice.implementation, n), quantity) is not None
    }
    known = {n: interval_of(measurements, name, quantity) for n, name in names.items()}
    if choice.num_chunks not in known:
        raise InputError(f"the sweep at {shape} has no {choice.objective} of {choice.num_chunks} chunks")
    medians = {n: interval.median for n, interval in known.items() if interval is not None}
    best = min(medians, key=medians.__getitem__)
    over_best = {n: ratio_of(measurements, name, names[best], quantity) for n, name in names.items()}
    return {
        "shape": str(shape),
        "objective": choice.objective,
        "implementation": choice.implementation,
        "chosen": choice.num_chunks,
        "reason": choice.reason,
        "measuring_s": choice.measuring_s,
        "best": best,
        "sweep_over_best": {str(n): as_dict(interval) for n, interval in over_best.items()},
        "chosen_over_best": as_dict(over_best[choice.num_chunks]),
    }


def table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table; intervals are 95% bootstrap intervals of the median over repeats."""
    return markdown(rows, _COLUMNS)


_COLUMNS: tuple[Column, ...] = (
    ("shape", lambda row: row["shape"]),
    ("objective", lambda row: row["objective"]),
    ("auto", lambda row: str(row["chosen"])),
    ("took, s", lambda row: f"{row['measuring_s']:.1f}"),
    ("best of the sweep", lambda row: str(row["best"])),
    ("auto / best", lambda row: cell(row["chosen_over_best"], 1.0, 4, interval=True)),
)
