"""What a run says before it starts and after it ends."""

from pathlib import Path
from typing import Any

import jax

import jaxchunk
from jaxchunk import data
from jaxchunk.models import lora, qwen2
from jaxchunk.telemetry import AnyMonitor
from jaxchunk.training.config import TrainConfig
from jaxchunk.training.model import Model
from jaxchunk.training.plan import Plan
from jaxchunk.training.programs import Programs
from jaxchunk.training.resume import History, mesh_of


def describe_run(plan: Plan, monitor: AnyMonitor, path: Path, history: History) -> str:
    """The banner: everything that was chosen, and why. `history`: what a resumed run goes on from."""
    config, dataset, programs = plan.config, plan.dataset, plan.programs
    model, device = plan.model.config, plan.devices.used[0]
    micro_batches = config.batch_size // programs.memory_plan.micro_batch_size
    chunk_rows, chunks = plan.lm_head_rows
    each = "" if plan.devices.mesh is None else " of each device"
    tied = "tied to the embedding" if model.tie_word_embeddings else "untied"
    lines = {
        "jaxchunk": f"{jaxchunk.__version__}, JAX {jax.__version__}",
        "device": plan.devices.describe(),
        "model": f"{config.model_name}, {_origin(plan.model, history.step)}, "
        f"{qwen2.num_params(model) / 1e6:.1f} M parameters, LM head {tied}",
        **_trained(config, model),
        "dtypes": f"{_float32_parts(config)} float32; activations and GEMMs {config.compute_dtype} "
        f"({_dtype_reason(config, device)}); norms, softmax and loss statistics float32",
        "data": f"{dataset.description}; {_tokens(dataset)}, vocabulary {dataset.vocab_size}, "
        f"{_rows(plan.split.train)} to train on and {_rows(plan.split.validation)} held out, "
        f"sha256 {dataset.sha256[:12]}",
        "step": f"{config.batch_size} x {config.seq_len} tokens in {micro_batches} micro-batch(es)",
        "LM head": f"{plan.lm_head.implementation}, {chunks} chunk(s) of {chunk_rows:,} tokens in each "
        f"micro-batch{each} ({plan.lm_head.reason})",
        **_chunks(plan),
        "attention": f"{plan.execution.attention} ({plan.attention_reason})",
        "elementwise": f"{plan.execution.elementwise} ({plan.elementwise_reason})",
        "layers": _layers(plan),
        "memory": programs.memory_plan.describe()
        + (" (the count that needs most)" if len(plan.train_steps) > 1 else ""),
        "energy": f"{monitor.energy_source or 'null'} ({monitor.energy_source_reason})",
        "compiled in": _compile_times(programs),
        "checkpoints": _checkpoints(config) + _resumed(plan, history),
        "output": str(path),
    }
    width = max(map(len, lines))
    return "\n".join(f"{name:>{width}}  {text}" for name, text in lines.items())


def _layers(plan: Plan) -> str:
    text = "scanned" if plan.execution.scan_layers else "unrolled"
    if plan.execution.scan_layers and not plan.config.scan_layers:
        text += " (for --deterministic: of several cuDNN calls XLA makes one deterministic)"
    text += f", remat {plan.config.remat}"
    return text + (f", MLP in {plan.config.mlp_chunks} chunks" if plan.config.mlp_chunks > 1 else "")


def _trained(config: TrainConfig, model: qwen2.Qwen2Config) -> dict[str, str]:
    if config.adapters is None:
        return {}
    count = sum(leaf.size for leaf in jax.tree.leaves(lora.adapter_shapes(config.adapters, model)))
    return {
        "trained": f"{count / 1e6:.3g} M parameters: adapters of rank {config.adapters.rank}, alpha "
        f"{config.adapters.alpha:g}, on {', '.join(config.adapters.targets)}; the model is frozen"
    }


def _float32_parts(config: TrainConfig) -> str:
    if config.adapters is None:
        return "parameters and optimizer"
    return f"frozen weights {config.compute_dtype}; adapters and optimizer"


def _tokens(dataset: data.Dataset) -> str:
    learnt = "" if dataset.examples is None else f", {int(dataset.examples.learnt.sum()):,} of them to be learnt"
    return f"{len(dataset.tokens):,} tokens{learnt}"


def _rows(rows: data.TokenWindows | data.PackedRows) -> str:
    if isinstance(rows, data.PackedRows):
        return f"{rows.num_examples:,} examples in {len(rows):,} sequences ({rows.efficiency:.1%} full)"
    return f"{len(rows):,} sequences"


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


def _compile_times(programs: Programs) -> str:
    names = {"init": "initial state", "train_step": "training step", "eval_step": "validation step"}
    parts = [
        f"{names.get(name, name)} {time.compile_s:.1f}{' from the cache' if time.from_cache else ''}"
        for name, time in programs.compile_times.items()
    ]
    lower_s = sum(time.lower_s for time in programs.compile_times.values())
    return f"{programs.compile_time_s:.1f} s ({', '.join(parts)}; lowering {lower_s:.1f})"


def _checkpoints(config: TrainConfig) -> str:
    if not config.keep_checkpoints:
        return "none"
    often = f"every {config.checkpoint_every} steps and at the end" if config.checkpoint_every else "at the end"
    return f"{often}; the latest {config.keep_checkpoints} and the best by validation loss are kept"


def _resumed(plan: Plan, history: History) -> str:
    if history.checkpoint is None:
        return ""
    saved_on = mesh_of(history.checkpoint.about)
    other = "" if saved_on == plan.devices.shards else f", which was saved on {saved_on}: equal but not to the bit"
    return f"; resumed after step {history.step}{other}"


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
    validation = ""
    if "val_loss" in summary:
        validation = f", validation loss {summary['val_loss']:.4f}, perplexity {summary['val_perplexity']:.2f}"
    return "\n".join(
        [
            f"{summary['steps']} steps in {summary['training_time_s']:.1f} s: {summary['tokens_per_s_median']:,.0f} "
            f"tokens/s (median), training loss (last 10) {summary['final_train_loss']:.4f}{validation}",
            energy,
            f"figure: {figure}",
        ]
    )
