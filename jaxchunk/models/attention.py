"""Which attention implementation runs here."""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxchunk.errors import first_line
from jaxchunk.models.qwen2 import AttentionImplementation, Qwen2Config


def choose_attention(
    config: Qwen2Config,
    seq_len: int,
    compute_dtype: DTypeLike,
    requested: AttentionImplementation | None = None,
    *,
    packed: bool = False,
) -> tuple[AttentionImplementation, str]:
    """Settles on cuDNN's flash attention where it compiles, on XLA's attention elsewhere; with the reason.

    Compiling is the only test that does not go out of date: support depends on the GPU, on cuDNN's version and on JAX.
    `packed`: whether rows hold several sequences, which takes a mask.

    Raises:
      ValueError: "cudnn" is requested and cannot run here.
    """
    if requested == "xla":
        return "xla", "named by the caller"
    obstacle = _cudnn_obstacle(config, seq_len, compute_dtype, packed)
    if obstacle is None:
        return "cudnn", "cuDNN flash attention compiles on this GPU"
    if requested == "cudnn":
        raise ValueError(f"cuDNN attention cannot run: {obstacle}; use xla, or leave the choice open")
    return "xla", f"cuDNN attention cannot run: {obstacle}"


def _cudnn_obstacle(config: Qwen2Config, seq_len: int, compute_dtype: DTypeLike, packed: bool) -> str | None:
    if jax.default_backend() != "gpu":
        return f"JAX runs on {jax.default_backend()}"
    if jnp.dtype(compute_dtype).itemsize != 2:
        return f"it needs a 16-bit dtype, not {jnp.dtype(compute_dtype).name}"
    heads = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
    rows = 2 if packed else 1  # a mask for each row is another case for cuDNN than one for all
    operands = [jax.ShapeDtypeStruct((rows, seq_len, n, config.head_dim), compute_dtype) for n in heads]
    mask = jax.ShapeDtypeStruct((rows, 1, seq_len, seq_len), jnp.bool_) if packed else None

    def total(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None) -> jax.Array:
        out = jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=True, implementation="cudnn")
        return out.astype(jnp.float32).sum()

    try:
        jax.jit(jax.grad(total, (0, 1, 2))).lower(*operands, mask).compile()
    except Exception as error:
        return first_line(error)[:120]
    return None
