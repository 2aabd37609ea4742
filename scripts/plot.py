"""Redraws the figures of runs from their records: `python scripts/plot.py RUN_DIR...`.

Several training runs are also compared: a table, `losses.png` and `comparison.png` in the directory that holds them.
"""

import dataclasses
import json
from pathlib import Path

import tyro

from jaxchunk import plotting
from jaxchunk.bench import figures, lm_head_shapes
from jaxchunk.errors import InputError, reported_errors
from jaxchunk.report import comparison_table, read_runs


@dataclasses.dataclass(frozen=True)
class PlotConfig:
    """What to draw."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Directories that train.py, microbench.py, prefill.py, or one of the bench_*.py wrote."""


def main() -> None:
    runs = tyro.cli(PlotConfig, description=__doc__).runs
    with reported_errors():
        if not runs:
            raise InputError("no run was given; name the directories of runs")
        training = [run for run in runs if (run / "steps.jsonl").exists()]
        for run in runs:
            if run in training:  # a run that was killed has its steps and no summary: its figure can still be drawn
                print(plotting.plot_training(run))
            elif figures.is_microbench(run):  # likewise
                print(*figures.plot_microbench(run), sep="\n")
            elif _is_benchmark_with(run, "seq_lens"):
                print(plotting.plot_prefill(run) or f"{run}: nothing was measured beside one chunk")
            elif _is_benchmark_with(run, "shapes"):
                print(plotting.plot_scoring(run) or f"{run}: the GEMM was not measured, which times are compared with")
            elif _is_benchmark_with(run, "piece_s"):
                print(plotting.plot_training_arms(run))
            elif (run / "shapes.json").exists():
                print(lm_head_shapes.report(run))
            elif (run / "records.jsonl").exists() and (run / "summary.json").exists():
                print(plotting.plot_lm_head(run))
            else:
                raise InputError(f"{run} holds no records of train.py or of a benchmark")
        if len(training) > 1:
            print(comparison_table(read_runs(training)))
            print(
                plotting.plot_losses(training, training[0].parent / "losses.png") or "no losses of two runs to compare"
            )
            figure = plotting.plot_comparison(training, training[0].parent / "comparison.png")
            print(figure or "no comparison of power and clocks: none of these runs has telemetry")


def _is_benchmark_with(run: Path, flag: str) -> bool:
    config = run / "config.json"
    return (run / "records.jsonl").exists() and config.exists() and flag in json.loads(config.read_text())


if __name__ == "__main__":
    main()
