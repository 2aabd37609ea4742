"""The directory of a run: never overwritten by accident, complete up to the last line after a kill."""

import json
import shutil
import tempfile
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from jaxchunk.errors import InputError

_MARKER = "config.json"  # written first: what has it is a run


class RunDirectory:
    """Writes JSON files (atomically) and JSON lines (flushed line by line) into the directory `path`.

    Checked when constructed, created when entered: what fails in between leaves nothing behind, and an older run that
    is to be overwritten stays until then.
    """

    def __init__(self, path: str | Path, *, overwrite: bool = False):
        """Checks the directory.

        Args:
          path: where to; parents are created.
          overwrite: replace a run that is there already. Only a directory that holds a run is ever deleted.

        Raises:
          InputError: the directory cannot be written, holds a run, or holds something else.
        """
        self.path = Path(path)
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"out_dir {self.path} is a file; it must be a directory")
        if (self.path / _MARKER).exists() and not overwrite:
            raise InputError(f"out_dir {self.path} already holds a run; choose another, or pass --overwrite")
        if self.path.is_dir() and any(self.path.iterdir()) and not (self.path / _MARKER).exists():
            raise InputError(f"out_dir {self.path} is not empty and holds no run; choose another directory")
        existing = next(folder for folder in (self.path.absolute(), *self.path.absolute().parents) if folder.exists())
        try:
            with tempfile.TemporaryFile(dir=existing):
                pass
        except OSError as error:
            raise InputError(f"out_dir {self.path} cannot be written: {error.strerror or error}") from None
        self._streams: dict[str, IO[str]] = {}

    def write_json(self, name: str, value: Any) -> None:
        """Writes `value` as `name`, whole or not at all."""
        temporary = self.path / f".{name}.tmp"
        temporary.write_text(json.dumps(value, indent=2, default=str) + "\n")
        temporary.replace(self.path / name)

    def append(self, name: str, record: dict[str, Any]) -> None:
        """Appends one line to the JSON-lines file `name`; it is with the operating system before this returns."""
        if name not in self._streams:
            self._streams[name] = (self.path / name).open("a", buffering=1)
        self._streams[name].write(json.dumps(record) + "\n")

    def close(self) -> None:
        """Closes the JSON-lines files."""
        for stream in self._streams.values():
            stream.close()
        self._streams.clear()

    def __enter__(self) -> "RunDirectory":
        if self.path.exists():
            shutil.rmtree(self.path)
        self.path.mkdir(parents=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


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
