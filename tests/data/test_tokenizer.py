import json
import logging

import numpy as np
import pytest
import tokenizers

from jaxchunk.data import load_tokenizer, read_corpus, train_or_load_tokenizer
from jaxchunk.data import tokenizer as tokenizer_module
from jaxchunk.data.corpus import Document
from jaxchunk.data.tokenizer import encode_documents, max_token_id, separator_id, tokenizer_path
from jaxchunk.errors import InputError

TEXT = "the chunk and the chunked head\n\n    def chunk(head):\n\treturn head\n" * 30


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "corpus.txt"
    path.write_text(TEXT)
    return read_corpus(path)


@pytest.fixture
def tokenizer(corpus, tmp_path):
    return train_or_load_tokenizer(corpus, 300, tmp_path / "cache")


@pytest.mark.parametrize(
    "text", ["the chunk", "  two  spaces\r\n\ttab", "naïve Größe, звезда, 漢字, 🙂\u200d", "\x00\x7f", ""]
)
def test_round_trip(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_training_learns_merges_within_the_vocabulary(tokenizer):
    assert 257 < tokenizer.get_vocab_size() <= 300
    assert max_token_id(tokenizer) < 300
    assert len(tokenizer.encode(TEXT).ids) < len(TEXT) / 2


def test_training_is_deterministic(corpus, tmp_path):
    paths = []
    for name in ("one", "two"):
        train_or_load_tokenizer(corpus, 300, tmp_path / name)
        paths.append(tokenizer_path(corpus, 300, tmp_path / name))
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_second_call_loads_the_cache(corpus, tokenizer, tmp_path, monkeypatch):
    def refuse(*args):
        raise AssertionError("trained again")

    monkeypatch.setattr(tokenizer_module, "_train", refuse)
    again = train_or_load_tokenizer(corpus, 300, tmp_path / "cache")
    assert again.to_str() == tokenizer.to_str()
    with pytest.raises(AssertionError, match="trained again"):  # Another size is another tokenizer.
        train_or_load_tokenizer(corpus, 299, tmp_path / "cache")


def test_log_line_before_training(corpus, tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="jaxchunk.data"):
        train_or_load_tokenizer(corpus, 300, tmp_path / "cache")
    assert [record.getMessage() for record in caplog.records] == ["training a 300-token BPE on 0.0 MB ..."]


@pytest.mark.parametrize("damage", [b"", b'{"version": "1.0"', b"\xff\xfe"])
def test_damaged_cache_is_rebuilt_with_a_word(corpus, tokenizer, tmp_path, caplog, damage):
    path = tokenizer_path(corpus, 300, tmp_path / "cache")
    whole = path.read_bytes()
    path.write_bytes(damage)
    again = train_or_load_tokenizer(corpus, 300, tmp_path / "cache")
    assert again.to_str() == tokenizer.to_str()
    assert path.read_bytes() == whole
    assert "rebuilding the cached tokenizer" in caplog.text


def test_vocabulary_below_the_bytes(corpus, tmp_path):
    with pytest.raises(InputError, match="of 256 tokens: it needs at least 257"):
        train_or_load_tokenizer(corpus, 256, tmp_path)
    smallest = train_or_load_tokenizer(corpus, 257, tmp_path)
    assert max_token_id(smallest) == 256


def test_missing_or_wrong_tokenizer(tmp_path):
    with pytest.raises(InputError, match="No such file"):
        load_tokenizer(tmp_path / "tokenizer.json")
    with pytest.raises(InputError, match="Is a directory"):
        load_tokenizer(tmp_path)
    for content in (b"", b"[]", b'{"model": {"type": "BPE"}}', b"\x80\x81"):
        (tmp_path / "tokenizer.json").write_bytes(content)
        with pytest.raises(InputError, match=r"is not a tokenizer: .*; give a tokenizer\.json") as error:
            load_tokenizer(tmp_path / "tokenizer.json")
        assert "\n" not in str(error.value)


def test_separator_by_its_known_names():
    def word_level(*words):
        vocab = {word: i for i, word in enumerate(words)}
        return tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token=words[0]))

    assert separator_id(word_level("a", "<|endoftext|>")) == 1
    assert separator_id(word_level("a", "b", "<|im_end|>")) == 2
    assert separator_id(word_level("</s>", "a", "<|endoftext|>")) == 2
    assert separator_id(word_level("</s>", "a")) == 0
    assert separator_id(word_level("a", "b")) is None


def test_documents_end_with_the_separator(tokenizer):
    documents = [Document("a", "the chunk"), Document("b", "head")]
    end = separator_id(tokenizer)
    expected = [*tokenizer.encode("the chunk").ids, end, *tokenizer.encode("head").ids, end]
    assert np.concatenate(list(encode_documents(tokenizer, documents))).tolist() == expected


def test_encoding_in_pieces_and_blocks_changes_nothing(tokenizer, monkeypatch):
    texts = [TEXT, "漢字\n" * 50, "a\n\n\nb\n  c\n" * 30, "no newline " * 40]
    expected = [[*tokenizer.encode(text).ids, separator_id(tokenizer)] for text in texts]
    pieces = []

    def small_pieces(text, original=tokenizer_module._pieces):
        for piece in original(text, piece_chars=16):
            pieces.append(piece)
            yield piece

    monkeypatch.setattr(tokenizer_module, "_pieces", small_pieces)
    monkeypatch.setattr(tokenizer_module, "_BATCH_CHARS", 100)
    blocks = list(encode_documents(tokenizer, [Document(str(i), text) for i, text in enumerate(texts)]))
    assert len(blocks) > 10
    assert len(pieces) > 50
    assert np.concatenate(blocks).tolist() == [token for ids in expected for token in ids]


def test_a_tokenizer_with_truncation_and_padding_still_encodes_everything(tokenizer, tmp_path):
    expected = tokenizer.encode(TEXT).ids
    settings = json.loads(tokenizer.to_str())
    settings["truncation"] = {
        "max_length": 8,
        "strategy": "LongestFirst",
        "stride": 0,
        "direction": "Right",
    }
    settings["padding"] = {
        "strategy": {"Fixed": 5000},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "<|endoftext|>",
    }
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(settings))
    assert len(tokenizers.Tokenizer.from_file(str(path)).encode(TEXT).ids) == 5000  # The settings do act.
    assert load_tokenizer(path).encode(TEXT).ids == expected


def test_special_names_in_a_text_are_text(tokenizer):
    ids = tokenizer.encode("a <|endoftext|> b").ids
    assert separator_id(tokenizer) not in ids
    assert tokenizer.decode(ids) == "a <|endoftext|> b"
