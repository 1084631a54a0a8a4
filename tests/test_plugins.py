"""A plug-in is loaded once, hashed, refused in one line, and never run because a file of someone else names it."""

import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from scaling_testbed import plugins
from scaling_testbed.errors import ConfigError, UserError
from scaling_testbed.files import sha256_of
from scaling_testbed.plugins import (
    check_unchanged,
    difference,
    hashes,
    is_installed,
    load_named_in,
    load_plugins,
    source_hash,
)


@pytest.fixture(autouse=True)
def nothing_loaded(monkeypatch, tmp_path):
    """Each test begins with no plug-in, in a folder of its own that is searched for modules, as `python -m` does."""
    monkeypatch.setattr(plugins, "_loaded", {})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        del sys.modules[name]


def write(path, text="VALUE = 1\n"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


@pytest.fixture
def marked(tmp_path):
    """Returns a function to Python that leaves a mark where it runs, and one to whether it has."""
    mark = tmp_path / "it_ran"
    return f"open({str(mark)!r}, 'w').close()\n", mark.exists


def test_a_file_is_loaded_once_under_its_absolute_path_and_its_objects_can_be_pickled(tmp_path):
    write(tmp_path / "mine.py", "class Thing:\n    pass\n")
    (one,) = load_plugins(["mine.py"])
    assert (one.name, one.typed, one.origin) == (str(tmp_path / "mine.py"), "mine.py", str(tmp_path / "mine.py"))
    assert load_plugins([str(tmp_path / "mine.py"), "./mine.py"]) == [one, one]
    thing = sys.modules[one.module].Thing()
    assert isinstance(pickle.loads(pickle.dumps(thing)), type(thing))
    code = f"from scaling_testbed.plugins import load_plugins; print(load_plugins([{one.name!r}])[0].module)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == one.module  # the same in another process


def test_a_file_that_changed_within_a_second_is_not_mistaken_for_what_it_was(tmp_path, monkeypatch):
    for value in (1, 2):
        write(tmp_path / "mine.py", f"VALUE = {value}\n")
        monkeypatch.setattr(plugins, "_loaded", {})
        (one,) = load_plugins(["mine.py"])
        found = sys.modules[one.module].VALUE
        assert found == value
    assert not (tmp_path / "__pycache__").exists()


def test_the_hash_of_a_module_in_a_package_is_of_all_python_files_of_that_package(tmp_path, monkeypatch):
    write(tmp_path / "lab" / "__init__.py", "")
    write(tmp_path / "lab" / "part" / "__init__.py", "from lab.part import helper\n")
    helper = write(tmp_path / "lab" / "part" / "helper.py")
    (one,) = load_plugins(["lab.part.helper"])
    assert (one.name, one.origin) == ("lab.part.helper", str(tmp_path / "lab" / "part"))
    write(tmp_path / "lab" / "figures.py")
    write(tmp_path / "lab" / "part" / "notes.txt")
    assert plugins._sha256(Path(one.origin)) == one.sha256
    helper.write_text("VALUE = 2\n")
    assert plugins._sha256(Path(one.origin)) != one.sha256


@pytest.mark.parametrize(
    ("typed", "text", "message"),
    [
        ("gone.py", None, "gone.py: there is no such .py file"),
        ("no_such_lab.optim", None, "plug-in no_such_lab.optim: there is no module no_such_lab; install it"),
        ("bad.py", "import math\n\nmath.nothing\n", "bad.py, line 3: AttributeError: module 'math' has no attribute"),
        ("bad.py", "x = (\n", "bad.py, line 1: SyntaxError: '(' was never closed"),
        ("bare", None, "plug-in bare is a folder without an __init__.py; name a module in it"),
        ("bad.py", "import no_such_module\n", "bad.py, line 1: ModuleNotFoundError: No module named 'no_such_module'"),
        ("bad.py", "def f():\n    import json\n    json.loads('{')\nf()\n", "bad.py, line 3: JSONDecodeError"),
        ("bad.py", "raise SystemExit(3)\n", "bad.py, line 1: SystemExit: 3"),
        (
            "bad.py",
            "from scaling_testbed.data.sources import SOURCES\n\nSOURCES.add('markov', int)\n",
            "bad.py, line 3: the data source 'markov' is registered already by scaling_testbed.data.sources.markov",
        ),
    ],
)
def test_what_cannot_be_loaded_is_one_line_that_names_file_and_line(tmp_path, typed, text, message):
    (tmp_path / "bare").mkdir()
    if text:
        write(tmp_path / typed, text)
    with pytest.raises(ConfigError) as error:
        load_plugins([typed])
    assert message in str(error.value) and "\n" not in str(error.value) and str(error.value).count("(bad.py") == 0
    assert plugins.loaded_plugins() == [] and not [name for name in sys.modules if name.startswith("plugin_bad")]


def test_a_file_that_changed_after_it_was_loaded_is_not_taken_for_what_runs(tmp_path):
    """In a notebook: the old code would train, and the sweep's other processes would load the new one."""
    file = write(tmp_path / "mine.py")
    (one,) = load_plugins(["mine.py"])
    assert load_plugins(["mine.py"]) == [one]
    file.write_text("VALUE = 2\n")
    with pytest.raises(ConfigError, match="mine.py has changed since this process loaded it; start Python"):
        load_plugins(["mine.py"])


def test_an_error_deep_in_a_package_names_the_line_of_the_package(tmp_path):
    write(tmp_path / "lab2" / "__init__.py", "")
    inner = write(tmp_path / "lab2" / "inner.py", "import json\n\njson.loads('{')\n")
    write(tmp_path / "lab2" / "outer.py", "import lab2.inner\n")
    with pytest.raises(ConfigError) as error:
        load_plugins(["lab2.outer"])
    assert f"plug-in lab2.outer ({inner}, line 3): JSONDecodeError" in str(error.value)


# ---- What a file may name


def test_a_file_names_what_was_typed_too_and_nothing_else(tmp_path, marked):
    code, ran = marked
    theirs = write(tmp_path / "theirs" / "evil.py", code)
    with pytest.raises(UserError) as error:
        load_named_in(Path("sweep.yaml"), [str(theirs)], "plugins=")
    assert f"sweep.yaml names the plug-in {theirs}" in str(error.value)
    assert str(error.value).endswith(f"type plugins={theirs}") and "\n" not in str(error.value)
    assert error.value.exit_status == 1 and not ran()
    load_plugins(["theirs/evil.py"])
    assert ran() and len(load_named_in(Path("sweep.yaml"), [str(theirs)], "plugins=")) == 1


def test_a_module_that_only_the_current_folder_offers_is_not_run(tmp_path, marked):
    code, ran = marked
    write(tmp_path / "evil.py", code)
    write(tmp_path / "pack" / "__init__.py", code)
    write(tmp_path / "pack" / "evil.py", code)
    write(tmp_path / "bare" / "inner" / "evil.py", code)
    for name in ("evil", "pack", "pack.evil", "bare.inner.evil", "bare.inner", "no_such_module", "os", "a/b.py", ""):
        assert not is_installed(name), name
        with pytest.raises(UserError):
            load_named_in(Path("config.yaml"), [name], "--plugins ")
    assert not ran()


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder in the place of site-packages."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.setattr(plugins, "_site_folders", lambda: (folder.resolve(),))
    monkeypatch.setattr(sys, "path", [*sys.path, str(folder)])
    plugins._editable_roots.cache_clear()
    yield folder
    plugins._editable_roots.cache_clear()


def test_what_is_installed_may_be_named_unless_something_nearer_hides_it(tmp_path, site, marked):
    code, ran = marked
    write(site / "tools" / "__init__.py")
    write(site / "tools" / "optim.py")
    write(site / "spread" / "optim.py")  # a namespace package
    assert is_installed("tools") and is_installed("tools.optim") and is_installed("spread.optim")
    assert not is_installed("spread")
    write(tmp_path / "spread" / "evil.py", code)
    assert not is_installed("spread.evil")
    write(tmp_path / "tools" / "__init__.py", code)
    write(tmp_path / "tools" / "optim.py", code)
    assert not is_installed("tools") and not is_installed("tools.optim") and not ran()


def editable(folder, root, top="lab3", name="lab3"):
    write(folder / f"{name}-1.dist-info" / "METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n")
    write(folder / f"{name}-1.dist-info" / "top_level.txt", f"{top}\n")
    record = {"dir_info": {"editable": True}, "url": root.as_uri()}
    write(folder / f"{name}-1.dist-info" / "direct_url.json", json.dumps(record))


def test_an_editable_install_is_its_own_package_and_not_whatever_lies_in_its_project(tmp_path, site, monkeypatch):
    project = tmp_path / "project"
    write(project / "lab3" / "__init__.py")
    write(project / "lab3" / "optim.py")
    write(project / "runs" / "evil.py")
    write(project / "runs" / "lab3" / "__init__.py")
    monkeypatch.setattr(sys, "path", [*sys.path, str(project)])
    assert not is_installed("lab3.optim")
    editable(tmp_path, project)  # metadata in the current folder say nothing
    assert not is_installed("lab3.optim")
    editable(site, project)
    plugins._editable_roots.cache_clear()
    assert is_installed("lab3.optim") and is_installed("lab3")
    assert not is_installed("runs.evil")
    monkeypatch.setattr(sys, "path", [str(project / "runs"), *sys.path])
    assert not is_installed("lab3")


# ---- What has changed


def test_a_change_is_one_line_and_another_place_is_none(tmp_path):
    then = {"/a/mine.py": "1" * 64, "lab": "2" * 64}
    assert difference(then, then) is None and difference(None, {}) is None and difference({}, then) is None
    assert difference(then, {"/b/moved.py": "1" * 64, "lab": "2" * 64}) is None
    changed = difference(then, then | {"lab": "3" * 64})
    assert changed == f"plug-in lab (sha256 {'2' * 12}) has changed: it is {'3' * 12} now"
    missing = difference(then, {"lab": "2" * 64})
    assert "plug-in /a/mine.py" in missing and "is not named now; type plugins=/a/mine.py" in missing


@pytest.mark.fault("A1", "A row is served only while the files that its plug-ins import are the same.")
def test_what_a_plug_in_imports_is_part_of_its_source(tmp_path, monkeypatch, record_property):
    write(tmp_path / "mine.py", "import json, numpy, helper\nif False:\n    from lab.late import VALUE\n")
    write(tmp_path / "other.py", "import helper\n")
    helper = write(tmp_path / "helper.py", "import torch.nn\nfrom scaling_testbed import keys\nclass Thing: pass\n")
    write(tmp_path / "lab" / "__init__.py", "")
    write(tmp_path / "lab" / "late.py", "from . import below\nVALUE = 1\n")
    below = write(tmp_path / "lab" / "below.py")
    write(tmp_path / "nobody.py")
    files = [helper, tmp_path / "lab" / "__init__.py", tmp_path / "lab" / "late.py", below]
    then = hashes_of(["other.py", "mine.py"])
    assert set(then) == {str(tmp_path / "other.py"), str(tmp_path / "mine.py"), *map(str, files)}
    assert then[str(below)] == sha256_of(below)
    assert source_hash(sys.modules["helper"].Thing) == sha256_of(helper)
    assert load_plugins(["mine.py"])[0].imports == {str(file): then[str(file)] for file in files}
    below.write_text("VALUE = 2\n")
    with pytest.raises(ConfigError, match="has changed since this process loaded it"):
        load_plugins(["mine.py"])
    monkeypatch.setattr(plugins, "_loaded", {})
    now = hashes_of(["mine.py", "other.py"])
    assert {name for name in then if then[name] != now[name]} == {str(below)}
    with pytest.raises(UserError, match="was made with other code: plug-in .*below.py .* has changed") as error:
        check_unchanged(then, ["mine.py", "other.py"], tmp_path)
    record_property("seen", str(error.value))
    check_unchanged({str(tmp_path / "mine.py"): then[str(tmp_path / "mine.py")]}, ["mine.py"], tmp_path)  # older rows


def hashes_of(names):
    load_plugins(names)
    return hashes(names)


def test_a_run_of_other_code_is_refused(tmp_path):
    write(tmp_path / "mine.py")
    load_plugins(["mine.py"])
    now = hashes(["mine.py"])
    check_unchanged(now, ["mine.py"], tmp_path)
    with pytest.raises(UserError, match="was made with other code: plug-in .*mine.py .* has changed"):
        check_unchanged(dict.fromkeys(now, "0" * 64), ["mine.py"], tmp_path)
