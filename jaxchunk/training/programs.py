"""The compiled programs of a run, made before the first step so that no window of time holds a compilation."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import PRNGKeyArray

from jaxchunk.compilation import CompileTime, compile_timed, sum_of
from jaxchunk.data import Batch, is_examples
from jaxchunk.models import lora, qwen2
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
    whole_params,
)


class Programs(NamedTuple):
    """Compiled functions, and what compiling them found out. `train_step` donates the state it is given.

    `init` takes what `Model.start` gives; parameters are donated where they stay in float32.
    `state` has the shape, dtype and sharding of every array of the state: what a checkpoint is restored into.
    `compile_times` has one entry a program; sizes of micro-batches that did not fit count in "train_step".
    `train_step_text` gives the optimised HLO.
    """

    state: TrainState
    init: Callable[[PRNGKeyArray, qwen2.Params | None], TrainState]
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

    def first_state(key: PRNGKeyArray, params: qwen2.Params | None) -> TrainState:
        base = qwen2.init(model.config, key) if params is None else params
        if config.adapters is None:
            return init_state(optimizer, base)
        adapters = lora.init(config.adapters, model.config, jax.random.fold_in(key, 1))
        return init_state(optimizer, adapters, qwen2.cast_weights(base, config.compute_dtype))

    key, shapes = jax.random.key(0), qwen2.param_shapes(model.config)
    stays = config.adapters is None or config.compute_dtype == "float32"
    jitted = jax.jit(first_state, donate_argnums=(1,) if stays else ())
    given = None if model.checkpoint is None else shapes
    init, init_time = compile_timed(jitted, key, given, options=options)
    state = jax.eval_shape(first_state, key, shapes)

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
    whole = jax.eval_shape(functools.partial(whole_params, config), state.params, state.frozen)
    eval_step, eval_time = compile_timed(jitted_eval, whole, batch, options=options)
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
    names = ("tokens", "labels", "segment_ids") if is_examples(config.data) else ("tokens", "labels")
    return dict.fromkeys(names, ids)
