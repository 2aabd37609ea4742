"""Everything that we would like to know of a device that we do not have, in one directory and one archive."""

import dataclasses
import json
import sys
import tarfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxchunk.bench.child import run_child
from jaxchunk.errors import InputError, RunFailedError
from jaxchunk.run_dir import RunDirectory, holds_run, new_run_path, read_json_lines

_SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
_STATUS = "stages.json"


@dataclasses.dataclass(frozen=True)
class Stage:
    """One program of the report.

    Attributes:
      name: of its directory and log.
      title: for the summary.
      command: arguments after the Python interpreter; a benchmark is given `--out_dir`, and `--continue` where it has
        begun.
      is_benchmark: whether it takes those flags.
    """

    name: str
    title: str
    command: tuple[str, ...]
    is_benchmark: bool = True


@dataclasses.dataclass(frozen=True)
class DeviceReportConfig:
    """Doctor, microbenchmark, LM-head benchmark, cost of telemetry, a short training pair."""

    quick: bool = False
    """About ten minutes. Without it, forty on a device like an H200, and hours where a call takes a second."""
    out_dir: str | None = None
    """Where it all goes; an interrupted report goes on there. Default: a new directory under runs/."""
    archive: bool = True
    """Pack the directory into one file to send."""


def default_stages(quick: bool) -> tuple[Stage, ...]:
    """The programs of a report."""
    training = (
        ("--piece_s", "30", "--repeats", "2", "--settle_s", "10") if quick else ("--piece_s", "60", "--repeats", "5")
    )
    lm_head = ("--repeats", "3", "--chunks", "1", "4", "16", "--settle_s", "5") if quick else ()
    return (
        Stage("doctor", "What can be measured", ("-m", "jaxchunk.telemetry", "doctor"), is_benchmark=False),
        Stage(
            "microbench", "Matmul, softmax, matmul in chunks", _script("microbench", *(["--quick"] if quick else []))
        ),
        Stage("lm_head", "The LM head", _script("bench_lm_head", *lm_head)),
        Stage("sampler", "What telemetry costs", _script("bench_sampler", *(["--quick"] if quick else []))),
        Stage("training", "Training at two chunk counts", _script("bench_train", *training)),
    )


def run(config: DeviceReportConfig, stages: Sequence[Stage] | None = None) -> Path:
    """Runs what is missing, stage by stage; a stage that fails does not stop the others.

    Args:
      config: where and how long.
      stages: in place of `default_stages`.

    Returns:
      The summary page.

    Raises:
      InputError: the directory cannot be used.
      RunFailedError: some stage failed; the others are in the report.
      KeyboardInterrupt: it was interrupted; the same command with `--out_dir` goes on.
    """
    stages = default_stages(config.quick) if stages is None else stages
    directory = RunDirectory(Path(config.out_dir or new_run_path("device-report")).absolute(), go_on=True)
    with directory:
        asked = {"quick": config.quick, "stages": [stage.name for stage in stages]}
        before = directory.read_json("config.json")
        if before not in (None, asked):
            raise InputError(f"out_dir {directory.path} holds another report ({before}); choose another directory")
        directory.write_json("config.json", asked)
        status: dict[str, Any] = directory.read_json(_STATUS) or {}
        for number, stage in enumerate(stages, 1):
            if status.get(stage.name, {}).get("exit_status") == 0:
                continue
            print(f"[{number}/{len(stages)}] {stage.title} ...", flush=True)
            try:
                status[stage.name] = _run_stage(stage, directory.path)
            except KeyboardInterrupt:
                print(f"interrupted: what is there is kept; go on with the same flags and --out_dir {directory.path}")
                raise
            directory.write_json(_STATUS, status)
        page = _write_summary(directory.path, stages, status)
    print(f"summary: {page}")
    if config.archive:
        print(f"to send: {_pack(directory.path)}")
    failed = [stage.name for stage in stages if status[stage.name]["exit_status"] != 0]
    if failed:
        raise RunFailedError(
            f"failed: {', '.join(failed)}; see the logs in {directory.path} (the same command retries)"
        )
    return page


def _script(name: str, *flags: str) -> tuple[str, ...]:
    return (str(_SCRIPTS / f"{name}.py"), *flags)


def _run_stage(stage: Stage, path: Path) -> dict[str, Any]:
    """Runs a stage with its output in a log and on the screen."""
    command = [sys.executable, *stage.command]
    if stage.is_benchmark:
        begun = ["--continue"] if holds_run(path / stage.name) else []
        command += ["--out_dir", str(path / stage.name), *begun]
    start_s = time.monotonic()
    with (path / f"{stage.name}.log").open("w") as log:

        def show(line: str) -> None:
            log.write(f"{line}\n")
            log.flush()
            print(f"    {line}", flush=True)

        status = run_child(command, on_line=show)
    return {"exit_status": status, "seconds": round(time.monotonic() - start_s, 1)}


def _write_summary(path: Path, stages: Sequence[Stage], status: dict[str, Any]) -> Path:
    """One Markdown page: what ran on what, every table, every figure."""
    about = _environment(path, stages)
    lines = ["# Device report", ""]
    for name in ("device_kind", "jaxchunk", "git_commit", "python", "os", "cpu"):
        lines.append(f"- {name}: {about.get(name)}")
    lines.append(f"- packages: {about.get('packages')}")
    for stage in stages:
        outcome = status[stage.name]
        lines += ["", f"## {stage.title}", ""]
        if outcome["exit_status"] != 0:
            lines.append(f"Failed with status {outcome['exit_status']} after {outcome['seconds']} s: {stage.name}.log.")
        folder = path / stage.name
        table = folder / "table.md"
        if table.exists():
            lines.append(table.read_text())
        else:
            log = (path / f"{stage.name}.log").read_text().strip()
            lines += ["```", log[-20000:], "```"]
        lines += [f"- warning: {record['warning']}" for record in read_json_lines(folder / "warnings.jsonl")]
        lines += [f"![{figure.stem}]({stage.name}/{figure.name})" for figure in sorted(folder.glob("*.png"))]
    page = path / "summary.md"
    page.write_text("\n".join(lines) + "\n")
    return page


def _environment(path: Path, stages: Sequence[Stage]) -> dict[str, Any]:
    files = (path / stage.name / "env.json" for stage in stages)
    return next((json.loads(file.read_text()) for file in files if file.exists()), {})


def _pack(path: Path) -> Path:
    archive = path.parent / f"{path.name}.tar.gz"
    with tarfile.open(archive, "w:gz") as packed:
        packed.add(path, arcname=path.name)
    return archive
