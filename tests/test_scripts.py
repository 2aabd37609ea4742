"""The scripts as people run them: in a process of their own."""

import json
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from jaxchunk import data
from jaxchunk.models import hf, qwen2

SCRIPTS = Path(__file__).parent.parent / "scripts"


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"line {i} of a text that repeats itself, line {i % 7}\n" for i in range(3000)))
    return path


def run_script(name, *flags):
    return subprocess.run(
        [sys.executable, SCRIPTS / name, *map(str, flags)],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )


def test_train_end_to_end(tmp_path, text):
    flags = ["--data", text, "--cache_dir", tmp_path / "cache", "--lmhead-chunks", 4, "--seq_len", 32, "--steps", 6]
    done = run_script("train.py", *flags, "--out_dir", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    steps = [json.loads(line) for line in (tmp_path / "run" / "steps.jsonl").read_text().splitlines()]
    assert len(steps) == 6
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert steps[0]["energy_j"] is None
    assert "no GPU to measure" in steps[0]["energy_null_reason"]
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        ".jaxchunk-run", "config.json", "env.json", "run.json", "steps.jsonl", "stretches.jsonl", "validation.jsonl",
        "summary.json", "training.png", "checkpoints",
    }  # fmt: skip
    again = run_script("train.py", *flags, "--out_dir", tmp_path / "run")
    assert again.returncode == 2
    assert again.stderr.strip().splitlines()[-1].startswith("error: out_dir")
    assert "pass --overwrite" in again.stderr


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--lmhead_chunks", "0"], "error: --lmhead_chunks is 0; it must be at least 1"),
        (["--lmhead_impl", "pallas"], "error: --lmhead_impl: implementation='pallas' cannot run"),
        (["--data", "/no/such/file"], "/no/such/file"),
        (["--hf_model", "/no/such/model"], "error: there is no directory /no/such/model"),
        (["--out_dir", "/dev/null/run"], "error: out_dir /dev/null/run cannot be written"),
    ],
)
def test_bad_input_is_one_line_and_status_2(flags, words, tmp_path):
    done = run_script("train.py", "--cache_dir", tmp_path, *flags)
    assert done.returncode == 2
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_unknown_flag_is_status_2():
    done = run_script("train.py", "--lm_head_chunks", "4")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def test_bench_end_to_end(tmp_path):
    flags = [
        "--tokens",
        "64",
        "--width",
        "16",
        "--vocab",
        "97",
        "--chunks",
        "1",
        "3",
        "--repeats",
        "2",
        "--window_s",
        "0.02",
    ]
    done = run_script("bench_lm_head.py", *flags, "--out_dir", tmp_path / "bench")
    assert done.returncode == 0, done.stderr
    assert "| xla, 3 chunks |" in done.stdout
    assert "energy null: JAX runs on cpu: no GPU to measure" in done.stdout
    records = (tmp_path / "bench" / "records.jsonl").read_text().splitlines()
    assert len(records) == 2 * 4
    assert (tmp_path / "bench" / "lm_head.png").read_bytes().startswith(b"\x89PNG")
    assert run_script("bench_lm_head.py", "--chunks", "0").returncode == 2


@pytest.mark.parametrize(("stop", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 0), (signal.SIGKILL, -9)])
def test_what_was_measured_survives_a_stop(stop, status, tmp_path, text):
    flags = ["--data", text, "--cache_dir", tmp_path / "cache", "--seq_len", 32, "--batch_size", 2, "--steps", 100000]
    command = [sys.executable, SCRIPTS / "train.py", *flags, "--out_dir", tmp_path / "run"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)
    steps = tmp_path / "run" / "steps.jsonl"
    deadline_s = time.monotonic() + 120
    while not (steps.exists() and steps.read_text().count("\n") > 5):
        assert time.monotonic() < deadline_s and process.poll() is None
        time.sleep(0.1)
    process.send_signal(stop)
    out, errors = process.communicate(timeout=60)
    assert process.returncode == status
    assert (b"with the same flags and --resume --out_dir" in out) == (stop != signal.SIGKILL)
    assert b"Traceback" not in errors
    lines = steps.read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, len(lines) + 1))
    written = {path.name for path in (tmp_path / "run").iterdir()} & {"summary.json", "training.png"}
    if stop == signal.SIGKILL:
        assert not written
        redrawn = run_script("plot.py", tmp_path / "run")
        assert redrawn.returncode == 0, redrawn.stderr
    else:
        assert written == {"summary.json", "training.png"}


def test_runs_are_compared_and_what_is_none_is_refused(tmp_path):
    for name, loss in (("a", 3.0), ("b", 2.0)):
        (tmp_path / name).mkdir()
        record = {"step": 1, "time_s": 1.0, "loss": loss, "step_time_s": 0.5, "tokens_per_s": 10.0}
        record["energy_null_reason"] = "no GPU"
        (tmp_path / name / "steps.jsonl").write_text(json.dumps(record) + "\n")
    done = run_script("plot.py", tmp_path / "a", tmp_path / "b")
    assert done.returncode == 0, done.stderr
    assert "| a | unknown | unknown | no finished run | 1 |" in done.stdout
    assert "none of these runs has telemetry" in done.stdout
    assert (tmp_path / "losses.png").read_bytes().startswith(b"\x89PNG")
    refused = run_script("plot.py", tmp_path)
    assert refused.returncode == 2
    assert "holds no records" in refused.stderr
    reported = run_script("report.py", tmp_path / "a", tmp_path / "b")
    assert reported.returncode == 0, reported.stderr
    assert (tmp_path / "report.html").read_text().startswith("<!DOCTYPE html>")
    refused = run_script("report.py", tmp_path)
    assert refused.returncode == 2
    assert refused.stderr == f"error: {tmp_path} holds no records of train.py\n"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A small model with random weights and a tokenizer, as Hugging Face stores it."""
    directory = tmp_path_factory.mktemp("checkpoint")
    (directory / "text.txt").write_text("some words that come again and again")
    data.train_or_load_tokenizer(data.read_corpus(directory / "text.txt"), 270, directory).save(
        str(directory / "bpe.json")
    )
    config = qwen2.Qwen2Config(270, 32, 2, 4, 2, 48, tie_word_embeddings=True, max_position_embeddings=64)
    params = jax.tree.map(lambda leaf: 20 * leaf, qwen2.init(config, jax.random.key(0)))
    hf.save(config, params, directory / "model", tokenizer=directory / "bpe.json")
    return directory / "model"


def test_generate_writes_what_the_model_says(checkpoint, tmp_path):
    (tmp_path / "prompt.txt").write_text("some words")
    flags = ["--hf_model", checkpoint, "--dtype", "float32", "--max_new_tokens", 12]
    done = run_script("generate.py", "--prompt_file", tmp_path / "prompt.txt", *flags, "--prefill_chunks", 2)
    assert done.returncode == 0, done.stderr
    config, params = hf.load(checkpoint)
    tokenizer = data.load_tokenizer(checkpoint / "tokenizer.json")
    ids = tokenizer.encode("some words", add_special_tokens=False).ids
    expected = []
    logits = jax.jit(lambda ids: qwen2.logits(config, params, ids))
    for _ in range(12):
        padded = jnp.asarray([[*ids, *expected] + [0] * (30 - len(ids) - len(expected))])
        expected.append(int(jnp.argmax(logits(padded)[0, len(ids) + len(expected) - 1])))
        if expected[-1] == tokenizer.token_to_id("<|endoftext|>"):
            break
    assert done.stdout == tokenizer.decode(expected).removesuffix("<|endoftext|>") + "\n"
    assert f"{len(ids)} tokens of prompt, {len(expected)} new" in done.stderr


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--prompt", "a"], "unrecognized"),
        (["a", "--prompt_file", "b", "--hf_model", "x"], "error: give a prompt or --prompt_file, one of the two"),
        (["a"], "error: give --hf_model or --run_dir, one of the two"),
        (["a", "--temperature", "-1"], "error: --temperature is -1.0 and --top_p 1.0; the first must be"),
        (["a b", "--hf_model", "MODEL", "--prefill_chunks", "9"], "error: --prefill_chunks is 9; the prompt has"),
        (["a b", "--hf_model", "MODEL", "--max_new_tokens", "99"], "the model has 64 positions"),
        (["a b", "--hf_model", "MODEL", "--chat"], "error: messages need a chat template"),
        (["a b", "--hf_model", "MODEL", "--stop", "<end>"], "error: --stop has '<end>', which is no token"),
    ],
)
def test_what_generate_refuses(flags, words, checkpoint, monkeypatch, capsys):
    """In this process: the script has nothing to say to JAX before it refuses."""
    path = SCRIPTS / "generate.py"
    monkeypatch.setattr(sys, "argv", [str(path), *(str(checkpoint) if flag == "MODEL" else flag for flag in flags)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(path), run_name="__main__")
    assert ended.value.code == 2
    assert words in capsys.readouterr().err.replace("Unrecognized", "unrecognized")


def test_the_loss_and_the_step_import_no_telemetry():
    """Telemetry watches from the side; the loss can be lifted out."""
    program = (
        "import sys, jaxchunk.lm_head; "
        "ours = {m for m in sys.modules if m.startswith('jaxchunk.')}; "
        # `interleaving`, which needs nothing but the loss's own helpers, comes with the package's face.
        "assert all(m.startswith('jaxchunk.lm_head') for m in ours - {'jaxchunk.interleaving'}), ours; "
        "import jaxchunk.training.step; assert not any('telemetry' in m for m in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
