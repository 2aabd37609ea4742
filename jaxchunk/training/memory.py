"""The memory plan: how large a micro-batch fits, estimated first and then checked against the compiled program."""

import dataclasses
import functools
import logging
import math
from collections.abc import Callable

import jax

from jaxchunk.device_memory import ProgramMemory, compile_if_it_fits, usable
from jaxchunk.errors import InputError
from jaxchunk.models import qwen2
from jaxchunk.training.config import TrainConfig
from jaxchunk.training.mesh import Shards
from jaxchunk.training.model import Model

_logger = logging.getLogger("jaxchunk")
_ONE = Shards()


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """What the compiled step needs on a device and what there is; `limit_bytes` is None where there is no limit.

    `micro_batch_size` is that of all devices together.
    """

    micro_batch_size: int
    memory: ProgramMemory
    limit_bytes: int | None
    devices: int = 1

    def describe(self) -> str:
        """One line for people."""
        limit = "" if self.limit_bytes is None else f" of {self.limit_bytes / 1e9:.1f}"
        where = "" if self.devices == 1 else " on each device"
        return (
            f"{self.memory.total_bytes / 1e9:.2f}{limit} GB{where} (state {self.memory.operand_bytes / 1e9:.2f}, "
            f"temporaries {self.memory.temporary_bytes / 1e9:.2f}) with micro-batches of {self.micro_batch_size}"
        )


def compile_within_memory(
    config: TrainConfig,
    model: Model,
    compile_step: Callable[[int], jax.stages.Compiled],
    limit_bytes: int | None,
    shards: Shards = _ONE,
) -> tuple[jax.stages.Compiled, MemoryPlan]:
    """Compiles the step with the largest micro-batch that fits.

    Args:
      config: the run; a `micro_batch_size` in it is taken as it is.
      model: what is trained.
      compile_step: compiles the step for a micro-batch size.
      limit_bytes: what a device's allocator will hand out; None for no limit.
      shards: over how many devices the step runs.

    Raises:
      InputError: not even the smallest candidate fits.
    """
    obstacle = ""
    for micro_batch_size in likely_micro_batch_sizes(config, model.config, limit_bytes, shards):
        compiled = compile_if_it_fits(functools.partial(compile_step, micro_batch_size), limit_bytes)
        if not isinstance(compiled, str):
            program, memory = compiled
            return program, MemoryPlan(micro_batch_size, memory, limit_bytes, math.prod(shards))
        obstacle = f"micro-batches of {micro_batch_size} do not fit: {compiled}"
        _logger.info(obstacle)
    raise InputError(
        f"{model.flag} with --seq_len {config.seq_len} --lmhead_chunks {config.lmhead_chunks}: {obstacle}; "
        "use a smaller --micro_batch_size, more --lmhead_chunks, --remat full, or more devices along --mesh_fsdp"
    )


def likely_micro_batch_sizes(
    config: TrainConfig, model: qwen2.Qwen2Config, limit_bytes: int | None, shards: Shards = _ONE
) -> list[int]:
    """The sizes that may fit, by the estimate, the largest first; never none."""
    if config.micro_batch_size is not None:
        return [config.micro_batch_size]
    sizes = [m for m in range(config.batch_size, 0, -shards.of_a_batch) if config.batch_size % m == 0]
    if limit_bytes is None:
        return sizes
    fitting = [m for m in sizes if estimate_bytes(config, model, m, shards) < usable(limit_bytes)]
    return fitting or sizes[-1:]


def estimate_bytes(config: TrainConfig, model: qwen2.Qwen2Config, micro_batch_size: int, shards: Shards = _ONE) -> int:
    """A first guess of the step's peak on a device; deliberately simple: the compiled program has the last word."""
    size = 2 if config.compute_dtype == "bfloat16" else 4
    tokens = micro_batch_size // shards.of_a_batch * config.seq_len
    D, F, L = model.hidden_size, model.intermediate_size // shards.model, model.num_hidden_layers
    V = model.vocab_size // shards.model
    saved_per_layer = {"none": 3 * F + 6 * D, "gated": 2 * F + 6 * D, "dots": 2 * F + 5 * D, "full": D}[config.remat]
    working_set = 3 * F + 10 * D
    parameters = qwen2.num_params(model) // (shards.fsdp * shards.model)
    gradient_sets = 1 if micro_batch_size == config.batch_size else 2
    state = 12 * parameters + 4 * gradient_sets * parameters + size * parameters
    if config.adapters is not None:  # the base alone; adapters are small
        state = size * parameters
    gathered = 2 * 4 * V * D if shards.fsdp > 1 else 0  # the LM head and its gradient; blocks come one after the other
    logits = -(-tokens // config.num_chunks) * V * size
    return state + gathered + tokens * size * (L * saved_per_layer + working_set) + logits
