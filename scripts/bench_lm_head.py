"""Times forward and backward of the LM head, every implementation interleaved with the three bare GEMMs.

`python scripts/bench_lm_head.py` takes the paper's training shape on a GPU and the tiny model's on a CPU. With `--peers
all`, LM heads of others are measured beside ours (`bench_peers.py` does that at several shapes).
"""

import logging
import os
import sys

import jax
import tyro

from jaxchunk import device_memory
from jaxchunk.bench import lm_head
from jaxchunk.errors import reported_errors


def main() -> None:
    logging.basicConfig(level=logging.WARNING, format="%(message)s", force=True)
    has_peers = any(argument.split("=")[0] == "--peers" for argument in sys.argv)  # JAX starts before flags are parsed
    device_memory.allocate_as_needed(os.environ, beside_others=has_peers)
    default = lm_head.default_config(jax.default_backend())
    config = tyro.cli(lm_head.LMHeadBenchConfig, default=default, description=__doc__, use_underscores=True)
    with reported_errors():
        lm_head.run(config)


if __name__ == "__main__":
    main()
