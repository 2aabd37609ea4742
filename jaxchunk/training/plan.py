"""Everything that is settled before a run's first step: data, implementations, compiled programs."""

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import grain
import jax

from jaxchunk import data, device_memory
from jaxchunk.errors import InputError
from jaxchunk.lm_head import Choice, Head, choose_implementation, split_rows
from jaxchunk.models import hf, qwen2
from jaxchunk.models.attention import choose_attention
from jaxchunk.models.elementwise_choice import choose_elementwise
from jaxchunk.training import chunks, resume
from jaxchunk.training.checkpoint import architecture
from jaxchunk.training.config import TrainConfig
from jaxchunk.training.mesh import Devices, check_model_fits
from jaxchunk.training.model import Model, choose_model, choose_tokenizer
from jaxchunk.training.programs import Programs, compile_programs, must_loop
from jaxchunk.training.samples import Sampler, make_sampler
from jaxchunk.tuning import ChunkChoice
from jaxchunk.tuning.policy import first_count

_logger = logging.getLogger("jaxchunk")


@dataclasses.dataclass(frozen=True)
class Plan:
    """A run that is ready to start.

    Attributes:
      config: what was asked for.
      devices: what it runs on.
      model: what is trained.
      dataset: the tokens and where they come from.
      split: training and held-out windows.
      batches: endless training batches; its state is a part of every checkpoint.
      lm_head: the loss implementation, with the reason.
      execution: how the model runs.
      attention_reason: why this attention implementation.
      elementwise_reason: why norms and SwiGLU run as they do.
      programs: the compiled functions and the memory plan.
      train_steps: the compiled training step by chunk count; several where the run is adaptive.
      chunk_choice: how the chunk count was found, where it was left open.
      sampler: writes samples; None where none are asked for.
    """

    config: TrainConfig
    devices: Devices
    model: Model
    dataset: data.Dataset
    split: data.Split
    batches: grain.DatasetIterator[data.Batch]
    lm_head: Choice
    execution: qwen2.Execution
    attention_reason: str
    elementwise_reason: str
    programs: Programs
    train_steps: Mapping[int, chunks.TrainStep]
    chunk_choice: ChunkChoice | None = None
    sampler: Sampler | None = None

    @property
    def lm_head_rows(self) -> tuple[int, int]:
        """Tokens in a chunk of the LM head, and chunks in a micro-batch, on each device; at an adaptive run's start."""
        sequences = self.programs.memory_plan.micro_batch_size // self.devices.shards.of_a_batch
        tokens = sequences * self.config.seq_len
        return (
            (tokens, 1)
            if self.lm_head.implementation == "reference"
            else split_rows(tokens, first_count(self.train_steps))
        )

    def choices(self) -> dict[str, Any]:
        """What was chosen where the config left it open, for `env.json`."""
        chunk_rows, chunks = self.lm_head_rows
        return {
            "model": hf.to_hf_config(self.model.config, "float32"),
            "checkpoint": None if self.model.checkpoint is None else str(self.model.checkpoint),
            "lmhead_impl": self.lm_head.implementation,
            "lmhead_impl_reason": self.lm_head.reason,
            "lmhead_chunks": chunks,
            "lmhead_chunk_tokens": chunk_rows,
            "lmhead_chunks_adaptive": list(self.train_steps) if self.config.lmhead_chunks == "adaptive" else None,
            "lmhead_chunks_choice": None if self.chunk_choice is None else self.chunk_choice.as_dict(),
            "attention": self.execution.attention,
            "attention_reason": self.attention_reason,
            "elementwise": self.execution.elementwise,
            "elementwise_reason": self.elementwise_reason,
            "scan_layers": self.execution.scan_layers,
            "mesh": self.devices.shards._asdict(),
            "micro_batch_size": self.programs.memory_plan.micro_batch_size,
            "compiled_memory_bytes": self.programs.memory_plan.memory.total_bytes,
        }

    def describe_data(self) -> dict[str, Any]:
        """What the data is, for `env.json`."""
        dataset = self.dataset
        return {
            "description": dataset.description,
            "tokens": len(dataset.tokens),
            "vocab_size": dataset.vocab_size,
            "training_sequences": len(self.split.train),
            "held_out_sequences": len(self.split.validation),
            "packing": {name: _packing(rows) for name, rows in self.split._asdict().items()},
            "tokens_sha256": dataset.sha256,
            "corpus_sha256": dataset.corpus_sha256,
            "corpus_bytes": dataset.num_bytes,
            "tokenizer": None if dataset.tokenizer_path is None else str(dataset.tokenizer_path.absolute()),
        }


def _packing(rows: data.TokenWindows | data.PackedRows) -> dict[str, Any] | None:
    if not isinstance(rows, data.PackedRows):
        return None
    return {"examples": rows.num_examples, "rows": len(rows), "efficiency": rows.efficiency}


def prepare(config: TrainConfig, devices: Devices, about: dict[str, Any] | None = None) -> Plan:
    """Loads the data and compiles the programs; nothing is written but caches.

    Args:
      config: the run.
      devices: where it runs.
      about: what is known of the checkpoint to go on from; None at the beginning of a run.

    Raises:
      InputError: the model or the data cannot be used, a named implementation cannot run, or the model does not fit.
    """
    model = choose_model(config, None if about is None else architecture(about))
    check_model_fits(devices, model.config, model.flag)
    cache_dir = None if config.cache_dir is None else Path(config.cache_dir)
    tokenizer = choose_tokenizer(config, model)
    dataset = data.load_dataset(config.data, tokenizer, model.config.vocab_size, cache_dir, seed=config.seed)
    held_out = None
    if config.val_data is not None:
        held_out = data.load_dataset(config.val_data, dataset.tokenizer_path, model.config.vocab_size, cache_dir)
        if dataset.tokenizer_path is None and held_out.tokenizer_path is not None:
            raise InputError(
                f"--val_data {config.val_data} is text, and nothing says which tokenizer made the tokens of --data "
                f"{config.data}: give it with --tokenizer"
            )
    if about is not None:
        resume.check_data(config, about, dataset)
    split = data.split(dataset, config.seq_len, config.val_fraction, held_out=held_out)
    try:
        head = Head(model.config.hidden_size, model.config.vocab_size // devices.shards.model)
        lm_head = choose_implementation(config.lmhead_impl, compute_dtype=config.compute_dtype, head=head)
        if devices.mesh is not None and lm_head.implementation == "reference":
            raise ValueError("--lmhead_impl reference runs on one device only: leave it out, or give --mesh_data 1")
        attention, reason = choose_attention(
            model.config, config.seq_len, config.compute_dtype, config.attention, packed=data.is_examples(config.data)
        )
        elementwise, elementwise_reason = choose_elementwise(config.elementwise, config.compute_dtype)
    except ValueError as error:
        raise InputError(str(error)) from None
    dtype, sharded = jax.numpy.dtype(config.compute_dtype), devices.mesh is not None
    execution = qwen2.Execution(
        dtype,
        attention,
        elementwise=elementwise,
        remat=config.remat,
        scan_layers=config.scan_layers or must_loop(config, attention),
        sharded=sharded,
        mlp_chunks=config.mlp_chunks,
    )
    limit_bytes = device_memory.limit_bytes(devices.local[0])
    config, choice = chunks.settle(config, model.config, limit_bytes)
    sampler = make_sampler(config, model.config, execution, dataset, split)
    _logger.info("compiling %s ...", config.model_name)

    def compile_with(config: TrainConfig) -> Programs:
        return compile_programs(config, model, execution, limit_bytes, devices)

    if config.lmhead_chunks == "adaptive":
        programs, train_steps = chunks.compile_arms(config, compile_with)
    else:
        programs = compile_with(config)
        train_steps = {config.num_chunks: programs.train_step}
    chunks.compare_sizes(choice, programs.memory_plan.micro_batch_size, config.seq_len)
    batches = data.train_batches(split.train, config.batch_size, config.seed, devices.rows(config.batch_size))
    settled = config, devices, model, dataset, split, batches, lm_head, execution, reason, elementwise_reason
    return Plan(*settled, programs, train_steps, choice, sampler)
