"""Log-probabilities of texts against a log-softmax of all logits."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from jaxchunk.inference import score, scoring
from jaxchunk.models import qwen2


def test_every_token_has_its_log_probability(config, params, fp32, prompts, whole_logits, padded_anywhere):
    token_ids, valid = padded_anywhere
    found = np.asarray(score(config, params, token_ids, valid, execution=fp32, num_chunks=3))
    assert found.shape == token_ids.shape and not found[~np.asarray(valid)].any()
    for row, columns, prompt, logits in zip(found, np.asarray(valid), prompts, whole_logits, strict=True):
        log_probs = jax.nn.log_softmax(logits)[:-1][jnp.arange(len(prompt) - 1), jnp.asarray(prompt[1:])]
        np.testing.assert_allclose(row[columns], [0, *log_probs], rtol=1e-4, atol=1e-5)


def test_a_text_of_one_token_has_nothing_to_score(config, params, fp32):
    assert score(config, params, jnp.asarray([[5]]), execution=fp32).tolist() == [[0.0]]


def test_a_long_prompt_takes_less_than_a_gigabyte():
    """Where float32 logits would take 20 GB; the head alone, as it is compiled."""
    program = scoring._log_probs.lower(*LONG_PROMPT, "xla").compile()
    assert program.memory_analysis().temp_size_in_bytes < 1e9
    assert largest(re.findall(r"[a-z]+\d+\[([\d,]+)\]", program.as_text()), ",") <= scoring.HEAD_TOKENS * 151936


@pytest.mark.parametrize("device_kind", ["NVIDIA H200", "NVIDIA GB10"])
def test_the_fused_head_makes_no_logits_of_a_long_prompt(device_kind):
    device = AbstractDevice(device_kind=device_kind, num_cores=132, platform="gpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=device)):
        traced = scoring._log_probs.trace(*LONG_PROMPT, "fused")
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert f"tensor<{scoring.HEAD_TOKENS_WITHOUT_LOGITS}x64xbf16>" in text
    assert largest(re.findall(r"tensor<([\dx]+)x[a-z]+\d+>", text), "x") == 151936 * 64  # the weight


LONG_PROMPT = (  # 32k tokens at Qwen2's vocabulary
    qwen2.Qwen2Config(151936, 64, 1, 1, 1, 64, tie_word_embeddings=True),
    {
        "final_norm": jax.ShapeDtypeStruct((64,), jnp.float32),
        "lm_head": jax.ShapeDtypeStruct((151936, 64), jnp.bfloat16),
    },
    jax.ShapeDtypeStruct((1, 32768, 64), jnp.bfloat16),
    jax.ShapeDtypeStruct((1, 32768), jnp.int32),
)


def largest(shapes, separator):
    return max(np.prod([int(n) for n in shape.split(separator)], dtype=np.int64) for shape in shapes)
