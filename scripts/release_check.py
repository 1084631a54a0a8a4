#!/usr/bin/env python3
"""Say whether this checkout can be released: `make release-check`. It needs the extras check and docs.

usage: scripts/release_check.py     (one line for each check; the first that fails ends it, with exit status 1)

The tests are not run: `make test` does that.
"""

import json
import os
import re
import runpy
import subprocess
import sys
import tempfile
import time
import tomllib
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
VERSIONED = ("pyproject.toml", "CITATION.cff", "CHANGELOG.md")
SMOKE = "train model=nano_s data=markov data.n_tokens=40000 budget.steps=5"


class Failed(Exception):
    """A check that did not pass: one line that says what is wrong and what to do."""


# ---- what is compared


def agreed_version(project: str, citation: str, changelog: str) -> str:
    """The version of the texts of pyproject.toml, CITATION.cff and CHANGELOG.md, which also agree on its date."""
    version = tomllib.loads(project)["project"]["version"]
    cited = yaml.safe_load(citation)
    newest = re.search(r"^## \[(\d\S*)\] - (\S+)", changelog, re.MULTILINE)
    if newest is None:
        raise Failed(f"CHANGELOG.md has no heading '## [{version}] - DATE'")
    for file, other in (("CITATION.cff", cited["version"]), ("CHANGELOG.md", newest[1])):
        if str(other) != version:
            raise Failed(f"{file} has the version {other} and pyproject.toml {version}; make them equal")
    if str(cited["date-released"]) != newest[2]:
        raise Failed(f"CITATION.cff says {cited['date-released']} and CHANGELOG.md {newest[2]}; make the dates equal")
    return version


def waiting(changelog: str) -> int:
    """The entries that stand under [Unreleased]."""
    section = re.search(r"^## \[Unreleased\]\n(.*?)(?=^## |\Z)", changelog, re.MULTILINE | re.DOTALL)
    return len(re.findall(r"^- ", section[1], re.MULTILINE)) if section else 0


def out_of_date(pages: Mapping[str, str], root: Path) -> list[str]:
    """The generated files that differ from what is in `root`."""
    return [name for name, text in pages.items() if not (root / name).exists() or (root / name).read_text() != text]


def changed_files(porcelain: str) -> list[str]:
    """The files of the output of `git status --porcelain`."""
    return [line[3:] for line in porcelain.splitlines() if line.strip()]


def complaint(output: str) -> str:
    """The line of a tool's output that says what is wrong: the first that looks so, else the last one."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    wrong = [line for line in lines if re.search(r"error|warning|would reformat|^\S+:\d+:", line, re.IGNORECASE)]
    return (wrong or lines[-1:] or ["it printed nothing"])[0]


def last_line(output: str) -> str:
    return output.strip().rpartition("\n")[2]


def finished(row: Mapping[str, object], place: Path) -> None:
    """Raises Failed unless the row is of a run that has finished."""
    if row.get("status") != "finished" or not isinstance(row.get("val_loss"), float):
        raise Failed(
            f"the run of the wheel {version} in {place} has the status {row.get('status')}: {row.get('error')}"
        )


# ---- the checks: each returns what it found


def run(*words: str | Path, cwd: Path = ROOT) -> str:
    """What a command prints on stdout. Raises Failed with one line of its output and the command to type.

    It runs without PYTHONPATH, which could put this source in the place of the wheel.
    """
    outside = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([str(word) for word in words], cwd=cwd, env=outside, capture_output=True, text=True)
    if done.returncode:
        typed = " ".join(str(word).replace(f"{ROOT}/", "") for word in words)
        raise Failed(f"{complaint(done.stdout + done.stderr)}; type: {typed}")
    return done.stdout


def clean_tree() -> str:
    if changed := changed_files(run("git", "status", "--porcelain")):
        raise Failed(f"{len(changed)} changed or new files, such as {changed[0]}: commit them or put them away")
    return f"commit {run('git', 'describe', '--always', '--abbrev=12').strip()}, nothing uncommitted"


def version() -> str:
    project, citation, changelog = ((ROOT / name).read_text() for name in VERSIONED)
    number = agreed_version(project, citation, changelog)
    tag = f"v{number}"
    if tag in run("git", "tag").split() and tag not in run("git", "tag", "--points-at", "HEAD").split():
        raise Failed(f"{tag} is the tag of another commit: raise the version")
    left = f"; {waiting(changelog)} entries under [Unreleased] are in no version yet" if waiting(changelog) else ""
    return f"{number} in pyproject.toml, CITATION.cff and CHANGELOG.md{left}"


def generated() -> str:
    pages = runpy.run_path(str(ROOT / "scripts" / "reference.py"))["pages"]()
    if old := out_of_date(pages, ROOT):
        raise Failed(f"{', '.join(old)} out of date: run scripts/reference.py and commit")
    return f"{len(pages)} files are up to date, docs/papers.md and the faults of docs/reliability.md among them"


def lint() -> str:
    run(BIN / "ruff", "check", "--output-format", "concise", ".")
    return f"ruff: {last_line(run(BIN / 'ruff', 'format', '--check', '.'))}"


def types() -> str:
    return f"mypy: {last_line(run(BIN / 'mypy', 'scaling_testbed'))}"


def documents() -> str:
    with tempfile.TemporaryDirectory() as site:
        run(BIN / "mkdocs", "build", "--strict", "--quiet", "--site-dir", site)
        return f"mkdocs --strict built {len(list(Path(site).rglob('*.html')))} pages"


def wheel(folder: Path) -> str:
    """Builds the wheel of the commit, from a copy without the files that git does not know, such as build/."""
    run("git", "archive", "--output", folder / "source.tar", "HEAD")
    (folder / "source").mkdir()
    run("tar", "-xf", folder / "source.tar", "-C", folder / "source")
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder, folder / "source")
    (built,) = folder.glob("*.whl")
    number = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    with zipfile.ZipFile(built) as archive:
        (metadata,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        if f"\nVersion: {number}\n" not in archive.read(metadata).decode():
            raise Failed(f"{built.name} has another version than pyproject.toml ({number})")
        return f"{built.name}: {len(archive.namelist())} files, {built.stat().st_size / 1e6:.1f} MB"


def smoke(folder: Path) -> str:
    """Installs the wheel into an empty environment, with the pinned versions, and trains with it elsewhere."""
    (built,) = folder.glob("*.whl")
    run(sys.executable, "-m", "venv", folder / "fresh")
    run(folder / "fresh" / "bin" / "pip", "install", "-q", "-c", ROOT / "constraints.txt", built)
    place = folder / "elsewhere"
    place.mkdir()
    where = run(folder / "fresh" / "bin" / "python", "-c", "import scaling_testbed as s; print(s.__file__)", cwd=place)
    if not Path(where).is_relative_to(folder / "fresh"):
        raise Failed(f"the package in the empty environment is that of {where.strip()}: leave this out of its path")
    command = folder / "fresh" / "bin" / "scaling-testbed"
    run(command, "--help", cwd=place)
    run(command, *SMOKE.split(), cwd=place)
    (row,) = place.glob("runs/default/*/result.json")
    finished(json.loads(row.read_text()), place)
    return f"installed into an empty environment; `scaling-testbed {SMOKE}` has finished"


def checks(folder: Path) -> Iterable[tuple[str, Callable[[], str]]]:
    """Name and function of each check, the quick ones first. folder: an empty one for the wheel."""
    return (
        ("clean tree", clean_tree),
        ("version", version),
        ("generated", generated),
        ("lint", lint),
        ("types", types),
        ("documents", documents),
        ("wheel", lambda: wheel(folder)),
        ("smoke run", lambda: smoke(folder)),
        ("still clean", clean_tree),
    )


def check_all(listed: Iterable[tuple[str, Callable[[], str]]], say: Callable[[str], None] = print) -> int:
    """The exit status. Says one line for each check; the first that fails is the last."""
    for name, check in listed:
        start = time.monotonic()
        try:
            found = check()
        except (Failed, OSError) as error:
            say(f"error: release-check: {name}: {' '.join(str(error).split())}")
            return 1
        say(f"{name:<12} {found} ({time.monotonic() - start:.0f} s)")
    say("This checkout can be released. The tests were not run: make test")
    return 0


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="release-check-") as empty:
        sys.exit(check_all(checks(Path(empty)), lambda line: print(line, flush=True)))
