"""What a model writes: the prefill of prompts, then one token after the other.

Letters as in `qwen2`, and T new tokens. Prompts of different lengths are padded on any side; `valid` says which columns
hold tokens.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int, Int32, PRNGKeyArray

from jaxchunk.errors import InputError
from jaxchunk.inference.cache import Cache, extend
from jaxchunk.inference.prefill import check_positions, prefill, unstack_layers
from jaxchunk.models import qwen2
from jaxchunk.models.qwen2 import Execution, Params, Qwen2Config


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
    num_chunks: int = 1,
) -> Generated:
    """Goes on from prompts until each row has a stop token or `max_new_tokens` T, in a compiled loop.

    Args:
      config: the architecture.
      params: parameters as for `prefill`.
      token_ids: prompts of at least a token each, padded on any side.
      valid: which columns hold tokens.
      key: of the sampling; without effect at temperature 0.
      execution: how to run the model; `attention` is that of the prefill, while decoding it is XLA's.
      max_new_tokens: T, at least 1.
      stop_ids: tokens that end a row.
      sampling: how tokens are chosen.
      num_chunks: of the prefill.

    Raises:
      InputError: as `prefill`, also where the new tokens would go beyond the model's positions.
    """
    logits, cache = _begin(config, params, token_ids, valid, execution, max_new_tokens, num_chunks)
    return _decode(
        config,
        params,
        logits,
        cache,
        key,
        execution=execution,
        max_new_tokens=max_new_tokens,
        stop_ids=stop_ids,
        sampling=sampling,
    )


def stream(
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
    num_chunks: int = 1,
) -> Iterator[Int32[np.ndarray, " B"]]:
    """The tokens of `generate`, one for each row as it is chosen; -1 for rows that have ended. Arguments as there."""
    logits, cache = _begin(config, params, token_ids, valid, execution, max_new_tokens, num_chunks)
    params = unstack_layers(params, execution.compute_dtype)
    chosen, done = _choose(logits, jnp.zeros(len(logits), bool), key, jnp.int32(0), stop_ids, sampling)
    ended = np.zeros(len(logits), bool)
    for step in range(1, max_new_tokens + 1):
        # The next step is under way while the caller looks at this one's tokens.
        tokens, ends = chosen, done
        if step < max_new_tokens:
            chosen, done, cache = _next(config, params, cache, chosen, done, key, step, execution, stop_ids, sampling)
        yield np.where(ended, -1, tokens).astype(np.int32)
        ended = np.asarray(ends)
        if ended.all():
            return


def _begin(
    config: Qwen2Config,
    params: Params,
    token_ids: Int[Array, "B S"],
    valid: Bool[Array, "B S"],
    execution: Execution,
    max_new_tokens: int,
    num_chunks: int,
) -> tuple[Float[Array, "B V"], Cache]:
    """The prefill, with room for what is to come; the last token is never put into the cache."""
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens is {max_new_tokens}; it must be at least 1")
    S = token_ids.shape[1]
    if not isinstance(valid, jax.core.Tracer):
        check_positions(config, int(np.sum(valid, axis=1).max(initial=0)) + max_new_tokens - 1)
    cache_size = S + max_new_tokens - 1
    return prefill(config, params, token_ids, valid, execution=execution, num_chunks=num_chunks, cache_size=cache_size)


@functools.partial(
    jax.jit,
    static_argnames=("config", "execution", "max_new_tokens", "stop_ids", "sampling"),
)
def _decode(
    config: Qwen2Config,
    params: Params,
    logits: Float[Array, "B V"],
    cache: Cache,
    key: PRNGKeyArray,
    *,
    execution: Execution,
    max_new_tokens: int,
    stop_ids: tuple[int, ...],
    sampling: Sampling,
) -> Generated:
    B = len(logits)
    params = qwen2.cast_weights(params, execution.compute_dtype)  # once, and not for every token

    def write(out: Generated, chosen: Array, done: Array, step: Array) -> Generated:
        tokens = jax.lax.dynamic_update_slice(out.token_ids, jnp.where(done, 0, chosen)[:, None], (0, step))
        return Generated(tokens, out.lengths + ~done)

    def go_on(state: tuple[Cache, Generated, Array, Array, Array]) -> Array:
        *_, done, step = state
        return (step < max_new_tokens) & ~jnp.all(done)

    def decode(state: tuple[Cache, Generated, Array, Array, Array]) -> tuple[Cache, Generated, Array, Array, Array]:
        cache, out, last, done, step = state
        logits, cache = _after(config, params, cache, last, execution)
        chosen, now_done = _choose(logits, done, key, step, stop_ids, sampling)
        return cache, write(out, chosen, done, step), chosen, now_done, step + 1

    nobody = jnp.zeros(B, bool)
    nothing = Generated(jnp.zeros((B, max_new_tokens), jnp.int32), jnp.zeros(B, jnp.int32))
    first, done = _choose(logits, nobody, key, jnp.int32(0), stop_ids, sampling)
    out = write(nothing, first, nobody, jnp.int32(0))
    _, out, *_ = jax.lax.while_loop(go_on, decode, (cache, out, first, done, jnp.int32(1)))
    return out


@functools.partial(jax.jit, static_argnames=("config", "execution", "stop_ids", "sampling"), donate_argnames=("cache",))
def _next(
    config: Qwen2Config,
    params: Params,
    cache: Cache,
    last: Int[Array, " B"],
    done: Bool[Array, " B"],
    key: PRNGKeyArray,
    step: Int[Array, ""],
    execution: Execution,
    stop_ids: tuple[int, ...],
    sampling: Sampling,
) -> tuple[Int[Array, " B"], Bool[Array, " B"], Cache]:
    logits, cache = _after(config, params, cache, last, execution)
    return *_choose(logits, done, key, step, stop_ids, sampling), cache


def _after(
    config: Qwen2Config, params: Params, cache: Cache, last: Int[Array, " B"], execution: Execution
) -> tuple[Float[Array, "B V"], Cache]:
    """Logits after one more token in each row."""
    hidden, cache = extend(config, params, cache, last[:, None], jnp.ones((len(last), 1), bool), execution)
    return qwen2.head_logits(params, hidden[:, 0]), cache


def _choose(
    logits: Float[Array, "B V"],
    done: Bool[Array, " B"],
    key: PRNGKeyArray,
    step: Int[Array, ""],
    stop_ids: tuple[int, ...],
    sampling: Sampling,
) -> tuple[Int[Array, " B"], Bool[Array, " B"]]:
    """The next token of each row, 0 where it has ended, and which rows have ended with it."""
    chosen = jnp.where(done, 0, next_token(logits, jax.random.fold_in(key, step), sampling))
    stops = functools.reduce(jnp.logical_or, [chosen == stop for stop in stop_ids], jnp.zeros_like(done))
    return chosen, done | stops


def next_token(logits: Float[Array, "B V"], key: PRNGKeyArray, sampling: Sampling) -> Int[Array, " B"]:
    """A token for every row."""
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / sampling.temperature
    if sampling.top_p < 1:
        order = jnp.argsort(-logits, axis=-1)
        ordered = jnp.take_along_axis(logits, order, axis=-1)
        probabilities = jax.nn.softmax(ordered, axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities  # what more probable tokens have together
        kept = jnp.where(before < sampling.top_p, ordered, -jnp.inf)
        place = jax.random.categorical(key, kept, axis=-1)
        return jnp.take_along_axis(order, place[:, None], axis=-1)[:, 0].astype(jnp.int32)
    return jax.random.categorical(key, logits, axis=-1).astype(jnp.int32)


def pad_prompts(prompts: Sequence[Sequence[int]]) -> tuple[Int[Array, "B S"], Bool[Array, "B S"]]:
    """Prompts padded on the left to the longest, and which columns hold tokens."""
    S = max(map(len, prompts))
    token_ids = jnp.asarray([[*[0] * (S - len(prompt)), *prompt] for prompt in prompts], jnp.int32)
    return token_ids, jnp.arange(S)[None, :] >= jnp.asarray([[S - len(prompt)] for prompt in prompts])
