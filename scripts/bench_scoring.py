"""Times scoring: log-probabilities of a prompt's tokens, by the LM head in chunks and from all logits at once.

`python scripts/bench_scoring.py` takes 32k tokens at the heads of two models on a GPU and a tiny shape on a CPU. With
`--peers torch`, torch's is measured beside it. An interrupted run goes on with `--continue --out_dir DIR`.
"""

import logging
import os
import sys

import jax
import tyro

from jaxchunk import device_memory
from jaxchunk.bench import scoring
from jaxchunk.errors import reported_errors


def main() -> None:
    logging.basicConfig(level=logging.WARNING, format="%(message)s", force=True)
    has_peers = any(argument.split("=")[0] == "--peers" for argument in sys.argv)  # JAX starts before flags are parsed
    device_memory.allocate_as_needed(os.environ, beside_others=has_peers)
    default = scoring.default_config(jax.default_backend())
    config = tyro.cli(scoring.ScoringBenchConfig, default=default, description=__doc__, use_underscores=True)
    with reported_errors():
        scoring.run(config)


if __name__ == "__main__":
    main()
