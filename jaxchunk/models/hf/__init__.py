"""Checkpoints of Hugging Face: `config, params = hf.load(directory_or_id)`, `hf.save(config, params, directory)`.

Qwen2, Qwen2.5 and Llama 3 of all sizes; safetensors only. What is not known is refused: other models, config keys that
could change the arithmetic, missing or unexpected tensors.
"""

from jaxchunk.models.hf.adapters import save_adapters
from jaxchunk.models.hf.checkpoint import MAX_SHARD_SIZE, load, save
from jaxchunk.models.hf.config import load_config, parse_config, to_hf_config
from jaxchunk.models.hf.hub import locate
from jaxchunk.models.hf.tokenizer import tokenizer_path

__all__ = [
    "MAX_SHARD_SIZE",
    "load",
    "load_config",
    "locate",
    "parse_config",
    "save",
    "save_adapters",
    "to_hf_config",
    "tokenizer_path",
]
