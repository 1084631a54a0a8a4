"""`make release-check`: what it compares, and that the first check that fails ends it with one line."""

import runpy
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = runpy.run_path(str(ROOT / "scripts" / "release_check.py"))
Failed = SCRIPT["Failed"]
PROJECT = '[project]\nversion = "1.2.0"\n'
CITATION = "version: 1.2.0\ndate-released: 2026-01-02\n"
CHANGELOG = "# Changelog\n\n## [Unreleased]\n\n### Added\n\n- one\n  more of it\n- two\n\n## [1.2.0] - 2026-01-02\n"


def test_the_three_files_agree_on_version_and_date_and_what_waits_is_counted():
    assert SCRIPT["agreed_version"](PROJECT, CITATION, CHANGELOG) == "1.2.0"
    assert SCRIPT["waiting"](CHANGELOG) == 2
    assert SCRIPT["waiting"](CHANGELOG.replace("- one\n  more of it\n- two\n", "")) == 0


@pytest.mark.parametrize(
    ("file", "old", "new", "says"),
    [
        (0, "1.2.0", "1.3.0", "CITATION.cff has the version 1.2.0 and pyproject.toml 1.3.0"),
        (1, "1.2.0", "1.1.0", "CITATION.cff has the version 1.1.0"),
        (1, "01-02", "01-03", "CITATION.cff says 2026-01-03 and CHANGELOG.md 2026-01-02"),
        (2, "[1.2.0]", "[1.1.9]", "CHANGELOG.md has the version 1.1.9"),
        (2, " - 2026-01-02", "", "CHANGELOG.md has no heading"),
    ],
)
def test_files_that_disagree_are_named(file, old, new, says):
    texts = [PROJECT, CITATION, CHANGELOG]
    texts[file] = texts[file].replace(old, new)
    with pytest.raises(Failed) as failed:
        SCRIPT["agreed_version"](*texts)
    assert says in str(failed.value) and "\n" not in str(failed.value)


def test_generated_files_that_differ_or_are_missing_are_named(tmp_path):
    (tmp_path / "a.md").write_text("a")
    (tmp_path / "b.md").write_text("old")
    assert SCRIPT["out_of_date"]({"a.md": "a", "b.md": "b", "c.md": "c"}, tmp_path) == ["b.md", "c.md"]


def test_the_page_of_papers_and_the_table_of_faults_are_generated():
    generator = (ROOT / "scripts" / "reference.py").read_text()
    assert all(f'"docs/{name}.md": {name}_page()' in generator for name in ("papers", "reliability"))


@pytest.mark.parametrize(
    ("output", "line"),
    [
        ("a.py:3:1: E501 Line too long\nFound 1 error.\n", "a.py:3:1: E501 Line too long"),
        ("a.py:3: error: no\nFound 1 error in 1 file\n", "a.py:3: error: no"),
        ("Would reformat: a.py\n1 file would be reformatted\n", "Would reformat: a.py"),
        ("INFO - Building\nWARNING - no page x.md\nAborted with 1 warnings\n", "WARNING - no page x.md"),
        ("all\nis\nwell\n\n", "well"),
        ("", "it printed nothing"),
    ],
)
def test_of_what_a_tool_prints_the_line_that_says_what_is_wrong_is_shown(output, line):
    assert SCRIPT["complaint"](output) == line


def test_changed_and_new_files_are_found():
    assert SCRIPT["changed_files"](" M docs/a.md\n?? new.py\n\n") == ["docs/a.md", "new.py"]


@pytest.mark.parametrize("row", [{"status": "failed", "error": "x"}, {"status": "finished", "val_loss": None}, {}])
def test_a_run_of_the_wheel_must_have_finished_with_a_loss(row, tmp_path):
    SCRIPT["finished"]({"status": "finished", "val_loss": 3.0}, tmp_path)
    with pytest.raises(Failed, match="has the status"):
        SCRIPT["finished"](row, tmp_path)


def test_a_command_that_fails_is_one_line_with_what_to_type():
    with pytest.raises(Failed, match=r"error: broken; type: sh -c echo error: broken; exit 3"):
        SCRIPT["run"]("sh", "-c", "echo error: broken; exit 3")
    assert SCRIPT["run"]("echo", "well") == "well\n"


def test_a_command_does_not_see_this_source_by_pythonpath(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    assert SCRIPT["run"]("sh", "-c", "echo $PYTHONPATH") == "\n"


def test_the_first_check_that_fails_is_the_last_and_the_status_says_so():
    said, made = [], []

    def bad():
        raise Failed("it is\nwrong")

    def good(name):
        return name, lambda: made.append(name) or f"{name} is well"

    assert SCRIPT["check_all"]([good("a"), ("b", bad), good("c")], said.append) == 1
    assert made == ["a"] and said[0].startswith("a") and "a is well" in said[0]
    assert said[1:] == ["error: release-check: b: it is wrong"]
    said.clear()
    assert SCRIPT["check_all"]([good("a")], said.append) == 0 and said[-1].startswith("This checkout can be released")


def test_the_checks_are_those_that_the_target_promises(tmp_path):
    names = [name for name, _ in SCRIPT["checks"](tmp_path)]
    assert names == [
        *("clean tree", "version", "generated", "lint", "types", "documents", "wheel", "smoke run", "still clean"),
    ]
    planned = subprocess.run(["make", "-n", "release-check"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "scripts/release_check.py" in planned.stdout
