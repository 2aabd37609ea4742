"""Phases from a roofline: arithmetic does not depend on chunks, traffic does as the algorithm says."""

import pytest

from jaxchunk.errors import InputError
from jaxchunk.models import qwen2
from jaxchunk.simulation.schedules import Roofline, microbenchmark, training_step
from jaxchunk.training.flops import training_flops_per_token

# Bandwidth without end: what remains is arithmetic.
FAST_MEMORY = Roofline({"bfloat16": 1e14}, 1e30)
SLOW_MEMORY = Roofline({"bfloat16": 1e30}, 1e11)
SHAPE = {"m": 4096, "k": 512, "n": 8192, "dtype": "bfloat16", "sum_dtype": "float32"}
MODEL = {"model": "qwen2-0.5b", "batch_size": 4, "seq_len": 512, "dtype": "bfloat16"}


def seconds(phases, kind):
    return sum(phase.seconds_at_reference_clock for phase in phases if phase.kind == kind)


@pytest.mark.parametrize("chunks", [1, 3, 16])
def test_arithmetic_is_the_formulas(chunks):
    flops = 4 * 4096 * 512 * 8192
    assert seconds(microbenchmark(FAST_MEMORY, chunks, **SHAPE), "compute") == pytest.approx(flops / 1e14)
    flops = 4 * 512 * training_flops_per_token(qwen2.SIZES["qwen2-0.5b"], 512)
    assert seconds(training_step(FAST_MEMORY, chunks, **MODEL), "compute") == pytest.approx(flops / 1e14)


def test_each_chunk_moves_the_sum_once_more():
    moved = [seconds(microbenchmark(SLOW_MEMORY, n, **SHAPE), "memory") * 1e11 for n in (1, 5, 9)]
    assert moved[1] - moved[0] == pytest.approx(4 * 2 * 4 * 512 * 8192)
    assert moved[2] - moved[1] == pytest.approx(4 * 2 * 4 * 512 * 8192)
    # C is written, read and written by the softmax, and read.
    assert moved[0] == pytest.approx(2 * 4 * 4096 * 8192 + 2 * 4 * 512 * 8192)


def test_traffic_hides_behind_arithmetic_in_part():
    both = Roofline({"bfloat16": 1e14}, 1e12)
    product = microbenchmark(both, 1, **SHAPE)[:2]
    compute_s, total_s = product[0].seconds_at_reference_clock, sum(p.seconds_at_reference_clock for p in product)
    memory_s = 2 * 4096 * 8192 / 1e12
    assert max(compute_s, memory_s) < total_s < compute_s + memory_s


def test_launches_are_idle_and_activity_is_the_operands():
    phases = microbenchmark(Roofline({"bfloat16": 1e14}, 1e12, launch_s=1e-5), 4, activity=0.5, **SHAPE)
    assert seconds(phases, "idle") == pytest.approx(12 * 1e-5)
    assert {phase.activity for phase in phases if phase.kind != "idle"} == {0.5}


def test_the_lm_head_is_in_chunks_and_the_rest_is_not():
    one, four = (training_step(FAST_MEMORY, chunks, **MODEL) for chunks in (1, 4))
    assert len(four) - len(one) == 3 * len(training_step(FAST_MEMORY, 2, **MODEL)) - 3 * len(one)


@pytest.mark.parametrize("chunks", [0, 4097])
def test_chunks_that_do_not_fit(chunks):
    with pytest.raises(InputError, match=f"{chunks} chunks of 4096 rows, needed is 1 to 4096"):
        microbenchmark(FAST_MEMORY, chunks, **SHAPE)


def test_a_dtype_without_a_rate():
    with pytest.raises(InputError, match="no rate for float32"):
        microbenchmark(FAST_MEMORY, 1, **(SHAPE | {"dtype": "float32"}))
