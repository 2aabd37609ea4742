"""Generation with a cache against the whole model run anew for every token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxchunk.models import generation, lora, qwen2
from jaxchunk.models.generation import Sampling
from jaxchunk.models.qwen2 import Execution, Qwen2Config

CONFIG = Qwen2Config(61, 32, 2, 4, 2, 48, tie_word_embeddings=False)
FP32 = Execution(compute_dtype=jnp.float32)
KEY = jax.random.key(5)
T = 7


@pytest.fixture(scope="module")
def params():
    keys = iter(jax.random.split(jax.random.key(0), 64))
    shapes = qwen2.init(CONFIG, jax.random.key(0))
    return jax.tree.map(lambda leaf: leaf + 0.3 * jax.random.normal(next(keys), leaf.shape), shapes)


@pytest.fixture(scope="module")
def prompts():
    ids = np.random.default_rng(0).integers(0, CONFIG.vocab_size, 9).tolist()
    return [ids[:5], ids[5:7], ids[2:]]


@pytest.fixture(scope="module")
def uncached(params, prompts):
    """Greedy tokens, the whole sequence anew for each."""
    logits = jax.jit(lambda ids: qwen2.logits(CONFIG, params, ids))
    found = []
    for prompt in prompts:
        ids = list(prompt)
        for _ in range(T):
            padded = jnp.asarray(ids + [0] * (20 - len(ids)))[None]  # later tokens change nothing
            ids.append(int(jnp.argmax(logits(padded)[0, len(ids) - 1])))
        found.append(ids[len(prompt) :])
    return found


def right_padded(prompts):
    S = max(map(len, prompts)) + 1
    token_ids = jnp.asarray([prompt + [3] * (S - len(prompt)) for prompt in prompts])
    return token_ids, jnp.arange(S)[None] < jnp.asarray([[len(prompt)] for prompt in prompts])


@pytest.mark.parametrize("pad", [generation.pad_prompts, right_padded])
@pytest.mark.parametrize("scan_layers", [False, True])
def test_greedy_tokens_are_those_without_a_cache(params, prompts, uncached, pad, scan_layers):
    execution = Execution(compute_dtype=jnp.float32, scan_layers=scan_layers)
    out = generation.generate(CONFIG, params, *pad(prompts), KEY, execution=execution, max_new_tokens=T)
    assert out.token_ids.tolist() == uncached
    assert out.lengths.tolist() == [T] * 3


def test_cached_logits_are_those_of_the_whole_sequence(params):
    ids = jax.random.randint(jax.random.key(2), (2, 9), 0, CONFIG.vocab_size)
    whole = qwen2.logits(CONFIG, params, ids)
    cache = generation.empty_cache(CONFIG, 2, 12, jnp.float32)
    run = jax.jit(lambda cache, ids, valid: generation.extend(CONFIG, params, cache, ids, valid, FP32))
    found = []
    for start, end in ((0, 4), (4, 8), (8, 9)):  # chunks of a prompt and a token
        hidden, cache = run(cache, ids[:, start:end], jnp.ones((2, end - start), bool))
        found.append(qwen2.head_logits(params, hidden))
    np.testing.assert_allclose(jnp.concatenate(found, axis=1), whole, rtol=1e-4, atol=1e-5)
    assert cache.length == 9 and cache.valid.sum() == 18


def test_prefill_gives_the_logits_after_the_last_token(params, prompts):
    token_ids, valid = right_padded(prompts)
    cache = generation.empty_cache(CONFIG, 3, token_ids.shape[1], jnp.float32)
    logits, _ = generation.prefill(CONFIG, params, cache, token_ids, valid, FP32)
    for row, prompt in zip(logits, prompts, strict=True):
        np.testing.assert_allclose(
            row, qwen2.logits(CONFIG, params, jnp.asarray([prompt]))[0, -1], rtol=1e-4, atol=1e-5
        )


def test_a_stop_token_ends_its_row_alone(params, prompts, uncached):
    stop = uncached[0][2]
    expected = [row[: row.index(stop) + 1] if stop in row else row for row in uncached]
    assert len({len(row) for row in expected}) > 1
    padded = generation.pad_prompts(prompts)
    out = generation.generate(CONFIG, params, *padded, KEY, execution=FP32, max_new_tokens=T, stop_ids=(stop, 1000))
    assert out.lengths.tolist() == [len(row) for row in expected]
    assert out.token_ids.tolist() == [row + [0] * (T - len(row)) for row in expected]


def test_one_new_token_and_adapters(params, prompts, uncached):
    config = lora.LoraConfig(2, 4.0)
    adapted = lora.attach(config, params, lora.init(config, CONFIG, KEY))
    padded = generation.pad_prompts(prompts)
    out = generation.generate(CONFIG, adapted, *padded, KEY, execution=FP32, max_new_tokens=1)
    assert out.token_ids.tolist() == [row[:1] for row in uncached]


def test_sampling_follows_the_probabilities():
    logits = jnp.log(jnp.asarray([0.05, 0.5, 0.3, 0.15]))
    rows = jnp.broadcast_to(logits, (4000, 4))

    def shares(sampling):
        return np.bincount(generation.next_token(rows, KEY, sampling), minlength=4) / 4000

    np.testing.assert_allclose(shares(Sampling(1.0)), [0.05, 0.5, 0.3, 0.15], atol=0.03)
    np.testing.assert_allclose(shares(Sampling(1.0, top_p=0.6)), [0, 0.625, 0.375, 0], atol=0.03)
    np.testing.assert_allclose(shares(Sampling(1.0, top_p=0.5)), [0, 1, 0, 0])
    square = np.array([0.05, 0.5, 0.3, 0.15]) ** 2
    np.testing.assert_allclose(shares(Sampling(0.5)), square / square.sum(), atol=0.03)
    np.testing.assert_array_equal(shares(Sampling()), [0, 1, 0, 0])
    with pytest.raises(ValueError, match=r"it needs temperature >= 0 and 0 < top_p <= 1"):
        Sampling(1.0, top_p=0.0)


def test_the_key_settles_the_sample(params, prompts):
    def sample(key):
        padded = generation.pad_prompts(prompts)
        return generation.generate(
            CONFIG, params, *padded, key, execution=FP32, max_new_tokens=T, sampling=Sampling(1.0, 0.9)
        ).token_ids.tolist()

    assert sample(KEY) == sample(KEY) != sample(jax.random.key(6))
