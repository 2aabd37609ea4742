"""A run's directory: refused when in the way, complete after a kill."""

import json
import os

import pytest

from jaxchunk.errors import InputError
from jaxchunk.run_dir import RunDirectory, read_json_lines


def test_writes_json_and_lines(tmp_path):
    with RunDirectory(tmp_path / "a" / "run") as run:
        run.write_json("config.json", {"x": 1})
        run.append("steps.jsonl", {"step": 1})
        # Seen by another reader before the run ends: a kill loses nothing that was appended.
        assert read_json_lines(run.path / "steps.jsonl") == [{"step": 1}]
        run.append("steps.jsonl", {"step": 2})
    assert json.loads((run.path / "config.json").read_text()) == {"x": 1}
    assert [record["step"] for record in read_json_lines(run.path / "steps.jsonl")] == [1, 2]
    assert sorted(path.name for path in run.path.iterdir()) == ["config.json", "steps.jsonl"]


def test_a_line_cut_by_a_kill_ends_the_reading(tmp_path):
    (tmp_path / "steps.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert read_json_lines(tmp_path / "steps.jsonl") == [{"step": 1}, {"step": 2}]


def test_an_existing_run_is_refused_unless_told(tmp_path):
    with RunDirectory(tmp_path / "run") as run:
        run.write_json("config.json", {})
        run.append("steps.jsonl", {"step": 1})
    with pytest.raises(InputError, match="already holds a run; choose another, or pass --overwrite"):
        RunDirectory(tmp_path / "run")
    replacement = RunDirectory(tmp_path / "run", overwrite=True)
    assert (tmp_path / "run" / "steps.jsonl").exists()  # not before the new run really starts
    with replacement:
        assert not (tmp_path / "run" / "steps.jsonl").exists()


def test_overwrite_never_deletes_what_is_no_run(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match="is not empty and holds no run"):
        RunDirectory(tmp_path, overwrite=True)
    assert (tmp_path / "thesis.tex").exists()


def test_checking_creates_nothing(tmp_path):
    RunDirectory(tmp_path / "a" / "run")
    assert list(tmp_path.iterdir()) == []


def test_an_unusable_path_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file; it must be a directory"):
        RunDirectory(tmp_path / "file")
    with pytest.raises(InputError, match=r"out_dir .* cannot be written"):
        RunDirectory(tmp_path / "file" / "run")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_an_unwritable_directory_is_named(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(InputError, match=r"cannot be written: Permission denied"):
        RunDirectory(tmp_path / "run")
