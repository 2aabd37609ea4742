"""Norms and SwiGLU as kernels: right in the interpreter, lowering for CUDA, and all else of the model as it was."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from jaxchunk.models import elementwise, qwen2
from jaxchunk.models.elementwise import residual_norm, swiglu, swiglu_gradient
from jaxchunk.models.partition import AXES
from jaxchunk.training.config import TrainConfig
from jaxchunk.training.step import make_gradients

EPS = 1e-5
INTERPRETED = pytest.param("pallas_interpret", id="interpret")
COMPILED = pytest.param("pallas", id="gpu", marks=pytest.mark.gpu)
CONFIG = qwen2.Qwen2Config(128, 96, 2, 4, 2, 192, tie_word_embeddings=True)


def operands(dtype, *shapes):
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return [jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True)]


def exact_norm(x, delta, weight):
    """In float32, from a residual stream rounded as it is kept."""
    stream = x if delta is None else x + delta
    x = stream.astype(jnp.float32)
    return stream, x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + EPS) * weight[None, None, :]


def error(actual, expected):
    actual, expected = (np.asarray(a, np.float64) for a in (actual, expected))
    return np.linalg.norm(actual - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize("how", [INTERPRETED, COMPILED])
@pytest.mark.parametrize(("T", "D"), [(48, 96), (7, 64), (33, 130), (64, 2048), (37, 1100)])
@pytest.mark.parametrize("has_delta", [True, False])
@pytest.mark.parametrize(("dtype", "bound"), [(jnp.float32, 1e-6), (jnp.bfloat16, 4e-3)])
def test_a_norm_and_its_gradients_are_those_of_float32(how, T, D, has_delta, dtype, bound):
    x, delta, d_stream, d_normed = operands(dtype, *[(1, T, D)] * 4)
    weight = 1.0 + operands(jnp.float32, (D,))[0]
    delta, wanted = (delta, (0, 1, 2)) if has_delta else (None, (0, 2))
    kernel = functools.partial(residual_norm, eps=EPS, interpret=how == "pallas_interpret")
    results = []
    for function in (lambda *a: kernel(*a), exact_norm):
        outputs = jax.jit(function)(x, delta, weight)

        def total(*given, function=function):
            pairs = zip(function(*given), (d_stream, d_normed), strict=True)
            return sum(jnp.sum(a.astype(jnp.float32) * d.astype(jnp.float32)) for a, d in pairs)

        results.append((*outputs, *jax.jit(jax.grad(total, wanted))(x, delta, weight)))
    assert results[0][0].dtype == results[0][1].dtype == dtype
    for actual, expected in zip(*results, strict=True):
        assert actual.shape == expected.shape and error(actual, expected) < bound


@pytest.mark.parametrize("how", [INTERPRETED, COMPILED])
@pytest.mark.parametrize(("T", "F"), [(48, 192), (7, 64), (32, 2048)])
@pytest.mark.parametrize(("dtype", "bound"), [(jnp.float32, 1e-6), (jnp.bfloat16, 4e-3)])
def test_swiglu_its_gradient_and_what_comes_again_are_those_of_float32(how, T, F, dtype, bound):
    gate_up, cotangent = operands(dtype, (2, T, 2 * F), (2, T, F))

    def exact(gate_up):
        gate, up = jnp.split(gate_up.astype(jnp.float32), 2, axis=-1)
        return jax.nn.silu(gate) * up

    function = functools.partial(swiglu, interpret=how == "pallas_interpret")
    (product, pullback), (expected, exact_pullback) = jax.vjp(function, gate_up), jax.vjp(exact, gate_up)
    (gradient,), (exact_gradient,) = pullback(cotangent), exact_pullback(cotangent.astype(jnp.float32))
    again = swiglu_gradient(gate_up, cotangent, interpret=how == "pallas_interpret")
    assert error(product, expected) < bound and error(gradient, exact_gradient) < bound
    np.testing.assert_array_equal(again[0], gradient)
    np.testing.assert_array_equal(again[1], product)


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"remat": "gated"},
        {"remat": "gated", "mlp_chunks": 3},
        {"remat": "full", "scan_layers": True},
        {"mlp_chunks": 3},
    ],
    ids=str,
)
@pytest.mark.parametrize("kernels", [INTERPRETED, COMPILED])
def test_a_model_with_kernels_has_the_gradients_of_one_without(kernels, how):
    params = qwen2.init(CONFIG, jax.random.key(0))
    ids = jax.random.randint(jax.random.key(1), (2, 12), 0, CONFIG.vocab_size)
    (weights,) = operands(jnp.float32, (2, 12, CONFIG.hidden_size))

    def gradients(**how):
        execution = qwen2.Execution(jnp.float32, **how)
        total = lambda params: jnp.sum(qwen2.hidden_states(CONFIG, params, ids, execution) * weights)  # noqa: E731
        return jax.jit(jax.grad(total))(params)

    plain, fused = gradients(), gradients(elementwise=kernels, **how)
    for (path, actual), expected in zip(jax.tree.leaves_with_path(fused), jax.tree.leaves(plain), strict=True):
        assert error(actual, expected) < 3e-6, jax.tree_util.keystr(path)


@pytest.mark.parametrize("kernels", ["xla", "pallas_interpret"])
def test_what_is_gated_again_is_not_kept(kernels):
    params = qwen2.init(CONFIG, jax.random.key(0))
    ids = jnp.zeros((2, 12), jnp.int32)

    def kept(remat):
        execution = qwen2.Execution(jnp.float32, elementwise=kernels, remat=remat)
        _, pullback = jax.vjp(lambda params: qwen2.hidden_states(CONFIG, params, ids, execution), params)
        shapes = [leaf.shape for leaf in jax.tree.leaves(pullback)]
        return sum(np.prod(shape) for shape in shapes if shape[-1:] == (CONFIG.intermediate_size,) and 12 in shape[:-1])

    one_product = CONFIG.num_hidden_layers * 2 * 12 * CONFIG.intermediate_size
    assert kept("none") - kept("gated") >= one_product


def test_adapters_leave_products_apart_and_so_does_a_width_that_no_block_divides():
    layer = {name: jnp.ones((4, 192)) for name in ("gate_weight", "up_weight", "q_weight", "k_weight", "v_weight")}
    layer |= {name: jnp.ones(192) for name in ("q_bias", "k_bias", "v_bias")}
    shapes = {name: leaf.shape for name, leaf in qwen2.side_by_side(layer).items()}
    assert shapes == {"q_k_v_weight": (4, 576), "q_k_v_bias": (576,), "gate_up_weight": (4, 384)}
    adapters = {"up_lora_a": jnp.ones((4, 2)), "k_lora_a": jnp.ones((4, 2))}
    assert qwen2.side_by_side(layer | adapters).keys() == (layer | adapters).keys()
    narrow = {name: leaf[..., :96] for name, leaf in layer.items()}
    assert "gate_weight" in qwen2.side_by_side(narrow) and not elementwise.can_gate(96)


@pytest.mark.parametrize(("mesh_shape", "remat"), [((1, 1, 1), "none"), ((2, 1, 2), "gated"), ((1, 2, 2), "none")])
def test_a_step_lowers_for_cuda_without_a_gpu(mesh_shape, remat):
    device = AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
    mesh = AbstractMesh(mesh_shape, AXES, axis_types=(AxisType.Auto,) * 3, abstract_device=device)
    sharded = mesh.size > 1
    execution = qwen2.Execution(jnp.bfloat16, elementwise="pallas", remat=remat, sharded=sharded, scan_layers=True)
    model = dataclasses.replace(CONFIG, intermediate_size=256)
    config = TrainConfig(seq_len=64, batch_size=8, compute_dtype="bfloat16", lmhead_chunks=2, lmhead_impl="xla")
    ids = jax.ShapeDtypeStruct((8, 64), jnp.int32)
    with jax.sharding.use_abstract_mesh(mesh):
        gradients = jax.jit(make_gradients(config, model, execution, 8, mesh if sharded else None))
        traced = gradients.trace(qwen2.param_shapes(model), {"tokens": ids, "labels": ids})
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("__gpu$xla.gpu.triton") == 6  # two norms and SwiGLU in each direction, and none of them twice
