"""Every choice of a training run, in one frozen dataclass; the command line is this class."""

import dataclasses
import math
from pathlib import Path
from typing import Literal

from jaxchunk import data
from jaxchunk.errors import InputError
from jaxchunk.lm_head import choose_implementation
from jaxchunk.models import lora, qwen2
from jaxchunk.training import writers
from jaxchunk.training.trace import parse_steps


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """A training run. `default_config` gives the defaults of the device at hand."""

    model: Literal["tiny", "qwen2-0.5b", "qwen2-1.5b", "qwen2-7b"] = "tiny"
    """Size of the Qwen2 model."""
    hf_model: str | None = None
    """A Hugging Face checkpoint to begin from instead, Qwen2, Qwen2.5 or Llama 3: a directory, or an id such as
    Qwen/Qwen2-0.5B. It takes the place of --model."""
    data: str | None = None
    """Training text: a file, a directory, a tokenised .bin, or "synthetic" (random tokens). Or examples, one a line of
    a .jsonl: {"messages": [{"role": ..., "content": ...}, ...]}, {"prompt": ..., "completion": ...} or {"text": ...};
    of the first two only answers are learnt. Default: the source text of this Python's standard library."""
    val_data: str | None = None
    """A file of the same kind to validate on. Default: a part of the data is held out, see --val_fraction."""
    tokenizer: str | None = None
    """A tokenizer.json. Default: the one of --hf_model; without it, a byte-level BPE trained on the data. The chat
    template for messages is the one beside it (tokenizer_config.json or chat_template.jinja), else ChatML."""
    lora_rank: int = 0
    """Rank of adapters (LoRA) that are trained while the model stays as it is; 0 to train the model. Checkpoints have
    the adapters alone. A learning rate of 1e-4 to 5e-4 is usual, and --weight_decay 0."""
    lora_alpha: float | None = None
    """Weight of the adapters: they count alpha / rank times. Default: twice the rank."""
    lora_targets: tuple[lora.Target, ...] = lora.TARGETS
    """Projections that have an adapter."""
    lmhead_chunks: int | Literal["auto", "adaptive"] = 4
    """Token chunks in which the LM head runs, in each micro-batch: a number; auto, to measure before training which is
    the best here; or adaptive, to find it while training goes on, and again when the device's regime changes."""
    chunk_objective: Literal["time", "energy", "edp"] = "time"
    """What auto and adaptive minimise: time, energy, or edp (energy times time)."""
    chunk_candidates: tuple[int, ...] = ()
    """Chunk counts that auto and adaptive choose from. Default: for auto powers of two and counts between them that
    leave enough rows in a chunk; for adaptive 1, 4 and 16."""
    chunk_memory_gb: float | None = None
    """Most memory for the LM head's temporaries that auto may choose, GB. Default: what the rest of the step leaves."""
    chunk_budget_s: float | None = None
    """Longest time that auto measures, besides compilation, seconds. Default: 30 for time, 120 for energy and edp."""
    chunk_thermal_s: float = 30.0
    """For adaptive: time constant of the device's temperature, seconds. A count is tried for at least three of them."""
    chunk_time_if_no_energy: bool = False
    """Where there is no source of energy, let auto and adaptive go by time instead of refusing."""
    lmhead_impl: str | None = None
    """Implementation of the LM head's loss: fused, pallas, xla or reference. Default: by device."""
    seq_len: int = 128
    """Tokens in a sequence."""
    batch_size: int = 8
    """Sequences in a step."""
    micro_batch_size: int | None = None
    """Sequences in a micro-batch; must divide batch_size. Default: as many as fit in memory."""
    steps: int = 500
    """Optimizer steps."""
    lr: float = 1e-3
    """Peak learning rate."""
    warmup_steps: int | None = None
    """Steps of linear warm-up. Default: a tenth of the run, at most 100."""
    final_lr_ratio: float = 0.1
    """Where the cosine ends, as a share of lr."""
    weight_decay: float = 0.1
    """AdamW's decoupled weight decay; norms and biases are exempt."""
    beta1: float = 0.9
    """AdamW's decay of the first moment."""
    beta2: float = 0.95
    """AdamW's decay of the second moment."""
    grad_clip: float = 1.0
    """Largest global norm of the gradient; larger ones are scaled down."""
    seed: int = 0
    """Seed of the initial weights (but for --hf_model) and of the order of the data."""
    compute_dtype: Literal["bfloat16", "float32"] = "float32"
    """Dtype of activations and GEMM operands; parameters and optimizer state are float32."""
    attention: Literal["cudnn", "xla"] | None = None
    """Attention implementation. Default: cudnn where it can run."""
    elementwise: Literal["pallas", "xla"] | None = None
    """Norms and SwiGLU: Pallas kernels, or as XLA compiles them. Default: pallas on an NVIDIA GPU."""
    remat: qwen2.Remat = "none"
    """What the backward pass recomputes in a block: none, gated (the product of gate and up, a fifth of what is kept),
    dots (all but GEMM outputs) or full."""
    mlp_chunks: int = 1
    """Token chunks in which the MLP of each block runs, in each micro-batch: the LM head's trick there. 1 for none."""
    scan_layers: bool = False
    """Compile one block and loop over it: faster to compile, slower to run."""
    mesh_data: int | None = None
    """Copies of the model, each of which sees sequences of its own. Times --mesh_fsdp times --mesh_model it is how many
    devices are used, the first ones. Default: as many as JAX finds devices for."""
    mesh_fsdp: int = 1
    """Devices that share a copy and see sequences of their own: each keeps a slice of every matrix and of its
    optimizer state, and gathers the rest where it is used. Must divide the model's width."""
    mesh_model: int = 1
    """Devices that share a copy and see the same sequences: each has some of the heads, of the feed-forward width and
    of the vocabulary. Must divide all three (of heads, the key/value ones)."""
    distributed: bool = False
    """Train together with the other processes of this job, on all of their devices: started once on every host (or for
    every GPU) with the same flags. Slurm, Open MPI and Kubernetes say who they are; else give --coordinator,
    --num_processes and --process_id. All must see the same out_dir, which process 0 writes."""
    coordinator: str | None = None
    """Address and port of process 0, host:port, where the environment does not say."""
    num_processes: int | None = None
    """How many processes there are, where the environment does not say."""
    process_id: int | None = None
    """Which of them this is, from 0, where the environment does not say."""
    val_every: int = 100
    """Steps between validations (there is one at the end in any case); 0 for that one only."""
    val_batches: int = 16
    """Batches in a validation, evenly spread over the held-out split."""
    val_fraction: float = 0.05
    """Share of the tokens or examples that is held out."""
    sample_every: int = 0
    """Steps between samples of what the model writes, into samples.jsonl; 0 for none."""
    sample_prompts: str | None = None
    """What to begin samples with: a .jsonl like --data, whose last answers are left out, or a text with a prompt a
    line. Default: the beginnings of some held-out data."""
    sample_tokens: int = 64
    """Tokens in a sample at most; the most probable one is taken each time."""
    out_dir: str | None = None
    """Where config, records and figures go. Default: a new directory under runs/."""
    overwrite: bool = False
    """Replace a run that out_dir holds."""
    checkpoint_every: int = 500
    """Steps between checkpoints (there is one at the end, and at a stop, in any case); 0 for that one only. The best
    by validation loss is chosen among those at whose step there is a validation. Each has 12 bytes a parameter: 6 GB
    for qwen2-0.5b."""
    keep_checkpoints: int = 2
    """Checkpoints that are kept: the latest, and the best by validation loss besides. 0 to save none at all."""
    resume: bool = False
    """Go on with the run that out_dir holds, from its newest checkpoint; without one, from the beginning. Flags that
    change what is learned must be as they were; steps may be more."""
    allow_changed_data: bool = False
    """Resume although the data is not what the checkpoint was trained on."""
    max_bad_steps: int = 3
    """Steps in a row whose loss or gradient is NaN or infinite before the run stops. They change no parameter."""
    deterministic: bool = False
    """Ask XLA on a GPU for operations that give the same bits every time (and to choose none by timing it); slower,
    the more so as cuDNN's attention then needs --scan_layers, which is set. A resumed run equals an uninterrupted one
    to the bit. On a CPU that is so anyway: it changes nothing there."""
    record_telemetry: bool = False
    """Keep every reading of the telemetry in telemetry-readings.jsonl, for `telemetry.Monitor.replay`."""
    profile_steps: str | None = None
    """First and last step of a trace by JAX's profiler, 10:15, into profile/ in out_dir. These steps are slower."""
    log: tuple[writers.Name, ...] = ()
    """Where every line of steps.jsonl and validation.jsonl goes besides: tensorboard (event files in out_dir), wandb
    (Weights & Biases; WANDB_PROJECT, WANDB_MODE and the like are its own). Each is an extra to install."""
    cache_dir: str | None = None
    """Where tokenizers, tokenised data and compiled programs are kept. Default: jaxchunk under the user's cache
    directory."""
    compilation_cache: bool = True
    """Take programs from cache_dir that were compiled before. Without, XLA compiles anew, and on a GPU chooses kernels
    anew by timing them. JAX_COMPILATION_CACHE_DIR comes before both."""

    @property
    def num_chunks(self) -> int:
        """`lmhead_chunks` of a config in which it is settled (`training.chunks`)."""
        assert isinstance(self.lmhead_chunks, int), f"lmhead_chunks is still {self.lmhead_chunks!r}"
        return self.lmhead_chunks

    @property
    def model_name(self) -> str:
        """What the model is called in the name of a run: the size, or the checkpoint without what leads there."""
        return self.model if self.hf_model is None else Path(self.hf_model).name

    @property
    def adapters(self) -> lora.LoraConfig | None:
        """The adapters; None where the model itself is trained."""
        if not self.lora_rank:
            return None
        alpha = 2.0 * self.lora_rank if self.lora_alpha is None else self.lora_alpha
        return lora.LoraConfig(self.lora_rank, alpha, self.lora_targets)

    @property
    def tokens_per_step(self) -> int:
        """Tokens that one optimizer step sees."""
        return self.batch_size * self.seq_len

    @property
    def resolved_warmup_steps(self) -> int:
        """Steps of warm-up, with the default filled in."""
        return min(100, max(1, self.steps // 10)) if self.warmup_steps is None else self.warmup_steps


def default_config(platform: str) -> TrainConfig:
    """The defaults on a device: `tiny` on a CPU, `qwen2-0.5b` at 64 x 1024 tokens a step on a GPU."""
    if platform == "gpu":
        return TrainConfig(model="qwen2-0.5b", seq_len=1024, batch_size=64, lr=6e-4, compute_dtype="bfloat16")
    return TrainConfig()


def validate(config: TrainConfig) -> None:
    """Refuses what cannot run, before anything expensive starts.

    Raises:
      InputError: naming the flag, its value and what is needed.
    """
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if isinstance(value, float) and not math.isfinite(value):
            raise InputError(f"--{field.name} is {value}; it must be a finite number")
    if not 0 <= config.seed < 2**63:
        raise InputError(f"--seed is {config.seed}; it must be between 0 and 2^63 - 1")
    if isinstance(config.lmhead_chunks, int) and config.lmhead_chunks < 1:
        raise InputError(f"--lmhead_chunks is {config.lmhead_chunks}; it must be at least 1, auto or adaptive")
    if any(count < 1 for count in config.chunk_candidates):
        raise InputError(f"--chunk_candidates is {' '.join(map(str, config.chunk_candidates))}; give counts from 1 on")
    for name in (
        *("seq_len", "batch_size", "mlp_chunks", "steps", "val_batches", "max_bad_steps", "sample_tokens"),
        *("mesh_data", "mesh_fsdp", "mesh_model"),
    ):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise InputError(f"--{name} is {value}; it must be at least 1")
    for name in ("val_every", "weight_decay", "checkpoint_every", "keep_checkpoints", "lora_rank", "sample_every"):
        if getattr(config, name) < 0:
            raise InputError(f"--{name} is {getattr(config, name)}; it must not be negative")
    for name in ("lr", "grad_clip", "lora_alpha", "chunk_memory_gb", "chunk_budget_s", "chunk_thermal_s"):
        if getattr(config, name) is not None and not getattr(config, name) > 0:
            raise InputError(f"--{name} is {getattr(config, name)}; it must be greater than 0")
    for name in ("beta1", "beta2", "val_fraction"):
        if not 0 < getattr(config, name) < 1:
            raise InputError(f"--{name} is {getattr(config, name)}; it must be between 0 and 1")
    if not 0 <= config.final_lr_ratio <= 1:
        raise InputError(f"--final_lr_ratio is {config.final_lr_ratio}; it must be between 0 and 1")
    if config.warmup_steps is not None and not 0 <= config.warmup_steps <= config.steps:
        raise InputError(f"--warmup_steps is {config.warmup_steps}; it must be between 0 and --steps ({config.steps})")
    if config.micro_batch_size is not None and (
        config.micro_batch_size < 1 or config.batch_size % config.micro_batch_size
    ):
        raise InputError(
            f"--micro_batch_size is {config.micro_batch_size}; it must divide --batch_size ({config.batch_size})"
        )
    if config.profile_steps is not None and parse_steps(config.profile_steps)[1] > config.steps:
        raise InputError(f"--profile_steps is {config.profile_steps}; --steps ends at {config.steps}")
    if config.resume and config.out_dir is None:
        raise InputError("--resume needs --out_dir: the directory of the run to go on with")
    if config.resume and config.overwrite:
        raise InputError("--resume and --overwrite exclude each other: one keeps the run in out_dir, one replaces it")
    if config.lora_rank and not config.lora_targets:
        raise InputError("--lora_targets names no projection; leave it out for all of them")
    if config.val_data is not None and data.is_examples(config.val_data) != data.is_examples(config.data):
        kinds = [f"{name} is {path}" for name, path in (("--data", config.data), ("--val_data", config.val_data))]
        raise InputError(f"{' and '.join(kinds)}; both must be .jsonl files of examples, or neither")
    writers.check_installed(config.log)
    try:
        choose_implementation(config.lmhead_impl, compute_dtype=config.compute_dtype)
    except ValueError as error:
        raise InputError(f"--lmhead_impl: {error}") from None
