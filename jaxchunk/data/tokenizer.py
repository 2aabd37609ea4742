"""Byte-level BPE: trained on a corpus and cached, or the user's own `tokenizer.json`."""

import hashlib
import logging
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import tokenizers
from jaxtyping import UInt32
from tokenizers import decoders, models, pre_tokenizers, trainers

from jaxchunk.data.cache import atomic_write, is_cached
from jaxchunk.data.corpus import Corpus, Document
from jaxchunk.errors import InputError

_logger = logging.getLogger("jaxchunk.data")

END_OF_TEXT = "<|endoftext|>"
MIN_VOCAB_SIZE = 257
"""Entries of the smallest byte-level vocabulary: one for each byte, and the end of a text."""

# A change of anything that alters the trained tokenizer needs a new number: it is part of the cache's key.
_TRAINING_VERSION = 1
# How models mark the end of a document, the most common first.
_SEPARATORS = (END_OF_TEXT, "<|end_of_text|>", "<|im_end|>", "</s>", "<eos>", "<|eot_id|>")
_PIECE_CHARS = 1 << 18
_BATCH_CHARS = 1 << 23
# Between two lines of text, neither blank nor indented: no pre-tokenizer in use joins the two sides, so cutting
# there leaves the tokens as they are (but for \r\n, where byte-level BPE may merge the pair).
_SAFE_CUT = re.compile(r"(?:(?<=\S\n)|(?<=\S\r\n))(?=\S)")


def train_or_load_tokenizer(
    corpus: Corpus, vocab_size: int, cache_dir: Path, markers: tuple[str, ...] = ()
) -> tokenizers.Tokenizer:
    """Returns the byte-level BPE of `corpus`, trained on first use and kept in `cache_dir`.

    Args:
      corpus: the text to train on.
      vocab_size: most entries it may have; a small corpus can give fewer.
      cache_dir: where the file `tokenizer_path(corpus, vocab_size, cache_dir, markers)` is kept.
      markers: special tokens besides the end of a text, such as those of a chat.

    Raises:
      InputError: `vocab_size` is below `MIN_VOCAB_SIZE` and the number of markers, or the cache cannot be written.
    """
    if vocab_size < (needed := MIN_VOCAB_SIZE + len(markers)):
        raise InputError(
            f"cannot train a byte-level BPE of {vocab_size} tokens: it needs at least {needed} "
            f"(256 bytes, the end of a text{' and markers' if markers else ''}); give a larger vocabulary"
        )
    path = tokenizer_path(corpus, vocab_size, cache_dir, markers)
    if is_cached(path):
        try:
            tokenizer = load_tokenizer(path)
            if max_token_id(tokenizer) < vocab_size:
                return tokenizer
            _logger.warning("rebuilding the cached tokenizer %s: it has too many tokens", path)
        except InputError as error:
            _logger.warning("rebuilding the cached tokenizer: %s", error)
    _logger.info("training a %d-token BPE on %.1f MB ...", vocab_size, corpus.num_bytes / 1e6)
    tokenizer = _train(corpus, vocab_size, markers)
    with atomic_write(path) as file:
        file.write(tokenizer.to_str(pretty=True).encode())
    return load_tokenizer(path)


def tokenizer_path(corpus: Corpus, vocab_size: int, cache_dir: Path, markers: tuple[str, ...] = ()) -> Path:
    """Returns where `train_or_load_tokenizer` keeps the tokenizer with these arguments."""
    about = " ".join((str(_TRAINING_VERSION), corpus.sha256, str(vocab_size), *markers))
    key = hashlib.sha256(about.encode()).hexdigest()
    return cache_dir / f"tokenizer-{key[:32]}.json"


def load_tokenizer(path: Path | str) -> tokenizers.Tokenizer:
    """Reads a `tokenizer.json`, set up to encode a corpus.

    That is: without the truncation and padding that such files often carry (they would cut every document
    short), and with the names of special tokens in a text encoded as the ordinary text they are there.

    Raises:
      InputError: the file is missing, or is not a tokenizer.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(
            f"cannot read the tokenizer {path}: {error.strerror or error}; give a tokenizer.json file"
        ) from None
    try:
        tokenizer = tokenizers.Tokenizer.from_buffer(content)
    except Exception as error:  # The library raises the bare class for everything.
        reason = " ".join(str(error).split())
        raise InputError(
            f"{path} is not a tokenizer: {reason}; give a tokenizer.json of Hugging Face tokenizers"
        ) from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return tokenizer


def load_fitting_tokenizer(path: Path | str, vocab_size: int) -> tokenizers.Tokenizer:
    """Reads a `tokenizer.json` for a model with a vocabulary of `vocab_size` entries.

    Raises:
      InputError: as `load_tokenizer`; or it has no tokens, or an id without an entry.
    """
    tokenizer = load_tokenizer(path)
    largest = max_token_id(tokenizer)
    if largest < 0:
        raise InputError(f"the tokenizer {path} has an empty vocabulary: give one that was trained")
    if largest >= vocab_size:
        raise InputError(
            f"the tokenizer {path} has ids up to {largest}, but the model's vocabulary has {vocab_size} entries: "
            f"choose a model with at least {largest + 1} or a smaller tokenizer"
        )
    return tokenizer


def max_token_id(tokenizer: tokenizers.Tokenizer) -> int:
    """Returns the largest id, which can exceed the number of entries where ids have gaps (-1 for none)."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)


def separator_id(tokenizer: tokenizers.Tokenizer) -> int | None:
    """Returns the id that marks the end of a document, or None where the tokenizer has no such token."""
    ids = (tokenizer.token_to_id(name) for name in _SEPARATORS)
    return next((token_id for token_id in ids if token_id is not None), None)


def stop_ids(tokenizer: tokenizers.Tokenizer) -> tuple[int, ...]:
    """Returns the ids at which a model has said what it had to say: the ends of documents and of turns."""
    ids = (tokenizer.token_to_id(name) for name in _SEPARATORS)
    return tuple(token_id for token_id in ids if token_id is not None)


def encode_documents(
    tokenizer: tokenizers.Tokenizer, documents: Iterable[Document]
) -> Iterator[UInt32[np.ndarray, " N"]]:
    """Yields the token stream in blocks: each document followed by the separator, where there is one.

    Documents are encoded in pieces cut between lines, all cores at once, so that neither one large file nor
    many small ones need more memory than a block.

    Raises:
      InputError: the tokenizer refuses a text (a word-level one without an unknown token, say).
    """
    separator = separator_id(tokenizer)
    tail = np.array([] if separator is None else [separator], np.uint32)
    pieces: list[str] = []
    ends: list[bool] = []  # Whether a document ends with that piece.
    num_chars = 0

    def encode_block() -> UInt32[np.ndarray, " N"]:
        parts = []
        for ids, end in zip(_encode(tokenizer, pieces), ends, strict=True):
            parts.append(np.array(ids, np.uint32))
            if end:
                parts.append(tail)
        return np.concatenate(parts)

    for document in documents:
        for piece, end in _pieces(document.text):
            pieces.append(piece)
            ends.append(end)
            num_chars += len(piece)
            if num_chars >= _BATCH_CHARS:
                yield encode_block()
                pieces, ends, num_chars = [], [], 0
    if pieces:
        yield encode_block()


def _encode(tokenizer: tokenizers.Tokenizer, pieces: list[str]) -> Iterator[list[int]]:
    try:
        encodings = tokenizer.encode_batch_fast(pieces, add_special_tokens=False)
    except Exception as error:  # The library raises the bare class for everything.
        raise InputError(
            f"the tokenizer cannot encode this text: {error}; give one that has every character, or a byte-level one"
        ) from None
    return (encoding.ids for encoding in encodings)


def _pieces(text: str, piece_chars: int = _PIECE_CHARS) -> Iterator[tuple[str, bool]]:
    """Yields `text` in pieces of at least `piece_chars`, and whether each is the last."""
    start = 0
    while cut := _SAFE_CUT.search(text, start + piece_chars):
        yield text[start : cut.start()], False
        start = cut.start()
    yield text[start:], True


def _train(corpus: Corpus, vocab_size: int, markers: tuple[str, ...]) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        show_progress=False,
        special_tokens=[END_OF_TEXT, *markers],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    texts = (document.text for document in corpus.documents)
    tokenizer.train_from_iterator(texts, trainer, length=len(corpus.documents))
    return tokenizer
