"""Which attention implementation runs here."""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxchunk.models.qwen2 import AttentionImplementation, Qwen2Config


def choose_attention(
    config: Qwen2Config, seq_len: int, compute_dtype: DTypeLike
) -> tuple[AttentionImplementation, str]:
    """Settles on cuDNN's flash attention where it compiles, on XLA's attention elsewhere; with the reason.

    Compiling is the only test that does not go out of date: support depends on the GPU, on cuDNN's version and on JAX.
    """
    if jax.default_backend() != "gpu":
        return "xla", f"JAX runs on {jax.default_backend()}"
    if jnp.dtype(compute_dtype).itemsize != 2:
        return "xla", f"cuDNN attention needs a 16-bit dtype, not {jnp.dtype(compute_dtype).name}"
    heads = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
    operands = [jax.ShapeDtypeStruct((1, seq_len, n, config.head_dim), compute_dtype) for n in heads]

    def total(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        out = jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")
        return out.astype(jnp.float32).sum()

    try:
        jax.jit(jax.grad(total, (0, 1, 2))).lower(*operands).compile()
    except Exception as error:
        return "xla", f"cuDNN attention cannot run here: {str(error).splitlines()[0][:120]}"
    return "cudnn", "cuDNN flash attention compiles on this GPU"
