"""Trains a tiny model in a process that tests kill: `train_and_die.py '[[{...TrainConfig...}, STEP or null], ...]'`.

Of several runs, one after the other, each may have a step at whose checkpoint the process kills itself: when all of it
is written and only its name is missing.
"""

import json
import os
import signal
import sys
from pathlib import Path

import jax

from jaxchunk.models import qwen2
from jaxchunk.training import trainer
from jaxchunk.training.config import TrainConfig

rename = os.rename


def rename_or_die(source, target, **options):
    if Path(target).name == str(die_at):
        os.kill(os.getpid(), signal.SIGKILL)
    rename(source, target, **options)


if __name__ == "__main__":
    os.rename = rename_or_die
    qwen2.SIZES["tiny"] = qwen2.Qwen2Config(300, 32, 1, 4, 2, 48, tie_word_embeddings=True)
    runs = [(TrainConfig(**config), step) for config, step in json.loads(sys.argv[1])]
    jax.config.update("jax_compilation_cache_dir", runs[0][0].cache_dir)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    for config, die_at in runs:  # noqa: B007 (read by rename_or_die)
        trainer.train(config)
