"""Right and wrong kernels on the tuner's bench, and the sustained window."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from jaxchunk.bench import kernel_timing
from jaxchunk.bench.kernel_timing import ChunkShape, KernelBench, parse_shape, sustained_call_s
from jaxchunk.bench.tunable_kernels import TunableKernel, triton_space
from jaxchunk.errors import InputError, RunFailedError
from jaxchunk.lm_head.kernels import Exponentials, xla
from jaxchunk.lm_head.kernels.triton_gemm import TritonTiles, choose_config

SHAPE = ChunkShape(150, 32, 112)


def bench(exponentials):
    kernel = TunableKernel("triton_gemm", TritonTiles, triton_space(), choose_config, (1, 1, 1), exponentials)
    return KernelBench(kernel, SHAPE, window_s=1e-3, seed=0)


def spoilt(spoil):
    def exponentials(*operands, config):
        return Exponentials(*spoil(*xla.exponentials(*operands)[:2]), None, None)

    return bench(exponentials)


def test_a_right_kernel_is_timed():
    right = spoilt(lambda E, n: (E, n))
    assert right.evaluate(TritonTiles()).milliseconds > 0
    assert right.call_s(None) > 0


@pytest.mark.parametrize(
    ("spoil", "what"),
    [
        (lambda E, n: (E, n.at[77].multiply(1.001)), "wrong: sums off by 1.0e-03"),
        (lambda E, n: (E, n.at[77].set(jnp.nan)), "wrong: sums off by nan"),
        (lambda E, n: (E.at[0, 5].multiply(1.1), n), "wrong: E off by"),
        (lambda E, n: (E.at[77, :16].set(0), n), "wrong: sums of E off by"),  # a row that is not looked at one by one
    ],
    ids=["a sum", "nan", "an exponential", "a lost store"],
)
def test_a_wrong_kernel_is_found_out(spoil, what):
    milliseconds, problem = spoilt(spoil).evaluate(TritonTiles())
    assert milliseconds is None and problem.startswith(what)


def test_the_label_s_column_must_be_0():
    labels = kernel_timing._operands(SHAPE, 0)[3]
    milliseconds, problem = spoilt(lambda E, n: (E.at[0, labels[0]].set(1e-20), n)).evaluate(TritonTiles())
    assert milliseconds is None and "wrong: E off by inf" in problem


def test_a_kernel_that_does_not_compile_is_a_problem_and_no_end():
    def exponentials(*operands, config):
        raise NotImplementedError("no such layout\nand much more")

    assert bench(exponentials).evaluate(TritonTiles()) == (None, "NotImplementedError: no such layout")


def test_a_kernel_that_takes_the_device_with_it_ends_the_run(monkeypatch):
    def exponentials(*operands, config):
        raise jax.errors.JaxRuntimeError("INTERNAL: illegal address")

    broken = bench(exponentials)
    monkeypatch.setattr(jax, "block_until_ready", lambda result: exponentials(config=None))
    with pytest.raises(RunFailedError, match=r"'tile_m': 128.* the device does not work any more: INTERNAL: illegal"):
        broken.evaluate(TritonTiles())


def test_a_window_leaves_its_first_third_out():
    """Calls take 1 s at first and 2 s once the clocks have fallen."""
    state = {"now": 0.0, "calls": 0}

    def call():
        state["calls"] += 1
        state["now"] += 1.0 if state["calls"] <= 14 else 2.0
        return ()

    assert sustained_call_s(call, 30.0, clock=lambda: state["now"]) == 2.0
    assert state["calls"] == 1 + 3 + 30


def test_shapes_are_read_from_their_flag():
    assert parse_shape("8192x896x151936") == ChunkShape(8192, 896, 151936)
    assert str(ChunkShape(1, 2, 3)) == "1x2x3"
    for text in ("8192x896", "8192x896x0", "axbxc", "1x2x3x4"):
        with pytest.raises(InputError, match=f"--shapes has '{text}'; write rows of a chunk x width x vocabulary"):
            parse_shape(text)


def test_every_field_of_a_configuration_reaches_the_kernel():
    asked = []

    def exponentials(*operands, config):
        asked.append(config)
        return xla.exponentials(*operands)

    config = dataclasses.replace(TritonTiles(), group=5)
    assert bench(exponentials).evaluate(config).problem is None
    assert asked == [config]  # compiled once
