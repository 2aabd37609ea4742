"""Sums of rows by label against NumPy's."""

import jax
import numpy as np
import pytest

from jaxchunk.lm_head.label_rows import add_label_rows

jitted = jax.jit(add_label_rows)


@pytest.mark.parametrize("num_labels", [1, 3, 40, 1000])
@pytest.mark.parametrize(("T", "columns"), [(1, 5), (127, 5), (128, 1), (1500, 5)])
def test_rows_with_few_labels_and_many(T, columns, num_labels):
    check(T, columns, num_labels, num_rows=1000)


@pytest.mark.parametrize("num_rows", [1, 3])
def test_every_row_has_a_label(num_rows):
    check(127, 5, num_rows, num_rows)


def check(T, columns, num_labels, num_rows):
    keys = jax.random.split(jax.random.key(T + num_labels), 4)
    labels = jax.random.randint(keys[0], (T,), -1, num_labels)
    factors, x = jax.random.normal(keys[1], (T,)), jax.random.normal(keys[2], (T, columns))
    total = jax.random.normal(keys[3], (num_rows, columns))
    expected = np.asarray(total, np.float64)
    valid = np.asarray(labels) >= 0
    np.add.at(expected, np.asarray(labels)[valid], (np.asarray(factors)[:, None] * np.asarray(x, np.float64))[valid])
    np.testing.assert_allclose(jitted(total, labels, factors, x), expected, rtol=1e-5, atol=1e-5 * np.sqrt(T))
