"""The prefill of transformers with torch's SDPA, at the same shapes and on the same prompts.

As its users run it: `use_cache`, the LM head for the last token only, weights in the same dtype. SDPA takes
FlashAttention on a GPU where it can.
"""

import contextlib
import dataclasses
import importlib.metadata
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxchunk.bench.peers import Pending, event_behind
from jaxchunk.errors import InputError
from jaxchunk.models import hf
from jaxchunk.models.qwen2 import Qwen2Config

TRANSFORMERS = "transformers"
_NEEDED = ("torch", "transformers")


def check(names: Sequence[str]) -> None:
    """Refuses peers that are not known or not installed.

    Raises:
      InputError: naming the flag, its value and what is needed.
    """
    if unknown := [name for name in names if name != TRANSFORMERS]:
        raise InputError(f"--peers has {unknown[0]}; the only one is {TRANSFORMERS}")
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None] if names else []
    if missing:
        raise InputError(f"--peers: {TRANSFORMERS} needs {' and '.join(missing)}; install what is missing")


@dataclasses.dataclass(frozen=True)
class Peer:
    """A model of transformers on the device.

    Attributes:
      name: for tables, with versions.
      model: the torch module.
      device: where it is.
    """

    name: str
    model: Any
    device: Any

    def prefill_of(self, token_ids: jax.Array) -> Callable[[], Pending]:
        """A call that runs these prompts [B, S] through the model and returns the logits after their last tokens."""
        import torch

        prompts = torch.tensor(np.asarray(token_ids), dtype=torch.long, device=self.device)

        def call() -> Pending:
            with torch.inference_mode():
                output = self.model(input_ids=prompts, use_cache=True, logits_to_keep=1)
            return Pending(output.logits, event_behind(is_cuda=self.device.type == "cuda"))

        return call


def load(config: Qwen2Config, checkpoint: Path | None, dtype: str, seed: int) -> Peer:
    """The same architecture with random weights, or a checkpoint."""
    import torch
    import transformers

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(seed)
    options = {"attn_implementation": "sdpa"}
    with device, _default_dtype(getattr(torch, dtype)):
        if checkpoint is None:
            values = hf.to_hf_config(config, dtype)
            about = transformers.AutoConfig.for_model(**values)
            model = transformers.AutoModelForCausalLM.from_config(about, **options)
        else:
            model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, **options)
    versions = [f"{name} {importlib.metadata.version(name)}" for name in reversed(_NEEDED)]
    return Peer(f"{versions[0]}, {versions[1]} SDPA", model.to(device, getattr(torch, dtype)).eval(), device)


@contextlib.contextmanager
def _default_dtype(dtype: Any) -> Iterator[None]:
    """Weights are made in this dtype: in float32 first they would take twice the memory."""
    import torch

    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
