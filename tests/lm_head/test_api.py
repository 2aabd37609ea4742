"""The border of `lm_head_loss`: bad input is named, and what runs is said."""

import logging
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lm_head_oracle import oracle, problem

from jaxchunk import lm_head_loss
from jaxchunk.lm_head import choose_implementation, token_log_probs

P = problem(T=12, D=8, V=97)
INF, NAN = float("inf"), float("nan")
NUMBERS = ("label_smoothing", "z_loss", "logit_softcap", "logit_scale")
SMOOTHING = "it must be at least 0 and less than 1"
NOT_NEGATIVE = "it must be a finite number that is not negative"
POSITIVE = "it must be a finite number greater than 0"
BAD_WEIGHTS = "negative or non-finite values"


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
        ({"reduction": "avg"}, ValueError, "reduction is 'avg'; it must be 'mean', 'sum' or 'none'"),
        ({"reduction": None}, ValueError, "reduction is None; it must be 'mean', 'sum' or 'none'"),
        ({"normalizer": -1.0}, ValueError, "normalizer is -1.0"),
        ({"normalizer": jnp.ones(12)}, ValueError, r"normalizer has shape \(12,\)"),
        ({"normalizer": 3.0, "reduction": "sum"}, ValueError, "it belongs to 'mean'"),
        ({"normalizer": 3.0, "reduction": "none"}, ValueError, "it belongs to 'mean'"),
        *[
            ({"label_smoothing": x}, ValueError, f"label_smoothing is {x}; {SMOOTHING}")
            for x in (1.5, 1.0, 1, -0.1, NAN)
        ],
        *[({"z_loss": x}, ValueError, f"z_loss is {x}; {NOT_NEGATIVE}") for x in (-1.0, -1e-30, INF, NAN)],
        *[
            ({"logit_softcap": x}, ValueError, f"logit_softcap is {x}; {POSITIVE}, or None")
            for x in (0.0, -5, INF, NAN)
        ],
        *[({"logit_scale": x}, ValueError, f"logit_scale is {x}; {POSITIVE}") for x in (0.0, 0, -1.0, INF, NAN)],
        *[({name: "x"}, TypeError, f"{name} is 'x'; it must be a Python number") for name in NUMBERS],
        *[({name: 1j}, TypeError, f"{name} is 1j; it must be a Python number") for name in NUMBERS],
        *[({name: True}, TypeError, f"{name} is True; it must be a Python number") for name in NUMBERS],
        *[({name: np.ones(2)}, ValueError, rf"{name} has shape \(2,\); it must be a scalar") for name in NUMBERS],
        ({"z_loss": 1e39}, ValueError, "z_loss is 1e.39; it must be a finite number"),
        ({"logit_scale": 1e-50}, ValueError, "logit_scale is 1e-50; it must be a finite number greater than 0"),
        ({"accum_dtype": None}, TypeError, "accum_dtype is None; it must be a floating-point dtype"),
        ({"compute_dtype": "foo"}, TypeError, "compute_dtype is 'foo'; it must be a floating-point dtype"),
        ({"bias": "x"}, TypeError, "bias is 'x'; it must be an array of numbers"),
        ({"hidden": None}, TypeError, "hidden is None; it must be an array of numbers"),
        ({"label_smoothing": None}, TypeError, "label_smoothing is None; it must be a Python number"),
        ({"weight_layout": "xx"}, ValueError, "weight_layout is 'xx'; it must be 'vd' or 'dv'"),
        ({"weight_layout": None}, ValueError, "weight_layout is None; it must be 'vd' or 'dv'"),
        ({"weight_layout": "dv"}, ValueError, r"hidden has shape \(12, 8\) and weight \(97, 8\)"),
        ({"weight": jnp.zeros((8, 0)), "weight_layout": "dv"}, ValueError, "at least one entry"),
        ({"bias": jnp.zeros(3)}, ValueError, r"bias has shape \(3,\); for a vocabulary of 97 it must be \(97,\)"),
        ({"bias": jnp.zeros(())}, ValueError, r"bias has shape \(\); for a vocabulary of 97 it must be \(97,\)"),
        ({"bias": jnp.zeros((1, 97))}, ValueError, r"bias has shape \(1, 97\); .* must be \(97,\)"),
        ({"bias": jnp.zeros(8), "weight_layout": "dv", "weight": jnp.zeros((8, 97))}, ValueError, r"must be \(97,\)"),
        ({"bias": jnp.zeros(97, jnp.int32)}, TypeError, "bias has dtype int32"),
        ({"token_weights": jnp.ones(11)}, ValueError, r"shape \(11,\); for labels \(12,\) they must be \(12,\)"),
        ({"token_weights": 1.0}, ValueError, r"token_weights have shape \(\); for labels \(12,\)"),
        ({"token_weights": jnp.ones((12, 1))}, ValueError, r"token_weights have shape \(12, 1\)"),
        ({"token_weights": jnp.ones(12, complex)}, TypeError, "token_weights have dtype complex64"),
        (
            {"token_weights": [-1.0, NAN] + [1.0] * 10},
            ValueError,
            f"hold 2 {BAD_WEIGHTS}, the first is -1.0; they must",
        ),
        ({"token_weights": jnp.ones(12).at[3].set(INF)}, ValueError, f"hold 1 {BAD_WEIGHTS}, the first is inf"),
        ({"token_weights": -np.ones(12, int)}, ValueError, f"hold 12 {BAD_WEIGHTS}, the first is -1"),
        ({"implementation": "cuda"}, ValueError, "implementation is 'cuda'; it must be one of reference, xla, pallas"),
    ],
)
def test_bad_input_is_named(change, error, words):
    operands = {"hidden": P.hidden, "weight": P.weight, "labels": P.labels}
    with pytest.raises(error, match=words) as caught:
        lm_head_loss(**(operands | change))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["label_smoothing", "z_loss", "logit_softcap"])
def test_a_traced_number_that_shapes_the_program_is_refused(name):
    """Only logit_scale may be traced."""
    for transform in (jax.jit, jax.grad):
        with pytest.raises(TypeError, match=rf"^{name} is .*; it must be a Python number") as caught:
            transform(lambda value: lm_head_loss(*P, **{name: value}))(0.5)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=r"logit_scale has shape \(2,\); it must be a scalar"):
        jax.jit(lambda scale: lm_head_loss(*P, logit_scale=scale))(jnp.ones(2))


def test_numbers_may_be_numpy_numbers():
    for number in (np.float32, np.float64, int, np.int64):
        options = {"z_loss": number(1), "label_smoothing": number(0), "logit_softcap": number(5)}
        options["logit_scale"] = number(2)
        np.testing.assert_allclose(lm_head_loss(*P, **options), oracle(P, **options).loss, rtol=1e-6)


@pytest.mark.parametrize(
    "change", [{"labels": jnp.full(12, 97)}, {"logit_scale": 0.0}, {"bias": jnp.zeros(3)}], ids=str
)
def test_token_log_probs_have_the_same_border(change):
    operands = P._asdict() | change
    with pytest.raises(ValueError) as of_loss:
        lm_head_loss(**operands)
    with pytest.raises(ValueError, match=re.escape(str(of_loss.value))):
        token_log_probs(**operands)


def test_custom_ignore_index():
    labels = jnp.where(P.labels == -100, 0, P.labels)
    kept = labels != 0
    expected = lm_head_loss(P.hidden[kept], P.weight, labels[kept])
    np.testing.assert_allclose(lm_head_loss(P.hidden, P.weight, labels, ignore_index=0), expected, rtol=1e-6)


def test_more_chunks_than_tokens_is_clamped_with_a_word(caplog):
    with caplog.at_level(logging.WARNING, logger="jaxchunk"):
        loss = lm_head_loss(*P, num_chunks=13)
    assert "num_chunks=13 for 12 tokens: using 12 chunk(s) of 1 token(s)" in caplog.text
    np.testing.assert_allclose(loss, lm_head_loss(*P), rtol=1e-6)


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


@pytest.mark.parametrize("label", [2**32 + 5, 2**32 - 100, -(2**40)])
def test_labels_that_do_not_fit_are_none_of_the_vocabulary_where_weights_are_traced(label):
    """They are not checked then, for a weight may be 0."""
    labels = np.zeros(12, np.int64)
    labels[3] = label
    loss = jax.jit(lambda token_weights: lm_head_loss(P.hidden, P.weight, labels, token_weights=token_weights))
    assert jnp.isnan(loss(jnp.ones(12)))
    assert jnp.isfinite(loss(jnp.ones(12).at[3].set(0.0)))


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
