"""Checkpoints: everything that a run needs to go on exactly, written by Orbax while training goes on.

A run's directory has them under `checkpoints/`, one directory a step. Orbax writes into a temporary directory that it
renames when everything is there: what a kill leaves is no checkpoint, and the next run clears it away. Each has three
items: `params`; `optimizer` (its state and the step's number); `run` (JSON): the flags, the model, the data's hash and
the position in it. Of adapters, `params` are these alone; the flags say where their base is from (`hf_model`, or
`seed`) and `run` has its fingerprint.
"""

import contextlib
import dataclasses
import errno
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from jaxchunk.errors import InputError, first_line
from jaxchunk.models import hf, lora, qwen2
from jaxchunk.training.config import TrainConfig
from jaxchunk.training.processes import Processes
from jaxchunk.training.step import TrainState

_logger = logging.getLogger("jaxchunk")
_DIRECTORY = "checkpoints"
_ALONE = Processes(1, 0, 0)
_ITEMS = ("params", "optimizer", "run")
_CLEARING_TIMEOUT_S = 10.0  # for removing what a failed save wrote
_FORMAT = 1  # of the items; a change that older code cannot read needs a new number


class Checkpoint(NamedTuple):
    """A restored checkpoint: the state after `step`, and the JSON that was saved with it."""

    step: int
    state: TrainState
    about: dict[str, Any]


class SavedModel(NamedTuple):
    """A trained model: the flags of its run, its architecture, its float32 parameters, the step they are of.

    Where adapters were trained, `params` have them merged in, and `adapters` are these alone.
    """

    config: TrainConfig
    model: qwen2.Qwen2Config
    params: qwen2.Params
    step: int
    adapters: qwen2.Params | None = None


class Unreadable(Exception):  # noqa: N818 (nothing has to be wrong with the program)
    """A checkpoint that is there and cannot be used; the message says why."""


class Checkpoints:
    """Saves a run's checkpoints; a save that fails (a full disk, say) is told and ends nothing.

    Use as a context manager: leaving waits for what is being written.
    """

    def __init__(self, run_path: Path, *, keep: int, say: Callable[[str], None], processes: Processes = _ALONE):
        """Opens the directory and clears away what unfinished saves left.

        Args:
          run_path: the run's directory.
          keep: how many of the latest checkpoints stay; the best by validation loss stays besides.
          say: takes a line for people.
          processes: that hold the state together, each of which opens the directory and saves.
        """
        self._processes = processes
        self._opened = 0
        self._path = run_path / _DIRECTORY
        self._keep = keep
        self._say = say
        self._pending: int | None = None
        self.newest: int | None = None  # the last step whose checkpoint is whole
        self.blocked_s = 0.0  # how long saves have kept the training waiting
        self._reopen()

    def save(self, step: int, state: TrainState, about: dict[str, Any], val_loss: float | None) -> None:
        """Begins to save, unless it is saved; returns when the state has been copied and may be donated.

        Args:
          step: the step whose outcome `state` is.
          state: arrays on the device.
          about: JSON values that `restore` gives back.
          val_loss: validation loss of that state, where it is known.
        """
        start_s = time.perf_counter()
        self.wait()
        if self.newest == step:
            return
        arguments = ocp.args.Composite(
            params=ocp.args.StandardSave(state.params),
            optimizer=ocp.args.StandardSave({"opt_state": state.opt_state, "step": state.step}),
            run=ocp.args.JsonSave({"format": _FORMAT, **about}),
        )
        with self._failures_told(step):
            self._check_room(step, state)
            self._pending = step
            metrics = None if val_loss is None else {"val_loss": val_loss}
            self._manager.save(step, args=arguments, metrics=metrics, force=True)  # Orbax is not to decide whether
        self.blocked_s += time.perf_counter() - start_s

    def poll(self) -> None:
        """Says at once, and not at the next save, that one has failed. Never blocks; several processes cannot tell."""
        if self._processes.count == 1 and self._pending is not None and not self._manager.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Waits until nothing is being written; what has failed is told and cleared away."""
        if self._pending is not None:
            with self._failures_told(self._pending):
                self._manager.wait_until_finished()
                self.newest, self._pending = self._pending, None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.wait()
        self._manager.close()

    def _check_room(self, step: int, state: TrainState) -> None:
        """Refuses what the disk will not hold, before it is full: others write there too."""
        needed = sum(array.nbytes for array in jax.tree.leaves(state._replace(frozen=None)))

        def lacking() -> str | None:
            room = shutil.disk_usage(self._path)
            enough = room.total <= 0 or room.free >= needed  # some file systems do not say
            return None if enough else f"it needs {needed / 1e9:.3g} GB, and {room.free / 1e9:.3g} are free"

        if (obstacle := self._processes.first_does(f"room for {step}", lacking)) is not None:
            raise OSError(errno.ENOSPC, obstacle)

    @contextlib.contextmanager
    def _failures_told(self, step: int) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:  # TensorStore's errors are ValueErrors
            self._pending = None
            with contextlib.suppress(OSError, ValueError):  # it raises the same once more
                self._manager.close()
            self._reopen()
            kept = "there is none before it" if self.newest is None else f"that of step {self.newest} stays"
            self._say(f"the checkpoint of step {step} could not be written: {_reason(error)}; {kept}")

    def _reopen(self) -> None:
        """A manager that knows what is on the disk: after a failed save it no longer does."""
        self._opened += 1
        self._processes.first_does(f"checkpoints cleared {self._opened}", self._clear)
        self._manager = _manager(self._path, keep=self._keep)
        self.newest = self._manager.latest_step()

    def _clear(self) -> None:
        deadline_s = time.monotonic() + _CLEARING_TIMEOUT_S
        while unfinished := list(self._path.glob(f"*{ocp.utils.TMP_DIR_SUFFIX}*")):
            for path in unfinished:
                shutil.rmtree(path, ignore_errors=True)
            if time.monotonic() > deadline_s:
                break
            time.sleep(0.01)  # other threads of a save that has failed may still be writing
        for metrics in self._path.glob("*/metrics"):
            try:
                json.loads((metrics / "metrics").read_text())["val_loss"]
            except (OSError, ValueError, KeyError):  # Orbax would not open the directory at all
                _logger.warning("warning: the validation loss of checkpoint %s cannot be read", metrics.parent.name)
                shutil.rmtree(metrics, ignore_errors=True)


def saved_steps(run_path: Path) -> list[int]:
    """The steps that a run's directory has checkpoints of, the newest first."""
    if not (run_path / _DIRECTORY).is_dir():
        return []
    with _reading(run_path) as manager:
        return sorted(manager.all_steps(), reverse=True)


def read_about(run_path: Path, step: int) -> dict[str, Any]:
    """The JSON that was saved with a checkpoint.

    Raises:
      Unreadable: it is damaged or of another version.
    """
    with _reading(run_path) as manager, _damage_named():
        about: dict[str, Any] = manager.restore(step, args=ocp.args.Composite(run=ocp.args.JsonRestore()))["run"]
        if about["format"] != _FORMAT:
            raise Unreadable(f"it has format {about['format']}, and this jaxchunk reads format {_FORMAT}")
    return about


def architecture(about: dict[str, Any]) -> qwen2.Qwen2Config:
    """The model that a checkpoint is of; `about` is what was saved with it."""
    return hf.parse_config(about["model"], f"the checkpoint of step {about['step']}")


def restore(run_path: Path, step: int, like: TrainState) -> Checkpoint:
    """Reads a checkpoint.

    Args:
      run_path: the run's directory.
      step: one of `saved_steps`.
      like: shape, dtype and sharding of every array; the sharding need not be the one it was saved with.

    Raises:
      Unreadable: it is damaged, of another version, or of other shapes.
    """
    about = read_about(run_path, step)
    arguments = ocp.args.Composite(
        params=ocp.args.StandardRestore(like.params),
        optimizer=ocp.args.StandardRestore({"opt_state": like.opt_state, "step": like.step}),
    )
    with _reading(run_path, together=True) as manager, _damage_named():
        restored = manager.restore(step, args=arguments)
    return Checkpoint(step, TrainState(restored["params"], **restored["optimizer"]), about)


def set_aside(run_path: Path, step: int) -> Path:
    """Moves a checkpoint out of the way, so that its step can be saved anew; returns where to."""
    target = run_path / f"unreadable-checkpoint-{step}"
    shutil.rmtree(target, ignore_errors=True)
    return (run_path / _DIRECTORY / str(step)).rename(target)


def load_params(run_path: Path | str, *, best: bool = False) -> SavedModel:
    """The parameters that a run has saved, on the first device; adapters are merged into their base.

    Args:
      run_path: the run's directory; the run may still be going on.
      best: those with the lowest validation loss, instead of the latest.

    Raises:
      InputError: there are none, they cannot be read, or the base of adapters is gone or another.
    """
    run_path = Path(run_path)
    if not saved_steps(run_path):
        raise InputError(f"{run_path} holds no checkpoint: give the directory of a run that saved one")
    with _reading(run_path, losses=best) as manager:
        step = manager.best_step() if best else manager.latest_step()
        if step is None:
            raise InputError(f"no checkpoint in {run_path} has a validation loss: take the latest")
        try:
            about = read_about(run_path, step)
            model = architecture(about)
            device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
            config = _flags(about)
            adapters = config.adapters
            shapes = qwen2.param_shapes(model) if adapters is None else lora.adapter_shapes(adapters, model)
            shapes = jax.tree.map(lambda shape: shape.update(sharding=device), shapes)
            with _damage_named():
                arguments = ocp.args.Composite(params=ocp.args.StandardRestore(shapes))
                params = manager.restore(step, args=arguments)["params"]
        except Unreadable as error:
            raise InputError(f"the checkpoint of step {step} in {run_path} cannot be read: {error}") from None
    if adapters is None:
        return SavedModel(config, model, params, step)
    base = base_params(config, model)
    check_base(config, about, qwen2.cast_weights(base, config.compute_dtype))
    return SavedModel(config, model, lora.merge(adapters, base, params), step, params)


def base_params(config: TrainConfig, model: qwen2.Qwen2Config) -> qwen2.Params:
    """The parameters, in float32, that a run began with.

    Raises:
      InputError: its `hf_model` cannot be read.
    """
    if config.hf_model is None:
        return qwen2.init(model, jax.random.key(config.seed))
    return hf.load(config.hf_model, jnp.float32)[1]


def check_base(config: TrainConfig, about: dict[str, Any], base: qwen2.Params | None) -> None:
    """Compares a base, as it is kept in a `TrainState`, with what a checkpoint's adapters were trained on.

    Raises:
      InputError: it is not the same.
    """
    if base is None or lora.fingerprint(base) != about["base_fingerprint"]:
        named = "the weights of --seed" if config.hf_model is None else f"--hf_model {config.hf_model}"
        raise InputError(
            f"{named} are not what the adapters of step {about['step']} were trained on: give what the run began with"
        )


def _flags(about: dict[str, Any]) -> TrainConfig:
    """The flags of a run, as far as this version knows them."""
    known = {field.name for field in dataclasses.fields(TrainConfig)}
    flags: dict[str, Any] = {}
    for name in known & about["config"].keys():
        value = about["config"][name]
        flags[name] = tuple(value) if isinstance(value, list) else value  # JSON has no tuples
    return TrainConfig(**flags)


def _manager(path: Path, *, keep: int = 1, losses: bool = True, together: bool = True) -> ocp.CheckpointManager:
    """A manager of all processes together, or of this one, which then only reads."""
    alone: dict[str, Any] = {}
    if jax.process_count() > 1 and not together:
        this = jax.process_index()
        only_this = ocp.options.MultiprocessingOptions(
            primary_host=this, active_processes={this}, barrier_sync_key_prefix=f"process{this}"
        )
        alone = {"multiprocessing_options": only_this, "create": False}
    best = checkpoint_managers.BestN(
        get_metric_fn=lambda metrics: -metrics["val_loss"], n=1, keep_checkpoints_without_metrics=False
    )
    options = ocp.CheckpointManagerOptions(
        best_fn=lambda metrics: metrics["val_loss"],
        best_mode="min",
        # Made in the background, a directory that cannot be made lets other threads of Orbax wait for it for minutes.
        async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
        lightweight_initialize=not losses,
        preservation_policy=checkpoint_managers.AnyPreservationPolicy([checkpoint_managers.LatestN(keep), best]),
        **alone,
    )
    return ocp.CheckpointManager(path.absolute(), item_names=_ITEMS, options=options)


@contextlib.contextmanager
def _reading(run_path: Path, *, losses: bool = False, together: bool = False) -> Iterator[ocp.CheckpointManager]:
    """A manager that is not to save; it writes nothing by itself, so that a run may be read while it goes on."""
    with contextlib.closing(_manager(run_path / _DIRECTORY, losses=losses, together=together)) as manager:
        yield manager


@contextlib.contextmanager
def _damage_named() -> Iterator[None]:
    try:
        yield
    except (Unreadable, MemoryError, jax.errors.JaxRuntimeError):  # too little memory is no damage
        raise
    except Exception as error:  # Orbax wraps what went wrong while reading in bare Exceptions
        raise Unreadable(_reason(error)) from error


def _reason(error: BaseException) -> str:
    """One line: of TensorStore's page-long messages the operating system's error, or the beginning."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if code := re.search(r"os_error_code='(\d+)'", str(error)):
        return os.strerror(int(code[1]))
    if isinstance(error.__cause__, ValueError):
        return _reason(error.__cause__)
    line = first_line(error)
    return line if len(line) <= 200 else line[:200] + "..."
