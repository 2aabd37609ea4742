"""Prefill: prompts through the model, in one piece or in chunks of tokens, and their keys and values into a cache.

The chunks of a prompt go through the whole model one after the other and attend to the keys of those before them, so
that nothing but rounding depends on how a prompt is cut. Chunk P..P+T is compiled with P and T as numbers: it computes
nothing for keys that are not there yet, and needs no mask but the causal one of its own block.

That takes prompts that begin in column 0, where every column to the left of a token holds one of its own: padding is
moved to the right first, whichever side it was on. Letters as in `qwen2`, and M columns of the cache.

One layer is compiled, not the model: it is called once for every layer and chunk. That takes some 0.1 ms of the host a
call, which runs ahead of the device, and spares the compilation of L layers for every chunk.
"""

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Int

from jaxchunk.errors import InputError
from jaxchunk.inference.attention import attend_causally
from jaxchunk.inference.cache import Cache
from jaxchunk.lm_head import split_rows
from jaxchunk.models import qwen2, rope
from jaxchunk.models.qwen2 import AttentionImplementation, Execution, Params, Qwen2Config


def prefill(
    config: Qwen2Config,
    params: Params,
    token_ids: Int[Array, "B S"],
    valid: Bool[Array, "B S"] | None = None,
    *,
    execution: Execution,
    num_chunks: int = 1,
    cache_size: int | None = None,
) -> tuple[Float[Array, "B V"], Cache]:
    """Runs prompts through the model; the LM head for the last token of each only.

    Args:
      config: the architecture.
      params: parameters as for `qwen2.hidden_states`; those from `unstack_layers` save a copy of them in every call.
      token_ids: prompts of at least a token each, padded on any side, ids in [0, V).
      valid: which columns hold tokens; None for all.
      execution: `compute_dtype` and `attention` are used.
      num_chunks: chunks of ceil(S / num_chunks) columns; fewer where that many cover S.
      cache_size: M, at least S; None for S.

    Returns:
      The float32 logits after the last token of each prompt, and the cache. In its columns a row's tokens come first.

    Raises:
      InputError: no prompt, an empty one, one with more tokens than the model has positions, more chunks than columns,
        or a cache that is too small. An empty prompt is found where `valid` is known, not traced.
    """
    prompts = checked_prompts(config, token_ids, valid, num_chunks)
    B, S = token_ids.shape
    size = S if cache_size is None else cache_size
    if size < S:
        raise InputError(f"cache_size is {size}; the prompts have {S} columns, and the cache must hold them all")
    params = unstack_layers(params, execution.compute_dtype)
    memory = LayerCaches(config, B, size, execution.compute_dtype)
    lengths = jnp.sum(prompts.valid, axis=1)
    last = jnp.zeros((B, config.hidden_size), execution.compute_dtype)
    for start, x in chunk_states(config, params, prompts.token_ids, memory, execution, num_chunks):
        last = _pick(x, lengths - 1 - start, last)
    logits = last_logits(config, head_of(params), last)
    return logits, memory.cache(prompts.valid)


class Prompts(NamedTuple):
    """Prompts with their padding on the right.

    Attributes:
      token_ids: ids in [0, V); any where not `valid`.
      valid: which columns hold tokens: the first ones.
      places: where each column of the padded prompts that were given has gone to.
    """

    token_ids: Int[Array, "B S"]
    valid: Bool[Array, "B S"]
    places: Int[Array, "B S"]


def checked_prompts(
    config: Qwen2Config, token_ids: Int[Array, "B S"], valid: Bool[Array, "B S"] | None, num_chunks: int
) -> Prompts:
    """Prompts that can be cut into chunks.

    Raises:
      InputError: as `prefill` says.
    """
    if token_ids.ndim != 2 or 0 in token_ids.shape:
        raise InputError(f"token_ids have the shape {token_ids.shape}; give [prompts, tokens], at least one of each")
    B, S = token_ids.shape
    if not 1 <= num_chunks <= S:
        raise InputError(f"num_chunks is {num_chunks}; the prompts have {S} columns, so it must be from 1 to {S}")
    if valid is None:
        check_positions(config, S)
        return Prompts(token_ids, jnp.ones((B, S), bool), jnp.broadcast_to(jnp.arange(S), (B, S)))
    if valid.shape != token_ids.shape:
        raise InputError(f"valid has the shape {valid.shape}; it must be that of token_ids, {token_ids.shape}")
    if not isinstance(valid, jax.core.Tracer):
        counts = np.sum(valid, axis=1)
        if not counts.all():
            raise InputError(f"prompt {int(np.argmin(counts)) + 1} of {B} is empty; give it at least one token")
        check_positions(config, int(counts.max()))
    order = jnp.argsort(~valid, axis=1, stable=True)
    token_ids, valid = (jnp.take_along_axis(columns, order, axis=1) for columns in (token_ids, valid))
    return Prompts(token_ids, valid, jnp.argsort(order, axis=1))


def check_positions(config: Qwen2Config, num_tokens: int) -> None:
    """Refuses sequences that are longer than the model is for.

    Raises:
      InputError: naming both numbers.
    """
    if num_tokens > config.max_position_embeddings:
        raise InputError(
            f"a sequence has {num_tokens} tokens (new ones included); the model has {config.max_position_embeddings} "
            "positions"
        )


class LayerCaches:
    """The cache while it is filled: an array a layer, so that each can be written in place by its layer's program.

    Where `size` ends before a chunk does, that chunk's keys and values are not kept: nothing comes after it.
    """

    def __init__(self, config: Qwen2Config, batch_size: int, size: int, dtype: DTypeLike):
        shape = (batch_size, size, config.num_key_value_heads, config.head_dim)
        layers = range(config.num_hidden_layers)
        self.keys, self.values = ([jnp.zeros(shape, dtype) for _ in layers] for _ in "kv")

    def cache(self, valid: Bool[Array, "B S"]) -> Cache:
        """All layers in one; `valid` are the columns that hold tokens."""
        S, size = valid.shape[1], self.keys[0].shape[1]
        seen = jnp.pad(valid, ((0, 0), (0, size - S)))
        return Cache(_stack(self.keys), _stack(self.values), seen, jnp.asarray(S, jnp.int32))


def chunk_states(
    config: Qwen2Config,
    params: Params,
    token_ids: Int[Array, "B S"],
    memory: LayerCaches,
    execution: Execution,
    num_chunks: int,
) -> Iterator[tuple[int, Float[Array, "B T D"]]]:
    """First column and residual stream (before the last norm) of one chunk after the other.

    Args:
      config: the architecture.
      params: from `unstack_layers`.
      token_ids: padded on the right.
      memory: empty; it is filled.
      execution: as for `prefill`.
      num_chunks: as for `prefill`.
    """
    S = token_ids.shape[1]
    rows, count = split_rows(S, num_chunks)
    for start in range(0, rows * count, rows):
        x = _embed(params["embedding"], token_ids[:, start : start + rows], jnp.dtype(execution.compute_dtype))
        for index, layer in enumerate(params["layers"]):
            x, memory.keys[index], memory.values[index] = run_layer(
                config,
                layer,
                x,
                memory.keys[index],
                memory.values[index],
                start=start,
                attention=execution.attention,
            )
        yield start, x


def lower_layers(
    config: Qwen2Config,
    params: Params,
    shape: tuple[int, int],
    *,
    execution: Execution,
    num_chunks: int,
) -> list[jax.stages.Lowered]:
    """The programs of one layer that `prefill` calls for prompts of `shape` [B, S], one for each chunk, lowered.

    `prefill` finds what has been compiled; several can be compiled at once, in threads. Arguments as there, `params`
    from `unstack_layers`.
    """
    B, S = shape
    rows, count = split_rows(S, num_chunks)
    layer = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params["layers"][0])
    memory = jax.ShapeDtypeStruct((B, S, config.num_key_value_heads, config.head_dim), execution.compute_dtype)

    def lower(start: int) -> jax.stages.Lowered:
        x = jax.ShapeDtypeStruct((B, min(rows, S - start), config.hidden_size), execution.compute_dtype)
        return run_layer.lower(config, layer, x, memory, memory, start=start, attention=execution.attention)

    return [lower(start) for start in range(0, rows * count, rows)]


@functools.partial(jax.jit, static_argnames=("config", "start", "attention"), donate_argnames=("x", "keys", "values"))
def run_layer(
    config: Qwen2Config,
    layer: Params,
    x: Float[Array, "B T D"],
    keys: Float[Array, "B M K H"],
    values: Float[Array, "B M K H"],
    *,
    start: int,
    attention: AttentionImplementation,
) -> tuple[Float[Array, "B T D"], Float[Array, "B M K H"], Float[Array, "B M K H"]]:
    """One layer on the columns from `start` on, which see the cache up to there; adds theirs if the cache has room."""
    stop = start + x.shape[1]
    rotation = rope.rotation(config, jnp.arange(start, stop))

    def attend(q: Array, k: Array, v: Array) -> Array:
        nonlocal keys, values
        if stop <= keys.shape[1]:
            keys, values = (jax.lax.dynamic_update_slice(a, b, (0, start, 0, 0)) for a, b in ((keys, k), (values, v)))
        # Read after it was written, or XLA would copy the cache to keep both.
        return attend_causally(q, k, v, keys[:, :start], values[:, :start], attention)

    x = qwen2.decoder_block(config, attend, rotation, x, layer)
    return x, keys, values


def unstack_layers(params: Params, dtype: DTypeLike) -> Params:
    """Parameters in the compute dtype, with a tuple of layers in place of stacked ones, each in arrays of its own.

    Out of a stack every call would have to take its layer first, which is a copy.

    Args:
      params: as for `qwen2.hidden_states`; what is unstacked already is returned as it is.
      dtype: the compute dtype.
    """
    if isinstance(params["layers"], tuple):
        return params
    others = {name: leaf for name, leaf in params.items() if name != "layers"}
    count = len(params["layers"]["attention_norm"])
    layers = tuple(_layer_of(params["layers"], index, jnp.dtype(dtype)) for index in range(count))
    return qwen2.cast_weights(others, dtype) | {"layers": layers}


def head_of(params: Params) -> Params:
    """What comes behind the last layer: its norm and the LM head."""
    return {"final_norm": params["final_norm"], "lm_head": qwen2.lm_head_weight(params)}


@functools.partial(jax.jit, static_argnames=("config",))
def last_logits(config: Qwen2Config, head: Params, x: Float[Array, "B D"]) -> Float[Array, "B V"]:
    """Float32 logits from the residual stream; `head` is from `head_of`."""
    return qwen2.head_logits(head, qwen2.rms_norm(x, head["final_norm"], config.rms_norm_eps))


@functools.partial(jax.jit, static_argnames=("dtype",))
def _layer_of(layers: Params, index: int, dtype: Any) -> Params:
    return qwen2.cast_weights(
        jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, index, keepdims=False), layers), dtype
    )


@functools.partial(jax.jit, static_argnames=("dtype",))
def _embed(embedding: Array, token_ids: Array, dtype: Any) -> Array:
    return embedding[token_ids].astype(dtype)


@jax.jit
def _pick(x: Float[Array, "B T D"], column: Int[Array, " B"], otherwise: Float[Array, "B D"]) -> Float[Array, "B D"]:
    """The column of each row where it lies in this chunk."""
    T = x.shape[1]
    found = jnp.take_along_axis(x, jnp.clip(column, 0, T - 1)[:, None, None], axis=1)[:, 0]
    return jnp.where(((column >= 0) & (column < T))[:, None], found, otherwise)


@jax.jit
def _stack(arrays: list[Array]) -> Array:
    return jnp.stack(arrays)
