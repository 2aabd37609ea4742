"""The compiled programs of a run, made before the first step so that no window of time holds a compilation."""

import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PRNGKeyArray

from jaxchunk.data import Batch
from jaxchunk.models import qwen2
from jaxchunk.models.partition import batch_spec
from jaxchunk.training.config import TrainConfig
from jaxchunk.training.memory import MemoryPlan, compile_within_memory
from jaxchunk.training.mesh import Devices, state_shardings
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

    `init` takes what `Model.start` gives; parameters are donated. Batches are those rows that this process loads.
    Where processes are several, `train_step` takes the number of a signal to stop besides, 0 for none.
    `state` has the shape, dtype and sharding of every array of the state: what a checkpoint is restored into.
    """

    state: TrainState
    init: Callable[[PRNGKeyArray | qwen2.Params], TrainState]
    train_step: Callable[..., tuple[TrainState, StepMetrics]]
    eval_step: Callable[[qwen2.Params, Batch], tuple[Array, Array]]
    memory_plan: MemoryPlan
    compile_time_s: float


def compile_programs(
    config: TrainConfig, model: Model, execution: qwen2.Execution, limit_bytes: int | None, devices: Devices
) -> Programs:
    """Compiles initialisation, training step and validation step; settles the micro-batch size on the way.

    Args:
      config: the run.
      model: what is trained.
      execution: how the model runs.
      limit_bytes: of a device's memory; None for no limit.
      devices: what runs it.

    Raises:
      InputError: no micro-batch fits in `limit_bytes`.
    """
    start_s = time.perf_counter()
    optimizer, options = make_optimizer(config), compiler_options(config, jax.default_backend())
    mesh, key = devices.mesh, jax.eval_shape(lambda: jax.random.key(0))
    shapes = qwen2.param_shapes(model.config)
    state = jax.eval_shape(lambda params: init_state(optimizer, params), shapes)
    stays = replicated = None  # on one device nothing is said of shardings
    if mesh is not None:
        stays, replicated = state_shardings(mesh, state), NamedSharding(mesh, PartitionSpec())
        state, key = jax.tree.map(lambda a, s: a.update(sharding=s), state, stays), key.update(sharding=replicated)
        shapes = state.params
    if model.checkpoint is None:
        make = jax.jit(lambda key: init_state(optimizer, qwen2.init(model.config, key)), out_shardings=stays)
        init = make.lower(key).compile(options)
    else:
        make = jax.jit(lambda params: init_state(optimizer, params), donate_argnums=0, out_shardings=stays)
        init = make.lower(shapes).compile(options)

    def compile_step(micro_batch_size: int) -> jax.stages.Compiled:
        step = make_train_step(config, model.config, execution, optimizer, micro_batch_size, mesh)
        results = None if mesh is None else (stays, replicated)
        batch = _batch(config.batch_size, config, mesh)
        signals = () if mesh is None or jax.process_count() == 1 else (devices.place_signal(0),)
        return jax.jit(step, donate_argnums=0, out_shardings=results).lower(state, batch, *signals).compile(options)

    train_step, plan = compile_within_memory(config, model, compile_step, limit_bytes, devices.shards)
    jitted_eval = jax.jit(make_eval_step(config, model.config, execution, mesh))
    eval_step = jitted_eval.lower(state.params, _batch(plan.micro_batch_size, config, mesh)).compile(options)
    placed = jax.tree.map(lambda a, sharding: a.update(sharding=sharding), state, init.output_shardings)
    compile_time_s = time.perf_counter() - start_s
    if mesh is None:
        return Programs(placed, init, train_step, eval_step, plan, compile_time_s)
    return Programs(
        placed,
        lambda start: init(start if isinstance(start, dict) else devices.place_key(start)),
        lambda state, batch, *signals: train_step(
            state, devices.place_batch(batch, config.batch_size), *map(devices.place_signal, signals)
        ),
        lambda params, batch: eval_step(params, devices.place_batch(batch, plan.micro_batch_size)),
        plan,
        compile_time_s,
    )


def compiler_options(config: TrainConfig, platform: str) -> dict[str, str | bool] | None:
    """XLA's options for the run's programs.

    `xla_gpu_deterministic_ops` and not `xla_gpu_exclude_nondeterministic_ops`: under the second, kernels are still
    chosen by timing them, and a run that goes on in another process could get others.
    """
    return {"xla_gpu_deterministic_ops": True} if config.deterministic and platform == "gpu" else None


def _batch(batch_size: int, config: TrainConfig, mesh: Mesh | None) -> dict[str, jax.ShapeDtypeStruct]:
    sharding = None if mesh is None else NamedSharding(mesh, batch_spec(mesh))
    ids = jax.ShapeDtypeStruct((batch_size, config.seq_len), jnp.int32, sharding=sharding)
    return {"tokens": ids, "labels": ids}
