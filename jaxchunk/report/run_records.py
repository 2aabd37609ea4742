"""The records of training runs, as they lie in their directories: finished, killed or still going on."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from jaxchunk.errors import InputError
from jaxchunk.plotting.style import read_telemetry
from jaxchunk.run_dir import read_json_lines
from jaxchunk.training.records import StepRecord, Stretch, mean_of, summarize, totals

_Record = TypeVar("_Record", StepRecord, Stretch)
_NEEDED = ("step", "time_s", "loss", "step_time_s", "tokens_per_s")  # in every line of steps.jsonl
_NEEDED_OF_STRETCHES = ("first_step", "last_step", "start_s", "end_s")


@dataclasses.dataclass(frozen=True)
class RunRecords:
    """What a run wrote. What it did not is empty, or None for telemetry.

    `label` is the run's name, different from the others' that it is shown with. `summary` is that of `summary.json`
    where `finished`, else what the steps so far come to. `tokens_per_step` is None before the first step.
    """

    label: str
    path: Path
    config: dict[str, Any]
    environment: dict[str, Any]
    history: dict[str, Any]
    steps: tuple[StepRecord, ...]
    stretches: tuple[Stretch, ...]
    validation: tuple[dict[str, Any], ...]
    telemetry: dict[str, np.ndarray] | None
    summary: dict[str, Any]
    finished: bool
    tokens_per_step: int | None

    @property
    def start_s(self) -> float:
        """When the first step began, on the run's clock; 0 where there is none."""
        return self.steps[0].time_s - self.steps[0].step_time_s if self.steps else 0.0


def read_runs(paths: Sequence[Path]) -> list[RunRecords]:
    """Reads the runs in these directories, in this order.

    Args:
      paths: directories that `train` wrote. One that is given twice is there twice.

    Returns:
      The runs, with labels that differ.

    Raises:
      InputError: there are none, one is no training run, or its records are damaged.
    """
    if not paths:
        raise InputError("no run was given; name the directories of runs")
    return [_read_run(path, label) for path, label in zip(paths, _labels(paths), strict=True)]


def _labels(paths: Sequence[Path]) -> list[str]:
    """As much of the ends of the paths as tells them apart; a number where the same directory is given again."""
    parts = [path.resolve().parts for path in paths]
    labels: list[str] = []
    for own in parts:
        others = [other for other in parts if other != own]
        length = next(n for n in range(1, len(own) + 1) if all(other[-n:] != own[-n:] for other in others))
        label = name = "/".join(own[-length:])
        number = 1
        while label in labels:
            number += 1
            label = f"{name} ({number})"
        labels.append(label)
    return labels


def _read_run(path: Path, label: str) -> RunRecords:
    config = _read_json(path / "config.json")
    if not (path / "steps.jsonl").exists() and not {"lmhead_chunks", "lr"} <= config.keys():
        raise InputError(f"{path} holds no records of train.py")
    lines = _read_lines(path / "steps.jsonl", _NEEDED)
    steps = tuple(_filled(StepRecord, line) for line in lines)
    stretches = tuple(_filled(Stretch, line) for line in _read_lines(path / "stretches.jsonl", _NEEDED_OF_STRETCHES))
    tokens = round(steps[0].tokens_per_s * steps[0].step_time_s) if steps else None
    summary, history = _read_json(path / "summary.json"), _read_json(path / "run.json")
    return RunRecords(
        label=label,
        path=path,
        config=_latest_flags(config, history),
        environment=_read_json(path / "env.json"),
        history=history,
        steps=steps,
        stretches=stretches,
        validation=tuple(_read_lines(path / "validation.jsonl", ("step", "val_loss"))),
        telemetry=_read_telemetry(path / "telemetry.csv"),
        summary=summary or _summary_so_far(steps, stretches, tokens),
        finished=bool(summary),
        tokens_per_step=tokens,
    )


def _latest_flags(config: dict[str, Any], history: dict[str, Any]) -> dict[str, Any]:
    """The flags that a run ended with: one that is gone on with may have more steps. That it was is in its history."""
    latest: dict[str, Any] = next((c["config"] for c in reversed(history.get("continued", [])) if "config" in c), {})
    return config | {name: value for name, value in latest.items() if name != "resume"}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text()) if path.exists() else {}
    except (ValueError, OSError) as error:
        raise InputError(f"{path} is damaged ({error}); leave this run out") from None
    if not isinstance(value, dict):
        raise InputError(f"{path} is damaged (it holds no JSON object); leave this run out")
    return value


def _read_lines(path: Path, needed: Sequence[str]) -> list[dict[str, Any]]:
    try:
        lines = read_json_lines(path)
    except (ValueError, OSError) as error:
        raise InputError(f"{path} is damaged ({error}); leave this run out") from None
    for number, line in enumerate(lines, start=1):
        for name in needed:
            value = line.get(name, "") if isinstance(line, dict) else ""
            not_finite = value is None and name in ("loss", "val_loss")
            if not isinstance(value, int | float) and not not_finite:
                raise InputError(f"{path}, line {number} has no number {name}: it is not a record of train.py")
    return lines


def _read_telemetry(path: Path) -> dict[str, np.ndarray] | None:
    try:
        return read_telemetry(path)
    except ValueError as error:
        raise InputError(f"{path} is damaged ({error}); leave this run out") from None


def _filled(kind: type[_Record], line: dict[str, Any]) -> _Record:
    """The record of a line that another version may have written: what that did not know is None."""
    names = [field.name for field in dataclasses.fields(kind)]
    return kind.from_dict({name: line.get(name) for name in names})


def _summary_so_far(steps: Sequence[StepRecord], stretches: Sequence[Stretch], tokens: int | None) -> dict[str, Any]:
    """What the summary of a run without one would hold: speeds of all steps, energies of those in its stretches."""
    if tokens is None:
        return {"steps": 0}
    summary = summarize(list(steps), list(stretches), tokens)
    in_stretches = sum(record.step <= stretches[-1].last_step for record in steps) if stretches else 0
    if summary["energy_j"] is not None:
        summary["energy_per_token_j"] = summary["energy_j"] / (tokens * in_stretches)
    if in_stretches:
        return summary | {"energy_of_steps": in_stretches}
    unmeasured = all(record.power_w is None for record in steps)
    reason = steps[-1].energy_null_reason if unmeasured else None
    return summary | {
        "energy_null_reason": reason or "the run ended before its first validation or checkpoint, where it is totalled",
        "training_time_s": sum(record.step_time_s for record in steps),
        "power_w_mean": mean_of(record.power_w for record in steps),
        "sm_clock_mhz_mean": mean_of(record.sm_clock_mhz for record in steps),
        "throttle_s": totals(record.throttle for record in steps),
    }
