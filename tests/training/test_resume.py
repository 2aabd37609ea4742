"""A run that is stopped and gone on with equals one that was not; what would make it another run is refused."""

import dataclasses
import functools
import json
import logging
import os
import shutil
import signal
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxchunk import data
from jaxchunk.errors import InputError, RunFailedError
from jaxchunk.models import qwen2
from jaxchunk.run_dir import RunDirectory, read_json_lines
from jaxchunk.telemetry import Monitor, SimulatedDevice
from jaxchunk.telemetry.simulation.simulated import Constant
from jaxchunk.training import checkpoint, plan, resume, trainer
from jaxchunk.training.checkpoint import Checkpoints, load_params, saved_steps
from jaxchunk.training.mesh import Shards
from jaxchunk.training.programs import compile_programs, compiler_options, must_loop

pytestmark = [
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.usefixtures("no_coroutine_outlives_the_module"),
]


@pytest.fixture
def config(config, caplog):
    caplog.set_level(logging.INFO, "jaxchunk")
    return dataclasses.replace(config, checkpoint_every=4, lmhead_chunks=1)


def resumed(config, **changes):
    return dataclasses.replace(config, resume=True, **changes)


def stop_after(monkeypatch, step, stop=signal.SIGTERM):
    """Sends this process a signal once the record of `step` is written."""
    append = RunDirectory.append

    def append_and_stop(self, name, record):
        append(self, name, record)
        if name == "steps.jsonl" and record["step"] == step:
            monkeypatch.setattr(RunDirectory, "append", append)
            signal.raise_signal(stop)

    monkeypatch.setattr(RunDirectory, "append", append_and_stop)


def lines(config, name):
    return read_json_lines(Path(config.out_dir) / name)


def learned(config):
    """What a run has learned and said of it: everything that does not depend on the time of day."""
    steps = [
        {name: record[name] for name in ("step", "loss", "grad_norm", "lr")} for record in lines(config, "steps.jsonl")
    ]
    validations = [(record["step"], record["val_loss"]) for record in lines(config, "validation.jsonl")]
    return steps, validations, jax.tree.map(lambda a: np.asarray(a).tobytes(), load_params(config.out_dir).params)


@pytest.fixture
def uninterrupted(config, tmp_path):
    whole = dataclasses.replace(config, out_dir=str(tmp_path / "whole"))
    trainer.train(whole)
    return learned(whole)


@pytest.mark.parametrize(("stop", "status"), [(signal.SIGTERM, "stopped"), (signal.SIGINT, "interrupted")])
def test_a_stopped_run_goes_on_to_the_bit(config, uninterrupted, monkeypatch, capsys, stop, status):
    """Stopped between checkpoints and validations, and once more."""
    stop_after(monkeypatch, 2, stop)
    summary = trainer.train(config)
    done = summary["steps"]
    assert summary["status"] == status and 2 <= done < 12
    assert saved_steps(Path(config.out_dir)) == [done]
    assert (
        f"{status} by {stop.name} after {done} steps; go on from the checkpoint of step {done}"
        in capsys.readouterr().out
    )
    stop_after(monkeypatch, 8, stop)
    assert trainer.train(resumed(config))["status"] == status
    summary = trainer.train(resumed(config))
    assert (summary["status"], summary["steps"]) == ("completed", 12)
    assert learned(config) == uninterrupted
    stretches = lines(config, "stretches.jsonl")
    assert [s["first_step"] for s in stretches] == [1, *(s["last_step"] + 1 for s in stretches[:-1])]
    continued = json.loads((Path(config.out_dir) / "run.json").read_text())["continued"]
    assert len(continued) == 2 and continued[0]["step"] == done


def test_a_stop_while_the_last_step_is_being_saved_saves_it_once(config, monkeypatch, capsys):
    save = Checkpoints.save

    def save_and_stop(self, *arguments):
        save(self, *arguments)
        monkeypatch.setattr(Checkpoints, "save", save)
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Checkpoints, "save", save_and_stop)
    assert trainer.train(config)["status"] == "stopped"
    assert saved_steps(Path(config.out_dir)) == [4]
    assert "could not be written" not in capsys.readouterr().out


def test_what_was_recorded_after_the_checkpoint_is_recorded_anew(config, uninterrupted):
    """As a kill leaves it: records beyond the newest checkpoint, the last of them cut."""
    trainer.train(config)
    path = Path(config.out_dir)
    shutil.rmtree(path / "checkpoints" / "12")
    with (path / "steps.jsonl").open("a") as file:
        file.write('{"step": 13, "lo')
    assert saved_steps(path) == [8]
    summary = trainer.train(resumed(config))
    assert summary["status"] == "completed"
    assert learned(config) == uninterrupted
    assert summary["training_time_s"] == pytest.approx(
        sum(record["step_time_s"] for record in lines(config, "steps.jsonl"))
    )


def test_a_completed_run_can_be_made_longer(config, caplog, capsys):
    trainer.train(config)
    first = lines(config, "steps.jsonl")
    assert "were there already" not in capsys.readouterr().out
    assert trainer.train(resumed(config))["steps"] == 12
    assert "all of its 12 steps were there already" in capsys.readouterr().out
    assert lines(config, "steps.jsonl") == first
    with pytest.raises(InputError, match=r"--steps is 11, was 12; it can only become larger"):
        trainer.train(resumed(config, steps=11))
    assert trainer.train(resumed(config, steps=14))["steps"] == 14
    assert lines(config, "steps.jsonl")[:12] == first
    assert "--steps is 14, was 12: from here on the learning rate follows the longer schedule" in caplog.text


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"lr": 2e-3}, "--lr is 0.002, was 0.001"),
        ({"seed": 1}, "--seed is 1, was 0"),
        ({"batch_size": 8}, "--batch_size is 8, was 4"),
        ({"seq_len": 8}, "--seq_len is 8, was 16"),
        ({"model": "qwen2-0.5b"}, "--model is qwen2-0.5b, was tiny"),
        ({"warmup_steps": 2}, "--warmup_steps is 2, was None, and the run would become another one; leave it out"),
        ({"hf_model": "Qwen/Qwen2-0.5B"}, "--hf_model is Qwen/Qwen2-0.5B, was None"),
        ({"compute_dtype": "bfloat16"}, "--compute_dtype is bfloat16, was float32"),
        ({"val_batches": 1}, "--val_batches is 1, was 2"),
    ],
)
def test_a_flag_that_makes_another_run_is_refused(config, stored, change, words):
    before = (Path(config.out_dir) / "steps.jsonl").read_text()
    with pytest.raises(InputError, match=words):
        trainer.train(resumed(config, **change))
    assert (Path(config.out_dir) / "steps.jsonl").read_text() == before


@pytest.fixture
def stored(config, monkeypatch):
    """A run that was stopped after a few steps."""
    stop_after(monkeypatch, 2)
    trainer.train(config)


def test_what_changes_nothing_or_only_rounding_may_be_changed(config, stored, caplog):
    changes = {"val_every": 6, "checkpoint_every": 0, "keep_checkpoints": 1, "max_bad_steps": 5}
    assert trainer.train(resumed(config, **changes))["steps"] == 12
    assert saved_steps(Path(config.out_dir)) == [12]
    about = checkpoint.read_about(Path(config.out_dir), 12)
    other = dataclasses.replace(config, micro_batch_size=2, remat="full")
    assert resume.same_run(other, about, Shards()) == other
    assert "--micro_batch_size is 2, was 4: the same is computed, but not to the bit" in caplog.text


def test_the_micro_batch_stays_what_was_chosen(config, stored, monkeypatch):
    monkeypatch.setattr(
        trainer, "prepare", lambda config, *_: (_ for _ in ()).throw(AssertionError(config.micro_batch_size))
    )
    with pytest.raises(AssertionError, match="4"):
        trainer.train(resumed(config, micro_batch_size=None))


def test_changed_data_is_refused_unless_told(config, stored, caplog, tmp_path):
    same = tmp_path / "elsewhere" / "text.txt"
    same.parent.mkdir()
    Path(config.data).rename(same)
    with pytest.raises(InputError, match="cannot read"):
        trainer.train(resumed(config))
    Path(config.data).write_text(same.read_text() + "and one line more\n" * 40)
    with pytest.raises(
        InputError, match=r"the data changed since the checkpoint of step \d: --data is .*allow_changed_data"
    ):
        trainer.train(resumed(config))
    assert trainer.train(resumed(config, data=str(same), steps=12))["steps"] == 12
    assert trainer.train(resumed(config, allow_changed_data=True, steps=14))["steps"] == 14
    assert "warning: the data changed since the checkpoint of step 12" in caplog.text


def test_without_a_checkpoint_a_run_starts_from_the_beginning(config, caplog, monkeypatch):
    assert trainer.train(resumed(config))["steps"] == 12
    assert f"--resume: no checkpoint in {config.out_dir}; the run starts from the beginning" in caplog.text
    shutil.rmtree(Path(config.out_dir) / "checkpoints")  # killed before the first one
    assert trainer.train(resumed(config))["steps"] == 12
    assert len(lines(config, "steps.jsonl")) == 12


def test_a_run_that_saves_no_checkpoints_is_not_replaced(config):
    trainer.train(dataclasses.replace(config, keep_checkpoints=0))
    assert not (Path(config.out_dir) / "checkpoints").exists()
    with pytest.raises(InputError, match="saves no checkpoints; choose another out_dir, or --overwrite"):
        trainer.train(resumed(config))
    assert len(lines(config, "steps.jsonl")) == 12


@pytest.mark.parametrize(
    ("change", "words"),
    [({"out_dir": None}, "--resume needs --out_dir"), ({"overwrite": True}, "--resume and --overwrite exclude")],
)
def test_resume_says_what_it_needs(config, change, words):
    with pytest.raises(InputError, match=words):
        trainer.train(resumed(config, **change))


def test_an_unreadable_checkpoint_is_named_and_an_older_one_taken(config, uninterrupted, caplog):
    trainer.train(config)
    path = Path(config.out_dir)
    assert saved_steps(path) == [12, 8]
    (path / "checkpoints" / "12" / "optimizer" / "manifest.ocdbt").unlink()
    assert trainer.train(resumed(config))["steps"] == 12
    assert "the checkpoint of step 12 cannot be read (NOT_FOUND" in caplog.text
    assert "taking that of 8" in caplog.text
    assert learned(config) == uninterrupted
    assert (path / "unreadable-checkpoint-12").is_dir() and saved_steps(path) == [12, 8]


def test_if_no_checkpoint_can_be_read_nothing_is_touched(config, stored):
    path = Path(config.out_dir)
    (step,) = saved_steps(path)
    (path / "checkpoints" / str(step) / "run" / "metadata").write_text('{"format": 99}')
    before = (path / "steps.jsonl").read_text()
    with pytest.raises(InputError, match=f"that of step {step}: it has format 99, and this jaxchunk reads format 1"):
        trainer.train(resumed(config))
    assert (path / "steps.jsonl").read_text() == before and (path / "summary.json").exists()


def test_the_best_by_validation_stays(config, monkeypatch):
    """Validations at 4, 8 and 12, of which the first is the best."""
    losses = iter([1.0, 2.0, 3.0])
    programs = []
    prepare = trainer.prepare

    def prepare_with_losses(*arguments):
        plan = prepare(*arguments)
        programs.append(plan.programs._replace(eval_step=lambda params, batch: (next(losses), 1)))
        return dataclasses.replace(plan, programs=programs[-1])

    monkeypatch.setattr(trainer, "prepare", prepare_with_losses)
    trainer.train(dataclasses.replace(config, val_every=4, val_batches=1, keep_checkpoints=1))
    path = Path(config.out_dir)
    assert saved_steps(path) == [12, 4]
    assert (load_params(path).step, load_params(path, best=True).step) == (12, 4)


def test_a_disk_that_is_full_during_a_save_does_not_end_the_run(config, uninterrupted, monkeypatch, capsys):
    make = os.mkdir

    def full(path, *arguments, **options):
        if "checkpoints/8" in str(path):
            raise OSError(28, "No space left on device")
        return make(path, *arguments, **options)

    monkeypatch.setattr(os, "mkdir", full)
    summary = trainer.train(config)
    assert summary["status"] == "completed"
    assert (
        "the checkpoint of step 8 could not be written: No space left on device; that of step 4 stays"
        in capsys.readouterr().out
    )
    assert saved_steps(Path(config.out_dir)) == [12, 4]
    assert learned(config) == uninterrupted


def test_a_record_that_meets_the_full_disk_is_written_when_the_save_has_failed(config, monkeypatch):
    """The save's own files are what fills the disk; the room is free again once it has given up."""
    append, refused = RunDirectory.append, []
    waits = []
    wait = Checkpoints.wait

    def append_on_a_full_disk(self, name, record):
        if record.get("step") == 6 and not refused:
            refused.append(name)
            raise RunFailedError("steps.jsonl cannot be written: No space left on device")
        append(self, name, record)

    monkeypatch.setattr(RunDirectory, "append", append_on_a_full_disk)
    monkeypatch.setattr(Checkpoints, "wait", lambda self: (waits.append(len(refused)), wait(self))[1])
    assert trainer.train(config)["status"] == "completed"
    assert refused and 1 in waits
    assert [record["step"] for record in lines(config, "steps.jsonl")] == list(range(1, 13))


def test_a_run_whose_last_checkpoint_cannot_be_written_has_failed(config, monkeypatch):
    make = os.mkdir

    def full(path, *arguments, **options):
        if "checkpoints/12" in str(path):
            raise OSError(28, "No space left on device")
        return make(path, *arguments, **options)

    monkeypatch.setattr(os, "mkdir", full)
    with pytest.raises(RunFailedError, match="no checkpoint of step 12, the last; go on from the checkpoint of step 8"):
        trainer.train(config)
    assert json.loads((Path(config.out_dir) / "summary.json").read_text())["steps"] == 12


class PoisonedSteps:
    """A training step that gives NaN at some steps, as a batch could; `state` must then stay as it is."""

    def __init__(self, monkeypatch, bad):
        self.bad = bad
        prepare = trainer.prepare

        def prepare_poisoned(*arguments):
            plan = prepare(*arguments)
            poisoned = {n: functools.partial(self.step, step) for n, step in plan.train_steps.items()}
            return dataclasses.replace(plan, train_steps=poisoned)

        monkeypatch.setattr(trainer, "prepare", prepare_poisoned)

    def step(self, train_step, state, batch):
        number = int(state.step) + 1
        state, metrics = train_step(state, batch)
        return state, metrics._replace(loss=metrics.loss * np.float32("nan")) if number in self.bad else metrics


def test_bad_steps_in_a_row_end_the_run_and_the_last_good_state_is_kept(config, monkeypatch, capsys):
    PoisonedSteps(monkeypatch, {3, 7, 8, 9, 10})
    with pytest.raises(
        RunFailedError, match=r"the loss is nan at step 9, bad step 3 in a row; go on from the checkpoint of step 4"
    ):
        trainer.train(config)
    assert "the loss is nan at step 3: it changes no parameter" in capsys.readouterr().out
    assert saved_steps(Path(config.out_dir)) == [4]  # at step 8 the state was in doubt
    with pytest.raises(RunFailedError, match="at step 10, bad step 4 in a row"):
        trainer.train(resumed(config, max_bad_steps=4))
    assert trainer.train(resumed(config, max_bad_steps=5))["status"] == "completed"


def test_a_stop_among_bad_steps_saves_nothing_in_doubt(config, monkeypatch):
    PoisonedSteps(monkeypatch, {5, 6, 7})
    stop_after(monkeypatch, 5)
    with pytest.raises(
        RunFailedError, match=r"no checkpoint of step [56], the last; go on from the checkpoint of step 4"
    ):
        trainer.train(config)
    with pytest.raises(RunFailedError, match="at step 7, bad step 3 in a row"):
        trainer.train(resumed(config))


def test_no_energy_is_attributed_to_the_time_between_two_processes(config, monkeypatch):
    """300 W by a simulated counter that goes on while no process runs.

    The stretches are long, one a process: on a busy machine the counter is read late, and a short one's energy is null.
    """
    config = dataclasses.replace(config, checkpoint_every=0, val_every=0)
    train_batches = data.train_batches

    class SlowBatches:
        def __init__(self, *arguments):
            self.batches = train_batches(*arguments)
            self.get_state, self.set_state = self.batches.get_state, self.batches.set_state

        def __next__(self):
            time.sleep(0.1)
            return next(self.batches)

    def open_simulated(jax_device, *, csv_path, append_csv, record_path=None):
        device = SimulatedDevice(Constant(300.0), time.perf_counter, tick_s=0.005)
        return Monitor(device, csv_path=csv_path, append_csv=append_csv, poll_period_s=0.001, sample_period_s=0.002)

    monkeypatch.setattr(data, "train_batches", SlowBatches)
    monkeypatch.setattr(trainer, "open_monitor", open_simulated)
    stop_after(monkeypatch, 6)
    first = trainer.train(config)
    time.sleep(1.0)
    summary = trainer.train(resumed(config))
    assert summary["energy_j"] == pytest.approx(300.0 * summary["training_time_s"], rel=0.1)
    assert summary["energy_j"] > first["energy_j"]
    assert summary["training_time_s"] == pytest.approx(sum(r["step_time_s"] for r in lines(config, "steps.jsonl")))
    assert summary["power_w_mean"] == pytest.approx(300.0) and summary["power_w_std"] == pytest.approx(0.0, abs=1e-3)
    ends_s = [record["end_s"] for record in lines(config, "stretches.jsonl")]
    starts_s = [record["start_s"] for record in lines(config, "stretches.jsonl")]
    assert max(np.subtract(starts_s[1:], ends_s[:-1])) > 1.0  # the gap is there, and in no stretch
    rows = (Path(config.out_dir) / "telemetry.csv").read_text().splitlines()
    assert sum(row.startswith("time_s") for row in rows) == 1
    assert np.all(np.diff([float(row.split(",")[0]) for row in rows[1:]]) >= 0)


def test_deterministic_operations_are_asked_of_a_gpu_only(config):
    """XLA refuses the name of an option that it does not have."""
    deterministic = dataclasses.replace(config, deterministic=True)
    options = compiler_options(deterministic, "gpu")
    assert options == {"xla_gpu_deterministic_ops": True}
    jax.jit(lambda x: x + 1).lower(1.0).compile(options)
    assert compiler_options(deterministic, "cpu") is None and compiler_options(config, "gpu") is None


def test_deterministic_attention_of_cudnn_has_one_call_in_a_loop(config):
    """XLA marks but one of several alike."""
    deterministic = dataclasses.replace(config, deterministic=True)
    assert must_loop(deterministic, "cudnn")
    assert not must_loop(deterministic, "xla") and not must_loop(config, "cudnn")


@pytest.mark.gpu
def test_a_deterministic_run_on_a_gpu_goes_on_to_the_bit(config, monkeypatch, tmp_path):
    """Several blocks, cuDNN's attention, programs compiled anew."""
    monkeypatch.setitem(qwen2.SIZES, "tiny", qwen2.Qwen2Config(512, 128, 3, 4, 2, 256, tie_word_embeddings=True))
    monkeypatch.setattr(plan, "compile_programs", compile_programs)
    config = dataclasses.replace(
        config, data="synthetic", seq_len=128, compute_dtype="bfloat16", attention="cudnn", deterministic=True,
        compilation_cache=False,
    )  # fmt: skip
    whole = dataclasses.replace(config, out_dir=str(tmp_path / "whole"))
    trainer.train(whole)
    stop_after(monkeypatch, 5)
    assert trainer.train(config)["status"] == "stopped"
    assert trainer.train(resumed(config))["status"] == "completed"
    assert learned(config) == learned(whole)


def test_checkpoints_can_be_read_while_the_run_goes_on(config, monkeypatch):
    """Reading takes nothing away from a save in progress."""
    seen = []
    save = Checkpoints.save

    def save_and_read(self, step, *arguments):
        save(self, step, *arguments)
        if step > 4:
            seen.append(load_params(config.out_dir).step)

    monkeypatch.setattr(checkpoint.Checkpoints, "save", save_and_read)
    assert trainer.train(config)["status"] == "completed"
    assert seen and all(step >= 4 for step in seen)
    assert saved_steps(Path(config.out_dir)) == [12, 8]
