"""Trains at several chunk counts in turn, at thermal steady state: total time, joules and temperature of each.

`python scripts/bench_training.py --chunks 1 4` takes eight minutes an arm on a GPU, in pieces of a minute. An
interrupted run goes on with `--continue --out_dir DIR`.
"""

import logging
import os

import jax
import tyro

from jaxchunk import device_memory
from jaxchunk.bench import training_pair
from jaxchunk.errors import reported_errors


def main() -> None:
    logging.basicConfig(level=logging.WARNING, format="%(message)s", force=True)
    device_memory.allocate_as_needed(os.environ)
    default = training_pair.default_config(jax.default_backend())
    config = tyro.cli(training_pair.TrainingPairConfig, default=default, description=__doc__, use_underscores=True)
    with reported_errors():
        training_pair.run(config)


if __name__ == "__main__":
    main()
