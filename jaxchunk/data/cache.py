"""Where prepared data is kept between runs, and how a file gets there whole or not at all."""

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from jaxchunk.errors import InputError


def default_cache_dir() -> Path:
    """Returns `$XDG_CACHE_HOME/jaxchunk`, or `~/.cache/jaxchunk` where that is not set.

    Raises:
      InputError: this user has no home directory to keep a cache in.
    """
    xdg = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if xdg.is_absolute():  # The XDG specification says to ignore a relative path.
        return xdg / "jaxchunk"
    try:
        return Path.home() / ".cache" / "jaxchunk"
    except RuntimeError:
        raise InputError(
            "there is no home directory to cache the prepared data in: set XDG_CACHE_HOME or give a cache_dir"
        ) from None


def is_cached(path: Path) -> bool:
    """Returns whether there is a file; not where the cache cannot be entered (writing to it will say why)."""
    try:
        return path.is_file()
    except OSError:
        return False


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Opens a file that appears at `path` only when the block ends without an error.

    It is written beside `path` under a name of its own and then renamed. A killed process therefore leaves
    the old file or none, and processes that prepare the same file at once each install a whole one.

    Raises:
      InputError: the file system refused (a full disk, no permission, a file where a folder is needed).
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # Or a power cut can leave the new name on an empty file.
        temporary.replace(path)
    except OSError as error:
        raise InputError(
            f"cannot write {path}: {error.strerror or error}; "
            "free some space there, or choose a folder that can be written"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
