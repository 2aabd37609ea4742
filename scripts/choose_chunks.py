"""Chooses the chunk count of the LM head by measuring: `python scripts/choose_chunks.py --shapes 65536x896x151936`.

With `--sweep` every candidate is measured at length besides, and a table and a figure say how good the choice was.
An interrupted run goes on with `--continue --out_dir DIR`.
"""

import logging
import os

import jax
import tyro

from jaxchunk import device_memory
from jaxchunk.bench import chunk_sweep
from jaxchunk.errors import reported_errors


def main() -> None:
    logging.basicConfig(level=logging.WARNING, format="%(message)s", force=True)
    logging.getLogger("jaxchunk").setLevel(logging.INFO)
    device_memory.allocate_as_needed(os.environ)
    default = chunk_sweep.default_config(jax.default_backend())
    config = tyro.cli(chunk_sweep.ChunkSweepConfig, default=default, description=__doc__, use_underscores=True)
    with reported_errors():
        chunk_sweep.run(config)


if __name__ == "__main__":
    main()
