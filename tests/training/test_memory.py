"""The micro-batch that fits: estimated, checked against the compiled program, refused with numbers."""

import dataclasses
from types import SimpleNamespace

import jax
import pytest

from jaxchunk.errors import InputError
from jaxchunk.models import qwen2
from jaxchunk.training.config import TrainConfig, default_config
from jaxchunk.training.memory import compile_within_memory, estimate_bytes
from jaxchunk.training.model import Model

GB = 10**9


class FakeProgram:
    """A compiled step that needs 10 GB of state and 1 GB for each sequence."""

    def __init__(self, micro_batch_size):
        self.micro_batch_size = micro_batch_size

    def memory_analysis(self):
        return SimpleNamespace(
            argument_size_in_bytes=10 * GB,
            output_size_in_bytes=10 * GB,
            alias_size_in_bytes=10 * GB,
            temp_size_in_bytes=self.micro_batch_size * GB,
        )


CONFIG = TrainConfig(batch_size=12)
MODEL = Model("--model tiny", qwen2.SIZES["tiny"], None)


def test_the_largest_micro_batch_that_fits_is_taken():
    program, plan = compile_within_memory(CONFIG, MODEL, FakeProgram, limit_bytes=17 * GB)
    assert (program.micro_batch_size, plan.micro_batch_size) == (4, 4)  # 6 would need 16 of 15.98 usable
    assert plan.memory.total_bytes == 14 * GB
    assert plan.describe() == "14.00 of 17.0 GB (state 10.00, temporaries 4.00) with micro-batches of 4"


def test_without_a_limit_the_whole_batch_is_taken():
    program, _ = compile_within_memory(CONFIG, MODEL, FakeProgram, limit_bytes=None)
    assert program.micro_batch_size == 12


def test_a_named_micro_batch_is_taken_or_refused():
    named = dataclasses.replace(CONFIG, micro_batch_size=3)
    assert compile_within_memory(named, MODEL, FakeProgram, limit_bytes=17 * GB)[0].micro_batch_size == 3
    with pytest.raises(
        InputError, match=r"--model tiny with .* micro-batches of 3 do not fit: it needs 13.00 of 12.0 GB"
    ):
        compile_within_memory(named, MODEL, FakeProgram, limit_bytes=12 * GB)


def test_the_compilers_own_out_of_memory_counts_as_not_fitting():
    def compile_step(micro_batch_size):
        if micro_batch_size > 2:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
        return FakeProgram(micro_batch_size)

    assert compile_within_memory(CONFIG, MODEL, compile_step, limit_bytes=100 * GB)[0].micro_batch_size == 2
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        compile_within_memory(
            CONFIG, MODEL, lambda m: (_ for _ in ()).throw(jax.errors.JaxRuntimeError("INTERNAL")), None
        )


def test_the_estimate_is_of_the_right_size():
    """Compiled on an H200 with JAX 0.11.2, 64 x 1024 tokens in 4 chunks took 76.6 GB."""
    config = default_config("gpu")
    model = qwen2.SIZES[config.model]
    assert 0.9 < estimate_bytes(config, model, 64) / 76.6e9 < 1.2
    assert estimate_bytes(config, model, 4) < 0.94 * 0.75 * 24e9  # a 24 GB card takes 4 sequences of 1024
    assert estimate_bytes(dataclasses.replace(config, remat="full"), model, 64) < estimate_bytes(config, model, 64) / 2
