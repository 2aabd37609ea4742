"""The `.bin` format: token ids in a file that is memory-mapped, behind a header that says what they are.

Little-endian, 64 bytes (`<8sIIQQ32s`), then the ids:

| bytes | what |
|---|---|
| 0-7 | magic, `jaxchunk` |
| 8-11 | version, 1 |
| 12-15 | bytes per id: 2 (uint16) or 4 (uint32) |
| 16-23 | vocabulary size: every id is below it |
| 24-31 | number of ids |
| 32-63 | SHA-256 of the ids' bytes |
"""

import hashlib
import os
import struct
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from jaxtyping import Integer, UInt

from jaxchunk.data.cache import atomic_write
from jaxchunk.errors import InputError

MAGIC = b"jaxchunk"
VERSION = 1
MAX_VOCAB_SIZE = 1 << 31
"""Ids become int32 on their way to the model."""

_HEADER = struct.Struct("<8sIIQQ32s")
_DTYPES: dict[int, np.dtype] = {2: np.dtype("<u2"), 4: np.dtype("<u4")}
_BLOCK_TOKENS = 1 << 22  # Read at a time while checking, so that a file larger than memory can be checked.


@dataclass(frozen=True)
class TokenFile:
    """A checked `.bin` file.

    Attributes:
      tokens: the ids, a read-only memory map of uint16 or uint32.
      vocab_size: every id is below it.
      sha256: hex digest of the ids' bytes.
      path: where the file is.
    """

    tokens: UInt[np.ndarray, " N"] = field(repr=False)
    vocab_size: int
    sha256: str
    path: Path


def token_dtype(vocab_size: int) -> np.dtype:
    """Returns the smallest dtype of the format that holds every id below `vocab_size`.

    Raises:
      InputError: `vocab_size` is not within 1..2^31.
    """
    if not 1 <= vocab_size <= MAX_VOCAB_SIZE:
        raise InputError(f"the vocabulary size is {vocab_size}: it needs to be from 1 to 2^31")
    return _DTYPES[2 if vocab_size <= 1 << 16 else 4]


def write_tokens(
    path: Path | str,
    tokens: Integer[np.ndarray, " N"] | Iterable[Integer[np.ndarray, " _"]],
    vocab_size: int,
) -> None:
    """Writes a `.bin` file whole or not at all, over an old one of that name.

    Args:
      path: where to write it.
      tokens: the ids, in one array or a stream of arrays (which need not fit into memory).
      vocab_size: every id must be below it.

    Raises:
      InputError: there are no ids, one is not an integer or not in the vocabulary, or the file cannot be
        written (nothing is left of it then, and an old file stays).
    """
    dtype = token_dtype(vocab_size)
    blocks = [tokens] if isinstance(tokens, np.ndarray) else tokens
    num_tokens, digest = 0, hashlib.sha256()
    with atomic_write(Path(path)) as file:
        file.write(bytes(_HEADER.size))  # The count and the digest are known at the end.
        for block in map(np.asarray, blocks):
            if block.ndim != 1 or not np.issubdtype(block.dtype, np.integer):
                raise InputError(f"token ids need to be one row of integers, got {block.dtype}{list(block.shape)}")
            _check_ids(block, vocab_size, num_tokens, f"cannot write {path}")
            data = block.astype(dtype).tobytes()
            file.write(data)
            digest.update(data)
            num_tokens += block.size
        if num_tokens == 0:
            raise InputError(f"there are no tokens to write to {path}: give at least one")
        file.seek(0)
        file.write(_HEADER.pack(MAGIC, VERSION, dtype.itemsize, vocab_size, num_tokens, digest.digest()))


def open_tokens(path: Path | str) -> TokenFile:
    """Opens a `.bin` file, after reading all of it once to check it.

    Raises:
      InputError: it is missing, of another format or version, truncated, changed since it was written, or
        holds an id outside its vocabulary. The message says what was found and what is needed.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            header = file.read(_HEADER.size)
            dtype, vocab_size, num_tokens, sha256 = _parse_header(path, header)
            num_bytes = os.fstat(file.fileno()).st_size
            expected_bytes = _HEADER.size + num_tokens * dtype.itemsize
            if num_bytes != expected_bytes:
                raise InputError(
                    f"{path} has {num_bytes} bytes, but its header announces {num_tokens} tokens of "
                    f"{dtype.itemsize} bytes, {expected_bytes} in all: "
                    f"{'it was cut short' if num_bytes < expected_bytes else 'something was appended'}; write it again"
                )
            digest, start = hashlib.sha256(), 0
            while block := file.read(_BLOCK_TOKENS * dtype.itemsize):
                ids = np.frombuffer(block, dtype)
                _check_ids(ids, vocab_size, start, f"{path} is damaged")
                digest.update(block)
                start += ids.size
            if digest.hexdigest() != sha256:
                raise InputError(
                    f"{path} is damaged: its tokens have the SHA-256 {digest.hexdigest()[:16]}..., its header says "
                    f"{sha256[:16]}...; write it again"
                )
            # From the open file: another process may have put a new one under this name.
            tokens = np.memmap(file, dtype, mode="r", offset=_HEADER.size, shape=(num_tokens,))
    except OSError as error:
        raise InputError(
            f"cannot read {path}: {error.strerror or error}; give a .bin file of tokens that can be read"
        ) from None
    return TokenFile(tokens, vocab_size, sha256, path)


def _parse_header(path: Path, header: bytes) -> tuple[np.dtype, int, int, str]:
    """Returns dtype, vocabulary size, count and hex digest."""
    if not header.startswith(MAGIC):
        raise InputError(
            f"{path} is not a token file of jaxchunk: it starts with {header[: len(MAGIC)]!r} and should start with "
            f"{MAGIC!r}; write it with jaxchunk.data.write_tokens"
        )
    if len(header) < _HEADER.size:
        raise InputError(
            f"{path} was cut short: it has {len(header)} bytes and the header alone has {_HEADER.size}; write it again"
        )
    _, version, bytes_per_token, vocab_size, num_tokens, sha256 = _HEADER.unpack(header)
    if version != VERSION:
        raise InputError(f"{path} has format version {version}; this jaxchunk reads version {VERSION}")
    if bytes_per_token not in _DTYPES:
        raise InputError(f"{path} announces {bytes_per_token} bytes a token; it should be 2 or 4")
    dtype = _DTYPES[bytes_per_token]
    largest = min(1 << 8 * bytes_per_token, MAX_VOCAB_SIZE)
    if not 1 <= vocab_size <= largest:
        raise InputError(
            f"{path} announces a vocabulary of {vocab_size} in {bytes_per_token} bytes a token; it should be from 1 to "
            f"{largest}"
        )
    if num_tokens == 0:
        raise InputError(f"{path} holds no tokens: it needs at least one")
    return dtype, vocab_size, num_tokens, sha256.hex()


def _check_ids(ids: Integer[np.ndarray, " N"], vocab_size: int, start: int, prefix: str) -> None:
    if ids.size == 0 or (ids.max() < vocab_size and ids.min() >= 0):
        return
    position = int(np.argmax((ids < 0) | (ids >= vocab_size)))
    raise InputError(
        f"{prefix}: token {start + position} has the id {ids[position]}, but ids need to be from 0 to {vocab_size - 1}"
    )
