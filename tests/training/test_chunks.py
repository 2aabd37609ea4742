"""A chunk count that is left open: what is chosen, written down and kept by a run that goes on."""

import dataclasses
import json
import signal
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from jaxchunk.compilation import CompileTime
from jaxchunk.device_memory import ProgramMemory
from jaxchunk.errors import InputError
from jaxchunk.plotting import plot_training
from jaxchunk.run_dir import RunDirectory, read_json_lines
from jaxchunk.training import checkpoint, chunks, plan, step, trainer
from jaxchunk.training.checkpoint import load_params
from jaxchunk.training.config import TrainConfig, validate
from jaxchunk.training.memory import MemoryPlan
from jaxchunk.training.programs import Programs
from jaxchunk.tuning import ChunkChoice
from jaxchunk.tuning.controller import Controller


@pytest.fixture
def adaptive(config):
    """Thermal constants of a moment: a visit to a count lasts some steps."""
    return dataclasses.replace(
        config, lmhead_chunks="adaptive", chunk_candidates=(1, 4), chunk_thermal_s=0.02, steps=150, val_every=0,
        checkpoint_every=0,
    )  # fmt: skip


@pytest.fixture
def auto(adaptive):
    return dataclasses.replace(adaptive, lmhead_chunks="auto", chunk_budget_s=0.2)


def test_auto_is_settled_before_training_and_kept_by_a_run_that_goes_on(auto, monkeypatch, capsys):
    trainer.train(auto)
    path = Path(auto.out_dir)
    chosen = json.loads((path / "env.json").read_text())["chosen"]
    choice = ChunkChoice.from_dict(chosen["lmhead_chunks_choice"])
    assert choice.num_chunks == chosen["lmhead_chunks"] in (1, 4) and choice.num_tokens == 64
    assert json.loads((path / "config.json").read_text())["lmhead_chunks"] == choice.num_chunks
    assert f"chunks  {choice.num_chunks}, measured in " in capsys.readouterr().out
    assert load_params(path).config.lmhead_chunks == choice.num_chunks

    def not_again(*_, **__):
        raise AssertionError("it is settled")

    monkeypatch.setattr(chunks, "choose_num_chunks", not_again)
    trainer.train(dataclasses.replace(auto, resume=True))


def test_an_adaptive_run_needs_the_memory_of_the_candidate_that_needs_most(adaptive):
    def compile_with(arm):
        memory = ProgramMemory(operand_bytes=1, temporary_bytes=16 // arm.lmhead_chunks)
        times = {"train_step": CompileTime(1.0, 1.0, from_cache=False)}
        return Programs(None, None, None, None, MemoryPlan(4, memory, None), times, None)

    programs, steps = chunks.compile_arms(adaptive, compile_with)
    assert list(steps) == [1, 4] and programs.memory_plan.memory.total_bytes == 17


def decisions(config):
    return read_json_lines(Path(config.out_dir) / "chunks.jsonl")


@pytest.mark.figure
def test_an_adaptive_run_tries_its_candidates_says_why_and_draws_them(adaptive, capsys, monkeypatch):
    assert trainer.train(adaptive)["status"] == "completed"
    records = decisions(adaptive)
    assert [record["event"] for record in records][:1] == ["explore"]
    assert "commit" in [record["event"] for record in records]
    assert all(
        record["reason"] and record["num_chunks"] in (1, 4) and record["window"]["cost"] > 0 for record in records
    )
    assert records[0]["num_chunks"] == 1 and "1 chunks are tried against 4" in records[0]["reason"]
    out = capsys.readouterr().out
    assert "chunks  adaptive: 1, 4, by time; decisions in chunks.jsonl" in out and "chunks: 1 chunks are tried" in out
    path = Path(adaptive.out_dir)
    assert json.loads((path / "config.json").read_text())["lmhead_chunks"] == "adaptive"
    assert json.loads((path / "env.json").read_text())["chosen"]["lmhead_chunks_adaptive"] == [1, 4]
    losses = [record["loss"] for record in read_json_lines(path / "steps.jsonl")]
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    plot_training(path)
    (panel,) = (axis for axis in figures[0].axes if axis.get_ylabel() == "chunks")
    times_s, counts = panel.lines[0].get_data()
    assert list(counts[:-1]) == [4, *(record["num_chunks"] for record in records)]
    assert list(times_s[1:-1]) == [record["time_s"] for record in records]
    steps = read_json_lines(path / "steps.jsonl")
    assert {record["lmhead_chunks"] for record in steps} == {1, 4} and steps[0]["lmhead_chunks"] == 4
    assert "to the end" not in out
    fixed = dataclasses.replace(adaptive, lmhead_chunks=4, out_dir=str(path) + "-fixed")
    trainer.train(fixed)
    assert "chunks" not in [axis.get_ylabel() for axis in figures[-1].axes]
    same = [record["loss"] for record in read_json_lines(Path(fixed.out_dir) / "steps.jsonl")]
    short = dataclasses.replace(adaptive, chunk_thermal_s=60.0, steps=3, out_dir=str(path) + "-short")
    trainer.train(short)
    assert "the run ended before 1, 4 were compared to the end, which takes 540 s" in capsys.readouterr().out
    np.testing.assert_allclose(losses, same, rtol=1e-3)  # rounding grows with the steps


def test_an_adaptive_run_goes_on_with_what_it_knows(adaptive, monkeypatch):
    append = RunDirectory.append

    def append_and_stop(self, name, record):
        append(self, name, record)
        if name == "chunks.jsonl":
            monkeypatch.setattr(RunDirectory, "append", append)
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(RunDirectory, "append", append_and_stop)
    done = trainer.train(adaptive)["steps"]
    saved = checkpoint.read_about(Path(adaptive.out_dir), done)["chunk_controller"]
    assert saved["candidates"] == [1, 4] and done < 150
    before, taken_up = decisions(adaptive), []
    go_on_from = Controller.go_on_from
    monkeypatch.setattr(Controller, "go_on_from", lambda self, saved: taken_up.append(saved) or go_on_from(self, saved))
    assert trainer.train(dataclasses.replace(adaptive, resume=True))["steps"] == 150
    assert taken_up == [saved]
    assert decisions(adaptive)[: len(before)] == before


def test_candidates_that_do_not_compile_are_left_out(adaptive, monkeypatch, caplog):
    compile_programs = plan.compile_programs

    def broken(config, *arguments):
        if config.lmhead_chunks == 1:
            raise RuntimeError("no such tile\nand more")
        return compile_programs(config, *arguments)

    monkeypatch.setattr(plan, "compile_programs", broken)
    trainer.train(adaptive)
    assert "1 chunk(s) are left out: no such tile" in caplog.text
    assert {record["num_chunks"] for record in decisions(adaptive)} <= {4}


@pytest.mark.parametrize("how", ["auto", "adaptive"])
def test_energy_is_refused_where_there_is_none(auto, how, caplog):
    energy = dataclasses.replace(auto, lmhead_chunks=how, chunk_objective="energy")
    with pytest.raises(InputError, match="no source of it here"):
        trainer.train(energy)
    assert not Path(auto.out_dir).exists()
    trainer.train(dataclasses.replace(energy, chunk_time_if_no_energy=True, cache_dir=auto.cache_dir))
    assert "no energy here" in caplog.text


def test_the_reference_has_nothing_to_adapt(adaptive):
    with pytest.raises(InputError, match="reference has no chunks"):
        trainer.train(dataclasses.replace(adaptive, lmhead_impl="reference"))


@pytest.fixture
def asked(monkeypatch):
    """What is asked of `choose_num_chunks`."""
    asked = {}

    def choose(hidden, weight, **options):
        asked.update(options, hidden=hidden, weight=weight)
        return ChunkChoice(4, "", "time", 64, "xla", (), {}, 0.0)

    monkeypatch.setattr(chunks, "choose_num_chunks", choose)
    return asked


def test_the_head_may_have_what_the_rest_leaves(auto, asked):
    model = chunks.qwen2.SIZES["tiny"]
    for limit_bytes, config, expected in [
        (None, auto, None),
        (10**9, auto, pytest.approx(0.94e9, rel=0.1)),
        (10**9, dataclasses.replace(auto, chunk_memory_gb=0.5), 5 * 10**8),
    ]:
        settled, _ = chunks.settle(config, model, limit_bytes)
        assert settled.num_chunks == 4 and asked["memory_budget_bytes"] == expected
        assert asked["hidden"].shape == (4, 16, 32)


@pytest.mark.parametrize("rank", [0, 2])
def test_the_head_is_measured_as_training_runs_it(auto, asked, monkeypatch, rank):
    """Beside adapters the weight is frozen, and is kept in the compute dtype."""
    run, loss = set(), step.lm_head_loss

    def seen(hidden, weight, *operands, **options):
        run.add((hidden.dtype, weight.dtype))
        return loss(hidden, weight, *operands, **options)

    monkeypatch.setattr(step, "lm_head_loss", seen)
    trainer.train(dataclasses.replace(auto, lora_rank=rank, compute_dtype="bfloat16", steps=2))
    assert run == {(asked["hidden"].dtype, asked["weight"].dtype)}
    assert asked["frozen_weight"] == (rank > 0)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"lmhead_chunks": 0}, "--lmhead_chunks is 0; it must be at least 1, auto or adaptive"),
        ({"chunk_candidates": (4, 0)}, "--chunk_candidates is 4 0"),
        ({"chunk_memory_gb": 0.0}, "--chunk_memory_gb is 0"),
        ({"chunk_thermal_s": 0.0}, "--chunk_thermal_s is 0"),
        ({"chunk_budget_s": -1.0}, "--chunk_budget_s is -1"),
    ],
)
def test_flags_out_of_their_domain(changes, said):
    with pytest.raises(InputError, match=said):
        validate(dataclasses.replace(TrainConfig(), **changes))
