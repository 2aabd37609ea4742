"""The tokenizer of a checkpoint: where it is, and what transformers needs beside it."""

import json
import shutil
from pathlib import Path
from typing import Any

from jaxchunk.data.chat import CHATML, CHATML_MARKERS, has_chatml
from jaxchunk.data.tokenizer import load_tokenizer, separator_id, stop_ids
from jaxchunk.models.hf.config import read_json_object

TOKENIZER_FILE = "tokenizer.json"
GENERATION_FILE = "generation_config.json"
# What transformers keeps beside tokenizer.json; read by it and by others, not here.
COMPANIONS = (
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt"),
    *("chat_template.jinja", GENERATION_FILE),
)
SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def tokenizer_path(directory: Path) -> Path | None:
    """The checkpoint's `tokenizer.json`; None where it has none."""
    path = directory / TOKENIZER_FILE
    return path if path.is_file() else None


def write_tokenizer(tokenizer: Path, directory: Path) -> dict[str, Any]:
    """Copies a tokenizer with what is beside it, or writes what transformers needs beside a bare one.

    Args:
      tokenizer: a `tokenizer.json`; a file of another name is taken to have no companions.
      directory: an existing one.

    Returns:
      The ids of special tokens that `config.json` repeats from `generation_config.json`, as far as they are known.
    """
    shutil.copyfile(tokenizer, directory / TOKENIZER_FILE)
    companions = [tokenizer.parent / name for name in COMPANIONS] if tokenizer.name == TOKENIZER_FILE else []
    for path in filter(Path.is_file, companions):
        shutil.copyfile(path, directory / path.name)
    loaded = load_tokenizer(tokenizer)
    end = separator_id(loaded)
    if not (directory / "tokenizer_config.json").exists():
        about: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            # By default token types too, which no model here takes.
            "model_input_names": ["input_ids", "attention_mask"],
        }
        if end is not None:
            about["eos_token"] = loaded.id_to_token(end)
        if has_chatml(loaded):  # what it was trained with, if with a chat
            about |= {"eos_token": CHATML_MARKERS[-1], "chat_template": CHATML}
        _write(directory / "tokenizer_config.json", about)
    if end is not None and not (directory / GENERATION_FILE).exists():
        stops = stop_ids(loaded)
        _write(directory / GENERATION_FILE, {"eos_token_id": list(stops) if len(stops) > 1 else end})
    if not (directory / GENERATION_FILE).exists():
        return {}
    generation = read_json_object(directory / GENERATION_FILE)
    return {name: generation[name] for name in SPECIAL_IDS if name in generation}


def _write(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
