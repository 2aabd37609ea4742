"""interleave: numbers and gradients of the unchunked functions, one chunk at a time, and what is refused."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jaxchunk import interleave


def operands(T=13, D=8, F=24, dtype=jnp.float32, seed=0):
    keys = jax.random.split(jax.random.key(seed), 3)
    x = jax.random.normal(keys[0], (T, D), dtype)
    return x, {"up": jax.random.normal(keys[1], (D, F), dtype), "down": jax.random.normal(keys[2], (F, D), dtype)}


def up(x, weights):
    return x @ weights["up"]


def softmax(z, weights):
    return jax.nn.softmax(z, axis=-1)


def down(p, weights):
    return p @ weights["down"]


STAGES = (up, softmax, down)


def unchunked(x, weights):
    return down(softmax(up(x, weights), weights), weights)


@pytest.mark.parametrize("num_chunks", [1, 2, 4, 5, 13])
@pytest.mark.parametrize("remat", [False, True])
def test_numbers_and_gradients_are_those_of_the_unchunked_functions(num_chunks, remat):
    x, weights = operands()
    chunked = functools.partial(interleave, STAGES, num_chunks=num_chunks, remat=remat)
    scalar = lambda f: lambda x, w: jnp.sum(jnp.sin(f(x, w)))  # noqa: E731
    found = jax.jit(jax.value_and_grad(scalar(chunked), (0, 1)))(x, weights)
    chex.assert_trees_all_close(found, jax.value_and_grad(scalar(unchunked), (0, 1))(x, weights), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(jax.jit(chunked)(x, weights), unchunked(x, weights), rtol=1e-5)


@pytest.mark.parametrize("remat", [False, True])
def test_second_derivatives_are_those_of_the_unchunked_functions(remat):
    x, weights = operands()

    def squared_gradients(f):
        gradients = jax.grad(lambda x, w: jnp.sum(jnp.sin(f(x, w))), (0, 1))
        return lambda x, w: sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(gradients(x, w)))

    found, expected = (
        jax.jit(jax.grad(squared_gradients(f), (0, 1)))(x, weights)
        for f in (functools.partial(interleave, STAGES, num_chunks=4, remat=remat), unchunked)
    )
    chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("axis", [0, 1, -2])
def test_any_axis_and_any_tree(axis):
    x, weights = operands(T=30)
    rows = {"a": x.reshape(5, 6, 8), "b": 2.0 * x.reshape(5, 6, 8)}
    both = lambda rows, w: {"sum": unchunked(rows["a"] + rows["b"], w), "row": rows["a"]}  # noqa: E731
    found = interleave(both, rows, weights, num_chunks=4, axis=axis)
    chex.assert_trees_all_close(found, both(rows, weights), rtol=1e-5)


@pytest.mark.parametrize("num_chunks", [1, 3, 4, 5])
def test_sums_are_those_of_all_chunks(num_chunks):
    x, weights = operands(T=12)
    outer = lambda p, w: (p, {"pp": p.T @ p, "count": jnp.int32(p.shape[0])})  # noqa: E731
    found, total = jax.jit(functools.partial(interleave, [up, softmax, outer], num_chunks=num_chunks, sums=True))(
        x, weights
    )
    p = softmax(up(x, weights), weights)
    np.testing.assert_allclose(found, p, rtol=1e-5)
    np.testing.assert_allclose(total["pp"], p.T @ p, rtol=1e-5, atol=1e-6)
    assert total["count"] == 12 and total["count"].dtype == jnp.int32


def test_sums_are_added_up_in_float32():
    x = jnp.full((64, 1), 1 / 64 + 2**-12, jnp.bfloat16)
    assert interleave(lambda x, _: (x, jnp.sum(x)), x, num_chunks=1, sums=True)[1].dtype == jnp.float32
    _, total = interleave(lambda x, _: (x, jnp.sum(x)), x, num_chunks=64, sums=True)
    assert total.dtype == jnp.float32 and total == 64 * float(x[0, 0])


def test_keys_and_integers_go_through_unchanged():
    shared = {"key": jax.random.key(3), "offset": 2}
    noise = lambda x, s: x + s["offset"] + jax.random.normal(s["key"], ())  # noqa: E731
    x = jnp.arange(6.0)
    np.testing.assert_allclose(interleave(noise, x, shared, num_chunks=3), noise(x, shared), rtol=1e-6)

    def scaled(scale):
        both = lambda x, s: s["by"] * noise(x, s)  # noqa: E731
        return jnp.sum(interleave(both, x, shared | {"by": scale}, num_chunks=3))

    np.testing.assert_allclose(jax.grad(scaled)(2.0), jnp.sum(noise(x, shared)), rtol=1e-6)


def test_gradients_of_bfloat16_weights_do_not_lose_small_chunks():
    """64 chunks that each add 1/64: in bfloat16 the last ones would be rounded away."""
    x, w = jnp.full((64, 1), 1 / 64 + 2**-12, jnp.bfloat16), jnp.ones((1, 1), jnp.bfloat16)
    gradient = jax.grad(lambda w: jnp.sum(interleave(lambda x, w: x @ w, x, w, num_chunks=64)))(w)
    assert gradient.dtype == jnp.bfloat16
    assert float(gradient[0, 0]) == float(jnp.bfloat16(64 * float(x[0, 0])))
    bfloat16_sum = functools.reduce(lambda a, b: jnp.bfloat16(a + b), x[:, 0])
    assert float(gradient[0, 0]) != float(bfloat16_sum)


def test_only_a_chunk_lies_between_the_stages():
    x, weights = operands(T=64, D=8, F=512)
    chunked = functools.partial(interleave, STAGES, num_chunks=8)
    text = jax.jit(chunked).lower(x, weights).compile().as_text()
    assert '"known_trip_count":{"n":"8"}' in text
    assert re.search(r"f32\[8,512\]", text) and not re.search(r"f32\[64,512\]", text)
    gradients = jax.grad(lambda x, w: jnp.sum(interleave(STAGES, x, w, num_chunks=8, remat=True) ** 2), (0, 1))
    text = jax.jit(gradients).lower(x, weights).compile().as_text()
    assert text.count('"known_trip_count":{"n":"8"}') >= 2
    assert not re.search(r"f32\[(64|8,8),512\]", text)
    assert not re.search(r"f32\[8,(512,8|8,512)\]", text)  # gradients of the weights are added up, not stacked


def test_without_a_gradient_nothing_is_held_in_the_wider_dtype():
    x, weights = operands(T=64, D=8, F=512)
    with jax.enable_x64(True):
        chunked = functools.partial(interleave, STAGES, num_chunks=8, accum_dtype=jnp.float64)
        assert "f64[" not in jax.jit(chunked).lower(x, weights).compile().as_text()
        gradient = jax.jit(jax.grad(lambda w: jnp.sum(chunked(x, w) ** 2)))
        assert "f64[" in gradient.lower(weights).compile().as_text()


def test_the_loop_is_not_unrolled_into_one_without_chunks():
    x, weights = operands(T=8)
    text = jax.jit(functools.partial(interleave, STAGES, num_chunks=1)).lower(x, weights).compile().as_text()
    assert " while(" not in text


@pytest.mark.parametrize(
    ("rows", "options", "words"),
    [
        (jnp.zeros((4, 2)), {"num_chunks": 5}, "num_chunks is 5; for 4 rows it must be from 1 to 4"),
        (jnp.zeros((4, 2)), {"num_chunks": 0}, "num_chunks is 0"),
        ((jnp.zeros((4, 2)), jnp.zeros(5)), {"num_chunks": 2}, r"the shapes \(4, 2\), \(5,\); they need one length"),
        (jnp.zeros(4), {"num_chunks": 2, "axis": 1}, "one length along axis 1"),
        ((), {"num_chunks": 1}, "shapes of nothing"),
    ],
)
def test_bad_rows_are_named(rows, options, words):
    with pytest.raises(ValueError, match=words):
        interleave(lambda x, _: x, rows, **options)


def test_a_stage_that_is_not_row_wise_is_named():
    with pytest.raises(ValueError, match=r"of a chunk of 2 rows the stages made \(3,\); axis 0 must have 2 too"):
        interleave(lambda x, _: jnp.sum(x, 0), jnp.zeros((4, 3)), num_chunks=2)


def test_over_a_mesh_every_device_has_rows_of_its_own():
    if len(jax.devices()) < 2:
        pytest.skip("needs two devices")
    x, weights = operands(T=24)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])

    def chunked(x, w):
        results, total = interleave([up, softmax, lambda p, w: (down(p, w), jnp.sum(p))], x, w, num_chunks=3, sums=True)
        return jax.lax.psum(jnp.sum(results**2) + total, "data")

    sharded = jax.shard_map(chunked, mesh=mesh, in_specs=(P("data"), P()), out_specs=P())
    expected = lambda x, w: jnp.sum(unchunked(x, w) ** 2) + x.shape[0]  # noqa: E731
    found = jax.jit(jax.value_and_grad(sharded, (0, 1)))(x, weights)
    chex.assert_trees_all_close(found, jax.value_and_grad(expected, (0, 1))(x, weights), rtol=1e-4, atol=1e-5)
