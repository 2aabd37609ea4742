"""A prompt in chunks against the same in one piece and against the model without a cache."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxchunk import inference
from jaxchunk.errors import InputError
from jaxchunk.inference import prefill, unstack_layers
from jaxchunk.inference.prefill import run_layer
from jaxchunk.models import qwen2


def test_logits_are_those_after_the_last_token_of_each_prompt(
    config, params, fp32, prompts, whole_logits, padded_anywhere
):
    token_ids, valid = padded_anywhere
    for num_chunks in (1, 3):  # the shortest prompt ends in the first chunk
        logits, cache = prefill(config, params, token_ids, valid, execution=fp32, num_chunks=num_chunks)
        np.testing.assert_allclose(logits, [rows[-1] for rows in whole_logits], rtol=1e-4, atol=1e-5)
        assert cache.valid.sum(axis=1).tolist() == [len(prompt) for prompt in prompts]


@pytest.mark.parametrize("num_chunks", [2, 9])  # 9 columns: ragged, and a token at a time
def test_chunks_give_the_logits_and_the_cache_of_one_piece(config, params, fp32, num_chunks):
    token_ids = jax.random.randint(jax.random.key(2), (2, 9), 0, config.vocab_size)
    expected, whole = prefill(config, params, token_ids, execution=fp32, cache_size=12)
    logits, cache = prefill(config, params, token_ids, execution=fp32, num_chunks=num_chunks, cache_size=12)
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)
    for found, other in zip(cache, whole, strict=True):
        np.testing.assert_allclose(found, other, rtol=1e-5, atol=1e-5)
    assert cache.keys.shape == (2, 2, 12, 2, 8) and int(cache.length) == 9
    assert not np.asarray(cache.keys)[:, :, 9:].any()


def test_bfloat16_chunks_are_as_near_to_float32_as_one_piece(config, params, fp32):
    token_ids = jax.random.randint(jax.random.key(2), (2, 16), 0, config.vocab_size)
    exact, _ = prefill(config, params, token_ids, execution=fp32)
    execution = qwen2.Execution(jnp.bfloat16)
    one, four = (
        float(jnp.linalg.norm(prefill(config, params, token_ids, execution=execution, num_chunks=n)[0] - exact))
        for n in (1, 4)
    )
    assert 0 < four < 2 * one


def test_the_cache_goes_on_where_the_prompt_ended(config, params, fp32, prompts, padded):
    token_ids, valid = padded
    more = jnp.asarray([[7, 8]] * len(prompts))
    seen = []
    for num_chunks in (1, 2):
        _, cache = prefill(config, params, token_ids, valid, execution=fp32, num_chunks=num_chunks, cache_size=9)
        hidden, cache = inference.extend(config, params, cache, more, jnp.ones(more.shape, bool), fp32)
        seen.append(qwen2.head_logits(params, hidden)[:, -1])
    run = jax.jit(lambda ids: qwen2.logits(config, params, ids)[0])
    whole = [run(jnp.asarray([[*prompt, 7, 8] + [0] * (7 - len(prompt))]))[len(prompt) + 1] for prompt in prompts]
    for found in seen:
        np.testing.assert_allclose(found, whole, rtol=1e-4, atol=1e-5)
    with pytest.raises(InputError, match="the cache has 9 columns, of which 9 are used; there is no room for 1 more"):
        inference.extend(config, params, cache, more[:, :1], jnp.ones((3, 1), bool), fp32)


def test_unstacked_parameters_are_the_same_model(config, params, fp32):
    token_ids = jax.random.randint(jax.random.key(2), (1, 6), 0, config.vocab_size)
    expected, _ = prefill(config, params, token_ids, execution=fp32)
    unstacked = unstack_layers(params, jnp.float32)
    assert unstack_layers(unstacked, jnp.float32) is unstacked and len(unstacked["layers"]) == 2
    logits, _ = prefill(config, unstacked, token_ids, execution=fp32)
    np.testing.assert_array_equal(logits, expected)
    half = unstack_layers(params, jnp.bfloat16)
    assert half["layers"][1]["q_weight"].dtype == half["lm_head"].dtype == jnp.bfloat16
    assert half["layers"][1]["mlp_norm"].dtype == jnp.float32


def test_it_can_be_a_part_of_a_larger_program(config, params, fp32, padded):
    token_ids, valid = padded
    run = jax.jit(lambda ids, valid: prefill(config, params, ids, valid, execution=fp32, num_chunks=2)[0])
    expected, _ = prefill(config, params, token_ids, valid, execution=fp32)
    np.testing.assert_allclose(run(token_ids, valid), expected, rtol=1e-4, atol=1e-5)


def test_only_keys_that_are_there_are_computed_with(config, params):
    """The cache has 64 columns; the second chunk of 8 multiplies with 16 keys, and the first with 8."""
    layer = jax.tree.map(lambda leaf: leaf[0], params["layers"])
    x, keys = jnp.zeros((1, 8, 32)), jnp.zeros((1, 64, 2, 8))
    for start, num_keys in ((0, 8), (8, 16)):
        lowered = run_layer.lower(config, layer, x, keys, keys, start=start, attention="xla")
        shapes = {
            tuple(map(int, line.rsplit("tensor<", 1)[1].split("xf32")[0].split("x")))
            for line in lowered.as_text().splitlines()
            if "dot_general" in line
        }
        assert any(num_keys in shape for shape in shapes) and not any(64 in shape for shape in shapes)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"num_chunks": 6}, "num_chunks is 6; the prompts have 5 columns, so it must be from 1 to 5"),
        ({"num_chunks": 0}, "num_chunks is 0"),
        ({"cache_size": 4}, "cache_size is 4; the prompts have 5 columns"),
        ({"valid": jnp.asarray([[True] * 5, [False] * 5])}, "prompt 2 of 2 is empty; give it at least one token"),
        ({"valid": jnp.ones((2, 4), bool)}, r"valid has the shape \(2, 4\)"),
        ({"token_ids": jnp.zeros((2, 0), int)}, r"token_ids have the shape \(2, 0\)"),
        ({"token_ids": jnp.zeros((2, 65), int)}, "a sequence has 65 tokens .* the model has 64 positions"),
    ],
)
def test_bad_input(config, params, fp32, arguments, words):
    with pytest.raises(InputError, match=words):
        prefill(config, params, **({"token_ids": jnp.zeros((2, 5), int)} | arguments), execution=fp32)
