"""What the model writes while it is trained: prompts chosen once, completions every so many steps."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tokenizers

from jaxchunk import data
from jaxchunk.data.chat import load_template
from jaxchunk.data.examples import encode_prompt, is_examples, read_prompts
from jaxchunk.data.tokenizer import stop_ids
from jaxchunk.errors import InputError
from jaxchunk.inference import generate, pad_prompts
from jaxchunk.models import qwen2
from jaxchunk.training.config import TrainConfig

_NUM_PROMPTS = 4  # taken from the data where none are given
_PROMPT_TOKENS = 32  # of running text


@dataclasses.dataclass(frozen=True)
class Sampler:
    """Prompts, and how a model goes on from them: greedily, so that a run that is resumed writes the same.

    Attributes:
      model: the architecture.
      execution: how it is run.
      tokenizer: of prompts and completions.
      prompts: token ids, at least one prompt and in each at least one token.
      max_new_tokens: most tokens of a completion.
    """

    model: qwen2.Qwen2Config
    execution: qwen2.Execution
    tokenizer: tokenizers.Tokenizer = dataclasses.field(repr=False)
    prompts: tuple[tuple[int, ...], ...] = dataclasses.field(repr=False)
    max_new_tokens: int

    def sample(self, params: qwen2.Params) -> list[dict[str, Any]]:
        """A record for every prompt: `prompt`, `completion`, its number of `tokens`, whether it `stopped` by itself."""
        stops = stop_ids(self.tokenizer)
        generated = generate(
            self.model,
            params,
            *pad_prompts(self.prompts),
            jax.random.key(0),
            execution=self.execution,
            max_new_tokens=self.max_new_tokens,
            stop_ids=stops,
        )
        token_ids, lengths = jax.device_get(generated)
        records = []
        for prompt, ids, length in zip(self.prompts, token_ids, lengths, strict=True):
            stopped = int(ids[length - 1]) in stops
            completion = ids[: length - stopped].tolist()
            texts = [self.tokenizer.decode(part, skip_special_tokens=False) for part in (list(prompt), completion)]
            records.append({"prompt": texts[0], "completion": texts[1], "tokens": int(length), "stopped": stopped})
        return records


def make_sampler(
    config: TrainConfig, model: qwen2.Qwen2Config, execution: qwen2.Execution, dataset: data.Dataset, split: data.Split
) -> Sampler | None:
    """The sampler that `--sample_every` and its like ask for; None where they ask for none.

    Raises:
      InputError: there is no tokenizer, the prompts cannot be read, or they are too long.
    """
    if not config.sample_every:
        return None
    if dataset.tokenizer_path is None:
        raise InputError(
            f"--sample_every needs a tokenizer, and --data {config.data} has none: give it with --tokenizer"
        )
    tokenizer = data.load_tokenizer(dataset.tokenizer_path)
    if config.sample_prompts is None:
        prompts = _prompts_of(split.validation)
    else:
        prompts = _read_prompts(Path(config.sample_prompts), dataset.tokenizer_path, tokenizer)
    longest = max(map(len, prompts)) + config.sample_tokens
    if longest > model.max_position_embeddings:
        raise InputError(
            f"the longest prompt of --sample_prompts and --sample_tokens ({config.sample_tokens}) make {longest} "
            f"tokens; the model has {model.max_position_embeddings} positions"
        )
    return Sampler(model, execution, tokenizer, tuple(map(tuple, prompts)), config.sample_tokens)


def _prompts_of(rows: data.TokenWindows | data.PackedRows) -> list[list[int]]:
    if isinstance(rows, data.PackedRows):
        return [prompt[: rows.seq_len].tolist() for prompt in rows.prompts(_NUM_PROMPTS)]
    chosen = np.linspace(0, len(rows) - 1, min(_NUM_PROMPTS, len(rows))).astype(int)
    return [rows[index]["tokens"][:_PROMPT_TOKENS].tolist() for index in chosen]


def _read_prompts(path: Path, tokenizer_path: Path, tokenizer: tokenizers.Tokenizer) -> list[list[int]]:
    template = functools.cache(lambda: load_template(tokenizer_path, tokenizer))
    if is_examples(path):
        records = read_prompts(path)
    else:
        lines = data.read_corpus(path).documents[0].text.splitlines()
        records = [{"prompt": line} for line in lines if line.strip()]
    prompts = [encode_prompt(record, tokenizer, template) for record in records]
    if not all(prompts):
        raise InputError(f"{path}: prompt {prompts.index([]) + 1} is empty; it needs at least one token")
    return prompts
