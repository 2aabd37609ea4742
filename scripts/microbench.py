"""Measures what running in chunks does on this device: the paper's microbenchmark, with controls and a verdict.

`python scripts/microbench.py` takes the paper's shape on a GPU (seven minutes on an H200, hours where a call takes a
second) and a small one on a CPU (a minute). `--quick` takes two minutes. An interrupted run goes on with
`--continue --out_dir DIR`.
"""

import logging
import os

import jax
import tyro

from jaxchunk import device_memory
from jaxchunk.bench import microbench, microbench_config
from jaxchunk.errors import reported_errors


def main() -> None:
    logging.basicConfig(level=logging.WARNING, format="%(message)s", force=True)
    device_memory.allocate_as_needed(os.environ)
    default = microbench_config.default_config(jax.default_backend())
    config = tyro.cli(microbench_config.MicrobenchConfig, default=default, description=__doc__, use_underscores=True)
    with reported_errors():
        microbench.run(config)


if __name__ == "__main__":
    main()
