"""Choices that were made before, one JSON file for each set of circumstances."""

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

from jaxchunk.data.cache import atomic_write, default_cache_dir
from jaxchunk.errors import InputError

_logger = logging.getLogger("jaxchunk")
_FORMAT = 1


def path_of(circumstances: dict[str, Any], cache_dir: Path | None) -> Path:
    """Where the choice for these circumstances is, or would be."""
    digest = hashlib.sha256(json.dumps(circumstances, sort_keys=True).encode()).hexdigest()
    return (cache_dir or default_cache_dir()) / "chunk-choices" / f"{digest[:24]}.json"


def read(circumstances: dict[str, Any], cache_dir: Path | None) -> dict[str, Any] | None:
    """The choice that was written for exactly these circumstances; a file that says otherwise is ignored, with a word.

    Args:
      circumstances: JSON values: everything that a choice depends on.
      cache_dir: of all of jaxchunk's caches; None for the user's.
    """
    path = path_of(circumstances, cache_dir)
    try:
        content = json.loads(path.read_text())
        if content["format"] != _FORMAT or content["circumstances"] != circumstances:
            _logger.warning("warning: %s is of another version or device: it is ignored", path)
            return None
        choice = content["choice"]
        if not isinstance(choice["num_chunks"], int):
            raise TypeError(f"num_chunks is {choice['num_chunks']!r}")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        _logger.warning("warning: %s cannot be used (%s: %s): it is ignored", path, type(error).__name__, error)
        return None
    return dict(choice)


def write(circumstances: dict[str, Any], choice: dict[str, Any], cache_dir: Path | None) -> None:
    """Keeps a choice; a cache that cannot be written costs the next measurement and nothing else."""
    path = path_of(circumstances, cache_dir)
    content = {"format": _FORMAT, "circumstances": circumstances, "choice": choice}
    try:
        with atomic_write(path) as file:
            file.write((json.dumps(content, indent=2) + "\n").encode())
    except InputError as error:
        _logger.warning("warning: the choice of chunks is not kept: %s", error)
