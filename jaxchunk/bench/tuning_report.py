"""What a tuning run reports: the best configurations at each shape, and the table for kernels to choose from."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxchunk.bench.kernel_timing import ChunkShape
from jaxchunk.bench.tuning_log import TuningLog
from jaxchunk.bench.tuning_table import merge_into
from jaxchunk.lm_head.kernels.tuned import Entry
from jaxchunk.measuring.statistics import Interval, bootstrap_median
from jaxchunk.measuring.tables import markdown
from jaxchunk.run_dir import RunDirectory


class Finalist(NamedTuple):
    """A configuration in the final rounds; None is cuBLAS."""

    config: Any
    milliseconds: Interval
    over_cublas: Interval


def finalists(log: TuningLog[Any]) -> list[Finalist]:
    """Who was in the final rounds, the fastest first; ratios are formed within a round."""
    windows = log.windows()
    times = {(window.config, window.round): window.milliseconds for window in windows}
    rounds = sorted({window.round for window in windows if window.config is None})
    found = []
    for config in dict.fromkeys(window.config for window in windows):
        own = [number for number in rounds if (config, number) in times]
        if own:
            ratios = [times[config, number] / times[None, number] for number in own]
            found.append(Finalist(config, bootstrap_median([times[config, n] for n in own]), bootstrap_median(ratios)))
    return sorted(found, key=lambda finalist: finalist.milliseconds.median)


def report(
    directory: RunDirectory,
    kernel: str,
    device: str,
    logs: Mapping[ChunkShape, TuningLog[Any]],
    table: Path | None,
) -> str:
    """Writes `table.md` and `tuned.json` from the records, and puts the results into `table`; returns what to print."""
    sections, entries = [], []
    for shape, log in logs.items():
        result, ranked = log.result(), finalists(log)
        if result is None:
            sections.append(f"{shape}: not done; {outcomes(log)}")
            continue
        title = f"{kernel} on {device}, C={shape.C} D={shape.D} V={shape.V}"
        ended = "ended by itself" if result["search_finished"] else "was ended by its budget"
        sections.append(f"{title}\n\n{_markdown(ranked)}\n\n{outcomes(log)}; the search {ended}.")
        winner = next(finalist for finalist in ranked if finalist.config is not None)
        entry = Entry(
            kernel=kernel,
            device=device,
            **shape._asdict(),
            config=dataclasses.asdict(winner.config),
            milliseconds=round(winner.milliseconds.median, 4),
            over_cublas=round(winner.over_cublas.median, 4),
            jax_version=result["jax_version"],
            date=result["date"],
        )
        entries.append(entry)
    text = "\n\n".join(sections)
    (directory.path / "table.md").write_text(text + "\n")
    if entries:
        for path in (directory.path / "tuned.json", *([] if table is None else [table])):
            merge_into(path, entries)
            text += f"\ntable of tiles: {path}"
    return f"{text}\nrecords: {directory.path}"


def _markdown(ranked: Sequence[Finalist]) -> str:
    """Medians with their 95% bootstrap intervals."""
    columns: list[tuple[str, Callable[[Finalist], str]]] = [
        ("configuration", lambda one: "cuBLAS, x W^T alone" if one.config is None else brief(one.config)),
        ("ms", lambda one: one.milliseconds.text(3)),
        ("over cuBLAS", lambda one: one.over_cublas.text(3)),
    ]
    return markdown(ranked, columns)


def brief(config: Any) -> str:
    """The fields that differ from their defaults."""
    fields = [f for f in dataclasses.fields(config) if getattr(config, f.name) != f.default]
    return " ".join(f"{field.name}={getattr(config, field.name)}" for field in fields) or "default"


def outcomes(log: TuningLog[Any]) -> str:
    """How many configurations were tried, and what came of them."""
    problems = [evaluation.problem for evaluation in log.known().values()]
    kinds = {"wrong": 0, "hung": 0}
    for problem in problems:
        kind = (problem or "").split(":")[0]
        if kind in kinds:
            kinds[kind] += 1
    ran = problems.count(None)
    failed = len(problems) - ran - sum(kinds.values())
    return f"{len(problems)} configurations: {ran} ran, {kinds['wrong']} wrong, {failed} failed, {kinds['hung']} hung"
