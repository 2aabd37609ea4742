"""One optimizer step as a pure function: micro-batches, gradients, clipping, AdamW."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jaxtyping import Float, Int

from jaxchunk import lm_head_loss
from jaxchunk.data import IGNORE_INDEX, Batch
from jaxchunk.models import qwen2
from jaxchunk.training.config import TrainConfig


class TrainState(NamedTuple):
    """What a step transforms; everything that a checkpoint must hold besides the data's position.

    There is no random state: initial weights and the order of the data follow from the seed, and nothing in a step is
    random. What is to be random there should follow from the seed and `step`.
    """

    params: qwen2.Params
    opt_state: optax.OptState
    step: Int[Array, ""]


class StepMetrics(NamedTuple):
    """Scalars of one step, on the device."""

    loss: Float[Array, ""]
    grad_norm: Float[Array, ""]
    lr: Float[Array, ""]


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


def init_state(optimizer: optax.GradientTransformation, params: qwen2.Params) -> TrainState:
    """The state before the first step."""
    return TrainState(params, optimizer.init(params), jnp.zeros((), jnp.int32))


def summed_loss(
    config: TrainConfig,
    model: qwen2.Qwen2Config,
    execution: qwen2.Execution,
    params: qwen2.Params,
    batch: Batch,
    normalizer: Array,
) -> Float[Array, ""]:
    """Sum of the tokens' losses over `normalizer`, through the chunked LM head."""
    hidden = qwen2.hidden_states(model, params, jnp.asarray(batch["tokens"]), execution)
    return lm_head_loss(
        hidden,
        qwen2.lm_head_weight(params),
        jnp.asarray(batch["labels"]),
        num_chunks=config.num_chunks,
        implementation=config.lmhead_impl,
        ignore_index=IGNORE_INDEX,
        normalizer=normalizer,
    )


def make_train_step(
    config: TrainConfig,
    model: qwen2.Qwen2Config,
    execution: qwen2.Execution,
    optimizer: optax.GradientTransformation,
    micro_batch_size: int,
) -> Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]]:
    """The function `(state, batch) -> (state, metrics)` of one optimizer step; jit it with the state donated.

    A step whose loss or gradient is not finite leaves parameters and moments as they are; only counters move on, so
    that the schedule stays the one of the step's number.
    """
    schedule = learning_rate(config)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
        # One denominator for the whole batch: means of micro-batches of unequal size must not be averaged.
        normalizer = jnp.sum(batch["labels"] != IGNORE_INDEX)

        def loss_and_gradients(part: Batch) -> tuple[Array, qwen2.Params]:
            return jax.value_and_grad(lambda params: summed_loss(config, model, execution, params, part, normalizer))(
                state.params
            )

        loss, gradients = _accumulate(loss_and_gradients, batch, micro_batch_size)
        grad_norm = optax.tree.norm(gradients)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        updated = TrainState(optax.apply_updates(state.params, updates), opt_state, state.step + 1)
        metrics = StepMetrics(loss, grad_norm, jnp.asarray(schedule(state.step), jnp.float32))
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        return jax.tree.map(lambda new, old: _updated(finite, new, old), updated, state), metrics

    return train_step


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
    zeros = jax.tree.map(
        lambda shape: jnp.zeros(shape.shape, shape.dtype),
        jax.eval_shape(loss_and_gradients, jax.tree.map(lambda a: a[0], parts)),
    )
    total, _ = jax.lax.scan(
        lambda total, part: (jax.tree.map(jnp.add, total, loss_and_gradients(part)), None), zeros, parts
    )
    return total


def make_eval_step(
    config: TrainConfig, model: qwen2.Qwen2Config, execution: qwen2.Execution
) -> Callable[[qwen2.Params, Batch], tuple[Float[Array, ""], Int[Array, ""]]]:
    """The function `(params, batch) -> (sum of token losses, number of tokens)`."""

    def eval_step(params: qwen2.Params, batch: Batch) -> tuple[Array, Array]:
        loss = summed_loss(config, model, execution, params, batch, jnp.float32(1.0))
        return loss, jnp.sum(batch["labels"] != IGNORE_INDEX)

    return eval_step
