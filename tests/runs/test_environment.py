"""What a run was started from is written down whole, and once however often it is started."""

import hashlib
import importlib.metadata
import json
import secrets
import subprocess

import pytest

from scaling_testbed.runs import environment
from scaling_testbed.runs.environment import record_start


def test_the_record_holds_every_installed_version_and_no_environment_variables(monkeypatch):
    secret = secrets.token_hex()  # written out it would be in the diff, as long as this file is changed
    monkeypatch.setenv("WANDB_API_KEY", secret)
    found = environment.environment("cpu", "fp32")
    assert secret not in json.dumps(found)
    names = {one.metadata["Name"].lower() for one in importlib.metadata.distributions()}
    assert set(found["installed"]) == names and found["installed"]["pytest"] == pytest.__version__
    assert found["versions"]["torch"] == found["installed"]["torch"]


def start(versions, diff=None):
    dirty = hashlib.sha256(diff.encode()).hexdigest()[:12] if diff else None
    return {"host": "h", "installed": versions, "git": {"commit": "c", "dirty": dirty}, "diff": diff}


def test_a_list_and_a_diff_are_kept_once_for_all_the_starts_they_are_of(tmp_path):
    old, new = {"torch": "2.11"}, {"torch": "2.13"}
    given = [start(old, "a"), start(old, "a"), start(new, "b"), start(old)]
    assert [record_start(tmp_path, each) for each in given] == [0, 1, 2, 3]
    found = json.loads((tmp_path / "environment.json").read_text())
    assert [found["installed"][each["installed"]] for each in found["starts"]] == [old, old, new, old]
    assert len(found["installed"]) == 2 and all("diff" not in each for each in found["starts"])
    diffs = [each["git"].get("diff") for each in found["starts"]]
    assert [name and (tmp_path / name).read_text() for name in diffs] == ["a", "a", "b", None]
    assert len(list(tmp_path.glob("uncommitted-*.diff"))) == 2 and given[0]["diff"] == "a"


def test_of_a_diff_that_is_too_long_the_hash_alone_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "LONGEST_DIFF", 10)
    record_start(tmp_path, start({}, "x" * 11))
    (found,) = json.loads((tmp_path / "environment.json").read_text())["starts"]
    assert found["git"]["dirty"] and "diff" not in found["git"] and not list(tmp_path.glob("*.diff"))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"starts": 3}', '{"starts": [{"host": "earlier"}]}'])
def test_a_record_that_is_damaged_or_older_stops_no_start(tmp_path, text):
    (tmp_path / "environment.json").write_text(text)
    assert record_start(tmp_path, start({"torch": "2.13"})) == ("earlier" in text)
    found = json.loads((tmp_path / "environment.json").read_text())
    assert found["starts"][-1]["host"] == "h" and len(found["starts"]) == 1 + ("earlier" in text)


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A repository with this module committed as its only source; returns what runs git in it."""

    def git(*arguments):
        named = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
        return subprocess.run(["git", *named, *arguments], cwd=tmp_path, check=True, capture_output=True, text=True)

    module = tmp_path / "scaling_testbed" / "environment.py"
    module.parent.mkdir()
    module.write_text("a = 1\n")
    monkeypatch.setattr(environment, "__file__", str(module))
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "first")
    return git


def test_the_diff_holds_changes_and_new_sources(tmp_path, repository):
    package = tmp_path / "scaling_testbed"
    clean, diff = environment.git_state(package)
    assert clean == {"commit": repository("rev-parse", "HEAD").stdout.strip(), "dirty": None} and diff is None
    (tmp_path / "notes.txt").write_text("of no consequence\n")
    assert environment.git_state(package) == (clean, None)
    (package / "environment.py").write_text("a = 2\n")
    (package / "new optimizer.py").write_text("b = 3\n")
    dirty, diff = environment.git_state(package)
    assert "-a = 1\n+a = 2\n" in diff and "+b = 3\n" in diff and "of no consequence" not in diff
    assert dirty["commit"] == clean["commit"] and dirty["diff_length"] == len(diff)
    assert dirty["dirty"] == hashlib.sha256(diff.encode()).hexdigest()[:12]
    (package / "environment.py").write_text("a = 1\n")
    (package / "new optimizer.py").unlink()
    subprocess.run(["git", "apply"], input=diff, text=True, cwd=tmp_path, check=True)
    assert (package / "environment.py").read_text() == "a = 2\n" and (package / "new optimizer.py").exists()


def test_outside_a_repository_there_is_no_commit(tmp_path, monkeypatch):
    monkeypatch.delenv("SCALING_TESTBED_COMMIT", raising=False)
    assert environment.git_state(tmp_path) == ({"commit": None, "dirty": None}, None)
    monkeypatch.setenv("SCALING_TESTBED_COMMIT", "")  # an image that was built without the argument
    assert environment.git_state(tmp_path) == ({"commit": None, "dirty": None}, None)


def test_outside_a_repository_the_commit_is_that_of_the_image(tmp_path, monkeypatch):
    monkeypatch.setenv("SCALING_TESTBED_COMMIT", "0123abc")
    assert environment.git_state(tmp_path) == ({"commit": "0123abc", "dirty": None}, None)


def test_a_repository_goes_before_the_commit_of_an_image(tmp_path, repository, monkeypatch):
    monkeypatch.setenv("SCALING_TESTBED_COMMIT", "0123abc")
    head = repository("rev-parse", "HEAD").stdout.strip()
    assert environment.git_state(tmp_path / "scaling_testbed") == ({"commit": head, "dirty": None}, None)


def test_the_driver_is_named_by_its_version(tmp_path, monkeypatch):
    import torch

    text = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 2024\nGCC version: gcc 12\n"
    (tmp_path / "version").write_text(text)
    monkeypatch.setattr(environment, "DRIVER_FILE", tmp_path / "version")
    assert environment.driver() == {"nvidia": "550.54.15", "cuda": torch.version.cuda}
