"""A small model whose weights are large enough to tell tokens apart, and prompts of several lengths."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxchunk.inference import pad_prompts
from jaxchunk.models import qwen2
from jaxchunk.models.qwen2 import Execution, Qwen2Config


@pytest.fixture(scope="session")
def config():
    return Qwen2Config(61, 32, 2, 4, 2, 48, tie_word_embeddings=False, max_position_embeddings=64)


@pytest.fixture(scope="session")
def fp32():
    return Execution(compute_dtype=jnp.float32)


@pytest.fixture(scope="session")
def params(config):
    keys = iter(jax.random.split(jax.random.key(0), 64))
    shapes = qwen2.init(config, jax.random.key(0))
    return jax.tree.map(lambda leaf: leaf + 0.3 * jax.random.normal(next(keys), leaf.shape), shapes)


@pytest.fixture(scope="session")
def prompts(config):
    ids = np.random.default_rng(0).integers(0, config.vocab_size, 9).tolist()
    return [ids[:5], ids[5:7], ids[2:]]


@pytest.fixture(scope="session")
def whole_logits(config, params, prompts):
    """Of each prompt by itself, without a cache."""
    run = jax.jit(lambda ids: qwen2.logits(config, params, ids))
    padded = [jnp.asarray([prompt + [0] * (9 - len(prompt))]) for prompt in prompts]  # later tokens change nothing
    return [np.asarray(run(ids))[0, : len(prompt)] for ids, prompt in zip(padded, prompts, strict=True)]


def right(prompts):
    S = max(map(len, prompts)) + 1
    token_ids = jnp.asarray([prompt + [3] * (S - len(prompt)) for prompt in prompts])
    return token_ids, jnp.arange(S)[None] < jnp.asarray([[len(prompt)] for prompt in prompts])


def between(prompts):
    """A column without a token after each token."""
    S = 2 * max(map(len, prompts))
    token_ids, valid = np.full((len(prompts), S), 3), np.zeros((len(prompts), S), bool)
    for row, prompt in enumerate(prompts):
        token_ids[row, : 2 * len(prompt) : 2] = prompt
        valid[row, : 2 * len(prompt) : 2] = True
    return jnp.asarray(token_ids), jnp.asarray(valid)


@pytest.fixture(scope="session")
def padded(prompts):
    return pad_prompts(prompts)


@pytest.fixture(scope="session", params=[pad_prompts, right, between])
def padded_anywhere(request, prompts):
    return request.param(prompts)
