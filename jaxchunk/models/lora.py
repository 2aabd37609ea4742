"""LoRA: low-rank adapters beside frozen weights (arXiv:2106.09685), as functions on pytrees of parameters.

A projection with an adapter computes x W + (alpha / R) (x A) B. A [in, R] is random and B [R, out] zero at first, so
that training begins at the base model. Only A and B have gradients: W costs no GEMM for one, the LM head neither. The
base is kept in the dtype of the GEMMs (`qwen2.cast_weights`), which need no more of it.
"""

import dataclasses
import hashlib
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import PRNGKeyArray

from jaxchunk.models.qwen2 import Params, Qwen2Config, param_shapes

Target = Literal["q", "k", "v", "o", "gate", "up", "down"]
TARGETS: tuple[Target, ...] = get_args(Target)


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Adapters: their rank R, their weight `alpha / rank` in the sum, the projections that have one."""

    rank: int
    alpha: float
    targets: tuple[Target, ...] = TARGETS

    @property
    def scale(self) -> float:
        """Factor on every adapter's product."""
        return self.alpha / self.rank


def adapter_shapes(lora: LoraConfig, config: Qwen2Config) -> Params:
    """Shapes of the adapters: {"layers": {"q_lora_a": [L, in, R], "q_lora_b": [L, R, out], ...}}, float32."""
    weights = param_shapes(config)["layers"]
    layers = {}
    for name in lora.targets:
        L, inputs, outputs = weights[f"{name}_weight"].shape
        layers[f"{name}_lora_a"] = jax.ShapeDtypeStruct((L, inputs, lora.rank), jnp.float32)
        layers[f"{name}_lora_b"] = jax.ShapeDtypeStruct((L, lora.rank, outputs), jnp.float32)
    return {"layers": layers}


def init(lora: LoraConfig, config: Qwen2Config, key: PRNGKeyArray) -> Params:
    """Adapters that change nothing yet: A uniform within 1 / sqrt(in), as PEFT has it, and B zero."""
    shapes = adapter_shapes(lora, config)["layers"]
    keys = dict(zip(shapes, jax.random.split(key, len(shapes)), strict=True))

    def leaf(name: str, shape: tuple[int, ...]) -> Array:
        if name.endswith("_b"):
            return jnp.zeros(shape)
        bound = shape[1] ** -0.5
        return jax.random.uniform(keys[name], shape, minval=-bound, maxval=bound)

    return {"layers": {name: leaf(name, shape.shape) for name, shape in shapes.items()}}


def attach(lora: LoraConfig, base: Params, adapters: Params) -> Params:
    """Parameters for `qwen2.hidden_states`: those of the base, and adapters beside them. The scale goes into A."""
    scaled = {name: leaf * lora.scale if name.endswith("_a") else leaf for name, leaf in adapters["layers"].items()}
    return {**base, "layers": base["layers"] | scaled}


def merge(lora: LoraConfig, base: Params, adapters: Params) -> Params:
    """Parameters without adapters that compute the same: W + (alpha / R) A B, in the base's dtype."""
    layers = dict(base["layers"])
    for name in lora.targets:
        a, b = (adapters["layers"][f"{name}_lora_{factor}"] for factor in "ab")
        product = jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
        weight = layers[f"{name}_weight"]
        layers[f"{name}_weight"] = (weight + lora.scale * product).astype(weight.dtype)
    return {**base, "layers": layers}


def fingerprint(params: Params) -> str:
    """16 hex digits that tell these parameters from others; computed where they are, in one pass.

    Each array gives the sum of its values' bits, weighted by place, modulo 2^32.
    """
    sums = jax.device_get(_sums(params))
    names = jax.tree.map_with_path(lambda path, total: f"{jax.tree_util.keystr(path)} {int(total)}", sums)
    return hashlib.sha256("\n".join(sorted(jax.tree.leaves(names))).encode()).hexdigest()[:16]


@jax.jit
def _sums(params: Params) -> Params:
    return jax.tree.map(_weighted_bits, params)


def _weighted_bits(leaf: Array) -> Array:
    bits = jax.lax.bitcast_convert_type(leaf, f"uint{8 * leaf.dtype.itemsize}").astype(jnp.uint32)
    weights = jnp.ones((1,) * leaf.ndim, jnp.uint32)
    for axis, size in enumerate(leaf.shape):  # the weight of a place is a product of odd numbers, one for each axis
        along = jax.lax.iota(jnp.uint32, size) * np.uint32(2 * (2654435761 + axis) % 2**32) + np.uint32(1)
        weights = weights * along.reshape([size if a == axis else 1 for a in range(leaf.ndim)])
    return jnp.sum(bits * weights, dtype=jnp.uint32)
