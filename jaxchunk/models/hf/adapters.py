"""Adapters in the format of PEFT: a directory that its `PeftModel.from_pretrained` puts on a base model."""

import json
from pathlib import Path

import numpy as np

from jaxchunk.models.hf.checkpoint import appears_whole
from jaxchunk.models.hf.shards import write_tensors
from jaxchunk.models.hf.weights import NAMES
from jaxchunk.models.lora import LoraConfig
from jaxchunk.models.qwen2 import Params


def save_adapters(lora: LoraConfig, adapters: Params, directory: str | Path, *, base: str | None) -> None:
    """Writes `adapter_config.json` and `adapter_model.safetensors`; whole or not at all.

    Args:
      lora: rank, alpha and targets.
      adapters: as from `lora.init`.
      directory: where to; it must not exist, or be empty.
      base: the directory or id of the base model, for PEFT; None where there is none that it could load.

    Raises:
      InputError: the directory cannot be written.
    """
    tensors, modules = {}, []
    for target in lora.targets:
        name = NAMES[f"layers/{target}_weight"].removesuffix(".weight")
        modules.append(name.rpartition(".")[2])
        for factor, peft_name in (("a", "lora_A"), ("b", "lora_B")):
            for layer, matrix in enumerate(np.asarray(adapters["layers"][f"{target}_lora_{factor}"])):
                key = f"base_model.model.{name.format(layer)}.{peft_name}.weight"
                tensors[key] = matrix.T  # PyTorch's linear layers store [out, in]
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "target_modules": modules,
        "bias": "none",
        "inference_mode": True,
    }
    with appears_whole(Path(directory)) as temporary:
        write_tensors(temporary / "adapter_model.safetensors", tensors)
        (temporary / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
