"""Numerics of the loss and its gradients, for every implementation, against float64."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lm_head_oracle import (
    ALL,
    CHUNKED,
    DTYPES,
    IGNORE,
    Problem,
    assert_as_exact,
    oracle,
    problem,
    relative_error,
    same_dtype_baseline,
    value_and_grads,
)

from jaxchunk import lm_head_loss

# A Latin square: every count of chunks and every V with every implementation in every dtype, and with each other.
PAIRS = [(implementation, dtype) for implementation in ("xla", "pallas_interpret") for dtype in DTYPES]
CHUNKS_AND_V = [
    (num_chunks, V, *PAIRS[(i + j) % len(PAIRS)])
    for i, num_chunks in enumerate((1, 2, 4, 7, 16))
    for j, V in enumerate((97, 1000, 1187, 4097))
]


@pytest.mark.parametrize(("num_chunks", "V", "implementation", "dtype"), CHUNKS_AND_V)
def test_chunked_is_as_exact_as_unchunked(implementation, num_chunks, V, dtype):
    p = problem(T=33, V=V, dtype=dtype)
    result = value_and_grads(p, num_chunks=num_chunks, implementation=implementation)
    assert_as_exact(result, oracle(p), same_dtype_baseline(p), dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
@pytest.mark.parametrize(("num_chunks", "V"), [(1, 97), (2, 4097), (4, 1187), (7, 1000), (16, 97)])
@pytest.mark.parametrize("implementation", ["xla", "pallas"])
def test_chunked_is_as_exact_as_unchunked_on_a_gpu(implementation, num_chunks, V, dtype):
    # Enough rows in a chunk for the same kind of GEMM: for five rows XLA takes one that sums in another order.
    p = problem(T=2001, D=64, V=V, dtype=dtype)
    result = value_and_grads(p, num_chunks=num_chunks, implementation=implementation)
    assert_as_exact(result, oracle(p), same_dtype_baseline(p), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
def test_reference_is_float32_whatever_comes_in(dtype):
    p = problem(V=1187, dtype=dtype)
    result, exact = value_and_grads(p, implementation="reference"), oracle(p)
    assert relative_error(result.loss, exact.loss) < 1e-6
    assert relative_error(result.d_weight, exact.d_weight) < max(1e-6, jnp.finfo(dtype).eps / 2)


@pytest.mark.parametrize("scale", [1.0, 30.0, 1000.0])
@pytest.mark.parametrize("implementation", CHUNKED)
def test_large_logits(implementation, scale):
    p = problem(V=1187, scale=scale)
    result = value_and_grads(p, num_chunks=4, implementation=implementation)
    assert_as_exact(result, oracle(p), same_dtype_baseline(p), jnp.float32)


@pytest.mark.parametrize("implementation", ALL)
def test_cotangent_multiplies_gradients(implementation):
    p = problem()
    result = value_and_grads(p, cotangent=3.0, num_chunks=4, implementation=implementation)
    exact = oracle(p, cotangent=3.0)
    chex.assert_trees_all_close(result, exact, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("implementation", ALL)
def test_sum_and_normalizer(implementation):
    p = problem()
    options = {"num_chunks": 4, "implementation": implementation}
    summed = value_and_grads(p, reduction="sum", **options)
    chex.assert_trees_all_close(summed, oracle(p, reduction="sum"), rtol=1e-5, atol=1e-6)
    normalized = value_and_grads(p, normalizer=jnp.float32(50.0), **options)
    chex.assert_trees_all_close(normalized, oracle(p, normalizer=50.0), rtol=1e-5, atol=1e-7)
    none = lm_head_loss(*p, normalizer=0, **options)
    assert none == 0


@pytest.mark.parametrize("implementation", ALL)
def test_gradient_through_a_traced_normalizer(implementation):
    p = problem()

    def loss(normalizer):
        return 3 * lm_head_loss(*p, normalizer=normalizer, num_chunks=4, implementation=implementation)

    total = oracle(p, reduction="sum").loss
    value, gradient = jax.jit(jax.value_and_grad(loss))(0.25)  # below 1: nothing may be clamped
    np.testing.assert_allclose(value, 3 * total / 0.25, rtol=1e-5)
    np.testing.assert_allclose(gradient, -3 * total / 0.25**2, rtol=1e-5)


def test_microbatches_with_the_global_count_add_up():
    """Means of micro-batches of unequal size cannot be averaged; sums over the global count can."""
    p = problem(T=32, ignored=0.5)
    count = jnp.sum(p.labels != IGNORE)
    halves = [
        lm_head_loss(p.hidden[part], p.weight, p.labels[part], normalizer=count, num_chunks=2)
        for part in (slice(0, 8), slice(8, 32))
    ]
    np.testing.assert_allclose(sum(halves), oracle(p).loss, rtol=1e-6)


@pytest.mark.parametrize("implementation", ALL)
def test_ignored_rows_may_hold_anything(implementation):
    p = problem(T=32)
    labels = p.labels.at[8:16].set(IGNORE)  # with 4 chunks, the whole second chunk
    hidden = jnp.where((labels == IGNORE)[:, None], jnp.nan, p.hidden)
    result = value_and_grads(Problem(hidden, p.weight, labels), num_chunks=4, implementation=implementation)
    exact = oracle(Problem(p.hidden, p.weight, labels))
    chex.assert_trees_all_close(result, exact, rtol=1e-5, atol=1e-7)
    assert np.all(result.d_hidden[8:16] == 0)


@pytest.mark.parametrize("implementation", ALL)
def test_everything_ignored_is_zero(implementation):
    p = problem(T=8)
    result = value_and_grads(p._replace(labels=jnp.full(8, IGNORE)), num_chunks=2, implementation=implementation)
    assert result.loss == 0
    assert np.all(result.d_hidden == 0)
    assert np.all(result.d_weight == 0)


@pytest.mark.parametrize("implementation", ALL)
@pytest.mark.parametrize(("T", "V"), [(1, 97), (5, 1), (1, 1)])
def test_smallest_shapes(implementation, T, V):
    p = problem(T=T, V=V, ignored=0.0)
    result = value_and_grads(p, num_chunks=3, implementation=implementation)
    chex.assert_trees_all_close(result, oracle(p), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("implementation", ALL)
def test_no_tokens_at_all(implementation):
    p = problem(T=0)
    result = value_and_grads(p, num_chunks=2, implementation=implementation)
    assert result.loss == 0
    assert np.all(result.d_weight == 0)


def test_master_weight_is_cast_once_and_gets_an_fp32_gradient():
    p = problem(V=1187, dtype=jnp.bfloat16)
    master = p._replace(weight=p.weight.astype(jnp.float32))
    result = value_and_grads(master, num_chunks=4)
    assert_as_exact(result, oracle(p), same_dtype_baseline(p), jnp.bfloat16)
    explicit = lm_head_loss(p.hidden.astype(jnp.float32), master.weight, p.labels, compute_dtype=jnp.bfloat16)
    np.testing.assert_allclose(explicit, lm_head_loss(*p), rtol=1e-6)


def test_tied_embeddings_receive_both_gradients():
    V, D = 97, 24
    tokens, labels = jax.random.randint(jax.random.key(0), (2, 2, 17), 0, V)
    embedding = jax.random.normal(jax.random.key(1), (V, D))

    def loss(embedding, **options):
        return lm_head_loss(jnp.tanh(embedding[tokens]), embedding, labels, **options)

    exact = jax.grad(functools.partial(loss, implementation="reference"))(embedding)
    for num_chunks in (1, 4, 7):
        gradient = jax.jit(jax.grad(functools.partial(loss, num_chunks=num_chunks, implementation="xla")))(embedding)
        chex.assert_trees_all_close(gradient, exact, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("implementation", ALL)
def test_leading_dimensions(implementation):
    p = problem(T=24)
    batched = lm_head_loss(
        p.hidden.reshape(2, 3, 4, -1), p.weight, p.labels.reshape(2, 3, 4), num_chunks=5, implementation=implementation
    )
    np.testing.assert_allclose(batched, oracle(p).loss, rtol=1e-6)


@pytest.mark.parametrize("implementation", ALL)
@pytest.mark.parametrize("bad_label", [97, 2**30, -1, -99])
def test_bad_label_in_a_jitted_program_is_nan(implementation, bad_label):
    p, options = problem(V=97), {"num_chunks": 4, "implementation": implementation}
    assert np.isfinite(value_and_grads(p, **options).loss)
    result = value_and_grads(p._replace(labels=p.labels.at[5].set(bad_label)), **options)
    assert np.isnan(result.loss)
    assert np.all(np.isnan(result.d_hidden[5]))
    assert np.all(np.isfinite(result.d_hidden[6]))


@pytest.mark.parametrize("implementation", ALL)
def test_works_under_vmap_and_scan_and_remat(implementation):
    p = problem(T=24)
    loss = functools.partial(lm_head_loss, num_chunks=3, implementation=implementation)
    stacked = p.hidden.reshape(2, 12, -1), p.labels.reshape(2, 12)
    each = [loss(x, p.weight, y) for x, y in zip(*stacked, strict=True)]
    vmapped = jax.jit(jax.vmap(lambda x, y: loss(x, p.weight, y)))(*stacked)
    np.testing.assert_allclose(vmapped, each, rtol=1e-6)
    _, scanned = jax.lax.scan(lambda c, xy: (c, loss(xy[0], p.weight, xy[1])), None, stacked)
    np.testing.assert_allclose(scanned, each, rtol=1e-6)
    exact = jax.grad(loss)(*p)
    np.testing.assert_allclose(jax.jit(jax.grad(jax.checkpoint(loss)))(*p), exact, rtol=1e-5, atol=1e-8)
