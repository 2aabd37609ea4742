"""The compiled programs of a run, made before the first step so that no window of time holds a compilation."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import PRNGKeyArray

from jaxchunk.compilation import CompileTime, compile_timed, sum_of
from jaxchunk.data import Batch
from jaxchunk.models import qwen2
from jaxchunk.training.config import TrainConfig
from jaxchunk.training.memory import MemoryPlan, compile_within_memory
from jaxchunk.training.model import Model
from jaxchunk.training.step import (
    StepMetrics,
    TrainState,
    init_state,
    make_eval_step,
    make_optimizer,
    make_train_step,
)


class Programs(NamedTuple):
    """Compiled functions, and what compiling them found out. `train_step` donates the state it is given.

    `init` takes what `Model.start` gives; parameters are donated.
    `state` has the shape, dtype and sharding of every array of the state: what a checkpoint is restored into.
    `compile_times` has one entry a program; sizes of micro-batches that did not fit count in "train_step".
    `train_step_text` gives the optimised HLO.
    """

    state: TrainState
    init: Callable[[PRNGKeyArray | qwen2.Params], TrainState]
    train_step: Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]]
    eval_step: Callable[[qwen2.Params, Batch], tuple[Array, Array]]
    memory_plan: MemoryPlan
    compile_times: dict[str, CompileTime]
    train_step_text: Callable[[], str | None]

    @property
    def compile_time_s(self) -> float:
        """Seconds before all of them were there."""
        return sum(times.total_s for times in self.compile_times.values())


def compile_programs(
    config: TrainConfig, model: Model, execution: qwen2.Execution, limit_bytes: int | None
) -> Programs:
    """Compiles initialisation, training step and validation step; settles the micro-batch size on the way.

    One after the other: lowering takes under a second, and on a GPU XLA chooses kernels by timing them, which another
    compilation at the same time would disturb.

    Raises:
      InputError: no micro-batch fits in `limit_bytes`.
    """
    optimizer, options = make_optimizer(config), compiler_options(config, jax.default_backend())
    shapes = qwen2.param_shapes(model.config)
    if model.checkpoint is None:
        start = jax.jit(lambda key: init_state(optimizer, qwen2.init(model.config, key)))
        init, init_time = compile_timed(start, jax.random.key(0), options=options)
    else:
        start = jax.jit(lambda params: init_state(optimizer, params), donate_argnums=0)
        init, init_time = compile_timed(start, shapes, options=options)
    state = jax.eval_shape(lambda params: init_state(optimizer, params), shapes)

    step_times: list[CompileTime] = []

    def compile_step(micro_batch_size: int) -> jax.stages.Compiled:
        step = make_train_step(config, model.config, execution, optimizer, micro_batch_size)
        batch = _batch(config.batch_size, config)
        program, time = compile_timed(jax.jit(step, donate_argnums=0), state, batch, options=options)
        step_times.append(time)
        return program

    train_step, plan = compile_within_memory(config, model, compile_step, limit_bytes)
    jitted_eval = jax.jit(make_eval_step(config, model.config, execution))
    batch = _batch(plan.micro_batch_size, config)
    eval_step, eval_time = compile_timed(jitted_eval, state.params, batch, options=options)
    times = {"init": init_time, "train_step": sum_of(step_times), "eval_step": eval_time}
    placed = jax.tree.map(lambda a, sharding: a.update(sharding=sharding), state, init.output_shardings)
    return Programs(placed, init, train_step, eval_step, plan, times, train_step.as_text)


def compiler_options(config: TrainConfig, platform: str) -> dict[str, str | bool] | None:
    """XLA's options for the run's programs.

    `xla_gpu_deterministic_ops` and not `xla_gpu_exclude_nondeterministic_ops`: under the second, kernels are still
    chosen by timing them, and a run that goes on in another process could get others.
    """
    return {"xla_gpu_deterministic_ops": True} if config.deterministic and platform == "gpu" else None


def _batch(batch_size: int, config: TrainConfig) -> dict[str, jax.ShapeDtypeStruct]:
    ids = jax.ShapeDtypeStruct((batch_size, config.seq_len), jnp.int32)
    return {"tokens": ids, "labels": ids}
