"""The directory of a run: never overwritten by accident, complete up to the last line after a kill."""

import contextlib
import datetime
import itertools
import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from jaxchunk.errors import InputError, RunFailedError

_MARKER = ".jaxchunk-run"  # a name that nothing else uses: only a directory that has it is ever cleared
_HISTORY = "run.json"  # when the run was begun and gone on with


class RunDirectory:
    """Writes JSON files (atomically) and JSON lines (flushed line by line) into the directory `path`.

    Checked when constructed, created when entered: what fails in between leaves nothing behind, and an older run that
    is to be overwritten stays until then.
    """

    def __init__(self, path: str | Path, *, overwrite: bool = False, go_on: bool = False):
        """Checks the directory.

        Args:
          path: where to; parents are created.
          overwrite: replace a run that is there already. Only a directory that holds a run is ever cleared.
          go_on: go on with the run that is there, if there is one: nothing is cleared.

        Raises:
          InputError: the directory cannot be written, holds a run, or holds something else.
        """
        self.path = Path(path)
        self._overwrite = overwrite
        self._go_on = go_on
        self._streams: dict[str, IO[str]] = {}
        self._check_free()
        existing = next(folder for folder in (self.path.absolute(), *self.path.absolute().parents) if folder.exists())
        try:
            with tempfile.TemporaryFile(dir=existing):
                pass
        except OSError as error:
            raise InputError(f"out_dir {self.path} cannot be written: {error.strerror or error}") from None

    @property
    def goes_on(self) -> bool:
        """Whether there is a run here that is gone on with."""
        return self._go_on and holds_run(self.path)

    def __enter__(self) -> "RunDirectory":
        self._check_free()  # again: another run may have come first
        if self.goes_on:
            for lines in self.path.glob("*.jsonl"):
                cut_to_whole_lines(lines)
            return self
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            for old in self.path.iterdir():
                shutil.rmtree(old) if old.is_dir() and not old.is_symlink() else old.unlink()
            (self.path / _MARKER).touch(exist_ok=False)
        except FileExistsError:
            raise InputError(f"out_dir {self.path} was taken by another run just now; choose another") from None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for stream in self._streams.values():
            stream.close()
        self._streams.clear()

    def write_json(self, name: str, value: Any) -> None:
        """Writes `value` as `name`, whole or not at all."""
        temporary = self.path / f".{name}.tmp"
        with self._writing(name):
            temporary.write_text(json.dumps(_finite(value), indent=2, default=str, allow_nan=False) + "\n")
            temporary.replace(self.path / name)

    def read_json(self, name: str) -> Any:
        """What `write_json` wrote as `name`; None where there is no such file.

        Raises:
          InputError: it is damaged.
        """
        path = self.path / name
        try:
            return json.loads(path.read_text()) if path.exists() else None
        except ValueError as error:
            raise InputError(f"{path} is damaged ({error}); choose another out_dir, or --overwrite") from None

    @property
    def beginnings(self) -> int:
        """How often this run was begun or gone on with so far."""
        return 0 if (began := self.read_json(_HISTORY)) is None else 1 + len(began["continued"])

    @property
    def began_unix_s(self) -> float:
        """When this run was first begun; known once it has."""
        return float(self.read_json(_HISTORY)["began_unix_s"])

    def begin(self, config: dict[str, Any], environment: dict[str, Any], **about: Any) -> float:
        """Writes down that the run begins (`config.json`, `env.json`, `run.json`), or goes on (`run.json`).

        Args:
          config: every flag.
          environment: what describes the machine and what was chosen.
          about: goes into `run.json`, of a beginning for good and of a continuation under its time.

        Returns:
          Seconds since the run was first begun.
        """
        began, now_s = self.read_json(_HISTORY), time.time()
        if began is None:
            began = {**about, "began_unix_s": now_s, "continued": []}
            self.write_json("config.json", config)
            self.write_json("env.json", environment)
        else:
            began["continued"].append({"unix_s": now_s, **about, "config": config, "env": environment})
        self.write_json(_HISTORY, began)
        return now_s - float(began["began_unix_s"])

    def append(self, name: str, record: dict[str, Any]) -> None:
        """Appends one line to the JSON-lines file `name`, or nothing: it is with the operating system afterwards.

        NaN and infinities, which JSON does not have, become null.
        """
        path = self.path / name
        with self._writing(name):
            if name not in self._streams:
                self._streams[name] = path.open("a", buffering=1)
            size = os.fstat(self._streams[name].fileno()).st_size
            try:
                self._streams[name].write(json.dumps(_finite(record), allow_nan=False) + "\n")
            except OSError:
                self._forget(name)
                os.truncate(path, size)  # part of the line may be there
                raise

    def keep_lines(self, name: str, keep: Callable[[dict[str, Any]], bool]) -> list[dict[str, Any]]:
        """Cuts the JSON-lines file `name` before the first record that is not to be kept; returns those before it."""
        path = self.path / name
        kept, size = [], 0
        if not path.exists():
            return []
        for line in path.read_bytes().splitlines(keepends=True):
            try:
                record = json.loads(line)
            except ValueError:
                break
            if not line.endswith(b"\n") or not keep(record):
                break
            kept.append(record)
            size += len(line)
        self._forget(name)
        with self._writing(name):
            os.truncate(path, size)
        return kept

    def _forget(self, name: str) -> None:
        if stream := self._streams.pop(name, None):
            with contextlib.suppress(OSError):  # it tries what was refused once more
                stream.close()

    @contextlib.contextmanager
    def _writing(self, name: str) -> Iterator[None]:
        """One line where the disk refuses (it is full, say)."""
        try:
            yield
        except OSError as error:
            reason = error.strerror or error
            raise RunFailedError(f"{self.path / name} cannot be written: {reason}; what was there is kept") from None

    def _check_free(self) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"out_dir {self.path} is a file; it must be a directory")
        if not self.path.is_dir() or not any(self.path.iterdir()):
            return
        if not holds_run(self.path):
            raise InputError(f"out_dir {self.path} is not empty and holds no run; choose another directory")
        if not self._overwrite and not self._go_on:
            raise InputError(f"out_dir {self.path} already holds a run; choose another, or pass --overwrite")


class OtherProcessRun(RunDirectory):
    """The directory of a run that another process writes: takes everything and writes nothing."""

    def __init__(self, path: str | Path):
        """Checks nothing: the other process does."""
        self.path = Path(path)

    def __enter__(self) -> "OtherProcessRun":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    @property
    def beginnings(self) -> int:
        """See `RunDirectory`; not known here."""
        return 0

    @property
    def began_unix_s(self) -> float:
        """See `RunDirectory`; not known here."""
        return 0.0

    def write_json(self, name: str, value: Any) -> None:
        """See `RunDirectory`."""

    def begin(self, config: dict[str, Any], environment: dict[str, Any], **about: Any) -> float:
        """See `RunDirectory`; the run begins now."""
        return 0.0

    def append(self, name: str, record: dict[str, Any]) -> None:
        """See `RunDirectory`."""


def holds_run(path: Path) -> bool:
    """Whether a run was begun in a directory."""
    return (path / _MARKER).exists()


def new_run_path(name: str) -> Path:
    """A path under `runs/` that nothing uses yet: the time, the name, and a number where that is taken."""
    stem = f"{datetime.datetime.now():%Y%m%d-%H%M%S}-{name}"
    candidates = itertools.chain([stem], (f"{stem}-{number}" for number in itertools.count(2)))
    return next(path for path in (Path("runs") / candidate for candidate in candidates) if not path.exists())


def read_json_lines(path: str | Path) -> list[dict[str, Any]]:
    """Reads a JSON-lines file up to the last whole line (a kill may cut the next); empty where there is no file."""
    records: list[dict[str, Any]] = []
    if not Path(path).exists():
        return records
    for line in Path(path).read_text().splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def cut_to_whole_lines(path: Path) -> None:
    """Removes what a kill left of a last line, so that more lines can follow."""
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        os.truncate(path, whole)  # at once: a kill in here loses nothing


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
