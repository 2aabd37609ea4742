"""How a Qwen2 lies over a mesh of three axes, and the collectives that follow from it inside of a `jax.shard_map`.

    data    whole copies: every device has its own sequences
    fsdp    every device has its own sequences, and a slice along D of every matrix, which is gathered where it is used
            (ZeRO-3, arXiv:1910.02054)
    model   heads, feed-forward width and vocabulary are sliced (Megatron-LM, arXiv:1909.08053)

Backward collectives follow from the types of `jax.shard_map` (check_vma=True), but for those of `gather`. Axes with one
device are left out of everything: XLA does not always remove a sum over one.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import AbstractMesh, Mesh, PartitionSpec
from jaxtyping import Float, Int

DATA, FSDP, MODEL = AXES = "data", "fsdp", "model"
TOKEN_AXES = DATA, FSDP
"""Axes over which sequences are sharded."""

_OUTSIDE: dict[str, tuple[str, ...]] = {"embedding": (MODEL, FSDP), "lm_head": (MODEL, FSDP), "final_norm": ()}
_IN_A_BLOCK: dict[str, tuple[str, ...]] = {  # without the leading dimension L
    **dict.fromkeys(("attention_norm", "mlp_norm"), ()),
    **dict.fromkeys(("q_weight", "k_weight", "v_weight", "gate_weight", "up_weight"), (FSDP, MODEL)),
    **dict.fromkeys(("q_k_v_weight", "gate_up_weight"), (FSDP, MODEL)),  # as blocks run (`qwen2.side_by_side`)
    "q_k_v_bias": (MODEL,),
    **dict.fromkeys(("q_bias", "k_bias", "v_bias"), (MODEL,)),
    **dict.fromkeys(("o_weight", "down_weight"), (MODEL, FSDP)),
}


def partition_spec(path: tuple[Any, ...], mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """How a parameter is sharded, by its path in `qwen2.Params` or in a tree that holds such trees.

    Raises:
      ValueError: no rule knows it.
    """
    name = getattr(path[-1], "key", None)
    if name not in _OUTSIDE and name not in _IN_A_BLOCK:
        raise ValueError(f"no rule says how {jax.tree_util.keystr(path)} lies over a mesh")
    axes = _OUTSIDE[name] if name in _OUTSIDE else (None, *_IN_A_BLOCK[name])
    return PartitionSpec(*(axis if axis is not None and mesh.shape[axis] > 1 else None for axis in axes))


def batch_spec(mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """How an array is sharded whose first dimension is sequences."""
    return PartitionSpec(tuple(axis for axis in TOKEN_AXES if mesh.shape[axis] > 1) or None)


def in_use(*axes: str) -> tuple[str, ...]:
    """Those of the axes that have several devices; inside of the `jax.shard_map`."""
    return tuple(axis for axis in axes if lax.axis_size(axis) > 1)


def gather_block(block: dict[str, Array], dtype: jnp.dtype) -> dict[str, Array]:
    """One block's parameters (without the dimension L), matrices whole along D; all but norms in `dtype`."""
    return {
        name: leaf if name.endswith("norm") else gather(leaf, _IN_A_BLOCK[name], dtype) for name, leaf in block.items()
    }


def gather_vocabulary(weight: Float[Array, "v d"]) -> Float[Array, "v D"]:
    """Embedding or LM head, whole along D, in its own dtype: the loss wants to round the sum of its gradients last."""
    return gather(weight, (MODEL, FSDP), weight.dtype)


def gather(shard: Array, axes: tuple[str, ...], dtype: jnp.dtype) -> Array:
    """The array in `dtype`, whole along the dimension that `axes` says is sharded over fsdp.

    It travels in `dtype`; its gradient is summed over devices in the dtype of `shard`.
    """
    if FSDP not in axes or not in_use(FSDP):
        return shard.astype(dtype)
    return _gather(shard, axes.index(FSDP), dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gather(shard: Array, dimension: int, dtype: jnp.dtype) -> Array:
    return lax.all_gather(shard.astype(dtype), FSDP, axis=dimension, tiled=True)


def _gather_forward(shard: Array, dimension: int, dtype: jnp.dtype) -> tuple[Array, Array]:
    return _gather(shard, dimension, dtype), jnp.zeros((), shard.dtype)


def _gather_backward(dimension: int, dtype: jnp.dtype, like: Array, gradient: Array) -> tuple[Array]:
    del dtype
    return (lax.psum_scatter(gradient.astype(like.dtype), FSDP, scatter_dimension=dimension, tiled=True),)


_gather.defvjp(_gather_forward, _gather_backward)


def sum_over_model(x: Array) -> Array:
    """The sum of what the devices along the model axis have of a product whose inner dimension they share out."""
    return lax.psum(x, MODEL) if in_use(MODEL) else x


def embed(table: Float[Array, "v D"], token_ids: Int[Array, "B S"]) -> Float[Array, "B S D"]:
    """Rows of an embedding whose vocabulary is sliced over the model axis."""
    if not in_use(MODEL):
        return table[token_ids]
    first = lax.axis_index(MODEL) * table.shape[0]
    here = (token_ids >= first) & (token_ids < first + table.shape[0])
    rows = table[jnp.where(here, token_ids - first, 0)]
    return sum_over_model(jnp.where(here[..., None], rows, 0))


def all_but_gathered(primitive: Any, *_: Any, **__: Any) -> bool:
    """A policy of `jax.checkpoint`: the backward pass gathers again instead of keeping every block's matrices."""
    return bool(primitive.name != "all_gather")
