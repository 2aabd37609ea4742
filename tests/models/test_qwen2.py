"""The model against a plain NumPy transcription of the architecture, and against itself run in other ways."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxchunk import lm_head_loss
from jaxchunk.models import qwen2
from jaxchunk.models.attention import choose_attention
from jaxchunk.models.qwen2 import Execution, Qwen2Config

CONFIG = Qwen2Config(97, 32, 2, 4, 2, 48, tie_word_embeddings=False)
FP32 = Execution(compute_dtype=jnp.float32)


def random_params(config, seed=0, dtype=jnp.float32):
    """Parameters whose biases and norms are not the identity."""
    keys = iter(jax.random.split(jax.random.key(seed), 64))
    return jax.tree.map(
        lambda leaf: (leaf + 0.2 * jax.random.normal(next(keys), leaf.shape)).astype(dtype),
        qwen2.init(config, jax.random.key(seed)),
    )


@pytest.fixture(scope="module")
def params():
    return random_params(CONFIG)


@pytest.fixture(scope="module")
def tokens():
    return jax.random.randint(jax.random.key(1), (2, 11), 0, CONFIG.vocab_size)


def numpy_logits(config, params, token_ids):
    """Token by token and head by head, in float64; nothing is shared with the implementation."""
    params = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    D, N, K = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
    H = D // N

    def norm(x, weight):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + config.rms_norm_eps) * weight

    def rotate(vector, position):
        rotated = np.empty(H)
        for i in range(H // 2):
            angle = position * config.rope_theta ** (-2 * i / H)
            a, b = vector[i], vector[i + H // 2]
            rotated[i] = a * np.cos(angle) - b * np.sin(angle)
            rotated[i + H // 2] = b * np.cos(angle) + a * np.sin(angle)
        return rotated

    x = params["embedding"][np.asarray(token_ids)]
    for index in range(config.num_hidden_layers):
        layer = {name: leaf[index] for name, leaf in params["layers"].items()}
        normed = norm(x, layer["attention_norm"])
        q, k, v = (normed @ layer[f"{name}_weight"] + layer[f"{name}_bias"] for name in "qkv")
        mixed = np.zeros_like(q)
        for head in range(N):
            own, shared = slice(head * H, (head + 1) * H), slice(head // (N // K) * H, (head // (N // K) + 1) * H)
            for t in range(len(x)):
                query = rotate(q[t, own], t)
                scores = np.array([query @ rotate(k[s, shared], s) for s in range(t + 1)]) / np.sqrt(H)
                share = np.exp(scores - scores.max())
                mixed[t, own] = share / share.sum() @ v[: t + 1, shared]
        x = x + mixed @ layer["o_weight"]
        normed = norm(x, layer["mlp_norm"])
        gate = normed @ layer["gate_weight"]
        x = x + (gate / (1 + np.exp(-gate)) * (normed @ layer["up_weight"])) @ layer["down_weight"]
    head = params["embedding"] if config.tie_word_embeddings else params["lm_head"]
    return norm(x, params["final_norm"]) @ head.T


@pytest.mark.parametrize("tied", [False, True])
def test_logits_are_those_of_the_architecture(tied, tokens):
    config = dataclasses.replace(CONFIG, tie_word_embeddings=tied)
    params = random_params(config)
    ours = jax.jit(qwen2.logits, static_argnums=0)(config, params, tokens)
    assert ours.shape == (2, 11, 97)
    assert ours.dtype == jnp.float32
    for row, expected in zip(ours, [numpy_logits(config, params, row) for row in tokens], strict=True):
        np.testing.assert_allclose(row, expected, rtol=2e-4, atol=2e-5)


def test_later_tokens_do_not_reach_back(params, tokens):
    before = qwen2.hidden_states(CONFIG, params, tokens, FP32)
    after = qwen2.hidden_states(CONFIG, params, tokens.at[:, 7].set(0), FP32)
    np.testing.assert_array_equal(before[:, :7], after[:, :7])
    assert np.all(np.any(np.asarray(before[:, 7:] != after[:, 7:]), axis=-1))


def gradients_of(params, tokens, execution):
    def loss(params):
        hidden = qwen2.hidden_states(CONFIG, params, tokens, execution)
        return lm_head_loss(hidden, qwen2.lm_head_weight(params), tokens, num_chunks=2)

    return jax.jit(jax.grad(loss))(params)


@pytest.fixture(scope="module")
def plain_gradients(params, tokens):
    return gradients_of(params, tokens, FP32)


@pytest.mark.parametrize(
    ("remat", "scan_layers"), [("dots", False), ("full", False), ("none", True), ("dots", True), ("full", True)]
)
def test_remat_and_scan_change_nothing_but_cost(remat, scan_layers, params, tokens, plain_gradients):
    other = gradients_of(params, tokens, dataclasses.replace(FP32, remat=remat, scan_layers=scan_layers))
    for a, b in zip(jax.tree.leaves(plain_gradients), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("num_chunks", "remat"), [(3, "none"), (8, "full")])
def test_an_mlp_in_chunks_changes_nothing_but_cost(num_chunks, remat, params, tokens, plain_gradients):
    other = gradients_of(params, tokens, dataclasses.replace(FP32, mlp_chunks=num_chunks, remat=remat))
    for a, b in zip(jax.tree.leaves(plain_gradients), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_layers_are_unrolled_unless_scanned(params, tokens):
    def loops(execution):
        run = jax.jit(lambda params: qwen2.hidden_states(CONFIG, params, tokens, execution))
        return run.lower(params).compile().as_text().count(" while(")

    assert loops(FP32) == 0
    assert loops(dataclasses.replace(FP32, scan_layers=True)) == 1


def test_bf16_follows_fp32(params, tokens):
    exact = qwen2.hidden_states(CONFIG, params, tokens, FP32)
    rounded = qwen2.hidden_states(CONFIG, params, tokens, Execution(compute_dtype=jnp.bfloat16))
    assert rounded.dtype == jnp.bfloat16
    error = np.linalg.norm(rounded.astype(jnp.float32) - exact) / np.linalg.norm(exact)
    assert 1e-4 < error < 3e-2  # below: the compute dtype was not used; above: something is wrong


def test_gradients_have_the_dtype_of_the_master_parameters(params, tokens):
    def loss(params):
        return qwen2.hidden_states(CONFIG, params, tokens, Execution(compute_dtype=jnp.bfloat16)).sum()

    assert {leaf.dtype for leaf in jax.tree.leaves(jax.grad(loss)(params))} == {jnp.dtype("float32")}


def test_sizes_have_their_published_number_of_parameters():
    counts = {name: round(qwen2.num_params(config) / 1e6) for name, config in qwen2.SIZES.items()}
    assert counts == {"tiny": 1, "qwen2-0.5b": 494, "qwen2-1.5b": 1544, "qwen2-7b": 7616, "llama3-8b": 8030}


def test_init_is_deterministic_and_of_the_right_scale():
    params = qwen2.init(CONFIG, jax.random.key(0))
    again = qwen2.init(CONFIG, jax.random.key(0))
    other = qwen2.init(CONFIG, jax.random.key(1))
    same = jax.tree.map(np.array_equal, params, again)
    assert all(jax.tree.leaves(same))
    assert not np.array_equal(params["embedding"], other["embedding"])
    assert np.std(params["layers"]["up_weight"]) == pytest.approx(0.02, rel=0.1)
    assert np.all(np.asarray(params["layers"]["q_bias"]) == 0)
    assert np.all(np.asarray(params["final_norm"]) == 1)


def test_a_config_whose_heads_do_not_fit_is_refused():
    with pytest.raises(ValueError, match="hidden_size 32 is no multiple of 5 heads"):
        dataclasses.replace(CONFIG, num_attention_heads=5)
    with pytest.raises(ValueError, match="4 heads are no multiple of 3 key/value heads"):
        dataclasses.replace(CONFIG, num_key_value_heads=3)
    with pytest.raises(ValueError, match="remat is 'some'; it must be one of none, gated, dots, full"):
        Execution(remat="some")


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="tests a machine without a GPU")
def test_attention_choice_on_a_cpu_says_why():
    assert choose_attention(CONFIG, 128, jnp.bfloat16) == ("xla", "cuDNN attention cannot run: JAX runs on cpu")
    assert choose_attention(CONFIG, 128, jnp.bfloat16, "xla") == ("xla", "named by the caller")
    with pytest.raises(ValueError, match="cuDNN attention cannot run: JAX runs on cpu; use xla"):
        choose_attention(CONFIG, 128, jnp.bfloat16, "cudnn")


@pytest.mark.gpu
def test_cudnn_attention_agrees_with_xla():
    config = dataclasses.replace(qwen2.SIZES["qwen2-0.5b"], vocab_size=1000, num_hidden_layers=1)
    params = random_params(config)
    tokens = jax.random.randint(jax.random.key(1), (2, 256), 0, 1000)
    assert choose_attention(config, 256, jnp.bfloat16)[0] == "cudnn"

    def hidden(execution):
        return jax.jit(lambda params: qwen2.hidden_states(config, params, tokens, execution))(params)

    exact = hidden(FP32)
    xla, cudnn = (np.linalg.norm(hidden(Execution(jnp.bfloat16, attention)) - exact) for attention in ("xla", "cudnn"))
    assert 0 < cudnn < 1.5 * xla


def packed(lengths, seq_len):
    """Sequences one after the other, padded with segment 0."""
    segments = np.repeat(np.arange(1, len(lengths) + 1), lengths)
    return jnp.asarray(np.pad(segments, (0, seq_len - len(segments))))[None]


def test_positions_begin_anew_in_every_segment():
    segments = jnp.asarray([[1, 1, 1, 2, 2, 0, 0], [5, 5, 5, 5, 5, 5, 5]])
    expected = [[0, 1, 2, 0, 1, 0, 1], [0, 1, 2, 3, 4, 5, 6]]
    np.testing.assert_array_equal(qwen2.segment_positions(segments), expected)


def test_packed_sequences_do_not_see_each_other(params, tokens):
    """Losses and gradients are those of the sequences by themselves."""
    lengths = (4, 1, 6)
    row = jnp.concatenate([tokens[0, :4], tokens[1, :1], tokens[0, 4:10]])
    apart = [row[:4], row[4:5], row[5:]]
    labels = jnp.roll(row, 3)
    execution = dataclasses.replace(FP32, remat="dots")

    def loss(params, token_ids, labels, segment_ids=None):
        hidden = qwen2.hidden_states(CONFIG, params, token_ids[None], execution, segment_ids)
        losses = lm_head_loss(hidden, qwen2.lm_head_weight(params), labels[None], reduction="none")
        return losses.sum(), losses[0]

    gradients_of = jax.jit(jax.grad(loss, has_aux=True))
    together, losses = gradients_of(params, row, labels, packed(lengths, 11))
    ends = np.cumsum(lengths)
    parts = [gradients_of(params, ids, labels[end - len(ids) : end]) for ids, end in zip(apart, ends, strict=True)]
    np.testing.assert_allclose(losses, np.concatenate([part[1] for part in parts]), rtol=1e-5)
    summed = jax.tree.map(lambda *leaves: sum(leaves), *(part[0] for part in parts))
    for a, b in zip(jax.tree.leaves(together), jax.tree.leaves(summed), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    unpacked, _ = gradients_of(params, row, labels)
    assert not np.allclose(unpacked["embedding"], together["embedding"], rtol=1e-2)


def test_one_segment_is_no_segments(params, tokens):
    plain = qwen2.logits(CONFIG, params, tokens)
    np.testing.assert_allclose(
        qwen2.logits(CONFIG, params, tokens, segment_ids=jnp.ones_like(tokens)), plain, rtol=1e-5
    )


@pytest.mark.gpu
def test_cudnn_attention_keeps_packed_sequences_apart():
    config = dataclasses.replace(qwen2.SIZES["qwen2-0.5b"], vocab_size=1000, num_hidden_layers=1)
    params = random_params(config)
    tokens = jax.random.randint(jax.random.key(1), (2, 256), 0, 1000)
    segments = jnp.concatenate([packed((100, 3, 120), 256), packed((256,), 256)])
    assert choose_attention(config, 256, jnp.bfloat16, packed=True)[0] == "cudnn"

    def gradient(execution):
        def loss(params):
            hidden = qwen2.hidden_states(config, params, tokens, execution, segments)
            return lm_head_loss(hidden, qwen2.lm_head_weight(params), jnp.where(segments > 0, tokens, -100))

        return jax.jit(jax.grad(loss))(params)["layers"]["q_weight"]

    exact = gradient(FP32)
    xla, cudnn = (np.linalg.norm(gradient(Execution(jnp.bfloat16, name)) - exact) for name in ("xla", "cudnn"))
    assert 0 < cudnn < 2 * xla
