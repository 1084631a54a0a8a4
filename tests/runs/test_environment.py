"""What a run was started from is written down whole, and once however often it is started."""

import gzip
import hashlib
import importlib.metadata
import io
import json
import secrets
import subprocess
import tarfile

import pytest

from scaling_testbed.errors import UserError
from scaling_testbed.plugins import Plugin
from scaling_testbed.runs import environment
from scaling_testbed.runs.environment import record_start


def test_the_record_holds_every_installed_version_and_no_variables_but_those_of_arithmetic(monkeypatch):
    secret = secrets.token_hex()  # written out it would be in the diff, as long as this file is changed
    monkeypatch.setenv("WANDB_API_KEY", secret)
    monkeypatch.setenv("MKL_CBWR", "AVX2")
    found = environment.environment("cpu", "fp32")
    assert all(secret.encode() not in content for content in found.pop("files").values())
    assert secret not in json.dumps(found)
    assert found["variables"]["MKL_CBWR"] == "AVX2" and set(found["variables"]) <= set(environment.ARITHMETIC)
    names = {one.metadata["Name"].lower() for one in importlib.metadata.distributions()}
    assert set(found["installed"]) == names and found["installed"]["pytest"] == pytest.__version__
    assert found["versions"]["torch"] == found["installed"]["torch"]


def start(versions, diff=None):
    dirty = hashlib.sha256(diff).hexdigest()[:12] if diff else None
    files = {f"uncommitted-{dirty}.diff": diff} if diff else {}
    return {"host": "h", "installed": versions, "git": {"commit": "c", "dirty": dirty}, "files": files}


def test_a_list_and_a_diff_are_kept_once_for_all_the_starts_they_are_of(tmp_path):
    old, new = {"torch": "2.11"}, {"torch": "2.13"}
    given = [start(old, b"a"), start(old, b"a"), start(new, b"b"), start(old)]
    assert [record_start(tmp_path, each) for each in given] == [0, 1, 2, 3]
    found = json.loads((tmp_path / "environment.json").read_text())
    assert [found["installed"][each["installed"]] for each in found["starts"]] == [old, old, new, old]
    assert len(found["installed"]) == 2 and all("files" not in each for each in found["starts"])
    assert sorted(path.read_bytes() for path in tmp_path.glob("uncommitted-*.diff")) == [b"a", b"b"]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"starts": 3}', '{"starts": [7]}', "[" * 100_000, "\xff"])
def test_a_record_that_is_damaged_stops_no_start_and_is_kept(tmp_path, capsys, text):
    (tmp_path / "environment.json").write_text(text, encoding="latin-1")
    assert record_start(tmp_path, start({"torch": "2.13"})) == 0
    found = json.loads((tmp_path / "environment.json").read_text())
    assert [each["host"] for each in found["starts"]] == ["h"]
    assert (tmp_path / "environment.damaged.json").read_text(encoding="latin-1") == text
    assert capsys.readouterr().err.count("is damaged") == 1


def test_a_record_of_an_earlier_version_goes_on(tmp_path):
    (tmp_path / "environment.json").write_text('{"starts": [{"host": "earlier"}]}')
    assert record_start(tmp_path, start({"torch": "2.13"})) == 1
    found = json.loads((tmp_path / "environment.json").read_text())
    assert [each["host"] for each in found["starts"]] == ["earlier", "h"]


def test_a_record_of_a_newer_version_is_not_overwritten(tmp_path):
    text = '{"schema_version": 99, "starts": []}'
    (tmp_path / "environment.json").write_text(text)
    with pytest.raises(UserError, match="newer version"):
        record_start(tmp_path, start({}))
    assert (tmp_path / "environment.json").read_text() == text


def test_a_change_of_the_source_between_two_starts_is_told(tmp_path):
    record_start(tmp_path, start({}))
    assert environment.source_change(tmp_path) is None
    record_start(tmp_path, start({}))
    assert environment.source_change(tmp_path) is None
    record_start(tmp_path, start({}, b"a"))
    assert environment.source_change(tmp_path) == f"c then, c with changes {hashlib.sha256(b'a').hexdigest()[:12]} now"
    for torch in ("2.11", "2.13"):  # the row has the versions of the last start alone
        record_start(tmp_path, start({}) | {"versions": {"python": "3.12", "torch": torch}})
    assert environment.source_change(tmp_path) == "torch 2.11 then, 2.13 now"
    for variables in ({"OMP_NUM_THREADS": "1"}, {"NVIDIA_TF32_OVERRIDE": "0"}):
        record_start(tmp_path, start({}) | {"variables": variables})
    assert environment.source_change(tmp_path) == "NVIDIA_TF32_OVERRIDE unset then, 0 now"


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A repository with one source of the package; returns what runs git in it."""

    def git(*arguments):
        named = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
        return subprocess.run(["git", *named, *arguments], cwd=tmp_path, check=True, capture_output=True, text=True)

    module = tmp_path / "scaling_testbed" / "__init__.py"
    module.parent.mkdir()
    module.write_text("a = 1\n")
    monkeypatch.setattr(environment, "PACKAGE", module.parent)
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "first")
    return git


# Settings and variables of a user that change what git prints, or which repository it reads.
HABITS = ({}, {"diff.noprefix": "true", "diff.mnemonicPrefix": "true", "color.ui": "always", "diff.external": "false"})


@pytest.mark.parametrize("settings", HABITS)
def test_the_diff_gives_changes_and_new_sources_back(tmp_path, repository, monkeypatch, settings):
    for key, value in settings.items():
        repository("config", key, value)
    monkeypatch.setenv("GIT_DIR", "/nowhere")
    package, name = tmp_path / "scaling_testbed", "new größe.py"
    head = subprocess.run(
        ["git", "--git-dir", tmp_path / ".git", "rev-parse", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    clean = {"commit": head, "dirty": None}
    assert environment.source_state() == (clean, {})
    (tmp_path / "notes.txt").write_text("of no consequence\n")
    assert environment.source_state() == (clean, {})
    changed = {"__init__.py": b"a = 2\n", name: b"b = 3  # \xff\n", "table.bin": bytes(range(256))}
    for file, content in changed.items():
        (package / file).write_bytes(content)
    dirty, files = environment.source_state()
    ((kept, diff),) = files.items()
    assert dirty["commit"] == head and dirty["diff_length"] == len(diff) and dirty["diff"] == kept
    assert dirty["dirty"] == hashlib.sha256(diff).hexdigest()[:12] and kept == f"uncommitted-{dirty['dirty']}.diff"
    assert b"of no consequence" not in diff
    monkeypatch.delenv("GIT_DIR")
    for file in changed:
        (package / file).unlink()
    repository("checkout", "--", ".")
    subprocess.run(["git", "apply"], input=diff, cwd=tmp_path, check=True)
    assert {file: (package / file).read_bytes() for file in changed} == changed


def test_a_long_diff_is_compressed_and_of_the_longest_only_the_hash_is_kept(repository, tmp_path, monkeypatch, capsys):
    (tmp_path / "scaling_testbed" / "__init__.py").write_text("a = 2\n")
    _, (diff,) = environment.source_state()[0], environment.source_state()[1].values()
    monkeypatch.setattr(environment, "LONGEST_PLAIN", 10)
    state, files = environment.source_state()
    assert state["diff"].endswith(".diff.gz") and gzip.decompress(files[state["diff"]]) == diff
    monkeypatch.setattr(environment, "LONGEST_KEPT", 10)
    state, files = environment.source_state()
    assert state["dirty"] and "diff" not in state and not files
    assert "only their hash" in capsys.readouterr().err


@pytest.mark.parametrize(("variable", "commit"), [(None, None), ("", None), ("0123abc-dirty", "0123abc-dirty")])
def test_outside_of_a_repository_an_archive_holds_the_source(tmp_path, monkeypatch, variable, commit):
    """As in an image, which names its commit if it was built with the argument."""
    monkeypatch.delenv("SCALING_TESTBED_COMMIT", raising=False)
    if variable is not None:
        monkeypatch.setenv("SCALING_TESTBED_COMMIT", variable)
    package = tmp_path / "scaling_testbed"
    (package / "__pycache__").mkdir(parents=True)
    (tmp_path / "kernels").mkdir()
    (package / "kernels").symlink_to("../kernels")
    contents = {"scaling_testbed/__init__.py": b"a = 1\n", "scaling_testbed/kernels/b.py": b"b = 1\n"}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    (package / "__pycache__" / "c.pyc").write_bytes(b"c")
    monkeypatch.setattr(environment, "PACKAGE", package)
    state, files = environment.source_state()
    assert state == {"commit": commit, "dirty": None, "files": state["files"]}
    ((name, packed),) = files.items()
    assert name == f"source-{state['files']}.tar.gz"
    with tarfile.open(fileobj=io.BytesIO(packed)) as tar:
        assert {one.name: tar.extractfile(one).read() for one in tar} == contents
    assert environment.source_state() == (state, files)  # the same bytes again
    (package / "__init__.py").write_bytes(b"a = 2\n")
    assert environment.source_state()[0]["files"] != state["files"]


def test_a_package_that_pip_has_installed_from_a_repository_knows_its_commit(tmp_path, monkeypatch):
    monkeypatch.delenv("SCALING_TESTBED_COMMIT", raising=False)
    package, info = tmp_path / "scaling_testbed", tmp_path / "scaling_testbed-9.dist-info"
    package.mkdir()
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: scaling-testbed\nVersion: 9\n")
    (info / "direct_url.json").write_text('{"url": "x", "vcs_info": {"vcs": "git", "commit_id": "0123abc"}}')
    monkeypatch.setattr(environment, "PACKAGE", package)
    monkeypatch.syspath_prepend(tmp_path)
    assert environment.source_state()[0]["commit"] == "0123abc"
    (info / "direct_url.json").write_text('{"url": "x", "dir_info": {}}')
    assert environment.source_state()[0]["commit"] is None


def test_the_source_of_a_plug_in_is_kept(tmp_path):
    (tmp_path / "mine.py").write_text("a = 1\n")
    plugin = Plugin(name="mine", typed="mine", module="mine", origin=str(tmp_path / "mine.py"), sha256="0")
    ((name, packed),) = environment._archive_of(plugin).items()
    assert name.startswith("plugin-mine-")
    with tarfile.open(fileobj=io.BytesIO(packed)) as tar:
        assert {one.name: tar.extractfile(one).read() for one in tar} == {"mine.py": b"a = 1\n"}


def test_the_processor_is_named():
    import torch

    found = environment.processor()
    assert found["model"] and found["cores"] >= 1 and found["threads"] == torch.get_num_threads()
    assert found["instructions"] == torch.backends.cpu.get_cpu_capability()


def test_the_driver_is_named_by_its_version(tmp_path, monkeypatch):
    import torch

    text = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 2024\nGCC version: gcc 12\n"
    (tmp_path / "version").write_text(text)
    monkeypatch.setattr(environment, "DRIVER_FILE", tmp_path / "version")
    found = environment.driver()
    assert found["nvidia"] == "550.54.15" and found["cuda"] == torch.version.cuda
    assert all((found[name] is None) == (torch.version.cuda is None) for name in ("cudnn", "nccl"))
