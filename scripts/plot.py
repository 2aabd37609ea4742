"""Redraws the figures of runs from their records: `python scripts/plot.py RUN_DIR...`.

Several training runs are also compared: a table, and `comparison.png` in the directory that holds them.
"""

import dataclasses
from pathlib import Path

import tyro

from jaxchunk import plotting
from jaxchunk.errors import InputError, exit_on_input_error
from jaxchunk.training.comparison import comparison_table


@dataclasses.dataclass(frozen=True)
class PlotConfig:
    """What to draw."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Directories that train.py or bench_lm_head.py wrote."""


def main() -> None:
    runs = tyro.cli(PlotConfig, description=__doc__).runs
    with exit_on_input_error():
        if not runs:
            raise InputError("no run was given; name the directories of runs")
        for run in runs:
            if not (run / "summary.json").exists():
                raise InputError(f"{run} holds no finished run (it has no summary.json)")
    training = [run for run in runs if (run / "steps.jsonl").exists()]
    for run in runs:
        print(plotting.plot_training(run) if run in training else plotting.plot_lm_head(run))
    if len(training) > 1:
        print(comparison_table(training))
        print(plotting.plot_comparison(training, training[0].parent / "comparison.png"))


if __name__ == "__main__":
    main()
