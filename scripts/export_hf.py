"""Writes a training run as a directory that transformers loads: `python scripts/export_hf.py RUN_DIR OUT_DIR`."""

import dataclasses
import logging
from pathlib import Path
from typing import Literal

import jax
import tyro

from jaxchunk.errors import reported_errors
from jaxchunk.models import hf
from jaxchunk.training.export import export_adapters, export_run


@dataclasses.dataclass(frozen=True)
class ExportConfig:
    """What to export, and where to."""

    run_dir: tyro.conf.Positional[Path]
    """Directory that train.py wrote."""
    out_dir: tyro.conf.Positional[Path]
    """A new directory."""
    best: bool = False
    """The checkpoint with the lowest validation loss, instead of the latest."""
    tokenizer: Path | None = None
    """A tokenizer.json. Default: the run's."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Dtype of the stored weights; they were trained in float32."""
    max_shard_size: int = hf.MAX_SHARD_SIZE
    """Bytes in a safetensors file at most."""
    adapters: bool = False
    """Of a run with --lora_rank, write the adapters alone, in float32 and in PEFT's format. Without this they are
    merged into the weights."""


def main() -> None:
    jax.config.update("jax_platforms", "cpu")  # nothing is computed, and the run may still have the GPU
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax warns that a checkpoint is opened for reading only
    config = tyro.cli(ExportConfig, description=__doc__, use_underscores=True)
    with reported_errors():
        if config.adapters:
            step = export_adapters(config.run_dir, config.out_dir, best=config.best)
            print(f"{config.out_dir}: the adapters after step {step}, in float32")
            return
        step = export_run(
            config.run_dir,
            config.out_dir,
            best=config.best,
            tokenizer=config.tokenizer,
            dtype=config.dtype,
            max_shard_size=config.max_shard_size,
        )
        print(f"{config.out_dir}: the parameters after step {step}, in {config.dtype}")


if __name__ == "__main__":
    main()
