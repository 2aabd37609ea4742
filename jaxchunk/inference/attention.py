"""Causal attention of a chunk of T tokens to the P before it and, up to each token, to the chunk itself.

JAX's causal mask, cuDNN's too, is aligned to the first key: query i sees keys 0 to i. Here it must see P more. A mask
would be a bias for cuDNN: 2 bytes for every query and key, read in every head, and the upper half of the chunk's own
block would be computed to be masked. So cuDNN is called twice, without a mask on the P keys and with its causal mask on
the T, which skips what it masks; the two are put together by their softmax denominators, as the blocks of flash
attention are (Dao et al., 2022, arXiv:2205.14135). That costs a pass over the chunk's outputs.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from jaxchunk.models.qwen2 import AttentionImplementation

Part = tuple[Float[Array, "B T N H"], Float[Array, "B T N 1"]]
"""Attention to some of the keys, and the logarithm of its softmax denominator in float32."""


def attend_causally(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    before_k: Float[Array, "B P K H"],
    before_v: Float[Array, "B P K H"],
    implementation: AttentionImplementation,
) -> Float[Array, "B T N H"]:
    """Attention of query i to all P keys before the chunk and to the chunk's keys 0 to i; P may be 0."""
    T, P = q.shape[1], before_k.shape[1]
    if P == 0:
        return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation=implementation)
    if implementation == "cudnn":
        return merge(_part(q, before_k, before_v, is_causal=False), _part(q, k, v, is_causal=True))
    keys, values = jnp.concatenate([before_k, k], axis=1), jnp.concatenate([before_v, v], axis=1)
    mask = jnp.arange(P + T)[None, :] <= P + jnp.arange(T)[:, None]
    return jax.nn.dot_product_attention(q, keys, values, mask=mask[None, None], implementation="xla")


def merge(one: Part, other: Part) -> Float[Array, "B T N H"]:
    """Attention to the keys of both parts; in float32 until the end."""
    (out, lse), (other_out, other_lse) = one, other
    share = jax.nn.sigmoid(lse - other_lse)  # of the first part in the common denominator
    merged = share * out.astype(jnp.float32) + (1 - share) * other_out.astype(jnp.float32)
    return merged.astype(out.dtype)


def _part(q: Array, k: Array, v: Array, *, is_causal: bool) -> Part:
    """Attention by cuDNN with the denominators that it keeps for the backward pass.

    `return_residual` would give them too, but rounded to the dtype of the output: 1% of a token's weights at 32k keys.
    """
    B, T = q.shape[:2]
    num_keys = k.shape[1]
    # JAX refuses odd lengths to a gradient, as if there were a bias. A key too many is after every causal query.
    q, k, v = (jnp.pad(a, ((0, 0), (0, a.shape[1] % 2), (0, 0), (0, 0))) for a in (q, k, v))
    lengths = jnp.full((B,), num_keys, jnp.int32) if num_keys % 2 and not is_causal else None

    def attend(q: Array) -> Array:
        return jax.nn.dot_product_attention(
            q, k, v, is_causal=is_causal, key_value_seq_lengths=lengths, implementation="cudnn"
        )

    out, pullback = jax.vjp(attend, q)
    (lse,) = [leaf for leaf in jax.tree.leaves(pullback) if leaf.dtype == jnp.float32 and leaf.ndim == 3]
    return out[:, :T], jnp.swapaxes(lse[..., :T], 1, 2)[..., None]
