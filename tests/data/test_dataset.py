import hashlib
import logging
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from jaxchunk.data import (
    dataset as dataset_module,
)
from jaxchunk.data import default_cache_dir, load_dataset, load_tokenizer, open_tokens, read_corpus, write_tokens
from jaxchunk.data import tokenizer as tokenizer_module
from jaxchunk.errors import InputError

LINES = "".join(f"def function_{i}(chunk):\n    return chunk + {i}\n\n" for i in range(200))


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(LINES)
    return path


@pytest.fixture
def cache_dir(tmp_path):
    return tmp_path / "cache"


def test_text_file(text_file, cache_dir):
    dataset = load_dataset(str(text_file), None, 400, cache_dir)
    tokenizer = load_tokenizer(dataset.tokenizer_path)
    assert dataset.tokens.dtype == np.uint16
    assert dataset.vocab_size == tokenizer.get_vocab_size() <= 400
    assert dataset.tokens[-1] == dataset.separator_id == tokenizer.token_to_id("<|endoftext|>")
    assert tokenizer.decode(dataset.tokens.tolist()) == LINES  # decode() leaves special tokens out.
    assert dataset.num_bytes == len(LINES)
    assert dataset.description == str(text_file)
    assert dataset.sha256 == hashlib.sha256(dataset.tokens.tobytes()).hexdigest()
    assert dataset.corpus_sha256 == read_corpus(text_file).sha256


def test_default_is_the_standard_library(monkeypatch, text_file, cache_dir):
    small = read_corpus(text_file)
    monkeypatch.setattr(dataset_module, "stdlib_corpus", lambda: small)
    assert load_dataset(None, None, 400, cache_dir).corpus_sha256 == small.sha256


def test_directory_keeps_the_order_of_the_corpus(tmp_path, cache_dir):
    for i in range(20):
        (tmp_path / f"{i}.txt").write_text(f"file number {i}\n")
    dataset = load_dataset(tmp_path, None, 300, cache_dir)
    ids = dataset.tokens.tolist()
    assert ids.count(dataset.separator_id) == 20
    text = load_tokenizer(dataset.tokenizer_path).decode(ids)
    assert text == "".join(document.text for document in read_corpus(tmp_path).documents)


def test_trained_vocabulary_is_bounded(monkeypatch, text_file, cache_dir):
    monkeypatch.setattr(dataset_module, "MAX_TRAINED_VOCAB_SIZE", 280)
    assert load_dataset(text_file, None, 150_000, cache_dir).vocab_size == 280


def test_second_call_reads_the_cache_alone(monkeypatch, text_file, cache_dir):
    def refuse(*args):
        raise AssertionError("worked again")

    first = load_dataset(text_file, None, 400, cache_dir)
    monkeypatch.setattr(tokenizer_module, "_train", refuse)
    monkeypatch.setattr(dataset_module, "encode_documents", refuse)
    again = load_dataset(text_file, None, 400, cache_dir)
    assert again.sha256 == first.sha256
    text_file.write_text(LINES + "more")
    with pytest.raises(AssertionError, match="worked again"):
        load_dataset(text_file, None, 400, cache_dir)


def test_a_line_before_each_slow_part(text_file, cache_dir, caplog):
    text_file.write_text(LINES * 20)
    with caplog.at_level(logging.INFO, logger="jaxchunk.data"):
        load_dataset(text_file, None, 400, cache_dir)
    assert [record.getMessage() for record in caplog.records] == [
        "training a 400-token BPE on 0.2 MB ...",
        "tokenising 0.2 MB ...",
    ]


@pytest.mark.parametrize("keep", [0, 30, 70, None])
def test_damaged_cached_tokens_are_rebuilt_with_a_word(text_file, cache_dir, caplog, keep):
    first = load_dataset(text_file, None, 400, cache_dir)
    (path,) = cache_dir.glob("tokens-*.bin")
    whole = path.read_bytes()
    path.unlink()  # `first` has the old file mapped.
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]) if keep is None else whole[:keep])
    again = load_dataset(text_file, None, 400, cache_dir)
    assert again.tokens.tolist() == first.tokens.tolist()
    assert path.read_bytes() == whole
    assert "rebuilding the cached tokens" in caplog.text


def test_users_tokenizer(text_file, cache_dir, tmp_path):
    trained = load_dataset(text_file, None, 300, cache_dir)
    own = tmp_path / "tokenizer.json"
    own.write_bytes(trained.tokenizer_path.read_bytes())
    dataset = load_dataset(text_file, own, 5000, cache_dir)
    assert dataset.tokenizer_path == own
    assert dataset.sha256 == trained.sha256
    with pytest.raises(InputError, match=r"ids up to 299, but the model's vocabulary has 299 entries"):
        load_dataset(text_file, own, 299, cache_dir)
    assert load_dataset(text_file, own, 300, cache_dir).vocab_size == 300


def test_another_tokenizer_is_another_cache_entry(text_file, cache_dir):
    assert load_dataset(text_file, None, 300, cache_dir).sha256 != load_dataset(text_file, None, 350, cache_dir).sha256


def test_unusable_tokenizers(text_file, cache_dir, tmp_path):
    path = tmp_path / "tokenizer.json"
    with pytest.raises(InputError, match="No such file"):
        load_dataset(text_file, path, 400, cache_dir)
    tokenizers.Tokenizer(tokenizers.models.BPE()).save(str(path))
    with pytest.raises(InputError, match="empty vocabulary"):
        load_dataset(text_file, path, 400, cache_dir)
    tokenizers.Tokenizer(tokenizers.models.WordLevel({"x": 0})).save(str(path))
    with pytest.raises(InputError, match=r"cannot encode this text: .*Missing \[UNK\]"):
        load_dataset(text_file, path, 400, cache_dir)
    tokenizers.Tokenizer(tokenizers.models.BPE({"x": 0}, [])).save(str(path))
    with pytest.raises(InputError, match="makes no token of"):
        load_dataset(text_file, path, 400, cache_dir)


def test_token_file_is_used_as_it_is(tmp_path, cache_dir):
    path = tmp_path / "a.bin"
    write_tokens(path, np.arange(500), 500)
    dataset = load_dataset(str(path), None, 1000, cache_dir)
    assert dataset.tokens.tolist() == list(range(500))
    assert (dataset.vocab_size, dataset.description) == (500, str(path))
    assert dataset.sha256 == open_tokens(path).sha256
    assert (dataset.tokenizer_path, dataset.num_bytes, dataset.separator_id) == (None, None, None)
    assert not cache_dir.exists()
    assert load_dataset(path, None, 500).vocab_size == 500
    with pytest.raises(InputError, match="are of a vocabulary of 500, the model's has 499"):
        load_dataset(path, None, 499)


def test_token_file_with_its_tokenizer(tmp_path, text_file, cache_dir):
    trained = load_dataset(text_file, None, 300, cache_dir)
    path = tmp_path / "a.bin"
    write_tokens(path, trained.tokens, 300)
    dataset = load_dataset(path, trained.tokenizer_path, 300)
    assert (dataset.tokenizer_path, dataset.separator_id) == (trained.tokenizer_path, trained.separator_id)
    write_tokens(path, np.arange(5), 5)
    with pytest.raises(InputError, match="ids up to 299, but the model's vocabulary has 299"):
        load_dataset(path, trained.tokenizer_path, 299)


def test_wrong_token_file(tmp_path):
    (tmp_path / "a.bin").write_bytes(b"P" * 100)
    with pytest.raises(InputError, match="should start with b'jaxchunk'"):
        load_dataset(tmp_path / "a.bin", None, 1000)


def test_synthetic():
    dataset = load_dataset("synthetic", None, 100_000, seed=3)
    assert dataset.tokens.dtype == np.uint32
    assert 99_000 < dataset.tokens.max() < 100_000
    assert abs(dataset.tokens.mean() - 50_000) < 200
    assert dataset.sha256 == load_dataset("synthetic", None, 100_000, seed=3).sha256
    assert dataset.sha256 != load_dataset("synthetic", None, 100_000, seed=4).sha256
    assert load_dataset("synthetic", None, 1).tokens.max() == 0
    with pytest.raises(InputError, match="leave one of them out"):
        load_dataset("synthetic", "tokenizer.json", 1000)
    with pytest.raises(InputError, match="the seed is -1"):
        load_dataset("synthetic", None, 1000, seed=-1)


@pytest.mark.parametrize(("vocab_size", "message"), [(0, "vocabulary size is 0"), (100, "needs at least 257")])
def test_bad_vocabulary(text_file, cache_dir, vocab_size, message):
    with pytest.raises(InputError, match=message):
        load_dataset(text_file, None, vocab_size, cache_dir)


def test_unwritable_cache(text_file, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot write .*; free some space there, or choose"):
        load_dataset(text_file, None, 400, tmp_path / "file" / "cache")


def test_default_cache_dir(monkeypatch, tmp_path, text_file):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_cache_dir() == tmp_path / "xdg" / "jaxchunk"
    assert load_dataset(text_file, None, 300).tokenizer_path.parent == tmp_path / "xdg" / "jaxchunk"
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert default_cache_dir() == tmp_path / ".cache" / "jaxchunk"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache_dir() == tmp_path / ".cache" / "jaxchunk"

    def no_home():
        raise RuntimeError

    monkeypatch.setattr(Path, "home", no_home)
    with pytest.raises(InputError, match="set XDG_CACHE_HOME"):
        default_cache_dir()


PREPARE = """
import sys
from pathlib import Path
from jaxchunk.data import load_dataset

sys.stdin.readline()  # Both start when told, not when imported.
print(load_dataset(sys.argv[1], None, 400, Path(sys.argv[2])).sha256)
"""


def test_two_processes_prepare_the_same_cache(text_file, cache_dir):
    text_file.write_text(LINES * 10)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PREPARE, text_file, cache_dir],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    digests = [process.communicate()[0].strip() for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert digests == [load_dataset(text_file, None, 400, cache_dir).sha256] * 2
    assert sorted(path.name.split("-")[0] for path in cache_dir.iterdir()) == ["tokenizer", "tokens"]
