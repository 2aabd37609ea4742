"""Types under `jax.shard_map`: the mesh axes over which a value differs from device to device."""

import jax
from jax import Array, lax


def varying_axes(*arrays: Array | None) -> frozenset[str]:
    """Manual mesh axes over which any of the arrays varies; empty outside of `jax.shard_map`."""
    types = [jax.typeof(array).manual_axis_type for array in arrays if array is not None]
    return frozenset().union(*(type_.varying for type_ in types))


def varying_alike(*arrays: Array) -> list[Array]:
    """The arrays, each made varying over every axis over which one of them varies (a change of type only)."""
    axes = varying_axes(*arrays)
    return [varying_over(array, axes) for array in arrays]


def varying_over(array: Array, axes: frozenset[str]) -> Array:
    """The array made varying over `axes` too."""
    missing = tuple(sorted(axes - varying_axes(array)))
    return lax.pcast(array, missing, to="varying") if missing else array


def summed_to(array: Array, axes: frozenset[str]) -> Array:
    """Sum over the mesh axes besides `axes` over which the array varies, as the gradient of a shared operand needs."""
    extra = tuple(sorted(varying_axes(array) - axes))
    return lax.psum(array, extra) if extra else array
