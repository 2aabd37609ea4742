"""How norms and SwiGLU run here."""

import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxchunk.lm_head import dispatch
from jaxchunk.models.qwen2 import Elementwise


def choose_elementwise(requested: Elementwise | None, compute_dtype: DTypeLike) -> tuple[Elementwise, str]:
    """Settles on how norms and SwiGLU run, with the reason: as kernels wherever these can run.

    Raises:
      ValueError: kernels are asked for by name where they cannot run.
    """
    obstacle = dispatch.pallas_obstacle(dispatch.default_platform(), jnp.dtype(compute_dtype))
    if requested == "pallas" and obstacle is not None:
        raise ValueError(f"--elementwise pallas cannot run: {obstacle}; use xla, or leave it out")
    if requested is not None:
        return requested, "named by the caller"
    return ("pallas", "the device is an NVIDIA GPU") if obstacle is None else ("xla", f"pallas cannot run: {obstacle}")
