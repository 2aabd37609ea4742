"""Trains at several chunk counts in turn, at thermal steady state: total time, joules and temperature of each.

`python scripts/bench_train.py --chunks 1 4` takes eight minutes an arm on a GPU, in pieces of a minute. With `--peers
liger`, the training step of transformers with Liger's kernels takes its turns too (`pip install torch transformers
liger-kernel`). An interrupted run goes on with `--continue --out_dir DIR`.
"""

import logging
import os
import sys

import jax
import tyro

from jaxchunk import device_memory
from jaxchunk.bench import training
from jaxchunk.errors import reported_errors


def main() -> None:
    logging.basicConfig(level=logging.WARNING, format="%(message)s", force=True)
    environment = dict(os.environ)
    if any(argument.split("=")[0] == "--peers" for argument in sys.argv):  # JAX starts before flags are parsed
        os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # the memory is for the processes that train
    device_memory.allocate_as_needed(os.environ)
    default = training.default_config(jax.default_backend())
    config = tyro.cli(training.TrainingBenchConfig, default=default, description=__doc__, use_underscores=True)
    with reported_errors():
        training.keep_own_programs(config)
        training.run(config, environment)


if __name__ == "__main__":
    main()
