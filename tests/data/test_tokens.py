import contextlib
import hashlib
import resource
import struct
import subprocess
import sys

import numpy as np
import pytest

from jaxchunk.data import open_tokens, tokens, write_tokens
from jaxchunk.errors import InputError

IDS = np.array([0, 5, 999, 65, 7], np.int64)


def make_file(path, ids, vocab_size=1000, **changes):
    """Writes the format by hand, field by field, so that the test does not lean on the writer."""
    fields = {"magic": b"jaxchunk", "version": 1, "width": 2, "vocab_size": vocab_size, "count": len(ids)}
    fields |= changes
    payload = np.array(ids).astype({2: "<u2", 4: "<u4"}.get(fields["width"], "<u2")).tobytes()
    fields.setdefault("sha256", hashlib.sha256(payload).digest())
    path.write_bytes(struct.pack("<8sIIQQ32s", *fields.values()) + payload)
    return path


@pytest.mark.parametrize(("vocab_size", "dtype"), [(1000, "<u2"), (65536, "<u2"), (65537, "<u4")])
def test_round_trip(tmp_path, vocab_size, dtype):
    path = tmp_path / "a.bin"
    ids = np.append(IDS, vocab_size - 1)
    write_tokens(path, ids, vocab_size)
    assert path.stat().st_size == 64 + len(ids) * int(dtype[-1])
    token_file = open_tokens(path)
    assert isinstance(token_file.tokens, np.memmap)
    assert token_file.tokens.dtype == dtype
    assert token_file.tokens.tolist() == ids.tolist()
    assert (token_file.vocab_size, token_file.path) == (vocab_size, path)
    assert token_file.sha256 == hashlib.sha256(ids.astype(dtype).tobytes()).hexdigest()
    with pytest.raises(ValueError, match="read-only"):
        token_file.tokens[0] = 1


def test_bytes_are_those_of_the_documented_format(tmp_path):
    write_tokens(tmp_path / "written.bin", IDS, 1000)
    assert (tmp_path / "written.bin").read_bytes() == make_file(tmp_path / "made.bin", IDS).read_bytes()


def test_stream_of_blocks_is_the_same_file(tmp_path):
    write_tokens(tmp_path / "whole.bin", IDS, 1000)
    write_tokens(tmp_path / "blocks.bin", (IDS[i : i + 2] for i in range(0, 5, 2)), 1000)
    assert (tmp_path / "blocks.bin").read_bytes() == (tmp_path / "whole.bin").read_bytes()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"magic": b"NUMPY\0\0\0"}, r"starts with b'NUMPY.*should start with b'jaxchunk'"),
        ({"version": 2}, "format version 2; this jaxchunk reads version 1"),
        ({"width": 3}, "announces 3 bytes a token; it should be 2 or 4"),
        ({"vocab_size": 0}, "vocabulary of 0 in 2 bytes a token; it should be from 1 to 65536"),
        ({"vocab_size": 70000}, "vocabulary of 70000 in 2 bytes a token"),
        ({"vocab_size": 2**63, "width": 4}, "it should be from 1 to 2147483648"),
        ({"count": 6}, "74 bytes, but its header announces 6 tokens of 2 bytes, 76 in all: it was cut short"),
        ({"count": 4}, "something was appended"),
        ({"count": 2**62}, "cut short"),
        ({"count": 0}, "holds no tokens"),
        ({"vocab_size": 999}, "token 2 has the id 999, but ids need to be from 0 to 998"),
        ({"sha256": b"\1" * 32}, r"SHA-256 [0-9a-f]{16}\.\.\., its header says 0101010101010101"),
    ],
)
def test_bad_header_or_payload(tmp_path, changes, message):
    path = make_file(tmp_path / "a.bin", IDS, **changes)
    with pytest.raises(InputError, match=message) as error:
        open_tokens(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("size", "message"), [(0, "starts with b''"), (20, "20 bytes and the header alone has 64")])
def test_shorter_than_the_header(tmp_path, size, message):
    path = make_file(tmp_path / "a.bin", IDS)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(InputError, match=message):
        open_tokens(path)


def test_missing_file_and_directory(tmp_path):
    with pytest.raises(InputError, match="No such file"):
        open_tokens(tmp_path / "a.bin")
    with pytest.raises(InputError, match="Is a directory"):
        open_tokens(tmp_path)


def test_bad_id_is_found_in_a_later_block(tmp_path, monkeypatch):
    monkeypatch.setattr(tokens, "_BLOCK_TOKENS", 2)
    open_tokens(make_file(tmp_path / "good.bin", IDS))
    with pytest.raises(InputError, match="token 3 has the id 65"):
        open_tokens(make_file(tmp_path / "bad.bin", [1, 2, 3, 65, 5], vocab_size=50))


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([np.array([1.0])], r"one row of integers, got float64\[1\]"),
        (np.zeros((2, 2), int), r"one row of integers, got int64\[2, 2\]"),
        ([1, 2], "one row of integers"),
        (np.array([3, -1]), "token 1 has the id -1"),
        ([np.array([3, 4]), np.array([1000])], "token 2 has the id 1000, but ids need to be from 0 to 999"),
        (np.array([], int), "no tokens to write"),
    ],
)
def test_bad_tokens_are_not_written(tmp_path, ids, message):
    write_tokens(tmp_path / "a.bin", IDS, 1000)
    with pytest.raises(InputError, match=message):
        write_tokens(tmp_path / "a.bin", ids, 1000)
    assert open_tokens(tmp_path / "a.bin").tokens.tolist() == IDS.tolist()
    assert [path.name for path in tmp_path.iterdir()] == ["a.bin"]


@pytest.mark.parametrize("vocab_size", [0, -1, 2**31 + 1])
def test_vocabulary_out_of_range(tmp_path, vocab_size):
    with pytest.raises(InputError, match=f"vocabulary size is {vocab_size}: it needs to be from 1 to"):
        write_tokens(tmp_path / "a.bin", IDS, vocab_size)


@contextlib.contextmanager
def largest_file(num_bytes):
    """Makes every write beyond `num_bytes` of a file fail, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_full_disk_leaves_the_old_file_and_nothing_else(tmp_path):
    write_tokens(tmp_path / "a.bin", IDS, 1000)
    with largest_file(10_000), pytest.raises(InputError, match=r"cannot write .*a\.bin: File too large; free some"):
        write_tokens(tmp_path / "a.bin", np.zeros(50_000, int), 1000)
    assert open_tokens(tmp_path / "a.bin").tokens.tolist() == IDS.tolist()
    assert [path.name for path in tmp_path.iterdir()] == ["a.bin"]


def test_a_file_where_a_folder_is_needed(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write"):
        write_tokens(tmp_path / "file" / "a.bin", IDS, 1000)


KILLED_WRITER = """
import os, signal, sys
import numpy as np
from jaxchunk.data import write_tokens

def blocks():
    yield np.zeros(1_000_000, int)
    os.kill(os.getpid(), signal.SIGKILL)

write_tokens(sys.argv[1], blocks(), 1000)
"""


def test_kill_during_a_write_leaves_no_bad_file(tmp_path):
    new, old = tmp_path / "new.bin", tmp_path / "old.bin"
    write_tokens(old, IDS, 1000)
    for path in (new, old):
        assert subprocess.run([sys.executable, "-c", KILLED_WRITER, path], check=False).returncode == -9
    assert not new.exists()
    assert open_tokens(old).tokens.tolist() == IDS.tolist()
    write_tokens(new, IDS, 1000)  # What the killed one left beside it is not in the way.
    assert open_tokens(new).tokens.tolist() == IDS.tolist()
