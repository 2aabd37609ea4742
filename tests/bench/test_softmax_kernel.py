"""The Pallas softmax in JAX's interpreter, against float64, and as a GPU runs it: in place."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from jaxchunk.bench import softmax_kernel
from jaxchunk.bench.softmax_kernel import softmax_rows
from jaxchunk.lm_head.kernels.triton import RowKernelConfig


def exact_softmax(logits):
    z = np.asarray(logits, np.float64)
    e = np.exp(z - z.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


@pytest.mark.parametrize(
    ("N", "dtype"),
    [(1, "bfloat16"), (2, "float32"), (97, "float32"), (97, "float16"), (128, "bfloat16"), (4097, "bfloat16")],
)
def test_the_kernel_is_a_softmax(N, dtype):
    scale = jnp.array([1.0, 30.0, 0.0, 1000.0, 1.0])[:, None]
    shift = jnp.array([0.0, 0.0, 7.0, 0.0, -30000.0])[:, None]
    logits = (scale * jax.random.normal(jax.random.key(0), (5, N)) + shift).astype(dtype)
    found = softmax_rows(logits, interpret=True)
    assert found.dtype == dtype and found.shape == logits.shape
    tolerance = max(jnp.finfo(dtype).eps, 2e-6)
    np.testing.assert_allclose(np.asarray(found, np.float64), exact_softmax(logits), rtol=tolerance, atol=1e-7)


@pytest.mark.parametrize(("N", "block"), [(97, 64), (97, 32), (128, 64)])
def test_the_kernel_is_right_in_place(N, block):
    """The interpreter gives the kernel separate buffers; on a GPU it writes over the logits."""
    logits = jax.random.normal(jax.random.key(0), (3, N))
    kernel = functools.partial(softmax_kernel._softmax_kernel, num_columns=N, block=block, exp=jnp.exp)

    def in_place(z_ref, p_ref):
        p_ref[...] = z_ref[...]
        kernel(p_ref, p_ref)

    row = pl.BlockSpec((None, N), lambda t: (t, 0))
    out_shape = jax.ShapeDtypeStruct(logits.shape, logits.dtype)
    call = pl.pallas_call(in_place, grid=(3,), in_specs=[row], out_specs=row, out_shape=out_shape, interpret=True)
    np.testing.assert_allclose(call(logits), exact_softmax(logits), rtol=2e-6)
    config = RowKernelConfig(block=block)
    np.testing.assert_array_equal(call(logits), softmax_rows(logits, config=config, interpret=True))


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("N", "dtype"),
    [
        (1, "float32"),
        (97, "bfloat16"),
        (2048, "float16"),
        (131072, "bfloat16"),
        (131071, "bfloat16"),
        (9999, "float32"),
    ],
)
def test_on_a_gpu_the_kernel_is_a_softmax(N, dtype):
    logits = (5 * jax.random.normal(jax.random.key(0), (300, N))).astype(dtype)
    expected = exact_softmax(logits)
    found = jax.jit(softmax_rows, donate_argnums=0)(logits)
    tolerance = max(jnp.finfo(dtype).eps, 1e-5)
    np.testing.assert_allclose(np.asarray(found, np.float64), expected, rtol=tolerance, atol=1e-7)
