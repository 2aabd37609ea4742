"""Goes on from a prompt: `python scripts/generate.py "Once upon a time" --run_dir RUN_DIR`, or with --hf_model.

Text is written as it comes; what is said besides goes to stderr.
"""

import dataclasses
import logging
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
import tyro

from jaxchunk import device_memory
from jaxchunk.data import load_fitting_tokenizer
from jaxchunk.errors import InputError, reported_errors
from jaxchunk.inference import Sampling, pad_prompts, stream, text, unstack_layers
from jaxchunk.measuring.harness import check_seed
from jaxchunk.models import hf
from jaxchunk.models.attention import choose_attention
from jaxchunk.models.qwen2 import Execution, Params, Qwen2Config
from jaxchunk.training.checkpoint import load_params
from jaxchunk.training.export import tokenizer_of


@dataclasses.dataclass(frozen=True)
class GenerateConfig:
    """A model, a prompt, and how to go on from it."""

    prompt: Annotated[str | None, tyro.conf.Positional] = None
    """The prompt."""
    prompt_file: Path | None = None
    """A file that holds the prompt instead (UTF-8)."""
    hf_model: str | None = None
    """A checkpoint of Hugging Face: a directory, or an id."""
    run_dir: Path | None = None
    """Directory that train.py wrote, in place of --hf_model."""
    best: bool = False
    """Of --run_dir the checkpoint with the lowest validation loss, instead of the latest."""
    tokenizer: Path | None = None
    """A tokenizer.json. Default: the model's."""
    chat: bool = False
    """Put the prompt into the tokenizer's chat template, as what the user says."""
    system: str | None = None
    """With --chat: the system's message."""
    max_new_tokens: int = 256
    """Most tokens to write."""
    temperature: float = 0.0
    """0: the most probable token each time. Greater than 0: sample, from logits divided by it."""
    top_p: float = 1.0
    """Sample among the most probable tokens that together have this probability."""
    seed: int = 0
    """Of the sampling."""
    stop: tuple[str, ...] = ()
    """Tokens that end the text, besides the tokenizer's own ends of texts and turns."""
    prefill_chunks: int = 1
    """Chunks of the prompt that go through the model one after the other."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of weights, activations and cache."""


def main() -> None:
    logging.basicConfig(level=logging.WARNING, format="%(message)s", force=True)
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax warns that a checkpoint is opened for reading only
    device_memory.allocate_as_needed(os.environ)
    config = tyro.cli(GenerateConfig, description=__doc__, use_underscores=True)
    with reported_errors():
        sampling = _sampling(config)
        prompt = _prompt(config)
        model, params, tokenizer_path = _load(config)
        tokenizer = load_fitting_tokenizer(tokenizer_path, model.vocab_size)
        ids = text.encode(prompt, tokenizer, tokenizer_path, chat=config.chat, system=config.system)
        if not 1 <= config.prefill_chunks <= len(ids):
            raise InputError(
                f"--prefill_chunks is {config.prefill_chunks}; the prompt has {len(ids)} tokens, "
                f"so it must be from 1 to {len(ids)}"
            )
        stops = text.find_stops(config.stop, tokenizer)
        attention, _ = choose_attention(model, len(ids), config.dtype)
        tokens = stream(
            model,
            unstack_layers(params, jnp.dtype(config.dtype)),
            *pad_prompts([ids]),
            jax.random.key(config.seed),
            execution=Execution(compute_dtype=jnp.dtype(config.dtype), attention=attention),
            max_new_tokens=config.max_new_tokens,
            stop_ids=stops,
            sampling=sampling,
            num_chunks=config.prefill_chunks,
        )
        timed = _Timed(int(token[0]) for token in tokens)
        for piece in text.decode_stream((token for token in timed if token not in stops), tokenizer):
            print(piece, end="", flush=True)
        print()
        print(f"{len(ids)} tokens of prompt, {timed.summary()}", file=sys.stderr)


class _Timed:
    """Tokens as they come, and how fast they came."""

    def __init__(self, tokens: Iterator[int]):
        self._tokens = tokens
        self._ends_s: list[float] = []

    def __iter__(self) -> Iterator[int]:
        for token in self._tokens:
            self._ends_s.append(time.perf_counter())
            yield token

    def summary(self) -> str:
        """The rate without the first token, which waits for the prefill, nor the second, which waits for a compiler."""
        count = len(self._ends_s)
        if count < 4:
            return f"{count} new"
        return f"{count} new, {(count - 2) / (self._ends_s[-1] - self._ends_s[1]):.1f} tokens/s"


def _sampling(config: GenerateConfig) -> Sampling:
    check_seed(config.seed)
    if config.system is not None and not config.chat:
        raise InputError("--system needs --chat")
    try:
        return Sampling(config.temperature, config.top_p)
    except ValueError:
        raise InputError(
            f"--temperature is {config.temperature} and --top_p {config.top_p}; the first must be at least 0, the "
            "second greater than 0 and at most 1"
        ) from None


def _prompt(config: GenerateConfig) -> str:
    if (config.prompt is None) == (config.prompt_file is None):
        raise InputError("give a prompt or --prompt_file, one of the two")
    if config.prompt_file is None:
        return config.prompt or ""
    try:
        return config.prompt_file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--prompt_file {config.prompt_file} cannot be read: {error}") from None


def _load(config: GenerateConfig) -> tuple[Qwen2Config, Params, Path]:
    """Architecture, parameters, and the path of the tokenizer."""
    if (config.hf_model is None) == (config.run_dir is None):
        raise InputError("give --hf_model or --run_dir, one of the two")
    if config.run_dir is not None:
        saved = load_params(config.run_dir, best=config.best)
        model, params = saved.model, saved.params
        own = tokenizer_of(config.run_dir) if config.tokenizer is None else None
    else:
        directory = hf.locate(config.hf_model or "")
        model, params = hf.load(directory, jnp.dtype(config.dtype))
        own = hf.tokenizer_path(directory)
    tokenizer = config.tokenizer or own
    if tokenizer is None:
        raise InputError("the model has no tokenizer.json: give it with --tokenizer")
    return model, params, tokenizer


if __name__ == "__main__":
    main()
