"""Rotary positions (RoFormer, arXiv:2104.09864), stretched as Llama 3.1 does where the architecture says so.

Letters: S positions, B sequences, N heads, H head width.
"""

import dataclasses
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Float64, Int


@dataclasses.dataclass(frozen=True)
class Llama3Rope:
    """How Llama 3.1 stretches the rotary frequencies for sequences longer than it was first trained on.

    Wavelengths beyond `original_max_position_embeddings / low_freq_factor` grow by `factor`, those below
    `original_max_position_embeddings / high_freq_factor` stay, and in between the frequency is interpolated
    (`rope_type` "llama3" of Hugging Face, whose names these are).
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def __post_init__(self) -> None:
        if not (self.factor >= 1 and 0 < self.low_freq_factor < self.high_freq_factor):
            raise ValueError(f"{self}: it needs factor >= 1 and 0 < low_freq_factor < high_freq_factor")


class RotaryConfig(Protocol):
    """What of an architecture positions depend on."""

    @property
    def head_dim(self) -> int:
        """H."""

    @property
    def rope_theta(self) -> float:
        """The base of the frequencies."""

    @property
    def rope_scaling(self) -> Llama3Rope | None:
        """How they are stretched, if they are."""


def rotation(config: RotaryConfig, positions: Int[Array, "*batch S"]) -> tuple[Array, Array]:
    """Cosines and sines of the rotary angles, each float32 [*batch, S, 1, H/2]."""
    radians = frequencies(config).astype(np.float32)
    angles = positions.astype(jnp.float32)[..., None, None] * radians.reshape((1,) * (positions.ndim + 1) + (-1,))
    return jnp.cos(angles), jnp.sin(angles)


def frequencies(config: RotaryConfig) -> Float64[np.ndarray, " H/2"]:
    """Radians a position by which each pair turns."""
    half = config.head_dim // 2
    plain = config.rope_theta ** (-np.arange(half) / half)
    stretch = config.rope_scaling
    if stretch is None:
        return plain
    turns = stretch.original_max_position_embeddings * plain / (2 * np.pi)  # within the original context
    kept = np.clip((turns - stretch.low_freq_factor) / (stretch.high_freq_factor - stretch.low_freq_factor), 0, 1)
    return plain * (kept + (1 - kept) / stretch.factor)


@jax.named_scope("rope")
def rotate(x: Float[Array, "B S N H"], rotation: tuple[Array, Array]) -> Float[Array, "B S N H"]:
    """Rotates the pairs (x[i], x[i + H/2]), as Hugging Face's checkpoints expect; in float32."""
    cos, sin = (r if r.ndim == x.ndim else jnp.expand_dims(r, 0) for r in rotation)
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
