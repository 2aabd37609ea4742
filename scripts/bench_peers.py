"""Our LM head beside Liger, cut-cross-entropy, QuACK and PyTorch, at the head shapes of three models.

`python scripts/bench_peers.py` runs bench_lm_head.py at every shape with what can be imported here: `pip install torch
liger-kernel cut-cross-entropy quack-kernels`. The default shapes are for a GPU with 100 GB. One table and one figure
hold all shapes. An interrupted run goes on with `--continue --out_dir DIR`.
"""

import logging

import tyro

from jaxchunk.bench import lm_head_shapes
from jaxchunk.errors import reported_errors


def main() -> None:
    logging.basicConfig(level=logging.WARNING, format="%(message)s", force=True)
    config = tyro.cli(lm_head_shapes.ShapesConfig, description=__doc__, use_underscores=True)
    with reported_errors():
        lm_head_shapes.run(config)


if __name__ == "__main__":
    main()
