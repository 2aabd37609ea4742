"""What a record says of where it was made."""

import json
import subprocess

import jax

from jaxchunk import environment


def test_it_is_json_and_names_versions_and_device():
    described = json.loads(json.dumps(environment.describe_environment({"name": "simulated GPU"})))
    assert described["packages"]["jax"] == jax.__version__
    assert described["device_kind"] == jax.devices()[0].device_kind
    assert described["gpu"] == {"name": "simulated GPU"}
    assert len(described["source_sha256"]) == 64


def test_the_digest_follows_the_source(tmp_path, monkeypatch):
    (tmp_path / "environment.py").write_text("a = 1\n")
    monkeypatch.setattr(environment, "__file__", str(tmp_path / "environment.py"))
    before = environment.source_sha256()
    (tmp_path / "environment.py").write_text("a = 2\n")
    changed = environment.source_sha256()
    (tmp_path / "table.json").write_text("[]")
    assert len({before, changed, environment.source_sha256()}) == 3


def test_the_commit_is_that_of_our_own_checkout_or_none(tmp_path, monkeypatch):
    """A package installed inside somebody else's repository must not name that repository's commit."""

    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
        subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True)

    (tmp_path / "environment.py").write_text("")
    monkeypatch.setattr(environment, "__file__", str(tmp_path / "environment.py"))
    assert environment.git_commit() is None  # no checkout
    git("init", "--quiet")
    git("commit", "--allow-empty", "-m", "theirs")
    assert environment.git_commit() is None  # a checkout that does not know the file
    git("add", ".")
    git("commit", "-m", "ours")
    commit = environment.git_commit()
    assert commit is not None and len(commit) == 12
    (tmp_path / "environment.py").write_text("changed")
    assert environment.git_commit() == f"{commit}-dirty"
