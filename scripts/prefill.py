"""Measures prefill in chunks: latency, energy, power and clocks by length of the prompt and number of chunks.

`python scripts/prefill.py` takes Llama 3 8B with random weights on a GPU, at the paper's lengths and counts, and a tiny
model on a CPU. `--peers transformers` measures torch's SDPA prefill beside it. An interrupted run goes on with
`--continue --out_dir DIR`.
"""

import logging
import os
import sys

import jax
import tyro

from jaxchunk import device_memory
from jaxchunk.bench import prefill, prefill_config
from jaxchunk.errors import reported_errors


def main() -> None:
    logging.basicConfig(level=logging.WARNING, format="%(message)s", force=True)
    has_peers = any(argument.split("=")[0] == "--peers" for argument in sys.argv)  # JAX starts before flags are parsed
    device_memory.allocate_as_needed(os.environ, beside_others=has_peers)
    default = prefill_config.default_config(jax.default_backend())
    config = tyro.cli(prefill_config.PrefillBenchConfig, default=default, description=__doc__, use_underscores=True)
    with reported_errors():
        prefill.run(config)


if __name__ == "__main__":
    main()
