"""A whole checkpoint: architecture, parameters and tokenizer, from a directory and to one."""

import contextlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from safetensors import SafetensorError

from jaxchunk.data import load_fitting_tokenizer
from jaxchunk.errors import InputError
from jaxchunk.models.hf.config import load_config, to_hf_config
from jaxchunk.models.hf.hub import locate
from jaxchunk.models.hf.tokenizer import tokenizer_path, write_tokenizer
from jaxchunk.models.hf.weights import Place, check_params, read_params, write_params
from jaxchunk.models.qwen2 import Params, Qwen2Config

MAX_SHARD_SIZE = 5_000_000_000
"""Bytes in a safetensors file at most, where nothing else is said; as in transformers 4."""


def load(
    directory_or_id: str | Path, dtype: DTypeLike | None = None, place: Place | None = None
) -> tuple[Qwen2Config, Params]:
    """Loads a checkpoint of Qwen2, Qwen2.5 or Llama 3.

    Args:
      directory_or_id: a directory with `config.json` and `model.safetensors` (or its parts and their index), or the id
        of a model on the Hub; see `locate`.
      dtype: dtype of the parameters; None for that of the checkpoint.
      place: makes an array of a parameter's path and its values; None to put all on JAX's default device.

    Returns:
      The architecture and the parameters, as from `qwen2.init`.

    Raises:
      InputError: something is missing, damaged, not finite, or not known here. The message says what.
    """
    directory = locate(directory_or_id)
    config = load_config(directory)
    tokenizer = tokenizer_path(directory)
    if tokenizer is not None:
        load_fitting_tokenizer(tokenizer, config.vocab_size)
    return config, read_params(config, directory, dtype, place)


def save(
    config: Qwen2Config,
    params: Params,
    directory: str | Path,
    *,
    tokenizer: str | Path | None = None,
    dtype: DTypeLike | None = None,
    max_shard_size: int = MAX_SHARD_SIZE,
) -> None:
    """Writes a directory that `load` and transformers read; whole or not at all.

    Args:
      config: the architecture; stored as Qwen2 where it has attention biases, as Llama where it has none.
      params: parameters as from `qwen2.init`, in float32, bfloat16 or float16.
      directory: where to; it must not exist, or be empty.
      tokenizer: a `tokenizer.json`, copied with the files of transformers that are beside it (`generation_config.json`
        among them); a bare one gets a small `tokenizer_config.json`.
      dtype: dtype of the stored weights; None for that of `params`.
      max_shard_size: bytes in a safetensors file at most, but for a tensor that is larger by itself.

    Raises:
      InputError: the parameters are not those of `config` or not finite, the tokenizer does not fit, or the directory
        cannot be written.
    """
    if max_shard_size < 1:
        raise InputError(f"max_shard_size is {max_shard_size}; it must be at least 1")
    check_params(config, params)
    if tokenizer is not None:
        load_fitting_tokenizer(tokenizer, config.vocab_size)
    with appears_whole(Path(directory)) as temporary:
        write_params(config, params, temporary, dtype, max_shard_size)
        stored = jax.tree.leaves(params)[0].dtype if dtype is None else jnp.dtype(dtype)
        ids = {} if tokenizer is None else write_tokenizer(Path(tokenizer), temporary)
        values = to_hf_config(config, stored.name) | ids
        (temporary / "config.json").write_text(json.dumps(values, indent=2) + "\n")


@contextlib.contextmanager
def appears_whole(directory: Path) -> Iterator[Path]:
    """A directory beside `directory` that takes its name when the block ends without an error.

    Raises:
      InputError: there is something already, or it cannot be written.
    """
    path = directory.absolute()
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
            raise InputError(f"{directory} is there already and is no empty directory; choose another")
        temporary.mkdir(parents=True)
        yield temporary
        temporary.replace(directory)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"cannot write {directory}: {reason}; nothing is left of it") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
