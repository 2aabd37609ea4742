"""Trains a Qwen2 model with the chunked LM head: `python scripts/train.py --lmhead_chunks 4`."""

import logging
import os

import jax
import tyro

from jaxchunk import device_memory
from jaxchunk.errors import exit_on_input_error
from jaxchunk.training.config import TrainConfig, default_config
from jaxchunk.training.loop import train


def main() -> None:
    logging.basicConfig(level=logging.WARNING, format="%(message)s", force=True)
    logging.getLogger("jaxchunk").setLevel(logging.INFO)
    device_memory.allocate_as_needed(os.environ)
    default = default_config(jax.default_backend())
    config = tyro.cli(TrainConfig, default=default, description=__doc__, use_underscores=True)
    with exit_on_input_error():
        train(config)


if __name__ == "__main__":
    main()
