"""Variants in another process: asked by pipe, one process at a time, whose end is noticed."""

import sys

import jax
import pytest

from jaxchunk.bench.step_process import StepProcess, StepProcesses
from jaxchunk.errors import RunFailedError

WORKER = """
import os, sys, types
from jaxchunk.measuring.protocol import Variant
from jaxchunk.bench.step_process import own_pipes, serve

calls = []

def call(name):
    print("this is not for the pipe")
    calls.append(name)
    if len(calls) == 4:
        os._exit(3)
    return types.SimpleNamespace(loss=float(len(calls)))

requests, answers = own_pipes()
serve([Variant(n, lambda n=n: call(n), factors={"name": n}) for n in ("a", "b")], requests, answers)
"""


@pytest.fixture
def processes():
    command = [sys.executable, "-c", WORKER]
    made = StepProcesses({"one": command, "two": command, "broken": [sys.executable, "-c", "exit(5)"]}, {})
    yield made
    made.close()


def test_calls_are_answered_until_the_process_ends(processes):
    a, b = processes.variants("one")
    assert (a.name, b.name, b.factors, b.heats_itself) == ("a", "b", {"name": "b"}, True)
    pending = [a.call(), b.call(), a.call()]
    jax.block_until_ready(pending)
    assert [call.loss for call in pending] == [1.0, 2.0, 3.0]
    last = a.call()
    with pytest.raises(RunFailedError, match="one: its process ended with status 3"):
        jax.block_until_ready(last)
    with pytest.raises(RunFailedError, match="status 3"):
        b.call()


def test_one_process_at_a_time(processes):
    first, second = processes.variants("one")[0], processes.variants("two")[0]
    process = processes.use("two")
    assert processes.use("two") is process
    assert first.call().block_until_ready().loss == 1.0  # starts the first anew
    with pytest.raises(RunFailedError, match="two: its process ended with status -9"):
        process.call(0).block_until_ready()
    second.prepare()
    assert second.call().block_until_ready().loss == 1.0


def test_a_process_that_does_not_come_up(processes):
    with pytest.raises(RunFailedError, match="broken: its process ended with status 5"):
        processes.variants("broken")
    assert isinstance(processes.use("one"), StepProcess)
