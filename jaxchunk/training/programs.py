"""The compiled programs of a run, made before the first step so that no window of time holds a compilation."""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PRNGKeyArray

from jaxchunk.compilation import CompileTime, compile_timed, sum_of
from jaxchunk.data import Batch, is_examples
from jaxchunk.models import lora, qwen2
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
    whole_params,
)


class Programs(NamedTuple):
    """Compiled functions, and what compiling them found out. `train_step` donates the state it is given.

    `init` takes what `Model.start` gives; parameters are donated where they stay in float32. Batches are those rows
    that this process loads. Where processes are several, `train_step` takes the number of a signal to stop besides,
    0 for none.
    `state` has the shape, dtype and sharding of every array of the state: what a checkpoint is restored into.
    `compile_times` has one entry a program; sizes of micro-batches that did not fit count in "train_step".
    `train_step_text` gives the optimised HLO.
    """

    state: TrainState
    init: Callable[[PRNGKeyArray, qwen2.Params | None], TrainState]
    train_step: Callable[..., tuple[TrainState, StepMetrics]]
    eval_step: Callable[[qwen2.Params, Batch], tuple[Array, Array]]
    memory_plan: MemoryPlan
    compile_times: dict[str, CompileTime]
    train_step_text: Callable[[], str | None]

    @property
    def compile_time_s(self) -> float:
        """Seconds before all of them were there."""
        return sum(times.total_s for times in self.compile_times.values())


def compile_programs(
    config: TrainConfig, model: Model, execution: qwen2.Execution, limit_bytes: int | None, devices: Devices
) -> Programs:
    """Compiles initialisation, training step and validation step; settles the micro-batch size on the way.

    One after the other: lowering takes under a second, and on a GPU XLA chooses kernels by timing them, which another
    compilation at the same time would disturb.

    Args:
      config: the run.
      model: what is trained.
      execution: how the model runs.
      limit_bytes: of a device's memory; None for no limit.
      devices: what runs it.

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

    mesh, key, shapes = devices.mesh, jax.eval_shape(lambda: jax.random.key(0)), qwen2.param_shapes(model.config)
    state = jax.eval_shape(first_state, key, shapes)
    stays = replicated = None  # on one device nothing is said of shardings
    if mesh is not None:
        stays, replicated = state_shardings(mesh, state), NamedSharding(mesh, PartitionSpec())
        state, key = jax.tree.map(lambda a, s: a.update(sharding=s), state, stays), key.update(sharding=replicated)
        shapes = state.params
    donated = (1,) if config.adapters is None or config.compute_dtype == "float32" else ()
    make = jax.jit(first_state, donate_argnums=donated, out_shardings=stays)
    given = None if model.checkpoint is None else shapes
    init, init_time = compile_timed(make, key, given, options=options)

    step_times: list[CompileTime] = []

    def compile_step(micro_batch_size: int) -> jax.stages.Compiled:
        step = make_train_step(config, model.config, execution, optimizer, micro_batch_size, mesh)
        results = None if mesh is None else (stays, replicated)
        batch = _batch(config.batch_size, config, mesh)
        signals = () if mesh is None or jax.process_count() == 1 else (devices.place_signal(0),)
        jitted = jax.jit(step, donate_argnums=0, out_shardings=results)
        program, time = compile_timed(jitted, state, batch, *signals, options=options)
        step_times.append(time)
        return program

    train_step, plan = compile_within_memory(config, model, compile_step, limit_bytes, devices.shards)
    # A forward pass alone saves nothing that a loop over the blocks would copy, and a loop compiles in seconds.
    looped = dataclasses.replace(execution, scan_layers=True)
    jitted_eval = jax.jit(make_eval_step(config, model.config, looped, mesh))
    batch = _batch(plan.micro_batch_size, config, mesh)
    whole = jax.eval_shape(functools.partial(whole_params, config), state.params, state.frozen)
    if mesh is not None:
        whole = state.params  # with its shardings
    eval_step, eval_time = compile_timed(jitted_eval, whole, batch, options=options)
    times = {"init": init_time, "train_step": sum_of(step_times), "eval_step": eval_time}
    placed = jax.tree.map(lambda a, sharding: a.update(sharding=sharding), state, init.output_shardings)
    programs = Programs(placed, init, train_step, eval_step, plan, times, train_step.as_text)
    if mesh is None:
        return programs
    return programs._replace(
        init=lambda key, params: init(devices.place_key(key), params),
        train_step=lambda state, batch, *signals: train_step(
            state, devices.place_batch(batch, config.batch_size), *map(devices.place_signal, signals)
        ),
        eval_step=lambda params, batch: eval_step(params, devices.place_batch(batch, plan.micro_batch_size)),
    )


def compiler_options(config: TrainConfig, platform: str) -> dict[str, str | bool] | None:
    """XLA's options for the run's programs.

    `xla_gpu_deterministic_ops` and not `xla_gpu_exclude_nondeterministic_ops`: under the second, kernels are still
    chosen by timing them, and a run that goes on in another process could get others.
    """
    return {"xla_gpu_deterministic_ops": True} if config.deterministic and platform == "gpu" else None


def must_loop(config: TrainConfig, attention: qwen2.AttentionImplementation) -> bool:
    """Whether the blocks have to be a loop over one compiled block, whatever `config.scan_layers` says.

    Of several alike backward calls of cuDNN's attention in a program XLA marks only the first as deterministic and does
    not find what it compiled for the others when they run ("IndexError: absl::container_internal::raw_hash_map<>::at";
    JAX 0.11.2, by the calls in the compiled text). A loop has one; forward calls get no such mark.
    """
    return config.deterministic and attention == "cudnn"


def _batch(batch_size: int, config: TrainConfig, mesh: Mesh | None) -> dict[str, jax.ShapeDtypeStruct]:
    sharding = None if mesh is None else NamedSharding(mesh, batch_spec(mesh))
    ids = jax.ShapeDtypeStruct((batch_size, config.seq_len), jnp.int32, sharding=sharding)
    names = ("tokens", "labels", "segment_ids") if is_examples(config.data) else ("tokens", "labels")
    return dict.fromkeys(names, ids)
