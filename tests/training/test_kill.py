"""kill -9 at any moment: what is gone on with ends as if nothing had happened.

`JAXCHUNK_KILLS=20 pytest tests/training/test_kill.py -s` kills twenty times, at moments of the start as well.
"""

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

from jaxchunk.run_dir import read_json_lines
from jaxchunk.training.checkpoint import load_params, saved_steps

KILLS = int(os.environ.get("JAXCHUNK_KILLS", "2"))
EVERY = 7  # steps between checkpoints


def start(*runs):
    program = Path(__file__).with_name("train_and_die.py")
    arguments = json.dumps([[dataclasses.asdict(config), die_at] for config, die_at in runs])
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    return subprocess.Popen([sys.executable, program, arguments], stdout=subprocess.DEVNULL, env=environment)


def kill_at_random(process, run, chance):
    """Somewhere in the start, or soon after the run has gone on; returns whether it was there to be killed."""
    began = (run / "run.json").stat().st_mtime_ns
    if KILLS > 2 and chance.random() < 0.4:
        time.sleep(chance.uniform(0, 8))
    else:
        while (run / "run.json").stat().st_mtime_ns == began and process.poll() is None:
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.8))
    process.kill()
    return process.wait(timeout=60) == -signal.SIGKILL


def learned(run):
    steps = [(record["step"], record["loss"], record["grad_norm"]) for record in read_json_lines(run / "steps.jsonl")]
    validations = [(record["step"], record["val_loss"]) for record in read_json_lines(run / "validation.jsonl")]
    return steps, validations, jax.tree.map(lambda a: np.asarray(a).tobytes(), load_params(run).params)


def test_a_run_that_is_killed_again_and_again_ends_like_one_that_was_not(config, tmp_path):
    whole = dataclasses.replace(
        config, steps=60 * KILLS, checkpoint_every=EVERY, val_every=10, val_batches=1, lmhead_chunks=1,
        out_dir=str(tmp_path / "whole"),
    )  # fmt: skip
    run = tmp_path / "killed"
    killed = dataclasses.replace(whole, out_dir=str(run))
    # In the first process both runs begin; the second dies while it saves.
    assert start((whole, None), (killed, 2 * EVERY)).wait(timeout=240) == -signal.SIGKILL
    assert saved_steps(run) == [EVERY]
    assert (run / "checkpoints" / f"{2 * EVERY}{ocp.utils.TMP_DIR_SUFFIX}").is_dir()
    go_on = dataclasses.replace(killed, resume=True)
    seed = random.randrange(2**32)
    chance, kills = random.Random(seed), 0
    for _ in range(KILLS):
        kills += kill_at_random(start((go_on, None)), run, chance)
        newest, steps = saved_steps(run)[0], [record["step"] for record in read_json_lines(run / "steps.jsonl")]
        print(f"seed {seed}, {kills} killed: {steps[-1]} steps recorded, checkpoint of step {newest}")
        assert steps == list(range(1, steps[-1] + 1))
        assert newest >= steps[-1] - 2 * EVERY  # one is being written while the next steps run
    assert kills
    assert start((go_on, None)).wait(timeout=240) == 0
    assert learned(run) == learned(tmp_path / "whole")
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == sorted(map(str, saved_steps(run)))
