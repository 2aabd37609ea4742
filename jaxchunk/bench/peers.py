"""The LM heads of others, to be measured in the same windows as ours: forward and both gradients, on the same memory.

All are PyTorch programs; nothing here imports torch before a peer is asked for. Their operands are JAX's arrays, handed
over by DLPack: both look at the same memory. The weight is a float32 master copy that every call casts to the dtype of
the hidden states, as our own variants do. A peer that takes no float32 weight is given the cast one as its operand and
returns dW in that dtype: it is spared the way back to float32, which a trainer with a float32 master would add.
"""

import dataclasses
import importlib.metadata
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import Array

from jaxchunk.bench import accuracy
from jaxchunk.bench.accuracy import Accuracy, Case
from jaxchunk.errors import InputError, first_line

_logger = logging.getLogger("jaxchunk")
ALL = "all"
# QuACK 0.6.5 takes 4096 rows by default; 8192 were 2.5% faster on an H200, and 16384 end in an illegal memory access
# where rows x vocabulary passes 2^31.
_QUACK_ROWS = 8192
# JAX keeps to half of the memory beside peers (`device_memory.allocate_as_needed`); the rest is for two CUDA contexts.
_TORCH_SHARE = 0.47

Loaded = TypeVar("Loaded")
Loss = Callable[[Any, Any, Any], Any]
"""Hidden states [T, D], weight [V, D], labels [T] int64 to the mean cross-entropy, torch tensors all."""
Result = tuple["Pending", tuple["Pending", "Pending"]]
"""Loss, (dX, dW)."""


@dataclasses.dataclass(frozen=True)
class Peer:
    """Somebody else's LM head.

    Attributes:
      title: for tables, with the version of `distribution` behind it.
      distribution: what to install.
      load: imports it and returns its loss.
      takes_master: whether it takes the float32 weight itself (and returns dW in float32).
    """

    title: str
    distribution: str
    load: Callable[[], Loss]
    takes_master: bool = False

    @property
    def name(self) -> str:
        """Title and version."""
        return f"{self.title} {importlib.metadata.version(self.distribution)}"


def _liger() -> Loss:
    """Liger 0.8.5: dW is summed over chunks in float32, as its docstring advises, and returned in the weight's dtype.

    `liger_kernel.transformers.functional.liger_fused_linear_cross_entropy`.
    """
    import torch
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return lambda hidden, weight, labels: liger_fused_linear_cross_entropy(
        hidden, weight, labels, accum_dtype=torch.float32
    )


def _cce() -> Loss:
    """Apple's cut-cross-entropy 25.1.1 as it comes: blocks whose gradients are all below 2.4e-4 are skipped.

    `cut_cross_entropy.linear_cross_entropy`, with its default `filter_eps`. It wants bfloat16 hidden states.
    """
    from cut_cross_entropy import linear_cross_entropy

    return lambda hidden, weight, labels: linear_cross_entropy(hidden, weight, labels)


def _quack() -> Loss:
    """QuACK 0.6.5: under autocast it takes the float32 weight and returns dW in float32.

    `quack.linear_cross_entropy.chunked_linear_cross_entropy`, which on Hopper chooses its scaled-exp pipeline where
    V is a multiple of 128.
    """
    import torch
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    def loss(hidden: Any, weight: Any, labels: Any) -> Any:
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=hidden.dtype == torch.bfloat16):
            return chunked_linear_cross_entropy(hidden, weight, labels, chunk_size=_QUACK_ROWS)

    return loss


def _torch_eager() -> Loss:
    """What people write: logits in the operands' dtype (float32 ones would need twice the memory), torch's loss."""
    from torch.nn import functional

    return lambda hidden, weight, labels: functional.cross_entropy(functional.linear(hidden, weight), labels)


def _torch_compile() -> Loss:
    """The same, compiled; for fixed shapes, or the slice for the errors would make the number of tokens a variable."""
    import torch

    return torch.compile(_torch_eager(), dynamic=False)


PEERS: dict[str, Peer] = {
    "liger": Peer("Liger", "liger-kernel", _liger),
    "cce": Peer("cut-cross-entropy", "cut-cross-entropy", _cce),
    "quack": Peer("QuACK", "quack-kernels", _quack, takes_master=True),
    "torch_compile": Peer("torch.compile", "torch", _torch_compile),
    "torch_eager": Peer("torch eager", "torch", _torch_eager),
}


def check(names: Sequence[str]) -> None:
    """Refuses peers that are not known, or are named and cannot be imported.

    Raises:
      InputError: naming the flag, its value and what is needed.
    """
    if ALL in names and len(names) > 1:
        raise InputError(f"--peers is {' '.join(names)}; give {ALL} alone, or names")
    for name in names:
        if name != ALL and name not in PEERS:
            raise InputError(f"--peers is {' '.join(names)}; choose from {ALL}, {', '.join(PEERS)}")
        if name != ALL and (reason := _import_error(PEERS[name])):
            raise InputError(f"--peers: {reason}; install it, or leave {name} out")


@dataclasses.dataclass(frozen=True)
class LoadedPeer:
    """A peer that ran.

    Attributes:
      name: title and version.
      call: dispatches loss and gradients at full size.
      temporary_bytes: most bytes at once beyond operands and results; None where torch does not count them (a CPU).
      accuracy: on the slices.
    """

    name: str
    call: Callable[[], Result]
    temporary_bytes: int | None
    accuracy: Accuracy


def load(
    names: Sequence[str], operands: tuple[Array, Array, Array], slices: Mapping[str, Case]
) -> Iterator[LoadedPeer]:
    """Imports peers and runs each for the first time; one that fails is left out with a line that says why.

    Args:
      names: as checked by `check`.
      operands: hidden states [T, D], weight [V, D] float32 and labels [T] int.
      slices: from `accuracy.cases`.
    """
    jax.block_until_ready((operands, slices))  # torch works on another stream
    for name in PEERS if ALL in names else names:
        peer = PEERS[name]
        loaded = _loaded(peer, operands, slices)
        if isinstance(loaded, str):
            _logger.warning("%s is left out: %s", name, loaded)
        else:
            yield loaded


@dataclasses.dataclass(frozen=True)
class Pending:
    """A torch tensor that its stream may still be filling: a leaf for `jax.block_until_ready`, also in other threads.

    Attributes:
      tensor: of any shape and dtype.
      done: the event recorded behind the work that fills it; None on a CPU, where torch returns when all is done.
    """

    tensor: Any
    done: Any = None

    @property
    def nbytes(self) -> int:
        """Size of the tensor."""
        return int(self.tensor.nbytes)

    def block_until_ready(self) -> "Pending":
        """Waits for the event, without Python's lock: torch's events may be waited for by several threads."""
        if self.done is not None:
            self.done.synchronize()
        return self

    def __float__(self) -> float:
        """The number in a tensor of one."""
        return float(self.block_until_ready().tensor)

    def to_jax(self) -> Array:
        """The tensor's memory as a JAX array, complete."""
        self.block_until_ready()
        return jnp.from_dlpack(self.tensor.contiguous())


def value_and_gradients(peer: Peer, loss: Loss, hidden: Any, weight: Any, labels: Any) -> Result:
    """One call: the cast of the master weight, the loss, and its gradients for what the peer was given.

    Args:
      peer: whose loss it is.
      loss: from `peer.load`.
      hidden: torch tensor [T, D].
      weight: torch tensor [V, D], float32.
      labels: torch tensor [T], int64.
    """
    import torch

    x = hidden.detach().requires_grad_()
    W = weight.detach() if peer.takes_master else weight.detach().to(hidden.dtype)
    value = loss(x, W.requires_grad_(), labels)
    d_hidden, d_weight = torch.autograd.grad(value, (x, W))
    done = event_behind(is_cuda=hidden.is_cuda)
    return Pending(value.detach(), done), (Pending(d_hidden, done), Pending(d_weight, done))


def event_behind(*, is_cuda: bool) -> Any | None:
    """The event recorded behind what torch has dispatched so far; None on a CPU, where it is done."""
    import torch

    if not is_cuda:
        return None
    event = torch.cuda.Event(blocking=True)  # who waits sleeps: a spinning thread would hold up the dispatch
    event.record()
    return event


def first_run(run: Callable[[], Loaded]) -> Loaded | str:
    """Runs somebody else's program for the first time, in torch's share of the memory; says why where it fails."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.set_per_process_memory_fraction(_TORCH_SHARE)
    try:
        return run()
    except Exception as error:  # whatever it raises
        reason = first_line(error, with_type=True)
    _free_cache()
    return f"its first call failed ({reason})"


def _loaded(peer: Peer, operands: tuple[Array, Array, Array], slices: Mapping[str, Case]) -> LoadedPeer | str:
    if (reason := _import_error(peer)) is not None:
        return reason
    return first_run(lambda: _run(peer, operands, slices))


def _run(peer: Peer, operands: tuple[Array, Array, Array], slices: Mapping[str, Case]) -> LoadedPeer:
    loss = peer.load()
    tensors = to_torch(*operands)

    def call() -> Result:
        return value_and_gradients(peer, loss, *tensors)

    def evaluate(hidden: Array, weight: Array, labels: Array) -> tuple[Array, tuple[Array, Array]]:
        value, (d_hidden, d_weight) = value_and_gradients(peer, loss, *to_torch(hidden, weight, labels))
        return value.to_jax(), (d_hidden.to_jax(), d_weight.to_jax())

    jax.block_until_ready(call())  # compiles and tunes, which takes memory of its own
    return LoadedPeer(peer.name, call, temporary_bytes(call), accuracy.measure(evaluate, slices))


def to_torch(hidden: Array, weight: Array, labels: Array) -> tuple[Any, Any, Any]:
    """The arrays as tensors on the same memory; torch wants labels of 64 bits, which are a copy."""
    import torch

    return torch.from_dlpack(hidden), torch.from_dlpack(weight), torch.from_dlpack(labels).long()


def temporary_bytes(call: Callable[[], Any]) -> int | None:
    """Peak of torch's allocator in one call, less what was there before and less the results; None on a CPU."""
    import torch

    if not torch.cuda.is_available():
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = jax.block_until_ready(call())
    results = sum(leaf.nbytes for leaf in jax.tree.leaves(result))
    return max(0, int(torch.cuda.max_memory_allocated() - before - results))


def _import_error(peer: Peer) -> str | None:
    """Why a peer cannot be imported; None where it can."""
    try:
        peer.load()
        _ = peer.name
    except Exception as error:  # some raise more than ImportError where there is no driver
        return f"{peer.distribution} cannot be imported ({first_line(error, with_type=True)})"
    return None


def _free_cache() -> None:
    """Gives back what a failed call left in torch's allocator."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()
