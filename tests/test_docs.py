"""The documents: links lead somewhere, commands can be typed, code blocks are code, and every page is in the site.

In a command, a word in CAPITALS is a placeholder. A Python block after the line `<!-- run -->` is executed, and a text
block right after it is what it prints. Commands are parsed in this process; none is run.
"""

import ast
import contextlib
import dataclasses
import functools
import io
import re
import shlex
import textwrap
import tomllib
import typing
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import typer
import yaml

from scaling_testbed import analyze, evaluate, export, sample, sweep
from scaling_testbed.analysis.laws.forms import LAWS
from scaling_testbed.commands.spellings import today
from scaling_testbed.config.compose import compose_many
from scaling_testbed.config.run import GROUPS, RunConfig
from scaling_testbed.config.search import choices
from scaling_testbed.config.words import override_values
from scaling_testbed.errors import ConfigError, UserError
from scaling_testbed.sweeps.grid import load_sweep, narrowed
from scaling_testbed.sweeps.slurm import SlurmConfig
from tests.plugins.strangers import RECIPES

OF_A_MAPPING = ("interventions.", "evaluation.sets.", "optimizer.lr_multipliers.", "start.grow.")
ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted((ROOT / "docs").rglob("*.md"))
DOCUMENTS = [
    *(path for name in ("README.md", "CONTRIBUTING.md") if (path := ROOT / name).exists()),
    *(ROOT / "configs" / "sweep" / "README.md", ROOT / "benchmarks" / "README.md"),
    *sorted((ROOT / "studies").rglob("README.md")),
    *PAGES,
]
RUN = "<!-- run -->"


# ---- reading a document


@dataclass(frozen=True)
class Block:
    """A fenced block. before: the line above it."""

    document: Path
    line: int
    language: str
    text: str
    before: str

    def __str__(self) -> str:
        return f"{self.document.relative_to(ROOT)}:{self.line}"


@functools.cache
def parts(document: Path) -> tuple[list[Block], list[tuple[int, str]]]:
    """The fenced blocks of a document, and its other lines by number."""
    blocks, prose, lines, before = [], [], [], ""
    fence = language = None
    for number, line in enumerate(document.read_text().splitlines(), start=1):
        opening = re.match(r"\s*(```+)\s*(\w*)", line)
        if fence is None and opening:
            fence, language, begin = opening[1], opening[2], number
        elif fence is not None and line.strip() == fence:
            blocks.append(Block(document, begin, language, textwrap.dedent("\n".join(lines)), before))
            fence, lines, before = None, [], ""
        elif fence is not None:
            lines.append(line)
        else:
            prose.append((number, line))
            before = line.strip() or before
    assert fence is None, f"{document}:{begin}: the block has no end"
    return blocks, prose


BLOCKS = [block for document in DOCUMENTS for block in parts(document)[0]]


# ---- links


def links(document: Path) -> Iterator[tuple[int, str]]:
    """Line and target of every link and image. A text may run over several lines."""
    numbers, lines = zip(*parts(document)[1], strict=True)
    text = "\n".join(re.sub(r"`[^`]*`", "code", line) for line in lines)
    for found in re.finditer(r"\]\(([^()\s]+)(?:\s+\"[^\"]*\")?\)", text):
        yield numbers[text.count("\n", 0, found.start())], found[1]


def anchors(document: Path, *, site: bool) -> set[str]:
    """The names of the headings of a document, as the site or as GitHub makes them."""
    found: dict[str, int] = {}
    for _, line in parts(document)[1]:
        if heading := re.match(r"#+\s+(.*?)\s*#*$", line):
            text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading[1]).replace("`", "").replace("*", "")
            if site:
                text = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
                name = re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", text).strip().lower())
            else:
                name = re.sub(r"[^\w\s-]", "", text.strip().lower()).replace(" ", "-")
            found[name] = found.get(name, -1) + 1
    return set(found) | {f"{name}{'_' if site else '-'}{n}" for name, most in found.items() for n in range(1, most + 1)}


def link_problem(document: Path, target: str) -> str | None:
    """What is wrong with a link, or None."""
    if re.match(r"[a-z]+:", target):
        return None
    place, _, anchor = target.partition("#")
    path = (document.parent / place).resolve() if place else document
    if not path.exists():
        return f"there is no {place}"
    if not anchor:
        return None
    if path.suffix != ".md":
        return f"#{anchor} is not of a .md file"
    kinds = [False, True] if path in PAGES else [False]  # a page is read in both places
    if not all(anchor in anchors(path, site=site) for site in kinds):
        return f"there is no heading #{anchor} in {place or document.name}"
    return None


def test_every_link_leads_somewhere():
    found = [
        f"{document.relative_to(ROOT)}:{line}: {problem}"
        for document in DOCUMENTS
        for line, target in links(document)
        if (problem := link_problem(document, target))
    ]
    assert found == []


@pytest.mark.parametrize("target", ["nowhere.md", "index.md#no-such-heading", "#no-such-heading", "../no/such/folder"])
def test_a_link_to_nowhere_would_be_noticed(target):
    assert link_problem(ROOT / "docs" / "index.md", target)
    assert link_problem(ROOT / "docs" / "index.md", "reliability.md#checkpoints") is None


# ---- commands

OURS = ("python", "python3", "scaling-testbed", "make", "torchrun", "srun", "pip")
OTHERS = {
    *("source", "export", "cd", "cp", "mkdir", "ls", "cat", "head", "tail", "git", "docker", "squeue", "scancel"),
    *("lm_eval", "wandb", "nvidia-smi", "gunzip", "tar", "curl"),
}  # programs that are not of this project
PLACEHOLDER = re.compile(r"[A-Z][A-Z0-9_]*")
FLAGS = ("--help", "-h", "--info", "--hydra-help", "-m", "--multirun", "--dry-run", "-q", "-v")
HYDRA = {"--cfg": 1} | dict.fromkeys(FLAGS, 0)
LAUNCHERS = {"torchrun": r"--(standalone|nnodes|nproc-per-node|rdzv-\w+|max-restarts)(=.*)?", "srun": r"--?[a-z].*"}


class Wrong(Exception):
    """A command that cannot be typed as it stands; the message says why."""


def commands(block: Block) -> Iterator[list[str]]:
    """The words of each command of a block. In a block without a language, lines that begin with a program of ours."""
    if block.language not in ("bash", "sh", ""):
        return
    variables: dict[str, str] = {}
    for line in re.sub(r"\\\n\s*", " ", block.text).splitlines():
        if block.language == "" and not line.startswith(OURS):
            continue
        lexer = shlex.shlex(line, posix=True, punctuation_chars="();<>|&")
        lexer.whitespace_split = True
        command: list[str] = []
        into_file = False
        for word in [*lexer, ";"]:
            if not re.fullmatch(r"[();<>|&]+", word):
                if not into_file:
                    command.append(re.sub(r"\$\{?(\w+)\}?", lambda name: variables.get(name[1], name[0]), word))
                into_file = False
                continue
            while command and (found := re.fullmatch(r"([A-Za-z_]\w*)=(.*)", command[0], re.DOTALL)):
                variables[found[1]] = found[2]
                command.pop(0)
            if command:
                yield command
            command, into_file = [], ">" in word or "<" in word


def check_command(words: list[str]) -> None:
    """Raises Wrong, ConfigError or UserError for a command that cannot be typed."""
    program, rest = words[0], words[1:]
    for word in rest:
        if re.fullmatch(r"(studies|configs|scripts|examples|benchmarks|docs)/[\w./-]*", word) and not (
            (ROOT / word).exists()
        ):
            raise Wrong(f"there is no {word}")
    if program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        if unknown := [word for word in rest if "=" not in word and word not in targets]:
            raise Wrong(f"make has no target {unknown[0]}")
    elif program in ("python", "python3"):
        check_python(rest)
    elif program == "scaling-testbed":
        check_door(rest)
    elif program in LAUNCHERS:
        while rest and re.fullmatch(LAUNCHERS[program], rest[0]):
            rest = rest[1:]
        if rest[:1] in (["python"], ["python3"]):
            rest = rest[1:]
        if rest[:1] != ["-m"]:
            raise Wrong(f"{program} starts no module: {' '.join(rest[:1])}")
        check_python(rest)
    elif program == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        for word in rest:
            named = re.fullmatch(r"\.\[(.*)\]", word)
            if named and (unknown := [extra for extra in named[1].split(",") if extra not in extras]):
                raise Wrong(f"there is no extra {unknown[0]}")
    elif "/" in program:
        if not (ROOT / program).exists():
            raise Wrong(f"there is no {program}")
    elif program not in OTHERS:
        raise Wrong(f"{program} is no program that is known here")


def check_python(words: list[str]) -> None:
    """What follows `python`."""
    if words[:1] != ["-m"]:
        if words and words[0].endswith(".py") and not (ROOT / words[0]).exists():
            raise Wrong(f"there is no {words[0]}")
        return
    package, _, module = words[1].partition(".")
    if package == "scaling_testbed":
        check_door([*([module] if module else []), *words[2:]])
    elif package == "benchmarks":
        source = ROOT / "benchmarks" / f"{module}.py"
        if not source.exists():
            raise Wrong(f"there is no module {words[1]}")
        known = source.read_text() + (ROOT / "benchmarks" / "harness.py").read_text()
        if unknown := [word for word in words[2:] if word.startswith("--") and f'"{word.split("=")[0]}"' not in known]:
            raise Wrong(f"{words[1]} has no option {unknown[0]}")
    elif package not in ("pytest", "pip", "venv", "mkdocs", "torch"):
        raise Wrong(f"{words[1]} is no module that is known here")


def check_door(words: list[str]) -> None:
    """What follows `scaling-testbed`."""
    if not words or words[0] in ("--help", "--install-completion"):
        return
    name, rest = words[0], words[1:]
    if name == "lm_eval":  # its words are those of another program
        return
    if name in ("train", "prepare"):
        check_overrides(run_overrides(rest))
        return
    apps = {door.__name__.rpartition(".")[2]: door.app for door in (sweep, analyze, evaluate, export, sample)}
    if name not in apps:
        raise Wrong(f"there is no command {name}")
    given = parsed_verb(command_of(name), rest)
    if given is None:  # --help
        return
    if given.get("law") and given["law"] not in LAWS and not given.get("plugins"):
        raise Wrong(f"there is no law {given['law']}")
    check_plugins(given.get("plugins") or ())
    if name == "sweep":
        check_sweep(given["words"])


@functools.cache
def command_of(name: str):
    apps = {door.__name__.rpartition(".")[2]: door.app for door in (sweep, analyze, evaluate, export, sample)}
    return typer.main.get_command(apps[name])


def parsed_verb(command, words: list[str]) -> dict | None:
    """The parameters of a verb, None where help was asked for."""
    while hasattr(command, "commands"):
        if not words or words[0].startswith("-"):
            if words and words[0] in ("--help", "-h"):
                return None
            raise Wrong("the command has no verb")
        if words[0] not in command.commands:
            raise Wrong(f"there is no verb {words[0]}")
        command, words = command.commands[words[0]], words[1:]
    return parsed(command, words)


def parsed(command, words: list[str]) -> dict | None:
    if {"--help", "-h"} & set(words):
        return None
    known = {option for parameter in command.params for option in parameter.opts}
    if today(words, known) != words:
        raise Wrong("an option is written in an old spelling")
    try:
        with command.make_context("verb", list(words)) as context:
            return context.params
    except typer.TyperException as error:
        raise Wrong(error.format_message() or f"an option is missing or not known: {error!r}") from None


def run_overrides(words: list[str]) -> list[str]:
    """The words of train and prepare without options; every other word must be KEY=VALUE."""
    found, left, asks_help = [], list(words), bool({"--help", "-h"} & set(words))
    while left:
        word = left.pop(0)
        if word in HYDRA:
            del left[: HYDRA[word]]
        elif word.startswith("-"):
            raise Wrong(f"there is no option {word}")
        elif "=" in word:
            found.append(word)
        elif not asks_help:
            raise Wrong(f"{word} is no key=value")
        elif word not in keys() and not PLACEHOLDER.fullmatch(word):  # --help GROUP_OR_KEY
            raise Wrong(f"there is no group or key {word} that --help could explain")
    return found


def check_plugins(names) -> None:
    for name in names:
        if name.endswith(".py") and name not in RECIPES and not PLACEHOLDER.fullmatch(name):
            raise Wrong(f"docs/extending.md has no {name}")


read_override = functools.cache(override_values)
read_sweep = functools.cache(load_sweep)


@functools.cache
def keys() -> frozenset[str]:
    """Every key of a run."""
    found = {field.name for field in dataclasses.fields(RunConfig)}
    sections = {name: list(kinds.values()) for name, kinds in GROUPS.items()}
    hints = typing.get_type_hints(RunConfig)
    sections |= {name: [hint] for name, hint in hints.items() if name not in GROUPS and dataclasses.is_dataclass(hint)}
    for name, classes in sections.items():
        found |= {f"{name}.{field.name}" for cls in classes for field in dataclasses.fields(cls)}
    return frozenset(found)


def check_overrides(overrides: list[str]) -> None:
    """Every key exists and every choice of a group too, by itself or by a recipe of docs/extending.md."""
    for text in overrides:
        key, values = read_override(text)
        key = key.lstrip("+")
        if key == "plugins":
            check_plugins(name for value in values for name in value.strip("[]").split(","))
        elif key in GROUPS or key in ("experiment", "hydra/launcher"):
            known = {*choices(key), *(Path(name).stem for name in RECIPES if name.startswith(f"confs/{key}/"))}
            if unknown := [one for one in values if one not in known and not PLACEHOLDER.fullmatch(one)]:
                raise Wrong(f"{key} has no choice {unknown[0]}")
        elif not (key in keys() or key.startswith(OF_A_MAPPING)):
            raise Wrong(f"there is no key {key}")


def check_sweep(words) -> None:
    named = {key: value for key, _, value in (word.partition("=") for word in words)}
    if unknown := [word for word in words if "=" not in word]:
        raise Wrong(f"{unknown[0]} is no key=value")
    if "sweep" not in named:
        raise Wrong("sweep= is missing")
    launcher = [key.removeprefix("launcher.") for key in named if key.startswith("launcher.")]
    if unknown := set(launcher) - {field.name for field in dataclasses.fields(SlurmConfig)}:
        raise Wrong(f"there is no key launcher.{unknown.pop()}")
    others = [word for word in words if not word.startswith(("sweep=", "scale=", "launcher.", "configs="))]
    check_overrides(others)
    if PLACEHOLDER.fullmatch(named["sweep"]) or named["sweep"].endswith(".yaml"):
        return
    if f"confs/sweep/{named['sweep']}.yaml" in RECIPES:
        return
    narrowed(read_sweep(named["sweep"], named.get("scale")), [word for word in others if "plugins=" not in word])


def problem_of(words: list[str]) -> str | None:
    try:
        check_command(words)
    except (Wrong, ConfigError, UserError) as error:
        return str(error)
    return None


def test_every_command_can_be_typed():
    found = [
        f"{block}: {' '.join(words)}: {problem}"
        for block in BLOCKS
        for words in commands(block)
        if (problem := problem_of(words))
    ]
    assert found == []


@pytest.mark.parametrize(
    "line",
    [
        "make no-such-target",
        "pip install -e '.[nothing]'",
        "python -m scaling_testbed.train optimizer.lrr=1",
        "python -m scaling_testbed.train model=no_such_model",
        "python -m scaling_testbed.train +evaluation.set.NAME=data/FOLDER",
        "python -m scaling_testbed.train --no-such-option",
        "python -m scaling_testbed.train --help optimiser",
        "python -m scaling_testbed.train model=nano_s | head > x && python -m scaling_testbed.train seeed=1",
        "OMP_NUM_THREADS=1 torchrun --nproc-per-node=2 -m scaling_testbed.trian",
        "torchrun --nproc=2 -m scaling_testbed.train",
        "srun --ntasks=2 python -m scaling_testbed.train parallelism=none",
        "python -m scaling_testbed.sweep plan sweep=no_such_sweep",
        "python -m scaling_testbed.sweep plan sweep=nano_lr scale=huge",
        "python -m scaling_testbed.sweep plan model=nano_s",
        "python -m scaling_testbed.sweep submit sweep=nano_lr launcher.partitionn=gpu",
        "python -m scaling_testbed.sweep run sweep=nano_lr workers=2",
        "python -m scaling_testbed.sweep run sweep=nano_lr --workers two",
        "python -m scaling_testbed.sweep start sweep=nano_lr",
        "python -m scaling_testbed.analyze fit rows.csv --law no_such_law",
        "python -m scaling_testbed.analyze fit rows.csv --no-such-option",
        "python -m scaling_testbed.analyze predict",
        "python -m scaling_testbed.analyze report studies/no_such_study",
        "scaling-testbed trian model=nano_s",
        "python -m scaling_testbed.train plugins=no_such.py",
        "python -m benchmarks.head --no-such-option",
        "python no_such.py",
        "scripts/no_such.sh",
        "no_such_program",
    ],
)
def test_a_command_that_cannot_be_typed_would_be_noticed(line):
    block = Block(ROOT / "README.md", 1, "bash", line, "")
    assert any(problem_of(words) for words in commands(block))


def test_commands_are_found_as_a_shell_finds_them():
    text = 'W="a b"  # first\nX=1 make demo \\\n  PYTHON="$W" && scripts/x.sh a | tee b > c\nmake test; make docs'
    found = list(commands(Block(ROOT / "README.md", 1, "bash", text, "")))
    assert found == [
        ["make", "demo", "PYTHON=a b"],
        ["scripts/x.sh", "a"],
        ["tee", "b"],
        ["make", "test"],
        ["make", "docs"],
    ]
    plain = "make demo   # installs\nmodel  1.5\nsetup"
    assert list(commands(Block(ROOT / "README.md", 1, "", plain, ""))) == [["make", "demo"]]
    assert list(commands(Block(ROOT / "README.md", 1, "text", plain, ""))) == []


@pytest.mark.slow
def test_every_training_command_composes():
    """The keys of a command together, with their values; those of plug-ins are run by tests/plugins."""
    found = []
    for block in BLOCKS:
        for words in commands(block):
            module = next((at for at, word in enumerate(words) if word == "scaling_testbed.train"), None)
            if module is None or "-m" in words[module:] or any("plugins=" in word for word in words):
                continue
            given = [w for w in run_overrides(words[module + 1 :]) if not PLACEHOLDER.search(w.partition("=")[2])]
            try:
                compose_many([given])
            except ConfigError as error:
                found.append(f"{block}: {' '.join(words)}: {error}")
    assert found == []


# ---- other blocks


def test_every_block_of_python_compiles_and_of_yaml_loads():
    found = []
    for block in BLOCKS:
        try:
            if block.language in ("python", "py"):
                ast.parse(block.text)
            elif block.language in ("yaml", "yml"):
                yaml.safe_load(block.text)
        except (SyntaxError, yaml.YAMLError) as error:
            found.append(f"{block}: {error}")
    assert found == []


MARKED = [block for block in BLOCKS if block.before == RUN]


@pytest.mark.parametrize("block", MARKED, ids=str)
def test_a_marked_block_runs_and_prints_what_the_page_says(block, monkeypatch):
    monkeypatch.chdir(ROOT)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(block.text, str(block), "exec"), {"__name__": "__main__"})
    ours = parts(block.document)[0]
    following = ours[ours.index(block) + 1 :][:1]
    if following and following[0].language == "text" and not following[0].before:
        expected = following[0].text
        assert textwrap.dedent(printed.getvalue()).rstrip() == expected.rstrip()


def test_a_block_is_marked():
    assert MARKED


# ---- the site


def test_every_page_is_in_the_navigation_of_the_site_and_is_there():
    _, _, navigation = (ROOT / "mkdocs.yml").read_text().partition("\nnav:\n")
    named = re.findall(r"(\S+\.md)$", navigation, re.MULTILINE)
    assert sorted(named) == sorted(page.relative_to(ROOT / "docs").as_posix() for page in PAGES)


def test_the_readme_has_at_most_150_lines():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150
