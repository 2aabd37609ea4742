"""The safetensors files of a checkpoint: one, or several behind an index. Nothing here unpickles."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jaxchunk.errors import InputError
from jaxchunk.models.hf.config import read_json_object

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


class StoredTensor(NamedTuple):
    """What the header of a file says of a tensor; `dtype` in the format's own words, as in "BF16"."""

    path: Path
    dtype: str
    shape: tuple[int, ...]


class Shards:
    """The tensors of a checkpoint by name; headers are read at once, a tensor when it is asked for."""

    def __init__(self, directory: Path):
        """Opens every file of the checkpoint.

        Raises:
          InputError: there are none, one is missing or damaged, or they hold something else than the index says.
        """
        self._files: dict[Path, Any] = {}
        self.tensors: dict[str, StoredTensor] = {}
        index = _read_index(directory)
        for path in [directory / SINGLE_FILE] if index is None else sorted(set(index.values())):
            if not path.is_file():
                raise InputError(f"{path} is missing: {INDEX_FILE} names it; copy or download it again")
            self._open(path)
        for name, path in (index or {}).items():
            if name not in self.tensors or self.tensors[name].path != path:
                raise InputError(f"{path} has no tensor {name}, which {INDEX_FILE} says it has")

    def _open(self, path: Path) -> None:
        try:
            file = self._files[path] = safe_open(path, framework="numpy")
        except (SafetensorError, OSError) as error:
            raise InputError(
                f"{path} ({path.stat().st_size:,} bytes) is no whole safetensors file: {error}; "
                "copy or download it again"
            ) from None
        for name in file.keys():  # noqa: SIM118 (this is not a dict)
            if name in self.tensors:
                raise InputError(f"{path} and {self.tensors[name].path} both hold the tensor {name}")
            stored = file.get_slice(name)
            self.tensors[name] = StoredTensor(path, stored.get_dtype(), tuple(stored.get_shape()))

    def read(self, name: str) -> np.ndarray:
        """A copy of the tensor in memory."""
        return self._files[self.tensors[name].path].get_tensor(name)


def _read_index(directory: Path) -> dict[str, Path] | None:
    """Tensor name to file, from the index; None for a checkpoint of one file."""
    if (directory / SINGLE_FILE).is_file():
        return None
    path = directory / INDEX_FILE
    if path.is_file():
        weight_map = read_json_object(path).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise InputError(f"{path} is damaged: it has no weight_map")
        for name in weight_map.values():
            if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
                raise InputError(f"{path}: {name!r} is no name of a safetensors file beside it")
        return {tensor: directory / name for tensor, name in weight_map.items()}
    pickles = sorted(path.name for pattern in _PICKLES for path in directory.glob(pattern))
    if pickles:
        raise InputError(
            f"{directory} has its weights in {pickles[0]}, a pickle, which can run code when it is read, and "
            "is not read here; convert it with transformers: model.save_pretrained(DIRECTORY) writes safetensors"
        )
    raise InputError(f"{directory} holds neither {SINGLE_FILE} nor {INDEX_FILE}")


def write_shards(
    directory: Path,
    sizes_bytes: dict[str, int],
    tensor: Callable[[str], np.ndarray],
    max_shard_size: int,
) -> None:
    """Writes tensors to one file, or to several and their index; in memory there is one file at a time.

    Args:
      directory: an existing one.
      sizes_bytes: the tensors' sizes by name, in the order in which they are to be stored.
      tensor: gives a tensor when it is its turn.
      max_shard_size: bytes in a file at most, but for a tensor that is larger by itself.
    """
    shards = _plan(sizes_bytes, max_shard_size)
    count = len(shards)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file_name = SINGLE_FILE if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
        write_tensors(directory / file_name, {name: tensor(name) for name in names})
        weight_map |= dict.fromkeys(names, file_name)
    if count > 1:
        index = {"metadata": {"total_size": sum(sizes_bytes.values())}, "weight_map": weight_map}
        (directory / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")


def write_tensors(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """Writes a safetensors file as transformers and PEFT read it."""
    path.touch()
    mode = path.stat().st_mode
    # save_file stores the memory as it lies: a transposed view would be stored in the wrong order.
    contiguous = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    save_file(contiguous, path, metadata={"format": "pt"})  # transformers 4 wants the metadata
    path.chmod(mode)  # safetensors 0.8 lets only its owner read a file


def _plan(sizes_bytes: dict[str, int], max_shard_size: int) -> Sequence[Sequence[str]]:
    shards: list[list[str]] = [[]]
    room = max_shard_size
    for name, size in sizes_bytes.items():
        if size > room and shards[-1]:
            shards.append([])
            room = max_shard_size
        shards[-1].append(name)
        room -= size
    return shards
