"""A torch of a few lines, on NumPy: what `bench/peers.py` and `bench/scoring_peer.py` call, and no more."""

import threading
import types
from contextlib import contextmanager, nullcontext

import jax.numpy as jnp
import numpy as np

from jaxchunk.bench import accuracy


class Tensor:
    """An array; a loss also carries the gradients that `autograd.grad` hands out."""

    def __init__(self, array, gradients=None, is_cuda=False):
        self.array, self.gradients, self.is_cuda = np.asarray(array), gradients, is_cuda
        self.requires_grad = False

    nbytes = property(lambda self: self.array.nbytes)
    dtype = property(lambda self: self.array.dtype)

    def detach(self):
        return Tensor(self.array, is_cuda=self.is_cuda)

    def requires_grad_(self):
        self.requires_grad = True
        return self

    def to(self, dtype):
        return Tensor(self.array.astype(dtype, copy=False), is_cuda=self.is_cuda)

    def long(self):
        return Tensor(self.array.astype(np.int64))

    def float(self):
        return Tensor(self.array.astype(np.float32))

    def log_softmax(self, dim):
        return Tensor(self.array - np.log(np.exp(self.array).sum(dim, keepdims=True)))

    def gather(self, dim, index):
        return Tensor(np.take_along_axis(self.array, index.array, dim))

    def __getitem__(self, place):
        return Tensor(self.array[place])

    def contiguous(self):
        return self

    def __dlpack__(self, **options):
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


class Event:
    """Complete when `finish` is called, on any event: a stream that a test holds up."""

    finished = threading.Event()

    def __init__(self, blocking=False):
        assert blocking

    def record(self):
        pass

    def synchronize(self):
        assert Event.finished.wait(10)


class Cuda:
    """An allocator whose peak a test sets."""

    def __init__(self, available, peak=0):
        self.available, self.peak, self.share, self.Event = available, peak, None, Event
        self.is_available = lambda: available
        self.memory_allocated = lambda: 1000
        self.max_memory_allocated = lambda: 1000 + self.peak
        self.reset_peak_memory_stats = self.synchronize = self.empty_cache = lambda: None

    def set_per_process_memory_fraction(self, share):
        self.share = share


def make(*, is_cuda=False, peak=0):
    """The module, with tensors on a GPU that is not there if asked for."""
    torch = types.ModuleType("torch")
    torch.float32, torch.bfloat16 = np.dtype("float32"), "bfloat16"
    torch.from_dlpack = lambda array: Tensor(array, is_cuda=is_cuda)
    torch.autograd = types.SimpleNamespace(grad=lambda loss, inputs: loss.gradients)
    torch.cuda = Cuda(is_cuda, peak)

    @contextmanager
    def autocast(device, *, dtype, enabled):
        assert (device, dtype) == ("cuda", "bfloat16")
        torch.autocasts.append(enabled)
        yield

    torch.autocasts, torch.autocast, torch.inference_mode = [], autocast, nullcontext
    return torch


def cross_entropy(hidden, weight, labels, *, d_hidden_scale=1.0, **_):
    """A peer's loss: exact, but for a scale that makes its dX wrong."""
    assert hidden.requires_grad and weight.requires_grad and labels.dtype == np.int64
    operands = (jnp.asarray(tensor.array) for tensor in (hidden, weight, labels.to(np.int32)))
    loss, d_hidden, d_weight = map(np.array, accuracy.exact(*operands))
    gradients = (Tensor(d_hidden_scale * d_hidden), Tensor(d_weight))
    return Tensor(loss, gradients)
