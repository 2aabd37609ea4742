"""Finds the fastest tiles of the fused LM head's kernel on this GPU, shape by shape, and writes the table of them.

`python scripts/tune_kernels.py` takes the chunk shapes of three models. The result, `tuned.json`, is used where
JAXCHUNK_TUNED names it; `--write_table jaxchunk/lm_head/kernels/tuned.json` puts it into the package's own table too. A
run that was interrupted, or that ended because a kernel hung, goes on with `--continue --out_dir DIR`.
"""

import logging
import os
import signal

import tyro

from jaxchunk import device_memory
from jaxchunk.bench import tune_kernels
from jaxchunk.errors import reported_errors


def main() -> None:
    logging.basicConfig(level=logging.WARNING, format="%(message)s", force=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a scheduler's stop is no kernel that hangs
    device_memory.allocate_as_needed(os.environ)
    config = tyro.cli(tune_kernels.TuneConfig, description=__doc__, use_underscores=True)
    with reported_errors():
        tune_kernels.run(config)


if __name__ == "__main__":
    main()
