"""Settles the LM head's chunk count where the flags leave it open."""

import dataclasses
import logging
from pathlib import Path

import jax
import jax.numpy as jnp

from jaxchunk.data import IGNORE_INDEX
from jaxchunk.device_memory import usable
from jaxchunk.models import qwen2
from jaxchunk.training.config import TrainConfig
from jaxchunk.training.memory import estimate_bytes, likely_micro_batch_sizes
from jaxchunk.tuning import ChunkChoice, candidate_counts, choose_num_chunks

_logger = logging.getLogger("jaxchunk")


def settle(
    config: TrainConfig, model: qwen2.Qwen2Config, limit_bytes: int | None
) -> tuple[TrainConfig, ChunkChoice | None]:
    """The config with a number of chunks, and how it was found.

    With `--lmhead_chunks auto` the head is measured alone, at the size of the micro-batch that the memory estimate
    takes for the largest that fits, before anything else is on the device.

    Args:
      config: the run.
      model: what is trained.
      limit_bytes: what the device's allocator will hand out; None for no limit.

    Raises:
      InputError: no candidate fits, or there is no energy to go by.
    """
    if config.lmhead_chunks != "auto":
        return config, None
    counts = config.chunk_candidates or candidate_counts(
        (config.micro_batch_size or config.batch_size) * config.seq_len
    )
    finest = dataclasses.replace(config, lmhead_chunks=max(counts))
    size = likely_micro_batch_sizes(finest, model, limit_bytes)[0]
    choice = choose_num_chunks(
        jax.ShapeDtypeStruct((size, config.seq_len, model.hidden_size), jnp.dtype(config.compute_dtype)),
        jax.ShapeDtypeStruct((model.vocab_size, model.hidden_size), jnp.float32),
        objective=config.chunk_objective,
        candidates=config.chunk_candidates or None,
        memory_budget_bytes=_memory_for_the_head(config, model, size, limit_bytes),
        budget_s=config.chunk_budget_s,
        time_if_no_energy=config.chunk_time_if_no_energy,
        cache_dir=None if config.cache_dir is None else Path(config.cache_dir),
        implementation=config.lmhead_impl,
        ignore_index=IGNORE_INDEX,
    )
    return dataclasses.replace(config, lmhead_chunks=choice.num_chunks), choice


def compare_sizes(choice: ChunkChoice | None, micro_batch_size: int, seq_len: int) -> None:
    """Says where the compiled step has other micro-batches than the estimate, at whose size chunks were measured."""
    if choice is not None and choice.num_tokens != micro_batch_size * seq_len:
        _logger.warning(
            "warning: %d chunks were chosen for micro-batches of %d tokens, and those that fit have %d; give "
            "--micro_batch_size to have them measured at that size",
            *(choice.num_chunks, choice.num_tokens, micro_batch_size * seq_len),
        )


def _memory_for_the_head(
    config: TrainConfig, model: qwen2.Qwen2Config, micro_batch_size: int, limit_bytes: int | None
) -> int | None:
    if config.chunk_memory_gb is not None:
        return int(config.chunk_memory_gb * 1e9)
    if limit_bytes is None:
        return None
    without_logits = dataclasses.replace(config, lmhead_chunks=config.tokens_per_step)
    return max(int(usable(limit_bytes)) - estimate_bytes(without_logits, model, micro_batch_size), 0)
