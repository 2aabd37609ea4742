"""Adapters against explicit merged weights; the base costs no gradient."""

import dataclasses

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from jaxchunk import lm_head_loss
from jaxchunk.models import lora, qwen2
from jaxchunk.models.qwen2 import Execution, Qwen2Config

CONFIG = Qwen2Config(97, 32, 2, 4, 2, 48, tie_word_embeddings=True)
FP32 = Execution(compute_dtype=jnp.float32)
LORA = lora.LoraConfig(rank=3, alpha=12.0)


@pytest.fixture(scope="module")
def base():
    return qwen2.init(CONFIG, jax.random.key(0))


@pytest.fixture(scope="module")
def tokens():
    return jax.random.randint(jax.random.key(1), (2, 11), 0, CONFIG.vocab_size)


def trained(config=LORA):
    """Adapters as after some training: B is no longer zero."""
    adapters = lora.init(config, CONFIG, jax.random.key(2))
    keys = iter(jax.random.split(jax.random.key(3), 32))
    return jax.tree.map(lambda leaf: leaf + 0.1 * jax.random.normal(next(keys), leaf.shape), adapters)


def loss(params, tokens, execution=FP32):
    hidden = qwen2.hidden_states(CONFIG, params, tokens, execution)
    return lm_head_loss(hidden, qwen2.lm_head_weight(params), tokens, num_chunks=2)


def adapter_loss(adapters, base, tokens, execution=FP32):
    return loss(lora.attach(LORA, base, adapters), tokens, execution)


def test_training_begins_at_the_base_model(base, tokens):
    adapters = lora.init(LORA, CONFIG, jax.random.key(2))
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), adapters)
    assert shapes == lora.adapter_shapes(LORA, CONFIG)
    plain, adapted = (
        qwen2.hidden_states(CONFIG, params, tokens, FP32) for params in (base, lora.attach(LORA, base, adapters))
    )
    np.testing.assert_array_equal(plain, adapted)
    assert np.abs(adapters["layers"]["down_lora_a"]).max() == pytest.approx(48**-0.5, rel=0.1)


@pytest.mark.parametrize("targets", [lora.TARGETS, ("q", "down")])
@pytest.mark.parametrize("scan_layers", [False, True])
def test_adapters_compute_what_merged_weights_do(base, tokens, targets, scan_layers):
    config = dataclasses.replace(LORA, targets=targets)
    adapters = trained(config)
    execution = dataclasses.replace(FP32, scan_layers=scan_layers, remat="full" if scan_layers else "none")
    adapted = qwen2.hidden_states(CONFIG, lora.attach(config, base, adapters), tokens, execution)
    merged = lora.merge(config, base, adapters)
    assert merged.keys() == base.keys() and merged["layers"].keys() == base["layers"].keys()
    np.testing.assert_allclose(adapted, qwen2.hidden_states(CONFIG, merged, tokens, FP32), rtol=1e-4, atol=1e-5)
    assert not np.allclose(adapted, qwen2.hidden_states(CONFIG, base, tokens, FP32), rtol=1e-2)


def test_gradients_are_those_through_the_merged_weights(base, tokens):
    adapters = trained()
    ours = jax.jit(jax.grad(adapter_loss))(adapters, base, tokens)
    expected = jax.jit(jax.grad(lambda adapters: loss(lora.merge(LORA, base, adapters), tokens)))(adapters)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6)


def gemms(gradient, *arguments):
    """Shapes of the results of all GEMMs in a program, those in loops once."""
    found = []

    def visit(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name == "dot_general":
                found.append(equation.outvars[0].aval.shape)
            for inner in jax.extend.core.jaxprs_in_params(equation.params):
                visit(inner)

    visit(jax.make_jaxpr(gradient)(*arguments).jaxpr)
    return found


def test_frozen_weights_cost_no_gemm(base, tokens):
    weights = {leaf.shape[1:] for name, leaf in base["layers"].items() if name.endswith("weight")}
    weights |= {shape[::-1] for shape in weights} | {base["embedding"].shape}
    full = gemms(jax.grad(loss), base, tokens)
    assert base["embedding"].shape in full and len([shape for shape in full if shape in weights]) == 8
    frozen = gemms(jax.grad(adapter_loss), trained(), base, tokens)
    assert not [shape for shape in frozen if shape in weights]


def test_the_base_is_kept_in_the_compute_dtype_without_a_change_of_the_loss(base, tokens):
    base = jax.tree.map(lambda leaf: leaf * 1.001, base)  # norms that bfloat16 does not have
    frozen = qwen2.cast_weights(base, jnp.bfloat16)
    assert {leaf.dtype for name, leaf in frozen["layers"].items() if name.endswith("weight")} == {jnp.dtype("bfloat16")}
    assert frozen["final_norm"].dtype == jnp.float32
    execution = Execution(compute_dtype=jnp.bfloat16)
    adapters = trained()
    run = jax.jit(jax.value_and_grad(adapter_loss), static_argnums=3)
    (expected, _), (found, gradients) = (run(adapters, params, tokens, execution) for params in (base, frozen))
    assert found == expected
    assert {leaf.dtype for leaf in jax.tree.leaves(gradients)} == {jnp.dtype("float32")}


def test_a_fingerprint_tells_bases_apart(base):
    found = {lora.fingerprint(base), lora.fingerprint(qwen2.cast_weights(base, jnp.bfloat16))}
    weight = base["layers"]["q_weight"]
    for changed in (
        weight.at[1, 2, 3].add(1e-6),
        weight[::-1],
        weight[:, ::-1],
        weight.at[0, 0, :2].set(weight[0, 0, 1::-1]),
    ):
        found.add(lora.fingerprint({**base, "layers": base["layers"] | {"q_weight": changed}}))
    found.add(lora.fingerprint({**base, "layers": base["layers"] | {"gate_weight": base["layers"]["up_weight"]}}))
    assert len(found) == 7
    assert lora.fingerprint(jax.tree.map(jnp.array, base)) == lora.fingerprint(base)
