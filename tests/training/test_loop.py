"""The loop end to end in one process: records, energy from a simulated GPU, interrupts, bad losses."""

import dataclasses
import json
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxchunk import data
from jaxchunk.errors import InputError, RunFailedError
from jaxchunk.run_dir import read_json_lines
from jaxchunk.telemetry import Monitor, NotSupported, SimulatedDevice
from jaxchunk.telemetry.simulation.simulated import Constant
from jaxchunk.training import trainer


def run(config):
    summary = trainer.train(config)
    path = Path(config.out_dir)
    return summary, read_json_lines(path / "steps.jsonl"), read_json_lines(path / "validation.jsonl")


@pytest.mark.figure
def test_records_of_a_run(config, capsys):
    summary, steps, validation = run(config)
    assert [record["step"] for record in steps] == list(range(1, 13))
    assert [record["step"] for record in validation] == [5, 10, 12]
    assert steps[-1]["loss"] < steps[0]["loss"]
    for record in steps:
        assert record["energy_j"] is None
        assert record["energy_null_reason"] == "JAX runs on cpu: no GPU to measure"
        assert record["power_w"] is None and record["throttle"] is None and record["mfu"] is None
        assert record["tokens_per_s"] == pytest.approx(64 / record["step_time_s"])
    assert np.all(np.diff([record["time_s"] for record in steps]) > 0)
    path = Path(config.out_dir)
    assert json.loads((path / "summary.json").read_text()) == summary
    assert json.loads((path / "config.json").read_text()) == json.loads(json.dumps(dataclasses.asdict(config)))
    environment = json.loads((path / "env.json").read_text())
    assert environment["packages"]["jax"] == jax.__version__
    assert environment["gpu"]["energy_source"] is None
    assert (path / "training.png").read_bytes().startswith(b"\x89PNG")
    assert summary["val_loss"] == validation[-1]["val_loss"]
    assert summary["status"] == "completed"
    out = capsys.readouterr().out
    assert "LM head  xla, 4 chunk(s) of 16 tokens in each micro-batch (pallas cannot run" in out
    assert "step 12/12  loss" in out
    assert "energy null: JAX runs on cpu" in out


def test_one_and_four_chunks_give_the_same_loss_curve(config):
    curves = [
        [record["loss"] for record in run(dataclasses.replace(config, lmhead_chunks=n, overwrite=True))[1]]
        for n in (1, 4)
    ]
    np.testing.assert_allclose(*curves, rtol=1e-5)


def test_the_seed_settles_everything(config):
    def losses(seed):
        return [r["loss"] for r in run(dataclasses.replace(config, seed=seed, overwrite=True))[1]]

    assert losses(0) == losses(0)
    assert losses(0) != losses(1)


@pytest.mark.parametrize(
    ("failing", "source"),
    [({}, "nvml_total_energy"), ({"total_energy_j": NotSupported("no counter")}, "nvml_power_instant")],
)
def test_energy_of_every_step_comes_from_the_device(config, monkeypatch, failing, source):
    """On a simulated GPU that draws a constant 300 W, with batches that come slowly, so that steps last many ticks."""
    train_batches = data.train_batches

    def slow_batches(*arguments):
        for batch in train_batches(*arguments):
            time.sleep(0.15)
            yield batch

    monkeypatch.setattr(data, "train_batches", slow_batches)

    def open_simulated(jax_device, *, csv_path, **_):
        device = SimulatedDevice(Constant(300.0), time.perf_counter, tick_s=0.005, failing=failing)
        return Monitor(device, csv_path=csv_path, poll_period_s=0.001, sample_period_s=0.002)

    monkeypatch.setattr(trainer, "open_monitor", open_simulated)
    summary, steps, _ = run(dataclasses.replace(config, val_every=0, keep_checkpoints=0))
    assert {record["energy_source"] for record in steps} == {source}
    known = [record for record in steps if record["energy_j"] is not None]
    assert len(known) >= 5
    for record in known:
        assert abs(record["energy_j"] - 300.0 * record["step_time_s"]) <= record["energy_bound_j"] * 1.01 + 1e-6
        assert record["energy_per_token_j"] == pytest.approx(record["energy_j"] / 64)
        assert record["power_w"] == pytest.approx(300.0, rel=0.11)
    for record in steps:
        assert (record["energy_j"] is None) == (record["energy_null_reason"] is not None)
    assert summary["energy_j"] == pytest.approx(300.0 * summary["training_time_s"], rel=0.05)
    assert summary["power_w_std"] == pytest.approx(0.0, abs=1e-6)
    assert (Path(config.out_dir) / "telemetry.csv").read_text().count("\n") > 10


def test_an_interrupt_keeps_what_was_measured(config, monkeypatch, capsys):
    append = trainer.RunDirectory.append

    def interrupt_at_step_3(self, name, record):
        append(self, name, record)
        if record.get("step") == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(trainer.RunDirectory, "append", interrupt_at_step_3)
    summary, steps, validation = run(config)
    assert summary["status"] == "interrupted"
    assert 3 <= summary["steps"] == len(steps) < 12
    assert validation == []
    assert "interrupted after" in capsys.readouterr().out


@pytest.mark.figure
def test_a_bad_loss_stops_the_run_and_says_where(config):
    with pytest.raises(RunFailedError, match="the loss is nan at step"):
        trainer.train(dataclasses.replace(config, lr=1e30, grad_clip=1e30))
    path = Path(config.out_dir)
    steps = read_json_lines(path / "steps.jsonl")
    assert steps and steps[-1]["loss"] is None  # JSON has no NaN
    summary = json.loads((path / "summary.json").read_text())
    assert summary["status"] == "failed"
    assert summary["status_reason"].startswith(f"the loss is nan at step {steps[-1]['step']}")
    assert (path / "training.png").exists()


def test_what_was_chosen_and_the_hash_of_the_text_are_recorded(config):
    trainer.train(config)
    environment = json.loads((Path(config.out_dir) / "env.json").read_text())
    assert environment["chosen"]["lmhead_impl"] == "xla"
    assert environment["chosen"]["micro_batch_size"] == 4
    assert (environment["chosen"]["lmhead_chunks"], environment["chosen"]["lmhead_chunk_tokens"]) == (4, 16)
    assert environment["data"]["corpus_sha256"] == data.read_corpus(config.data).sha256
    assert environment["data"]["tokens"] > 1000


def test_a_counter_that_stands_still_costs_a_second_and_not_one_a_step(config, monkeypatch):
    def open_simulated(jax_device, *, csv_path, **_):
        return Monitor(SimulatedDevice(Constant(300.0), time.perf_counter, tick_s=1e9), csv_path=csv_path)

    monkeypatch.setattr(trainer, "open_monitor", open_simulated)
    _, steps, validation = run(dataclasses.replace(config, val_every=0))
    assert len(steps) == 12
    assert all(record["energy_j"] is None and record["energy_null_reason"] for record in steps)
    assert validation[-1]["time_s"] < 8  # after all steps; it once took a second for every step


def test_named_attention_that_cannot_run_is_refused(config):
    with pytest.raises(InputError, match="cuDNN attention cannot run: JAX runs on cpu"):
        trainer.train(dataclasses.replace(config, attention="cudnn"))
    assert not Path(config.out_dir).exists()
