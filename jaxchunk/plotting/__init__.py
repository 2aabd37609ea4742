"""Figures from the records of a run. Colour-blind safe, units on the axes, readable in print."""

from jaxchunk.plotting.lm_head import FLOOR, plot_lm_head
from jaxchunk.plotting.microbench import plot_microbench
from jaxchunk.plotting.microbench_run import is_microbench
from jaxchunk.plotting.training import plot_comparison, plot_training
from jaxchunk.plotting.training_pair import plot_training_pair

__all__ = [
    "FLOOR",
    "is_microbench",
    "plot_comparison",
    "plot_lm_head",
    "plot_microbench",
    "plot_training",
    "plot_training_pair",
]
