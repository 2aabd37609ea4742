"""The key/value cache, and the model run over the next tokens with it.

Letters as in `qwen2`, and M columns of the cache. `valid` says which columns hold tokens. A column that holds none is
never attended to, and positions count tokens, not columns, so that padding changes nothing.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Int

from jaxchunk.errors import InputError
from jaxchunk.models import qwen2, rope
from jaxchunk.models.qwen2 import Execution, Params, Qwen2Config


class Cache(NamedTuple):
    """Keys and values of all layers, in the compute dtype; `length` columns of M are written, `valid` those to see."""

    keys: Float[Array, "L B M K H"]
    values: Float[Array, "L B M K H"]
    valid: Bool[Array, "B M"]
    length: Int[Array, ""]


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

    How full the cache is need not be known when this is compiled, so a mask decides what is seen, over all M columns:
    right for a token, or a few. `prefill` is for prompts.

    Args:
      config: the architecture.
      params: parameters as for `qwen2.hidden_states`, or as from `unstack_layers`.
      cache: with room for S more columns.
      token_ids: ids in [0, V); any where not `valid`.
      valid: which columns hold tokens.
      execution: `compute_dtype` and `scan_layers` are used; attention is XLA's.

    Returns:
      Final hidden states (of no meaning where not `valid`) in the compute dtype, and the cache with the new columns.

    Raises:
      InputError: there is no room. Where the cache's length is traced, only S can be looked at.
    """
    S, M = token_ids.shape[1], cache.keys.shape[2]
    length = 0 if isinstance(cache.length, jax.core.Tracer) else int(cache.length)
    if length + S > M:
        raise InputError(f"the cache has {M} columns, of which {length} are used; there is no room for {S} more")
    positions = jnp.sum(cache.valid, axis=1, keepdims=True) + jnp.cumsum(valid, axis=1) - 1
    rotation = rope.rotation(config, jnp.maximum(positions, 0))
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
    carry = (x, cache.keys, cache.values)
    if isinstance(params["layers"], tuple):
        for index, layer in enumerate(params["layers"]):
            carry, _ = run_layer(carry, qwen2.cast_weights(layer, execution.compute_dtype) | {"index": index})
    else:
        layers = qwen2.cast_weights(params["layers"], execution.compute_dtype)
        layers["index"] = jnp.arange(config.num_hidden_layers)
        unroll = 1 if execution.scan_layers else config.num_hidden_layers
        # The cache is carried whole: as an output of every layer it would be copied in every step.
        carry, _ = jax.lax.scan(run_layer, carry, layers, unroll=unroll)
    x, keys, values = carry
    hidden = qwen2.rms_norm(x, params["final_norm"], config.rms_norm_eps)
    return hidden, Cache(keys, values, seen, cache.length + S)
