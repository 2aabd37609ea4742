"""Where the loss runs on a mesh: axes that are manual already, or a `jax.shard_map` around the whole loss."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax import Array, lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxchunk.lm_head.varying import varying_axes

AxisNames = str | tuple[str, ...] | None


class Placement(NamedTuple):
    """How tokens and vocabulary lie over a mesh.

    Attributes:
      token_axes: axes over which tokens are sharded and the loss is summed.
      vocab_axes: axes over which the vocabulary is sharded.
      mesh: the mesh to put a `jax.shard_map` over, or None where the axes are manual already or there are none.
      leading: mesh axes of each leading dimension of `hidden`, for that `shard_map`.
    """

    token_axes: tuple[str, ...] = ()
    vocab_axes: tuple[str, ...] = ()
    mesh: Any = None
    leading: tuple[Any, ...] = ()


def place(token_axis: AxisNames, vocab_axis: AxisNames, operands: Any, vocab_dim: int) -> Placement:
    """Settles on axes and mesh: the ones named, or those that the types of operands over Explicit axes hold.

    Args:
      token_axis: as given to the loss.
      vocab_axis: as given to the loss.
      operands: `api.Operands`.
      vocab_dim: the dimension of the weight that is V.

    Raises:
      ValueError: an axis does not exist, does not divide what it shards, or is used in a way that would give wrong
        gradients.
    """
    token_axes, vocab_axes = _names("token_axis", token_axis), _names("vocab_axis", vocab_axis)
    both = set(token_axes) & set(vocab_axes)
    if both:
        raise ValueError(
            f"token_axis is {token_axis!r} and vocab_axis {vocab_axis!r}; an axis can shard one of the two"
        )
    context = jax.sharding.get_abstract_mesh()
    hidden, weight = operands.hidden, operands.weight
    mesh = _mesh_of(context, hidden, weight)
    leading: tuple[Any, ...] = ()
    if not token_axes and not vocab_axes:
        if not any(_axes_of(array) for array in operands if array is not None):
            return Placement()
        token_axes, vocab_axes, leading = _explicit_axes(operands, vocab_dim)
    for option, axes in (("token_axis", token_axes), ("vocab_axis", vocab_axes)):
        for axis in axes:
            if axis not in mesh.axis_names:
                raise ValueError(f"{option} is {axis!r}; {_axes_in_words(mesh)}")
    named, manual = {*token_axes, *vocab_axes}, set(context.manual_axes)
    if named and named <= manual:
        _check_manual(token_axes, vocab_axes, operands)
        return Placement(token_axes, vocab_axes)
    if named & manual:
        raise ValueError(
            f"token_axis is {token_axis!r} and vocab_axis {vocab_axis!r}: of these only {', '.join(named & manual)} is "
            "manual in this jax.shard_map; make all of them manual (axis_names), or none"
        )
    if not leading and hidden.ndim > 1:
        leading = (token_axes or None,)
    _check_division("token_axis", token_axes, "leading dimensions of hidden", hidden.shape[:-1], leading, mesh)
    _check_division("vocab_axis", vocab_axes, "vocabulary of", (weight.shape[vocab_dim],), (vocab_axes or None,), mesh)
    return Placement(token_axes, vocab_axes, mesh, leading)


def over_mesh(
    function: Callable[..., Any], placement: Placement, operands: Any, vocab_dim: int, *, per_token: bool
) -> Any:
    """Runs `function(operands)` under `jax.shard_map`, every device on its tokens and its slice of the vocabulary.

    Args:
      function: of one `api.Operands`; returns (loss, metrics), equal on all devices where they are not per token.
      placement: with a mesh.
      operands: `api.Operands` as the caller gave them.
      vocab_dim: the dimension of the weight that is V.
      per_token: whether the loss has the labels' shape.
    """
    sliced = placement.vocab_axes or None
    by_token = PartitionSpec(*placement.leading)
    specs = type(operands)(
        hidden=by_token,
        weight=PartitionSpec(*((sliced, None), (None, sliced))[vocab_dim]),
        labels=by_token,
        bias=PartitionSpec(sliced),
        token_weights=by_token,
        normalizer=PartitionSpec(),
        scale=PartitionSpec(),
    )
    present = type(operands)(*(s if o is not None else None for s, o in zip(specs, operands, strict=True)))
    mesh = placement.mesh
    if AxisType.Explicit in mesh.axis_types:  # there the types must agree with the specs
        explicit = {a for a, t in zip(mesh.axis_names, mesh.axis_types, strict=True) if t == AxisType.Explicit}

        def as_typed(array: Array, spec: PartitionSpec) -> Array:
            entries = (tuple(axis for axis in _entry(entry) if axis in explicit) or None for entry in spec)
            return jax.sharding.reshard(array, NamedSharding(mesh, PartitionSpec(*entries)))

        operands = jax.tree.map(as_typed, operands, present)
    return jax.shard_map(
        function,
        mesh=None if mesh == jax.sharding.get_abstract_mesh() else mesh,
        in_specs=(present,),
        out_specs=(by_token if per_token else PartitionSpec(), PartitionSpec()),
        axis_names=set(mesh.axis_names) - set(jax.sharding.get_abstract_mesh().manual_axes),
    )(operands)


def slices(placement: Placement) -> int:
    """In how many slices the vocabulary came, where its axes are manual already."""
    manual = jax.sharding.get_abstract_mesh().manual_axes
    return math.prod(lax.axis_size(axis) for axis in placement.vocab_axes if axis in manual)


def devices(mesh: Any, axes: tuple[str, ...]) -> int:
    """How many devices lie along axes of a mesh; 1 without one."""
    return 1 if mesh is None else math.prod(mesh.shape[axis] for axis in axes)


def _names(option: str, axis: AxisNames) -> tuple[str, ...]:
    names = () if axis is None else (axis,) if isinstance(axis, str) else axis
    if not isinstance(names, tuple) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"{option} is {axis!r}; it must be the name of a mesh axis, or a tuple of names")
    if len(set(names)) < len(names):
        raise ValueError(f"{option} is {axis!r}; it must name every axis once")
    return names


def _mesh_of(context: Any, *arrays: Array) -> Any:
    """The mesh in context (`jax.set_mesh`, `jax.shard_map`), else the one that an operand lies on."""
    meshes = [context, *(getattr(jax.typeof(array).sharding, "mesh", context) for array in arrays)]
    return next((mesh for mesh in meshes if mesh.axis_names), context)


def _explicit_axes(operands: Any, vocab_dim: int) -> tuple[tuple[str, ...], tuple[str, ...], tuple[Any, ...]]:
    """Axes that Explicit types shard the tokens and the vocabulary over. Under FSDP the tokens' axes win."""
    per_token = (tuple(jax.typeof(a).sharding.spec) for a in (operands.labels, operands.token_weights) if a is not None)
    candidates = (tuple(jax.typeof(operands.hidden).sharding.spec)[:-1], *per_token)
    leading = next((spec for spec in candidates if any(spec)), candidates[0])
    token_axes = tuple(axis for entry in leading for axis in _entry(entry))
    sliced = _entry(tuple(jax.typeof(operands.weight).sharding.spec)[vocab_dim])
    return token_axes, tuple(axis for axis in sliced if axis not in token_axes), leading


def _axes_of(array: Array) -> tuple[str, ...]:
    """Explicit axes that the array's type is sharded over."""
    return tuple(axis for entry in jax.typeof(array).sharding.spec for axis in _entry(entry))


def _entry(entry: Any) -> tuple[str, ...]:
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def _check_manual(token_axes: tuple[str, ...], vocab_axes: tuple[str, ...], operands: Any) -> None:
    for axis in (*token_axes, *vocab_axes):
        if axis not in varying_axes(lax.axis_index(axis)):
            raise ValueError(
                f"mesh axis {axis!r} is named inside of a jax.shard_map with check_vma=False, where the gradients of "
                "its sums come out wrong without a word; use check_vma=True (the default)"
            )
    for axis in token_axes:
        if axis not in varying_axes(operands.hidden, operands.labels):
            raise ValueError(f"token_axis is {axis!r} and hidden and labels are the same on all of its devices")
    for axis in vocab_axes:
        if axis not in varying_axes(operands.weight):
            raise ValueError(
                f"vocab_axis is {axis!r} and weight is the same on all of its devices, not a slice on each"
            )
        for name in ("labels", "token_weights", "normalizer"):
            array = getattr(operands, name)
            if array is not None and axis in varying_axes(array):
                raise ValueError(
                    f"vocab_axis is {axis!r} and {name} may differ between its devices (its type says so: "
                    f"{jax.typeof(array)}); it must be the same on all of them: pass it replicated over {axis!r}"
                )


def _check_division(
    option: str, axes: tuple[str, ...], what: str, shape: tuple[int, ...], spec: tuple[Any, ...], mesh: Any
) -> None:
    if set(axes) - {axis for entry in spec for axis in _entry(entry)}:
        names = ", ".join(map(repr, axes))
        raise ValueError(f"{option} is {names} and hidden has shape [D]; there is no dimension of tokens to shard")
    for size, entry in zip(shape, spec, strict=False):
        count = devices(mesh, _entry(entry))
        if size % count:
            names = ", ".join(map(repr, _entry(entry)))
            raise ValueError(f"{option} is {names}: its {count} devices do not divide the {what} {size}")


def _axes_in_words(mesh: Any) -> str:
    if not mesh.axis_names:
        return "there is no mesh: use jax.set_mesh, or call inside of jax.shard_map"
    return f"the mesh has axes {', '.join(f'{name!r} ({size})' for name, size in mesh.shape.items())}"
