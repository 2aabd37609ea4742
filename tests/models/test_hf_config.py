"""`config.json`: published ones are read as what they are, and nothing that is unknown passes."""

import dataclasses

import numpy as np
import pytest

from jaxchunk.errors import InputError
from jaxchunk.models import hf, qwen2, rope
from jaxchunk.models.rope import Llama3Rope

# As published (transformers 4).
QWEN2_05B = {
    "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151643,
    "hidden_act": "silu", "hidden_size": 896, "initializer_range": 0.02, "intermediate_size": 4864,
    "max_position_embeddings": 131072, "max_window_layers": 24, "model_type": "qwen2", "num_attention_heads": 14,
    "num_hidden_layers": 24, "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
    "sliding_window": 131072, "tie_word_embeddings": True, "torch_dtype": "bfloat16", "transformers_version": "4.40.1",
    "use_cache": True, "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip
QWEN25_7B = QWEN2_05B | {
    "hidden_size": 3584, "intermediate_size": 18944, "max_window_layers": 28, "num_attention_heads": 28,
    "num_hidden_layers": 28, "num_key_value_heads": 4, "use_mrope": False, "vocab_size": 152064,
    "tie_word_embeddings": False,
}  # fmt: skip
LLAMA32_1B = {
    "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 128000,
    "eos_token_id": 128001, "head_dim": 64, "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02,
    "intermediate_size": 8192, "max_position_embeddings": 131072, "mlp_bias": False, "model_type": "llama",
    "num_attention_heads": 32, "num_hidden_layers": 16, "num_key_value_heads": 8, "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
    "transformers_version": "4.45.0.dev0", "use_cache": True, "vocab_size": 128256,
}  # fmt: skip


def parse(values):
    return hf.parse_config(values, "config.json")


def test_published_configs():
    small = parse(QWEN2_05B)
    assert small == dataclasses.replace(qwen2.SIZES["qwen2-0.5b"], max_position_embeddings=131072)
    assert dataclasses.replace(parse(QWEN25_7B), max_position_embeddings=32768) == qwen2.SIZES["qwen2-7b"]
    llama = parse(LLAMA32_1B)
    assert not llama.attention_bias
    assert llama.rope_scaling == Llama3Rope(32.0, 1.0, 4.0, 8192)
    assert round(qwen2.num_params(llama) / 1e6) == 1236


@pytest.mark.parametrize("values", [QWEN2_05B, QWEN25_7B, LLAMA32_1B])
def test_a_written_config_is_read_as_the_same(values):
    config = parse(values)
    assert parse(hf.to_hf_config(config, "bfloat16")) == config


def test_transformers_5_says_the_same_in_other_places():
    rope = LLAMA32_1B["rope_scaling"] | {"rope_theta": 500000.0}
    new = {key: value for key, value in LLAMA32_1B.items() if key not in ("rope_scaling", "rope_theta", "torch_dtype")}
    assert parse(new | {"rope_parameters": rope, "dtype": "bfloat16"}) == parse(LLAMA32_1B)
    assert parse(LLAMA32_1B | {"rope_parameters": rope}) == parse(LLAMA32_1B)
    layers = ["full_attention"] * 24
    new = QWEN2_05B | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "layer_types": layers}
    new |= {"sliding_window": None, "rope_theta": None, "pad_token_id": None}
    assert parse(new) == parse(QWEN2_05B)


def test_what_is_missing_has_the_default_of_transformers():
    left_out = ("rope_theta", "tie_word_embeddings", "max_position_embeddings", "architectures")
    values = {key: value for key, value in QWEN2_05B.items() if key not in left_out}
    config = parse(values)
    assert (config.rope_theta, config.tie_word_embeddings, config.max_position_embeddings) == (10000.0, False, 32768)


def test_llama3_stretches_low_frequencies_only():
    config = parse(LLAMA32_1B)
    plain = rope.frequencies(dataclasses.replace(config, rope_scaling=None))
    ratio = plain / rope.frequencies(config)
    assert np.all(np.diff(ratio) >= -1e-12)
    assert (ratio[0], ratio[-1]) == (pytest.approx(1), pytest.approx(32))
    wavelength = 2 * np.pi / plain
    assert np.allclose(ratio[wavelength < 8192 / 4], 1) and np.allclose(ratio[wavelength > 8192], 32)
    between = (wavelength > 8192 / 4) & (wavelength < 8192)
    assert np.any(between) and np.all((ratio[between] > 1) & (ratio[between] < 32))


@pytest.mark.parametrize(
    ("base", "change", "words"),
    [
        (QWEN2_05B, {"model_type": "qwen2_moe"}, "model_type is 'qwen2_moe'; it must be qwen2 or llama"),
        (QWEN2_05B, {"model_type": None}, "config.json has no model_type, which is needed"),
        (QWEN2_05B, {"architectures": ["Qwen2Model"]}, r"architectures is \['Qwen2Model'\]; it must be"),
        (QWEN2_05B, {"use_sliding_window": True}, "use_sliding_window is True; only False is implemented"),
        (QWEN2_05B, {"layer_types": ["sliding_attention"] * 24}, "layer_types is"),
        (QWEN2_05B, {"hidden_act": "gelu"}, "hidden_act is 'gelu'; only 'silu' is implemented"),
        (QWEN2_05B, {"attention_dropout": 0.1}, "attention_dropout is 0.1; only 0.0 is implemented"),
        (QWEN2_05B, {"use_mrope": True}, "use_mrope is True"),
        (QWEN2_05B, {"attention_bias": False}, "attention_bias is False; only True is implemented"),
        (QWEN2_05B, {"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_scaling is of type 'yarn'; only default"),
        (QWEN2_05B, {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "rope_parameters is of type 'linear'"),
        (
            QWEN2_05B,
            {"rope_parameters": {"rope_theta": 1e4}},
            "rope_theta, rope_scaling and rope_parameters contradict",
        ),
        (QWEN2_05B, {"rope_parameters": {"full_attention": {}}}, "rope_parameters: full_attention not known here"),
        (QWEN2_05B, {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5; only 1.0 is implemented"),
        (QWEN2_05B, {"quantization_config": {"bits": 4}}, "quantization_config not known here; it may change"),
        (QWEN2_05B, {"dual_chunk_attention_config": {}, "b": 1}, "b, dual_chunk_attention_config not known here"),
        (QWEN2_05B, {"hidden_size": None}, "has no hidden_size, which is needed"),
        (QWEN2_05B, {"hidden_size": "896"}, "hidden_size is '896'; it must be of type int"),
        (QWEN2_05B, {"hidden_size": True}, "hidden_size is True; it must be of type int"),
        (QWEN2_05B, {"num_hidden_layers": 0}, "num_hidden_layers is 0; it must be greater than 0"),
        (QWEN2_05B, {"rms_norm_eps": float("nan")}, "rms_norm_eps is nan; it must be greater than 0"),
        (QWEN2_05B, {"tie_word_embeddings": 1}, "tie_word_embeddings is 1; it must be of type bool"),
        (QWEN2_05B, {"num_attention_heads": 15}, "hidden_size 896 is no multiple of 15 heads"),
        (QWEN2_05B, {"head_dim": 128}, "head_dim is 128; only 64 is implemented"),
        (LLAMA32_1B, {"attention_bias": True}, "attention_bias is True; only False is implemented"),
        (LLAMA32_1B, {"mlp_bias": True}, "mlp_bias is True; only False is implemented"),
        (LLAMA32_1B, {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling has no original_max"),
        (
            LLAMA32_1B,
            {"rope_scaling": LLAMA32_1B["rope_scaling"] | {"low_freq_factor": 5.0}},
            "it needs factor >= 1 and 0 < low_freq_factor < high_freq_factor",
        ),
        (LLAMA32_1B, {"rope_scaling": LLAMA32_1B["rope_scaling"] | {"beta": 5.0}}, "rope_scaling: beta not known here"),
    ],
)
def test_what_is_not_known_is_refused(base, change, words):
    with pytest.raises(InputError, match=words) as caught:
        parse(base | change)
    assert "\n" not in str(caught.value)
