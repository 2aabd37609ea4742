"""Where people look besides `steps.jsonl`: TensorBoard and Weights & Biases get the same numbers as they are recorded.

Neither can stop a run: one that fails is given up, with a word. They are optional extras, imported where they are asked
for.
"""

import contextlib
import hashlib
import importlib
import importlib.util
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from tqdm import tqdm

from jaxchunk.errors import InputError, first_line

Name = Literal["tensorboard", "wandb"]

_MODULES: dict[Name, str] = {"tensorboard": "tensorboardX", "wandb": "wandb"}


class _Writer(Protocol):
    def write(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


def check_installed(names: Sequence[Name]) -> None:
    """Looks for the packages of the writers without importing them.

    Raises:
      InputError: one is not installed; it says what to install.
    """
    for name in names:
        module = _MODULES[name]
        if importlib.util.find_spec(module) is None:
            raise InputError(f'--log {name}: {module} is not installed; run: pip install "jaxchunk[{name}]"')


class Writers:
    """Those of a run that still work."""

    def __init__(self, say: Callable[[str], None]):
        self._say = say
        self._open: dict[Name, _Writer] = {}

    def add(self, name: Name, open_writer: Callable[[], _Writer]) -> None:
        """Opens one more."""
        with self._giving_up(name):
            self._open[name] = open_writer()

    def write(self, record: Mapping[str, Any]) -> None:
        """A line of `steps.jsonl` or `validation.jsonl`; what is not known is left out, which is not 0."""
        values = {name: value for name, value in _numbers(record) if name != "step"}
        for name, writer in list(self._open.items()):
            with self._giving_up(name):
                writer.write(record["step"], values)

    def close(self) -> None:
        """Hands over what is still under way."""
        for name, writer in list(self._open.items()):
            with self._giving_up(name):
                writer.close()

    @contextlib.contextmanager
    def _giving_up(self, name: Name) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # of packages that are not ours, over a network: anything
            self._open.pop(name, None)
            self._say(f"warning: --log {name} failed ({first_line(error)}): it gets nothing more; the run goes on")


@contextlib.contextmanager
def open_writers(
    names: Sequence[Name],
    path: Path,
    *,
    config: dict[str, Any],
    began_unix_s: float,
    done_steps: int,
    say: Callable[[str], None] = tqdm.write,
) -> Iterator[Writers]:
    """The writers of the run in `path`.

    Args:
      names: which.
      path: the run's directory, where both keep their files.
      config: every flag.
      began_unix_s: when the run was first begun, which makes a continuation the same run.
      done_steps: after which step it goes on; what was written of later ones is written again.
      say: gets a line where one fails; by default, standard output, above a progress bar.
    """
    writers = Writers(say)
    openers: dict[Name, Callable[[], _Writer]] = {
        "tensorboard": lambda: _TensorBoard(path, done_steps),
        "wandb": lambda: _WeightsAndBiases(path, config, began_unix_s),
    }
    for name in dict.fromkeys(names):
        writers.add(name, openers[name])
    try:
        yield writers
    finally:
        writers.close()


class _TensorBoard:
    """Event files in `tensorboard/`."""

    def __init__(self, path: Path, done_steps: int):
        module: Any = importlib.import_module(_MODULES["tensorboard"])
        purge_step = done_steps + 1 if done_steps else None
        self._writer = module.SummaryWriter(str(path / "tensorboard"), purge_step=purge_step)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _WeightsAndBiases:
    """A run of W&B, in the project "jaxchunk" unless `WANDB_PROJECT` names another."""

    def __init__(self, path: Path, config: dict[str, Any], began_unix_s: float):
        module: Any = importlib.import_module(_MODULES["wandb"])
        identity = hashlib.sha256(f"{path.name} {began_unix_s}".encode()).hexdigest()[:16]
        self._run = module.init(
            project=os.environ.get("WANDB_PROJECT", "jaxchunk"),
            name=path.name,
            id=identity,
            resume="allow",
            dir=str(path),
            config=config,
            allow_val_change=True,  # a continuation may have more steps
        )
        self._run.define_metric("*", step_metric="step")  # its own step never goes back, as a continuation may

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({"step": step, **values})

    def close(self) -> None:
        self._run.finish()


def _numbers(record: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """The known numbers of a record, those inside of it as "throttle/sw_power_cap"."""
    for name, value in record.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and math.isfinite(value):
            yield prefix + name, value
