"""From what the user names (nothing, a text, tokens) to one stream of token ids."""

import functools
import hashlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import tokenizers
from jaxtyping import UInt

from jaxchunk.data.cache import default_cache_dir, is_cached
from jaxchunk.data.chat import CHATML_MARKERS, load_template
from jaxchunk.data.corpus import Corpus, corpus_of, read_corpus, stdlib_corpus
from jaxchunk.data.examples import Examples, encode_examples, is_examples, read_records, texts_of
from jaxchunk.data.tokenizer import (
    encode_documents,
    load_fitting_tokenizer,
    max_token_id,
    separator_id,
    tokenizer_path,
    train_or_load_tokenizer,
)
from jaxchunk.data.tokens import TokenFile, open_tokens, token_dtype, write_tokens
from jaxchunk.errors import InputError

_logger = logging.getLogger("jaxchunk.data")

MAX_TRAINED_VOCAB_SIZE = 32768
"""Largest BPE that is trained here; beyond it a corpus of this kind has few merges left worth an entry."""

NUM_SYNTHETIC_TOKENS = 1 << 22

# A change of how documents become tokens needs a new number: it is part of the cache's key.
_ENCODING_VERSION = 1


@dataclass(frozen=True)
class Dataset:
    """A stream of token ids and where it came from.

    Attributes:
      tokens: the ids, uint16 or uint32; a read-only memory map where they come from a file.
      vocab_size: every id is below it.
      description: the source, for people.
      sha256: hex digest of the ids' bytes.
      tokenizer_path: the `tokenizer.json` that turns ids back into text; None where there is none.
      num_bytes: UTF-8 bytes of the text (for bits per byte); None where that is not known.
      separator_id: the id that ends each document; None where there is none.
      corpus_sha256: hex digest of the text (`Corpus.sha256`); None where there was no text.
      examples: where examples begin in `tokens` and what of them is to be learnt; None for one running text.
    """

    tokens: UInt[np.ndarray, " N"] = field(repr=False)
    vocab_size: int
    description: str
    sha256: str
    tokenizer_path: Path | None = None
    num_bytes: int | None = None
    separator_id: int | None = None
    corpus_sha256: str | None = None
    examples: Examples | None = field(default=None, repr=False)


def load_dataset(
    data: str | Path | None,
    tokenizer: str | Path | None,
    vocab_size: int,
    cache_dir: Path | None = None,
    *,
    seed: int = 0,
) -> Dataset:
    """Returns the tokens that `data` names; slow work is done once and cached.

    Args:
      data: None for the standard library of the running Python; "synthetic" for uniformly random tokens;
        else the path of a `.bin` file of tokens, of a `.jsonl` file of examples (`examples.FORMS`), of a text file,
        or of a directory with text files.
      tokenizer: path of a `tokenizer.json`; None trains a byte-level BPE of at most
        `MAX_TRAINED_VOCAB_SIZE` entries on the text. For messages, its chat template is the one beside it.
      vocab_size: the model's; the data may use less of it, never more.
      cache_dir: where the trained tokenizer and the tokens are kept; None for `default_cache_dir()`.
      seed: of the synthetic tokens.

    Raises:
      InputError: the data or the tokenizer is missing, damaged, empty or too large for the vocabulary, or
        the cache cannot be written.
    """
    token_dtype(vocab_size)  # Raises on a size that no data can have.
    if data == "synthetic":
        if tokenizer is not None:
            raise InputError(f"synthetic data has no text for the tokenizer {tokenizer}: leave one of them out")
        return synthetic_dataset(vocab_size, seed)
    if data is not None and Path(data).suffix == ".bin":
        return _from_token_file(Path(data), tokenizer, vocab_size)
    if is_examples(data):
        return _from_examples(Path(str(data)), tokenizer, vocab_size, cache_dir)
    corpus = stdlib_corpus() if data is None else read_corpus(data)
    cache_dir = default_cache_dir() if cache_dir is None else Path(cache_dir)
    path, loaded = _tokenizer_for(corpus, tokenizer, vocab_size, cache_dir)
    token_file = _tokens_of(corpus, loaded, cache_dir)
    return Dataset(
        tokens=token_file.tokens,
        vocab_size=token_file.vocab_size,
        description=corpus.description,
        sha256=token_file.sha256,
        tokenizer_path=path,
        num_bytes=corpus.num_bytes,
        separator_id=separator_id(loaded),
        corpus_sha256=corpus.sha256,
    )


def synthetic_dataset(vocab_size: int, seed: int, num_tokens: int = NUM_SYNTHETIC_TOKENS) -> Dataset:
    """Returns uniformly random tokens: nothing to learn, nothing to read, for benchmarks.

    Raises:
      InputError: the seed is negative, or the vocabulary size is not within 1..2^31.
    """
    if seed < 0:
        raise InputError(f"the seed is {seed}: it needs to be 0 or larger")
    dtype = token_dtype(vocab_size)
    tokens = np.random.default_rng(seed).integers(vocab_size, size=num_tokens, dtype=dtype.type)
    digest = hashlib.sha256(tokens.astype(dtype).tobytes()).hexdigest()
    return Dataset(tokens, vocab_size, f"uniformly random tokens, seed {seed}", digest)


def _from_token_file(path: Path, tokenizer: str | Path | None, vocab_size: int) -> Dataset:
    token_file = open_tokens(path)
    if token_file.vocab_size > vocab_size:
        raise InputError(
            f"the tokens in {path} are of a vocabulary of {token_file.vocab_size}, the model's has {vocab_size}: "
            "choose a model with a larger vocabulary or tokenise with a smaller one"
        )
    separator = None
    if tokenizer is not None:
        separator = separator_id(load_fitting_tokenizer(tokenizer, vocab_size))
    return Dataset(
        tokens=token_file.tokens,
        vocab_size=token_file.vocab_size,
        description=str(path),
        sha256=token_file.sha256,
        tokenizer_path=None if tokenizer is None else Path(tokenizer),
        separator_id=separator,
    )


def _from_examples(path: Path, tokenizer: str | Path | None, vocab_size: int, cache_dir: Path | None) -> Dataset:
    """Examples are encoded at every start: unlike a corpus they are seldom large, and a template may change."""
    records = read_records(path)
    corpus = corpus_of(texts_of(records), str(path))
    cache_dir = default_cache_dir() if cache_dir is None else Path(cache_dir)
    own, loaded = _tokenizer_for(corpus, tokenizer, vocab_size, cache_dir, CHATML_MARKERS)
    template = functools.cache(lambda: load_template(own, loaded))
    examples = encode_examples(records, loaded, template, path)
    digest = hashlib.sha256()
    for values in (examples.tokens, examples.learnt, examples.starts):
        digest.update(values.tobytes())
    return Dataset(
        tokens=examples.tokens,
        vocab_size=max_token_id(loaded) + 1,
        description=f"{path}, {len(examples):,} examples",
        sha256=digest.hexdigest(),
        tokenizer_path=own,
        num_bytes=corpus.num_bytes,
        separator_id=separator_id(loaded),
        corpus_sha256=corpus.sha256,
        examples=examples,
    )


def _tokenizer_for(
    corpus: Corpus,
    tokenizer: str | Path | None,
    vocab_size: int,
    cache_dir: Path,
    markers: tuple[str, ...] = (),
) -> tuple[Path, tokenizers.Tokenizer]:
    """The tokenizer that is given, or one that is trained on the text, with `markers` as special tokens of its own."""
    if tokenizer is not None:
        return Path(tokenizer), load_fitting_tokenizer(tokenizer, vocab_size)
    bpe_size = min(vocab_size, MAX_TRAINED_VOCAB_SIZE)
    loaded = train_or_load_tokenizer(corpus, bpe_size, cache_dir, markers)
    return tokenizer_path(corpus, bpe_size, cache_dir, markers), loaded


def _tokens_of(corpus: Corpus, tokenizer: tokenizers.Tokenizer, cache_dir: Path) -> TokenFile:
    """Returns the corpus as tokens, from the cache if they are there."""
    tokenizer_sha256 = hashlib.sha256(tokenizer.to_str().encode()).hexdigest()
    key = hashlib.sha256(f"{_ENCODING_VERSION} {corpus.sha256} {tokenizer_sha256}".encode()).hexdigest()
    path = cache_dir / f"tokens-{key[:32]}.bin"
    if is_cached(path):
        try:
            return open_tokens(path)
        except InputError as error:
            _logger.warning("rebuilding the cached tokens: %s", error)
    _logger.info("tokenising %.1f MB ...", corpus.num_bytes / 1e6)
    write_tokens(path, _non_empty(encode_documents(tokenizer, corpus.documents), corpus), max_token_id(tokenizer) + 1)
    return open_tokens(path)


def _non_empty(blocks: Iterator[UInt[np.ndarray, " _"]], corpus: Corpus) -> Iterator[UInt[np.ndarray, " _"]]:
    num_tokens = 0
    for block in blocks:
        num_tokens += block.size
        yield block
    if num_tokens == 0:  # A word-level vocabulary, say, without a single word of this text.
        raise InputError(f"the tokenizer makes no token of {corpus.description}: give one that fits this text")
