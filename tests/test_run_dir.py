"""A run's directory: refused when in the way, complete after a kill."""

import json
import os

import pytest

from jaxchunk import run_dir
from jaxchunk.errors import InputError, RunFailedError
from jaxchunk.run_dir import RunDirectory, new_run_path, read_json_lines


def test_writes_json_and_lines(tmp_path):
    with RunDirectory(tmp_path / "a" / "run") as run:
        run.write_json("config.json", {"x": 1})
        run.append("steps.jsonl", {"step": 1})
        # Seen by another reader before the run ends: a kill loses nothing that was appended.
        assert read_json_lines(run.path / "steps.jsonl") == [{"step": 1}]
        run.append("steps.jsonl", {"step": 2})
    assert json.loads((run.path / "config.json").read_text()) == {"x": 1}
    assert [record["step"] for record in read_json_lines(run.path / "steps.jsonl")] == [1, 2]
    assert sorted(path.name for path in run.path.iterdir()) == [".jaxchunk-run", "config.json", "steps.jsonl"]


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


def test_a_directory_that_only_looks_like_a_run_is_never_cleared(tmp_path):
    """Every Hugging Face model has a config.json."""
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_text("weights")
    with pytest.raises(InputError, match="holds no run"):
        RunDirectory(tmp_path, overwrite=True)
    assert (tmp_path / "model.safetensors").exists()


def test_of_two_runs_in_one_place_the_second_is_refused(tmp_path):
    first, second = RunDirectory(tmp_path / "run"), RunDirectory(tmp_path / "run")
    with first:
        first.append("steps.jsonl", {"step": 1})
        with pytest.raises(InputError, match="already holds a run"), second:
            pass
    assert read_json_lines(tmp_path / "run" / "steps.jsonl") == [{"step": 1}]


def test_a_symbolic_link_to_a_directory_serves(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    for overwrite in (False, True):
        with RunDirectory(tmp_path / "link", overwrite=overwrite) as run:
            run.write_json("config.json", {})
    assert (tmp_path / "real" / "config.json").exists()


def test_what_json_cannot_hold_becomes_null(tmp_path):
    with RunDirectory(tmp_path / "run") as run:
        run.append("steps.jsonl", {"loss": float("nan"), "throttle": {"x": float("inf")}, "bound": [1.0, float("nan")]})
        run.write_json("summary.json", {"loss": float("nan")})
    (record,) = read_json_lines(run.path / "steps.jsonl")
    assert record == {"loss": None, "throttle": {"x": None}, "bound": [1.0, None]}
    assert json.loads((run.path / "summary.json").read_text()) == {"loss": None}


def test_a_full_disk_is_one_line_and_keeps_what_was_there(tmp_path, monkeypatch):
    with RunDirectory(tmp_path / "run") as directory:
        directory.write_json("run.json", {"a": 1})
        directory.append("records.jsonl", {"a": 1})
        before = directory.path.stat()

        def full(*arguments, **options):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(run_dir.Path, "write_text", full)
        monkeypatch.setattr(run_dir.Path, "open", full)
        with pytest.raises(RunFailedError, match=r"run\.json cannot be written: No space left on device"):
            directory.write_json("run.json", {"a": 2})
        with pytest.raises(RunFailedError, match=r"other\.jsonl cannot be written: No space left"):
            directory.append("other.jsonl", {"a": 2})
        monkeypatch.undo()
        assert directory.read_json("run.json") == {"a": 1} and before.st_ino == directory.path.stat().st_ino
    assert run_dir.read_json_lines(tmp_path / "run" / "records.jsonl") == [{"a": 1}]


def test_a_damaged_file_is_named(tmp_path):
    with RunDirectory(tmp_path / "run") as directory:
        assert directory.read_json("run.json") is None
        for content in (b'{"x', b"\x00\xff"):
            (directory.path / "run.json").write_bytes(content)
            with pytest.raises(InputError, match=r"run\.json is damaged"):
                directory.read_json("run.json")


def test_what_a_kill_left_is_cut_off_in_place(tmp_path):
    """Never written anew: a second kill would lose everything."""
    file = tmp_path / "records.jsonl"
    for content, whole in ((b'{"a": 1}\n{"a"', b'{"a": 1}\n'), (b'{"a"', b""), (b'{"a": 1}\n', b'{"a": 1}\n')):
        file.write_bytes(content)
        file.chmod(0o600)
        inode = file.stat().st_ino
        run_dir.cut_to_whole_lines(file)
        assert file.read_bytes() == whole and file.stat().st_ino == inode


def test_new_run_paths_do_not_collide(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    paths = []
    for _ in range(3):
        paths.append(new_run_path("tiny"))
        with RunDirectory(paths[-1]):
            pass
    assert len(set(paths)) == 3


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
