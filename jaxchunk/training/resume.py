"""Going on with a run: from which checkpoint, whether flags and data are still the same, what was recorded so far."""

import dataclasses
import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from jaxchunk import data
from jaxchunk.errors import InputError
from jaxchunk.run_dir import RunDirectory
from jaxchunk.training import checkpoint
from jaxchunk.training.checkpoint import Checkpoint, Unreadable
from jaxchunk.training.config import TrainConfig
from jaxchunk.training.mesh import Shards
from jaxchunk.training.processes import Processes
from jaxchunk.training.records import StepRecord, Stretch
from jaxchunk.training.step import TrainState

_logger = logging.getLogger("jaxchunk")
_T = TypeVar("_T")

# Flags that change nothing of what is learned.
_FREE = (
    *("out_dir", "overwrite", "resume", "allow_changed_data", "cache_dir", "record_telemetry", "log", "profile_steps"),
    *("checkpoint_every", "keep_checkpoints", "val_every", "max_bad_steps", "compilation_cache"),
    *("sample_every", "sample_prompts", "sample_tokens"),
    *("distributed", "coordinator", "num_processes", "process_id"),
    *("mesh_data", "mesh_fsdp", "mesh_model"),  # what they come to is compared
    *("chunk_objective", "chunk_candidates", "chunk_memory_gb", "chunk_budget_s", "chunk_thermal_s"),
    "chunk_time_if_no_energy",
)
# Flags under which the same is computed in another order.
_ROUNDING = (
    "micro_batch_size",
    "lmhead_chunks",
    "lmhead_impl",
    "attention",
    "elementwise",
    "remat",
    "scan_layers",
    "deterministic",
    "mlp_chunks",
)
_BY_CONTENT = ("data", "tokenizer")  # a file may be elsewhere now, with the same in it


@dataclasses.dataclass(frozen=True)
class History:
    """How far a run has come: its records up to a checkpoint, and that checkpoint (None: at the beginning)."""

    checkpoint: Checkpoint | None = None
    records: tuple[StepRecord, ...] = ()
    stretches: tuple[Stretch, ...] = ()
    last_validation: tuple[int, float] = (0, math.nan)  # step and loss

    @property
    def step(self) -> int:
        """The last step that is done."""
        return 0 if self.checkpoint is None else self.checkpoint.step


def find(config: TrainConfig) -> dict[str, Any] | None:
    """What is known of the newest checkpoint that `--resume` can go on from, before anything expensive starts.

    Returns:
      The JSON that was saved with it; None where the run starts from the beginning, which is said.

    Raises:
      InputError: the run in `out_dir` never saves checkpoints, or none can be read.
    """
    if not config.resume or config.out_dir is None:
        return None
    path = Path(config.out_dir)
    steps = checkpoint.saved_steps(path)
    if not steps:
        _check_worth_nothing(path)
        _logger.info("--resume: no checkpoint in %s; the run starts from the beginning", path)
        return None
    return _newest(path, steps, lambda step: checkpoint.read_about(path, step))


def restore(path: Path, like: TrainState, processes: Processes) -> Checkpoint:
    """The newest checkpoint that all processes can read; those that cannot be read are named.

    Raises:
      InputError: there is none.
    """
    steps = processes.first_does("saved steps", lambda: checkpoint.saved_steps(path))

    def read(step: int) -> Checkpoint:
        restored, damage = None, None
        try:
            restored = checkpoint.restore(path, step, like)
        except Unreadable as error:
            damage = str(error)
        damages = [words for words in processes.exchange(f"restored {step}", damage) if words is not None]
        if restored is None or damages:
            raise Unreadable(damages[0])
        return restored

    return _newest(path, steps, read)


def take_up(run: RunDirectory, restored: Checkpoint, processes: Processes) -> History:
    """Brings the records to where the checkpoint is: what was recorded of later steps will be recorded again.

    The records are process 0's; others know of the checkpoint only.
    """
    if not processes.is_first:
        return History(restored)
    for step in checkpoint.saved_steps(run.path):
        if step > restored.step:
            _logger.warning("the checkpoint of step %d is kept as %s", step, checkpoint.set_aside(run.path, step))
    (run.path / "summary.json").unlink(missing_ok=True)  # of a run that has ended, which this one has not
    done = restored.step
    run.keep_lines("samples.jsonl", lambda record: record["step"] <= done)
    run.keep_lines("chunks.jsonl", lambda record: record["step"] <= done)
    return History(
        restored,
        tuple(map(StepRecord.from_dict, run.keep_lines("steps.jsonl", lambda record: record["step"] <= done))),
        tuple(map(Stretch.from_dict, run.keep_lines("stretches.jsonl", lambda record: record["last_step"] <= done))),
        _last_validation(run.keep_lines("validation.jsonl", lambda record: record["step"] <= done)),
    )


def _last_validation(records: list[dict[str, Any]]) -> tuple[int, float]:
    if not records:
        return 0, math.nan
    loss = records[-1]["val_loss"]
    return records[-1]["step"], math.nan if loss is None else loss


def same_run(config: TrainConfig, about: dict[str, Any], shards: Shards) -> TrainConfig:
    """The config to go on with; what was left open stays as it was chosen when the run began.

    The mesh may be another one; then the micro-batch is chosen anew, for another one may fit.

    Args:
      config: the flags now.
      about: of the checkpoint.
      shards: of the mesh now.

    Raises:
      InputError: a flag would change what is learned.
    """
    free = (*_FREE, *_BY_CONTENT, *(() if config.hf_model is None else ("model",)))  # which it takes the place of
    before = about["config"] | {"micro_batch_size": about["micro_batch_size"]}
    if mesh_of(about) != shards:
        _logger.info("the mesh is %s, was %s: the same is computed, but not to the bit", shards, mesh_of(about))
        if config.micro_batch_size is None:
            del before["micro_batch_size"]
    elif config.micro_batch_size is None:
        config = dataclasses.replace(config, micro_batch_size=before["micro_batch_size"])
    if config.lmhead_chunks == "auto" and isinstance(before["lmhead_chunks"], int):
        config = dataclasses.replace(config, lmhead_chunks=before["lmhead_chunks"])
    now = json.loads(json.dumps(dataclasses.asdict(config)))
    changed = {name: (before[name], now[name]) for name in now if name in before and now[name] != before[name]}
    for name, (old, new) in changed.items():
        if name == "steps" and new > old:
            _logger.info("--steps is %d, was %d: from here on the learning rate follows the longer schedule", new, old)
        elif name in _ROUNDING:
            _logger.info("--%s is %s, was %s: the same is computed, but not to the bit", name, new, old)
        elif name == "steps":
            raise InputError(f"--resume: --steps is {new}, was {old}; it can only become larger")
        elif name not in free:
            raise InputError(
                f"--resume: --{name} is {new}, was {old}, and the run would become another one; "
                f"{'leave it out' if old is None else f'give {old}'}, or begin a new run in another --out_dir"
            )
    return config


def mesh_of(about: dict[str, Any]) -> Shards:
    """The mesh that a checkpoint was saved on; before there was a choice, one device."""
    return Shards(**about.get("mesh", {}))


def check_data(config: TrainConfig, about: dict[str, Any], dataset: data.Dataset) -> None:
    """Compares the data with what the checkpoint was trained on, by the hash of the tokens.

    Raises:
      InputError: it is not the same, and `allow_changed_data` is not given.
    """
    old, new = about["data"], dataset.sha256
    if old["tokens_sha256"] == new:
        return
    changed = (
        f"the data changed since the checkpoint of step {about['step']}: --data is {_named(config.data)} "
        f"({dataset.description}), tokens' sha256 {new[:12]}; it was {_named(about['config']['data'])} "
        f"({old['description']}), {old['tokens_sha256'][:12]}"
    )
    if not config.allow_changed_data:
        raise InputError(f"--resume: {changed}; give the same data, or --allow_changed_data to go on with this")
    _logger.warning("warning: %s", changed)


def _named(path: str | None) -> str:
    return "not given" if path is None else path


def _newest(path: Path, steps: list[int], read: Callable[[int], _T]) -> _T:
    for step, older in zip(steps, [*steps[1:], None], strict=True):
        try:
            return read(step)
        except Unreadable as error:
            if older is None:
                raise InputError(
                    f"--resume: no checkpoint in {path} can be read; that of step {step}: {error}; use the "
                    "versions that wrote it, or --overwrite to begin anew"
                ) from None
            _logger.warning(
                "warning: the checkpoint of step %d cannot be read (%s): taking that of %d", step, error, older
            )
    raise AssertionError("there is a checkpoint")


def _check_worth_nothing(path: Path) -> None:
    """Refuses to replace a run that was never meant to be resumed."""
    file = path / "config.json"
    if not file.exists():
        return
    try:
        keep = json.loads(file.read_text()).get("keep_checkpoints", 0)
    except ValueError:
        return  # a kill in the first moments
    if not keep:
        raise InputError(
            f"--resume: the run in {path} saves no checkpoints; choose another out_dir, or --overwrite to replace it"
        )
