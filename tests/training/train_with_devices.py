"""`train_with_devices.py N FLAGS...`: scripts/train.py on N simulated devices, with a model that takes a moment."""

import runpy
import sys
from pathlib import Path

import jax

from jaxchunk.models import qwen2

if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", int(sys.argv.pop(1)))
    qwen2.SIZES["tiny"] = qwen2.Qwen2Config(300, 32, 1, 4, 2, 48, tie_word_embeddings=True)
    runpy.run_path(str(Path(__file__).parents[2] / "scripts" / "train.py"), run_name="__main__")
