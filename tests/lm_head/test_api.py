"""The border of `lm_head_loss`: bad input is named, and what runs is said."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lm_head_oracle import oracle, problem

from jaxchunk import lm_head_loss
from jaxchunk.lm_head import choose_implementation

P = problem(T=12, D=8, V=97)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"hidden": jnp.zeros((12, 9))}, ValueError, r"hidden has shape \(12, 9\) and weight \(97, 8\)"),
        ({"weight": jnp.zeros((1, 97, 8))}, ValueError, r"must be \[\.\.\., D\] and \[V, D\]"),
        ({"weight": jnp.zeros((0, 8))}, ValueError, "at least one entry"),
        ({"labels": jnp.zeros(11, jnp.int32)}, ValueError, r"labels have shape \(11,\); .* must be \(12,\)"),
        ({"labels": jnp.zeros((12, 1), jnp.int32)}, ValueError, r"must be \(12,\)"),
        ({"labels": jnp.zeros(12)}, TypeError, "labels have dtype float32; they must be integer"),
        ({"hidden": jnp.zeros((12, 8), jnp.int32)}, TypeError, "hidden has dtype int32"),
        ({"hidden": jnp.zeros((12, 8), jnp.float16)}, TypeError, "hidden has dtype float16; .* underflow in float16"),
        ({"compute_dtype": jnp.int32}, TypeError, "compute_dtype is int32"),
        ({"ignore_index": None}, TypeError, "ignore_index is None; it must be a Python int"),
        ({"ignore_index": 1.5}, TypeError, "ignore_index is 1.5"),
        ({"labels": [2**32 + 5] * 12}, ValueError, "12 values outside"),
        ({"accum_dtype": jnp.int32}, TypeError, "accum_dtype is int32"),
        ({"labels": jnp.full(12, 97)}, ValueError, r"12 values outside \[0, 97\), the first is 97"),
        ({"labels": jnp.arange(-1, 11)}, ValueError, r"1 values outside .* the first is -1; .*ignore_index \(-100\)"),
        ({"labels": np.full(12, 2**32 + 5)}, ValueError, r"12 values outside \[0, 97\), the first is 4294967301"),
        ({"normalizer": 1j}, ValueError, "normalizer is 1j; it must be a finite number"),
        ({"normalizer": float("nan")}, ValueError, "normalizer is nan; it must be a finite number"),
        ({"normalizer": "x"}, ValueError, "normalizer is x"),
        ({"num_chunks": 0}, ValueError, "num_chunks is 0; it must be at least 1"),
        ({"num_chunks": 2.0}, TypeError, "num_chunks is 2.0; it must be a Python int"),
        ({"reduction": "none"}, ValueError, "reduction is 'none'"),
        ({"normalizer": -1.0}, ValueError, "normalizer is -1.0"),
        ({"normalizer": jnp.ones(12)}, ValueError, r"normalizer has shape \(12,\)"),
        ({"normalizer": 3.0, "reduction": "sum"}, ValueError, "it belongs to 'mean'"),
        ({"implementation": "cuda"}, ValueError, "implementation is 'cuda'; it must be one of reference, xla, pallas"),
    ],
)
def test_bad_input_is_named(change, error, words):
    operands = {"hidden": P.hidden, "weight": P.weight, "labels": P.labels}
    with pytest.raises(error, match=words) as caught:
        lm_head_loss(**(operands | change))
    assert "\n" not in str(caught.value)


def test_custom_ignore_index():
    labels = jnp.where(P.labels == -100, 0, P.labels)
    kept = labels != 0
    expected = lm_head_loss(P.hidden[kept], P.weight, labels[kept])
    np.testing.assert_allclose(lm_head_loss(P.hidden, P.weight, labels, ignore_index=0), expected, rtol=1e-6)


def test_more_chunks_than_tokens_is_clamped_with_a_word(caplog):
    with caplog.at_level(logging.WARNING, logger="jaxchunk"):
        loss = lm_head_loss(*P, num_chunks=13)
    assert "num_chunks=13 for 12 tokens: using 12 of 1" in caplog.text
    np.testing.assert_allclose(loss, lm_head_loss(*P), rtol=1e-6)


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="tests a machine without a GPU")
def test_pallas_without_a_gpu_raises_and_never_falls_back():
    with pytest.raises(
        ValueError, match="implementation='pallas' cannot run: it needs an NVIDIA GPU and JAX runs on cpu"
    ):
        lm_head_loss(*P, implementation="pallas")


def test_choice_by_platform():
    assert choose_implementation(platform="cpu").implementation == "xla"
    assert "JAX runs on cpu" in choose_implementation(platform="cpu").reason
    assert choose_implementation(platform="tpu").implementation == "xla"
    assert choose_implementation(platform="gpu").implementation == "pallas"
    assert choose_implementation(platform="gpu", compute_dtype=jnp.float64).implementation == "xla"
    assert choose_implementation("reference", platform="gpu").implementation == "reference"


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint32"])
def test_labels_of_any_integer_type(dtype):
    labels = jnp.abs(P.labels) % 97
    expected = lm_head_loss(P.hidden, P.weight, labels)
    np.testing.assert_allclose(lm_head_loss(P.hidden, P.weight, labels.astype(dtype)), expected, rtol=1e-6)
    np.testing.assert_allclose(jax.jit(lm_head_loss)(P.hidden, P.weight, labels.astype(dtype)), expected, rtol=1e-6)


def test_labels_are_checked_before_they_are_narrowed():
    """2^32 + 5 is not label 5, and 2^32 - 100 is not ignore_index."""
    with jax.enable_x64():
        for label, dtype in ((2**32 + 5, jnp.int64), (2**32 - 100, jnp.uint32), (2**63 - 1, jnp.int64)):
            labels = jnp.zeros(12, dtype).at[3].set(label)
            assert jnp.isnan(jax.jit(lm_head_loss)(P.hidden, P.weight, labels))


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_float64_is_float64(implementation):
    with jax.enable_x64():
        p = problem(T=12, D=8, V=97, dtype=jnp.float64)
        loss = lm_head_loss(*p, num_chunks=3, implementation=implementation, accum_dtype=jnp.float64)
        assert loss.dtype == jnp.float64
        np.testing.assert_allclose(loss, oracle(p).loss, rtol=1e-14)


def test_known_labels_are_checked_inside_a_jitted_program_too():
    with pytest.raises(ValueError, match="12 values outside"):
        jax.jit(lambda hidden: lm_head_loss(hidden, P.weight, np.full(12, 97)))(P.hidden)


def test_a_call_outside_jit_compiles_once(caplog):
    p = problem(T=15, D=8, V=89)

    def gradient():
        return jax.grad(lm_head_loss)(*p, num_chunks=5, implementation="xla")

    gradient()
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        gradient()
    assert "Compiling" not in caplog.text


def test_the_choice_is_logged(caplog):
    p = problem(T=14, D=8, V=97)
    with caplog.at_level(logging.INFO, logger="jaxchunk"):
        lm_head_loss(*p, num_chunks=7, implementation="xla")
    assert "lm_head_loss: xla, 7 x 2 tokens (named by the caller)" in caplog.text
