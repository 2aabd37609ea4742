"""JAX's cache of compiled programs, as the trainer turns it on: what a second process finds there."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from jaxchunk.compilation import CompileTime, compile_timed, sum_of

SCRIPT = Path(__file__).parents[1] / "scripts" / "train.py"


def train(out_dir, *flags):
    command = [SCRIPT, "--seq_len", 16, "--batch_size", 2, "--steps", 3, "--data", "synthetic", "--keep_checkpoints", 0]
    command += ["--scan_layers"]
    done = subprocess.run(
        [sys.executable, *map(str, (*command, "--out_dir", out_dir, *flags))],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ
        | {"JAX_PLATFORMS": "cpu", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"},  # fast machines too
    )
    assert done.returncode == 0, done.stderr
    summary, about = (json.loads((out_dir / name).read_text()) for name in ("summary.json", "env.json"))
    losses = [json.loads(line)["loss"] for line in (out_dir / "steps.jsonl").read_text().splitlines()]
    return losses, summary["compile_times"]["train_step"]["from_cache"], about["program_cache"], done


def test_the_second_process_finds_the_program_and_computes_the_same(tmp_path):
    cache = tmp_path / "cache"
    compiled, from_cache, directory, done = train(tmp_path / "first", "--cache_dir", cache)
    assert not from_cache and directory == str(cache / "programs")
    assert any(path.name.startswith("jit_train_step") for path in (cache / "programs").iterdir())
    assert "lowering" in done.stdout and "from the cache" not in done.stdout
    loaded, from_cache, _, done = train(tmp_path / "second", "--cache_dir", cache)
    assert from_cache and loaded == compiled  # to the bit
    assert "from the cache" in done.stdout and "Error" not in done.stderr


CHOOSE = """
from pathlib import Path
from jaxchunk.compilation import keep_programs, program_cache
keep_programs(Path("ours"))
print(program_cache())
"""


@pytest.mark.parametrize(
    ("variables", "directory"),
    [
        ({"JAX_COMPILATION_CACHE_DIR": "theirs"}, "theirs"),
        ({"JAX_ENABLE_COMPILATION_CACHE": "false"}, "None"),
    ],
)
def test_what_the_user_chose_stays(variables, directory):
    done = subprocess.run([sys.executable, "-c", CHOOSE], capture_output=True, text=True, env=os.environ | variables)
    assert done.stdout.strip() == directory, done.stderr


def test_times_of_a_program():
    program, time = compile_timed(jax.jit(lambda x: 2 * x), jax.ShapeDtypeStruct((3,), jnp.float32))
    assert program(jnp.ones(3)).tolist() == [2.0, 2.0, 2.0]
    assert time.lower_s > 0 and time.compile_s > 0 and not time.from_cache
    assert sum_of([time, CompileTime(1.0, 2.0, True)]).total_s == pytest.approx(time.total_s + 3.0)


def test_an_interrupt_waits_for_the_end_of_lowering():
    reached = []

    def interrupted_while_traced(x):
        os.kill(os.getpid(), signal.SIGINT)
        reached.append(2 * x)
        return reached[-1]

    with pytest.raises(KeyboardInterrupt):
        compile_timed(jax.jit(interrupted_while_traced), jax.ShapeDtypeStruct((3,), jnp.float32))
    assert reached
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
