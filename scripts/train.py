"""Trains a Qwen2 model with the chunked LM head: `python scripts/train.py --lmhead_chunks 4`."""

import logging
import os
import signal
import sys
from pathlib import Path

import jax
import tyro

from jaxchunk import device_memory
from jaxchunk.compilation import keep_programs
from jaxchunk.data import default_cache_dir
from jaxchunk.errors import reported_errors
from jaxchunk.training import processes
from jaxchunk.training.config import TrainConfig, default_config
from jaxchunk.training.trainer import train


def main() -> None:
    logging.basicConfig(level=logging.WARNING, format="%(message)s", force=True)
    logging.getLogger("jaxchunk").setLevel(logging.INFO)
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax logs a page for what we say in a line
    # Of a checkpoint that cannot be read asyncio logs Orbax's traceback, array by array; we say it in a line.
    logging.getLogger("asyncio").addFilter(lambda record: "never retrieved" not in record.getMessage())
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # until training begins, which saves first
    device_memory.allocate_as_needed(os.environ)
    with reported_errors():
        processes.join(sys.argv[1:])
    default = default_config(jax.default_backend())
    config = tyro.cli(TrainConfig, default=default, description=__doc__, use_underscores=True)
    if jax.process_index() != 0:
        logging.getLogger("jaxchunk").setLevel(logging.WARNING)
    with reported_errors():
        if config.compilation_cache:
            keep_programs(Path(config.cache_dir) if config.cache_dir else default_cache_dir())
        summary = train(config)
        if summary["status"] == "interrupted":
            raise KeyboardInterrupt


if __name__ == "__main__":
    main()
