"""Text to train on: the running interpreter's standard library, a text file, or a directory."""

import hashlib
import logging
import os
import platform
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from jaxchunk.errors import InputError

_logger = logging.getLogger("jaxchunk.data")

_SUFFIXES = """
.txt .text .md .markdown .rst .tex .org .adoc .html .htm .xml .css
.py .pyi .c .h .cc .cpp .cxx .hpp .cu .cuh .java .js .jsx .ts .tsx .go .rs .rb .php .pl .lua .r .jl .hs .ml .scala
.kt .swift .cs .sh .sql .toml .yaml .yml .ini .cfg
"""
TEXT_SUFFIXES = frozenset(_SUFFIXES.split())
"""The files of a directory that are read as text (in lower case)."""

_NOT_THE_LIBRARY = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})


class Document(NamedTuple):
    """One text: `name` is its path below the corpus, with forward slashes."""

    name: str
    text: str


@dataclass(frozen=True)
class Corpus:
    """Documents in the order in which they are tokenised.

    The order is fixed but mixed (by a hash of the name): the end of the token stream is held out for
    validation, and that should be whole files from everywhere, not the neighbours of training text and
    not the last directory in the alphabet.

    Attributes:
      documents: the texts; none is empty.
      description: where they come from, for people.
      sha256: hex digest over names and contents, in order.
      num_bytes: size of all texts in UTF-8.
    """

    documents: tuple[Document, ...] = field(repr=False)
    description: str
    sha256: str
    num_bytes: int


def stdlib_corpus() -> Corpus:
    """Returns the source text of this interpreter's standard library, without its tests (about 12 MB).

    Real text that is on every machine that can run this package, with nothing to download. Files that a
    build or an installation generates are left out, so that the same Python gives the same corpus.

    Raises:
      InputError: the library is installed without its sources.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = _walk(root, skip_directory=lambda name: name in _NOT_THE_LIBRARY or name.startswith("config-"))
    sources = [
        path
        for path in paths
        if path.suffix == ".py" and path.name != "sitecustomize.py" and "_sysconfigdata" not in path.name
    ]
    documents = _read_documents(root, sources)
    if not documents:
        raise InputError(f"this Python has no standard library sources below {root}: give a text file or a directory")
    return _corpus(documents, f"Python {platform.python_version()} standard library, {len(documents)} files")


def read_corpus(path: Path | str) -> Corpus:
    """Reads a text file as one document, or every text file below a directory.

    In a directory, files with one of `TEXT_SUFFIXES` are read; hidden files and directories are passed
    over, and files that are not UTF-8 are skipped with a warning that counts them.

    Raises:
      InputError: nothing is there, it cannot be read, it is not UTF-8, or it holds no text.
    """
    path = Path(path)
    try:
        if path.is_dir():
            return _read_directory(path)
        text = path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is not UTF-8 text (byte {error.start} is {error.object[error.start]:#04x}): convert it, or "
            "name it .bin if it holds tokens"
        ) from None
    except OSError as error:
        raise InputError(
            f"cannot read {path}: {error.strerror or error}; give a text file, a directory, a .bin or a .jsonl file"
        ) from None
    if not text.strip():
        raise InputError(f"{path} is empty: give a file with text in it")
    return _corpus([Document(path.name, text)], str(path))


def corpus_of(texts: Iterable[str], description: str) -> Corpus:
    """Texts without names, in the order of their numbers' hashes; empty ones are left out."""
    documents = [Document(str(number), text) for number, text in enumerate(texts) if text.strip()]
    return _corpus(documents, description)


def _read_directory(root: Path) -> Corpus:
    paths = _walk(root, skip_directory=lambda name: name.startswith("."))
    texts = (path for path in paths if path.suffix.lower() in TEXT_SUFFIXES and not path.name.startswith("."))
    documents = _read_documents(root, texts)
    if not documents:
        raise InputError(
            f"no text found below the directory {root}: it needs UTF-8 files that are not empty, with names "
            "like .txt, .md or .py"
        )
    return _corpus(documents, f"{root}, {len(documents)} files")


def _walk(root: Path, skip_directory: Callable[[str], bool]) -> Iterator[Path]:
    """Yields the files below `root` without following links to directories (they can be circular)."""
    for directory, subdirectories, names in os.walk(root):
        subdirectories[:] = [name for name in subdirectories if not skip_directory(name)]
        paths = (Path(directory, name) for name in names)
        yield from (path for path in paths if path.is_file())  # Reading a pipe would wait for ever.


def _read_documents(root: Path, paths: Iterable[Path]) -> list[Document]:
    documents, num_skipped = [], 0
    for path in paths:
        try:
            # Not read_text(): it would turn \r\n into \n, and the text should be what is in the file.
            text = path.read_bytes().decode()
        except (UnicodeDecodeError, OSError):
            num_skipped += 1
            continue
        if text.strip():
            documents.append(Document(path.relative_to(root).as_posix(), text))
    if num_skipped:
        _logger.warning("skipped %d files below %s that cannot be read as UTF-8 text", num_skipped, root)
    return documents


def _corpus(documents: list[Document], description: str) -> Corpus:
    # "surrogateescape": a file name need not be UTF-8.
    encoded_names = {document.name: document.name.encode(errors="surrogateescape") for document in documents}
    documents = sorted(documents, key=lambda document: hashlib.sha256(encoded_names[document.name]).digest())
    digest, num_bytes = hashlib.sha256(), 0
    for document in documents:
        for part in (encoded_names[document.name], content := document.text.encode()):
            digest.update(len(part).to_bytes(8, "little"))  # So that no two corpora concatenate to the same bytes.
            digest.update(part)
        num_bytes += len(content)
    return Corpus(tuple(documents), description, digest.hexdigest(), num_bytes)
