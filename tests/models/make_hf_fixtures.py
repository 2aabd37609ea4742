"""Writes tests/models/hf_fixtures with transformers: `python tests/models/make_hf_fixtures.py`. Tests do not run it.

For each small model: the checkpoint as transformers 5 saves it, and in `expected.safetensors` token ids, labels,
logits, loss and every gradient that PyTorch computes for it in float32 (versions in the metadata). Run once more with
transformers 4 installed, it adds that version's `config.json` as `config_transformers4.json`.
"""

import shutil
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

FIXTURES = Path(__file__).parent / "hf_fixtures"
MAJOR = int(transformers.__version__.split(".")[0])
SHAPE = {"vocab_size": 53, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
LLAMA3_ROPE = {  # frequencies on both sides of the interpolated band and within it
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip


def rope(theta: float, **scaling: object) -> dict[str, object]:
    if MAJOR >= 5:
        return {"rope_parameters": {"rope_type": "default", "rope_theta": theta} | scaling}
    return {"rope_theta": theta, "rope_scaling": scaling or None}


CASES = {
    "qwen2_tied": (Qwen2ForCausalLM, "1GB", Qwen2Config(
        **SHAPE, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True, max_position_embeddings=64,
        rms_norm_eps=1e-6, **rope(1e6))),
    "qwen2_sharded": (Qwen2ForCausalLM, "6KB", Qwen2Config(
        **SHAPE, num_attention_heads=4, num_key_value_heads=4, tie_word_embeddings=False, max_position_embeddings=64,
        rms_norm_eps=1e-5, **rope(1e4))),
    "llama3": (LlamaForCausalLM, "1GB", LlamaConfig(
        **SHAPE, num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=False, max_position_embeddings=256,
        rms_norm_eps=1e-5, **rope(100.0, **LLAMA3_ROPE))),
}  # fmt: skip


def main() -> None:
    for number, (name, (model_class, max_shard_size, config)) in enumerate(CASES.items()):
        directory = FIXTURES / name
        if MAJOR < 5:
            config.architectures, config.torch_dtype = [model_class.__name__], torch.float32
            config.to_json_file(directory / "config_transformers4.json")
            continue
        shutil.rmtree(directory, ignore_errors=True)
        torch.manual_seed(number)
        model = model_class._from_config(config, attn_implementation="eager").train()
        with torch.no_grad():
            for tensor_name, parameter in model.named_parameters():
                parameter.normal_(std=0.2)
                if "norm" in tensor_name:
                    parameter.add_(1.0)
        token_ids = torch.randint(0, config.vocab_size, (2, 24))
        labels = token_ids.clone()
        labels[0, 5:9] = -100
        output = model(input_ids=token_ids, labels=labels)
        output.loss.backward()
        expected = {"token_ids": token_ids, "labels": labels, "logits": output.logits.detach(), "loss": output.loss}
        expected |= {f"gradient/{tensor}": parameter.grad for tensor, parameter in model.named_parameters()}
        model.save_pretrained(directory, max_shard_size=max_shard_size)
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        save_file({k: v.detach() for k, v in expected.items()}, directory / "expected.safetensors", metadata=versions)


if __name__ == "__main__":
    main()
