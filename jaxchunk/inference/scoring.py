"""How probable a text is: log-probabilities of its tokens, through the LM head in chunks."""

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from jaxchunk.inference.prefill import LayerCaches, checked_prompts, chunk_states, head_of, unstack_layers
from jaxchunk.lm_head import Head, choose_implementation, makes_logits, split_rows, token_log_probs
from jaxchunk.models import qwen2
from jaxchunk.models.qwen2 import Execution, Params, Qwen2Config

HEAD_TOKENS = 512
"""Tokens in a chunk of the LM head: at a vocabulary of 152k, 311 MB of float32 logits."""
HEAD_TOKENS_WITHOUT_LOGITS = 8192
"""The same where logits are never in memory: 26 MB of partial sums, one for 192 columns of a row."""
_IGNORED = -100


def score(
    config: Qwen2Config,
    params: Params,
    token_ids: Int[Array, "B S"],
    valid: Bool[Array, "B S"] | None = None,
    *,
    execution: Execution,
    num_chunks: int = 1,
    head_implementation: str | None = None,
) -> Float[Array, "B S"]:
    """Log-probability of each token after those before it; 0 for the first token of a row, and where there is none.

    Logits exist for `HEAD_TOKENS` tokens at a time, whatever the length, or with the fused LM head for none.

    Args:
      config: the architecture.
      params: parameters as for `prefill`.
      token_ids: texts, as the prompts of `prefill`.
      valid: which columns hold tokens; None for all.
      execution: as for `prefill`.
      num_chunks: chunks of the texts that go through the model one after the other.
      head_implementation: of the LM head, as in `token_log_probs`.

    Raises:
      InputError: as `prefill`.
    """
    prompts = checked_prompts(config, token_ids, valid, num_chunks)
    B, S = token_ids.shape
    after = jnp.where(prompts.valid[:, 1:], prompts.token_ids[:, 1:], _IGNORED)
    labels = jnp.pad(after, ((0, 0), (0, 1)), constant_values=_IGNORED)
    rows, count = split_rows(S, num_chunks)
    params, dtype = unstack_layers(params, execution.compute_dtype), execution.compute_dtype
    memory = LayerCaches(config, B, rows * (count - 1), dtype)  # nothing comes after the last chunk
    found = [
        _log_probs(config, head_of(params), x, labels[:, start : start + x.shape[1]], head_implementation)
        for start, x in chunk_states(config, params, prompts.token_ids, memory, execution, num_chunks)
    ]
    log_probs = jnp.pad(jnp.concatenate(found, axis=1)[:, :-1], ((0, 0), (1, 0)))
    return jnp.take_along_axis(log_probs, prompts.places, axis=1)


def head_chunks(num_tokens: int, implementation: str) -> int:
    """Chunks that an implementation of the LM head takes so many tokens in."""
    return -(-num_tokens // (HEAD_TOKENS if makes_logits(implementation) else HEAD_TOKENS_WITHOUT_LOGITS))


@functools.partial(jax.jit, static_argnames=("config", "implementation"))
def _log_probs(
    config: Qwen2Config, head: Params, x: Float[Array, "B T D"], labels: Int[Array, "B T"], implementation: str | None
) -> Float[Array, "B T"]:
    hidden, weight = qwen2.rms_norm(x, head["final_norm"], config.rms_norm_eps), head["lm_head"]
    V, D = weight.shape
    chosen = choose_implementation(implementation, compute_dtype=hidden.dtype, head=Head(D, V)).implementation
    return token_log_probs(
        hidden,
        weight,
        labels,
        num_chunks=head_chunks(labels.size, chosen),
        implementation=implementation,
        ignore_index=_IGNORED,
    )
