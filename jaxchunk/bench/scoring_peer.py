"""Scoring as people write it in PyTorch: all logits, in float32, then `log_softmax` and `gather`."""

import dataclasses
import importlib.metadata
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import Array

from jaxchunk.bench import peers
from jaxchunk.bench.peers import Pending
from jaxchunk.errors import InputError

TORCH = "torch"


def check(names: Sequence[str]) -> None:
    """Refuses peers that are not known or not installed.

    Raises:
      InputError: naming the flag, its value and what is needed.
    """
    if unknown := [name for name in names if name != TORCH]:
        raise InputError(f"--peers has {unknown[0]}; the only one is {TORCH}")
    if names and importlib.util.find_spec(TORCH) is None:
        raise InputError(f"--peers: {TORCH} is not installed; install it, or leave it out")


@dataclasses.dataclass(frozen=True)
class LoadedPeer:
    """Torch's scoring, which ran.

    Attributes:
      name: with its version.
      call: dispatches it on the operands that it was loaded for.
      temporary_bytes: most bytes at once beyond operands and results; None on a CPU.
    """

    name: str
    call: Callable[[], Pending]
    temporary_bytes: int | None


def load(hidden: Array, weight: Array, labels: Array) -> LoadedPeer | str:
    """Runs it once on hidden states [T, D], a weight [V, D] of the same dtype and labels [T]; says why it fails."""
    jax.block_until_ready((hidden, weight, labels))  # torch works on another stream

    def run() -> LoadedPeer:
        tensors = peers.to_torch(hidden, weight, labels)
        call = lambda: log_probs(*tensors)  # noqa: E731
        call().block_until_ready()
        name = f"torch eager {importlib.metadata.version(TORCH)}, float32 logits"
        return LoadedPeer(name, call, peers.temporary_bytes(call))

    return peers.first_run(run)


def evaluate(hidden: Array, weight: Array, labels: Array) -> Array:
    """The same for any operands, as a JAX array [T]."""
    return log_probs(*peers.to_torch(*jax.block_until_ready((hidden, weight, labels)))).to_jax()


def log_probs(hidden: Any, weight: Any, labels: Any) -> Pending:
    """Log-probabilities of labels [T], torch tensors all; logits are cast to float32, as transformers casts them."""
    import torch
    from torch.nn import functional

    with torch.inference_mode():
        logits = functional.linear(hidden, weight).float()
        found = logits.log_softmax(-1).gather(-1, labels[:, None])[:, 0]
    return Pending(found, peers.event_behind(is_cuda=hidden.is_cuda))
