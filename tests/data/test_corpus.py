import hashlib
import logging
import os

import pytest

from jaxchunk.data import corpus as corpus_module
from jaxchunk.data import read_corpus, stdlib_corpus
from jaxchunk.errors import InputError


def names(corpus):
    return [document.name for document in corpus.documents]


def test_stdlib_is_about_12_mb_without_tests_or_installed_packages():
    corpus = stdlib_corpus()
    assert 5e6 < corpus.num_bytes < 40e6
    assert corpus.num_bytes == sum(len(document.text.encode()) for document in corpus.documents)
    assert {"json/decoder.py", "asyncio/events.py", "argparse.py"} <= set(names(corpus))
    parts = {part for name in names(corpus) for part in name.split("/")}
    assert not parts & {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    assert not any(part.startswith("config-") or "_sysconfigdata" in part for part in parts)
    assert stdlib_corpus().sha256 == corpus.sha256


def test_stdlib_without_sources(monkeypatch, tmp_path):
    (tmp_path / "os.pyc").write_bytes(b"\0")
    monkeypatch.setattr(corpus_module.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(InputError, match="no standard library sources"):
        stdlib_corpus()


def test_directory_reads_text_files_recursively(tmp_path, caplog):
    for name in ["a.txt", "deep/er/b.MD", "c.py", "picture.png", ".hidden.txt", ".git/d.txt", "empty.txt"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("" if name == "empty.txt" else f"text of {name}")
    (tmp_path / "latin1.txt").write_bytes("é".encode("latin-1"))
    (tmp_path / "broken.txt").write_bytes(b"\xff\xfe")
    os.mkfifo(tmp_path / "pipe.txt")
    with caplog.at_level(logging.WARNING, logger="jaxchunk.data"):
        corpus = read_corpus(tmp_path)
    assert sorted(names(corpus)) == ["a.txt", "c.py", "deep/er/b.MD"]
    assert dict(corpus.documents)["deep/er/b.MD"] == "text of deep/er/b.MD"
    assert [record.getMessage().split(" below")[0] for record in caplog.records] == ["skipped 2 files"]


def test_documents_are_mixed_by_the_hash_of_their_name(tmp_path):
    for i in range(40):
        (tmp_path / f"{i:02}.txt").write_text(str(i))
    order = names(read_corpus(tmp_path))
    assert order == sorted(order, key=lambda name: hashlib.sha256(name.encode()).hexdigest())
    assert order != sorted(order)


def test_sha256_depends_on_names_and_contents_only(tmp_path):
    def digest(folder, files):
        (tmp_path / folder).mkdir()
        for name, text in files.items():
            (tmp_path / folder / name).write_text(text)
        return read_corpus(tmp_path / folder).sha256

    first = digest("first", {"a.txt": "one", "b.txt": "two"})
    assert digest("same", {"b.txt": "two", "a.txt": "one"}) == first
    others = [
        digest("content", {"a.txt": "one", "b.txt": "twO"}),
        digest("name", {"a.txt": "one", "c.txt": "two"}),
        digest("swapped", {"a.txt": "two", "b.txt": "one"}),
        # The same bytes in a row as those of the first, in whichever order its two files come.
        digest("joined", {"a.txt": "oneb.txttwo"}),
        digest("joined the other way", {"b.txt": "twoa.txtone"}),
    ]
    assert len({first, *others}) == 6


def test_text_file_is_one_document_byte_for_byte(tmp_path):
    path = tmp_path / "book"
    path.write_bytes("one\r\ntwo\n漢字 ñ".encode())
    corpus = read_corpus(path)
    assert corpus.documents == (("book", "one\r\ntwo\n漢字 ñ"),)
    assert corpus.num_bytes == path.stat().st_size
    assert corpus.description == str(path)


@pytest.mark.parametrize("content", [b"", b" \n\t\n"])
def test_empty_file(tmp_path, content):
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(InputError, match="is empty"):
        read_corpus(tmp_path / "a.txt")
    with pytest.raises(InputError, match="no text found below"):
        read_corpus(tmp_path)


def test_missing_and_undecodable_file(tmp_path):
    with pytest.raises(InputError, match="No such file"):
        read_corpus(tmp_path / "nowhere.txt")
    (tmp_path / "a.txt").write_bytes(b"ab\xff")
    with pytest.raises(InputError, match=r"not UTF-8 text \(byte 2 is 0xff\)"):
        read_corpus(tmp_path / "a.txt")


def test_repr_does_not_print_the_text(tmp_path):
    (tmp_path / "a.txt").write_text("needle")
    assert "needle" not in repr(read_corpus(tmp_path))
