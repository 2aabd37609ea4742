"""From a run's checkpoint to a directory that transformers loads."""

import json
from pathlib import Path

from jaxchunk.errors import InputError
from jaxchunk.models import hf
from jaxchunk.training.checkpoint import load_params


def export_run(
    run_path: Path,
    out_dir: Path,
    *,
    best: bool = False,
    tokenizer: Path | None = None,
    dtype: str | None = None,
    max_shard_size: int = hf.MAX_SHARD_SIZE,
) -> int:
    """Writes a run's parameters, architecture and tokenizer with `hf.save`.

    Args:
      run_path: the run's directory; the run may still be going on.
      out_dir: where to; it must not exist, or be empty.
      best: the checkpoint with the lowest validation loss, instead of the latest.
      tokenizer: a `tokenizer.json`; None for the one that the run used, if it used one.
      dtype: of the stored weights; None for float32, as they were trained.
      max_shard_size: bytes in a safetensors file at most.

    Returns:
      The step of the checkpoint.

    Raises:
      InputError: the run has no checkpoint that can be read, its tokenizer is gone, or `out_dir` cannot be written.
    """
    saved = load_params(run_path, best=best)
    tokenizer = tokenizer_of(run_path) if tokenizer is None else tokenizer
    hf.save(saved.model, saved.params, out_dir, tokenizer=tokenizer, dtype=dtype, max_shard_size=max_shard_size)
    return saved.step


def export_adapters(run_path: Path, out_dir: Path, *, best: bool = False) -> int:
    """Writes the adapters of a run as PEFT stores them: `adapter_config.json` and `adapter_model.safetensors`.

    Args:
      run_path: the run's directory.
      out_dir: where to; it must not exist, or be empty.
      best: the checkpoint with the lowest validation loss, instead of the latest.

    Returns:
      The step of the checkpoint.

    Raises:
      InputError: the run has no checkpoint that can be read, trained no adapters, or `out_dir` cannot be written.
    """
    saved = load_params(run_path, best=best)
    if saved.adapters is None or saved.config.adapters is None:
        raise InputError(f"{run_path} trained the model and no adapters: leave --adapters out")
    hf.save_adapters(saved.config.adapters, saved.adapters, out_dir, base=saved.config.hf_model)
    return saved.step


def tokenizer_of(run_path: Path) -> Path | None:
    """The `tokenizer.json` that a run used; None where its data had none.

    Raises:
      InputError: it is gone.
    """
    name = json.loads((run_path / "env.json").read_text())["data"]["tokenizer"]
    if name is None:
        return None
    if not Path(name).is_file():
        raise InputError(f"{name}, the tokenizer of the run {run_path}, is gone; give it with --tokenizer")
    return Path(name)
