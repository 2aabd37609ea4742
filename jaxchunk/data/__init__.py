"""Text, examples, tokens and batches: the embedded default corpus, tokenised memory maps, and the Grain pipeline."""

from jaxchunk.data.cache import default_cache_dir
from jaxchunk.data.corpus import Corpus, Document, read_corpus, stdlib_corpus
from jaxchunk.data.dataset import Dataset, load_dataset, synthetic_dataset
from jaxchunk.data.examples import is_examples
from jaxchunk.data.packing import IGNORE_INDEX, PackedRows
from jaxchunk.data.pipeline import (
    Batch,
    Split,
    TokenWindows,
    split,
    train_batches,
    validation_batches,
)
from jaxchunk.data.tokenizer import load_fitting_tokenizer, load_tokenizer, train_or_load_tokenizer
from jaxchunk.data.tokens import TokenFile, open_tokens, write_tokens

__all__ = [
    "IGNORE_INDEX",
    "Batch",
    "Corpus",
    "Dataset",
    "Document",
    "PackedRows",
    "Split",
    "TokenFile",
    "TokenWindows",
    "default_cache_dir",
    "is_examples",
    "load_dataset",
    "load_fitting_tokenizer",
    "load_tokenizer",
    "open_tokens",
    "read_corpus",
    "split",
    "stdlib_corpus",
    "synthetic_dataset",
    "train_batches",
    "train_or_load_tokenizer",
    "validation_batches",
    "write_tokens",
]
