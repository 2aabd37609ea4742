"""Flags of the prefill benchmark, what they default to, and which of them cannot be."""

import dataclasses
import math
from typing import Literal

from jaxchunk.bench import prefill_peer
from jaxchunk.errors import InputError
from jaxchunk.measuring import harness
from jaxchunk.measuring.harness import BenchConfig
from jaxchunk.measuring.protocol import Protocol
from jaxchunk.models import qwen2
from jaxchunk.models.qwen2 import AttentionImplementation, Qwen2Config


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrefillBenchConfig(BenchConfig):
    """Latency and energy of a prefill, by length and chunks."""

    model: str = "tiny"
    """Architecture, with random weights."""
    hf_model: str | None = None
    """A checkpoint of Hugging Face, directory or id, in place of --model."""
    seq_lens: tuple[int, ...] = (128, 256)
    """Tokens of a prompt."""
    chunks: tuple[int, ...] = (1, 2, 4)
    """Chunk counts; improvements are over 1."""
    batch_size: int = 1
    """Prompts at a time."""
    dtype: Literal["bfloat16", "float32"] = "float32"
    """Of weights, activations and cache."""
    attention: AttentionImplementation | None = None
    """cudnn or xla. Default: cudnn where it runs."""
    warmup: int = 3
    """Prefills before each window."""
    iters: int = 5
    """Prefills in a window."""
    window_s: float | None = None
    """Windows of at least so many seconds in place of --iters: the energy of a short window is known less closely."""
    peers: tuple[str, ...] = ()
    """Whose prefill is measured beside ours, in one piece: transformers (torch's SDPA)."""


def default_config(platform: str) -> PrefillBenchConfig:
    """The paper's lengths and chunk counts on a GPU, a tiny model on a CPU."""
    if platform == "gpu":
        return PrefillBenchConfig(
            model="llama3-8b",
            seq_lens=(2048, 4096, 8192, 16384, 32768),
            chunks=(1, 2, 4, 8, 16),
            dtype="bfloat16",
        )
    return PrefillBenchConfig(settle_s=0.0)


def validate(config: PrefillBenchConfig) -> None:
    """Refuses what cannot run.

    Raises:
      InputError: naming the flag, its value and what is needed.
    """
    harness.check_common(config)
    if config.model not in qwen2.SIZES:
        raise InputError(f"--model is {config.model}; choose from {', '.join(qwen2.SIZES)}")
    for name, least in (("batch_size", 1), ("iters", 1), ("warmup", 0)):
        if getattr(config, name) < least:
            raise InputError(f"--{name} is {getattr(config, name)}; it must be at least {least}")
    if config.window_s is not None and not 0 < config.window_s < math.inf:
        raise InputError(f"--window_s is {config.window_s}; it must be greater than 0, and finite")
    for name in ("seq_lens", "chunks"):
        given = getattr(config, name)
        if not given or min(given) < 1 or len(set(given)) < len(given):
            words = " ".join(map(str, given)) or "empty"
            raise InputError(f"--{name} is {words}; give numbers of at least 1, each once")
    if max(config.chunks) > min(config.seq_lens):
        raise InputError(
            f"--chunks has {max(config.chunks)} and --seq_lens {min(config.seq_lens)}: a chunk has at least one token"
        )
    prefill_peer.check(config.peers)


def check_positions(config: PrefillBenchConfig, model: Qwen2Config) -> None:
    """Refuses prompts that are longer than the model is for.

    Raises:
      InputError: naming the flags and both numbers.
    """
    if max(config.seq_lens) > model.max_position_embeddings:
        raise InputError(
            f"--seq_lens has {max(config.seq_lens)}; {named(config)} has {model.max_position_embeddings} positions"
        )


def named(config: PrefillBenchConfig) -> str:
    """The model by the flag that names it."""
    return f"--model {config.model}" if config.hf_model is None else f"--hf_model {config.hf_model}"


def protocol_of(config: PrefillBenchConfig) -> Protocol:
    """Windows of `iters` prefills, or of `window_s`."""
    if config.window_s is None:
        return harness.protocol_of(config, calls=config.iters, warmup_calls=config.warmup)
    return harness.protocol_of(config, window_s=config.window_s, warmup_calls=config.warmup)
