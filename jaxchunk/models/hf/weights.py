"""Parameters to tensors of Hugging Face and back: the names, the transposes, and what is checked on the way."""

from collections.abc import Callable, Iterator, Set
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jaxchunk.errors import InputError
from jaxchunk.models.hf.shards import Shards, write_shards
from jaxchunk.models.qwen2 import Params, Qwen2Config, param_shapes

# Our parameter, and Hugging Face's tensor ("{}": the layer). PyTorch's linear layers store [out, in], the transpose of
# the layers' "..._weight" here; embedding and LM head are [V, D] in both.
NAMES = {
    "embedding": "model.embed_tokens.weight",
    "layers/attention_norm": "model.layers.{}.input_layernorm.weight",
    "layers/q_weight": "model.layers.{}.self_attn.q_proj.weight",
    "layers/q_bias": "model.layers.{}.self_attn.q_proj.bias",
    "layers/k_weight": "model.layers.{}.self_attn.k_proj.weight",
    "layers/k_bias": "model.layers.{}.self_attn.k_proj.bias",
    "layers/v_weight": "model.layers.{}.self_attn.v_proj.weight",
    "layers/v_bias": "model.layers.{}.self_attn.v_proj.bias",
    "layers/o_weight": "model.layers.{}.self_attn.o_proj.weight",
    "layers/mlp_norm": "model.layers.{}.post_attention_layernorm.weight",
    "layers/gate_weight": "model.layers.{}.mlp.gate_proj.weight",
    "layers/up_weight": "model.layers.{}.mlp.up_proj.weight",
    "layers/down_weight": "model.layers.{}.mlp.down_proj.weight",
    "final_norm": "model.norm.weight",
    "lm_head": "lm_head.weight",
}

Place: TypeAlias = Callable[[tuple[Any, ...], np.ndarray], jax.Array]
"""Makes an array of a parameter's path in `Params` and its values."""

_DTYPES = {"F32": jnp.dtype("float32"), "BF16": jnp.dtype("bfloat16"), "F16": jnp.dtype("float16")}


class Tensor(NamedTuple):
    """A tensor of Hugging Face and where it is here: `parameter` as in `NAMES`, `layer` None outside of the blocks."""

    name: str
    parameter: str
    layer: int | None
    shape: tuple[int, ...]

    @property
    def transposed(self) -> bool:
        """Whether it is stored as the transpose of what the model multiplies with."""
        return self.layer is not None and len(self.shape) == 2


def tensors_of(config: Qwen2Config) -> Iterator[Tensor]:
    """All tensors of a checkpoint, in the order in which transformers stores them."""
    shapes = _by_name(param_shapes(config))
    stacked = [parameter for parameter in NAMES if parameter in shapes and parameter.startswith("layers/")]
    yield Tensor(NAMES["embedding"], "embedding", None, shapes["embedding"].shape)
    for layer in range(config.num_hidden_layers):
        for parameter in stacked:
            yield Tensor(NAMES[parameter].format(layer), parameter, layer, shapes[parameter].shape[:0:-1])
    for parameter in ("final_norm", "lm_head"):
        if parameter in shapes:
            yield Tensor(NAMES[parameter], parameter, None, shapes[parameter].shape)


def read_params(config: Qwen2Config, directory: Path, dtype: DTypeLike | None, place: Place | None = None) -> Params:
    """Reads the parameters; beside what is on the device, one of them at a time is in memory.

    Args:
      config: the checkpoint's architecture.
      directory: where its safetensors files are.
      dtype: what to convert to; None for that of the checkpoint.
      place: where to; None for JAX's default device.

    Raises:
      InputError: a tensor is missing, unexpected, of another shape or dtype, or not finite.
    """
    shards = Shards(directory)
    tensors = list(tensors_of(config))
    _check_tied_head(config, shards)
    _check_headers(tensors, shards, directory)
    dtype = _stored_dtype(tensors, shards, directory) if dtype is None else jnp.dtype(dtype)
    parts: dict[str, list[Tensor]] = {}
    for tensor in tensors:
        parts.setdefault(tensor.parameter, []).append(tensor)

    def leaf(path: tuple, shape: jax.ShapeDtypeStruct) -> jax.Array:
        values = np.empty(shape.shape, dtype)
        for tensor in parts[_name(path)]:
            part = _cast(shards.read(tensor.name), dtype, tensor.name, str(shards.tensors[tensor.name].path))
            values[... if tensor.layer is None else tensor.layer] = part.T if tensor.transposed else part
        return jnp.asarray(values) if place is None else place(path, values)

    return jax.tree.map_with_path(leaf, param_shapes(config))


def write_params(
    config: Qwen2Config, params: Params, directory: Path, dtype: DTypeLike | None, max_shard_size: int
) -> None:
    """Writes the parameters as safetensors into an existing directory; what `read_params` reads.

    Raises:
      InputError: the parameters are not those of `config`, or one is not finite.
    """
    check_params(config, params)
    leaves = _by_name(params)
    tensors = {tensor.name: tensor for tensor in tensors_of(config)}

    def stored_dtype(tensor: Tensor) -> np.dtype:
        return leaves[tensor.parameter].dtype if dtype is None else jnp.dtype(dtype)

    def value(name: str) -> np.ndarray:
        tensor = tensors[name]
        leaf = leaves[tensor.parameter]
        part = np.asarray(leaf if tensor.layer is None else leaf[tensor.layer])
        part = _cast(part, stored_dtype(tensor), name, "the parameters")
        return part.T if tensor.transposed else part

    sizes = {name: int(np.prod(t.shape)) * stored_dtype(t).itemsize for name, t in tensors.items()}
    write_shards(directory, sizes, value, max_shard_size)


def check_params(config: Qwen2Config, params: Params) -> None:
    """Checks that parameters are of an architecture.

    Raises:
      InputError: one is missing, unexpected, of another shape, or not in a dtype that a checkpoint has.
    """
    expected, given = _by_name(param_shapes(config)), _by_name(params)
    _check_names(expected.keys(), given.keys(), "the parameters are not of this config")
    for name, leaf in given.items():
        if leaf.shape != expected[name].shape:
            raise InputError(f"parameter {name} is {list(leaf.shape)}; the config needs {list(expected[name].shape)}")
        if leaf.dtype not in _DTYPES.values():
            raise InputError(f"parameter {name} is {leaf.dtype}; a checkpoint holds float32, bfloat16 or float16")


def _by_name(params: Params) -> dict[str, jax.Array]:
    return {_name(path): leaf for path, leaf in jax.tree.leaves_with_path(params)}


def _name(path: tuple) -> str:
    return "/".join(entry.key for entry in path)


def _check_names(expected: Set[str], given: Set[str], where: str) -> None:
    for kind, names in (("missing", expected - given), ("unexpected", given - expected)):
        if names:
            first = ", ".join(sorted(names)[:3]) + (", ..." if len(names) > 3 else "")
            raise InputError(f"{where}: {len(names)} {kind} ({first})")


def _check_tied_head(config: Qwen2Config, shards: Shards) -> None:
    """Some tied checkpoints store the LM head as well: it is left out where it is the embedding."""
    head, embedding = NAMES["lm_head"], NAMES["embedding"]
    if not config.tie_word_embeddings or head not in shards.tensors or embedding not in shards.tensors:
        return
    if not np.array_equal(shards.read(head), shards.read(embedding)):
        raise InputError(
            f"{shards.tensors[head].path}: tie_word_embeddings is true, but {head} differs from {embedding}; "
            "set tie_word_embeddings to false in config.json if this head is to be used"
        )
    del shards.tensors[head]


def _check_headers(tensors: list[Tensor], shards: Shards, directory: Path) -> None:
    """Everything that the headers tell, before anything large is read."""
    where = f"the tensors in {directory} are not those of its config.json"
    _check_names({tensor.name for tensor in tensors}, shards.tensors.keys(), where)
    for tensor in tensors:
        stored = shards.tensors[tensor.name]
        if stored.shape != tensor.shape:
            raise InputError(
                f"{stored.path}: {tensor.name} is {list(stored.shape)}; its config.json needs {list(tensor.shape)}"
            )
        if stored.dtype not in _DTYPES:
            raise InputError(
                f"{stored.path}: {tensor.name} is stored as {stored.dtype}; only {', '.join(_DTYPES)} are read here"
            )


def _stored_dtype(tensors: list[Tensor], shards: Shards, directory: Path) -> np.dtype:
    dtypes = {_DTYPES[shards.tensors[tensor.name].dtype] for tensor in tensors}
    if len(dtypes) > 1:
        names = " and ".join(sorted(str(dtype) for dtype in dtypes))
        raise InputError(f"{directory} holds {names}; say with dtype= which one the parameters are to have")
    return dtypes.pop()


def _cast(values: np.ndarray, dtype: np.dtype, name: str, where: str) -> np.ndarray:
    with np.errstate(over="ignore"):  # it is infinite then, and said below
        values = values.astype(dtype, copy=False)
    finite = np.isfinite(values)
    if not finite.all():
        bad = int((~finite).sum())
        raise InputError(f"{where}: {name} has {bad:,} of {values.size:,} values that are NaN or infinite as {dtype}")
    return values
