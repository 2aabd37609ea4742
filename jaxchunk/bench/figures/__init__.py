"""Figures of the microbenchmark, from the records of a run."""

from jaxchunk.bench.figures.microbench import plot_microbench
from jaxchunk.bench.figures.microbench_run import is_microbench

__all__ = ["is_microbench", "plot_microbench"]
