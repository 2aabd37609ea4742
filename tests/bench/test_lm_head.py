"""The LM-head benchmark: what it compiles, refuses and writes into its table."""

import dataclasses

import jax
import numpy as np
import pytest

from jaxchunk.bench import lm_head
from jaxchunk.errors import InputError
from jaxchunk.measuring.protocol import Measurement

CONFIG = lm_head.LMHeadBenchConfig(tokens=64, width=16, vocab=97, chunks=(1, 3))


def test_floor_baseline_and_every_chunk_count_are_compiled():
    programs = list(lm_head.compile_variants(CONFIG, limit_bytes=None))
    assert [p.variant.name for p in programs] == ["GEMM floor", "autodiff", "xla, 1 chunk", "xla, 3 chunks"]
    (autodiff, _), (ours, _) = programs[1].variant.call(), programs[3].variant.call()
    assert float(ours) == pytest.approx(float(autodiff), rel=1e-5)
    assert programs[0].variant.call()[0].shape == (64, 97)


def test_every_case_is_the_loss_that_it_says():
    config = dataclasses.replace(CONFIG, chunks=(3,), cases=tuple(lm_head.CASES))
    programs = list(lm_head.compile_variants(config, limit_bytes=None))[2:]
    assert [p.variant.name for p in programs] == ["xla, 3 chunks"] + [
        f"xla, 3 chunks, {case}" for case in lm_head.CASES if case != "plain"
    ]
    assert {p.plain for p in programs} == {"xla, 3 chunks"}
    values = {p.variant.name: p.variant.call() for p in programs}
    plain, (dx, dW) = values["xla, 3 chunks"]
    (with_metrics, metrics), _ = values["xla, 3 chunks, metrics"]
    assert float(with_metrics) == float(plain)
    assert int(metrics.num_valid_tokens) == 64
    dv, (dx_of_dv, dW_of_dv) = values["xla, 3 chunks, dv"]
    np.testing.assert_allclose(dv, plain, rtol=1e-6)
    np.testing.assert_allclose(dx_of_dv, dx, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(dW_of_dv.T, dW, rtol=1e-5, atol=1e-7)
    assert len(values["xla, 3 chunks, bias"][1]) == 3


def test_the_vocabulary_over_several_devices():
    config = dataclasses.replace(CONFIG, vocab=96, chunks=(2,), vocab_devices=2)
    programs = list(lm_head.compile_variants(config, limit_bytes=None))[2:]
    plain, sharded = (program.variant for program in programs)
    assert sharded.name == "xla, 2 chunks, vocabulary over 2 GPUs"
    assert (plain.devices, sharded.devices) == ((0,), (0, 1))
    for one, two in zip(jax.tree.leaves(plain.call()), jax.tree.leaves(sharded.call()), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-7)


def test_what_does_not_fit_is_left_out_with_a_word(caplog):
    assert list(lm_head.compile_variants(CONFIG, limit_bytes=1000)) == []
    assert "xla, 3 chunks is left out: it needs 0.00 of 0.0 GB" in caplog.text


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tokens": 0}, "--tokens is 0; it must be at least 1"),
        ({"chunks": (4, 0)}, "--chunks is 4 0; give counts of at least 1"),
        ({"chunks": ()}, "--chunks is "),
        ({"dtype": "float16"}, "--dtype is float16"),
        ({"window_s": 0.0}, "--window_s is 0.0"),
        ({"window_s": float("inf")}, "--window_s is inf"),
        ({"cases": ("plain", "fast")}, "--cases is plain fast; choose from plain, options"),
        ({"vocab_devices": 10}, r"--vocab_devices is 10; JAX sees \d+ device\(s\)"),
        ({"implementations": ("liger",)}, "--implementations: implementation is 'liger'"),
    ],
)
def test_bad_flags_are_named(change, words):
    with pytest.raises(InputError, match=words):
        lm_head.validate(dataclasses.replace(CONFIG, **change))


def measurement(variant, repeat, time_s, energy_j):
    return Measurement(variant, repeat, 10, time_s, energy_j, 0.1, "simulated", None, 500.0, 5.0, 1500.0, 60.0, None)


def test_summary_and_table():
    programs = list(lm_head.compile_variants(dataclasses.replace(CONFIG, chunks=(3,)), None))
    times = {"GEMM floor": 0.08, "autodiff": 0.2, "xla, 3 chunks": 0.1}
    drift = [1.0, 1.1, 1.2]  # the same for all within a repeat: ratios must not see it
    measurements = [measurement(n, r, t * drift[r], 10 * t) for n, t in times.items() for r in range(3)]
    rows = lm_head.summarize(measurements, programs)
    ours = rows[2]
    assert ours["time_s"]["median"] == pytest.approx(0.11)
    assert ours["time_over_floor"] == pytest.approx({"median": 1.25, "low": 1.25, "high": 1.25})
    assert ours["time_over_autodiff"]["median"] == pytest.approx(0.5)
    assert ours["energy_over_floor"]["median"] == pytest.approx(1.25)
    row = lm_head.table(rows).splitlines()[-1]
    assert row == "| xla, 3 chunks | 110.00 | 1.250 | 0.50 | 1.000 | 1.00 | 1.250 | 500 | 0.00 |"
