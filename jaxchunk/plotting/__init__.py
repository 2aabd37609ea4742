"""Figures from the records of a run, in one style: colour-blind safe, units on the axes, readable in print.

Those that need the statistics of benchmarks are in `jaxchunk.bench.figures`.
"""

from jaxchunk.plotting.lm_head import (
    AUTODIFF,
    BFLOAT16_LOGITS,
    FLOAT32_LOGITS,
    FLOOR,
    plot_lm_head,
    plot_multiples_of_floor,
    plot_scoring,
)
from jaxchunk.plotting.prefill import plot_prefill
from jaxchunk.plotting.simulation import plot_simulation
from jaxchunk.plotting.step_profile import plot_step_profile
from jaxchunk.plotting.training import plot_comparison, plot_losses, plot_training
from jaxchunk.plotting.training_arms import plot_training_arms

__all__ = [
    "AUTODIFF",
    "BFLOAT16_LOGITS",
    "FLOAT32_LOGITS",
    "FLOOR",
    "plot_comparison",
    "plot_lm_head",
    "plot_losses",
    "plot_multiples_of_floor",
    "plot_prefill",
    "plot_scoring",
    "plot_simulation",
    "plot_step_profile",
    "plot_training",
    "plot_training_arms",
]
