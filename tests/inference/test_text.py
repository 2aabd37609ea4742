"""Prompts to tokens and streams of tokens to text."""

import pytest

from jaxchunk import data
from jaxchunk.errors import InputError
from jaxchunk.inference import text

WORDS = "über die Wörter — 日本語の文字, and some words that come again and again"


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    (directory / "text.txt").write_text("some words that come again and again")
    markers = ("<|im_start|>", "<|im_end|>")
    data.train_or_load_tokenizer(data.read_corpus(directory / "text.txt"), 300, directory, markers)
    (file,) = directory.glob("tokenizer-*.json")
    return file


@pytest.fixture(scope="module")
def tokenizer(path):
    return data.load_tokenizer(path)


def test_pieces_are_the_text_and_each_is_whole(path, tokenizer):
    ids = text.encode(WORDS, tokenizer, path)
    pieces = list(text.decode_stream(ids, tokenizer))
    assert 20 < len(pieces) < len(ids)  # some tokens are a part of a character
    assert "".join(pieces) == WORDS and not any("\ufffd" in piece for piece in pieces)


def test_what_ends_within_a_character_is_shown_at_the_end(path, tokenizer):
    ids = text.encode("a 日", tokenizer, path)
    assert "".join(text.decode_stream(ids[:-1], tokenizer)) == "a \ufffd"
    assert list(text.decode_stream([], tokenizer)) == []


def test_a_chat_is_put_into_the_template(path, tokenizer):
    ids = text.encode("again", tokenizer, path, chat=True, system="words")
    start = tokenizer.token_to_id("<|im_start|>")
    assert ids[0] == start and ids.count(start) == 3  # system, user, and the answer that is asked for
    assert "words" in tokenizer.decode(ids) and tokenizer.decode(ids).endswith("assistant\n")


def test_stops_are_the_ends_that_the_tokenizer_has_and_those_that_are_named(tokenizer):
    ends = {tokenizer.token_to_id(name) for name in ("<|endoftext|>", "<|im_end|>")}
    assert set(text.find_stops((), tokenizer)) == ends
    assert set(text.find_stops(("a", "<|im_end|>"), tokenizer)) == ends | {tokenizer.token_to_id("a")}
    with pytest.raises(InputError, match="--stop has 'no such token'"):
        text.find_stops(("no such token",), tokenizer)


def test_an_empty_prompt_is_refused(path):
    with pytest.raises(InputError, match="the prompt is empty"):
        text.encode("", data.load_tokenizer(path), path)
