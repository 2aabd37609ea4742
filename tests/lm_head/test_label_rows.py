"""Sums of rows by label against NumPy's."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxchunk.lm_head import label_rows
from jaxchunk.lm_head.kernels import triton_label_rows

HOW = {
    "xla": jax.jit(label_rows.add_label_rows),
    "interpret": jax.jit(functools.partial(triton_label_rows.add_label_rows, interpret=True)),
    "gpu": jax.jit(triton_label_rows.add_label_rows),
}
EVERYWHERE = pytest.mark.parametrize("how", ["xla", "interpret", pytest.param("gpu", marks=pytest.mark.gpu)])


@EVERYWHERE
@pytest.mark.parametrize("num_labels", [1, 3, 40, 1000])
@pytest.mark.parametrize(("T", "columns"), [(1, 5), (127, 5), (128, 1), (1500, 5), (70, 1100)])
def test_rows_with_few_labels_and_many(how, T, columns, num_labels):
    check(how, T, columns, num_labels, num_rows=1000)


@EVERYWHERE
@pytest.mark.parametrize("num_rows", [1, 3])
def test_every_row_has_a_label(how, num_rows):
    check(how, 127, 5, num_rows, num_rows)


@EVERYWHERE
def test_no_row_at_all(how):
    total = jnp.ones((3, 5))
    np.testing.assert_array_equal(HOW[how](total, jnp.full(4, -1), jnp.ones(4), jnp.ones((4, 5))), total)


@EVERYWHERE
def test_a_run_may_end_anywhere(how):
    """Runs that fill segments of 64 rows, go over their ends by one, and are as long as all others together."""
    lengths = [64, 63, 1, 65, 127, 128, 129, 2, 190, 1, 62, 500]
    check(how, sum(lengths), 8, 12, 12, labels=jnp.repeat(jnp.arange(12), jnp.array(lengths)))


@EVERYWHERE
def test_with_numbers_of_64_bits(how):
    with jax.enable_x64():
        found = HOW[how](jnp.ones((3, 5)), jnp.arange(200) % 4 - 1, jnp.ones(200), jnp.ones((200, 5), jnp.bfloat16))
        assert found.dtype == jnp.float64
        np.testing.assert_array_equal(found, 51)


@EVERYWHERE
def test_a_total_in_bfloat16_is_rounded_twice_at_most(how):
    """By the first segment of a run, and by all others of it."""
    T = 640
    x = jax.random.uniform(jax.random.key(0), (T, 5), jnp.bfloat16)
    found = HOW[how](jnp.zeros((2, 5), jnp.bfloat16), jnp.zeros(T, jnp.int32), jnp.full(T, 1.01), x)
    expected = np.sum(1.01 * np.asarray(x, np.float64), axis=0)
    np.testing.assert_allclose(found[0].astype(jnp.float32), expected, rtol=2.0**-8)


@pytest.mark.gpu
@pytest.mark.parametrize("share", [0.0, 0.05, 1.0])
def test_a_gpu_adds_a_batch_of_text_the_same_way_every_time(share):
    T, V, D = 16384, 32000, 896
    keys = jax.random.split(jax.random.key(0), 4)
    labels = jnp.where(jax.random.uniform(keys[0], (T,)) < share, 17, jax.random.randint(keys[1], (T,), -1, V))
    x, total = jax.random.normal(keys[2], (T, D), jnp.bfloat16), jax.random.normal(keys[3], (V, D))
    factors = jnp.linspace(-1.0, 1.0, T)
    found = HOW["gpu"](total, labels, factors, x)
    for _ in range(3):
        np.testing.assert_array_equal(found, HOW["gpu"](total, labels, factors, x))
    with jax.default_matmul_precision("highest"):
        expected = HOW["xla"](total, labels, factors, x)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=2e-3)


def check(how, T, columns, num_labels, num_rows, labels=None):
    keys = jax.random.split(jax.random.key(T + num_labels), 4)
    if labels is None:
        labels = jax.random.randint(keys[0], (T,), -1, num_labels)
    factors, x = jax.random.normal(keys[1], (T,)), jax.random.normal(keys[2], (T, columns))
    total = jax.random.normal(keys[3], (num_rows, columns))
    expected = np.asarray(total, np.float64)
    valid = np.asarray(labels) >= 0
    np.add.at(expected, np.asarray(labels)[valid], (np.asarray(factors)[:, None] * np.asarray(x, np.float64))[valid])
    np.testing.assert_allclose(HOW[how](total, labels, factors, x), expected, rtol=1e-5, atol=1e-5 * np.sqrt(T))
