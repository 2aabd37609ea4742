"""The training steps of others, at the same shapes and on the same batches: transformers, with Liger's kernels or not.

Every step is what their users run: a micro-batch forward and backward, clipping of the gradient's norm, torch's fused
AdamW; SDPA attention (FlashAttention on a GPU), no recomputation. The model is of the same architecture, with random
weights. Where the batch does not fit in memory, gradients add up over micro-batches of half the size, or less.

In which precision is a choice, and both are here. Weights, gradients and moments in bfloat16 is the fastest and needs
the least memory; it computes less than our step does, whose master weights and moments are float32. Under autocast the
weights are float32 too, and so is what flows from block to block.
"""

import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxchunk import data
from jaxchunk.bench.peers import ALL, Pending, event_behind
from jaxchunk.errors import InputError
from jaxchunk.measuring.protocol import Variant
from jaxchunk.models import hf, qwen2
from jaxchunk.training.config import TrainConfig

_logger = logging.getLogger("jaxchunk")
_MODULES = {"torch": "torch", "transformers": "transformers", "liger-kernel": "liger_kernel"}


@dataclasses.dataclass(frozen=True)
class TrainingPeer:
    """Somebody else's training step.

    Attributes:
      has_liger: Liger's RoPE, RMSNorm, SwiGLU and fused linear cross-entropy in the place of transformers' own.
      is_compiled: by `torch.compile`.
      has_master: float32 weights under bfloat16 autocast; otherwise everything is bfloat16.
    """

    has_liger: bool = False
    is_compiled: bool = False
    has_master: bool = False

    @property
    def distributions(self) -> tuple[str, ...]:
        """What must be installed."""
        return ("torch", "transformers", *(("liger-kernel",) if self.has_liger else ()))

    @property
    def name(self) -> str:
        """For tables, with versions."""
        parts = [f"transformers {importlib.metadata.version('transformers')}"]
        parts += [f"Liger {importlib.metadata.version('liger-kernel')}"] if self.has_liger else []
        parts += [f"torch.compile {importlib.metadata.version('torch')}"] if self.is_compiled else []
        return " + ".join(parts) + (", float32 weights" if self.has_master else ", bfloat16 weights")


PEERS = {
    "liger": TrainingPeer(has_liger=True),
    "liger_autocast": TrainingPeer(has_liger=True, has_master=True),
    "transformers": TrainingPeer(),
    "transformers_autocast": TrainingPeer(has_master=True),
    "torch_compile": TrainingPeer(is_compiled=True),
}


class PeerMetrics(NamedTuple):
    """What a step returns: the mean loss of its tokens."""

    loss: Pending


def choose(names: Sequence[str]) -> list[str]:
    """The peers to measure: those that are named, or with "all" those that can be imported, the others with a word.

    Raises:
      InputError: a name is not known, or what it names is not installed.
    """
    if ALL in names and len(names) > 1:
        raise InputError(f"--peers is {' '.join(names)}; give {ALL} alone, or names")
    if unknown := [name for name in names if name not in (ALL, *PEERS)]:
        raise InputError(f"--peers has {unknown[0]}; choose from {ALL}, {', '.join(PEERS)}")
    chosen = []
    for name in PEERS if ALL in names else names:
        missing = [d for d in PEERS[name].distributions if importlib.util.find_spec(_MODULES[d]) is None]
        if missing and ALL not in names:
            raise InputError(f"--peers: {name} needs {' and '.join(missing)}; install what is missing, or leave it out")
        if missing:
            _logger.warning("%s is left out: %s not installed", name, " and ".join(missing))
        else:
            chosen.append(name)
    return chosen


def variant(name: str, config: TrainConfig) -> Variant:
    """A peer's step as a variant, after two steps of it; for a process of its own, since Liger patches transformers.

    Args:
      name: a key of `PEERS`.
      config: model, shapes, data and optimizer.

    Raises:
      InputError: the data cannot be used, or not even one sequence at a time fits in memory.
    """
    import torch

    peer = PEERS[name]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = _model(peer, qwen2.SIZES[config.model], config, device)
    batches = _batches(config)
    for micro_batch_size in [m for m in range(config.batch_size, 0, -1) if config.batch_size % m == 0]:
        step = _Step(peer, model, batches, config, micro_batch_size)
        try:
            for _ in range(2):  # kernels are compiled, moments allocated
                step().loss.block_until_ready()
        except torch.OutOfMemoryError:
            _logger.warning("%s: micro-batches of %d do not fit", peer.name, micro_batch_size)
            del step
            model.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
            continue
        return Variant(peer.name, step, factors={"peer": name, **step.factors()})
    raise InputError(f"{peer.name}: not even one sequence of {config.seq_len} tokens fits in memory")


class _Step:
    """One optimizer step a call, dispatched."""

    def __init__(
        self,
        peer: TrainingPeer,
        model: Any,
        batches: Iterator[data.Batch],
        config: TrainConfig,
        micro_batch_size: int,
    ):
        import torch

        self._model, self._batches, self._config, self._micro_batch_size = model, batches, config, micro_batch_size
        self._device = next(model.parameters()).device
        self._optimizer = torch.optim.AdamW(
            model.parameters(),
            lr=config.final_lr_ratio * config.lr,  # where our schedule ends: it stays finite without one
            betas=(config.beta1, config.beta2),
            weight_decay=config.weight_decay,
            fused=self._device.type == "cuda",
        )
        self._forward: Callable[..., Any] = torch.compile(model) if peer.is_compiled else model
        self._has_master = peer.has_master

    def __call__(self) -> PeerMetrics:
        import torch

        batch = next(self._batches)
        tokens, labels = (
            torch.from_numpy(batch[key]).to(self._device, non_blocking=True).long() for key in ("tokens", "labels")
        )
        self._optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self._device)
        for part_tokens, part_labels in zip(
            tokens.split(self._micro_batch_size), labels.split(self._micro_batch_size), strict=True
        ):
            with self._autocast():
                # Our labels are those of the same position: transformers would shift them otherwise.
                output = self._forward(
                    input_ids=part_tokens, labels=part_labels, shift_labels=part_labels, use_cache=False
                )
            loss = output.loss * (self._micro_batch_size / self._config.batch_size)  # every label counts
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(self._model.parameters(), self._config.grad_clip)
        self._optimizer.step()
        return PeerMetrics(Pending(total, event_behind(is_cuda=self._device.type == "cuda")))

    def factors(self) -> dict[str, Any]:
        """What distinguishes it; the memory is torch's peak so far, None where torch does not count it (a CPU)."""
        import torch

        peak = int(torch.cuda.max_memory_allocated()) if self._device.type == "cuda" else None
        weights = str(next(self._model.parameters()).dtype).removeprefix("torch.")
        return {"micro_batch_size": self._micro_batch_size, "memory_bytes": peak, "weights": weights}

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        import torch

        return torch.autocast(self._device.type, torch.bfloat16) if self._has_master else contextlib.nullcontext()


def _model(peer: TrainingPeer, architecture: qwen2.Qwen2Config, config: TrainConfig, device: Any) -> Any:
    import torch
    import transformers

    if peer.has_liger:
        from liger_kernel.transformers import apply_liger_kernel_to_qwen2

        apply_liger_kernel_to_qwen2()
    torch.manual_seed(config.seed)
    values = hf.to_hf_config(architecture, "float32")
    with device:
        model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**values, attn_implementation="sdpa"))
    return model.to(torch.float32 if peer.has_master else torch.bfloat16).train()


def _batches(config: TrainConfig) -> Iterator[data.Batch]:
    """The batches of our step."""
    cache_dir = None if config.cache_dir is None else Path(config.cache_dir)
    vocab_size = qwen2.SIZES[config.model].vocab_size
    dataset = data.load_dataset(config.data, None, vocab_size, cache_dir, seed=config.seed)
    return data.train_batches(
        data.split(dataset, config.seq_len, config.val_fraction).train, config.batch_size, config.seed
    )
