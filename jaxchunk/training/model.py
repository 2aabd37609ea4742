"""What a run trains: an architecture and where its first parameters come from, a seed or a checkpoint."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import PRNGKeyArray

from jaxchunk.data import load_tokenizer
from jaxchunk.errors import InputError
from jaxchunk.models import hf, qwen2
from jaxchunk.training.config import TrainConfig


class Model(NamedTuple):
    """A model to train. `flag` is how the user named it; `checkpoint` the directory to begin from, None for a seed."""

    flag: str
    config: qwen2.Qwen2Config
    checkpoint: Path | None

    def start(self, seed: int, place: Callable[..., Array] | None = None) -> tuple[PRNGKeyArray, qwen2.Params | None]:
        """What `Programs.init` makes the first state from: the seed's key, and the checkpoint's parameters in float32.

        Args:
          seed: of random parameters.
          place: where those of a checkpoint go, as `hf.load` takes it.

        Raises:
          InputError: the checkpoint's weights cannot be used.
        """
        params = None if self.checkpoint is None else hf.load(self.checkpoint, jnp.float32, place)[1]
        return jax.random.key(seed), params


def choose_model(config: TrainConfig, resumed: qwen2.Qwen2Config | None = None) -> Model:
    """The model that `--model` or `--hf_model` names; of a checkpoint only `config.json` is read.

    Args:
      config: the run.
      resumed: the architecture of a run that goes on. It has its own weights by then, so `--hf_model` is there for its
        tokenizer only, and need not be there any more; but where adapters are trained, their base must be.

    Raises:
      InputError: the checkpoint is none that can be trained here, or the sequences are longer than the model is for.
    """
    if config.hf_model is None:
        model = Model(f"--model {config.model}", resumed or qwen2.SIZES[config.model], None)
    elif resumed is None or config.adapters is not None:
        directory = hf.locate(config.hf_model)
        model = Model(f"--hf_model {config.hf_model}", hf.load_config(directory), directory)
    else:
        model = Model(f"--hf_model {config.hf_model}", resumed, _locate_or_name(config.hf_model))
    longest = model.config.max_position_embeddings
    if config.seq_len > longest:
        raise InputError(f"--seq_len is {config.seq_len}; {model.flag} has {longest} positions")
    return model


def _locate_or_name(directory_or_id: str) -> Path:
    try:
        return hf.locate(directory_or_id)
    except InputError:
        return Path(directory_or_id)


def choose_tokenizer(config: TrainConfig, model: Model) -> Path | None:
    """The `tokenizer.json` for the data, the user's or the checkpoint's; None to train one, or where there is no text.

    Raises:
      InputError: a checkpoint is trained on text and has no tokenizer, or `--tokenizer` gives its words other ids.
    """
    given = None if config.tokenizer is None else Path(config.tokenizer)
    if model.checkpoint is None:
        return given
    own = hf.tokenizer_path(model.checkpoint)
    if given is not None:
        if own is not None:
            _check_same_ids(given, own)
        return given
    is_text = config.data is None or (config.data != "synthetic" and not config.data.endswith(".bin"))
    if own is None and is_text:
        lacks = "has no tokenizer.json" if model.checkpoint.is_dir() else "is gone, and with it its tokenizer.json"
        raise InputError(f"{model.flag} {lacks}, which its vocabulary needs: give it with --tokenizer")
    return None if config.data == "synthetic" else own


def _check_same_ids(given: Path, own: Path) -> None:
    """More tokens are fine, such as those of a chat; other ids would make the checkpoint's weights worthless."""
    ids, own_ids = (load_tokenizer(path).get_vocab(with_added_tokens=True) for path in (given, own))
    other = [token for token, token_id in own_ids.items() if ids.get(token) != token_id]
    if other:
        token = min(other, key=own_ids.__getitem__)
        raise InputError(
            f"--tokenizer {given} does not have the ids of the checkpoint's ({own}) for {len(other):,} of "
            f"{len(own_ids):,} tokens, such as {token!r}: {own_ids[token]} there, {ids.get(token, 'missing')} here"
        )
