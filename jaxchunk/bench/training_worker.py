"""A process that trains for `bench/training.py`: `python -m jaxchunk.bench.training_worker NAME CONFIG`.

NAME is a peer, or ours; CONFIG the benchmark's flags as JSON. What it is asked and answers is in `step_process`.
"""

import json
import logging
import os
import sys
from typing import Any

import jax

from jaxchunk import device_memory
from jaxchunk.bench import step_process, training, training_peers
from jaxchunk.errors import reported_errors


def main() -> None:
    """Loads the variants of NAME and serves them."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", force=True)
    requests, answers = step_process.own_pipes()
    name = sys.argv[1]
    values: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in json.loads(sys.argv[2]).items()
    }
    config = training.TrainingBenchConfig(**values)
    with reported_errors():
        if name == training.OURS:
            device_memory.allocate_as_needed(os.environ)
            training.keep_own_programs(config)
            variants = training.own_variants(config, {})
        else:
            jax.config.update("jax_platforms", "cpu")  # the GPU is torch's
            variants = [training_peers.variant(name, training.trainer_config(config))]
        step_process.serve(variants, requests, answers)


if __name__ == "__main__":
    main()
