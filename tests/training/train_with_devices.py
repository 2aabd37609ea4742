"""`train_with_devices.py N FLAGS... [-- FLAGS...]`: scripts/train.py on N simulated devices, with a tiny model.

After each `--` come the flags of a further run in the same process, which has joined the others already.
"""

import itertools
import runpy
import sys
from pathlib import Path

import jax

from jaxchunk.models import qwen2

if __name__ == "__main__":
    program, devices, *arguments = sys.argv
    jax.config.update("jax_num_cpu_devices", int(devices))
    qwen2.SIZES["tiny"] = qwen2.Qwen2Config(300, 32, 1, 4, 2, 48, tie_word_embeddings=True)
    for is_separator, flags in itertools.groupby(arguments, lambda argument: argument == "--"):
        if not is_separator:
            sys.argv = [program, *flags]
            runpy.run_path(str(Path(__file__).parents[2] / "scripts" / "train.py"), run_name="__main__")
