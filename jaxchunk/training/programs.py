"""The compiled programs of a run, made before the first step so that no window of time holds a compilation."""

import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import PRNGKeyArray

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
    """

    state: TrainState
    init: Callable[[PRNGKeyArray | qwen2.Params], TrainState]
    train_step: Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]]
    eval_step: Callable[[qwen2.Params, Batch], tuple[Array, Array]]
    memory_plan: MemoryPlan
    compile_time_s: float


def compile_programs(
    config: TrainConfig, model: Model, execution: qwen2.Execution, limit_bytes: int | None
) -> Programs:
    """Compiles initialisation, training step and validation step; settles the micro-batch size on the way.

    Raises:
      InputError: no micro-batch fits in `limit_bytes`.
    """
    start_s = time.perf_counter()
    optimizer, options = make_optimizer(config), compiler_options(config, jax.default_backend())
    shapes = qwen2.param_shapes(model.config)
    if model.checkpoint is None:
        lowered = jax.jit(lambda key: init_state(optimizer, qwen2.init(model.config, key))).lower(jax.random.key(0))
    else:
        lowered = jax.jit(lambda params: init_state(optimizer, params), donate_argnums=0).lower(shapes)
    init = lowered.compile(options)
    state = jax.eval_shape(lambda params: init_state(optimizer, params), shapes)

    def compile_step(micro_batch_size: int) -> jax.stages.Compiled:
        step = make_train_step(config, model.config, execution, optimizer, micro_batch_size)
        return jax.jit(step, donate_argnums=0).lower(state, _batch(config.batch_size, config)).compile(options)

    train_step, plan = compile_within_memory(config, model, compile_step, limit_bytes)
    jitted_eval = jax.jit(make_eval_step(config, model.config, execution))
    eval_step = jitted_eval.lower(state.params, _batch(plan.micro_batch_size, config)).compile(options)
    placed = jax.tree.map(lambda a, sharding: a.update(sharding=sharding), state, init.output_shardings)
    return Programs(placed, init, train_step, eval_step, plan, time.perf_counter() - start_s)


def compiler_options(config: TrainConfig, platform: str) -> dict[str, str | bool] | None:
    """XLA's options for the run's programs.

    `xla_gpu_deterministic_ops` and not `xla_gpu_exclude_nondeterministic_ops`: under the second, kernels are still
    chosen by timing them, and a run that goes on in another process could get others.
    """
    return {"xla_gpu_deterministic_ops": True} if config.deterministic and platform == "gpu" else None


def _batch(batch_size: int, config: TrainConfig) -> dict[str, jax.ShapeDtypeStruct]:
    ids = jax.ShapeDtypeStruct((batch_size, config.seq_len), jnp.int32)
    return {"tokens": ids, "labels": ids}
