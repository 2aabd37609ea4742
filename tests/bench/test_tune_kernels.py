"""The tuner from its flags to the table, with a machine that is made up."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from jaxchunk.bench import tune_kernels
from jaxchunk.bench.kernel_timing import Evaluation
from jaxchunk.bench.tune_kernels import Machine, TuneConfig
from jaxchunk.bench.tuning_report import brief
from jaxchunk.errors import InputError, RunFailedError
from jaxchunk.lm_head.kernels import tuned
from jaxchunk.lm_head.kernels.triton_gemm import TritonTiles

ROOT = Path(__file__).parents[2]
BEST = TritonTiles(tile_m=128, tile_n=256, tile_k=32, group=16, num_warps=8, num_stages=4)
WRONG = TritonTiles(tile_m=64, tile_n=64, tile_k=32, num_warps=4, num_stages=5)
SHAPES = ("1024x64x4096", "1024x128x4096")
WORKS = {"evaluate": lambda config: None, "call": lambda config: None}


class FakeBench:
    """Costs that grow with the number of fields that differ from the best; `happens` may raise or return a problem."""

    def __init__(self, asked, happens):
        self.asked, self.happens = asked, happens

    def evaluate(self, config):
        self.asked.append(config)
        if problem := self.happens["evaluate"](config):
            return Evaluation(None, problem)
        return Evaluation(1e3 * self.cost_s(config))

    def call_s(self, config):
        self.happens["call"](config)
        return 1e-3 if config is None else self.cost_s(config)

    def cost_s(self, config):
        pairs = zip(dataclasses.astuple(config), dataclasses.astuple(BEST), strict=True)
        return 1e-3 * (1.1 + 0.02 * sum(a != b for a, b in pairs))


def fake(asked=None, device="NVIDIA Fake", **happens):
    asked = [] if asked is None else asked
    return Machine(
        device,
        ("triton_gemm",),
        lambda: ({"jax": "fake"}, ["another process"]),
        lambda kernel, shape, config: FakeBench(asked, WORKS | happens),
    )


def config(path, **changes):
    return TuneConfig(**{"shapes": SHAPES, "out_dir": str(path)} | changes)


def records(path, event=None):
    lines = [json.loads(line) for line in (path / "records.jsonl").read_text().splitlines()]
    return [record for record in lines if event in (None, record["event"])]


def test_from_flags_to_the_table(tmp_path, capsys):
    path, table = tmp_path / "run", tmp_path / "table.json"
    other = {"kernel": "mosaic", "device": "NVIDIA Fake", "C": 1024, "D": 64, "V": 4096, "config": {"stages": 2}}
    older = other | {"kernel": "triton_gemm", "config": {}}
    rest = {"milliseconds": 1.5, "over_cublas": 1.5, "jax_version": "0.11.2", "date": "2026-01-01"}
    table.write_text(json.dumps([older | rest, other | rest]))
    machine = fake(evaluate=lambda c: "wrong: sums off" if c == WRONG else None)
    assert tune_kernels.run(config(path, write_table=str(table)), machine) == path
    printed = capsys.readouterr().out
    assert "warning: another process" in printed
    assert f"1024x64x4096: {brief(BEST)}: 1.100 ms (best 1.100)" in printed
    assert "triton_gemm on NVIDIA Fake, C=1024 D=64 V=4096" in printed
    assert f"| {brief(BEST)} | 1.100 | 1.100 |" in printed
    assert "| cuBLAS, x W^T alone | 1.000 |" in printed
    assert "the search ended by itself" in printed and (path / "table.md").read_text() in printed + "\n"

    own, merged = tuned.read_table(path / "tuned.json"), tuned.read_table(table)
    assert [entry.D for entry in own.entries] == [64, 128] and not own.complaints
    assert {entry.over_cublas for entry in own.entries} == {1.1} and own.entries[0].milliseconds == 1.1
    assert tuned.config_of(TritonTiles, own.entries[0].config) == BEST
    assert [(entry.kernel, entry.D) for entry in merged.entries] == [
        ("mosaic", 64), ("triton_gemm", 64), ("triton_gemm", 128),
    ]  # fmt: skip
    assert merged.entries[1:] == own.entries
    trying, evaluated = records(path, "trying"), records(path, "evaluated")
    windows = records(path, "window")
    assert len(trying) == len(evaluated) + sum(window["config"] is not None for window in windows)
    rounds = {(w["shape"], w["round"]) for w in windows if w["config"] is None}
    assert rounds == {(shape, number) for shape in SHAPES for number in range(5)}
    assert json.loads((path / "config.json").read_text())["kernel"] == "triton_gemm"


def test_a_run_that_was_interrupted_goes_on(tmp_path, capsys):
    path, first, second = tmp_path / "run", [], []

    def interrupt(candidate):
        if len(first) == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune_kernels.run(config(path), fake(first, evaluate=interrupt))
    printed = capsys.readouterr().out
    assert f"interrupted: go on with the same flags and --continue --out_dir {path}" in printed
    assert "1024x64x4096: not done; 6 configurations: 6 ran, 0 wrong, 0 failed, 0 hung" in printed
    tune_kernels.run(config(path, go_on=True), fake(second))
    assert not set(first[:6]) & set(second[:10]) and first[6] == second[0]  # an interruption is no hanging kernel
    assert len(tuned.read_table(path / "tuned.json").entries) == 2
    assert "known already: 6 configurations: 6 ran" in capsys.readouterr().out
    third = []
    tune_kernels.run(config(path, go_on=True), fake(third))
    assert third == [] and "1024x128x4096: done before" in capsys.readouterr().out
    assert len((path / "continued.jsonl").read_text().splitlines()) == 2


def test_ctrl_c_lets_the_running_attempt_end(tmp_path, capsys):
    path, first, second = tmp_path / "run", [], []

    def interrupt(candidate):
        if len(first) == 7:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        tune_kernels.run(config(path), fake(first, evaluate=interrupt))
    assert len(first) == 7 and "7 configurations: 7 ran" in capsys.readouterr().out
    tune_kernels.run(config(path, go_on=True), fake(second))
    assert not set(first) & set(second[:10]) and len(tuned.read_table(path / "tuned.json").entries) == 2


def test_a_kernel_that_never_came_back_is_left_alone(tmp_path, capsys):
    """A process that was killed while the kernel hung, and one that its watchdog ended."""
    path = tmp_path / "run"
    program = f"""
        import sys, time
        sys.path.insert(0, {str(ROOT / "tests" / "bench")!r})
        from test_tune_kernels import BEST, config, fake
        from jaxchunk.bench import tune_kernels
        hang = lambda candidate: time.sleep(60) if candidate == BEST else None
        tune_kernels.run(config({str(path)!r}, hang_s=0.2, budget_s=1000), fake(evaluate=hang))
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 1, done.stderr
    assert "did not come back within 0.2 s; go on without it with the same flags and --continue" in done.stdout
    assert records(path)[-1]["problem"] == "hung: it never came back"

    lines = (path / "records.jsonl").read_text().splitlines(keepends=True)
    (path / "records.jsonl").write_text("".join(lines[:-1]))  # as a kill would have left it
    asked = []
    tune_kernels.run(config(path, go_on=True), fake(asked))
    assert BEST not in asked[: len(asked) // 2]  # at the first shape
    printed = capsys.readouterr().out
    assert ", 1 hung; the search ended by itself" in printed
    chosen = tuned.read_table(path / "tuned.json").entries[0]
    assert tuned.config_of(TritonTiles, chosen.config) != BEST and chosen.milliseconds == 1.12


def test_a_configuration_that_fails_in_the_final_rounds_is_left_alone_afterwards(tmp_path):
    path = tmp_path / "run"

    def fail(candidate):
        if candidate == BEST:
            raise RuntimeError("INTERNAL: illegal address\nand much more")

    with pytest.raises(RunFailedError, match=r"^INTERNAL: illegal address; --continue --out_dir .* without it"):
        tune_kernels.run(config(path), fake(call=fail))
    tune_kernels.run(config(path, go_on=True, shapes=SHAPES[:1]), fake())
    (entry,) = tuned.read_table(path / "tuned.json").entries
    assert entry.milliseconds == 1.12


def test_the_budget_counts_what_was_spent(tmp_path, capsys):
    path, asked = tmp_path / "run", []
    with pytest.raises(RunFailedError, match="no configuration works at 1024x64x4096"):
        tune_kernels.run(config(path, shapes=SHAPES[:1], budget_s=1e-9), fake(asked))
    assert asked == []
    with (path / "records.jsonl").open("a") as file:
        fields = dataclasses.asdict(TritonTiles())
        known = {"config": fields, "milliseconds": 2.0, "problem": None, "wall_s": 50.0}
        file.write(json.dumps({"event": "evaluated", "shape": SHAPES[0], **known}) + "\n")
    tune_kernels.run(config(path, shapes=SHAPES[:1], budget_s=50.0, go_on=True), fake(asked))
    assert asked == [] and "the search was ended by its budget" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"shapes": ("1x2",)}, "--shapes has '1x2'"),
        ({"shapes": ("1x2x3", "1x2x3")}, "--shapes is 1x2x3 1x2x3; give each shape once"),
        ({"budget_s": 0.0}, "--budget_s is 0.0; it must be greater than 0"),
        ({"rounds": 0}, "--rounds is 0; it must be at least 1"),
        ({"seed": -1}, "--seed is -1"),
        ({"kernel": "mosaic"}, "--kernel mosaic needs a Hopper GPU and JAX 0.11, and this is NVIDIA Fake"),
        ({"write_table": "/no/such/table.json"}, "there is no directory /no/such"),
        ({"go_on": True, "out_dir": None}, "--continue needs --out_dir"),
    ],
    ids=str,
)
def test_bad_flags_are_refused_before_anything_is_written(tmp_path, flags, words):
    with pytest.raises(InputError, match=words):
        tune_kernels.run(config(tmp_path / "run", **flags), fake())
    assert not (tmp_path / "run").exists()


def test_a_table_that_would_be_lost_is_not_written_over(tmp_path):
    table = tmp_path / "table.json"
    table.write_text("[{}]")
    with pytest.raises(InputError, match=r"--write_table: .*entry 1 is left out: it lacks .* repair it first"):
        tune_kernels.run(config(tmp_path / "run", write_table=str(table)), fake())
    assert table.read_text() == "[{}]"


def test_another_device_or_window_does_not_go_on(tmp_path):
    path = tmp_path / "run"
    tune_kernels.run(config(path, shapes=SHAPES[:1]), fake())
    with pytest.raises(InputError, match="begun on NVIDIA Fake, and this is NVIDIA Other"):
        tune_kernels.run(config(path, go_on=True), fake(device="NVIDIA Other"))
    with pytest.raises(InputError, match=r"has --window_s 0.25, and now it is 1.0"):
        tune_kernels.run(config(path, go_on=True, window_s=1.0), fake())


def test_on_a_cpu_there_is_nothing_to_tune(tmp_path):
    command = [sys.executable, ROOT / "scripts" / "tune_kernels.py", "--out_dir", tmp_path / "run"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 2
    assert done.stderr == "error: tuning kernels needs an NVIDIA GPU, and JAX runs on cpu\n"
    assert not (tmp_path / "run").exists()
