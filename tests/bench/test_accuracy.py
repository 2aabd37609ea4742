"""The exact loss and gradients that variants are held to, and the errors against them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxchunk.bench import accuracy


@pytest.fixture(scope="module")
def operands():
    keys = jax.random.split(jax.random.key(0), 3)
    hidden = jax.random.normal(keys[0], (24, 16))
    return hidden, jax.random.normal(keys[1], (97, 16)), jax.random.randint(keys[2], (24,), 0, 97)


def in_float64(hidden, weight, labels):
    x, W, rows = np.float64(hidden), np.float64(weight), np.arange(len(labels))
    z = x @ W.T
    others = np.exp(z - z[rows, labels][:, None])
    others[rows, labels] = 0
    n = others.sum(axis=1)
    d_logits = others / (1 + n)[:, None]
    d_logits[rows, labels] = -n / (1 + n)
    return np.log1p(n).mean(), d_logits @ W / len(x), d_logits.T @ x / len(x)


def test_exact_is_exact(operands):
    for value, expected in zip(accuracy.exact(*operands), in_float64(*operands), strict=True):
        np.testing.assert_allclose(value, expected, rtol=1e-4, atol=1e-6)


def test_exact_does_not_cancel_where_labels_stand_30_nats_above_the_rest():
    weight = jnp.concatenate([jnp.eye(16), 0.01 * jax.random.normal(jax.random.key(1), (81, 16))])
    hidden, labels = 30 * jnp.eye(16), jnp.arange(16)
    for value, expected in zip(accuracy.exact(hidden, weight, labels), in_float64(hidden, weight, labels), strict=True):
        assert np.linalg.norm(value - expected) <= 1e-4 * np.linalg.norm(expected)


def test_confident_labels_are_the_argmax_of_logits_times_eight(operands):
    hidden, weight, _ = operands
    slices = accuracy.cases(*operands)
    assert list(slices) == ["random", "confident"]
    np.testing.assert_array_equal(slices["confident"].hidden, 8 * hidden)
    np.testing.assert_array_equal(slices["confident"].labels, np.argmax(hidden @ weight.T, axis=1))
    assert float(slices["confident"].loss) < 0.1 * float(slices["random"].loss)


def test_a_slice_has_at_most_2048_tokens():
    slices = accuracy.cases(jnp.ones((3000, 2)), jnp.ones((5, 2)), jnp.zeros(3000, int))
    assert slices["random"].hidden.shape == slices["random"].d_hidden.shape == (2048, 2)


def test_errors_are_relative_norms_on_the_operands_that_the_gemms_see(operands):
    hidden, weight, labels = operands
    slices = accuracy.cases(hidden.astype(jnp.bfloat16), weight, labels)

    def evaluate(x, W, y):
        loss, d_hidden, d_weight = accuracy.exact(x.astype(jnp.float32), W.astype(jnp.bfloat16), y)
        return 1.5 * loss, (1.01 * d_hidden, d_weight.astype(jnp.bfloat16))

    assert "reduce_precision" in str(jax.make_jaxpr(accuracy.exact)(*slices["random"][:3]))  # casts are undone on GPUs
    measured = accuracy.measure(evaluate, slices)
    assert measured.d_weight_dtype == "bfloat16"
    for errors in measured.errors.values():
        assert errors["loss"] == pytest.approx(0.5, rel=1e-3)
        assert errors["d_hidden"] == pytest.approx(0.01, rel=1e-3)
        assert 1e-4 < errors["d_weight"] < 4e-3  # what rounding to bfloat16 costs
