"""Generation with a cache against the whole model run anew for every token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxchunk import inference
from jaxchunk.errors import InputError
from jaxchunk.inference import Sampling, pad_prompts, unstack_layers
from jaxchunk.models import lora, qwen2
from jaxchunk.models.qwen2 import Execution

KEY = jax.random.key(5)
T = 7


@pytest.fixture(scope="module")
def uncached(config, params, prompts):
    """Greedy tokens, the whole sequence anew for each."""
    logits = jax.jit(lambda ids: qwen2.logits(config, params, ids))
    found = []
    for prompt in prompts:
        ids = list(prompt)
        for _ in range(T):
            padded = jnp.asarray(ids + [0] * (20 - len(ids)))[None]  # later tokens change nothing
            ids.append(int(jnp.argmax(logits(padded)[0, len(ids) - 1])))
        found.append(ids[len(prompt) :])
    return found


def test_greedy_tokens_are_those_without_a_cache(config, params, fp32, padded_anywhere, uncached):
    out = inference.generate(config, params, *padded_anywhere, KEY, execution=fp32, max_new_tokens=T)
    assert out.token_ids.tolist() == uncached
    assert out.lengths.tolist() == [T] * 3


@pytest.mark.parametrize(("num_chunks", "scan_layers"), [(2, False), (7, True)])
def test_greedy_tokens_do_not_depend_on_how_the_model_is_run(config, params, padded, uncached, num_chunks, scan_layers):
    execution = Execution(compute_dtype=jnp.float32, scan_layers=scan_layers)
    out = inference.generate(config, params, *padded, KEY, execution=execution, max_new_tokens=T, num_chunks=num_chunks)
    assert out.token_ids.tolist() == uncached


def test_cached_logits_are_those_of_the_whole_sequence(config, params, fp32):
    ids = jax.random.randint(jax.random.key(2), (2, 9), 0, config.vocab_size)
    whole = qwen2.logits(config, params, ids)
    cache = inference.empty_cache(config, 2, 12, jnp.float32)
    run = jax.jit(lambda cache, ids, valid: inference.extend(config, params, cache, ids, valid, fp32))
    found = []
    for start, end in ((0, 4), (4, 8), (8, 9)):  # chunks of a prompt and a token
        hidden, cache = run(cache, ids[:, start:end], jnp.ones((2, end - start), bool))
        found.append(qwen2.head_logits(params, hidden))
    np.testing.assert_allclose(jnp.concatenate(found, axis=1), whole, rtol=1e-4, atol=1e-5)
    assert cache.length == 9 and cache.valid.sum() == 18


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.0, 0.9)])
def test_a_stream_has_the_tokens_of_generate(config, params, fp32, padded, sampling):
    stops = (3, 5, 8, 13, 21, 34)
    options = {"execution": fp32, "max_new_tokens": 12, "stop_ids": stops, "sampling": sampling, "num_chunks": 2}
    out = inference.generate(config, params, *padded, KEY, **options)
    columns = list(inference.stream(config, unstack_layers(params, jnp.float32), *padded, KEY, **options))
    expected = np.where(np.arange(12)[None] < out.lengths[:, None], out.token_ids, -1)
    assert len(set(out.lengths.tolist())) > 1 and len(columns) == max(out.lengths)
    np.testing.assert_array_equal(np.stack(columns, axis=1), expected[:, : len(columns)])


def test_the_last_position_of_the_model_can_be_reached_and_not_passed(config, params, fp32):
    prompt = pad_prompts([[1] * 60])
    for generate in (inference.generate, inference.stream):
        assert next(iter(generate(config, params, *prompt, KEY, execution=fp32, max_new_tokens=5))) is not None
        with pytest.raises(InputError, match=r"65 tokens \(new ones included\); the model has 64 positions"):
            next(iter(generate(config, params, *prompt, KEY, execution=fp32, max_new_tokens=6)))
        with pytest.raises(InputError, match="max_new_tokens is 0"):
            next(iter(generate(config, params, *prompt, KEY, execution=fp32, max_new_tokens=0)))


def test_a_stop_token_ends_its_row_alone(config, params, fp32, padded, uncached):
    stop = uncached[0][2]
    expected = [row[: row.index(stop) + 1] if stop in row else row for row in uncached]
    assert len({len(row) for row in expected}) > 1
    out = inference.generate(config, params, *padded, KEY, execution=fp32, max_new_tokens=T, stop_ids=(stop, 1000))
    assert out.lengths.tolist() == [len(row) for row in expected]
    assert out.token_ids.tolist() == [row + [0] * (T - len(row)) for row in expected]


def test_one_new_token_and_adapters(config, params, fp32, padded, uncached):
    adapters = lora.LoraConfig(2, 4.0)
    adapted = lora.attach(adapters, params, lora.init(adapters, config, KEY))
    out = inference.generate(config, adapted, *padded, KEY, execution=fp32, max_new_tokens=1)
    assert out.token_ids.tolist() == [row[:1] for row in uncached]


def test_sampling_follows_the_probabilities():
    logits = jnp.log(jnp.asarray([0.05, 0.5, 0.3, 0.15]))
    rows = jnp.broadcast_to(logits, (4000, 4))

    def shares(sampling):
        return np.bincount(inference.next_token(rows, KEY, sampling), minlength=4) / 4000

    np.testing.assert_allclose(shares(Sampling(1.0)), [0.05, 0.5, 0.3, 0.15], atol=0.03)
    np.testing.assert_allclose(shares(Sampling(1.0, top_p=0.6)), [0, 0.625, 0.375, 0], atol=0.03)
    np.testing.assert_allclose(shares(Sampling(1.0, top_p=0.5)), [0, 1, 0, 0])
    square = np.array([0.05, 0.5, 0.3, 0.15]) ** 2
    np.testing.assert_allclose(shares(Sampling(0.5)), square / square.sum(), atol=0.03)
    np.testing.assert_array_equal(shares(Sampling()), [0, 1, 0, 0])
    with pytest.raises(ValueError, match=r"it needs temperature >= 0 and 0 < top_p <= 1"):
        Sampling(1.0, top_p=0.0)


def test_the_key_settles_the_sample(config, params, fp32, padded):
    def sample(key):
        return inference.generate(
            config, params, *padded, key, execution=fp32, max_new_tokens=T, sampling=Sampling(1.0, 0.9)
        ).token_ids.tolist()

    assert sample(KEY) == sample(KEY) != sample(jax.random.key(6))
