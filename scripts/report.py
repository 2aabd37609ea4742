"""Compares training runs on one HTML page, which opens offline: `python scripts/report.py RUN_DIR...`."""

import dataclasses
from pathlib import Path

import tyro

from jaxchunk.errors import reported_errors
from jaxchunk.report import read_runs, write_report


@dataclasses.dataclass(frozen=True)
class ReportConfig:
    """What to compare."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Directories that train.py wrote."""
    out: Path | None = None
    """The page. Default: report.html beside the first run."""


def main() -> None:
    config = tyro.cli(ReportConfig, description=__doc__)
    with reported_errors():
        runs = read_runs(config.runs)
        print(write_report(runs, config.out or config.runs[0].resolve().parent / "report.html"))


if __name__ == "__main__":
    main()
