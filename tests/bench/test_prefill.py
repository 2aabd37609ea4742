"""The prefill benchmark: what it refuses, what it compiles, what it says of measurements."""

import dataclasses
import importlib.util
import json

import jax
import jax.numpy as jnp
import pytest

from jaxchunk import plotting
from jaxchunk.bench import prefill, prefill_peer
from jaxchunk.bench.prefill_config import PrefillBenchConfig, check_positions, default_config, protocol_of, validate
from jaxchunk.bench.prefill_summary import sentences, summarize, table
from jaxchunk.errors import InputError
from jaxchunk.inference import unstack_layers
from jaxchunk.measuring.protocol import Measurement
from jaxchunk.models import qwen2

CONFIG = PrefillBenchConfig(seq_lens=(8, 12), chunks=(1, 2), settle_s=0.0)
SMALL = qwen2.Qwen2Config(61, 32, 2, 4, 2, 48, tie_word_embeddings=False, max_position_embeddings=64)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model": "gpt"}, "--model is gpt; choose from tiny, "),
        ({"seq_lens": ()}, "--seq_lens is empty"),
        ({"chunks": (0, 1)}, "--chunks is 0 1; give numbers of at least 1, each once"),
        ({"seq_lens": (8, 8)}, "--seq_lens is 8 8"),
        ({"chunks": (1, 9)}, "--chunks has 9 and --seq_lens 8: a chunk has at least one token"),
        ({"iters": 0}, "--iters is 0; it must be at least 1"),
        ({"warmup": -1}, "--warmup is -1"),
        ({"window_s": 0.0}, "--window_s is 0.0"),
        ({"repeats": 0}, "--repeats is 0"),
        ({"peers": ("vllm",)}, "--peers has vllm; the only one is transformers"),
    ],
)
def test_flags_out_of_their_domain(change, words):
    with pytest.raises(InputError, match=words):
        validate(dataclasses.replace(CONFIG, **change))


def test_a_peer_that_is_not_installed(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="--peers: transformers needs torch and transformers"):
        prefill_peer.check(["transformers"])


def test_prompts_beyond_the_models_positions():
    with pytest.raises(InputError, match="--seq_lens has 65; --model tiny has 64 positions"):
        check_positions(dataclasses.replace(CONFIG, seq_lens=(65,)), SMALL)


def test_the_papers_protocol_is_the_default():
    protocol = protocol_of(default_config("gpu"))
    assert (protocol.warmup_calls, protocol.calls, protocol.repeats) == (3, 5, 5)
    assert protocol_of(dataclasses.replace(CONFIG, window_s=2.0)).calls is None
    gpu = default_config("gpu")
    assert (gpu.model, gpu.seq_lens[-1], gpu.chunks) == ("llama3-8b", 32768, (1, 2, 4, 8, 16))
    check_positions(gpu, qwen2.SIZES[gpu.model])
    assert qwen2.num_params(qwen2.SIZES["llama3-8b"]) == 8_030_261_248  # as of Meta's


def test_the_variants_are_lengths_by_chunks_and_compute_the_same():
    variants = list(prefill.compile_variants(CONFIG, SMALL, None, qwen2.Execution(jnp.float32)))
    factors = [(variant.factors["seq_len"], variant.factors["chunks"]) for variant in variants]
    assert factors == [(8, 1), (8, 2), (12, 1), (12, 2)]
    logits = [variant.call() for variant in variants]
    assert jnp.allclose(logits[0], logits[1], atol=1e-5) and not jnp.allclose(logits[0], logits[2], atol=1e-3)


def test_what_is_compiled_ahead_is_not_compiled_again():
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: compiled.append(event) if "backend_compile" in event else None
    )
    execution, params = qwen2.Execution(jnp.float32), prefill._params(CONFIG, SMALL, None)
    tokens = {length: jnp.zeros((1, length), jnp.int32) for length in (10, 14)}

    def count(call):
        compiled.clear()
        jax.block_until_ready(call())
        return len(compiled)

    everything = count(prefill._Call(SMALL, params, tokens[10], execution, 2))
    assert prefill._compile(SMALL, params, (1, 14), execution, 2, 0) is None
    assert count(prefill._Call(SMALL, params, tokens[14], execution, 2)) <= everything - 2
    assert count(prefill._Call(SMALL, params, tokens[14], execution, 2)) == 0


def test_what_does_not_fit_is_left_out_with_a_word(monkeypatch, caplog):
    monkeypatch.setattr(prefill.device_memory, "limit_bytes", lambda device: 1000)
    assert list(prefill.compile_variants(CONFIG, SMALL, None, qwen2.Execution(jnp.float32))) == []
    assert "8 tokens, 1 chunk is left out: it needs 0.00 of 0.0 GB" in caplog.text


def test_random_parameters_are_those_of_the_model():
    params = prefill._params(CONFIG, SMALL, None)
    like = unstack_layers(qwen2.init(SMALL, jax.random.key(0)), jnp.float32)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, like)
    first, second = (layer["q_weight"] for layer in params["layers"])
    assert not jnp.array_equal(first, second) and abs(float(first.std()) - 0.02) < 0.002


def measurement(seq_len, chunks, repeat, time_s, energy_j=None, peer=None):
    known = energy_j is not None
    return Measurement(
        variant=f"{seq_len} tokens, {peer or chunks}",
        repeat=repeat,
        calls=5,
        time_s=time_s,
        energy_j=energy_j,
        energy_bound_j=0.1 if known else None,
        energy_source=None,
        energy_null_reason=None if known else "no GPU",
        power_w=500.0 if known else None,
        power_w_std=40.0 / chunks if known else None,
        sm_clock_mhz=1700.0 if known else None,
        sm_clock_mhz_std=10.0 if known else None,
        temperature_c=50.0 if known else None,
        throttle=None,
        factors={"batch_size": 2, "seq_len": seq_len, "chunks": chunks, "peer": peer},
    )


def measured(seconds):
    """`seconds` are by (length, chunks); a peer takes twice as long as one chunk."""
    found = []
    for repeat in range(5):
        for (seq_len, chunks), time_s in seconds.items():
            found.append(measurement(seq_len, chunks, repeat, time_s * (1 + 1e-4 * repeat), 100 * time_s))
            if chunks == 1:
                found.append(measurement(seq_len, 1, repeat, 2 * time_s, 1.0, peer="theirs 1.0"))
    return found


def test_rows_are_compared_with_one_chunk_of_their_length():
    measurements = measured({(1024, 4): 0.98, (1024, 1): 1.0, (512, 1): 0.5, (512, 4): 0.6})
    rows = summarize(measurements)
    order = [(512, 1, None), (512, 4, None), (512, 1, "theirs 1.0")]
    assert [(row["seq_len"], row["chunks"], row["peer"]) for row in rows[:3]] == order
    ratios = [round(row["time_ratio"]["median"], 3) for row in rows]
    assert ratios == [1.0, 1.2, 2.0, 1.0, 0.98, 2.0]
    assert rows[4]["tokens_per_s"]["median"] == pytest.approx(2 * 1024 / 0.98, rel=1e-3)
    assert rows[4]["power_ripple_ratio"]["median"] == 0.25
    said = sentences(measurements, rows)
    assert said[0].startswith("512 tokens: no count is faster than one chunk; the best, 4, is slower (+20.00% to ")
    assert said[1].startswith("1024 tokens: the best count, 4, is faster than one chunk (-2.00% to ")
    assert "not measured here" in said[-1] and "| 1024 | theirs 1.0 | 2000" in table(rows)


def test_one_chunk_alone_allows_no_conclusion():
    measurements = [measurement(8, 1, 0, 1.0)]
    said = sentences(measurements, summarize(measurements))
    assert said[:2] == [
        "8 tokens: no conclusion: it takes one chunk, another count, and two repeats", "energy null: no GPU",
    ]  # fmt: skip


def test_the_figure_has_what_is_known(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(dataclasses.asdict(CONFIG)))
    (tmp_path / "summary.json").write_text(json.dumps(summarize(measured({(8, 1): 1.0}))))
    assert plotting.plot_prefill(tmp_path) is None
    rows = summarize(measured({(8, 1): 1.0, (8, 2): 0.98, (1024, 1): 2.0, (1024, 4): 2.1}))
    (tmp_path / "summary.json").write_text(json.dumps(rows))
    assert plotting.plot_prefill(tmp_path).read_bytes().startswith(b"\x89PNG")


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="transformers is not installed")
@pytest.mark.filterwarnings("default")
def test_transformers_itself():
    config = dataclasses.replace(CONFIG, peers=("transformers",))
    *_, theirs = prefill.compile_variants(config, SMALL, None, qwen2.Execution(jnp.float32))
    assert "SDPA" in theirs.name and theirs.factors["seq_len"] == 12
    logits = jax.block_until_ready(theirs.call())
    assert tuple(logits.tensor.shape) == (1, 1, 61) and str(logits.tensor.dtype) == "torch.float32"
