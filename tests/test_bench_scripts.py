"""The benchmark scripts end to end, as people run them: flags, Ctrl-C, --continue."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
ENVIRONMENT = os.environ | {"JAX_PLATFORMS": "cpu"}


def start(script, *flags):
    command = [sys.executable, str(ROOT / "scripts" / script), *map(str, flags)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=ENVIRONMENT, cwd=ROOT, **pipes)


def run(script, *flags):
    with start(script, *flags) as process:
        out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def records(path):
    file = path / "records.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


SMALL = ("--m", 256, "--k", 16, "--n", 512, "--chunks", 1, 4, "--iters", 3)


def test_microbench_interrupted_and_continued(tmp_path):
    path = tmp_path / "run"
    with start("microbench.py", *SMALL, "--repeats", 100_000, "--out_dir", path) as process:
        deadline_s = time.monotonic() + 120
        while len(records(path)) < 6 and time.monotonic() < deadline_s and process.poll() is None:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    kept = len(records(path))
    assert kept >= 6 and f"interrupted: {kept} of 400000 windows are measured and kept" in out
    assert "| random | xla | 4 |" in out  # reported on all the same
    repeats = kept // 4 + 2
    status, out, err = run("microbench.py", *SMALL, "--repeats", repeats, "--out_dir", path, "--continue")
    assert status == 0, err
    found = {(record["variant"], record["repeat"]) for record in records(path)}
    assert {repeat for _, repeat in found} == set(range(repeats)) and len(found) == 4 * repeats
    assert "windows; about" in out
    status, out, err = run("plot.py", path)
    assert status == 0 and "throughput.png" in out, err


def test_bad_flags_end_with_a_line_and_status_2(tmp_path):
    status, _, err = run("microbench.py", "--chunks", 0)
    assert status == 2 and err.strip().splitlines()[-1].startswith("error: --chunks is 0; give counts from 1")


def test_peers_at_several_shapes(tmp_path):
    path = tmp_path / "peers"
    flags = ("--shapes", "64x16x97:1,2", "32x8x96:1", "--window_s", 0.02, "--settle_s", 0, "--out_dir", path, "--peers")
    status, out, err = run("bench_peers.py", *flags, "--repeats", 1)
    assert status == 0, err
    assert "| 64x16x97 | xla, 2 chunks |" in out and "| 32x8x96 | xla, 1 chunk |" in out
    assert len(records(path / "64x16x97")) == 4 and (path / "32x8x96" / "lm_head.png").exists()
    status, out, err = run("bench_peers.py", *flags, "--repeats", 2, "--continue")
    assert status == 0, err
    assert len(records(path / "64x16x97")) == 8 and len(records(path / "32x8x96")) == 6
    status, out, err = run("plot.py", path)
    assert status == 0 and "shapes.png" in out, err


def test_an_unknown_peer_ends_with_a_line_and_status_2():
    status, _, err = run("bench_lm_head.py", "--peers", "apex")
    assert status == 2 and err.strip().splitlines()[-1].startswith("error: --peers is apex; choose from all, liger, ")


def test_training_arms(tmp_path):
    path = tmp_path / "pair"
    flags = ("--piece_s", 0.2, "--repeats", 2, "--batch_size", 2, "--seq_len", 32, "--data", "synthetic")
    status, out, err = run("bench_train.py", *flags, "--out_dir", path, "--record_telemetry")
    assert status == 0, err
    arms = json.loads((path / "summary.json").read_text())["arms"]
    assert [(arm["chunks"], arm["pieces"]) for arm in arms] == [(1, 2), (4, 2)]
    assert arms[0]["energy_j"] is None and arms[0]["energy_null_reason"] == "JAX runs on cpu: no GPU to measure"
    assert (path / "training_arms.png").exists() and (path / "telemetry-readings-0.jsonl").exists()
    assert "energy null: JAX runs on cpu" in out
    assert arms[0]["steps"] == arms[1]["steps"]  # so that totals can be compared
    status, out, err = run("plot.py", path)
    assert status == 0 and "training_arms.png" in out, err


def test_sampler_overhead(tmp_path):
    flags = (*SMALL[:6], "--iters", 2, "--repeats", 3)
    status, out, err = run("bench_sampler.py", *flags, "--out_dir", tmp_path / "sampler")
    assert status == 0, err
    assert "time with the sampler on, over off: " in out and "median of 3 interleaved repeats" in out
    summary = json.loads((tmp_path / "sampler" / "summary.json").read_text())
    assert summary["time_on_over_off"]["median"] > 0


def test_prefill(tmp_path):
    path = tmp_path / "prefill"
    flags = ("--seq_lens", 32, 48, "--chunks", 1, 3, "--iters", 2, "--warmup", 1, "--out_dir", path)
    status, out, err = run("prefill.py", *flags, "--repeats", 2)
    assert status == 0, err
    assert "| 48 | 3 | " in out and "energy null: JAX runs on cpu: no GPU to measure" in out
    assert len(records(path)) == 8 and "48 tokens: " in out
    status, out, err = run("plot.py", path)
    assert status == 0 and "prefill.png" in out, err


def test_scoring(tmp_path):
    path = tmp_path / "scoring"
    flags = ("--shapes", "64x16x97:1,2", "600x8x96:1", "--window_s", 0.02, "--out_dir", path)
    status, out, err = run("bench_scoring.py", *flags, "--repeats", 1)
    assert status == 0, err
    assert "| 64x16x97 | xla, 2 chunks | " in out and "energy null: JAX runs on cpu: no GPU to measure" in out
    assert "600x8x96: xla, 2 chunks, the default of `score`, has " in out and len(records(path)) == 8
    status, out, err = run("bench_scoring.py", *flags, "--repeats", 2, "--continue")
    assert status == 0 and len(records(path)) == 16, err
    status, out, err = run("plot.py", path)
    assert status == 0 and "scoring.png" in out, err
