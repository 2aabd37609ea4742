"""One optimizer step: micro-batches, chunks and schedules do not change what is learned."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxchunk.data import IGNORE_INDEX
from jaxchunk.models import qwen2
from jaxchunk.training.config import TrainConfig
from jaxchunk.training.flops import peak_flops, training_flops_per_token
from jaxchunk.training.step import init_state, learning_rate, make_eval_step, make_optimizer, make_train_step

CONFIG = TrainConfig(seq_len=16, batch_size=4, steps=20, lmhead_chunks=1)
FP32 = qwen2.Execution(compute_dtype=jnp.float32)
MODEL = qwen2.Qwen2Config(97, 32, 1, 4, 2, 48, tie_word_embeddings=True)


def batch(ignored_rows=0):
    tokens = jax.random.randint(jax.random.key(5), (4, 17), 0, 97)
    labels = tokens[:, 1:].at[:ignored_rows, 2:].set(IGNORE_INDEX)
    return {"tokens": tokens[:, :-1], "labels": labels}


@functools.cache
def program(config, micro_batch_size):
    return jax.jit(make_train_step(config, MODEL, FP32, make_optimizer(config), micro_batch_size))


def steps(config, micro_batch_size, data, count=3):
    state = init_state(make_optimizer(config), qwen2.init(MODEL, jax.random.key(0)))
    step, history = program(config, micro_batch_size), []
    for _ in range(count):
        state, metrics = step(state, data)
        history.append(metrics)
    return state, history


def assert_same(a, b, rtol=2e-4, atol=2e-5):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol), a, b)


@pytest.mark.parametrize("lmhead_chunks", [4, 7])
def test_chunks_give_the_same_loss_curve(lmhead_chunks):
    one = steps(CONFIG, 4, batch(), count=10)
    many = steps(dataclasses.replace(CONFIG, lmhead_chunks=lmhead_chunks), 4, batch(), count=10)
    assert_same([m.loss for m in one[1]], [m.loss for m in many[1]], rtol=1e-5)
    assert one[1][-1].loss < one[1][0].loss - 0.2  # it does learn


@pytest.mark.parametrize("micro_batch_size", [1, 2])
def test_micro_batches_of_unequal_length_give_the_same_step(micro_batch_size):
    """Two of the four sequences are mostly ignored: means of micro-batches would be wrong."""
    whole = steps(CONFIG, 4, batch(ignored_rows=2))
    parts = steps(CONFIG, micro_batch_size, batch(ignored_rows=2))
    assert_same(whole[1], parts[1])
    assert_same(whole[0].params, parts[0].params)


def test_metrics():
    _, (first, second, _) = steps(CONFIG, 4, batch())
    assert first.loss == pytest.approx(np.log(97), rel=0.05)
    schedule = learning_rate(CONFIG)
    assert float(first.lr) == pytest.approx(float(schedule(0)))
    assert float(second.lr) == pytest.approx(float(schedule(1)))
    mean_loss = lambda params: make_eval_step(CONFIG, MODEL, FP32)(params, batch())[0] / batch()["labels"].size  # noqa: E731
    gradients = jax.jit(jax.grad(mean_loss))(qwen2.init(MODEL, jax.random.key(0)))
    assert float(first.grad_norm) == pytest.approx(float(optax.tree.norm(gradients)), rel=1e-4)


def test_schedule_warms_up_and_ends_where_it_should():
    config = dataclasses.replace(CONFIG, steps=100, lr=1e-3, final_lr_ratio=0.1)
    schedule = learning_rate(config)
    assert config.resolved_warmup_steps == 10
    assert float(schedule(0)) == pytest.approx(1e-4)
    assert float(schedule(10)) == pytest.approx(1e-3)
    assert float(schedule(99)) == pytest.approx(1e-4)  # the last of 100 steps
    assert float(schedule(98)) > 1e-4 * (1 + 1e-5)
    assert max(float(schedule(step)) for step in range(100)) <= 1e-3 * (1 + 1e-6)


def test_norms_and_biases_do_not_decay():
    config = dataclasses.replace(CONFIG, weight_decay=10.0, grad_clip=1e-12, lr=1e-2)  # decay and next to nothing else
    state = init_state(make_optimizer(config), qwen2.init(MODEL, jax.random.key(0)))
    optimizer = make_optimizer(config)
    zeros = jax.tree.map(jnp.zeros_like, state.params)
    updates, _ = jax.jit(optimizer.update)(zeros, state.opt_state, state.params)
    for path, update in jax.tree.leaves_with_path(updates):
        decays = not path[-1].key.endswith(("norm", "bias"))
        assert bool(jnp.any(update != 0)) == decays, path


def test_eval_step_sums_losses_and_counts_tokens():
    data = batch(ignored_rows=1)
    params = qwen2.init(MODEL, jax.random.key(0))
    loss, count = make_eval_step(CONFIG, MODEL, FP32)(params, data)
    valid = np.asarray(data["labels"]) != IGNORE_INDEX
    log_probs = jax.nn.log_softmax(qwen2.logits(MODEL, params, data["tokens"]))
    picked = np.take_along_axis(np.asarray(log_probs), np.where(valid, data["labels"], 0)[..., None], -1)[..., 0]
    assert int(count) == valid.sum()
    assert float(loss) == pytest.approx(-picked[valid].sum(), rel=1e-5)


def test_flops_per_token():
    config = qwen2.Qwen2Config(100, 8, 2, 4, 2, 16, tie_word_embeddings=True)
    matmul_weights = 2 * (8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 16) + 100 * 8
    assert training_flops_per_token(config, seq_len=10) == 6 * matmul_weights + 6 * 2 * 10 * 8


class Named:
    def __init__(self, device_kind):
        self.device_kind = device_kind


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA GB10", None),
        ("NVIDIA H200 NVL", None),
        ("cpu", None),
    ],
)
def test_peak_flops_are_known_or_null(kind, expected):
    assert peak_flops([Named(kind)], "bfloat16") == expected
    assert peak_flops([Named(kind)] * 2, "bfloat16") == (None if expected is None else 2 * expected)
    assert peak_flops([Named(kind)], "float32") is None


def test_a_step_that_is_not_finite_changes_no_parameter_and_no_moment():
    state, _ = steps(CONFIG, 4, batch(), count=1)
    token = int(batch()["tokens"][0, 0])
    params = state.params | {"embedding": state.params["embedding"].at[token].set(jnp.inf)}
    broken = state._replace(params=params)
    after, metrics = program(CONFIG, 4)(broken, batch())
    assert not jnp.isfinite(metrics.loss)
    for new, old in zip(jax.tree.leaves(after), jax.tree.leaves(broken), strict=True):
        np.testing.assert_array_equal(new, old if jnp.issubdtype(old.dtype, jnp.floating) else old + 1)
