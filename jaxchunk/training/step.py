"""One optimizer step as a pure function: micro-batches, gradients, clipping, AdamW."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax
from jax.sharding import AbstractMesh, Mesh, PartitionSpec
from jaxtyping import Float, Int

from jaxchunk import lm_head_loss
from jaxchunk.data import IGNORE_INDEX, Batch
from jaxchunk.lm_head.varying import varying_over
from jaxchunk.models import lora, qwen2
from jaxchunk.models.partition import DATA, FSDP, MODEL, TOKEN_AXES, batch_spec, in_use
from jaxchunk.training.config import TrainConfig
from jaxchunk.training.mesh import param_specs, shared_over


class TrainState(NamedTuple):
    """What a step transforms; everything that a checkpoint must hold besides the data's position.

    There is no random state: initial weights and the order of the data follow from the seed, and nothing in a step is
    random. What is to be random there should follow from the seed and `step`.

    `params` are those that are trained. Where these are adapters, `frozen` is the base beside them, which does not
    change and of which checkpoints only say where it is from.
    """

    params: qwen2.Params
    opt_state: optax.OptState
    step: Int[Array, ""]
    frozen: qwen2.Params | None = None


class StepMetrics(NamedTuple):
    """Scalars of one step, on the device. `stop`: the highest signal that a process has got, where they are several."""

    loss: Float[Array, ""]
    grad_norm: Float[Array, ""]
    lr: Float[Array, ""]
    stop: Int[Array, ""] | None = None


def learning_rate(config: TrainConfig) -> optax.Schedule:
    """Linear warm-up to `lr`, then a cosine down to `final_lr_ratio * lr` at the last step."""
    warmup = config.resolved_warmup_steps
    return optax.warmup_cosine_decay_schedule(
        init_value=config.lr / max(warmup, 1),
        peak_value=config.lr,
        warmup_steps=warmup,
        decay_steps=max(config.steps - 1, warmup + 1),  # the last step is number steps - 1
        end_value=config.final_lr_ratio * config.lr,
    )


def make_optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """AdamW behind a clip of the global norm; matrices decay, norms and biases do not."""

    def decays(params: optax.Params) -> optax.Params:
        return jax.tree.map_with_path(lambda path, _: not path[-1].key.endswith(("norm", "bias")), params)

    adamw = optax.adamw(
        learning_rate(config), b1=config.beta1, b2=config.beta2, weight_decay=config.weight_decay, mask=decays
    )
    return optax.chain(optax.clip_by_global_norm(config.grad_clip), adamw)


def init_state(
    optimizer: optax.GradientTransformation, params: qwen2.Params, frozen: qwen2.Params | None = None
) -> TrainState:
    """The state before the first step."""
    return TrainState(params, optimizer.init(params), jnp.zeros((), jnp.int32), frozen)


def whole_params(config: TrainConfig, params: qwen2.Params, frozen: qwen2.Params | None) -> qwen2.Params:
    """What the model is run with: the trained parameters, or the frozen ones with the trained adapters beside them."""
    return params if config.adapters is None or frozen is None else lora.attach(config.adapters, frozen, params)


def summed_loss(
    config: TrainConfig,
    model: qwen2.Qwen2Config,
    execution: qwen2.Execution,
    params: qwen2.Params,
    batch: Batch,
    normalizer: Array,
) -> Float[Array, ""]:
    """Sum of the tokens' losses over `normalizer`, through the chunked LM head; over the tokens of all devices."""
    if execution.sharded:
        params = qwen2.with_whole_vocabulary(params)
    segment_ids = jnp.asarray(batch["segment_ids"]) if "segment_ids" in batch else None
    hidden = qwen2.hidden_states(model, params, jnp.asarray(batch["tokens"]), execution, segment_ids)
    with jax.named_scope("lm_head"):
        return lm_head_loss(
            hidden,
            qwen2.lm_head_weight(params),
            jnp.asarray(batch["labels"]),
            num_chunks=config.num_chunks,
            implementation=config.lmhead_impl,
            ignore_index=IGNORE_INDEX,
            normalizer=normalizer,
            token_axis=in_use(*TOKEN_AXES) if execution.sharded else None,
            vocab_axis=in_use(MODEL) if execution.sharded else None,
        )


def make_train_step(
    config: TrainConfig,
    model: qwen2.Qwen2Config,
    execution: qwen2.Execution,
    optimizer: optax.GradientTransformation,
    micro_batch_size: int,
    mesh: Mesh | AbstractMesh | None = None,
) -> Callable[..., tuple[TrainState, StepMetrics]]:
    """The function `(state, batch) -> (state, metrics)` of one optimizer step; jit it with the state donated.

    Several processes give it a third argument, the signal that each has got to stop, 0 for none: the metrics tell all
    of them of it at the same step, without any waiting of its own.

    A step whose loss or gradient is not finite leaves parameters and moments as they are; only counters move on, so
    that the schedule stays the one of the step's number.

    Args:
      config: the run.
      model: the architecture.
      execution: how the model runs.
      optimizer: from `make_optimizer`.
      micro_batch_size: sequences in a micro-batch, on all devices together.
      mesh: over which the state is sharded by `mesh.state_shardings`; None for one device.
    """
    schedule = learning_rate(config)
    gradients_of = make_gradients(config, model, execution, micro_batch_size, mesh)

    def train_step(
        state: TrainState, batch: Batch, signals: Int[Array, " devices"] | None = None
    ) -> tuple[TrainState, StepMetrics]:
        loss, gradients = gradients_of(state.params, batch, *(() if state.frozen is None else (state.frozen,)))
        with jax.named_scope("optimizer"):
            grad_norm = optax.tree.norm(gradients)
            updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
            updated = TrainState(optax.apply_updates(state.params, updates), opt_state, state.step + 1)
            finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
            before = state._replace(frozen=None)
            kept = jax.tree.map(lambda new, old: _updated(finite, new, old), updated, before)
        stop = None if signals is None else jnp.max(signals)
        metrics = StepMetrics(loss, grad_norm, jnp.asarray(schedule(state.step), jnp.float32), stop)
        return kept._replace(frozen=state.frozen), metrics

    return train_step


def make_gradients(
    config: TrainConfig,
    model: qwen2.Qwen2Config,
    execution: qwen2.Execution,
    micro_batch_size: int,
    mesh: Mesh | AbstractMesh | None = None,
) -> Callable[..., tuple[Float[Array, ""], qwen2.Params]]:
    """The function `(params, batch) -> (mean loss, gradients)`; arguments as for `make_train_step`.

    On one device it takes what is `frozen` in the state as a third argument, where something is. Over a mesh every
    device has its own part of the batch in as many micro-batches. Gradients of what devices share are summed once,
    after the last micro-batch; those of what is sharded over fsdp are scattered after each, because whole ones are not
    to be kept.
    """

    def gradients_of(
        params: qwen2.Params, batch: Batch, frozen: qwen2.Params | None = None, size: int = micro_batch_size
    ) -> tuple[Array, qwen2.Params]:
        # One denominator for the whole batch: means of micro-batches of unequal size must not be averaged.
        normalizer = _count(batch, execution)

        def loss_and_gradients(part: Batch) -> tuple[Array, qwen2.Params]:
            def loss(params: qwen2.Params) -> Array:
                whole = whole_params(config, params, frozen)
                return summed_loss(config, model, execution, whole, part, normalizer)

            return jax.value_and_grad(loss)(params)

        return _accumulate(loss_and_gradients, batch, size)

    if mesh is None:
        return gradients_of
    specs = param_specs(mesh, qwen2.param_shapes(model))
    size = micro_batch_size // (mesh.shape[DATA] * mesh.shape[FSDP])

    def on_every_device(params: qwen2.Params, batch: Batch) -> tuple[Array, qwen2.Params]:
        own = jax.tree.map(lambda leaf, spec: lax.pcast(leaf, shared_over(spec), to="varying"), params, specs)
        loss, gradients = gradients_of(own, batch, size=size)
        return loss, jax.tree.map(lambda leaf, spec: lax.psum(leaf, shared_over(spec)), gradients, specs)

    return jax.shard_map(
        on_every_device, mesh=mesh, in_specs=(specs, batch_spec(mesh)), out_specs=(PartitionSpec(), specs)
    )


def _count(batch: Batch, execution: qwen2.Execution) -> Int[Array, ""]:
    """Tokens of a batch that count, on all devices."""
    own = jnp.sum(batch["labels"] != IGNORE_INDEX)
    return lax.psum(own, in_use(*TOKEN_AXES)) if execution.sharded else own


def _updated(finite: Array, new: Array, old: Array) -> Array:
    return jnp.where(finite, new, old) if jnp.issubdtype(new.dtype, jnp.floating) else new


def _accumulate(
    loss_and_gradients: Callable[[Batch], tuple[Array, qwen2.Params]], batch: Batch, micro_batch_size: int
) -> tuple[Array, qwen2.Params]:
    """Sums over micro-batches, the gradient taken inside the loop: only two sets of gradients exist at a time."""
    num_micro_batches = batch["tokens"].shape[0] // micro_batch_size
    if num_micro_batches == 1:
        return loss_and_gradients(batch)
    parts = jax.tree.map(lambda a: a.reshape(num_micro_batches, micro_batch_size, *a.shape[1:]), batch)
    zeros = jax.tree.map(_zeros, jax.eval_shape(loss_and_gradients, jax.tree.map(lambda a: a[0], parts)))
    total, _ = lax.scan(
        lambda total, part: (jax.tree.map(jnp.add, total, loss_and_gradients(part)), None), zeros, parts
    )
    return total


def _zeros(like: jax.ShapeDtypeStruct) -> Array:
    varying: frozenset[str] = getattr(like.manual_axis_type, "varying", frozenset())  # inside of a jax.shard_map
    return varying_over(jnp.zeros(like.shape, like.dtype), varying)


def make_eval_step(
    config: TrainConfig, model: qwen2.Qwen2Config, execution: qwen2.Execution, mesh: Mesh | AbstractMesh | None = None
) -> Callable[[qwen2.Params, Batch], tuple[Float[Array, ""], Int[Array, ""]]]:
    """The function `(params, batch) -> (sum of token losses, number of tokens)`; `mesh` as for `make_train_step`."""

    def eval_step(params: qwen2.Params, batch: Batch) -> tuple[Array, Array]:
        loss = summed_loss(config, model, execution, params, batch, jnp.float32(1.0))
        return loss, _count(batch, execution)

    if mesh is None:
        return eval_step
    specs = param_specs(mesh, qwen2.param_shapes(model))
    return jax.shard_map(eval_step, mesh=mesh, in_specs=(specs, batch_spec(mesh)), out_specs=PartitionSpec())
