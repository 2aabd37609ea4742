"""Text from a model: prefill of a key/value cache, then one token after the other in a compiled loop.

Letters as in `qwen2`, and M columns of the cache, T new tokens. Prompts of different lengths are padded on either side:
`valid` says which columns hold tokens. A column that holds none is never attended to, and positions count tokens, not
columns, so that padding changes nothing.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Int, PRNGKeyArray

from jaxchunk.models import qwen2
from jaxchunk.models.qwen2 import Execution, Params, Qwen2Config


class Cache(NamedTuple):
    """Keys and values of all layers, in the compute dtype; `length` columns of M are written, `valid` those to see."""

    keys: Float[Array, "L B M K H"]
    values: Float[Array, "L B M K H"]
    valid: Bool[Array, "B M"]
    length: Int[Array, ""]


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
      temperature: 0 for the most probable token; else logits are divided by it.
      top_p: among the most probable tokens that together have at least this probability (arXiv:1904.09751).
    """

    temperature: float = 0.0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not (self.temperature >= 0 and 0 < self.top_p <= 1):
            raise ValueError(f"{self}: it needs temperature >= 0 and 0 < top_p <= 1")


GREEDY = Sampling()


class Generated(NamedTuple):
    """New tokens of each row, and how many of them there are; what follows them is 0. A stop token is the last."""

    token_ids: Int[Array, "B T"]
    lengths: Int[Array, " B"]


def empty_cache(config: Qwen2Config, batch_size: int, size: int, dtype: DTypeLike) -> Cache:
    """A cache of `size` columns with nothing in it."""
    shape = (config.num_hidden_layers, batch_size, size, config.num_key_value_heads, config.head_dim)
    return Cache(
        jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros((batch_size, size), bool), jnp.zeros((), jnp.int32)
    )


def extend(
    config: Qwen2Config,
    params: Params,
    cache: Cache,
    token_ids: Int[Array, "B S"],
    valid: Bool[Array, "B S"],
    execution: Execution,
) -> tuple[Float[Array, "B S D"], Cache]:
    """Runs the model over the next S columns: they see the cache and, causally, each other, and are added to it.

    A whole prompt, a chunk of one, or one token: what a prefill gives does not depend on how it is cut.

    Args:
      config: the architecture.
      params: parameters as for `qwen2.hidden_states`.
      cache: with room for S more columns; JAX would not notice that there is none.
      token_ids: ids in [0, V); any where not `valid`.
      valid: which columns hold tokens.
      execution: `compute_dtype` and `scan_layers` are used; attention is XLA's.

    Returns:
      Final hidden states (of no meaning where not `valid`) in the compute dtype, and the cache with the new columns.
    """
    S, M = token_ids.shape[1], cache.keys.shape[2]
    positions = jnp.sum(cache.valid, axis=1, keepdims=True) + jnp.cumsum(valid, axis=1) - 1
    rotation = qwen2.rope_rotation(config, jnp.maximum(positions, 0))
    seen = jax.lax.dynamic_update_slice(cache.valid, valid, (0, cache.length))
    columns = cache.length + jnp.arange(S)
    mask = (seen[:, None, :] & (jnp.arange(M)[None, None, :] <= columns[None, :, None]))[:, None]

    def run_layer(carry: tuple[Array, Array, Array], layer: Params) -> tuple[tuple[Array, Array, Array], None]:
        x, keys, values = carry
        index = layer["index"]

        def attend(q: Array, k: Array, v: Array) -> Array:
            nonlocal keys, values
            place = (index, 0, cache.length, 0, 0)
            keys = jax.lax.dynamic_update_slice(keys, k[None].astype(keys.dtype), place)
            values = jax.lax.dynamic_update_slice(values, v[None].astype(values.dtype), place)
            own_keys, own_values = (jax.lax.dynamic_index_in_dim(a, index, keepdims=False) for a in (keys, values))
            return jax.nn.dot_product_attention(q, own_keys, own_values, mask=mask, implementation="xla")

        x = qwen2.decoder_block(config, attend, rotation, x, layer)
        return (x, keys, values), None

    x = params["embedding"][token_ids].astype(execution.compute_dtype)
    layers = qwen2.cast_weights(params["layers"], execution.compute_dtype)
    layers["index"] = jnp.arange(config.num_hidden_layers)
    unroll = 1 if execution.scan_layers else config.num_hidden_layers
    # The cache is carried whole: as an output of every layer it would be copied in every step.
    (x, keys, values), _ = jax.lax.scan(run_layer, (x, cache.keys, cache.values), layers, unroll=unroll)
    hidden = qwen2.rms_norm(x, params["final_norm"], config.rms_norm_eps)
    return hidden, Cache(keys, values, seen, cache.length + S)


def prefill(
    config: Qwen2Config,
    params: Params,
    cache: Cache,
    token_ids: Int[Array, "B S"],
    valid: Bool[Array, "B S"],
    execution: Execution,
) -> tuple[Float[Array, "B V"], Cache]:
    """Adds prompts to the cache, arguments as for `extend`; returns the float32 logits after the last token of each."""
    hidden, cache = extend(config, params, cache, token_ids, valid, execution)
    last = jnp.max(jnp.where(valid, jnp.arange(valid.shape[1])[None, :], 0), axis=1)
    hidden = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
    return qwen2.head_logits(params, hidden), cache


@functools.partial(jax.jit, static_argnames=("config", "execution", "max_new_tokens", "stop_ids", "sampling"))
def generate(
    config: Qwen2Config,
    params: Params,
    token_ids: Int[Array, "B S"],
    valid: Bool[Array, "B S"],
    key: PRNGKeyArray,
    *,
    execution: Execution,
    max_new_tokens: int,
    stop_ids: tuple[int, ...] = (),
    sampling: Sampling = GREEDY,
) -> Generated:
    """Goes on from prompts until each row has a stop token or `max_new_tokens` T.

    Args:
      config: the architecture.
      params: parameters as for `qwen2.hidden_states`.
      token_ids: prompts of at least a token each, padded on either side.
      valid: which columns hold tokens.
      key: of the sampling; without effect at temperature 0.
      execution: how to run the model, as for `extend`.
      max_new_tokens: T, at least 1.
      stop_ids: tokens that end a row.
      sampling: how tokens are chosen.
    """
    B, S = token_ids.shape
    params = qwen2.cast_weights(params, execution.compute_dtype)  # once, and not for every token
    cache = empty_cache(config, B, S + max_new_tokens - 1, execution.compute_dtype)
    logits, cache = prefill(config, params, cache, token_ids, valid, execution)
    everyone = jnp.ones((B, 1), bool)

    def choose(logits: Array, out: Generated, done: Array, step: Array) -> tuple[Generated, Array]:
        chosen = jnp.where(done, 0, next_token(logits, jax.random.fold_in(key, step), sampling))
        tokens = jax.lax.dynamic_update_slice(out.token_ids, chosen[:, None], (0, step))
        stops = functools.reduce(jnp.logical_or, [chosen == stop for stop in stop_ids], jnp.zeros(B, bool))
        return Generated(tokens, out.lengths + ~done), done | stops

    def go_on(state: tuple[Cache, Generated, Array, Array]) -> Array:
        *_, done, step = state
        return (step < max_new_tokens) & ~jnp.all(done)

    def decode(state: tuple[Cache, Generated, Array, Array]) -> tuple[Cache, Generated, Array, Array]:
        cache, out, done, step = state
        last = jax.lax.dynamic_slice(out.token_ids, (0, step - 1), (B, 1))
        hidden, cache = extend(config, params, cache, last, everyone, execution)
        out, done = choose(qwen2.head_logits(params, hidden[:, 0]), out, done, step)
        return cache, out, done, step + 1

    nothing = Generated(jnp.zeros((B, max_new_tokens), jnp.int32), jnp.zeros(B, jnp.int32))
    out, done = choose(logits, nothing, jnp.zeros(B, bool), jnp.int32(0))
    _, out, _, _ = jax.lax.while_loop(go_on, decode, (cache, out, done, jnp.int32(1)))
    return out


def next_token(logits: Float[Array, "B V"], key: PRNGKeyArray, sampling: Sampling) -> Int[Array, " B"]:
    """A token for every row."""
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / sampling.temperature
    if sampling.top_p < 1:
        order = jnp.argsort(-logits, axis=-1)
        probabilities = jax.nn.softmax(jnp.take_along_axis(logits, order, axis=-1), axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities  # what more probable tokens have together
        kept = jnp.where(before < sampling.top_p, jnp.take_along_axis(logits, order, axis=-1), -jnp.inf)
        place = jax.random.categorical(key, kept, axis=-1)
        return jnp.take_along_axis(order, place[:, None], axis=-1)[:, 0].astype(jnp.int32)
    return jax.random.categorical(key, logits, axis=-1).astype(jnp.int32)


def pad_prompts(prompts: Sequence[Sequence[int]]) -> tuple[Int[Array, "B S"], Bool[Array, "B S"]]:
    """Prompts padded on the left to the longest, and which columns hold tokens."""
    S = max(map(len, prompts))
    token_ids = jnp.asarray([[*[0] * (S - len(prompt)), *prompt] for prompt in prompts], jnp.int32)
    return token_ids, jnp.arange(S)[None, :] >= jnp.asarray([[S - len(prompt)] for prompt in prompts])
