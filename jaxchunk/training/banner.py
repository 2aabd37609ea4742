"""What a run says before it starts and after it ends."""

from pathlib import Path
from typing import Any

import jax

import jaxchunk
from jaxchunk.models import qwen2
from jaxchunk.telemetry import AnyMonitor
from jaxchunk.training.config import TrainConfig
from jaxchunk.training.model import Model
from jaxchunk.training.plan import Plan


def describe_run(plan: Plan, monitor: AnyMonitor, path: Path, done_steps: int) -> str:
    """The banner: everything that was chosen, and why. `done_steps`: where a resumed run goes on from."""
    config, dataset, programs = plan.config, plan.dataset, plan.programs
    model, device = plan.model.config, jax.devices()[0]
    micro_batches = config.batch_size // programs.memory_plan.micro_batch_size
    chunk_rows, chunks = plan.lm_head_rows
    tied = "tied to the embedding" if model.tie_word_embeddings else "untied"
    lines = {
        "jaxchunk": f"{jaxchunk.__version__}, JAX {jax.__version__}",
        "device": f"{device.device_kind} ({device.platform}), 1 of {jax.device_count()}",
        "model": f"{config.model_name}, {_origin(plan.model, done_steps)}, "
        f"{qwen2.num_params(model) / 1e6:.1f} M parameters, LM head {tied}",
        "dtypes": f"parameters and optimizer float32; activations and GEMMs {config.compute_dtype} "
        f"({_dtype_reason(config, device)}); norms, softmax and loss statistics float32",
        "data": f"{dataset.description}; {len(dataset.tokens):,} tokens, vocabulary {dataset.vocab_size}, "
        f"{len(plan.split.train):,} training and {len(plan.split.validation):,} held-out sequences, "
        f"sha256 {dataset.sha256[:12]}",
        "step": f"{config.batch_size} x {config.seq_len} tokens in {micro_batches} micro-batch(es)",
        "LM head": f"{plan.lm_head.implementation}, {chunks} chunk(s) of {chunk_rows:,} tokens in each micro-batch "
        f"({plan.lm_head.reason})",
        **_chunks(plan),
        "attention": f"{plan.execution.attention} ({plan.attention_reason})",
        "layers": ("scanned" if config.scan_layers else "unrolled") + f", remat {config.remat}",
        "memory": programs.memory_plan.describe(),
        "energy": f"{monitor.energy_source or 'null'} ({monitor.energy_source_reason})",
        "compiled in": f"{programs.compile_time_s:.1f} s",
        "checkpoints": _checkpoints(config) + (f"; resumed after step {done_steps}" if done_steps else ""),
        "output": str(path),
    }
    width = max(map(len, lines))
    return "\n".join(f"{name:>{width}}  {text}" for name, text in lines.items())


def _origin(model: Model, done_steps: int) -> str:
    if done_steps:
        return f"weights of step {done_steps}"
    return "random weights" if model.checkpoint is None else f"weights from {model.checkpoint}"


def _dtype_reason(config: TrainConfig, device: jax.Device) -> str:
    if config.compute_dtype == "bfloat16":
        return "tensor cores" if device.platform == "gpu" else "named by the caller"
    return (
        "the default on a CPU, which gains nothing from 16 bits" if device.platform == "cpu" else "named by the caller"
    )


def _chunks(plan: Plan) -> dict[str, str]:
    """How the count was or will be found, where it was left open."""
    if plan.config.lmhead_chunks == "adaptive":
        counts = ", ".join(map(str, plan.train_steps))
        return {"chunks": f"adaptive: {counts}, by {plan.config.chunk_objective}; decisions in chunks.jsonl"}
    if (choice := plan.chunk_choice) is None:
        return {}
    when = "measured before" if choice.cached else f"measured in {choice.measuring_s:.1f} s"
    return {"chunks": f"{choice.num_chunks}, {when}: {choice.reason}"}


def _checkpoints(config: TrainConfig) -> str:
    if not config.keep_checkpoints:
        return "none"
    often = f"every {config.checkpoint_every} steps and at the end" if config.checkpoint_every else "at the end"
    return f"{often}; the latest {config.keep_checkpoints} and the best by validation loss are kept"


def describe_summary(summary: dict[str, Any], figure: Path) -> str:
    """The last lines of a run."""
    if not summary["steps"]:
        return f"no step was completed ({summary['status']})"
    if summary["energy_j"] is None:
        energy = f"energy null: {summary['energy_null_reason']}"
    else:
        energy = (
            f"{summary['energy_j']:.0f} +- {summary['energy_bound_j']:.0f} J on the GPU rail, "
            f"{summary['energy_per_token_j'] * 1e3:.3g} mJ/token"
        )
    validation = f", validation loss {summary['val_loss']:.4f}" if "val_loss" in summary else ""
    return "\n".join(
        [
            f"{summary['steps']} steps in {summary['training_time_s']:.1f} s: {summary['tokens_per_s_median']:,.0f} "
            f"tokens/s (median), training loss {summary['final_train_loss']:.4f}{validation}",
            energy,
            f"figure: {figure}",
        ]
    )
