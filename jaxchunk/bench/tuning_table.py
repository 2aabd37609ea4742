"""Writes tables of tuned tile configurations (`lm_head/kernels/tuned.py` reads them)."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxchunk.errors import InputError, RunFailedError
from jaxchunk.lm_head.kernels.tuned import Entry, read_table


def check_table(path: Path) -> None:
    """Refuses to write over what is no table, or holds what would be lost.

    Raises:
      InputError: the file has something that cannot be read as a table, or there is no directory for it.
    """
    if not path.parent.is_dir():
        raise InputError(f"--write_table is {path}; there is no directory {path.parent}")
    if path.exists() and (complaints := read_table(path).complaints):
        raise InputError(f"--write_table: {complaints[0]}; repair it first, or name another file")


def merge_into(path: Path, new: Sequence[Entry]) -> None:
    """Puts entries into the table at `path`, each in the place of an older one for the same case.

    Raises:
      InputError: as `check_table`.
      RunFailedError: it cannot be written.
    """
    check_table(path)
    entries = {_case(entry): entry for entry in (*(read_table(path).entries if path.exists() else ()), *new)}
    lines = [json.dumps(dataclasses.asdict(entries[case])) for case in sorted(entries)]
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text("[\n " + ",\n ".join(lines) + "\n]\n")
        temporary.replace(path)
    except OSError as error:
        raise RunFailedError(f"{path} cannot be written: {error.strerror or error}") from None


def _case(entry: Entry) -> tuple[Any, ...]:
    return entry.kernel, entry.device, entry.D, entry.V, entry.C
