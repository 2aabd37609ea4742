"""The memory plan: how large a micro-batch fits, estimated first and then checked against the compiled program."""

import dataclasses
import logging
from collections.abc import Callable
from typing import TypeVar

import jax

from jaxchunk.errors import InputError
from jaxchunk.models import qwen2
from jaxchunk.training.config import TrainConfig

_logger = logging.getLogger("jaxchunk")
_USABLE = 0.94  # share of the allocator's limit; the rest goes to fragmentation and library workspaces

Program = TypeVar("Program", bound=jax.stages.Compiled)


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """What the compiled step needs and what there is, in bytes; `limit_bytes` is None where the device has no limit."""

    micro_batch_size: int
    state_bytes: int
    temporary_bytes: int
    limit_bytes: int | None

    @property
    def total_bytes(self) -> int:
        """Peak of the step: state (donated, so held once) and temporaries."""
        return self.state_bytes + self.temporary_bytes

    def describe(self) -> str:
        """One line for people."""
        limit = "no limit known" if self.limit_bytes is None else f"of {self.limit_bytes / 1e9:.1f} GB"
        return (
            f"{self.total_bytes / 1e9:.2f} GB {limit} (state {self.state_bytes / 1e9:.2f}, temporaries "
            f"{self.temporary_bytes / 1e9:.2f}) with micro-batches of {self.micro_batch_size}"
        )


def compile_within_memory(
    config: TrainConfig, compile_step: Callable[[int], Program], limit_bytes: int | None
) -> tuple[Program, MemoryPlan]:
    """Compiles the step with the largest micro-batch that fits.

    Args:
      config: the run; a `micro_batch_size` in it is taken as it is.
      compile_step: compiles the step for a micro-batch size.
      limit_bytes: what the device's allocator will hand out; None for no limit.

    Raises:
      InputError: not even the smallest candidate fits.
    """
    candidates = [m for m in range(config.batch_size, 0, -1) if config.batch_size % m == 0]
    if config.micro_batch_size is not None:
        candidates = [config.micro_batch_size]
    elif limit_bytes is not None:
        fitting = [m for m in candidates if estimate_bytes(config, m) < _USABLE * limit_bytes]
        candidates = fitting or candidates[-1:]
    plan = None
    for micro_batch_size in candidates:
        try:
            program = compile_step(micro_batch_size)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            _logger.info("micro-batches of %d do not fit: the compiler ran out of memory", micro_batch_size)
            continue
        plan = _plan(program, micro_batch_size, limit_bytes)
        if limit_bytes is None or plan.total_bytes < _USABLE * limit_bytes:
            return program, plan
        _logger.info("micro-batches of %d do not fit: %s", micro_batch_size, plan.describe())
    needed = "" if plan is None else f"; {plan.describe()}"
    raise InputError(
        f"--model {config.model} with --seq_len {config.seq_len} --lmhead_chunks {config.lmhead_chunks} does not "
        f"fit in the device's memory{needed}; use a smaller --micro_batch_size, more --lmhead_chunks, or --remat full"
    )


def estimate_bytes(config: TrainConfig, micro_batch_size: int) -> int:
    """A first guess of the step's peak; deliberately simple, since the compiled program has the last word."""
    model = qwen2.SIZES[config.model]
    size = 2 if config.compute_dtype == "bfloat16" else 4
    tokens = micro_batch_size * config.seq_len
    D, F, V, L = model.hidden_size, model.intermediate_size, model.vocab_size, model.num_hidden_layers
    saved_per_layer = {"none": 3 * F + 6 * D, "dots": 2 * F + 5 * D, "full": D}[config.remat]
    working_set = 3 * F + 10 * D
    parameters = qwen2.num_params(model)
    gradient_sets = 1 if micro_batch_size == config.batch_size else 2
    state = 12 * parameters + 4 * gradient_sets * parameters + size * parameters
    logits = -(-tokens // config.lmhead_chunks) * V * size
    return state + tokens * size * (L * saved_per_layer + working_set) + logits


def _plan(program: jax.stages.Compiled, micro_batch_size: int, limit_bytes: int | None) -> MemoryPlan:
    analysis = program.memory_analysis()
    assert analysis is not None, "CPU and GPU back ends have this analysis"
    state = analysis.argument_size_in_bytes + analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    return MemoryPlan(micro_batch_size, state, analysis.temp_size_in_bytes, limit_bytes)
