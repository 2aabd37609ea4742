"""Several processes train together: the same losses as one, a stop that all agree on, differences that are named."""

import dataclasses
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from jaxchunk.errors import InputError
from jaxchunk.run_dir import read_json_lines
from jaxchunk.telemetry import Window
from jaxchunk.training import loop, trainer
from jaxchunk.training.checkpoint import saved_steps
from jaxchunk.training.energy_sum import add_up
from jaxchunk.training.processes import Processes, join
from jaxchunk.training.records import step_record

PROGRAM = Path(__file__).with_name("train_with_devices.py")


def start(config, directory, changes=({}, {}), then=()):
    """Two processes with two devices each, which train in `directory` and after that in those of `then`."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    names = ("data", "cache_dir", "seq_len", "batch_size", "lmhead_chunks", "checkpoint_every", "mesh_fsdp", "steps")
    started = []
    for process, change in enumerate(changes):
        values = {name: getattr(config, name) for name in names} | {"val_every": 0} | change
        joining = {"distributed": True, "coordinator": f"localhost:{port}", "num_processes": 2, "process_id": process}
        command = [sys.executable, PROGRAM, "2", *flags({"out_dir": directory, **values, **joining})]
        for further in then:
            command += ["--", *flags({"out_dir": further, **values})]
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen(command, env=environment, **pipes))
    return started


def flags(values):
    return [part for name, value in values.items() for part in (f"--{name}", str(value))[: 1 if value is True else 2]]


def steps_of(directory):
    return read_json_lines(directory / "steps.jsonl")


def stop_when(condition, processes, *signalled, by=signal.SIGTERM):
    """Sends a signal to these of the processes as soon as the condition holds."""
    deadline_s = time.monotonic() + 120
    while not condition() and time.monotonic() < deadline_s:
        time.sleep(0.01)
        assert all(process.poll() is None for process in processes), ended(processes)
    for process in signalled:
        processes[process].send_signal(by)


def learned(records):
    return [(record["step"], record["loss"], record["grad_norm"], record["lr"]) for record in records]


def ended(processes):
    try:
        return [(*process.communicate(timeout=120), process.returncode) for process in processes]
    finally:
        for process in processes:
            process.kill()


@pytest.fixture
def config(config):
    return dataclasses.replace(
        config, mesh_data=2, mesh_fsdp=2, lmhead_chunks=2, steps=500, micro_batch_size=None, checkpoint_every=2
    )


def test_two_processes_learn_what_one_does_stop_together_and_go_on(config, tmp_path):
    directory, whole = tmp_path / "two", tmp_path / "whole"
    processes = start(config, directory, then=[whole])
    stop_when(lambda: len(steps_of(directory)) >= 3, processes, 1)
    stop_when(lambda: len(steps_of(whole)) >= len(steps_of(directory)) + 3, processes, 0, by=signal.SIGKILL)
    (out, err, status), (other_out, other_err, other_status) = ended(processes)
    assert status == -signal.SIGKILL and other_status != 0, err + other_err  # which does not wait for the dead
    assert saved_steps(whole)
    assert "4 of 4, mesh 2 data x 2 fsdp x 1 model, 2 processes" in out
    assert "step" not in other_out and "error: " not in other_err  # process 0 prints
    steps = steps_of(directory)
    done = steps[-1]["step"]
    assert f"stopped by SIGTERM after {done} steps; go on from the checkpoint of step {done}" in out
    assert 3 <= done < 500 and saved_steps(directory)[0] == done
    assert list(steps[0]["devices"]) == ["0", "1", "2", "3"]  # of both
    alone = dataclasses.replace(config, val_every=0, keep_checkpoints=0)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(loop, "_stretches", lambda *_: [(1, 3)])  # of the same schedule
        trainer.train(alone)
    expected = learned(steps_of(Path(alone.out_dir)))
    np.testing.assert_allclose(learned(steps[:3]), expected, rtol=1e-5)

    processes = start(config, directory, changes=2 * ({"resume": True},))
    stop_when(lambda: len(steps_of(directory)) >= done + 3, processes, 0, 1)
    (out, err, status), (_, other_err, other_status) = ended(processes)
    assert (status, other_status) == (0, 0), err + other_err
    resumed, uninterrupted = learned(steps_of(directory)), learned(steps_of(whole))
    assert saved_steps(directory)[0] == len(resumed)
    assert f"; resumed after step {done}" in out
    common = min(len(resumed), len(uninterrupted))
    assert common >= done + 3 and resumed[:common] == uninterrupted[:common]  # to the bit


def test_what_differs_between_processes_is_named(config, tmp_path):
    results = ended(start(config, tmp_path / "two", changes=({}, {"lr": 0.5})))
    for _, err, status in results:
        assert status == 2
        assert "error: --lr is 0.5 in process 1 and 0.001 in process 0: all of them need the same flags" in err
    assert not (tmp_path / "two").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--process_id", "1"], "--process_id is given without --distributed"),
        (["--distributed", "--num_processes", "two"], "--num_processes is two; it must be a whole number"),
        (["--distributed"], "--distributed: coordinator_address should be defined.; where no cluster's environment"),
    ],
)
def test_flags_that_do_not_say_who_takes_part(arguments, words, monkeypatch):
    def refuse(*_, **__):  # as JAX does, where no cluster is
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr("jax.distributed.initialize", refuse)
    with pytest.raises(InputError, match=words):
        join(arguments)


class Store(Processes):
    """Process 0 of two; `told` is what the other one has said."""

    told: dict = {}  # noqa: RUF012

    def heard(self, name):
        return {1: self.told[name]} if name in self.told else {}

    def forget(self, name):
        self.told.pop(name, None)


def window(energy_j, reason=None):
    bound_j = None if energy_j is None else 1.0
    return Window(0.0, 2.0, energy_j, bound_j, "nvml_total_energy", reason, 100.0, 1500.0, 60.0, {"sw_power_cap": 0.5})


def test_joules_of_all_processes_are_added_up():
    processes = Store(2, 0, 0)
    assert add_up(processes, "step 1", window(10.0), timeout_s=None) is None  # not yet
    processes.told["step 1"] = dataclasses.asdict(window(30.0))
    total = add_up(processes, "step 1", window(10.0), timeout_s=None)
    assert (total.energy_j, total.energy_bound_j, total.throttle) == (40.0, 2.0, {"sw_power_cap": 1.0})
    assert [part.energy_j for part in total.parts] == [10.0, 30.0]
    numbers = {"loss": 1.0, "grad_norm": 1.0, "lr": 1.0}
    record = step_record(
        1, numbers, total, clock_zero_s=0.0, tokens=8, flops_per_token=1.0, peak_flops=None, lmhead_chunks=1
    )
    assert record.num_devices == 2 and record.line(1).endswith("sw_power_cap 25%")
    processes.told["step 2"] = dataclasses.asdict(window(None, "no counter"))
    total = add_up(processes, "step 2", window(10.0), timeout_s=None)
    assert (total.energy_j, total.energy_null_reason) == (None, "device 1: no counter")
    total = add_up(processes, "step 3", window(10.0), timeout_s=0.0)
    assert (total.energy_j, total.energy_null_reason) == (None, "device 1: process 1 did not say what it measured")
