"""What telemetry costs: the microbenchmark with the sampler on and off, interleaved. Takes the same flags.

Only the first chunk count, kind of inputs and softmax are measured.
"""

import dataclasses
import logging
import os

import jax
import tyro

from jaxchunk import device_memory
from jaxchunk.bench import microbench_config, sampler_overhead
from jaxchunk.errors import reported_errors


def main() -> None:
    logging.basicConfig(level=logging.WARNING, format="%(message)s", force=True)
    device_memory.allocate_as_needed(os.environ)
    default = dataclasses.replace(microbench_config.default_config(jax.default_backend()), chunks=(4,), repeats=10)
    config = tyro.cli(microbench_config.MicrobenchConfig, default=default, description=__doc__, use_underscores=True)
    with reported_errors():
        sampler_overhead.run(config)


if __name__ == "__main__":
    main()
