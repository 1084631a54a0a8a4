"""Old spellings of options. This version still accepts them and prints the new spelling on stderr."""

import re
import sys
from collections.abc import Collection, Sequence, Set
from pathlib import Path

WORDS = ("workers", "gpus", "runs_per_gpu", "flops_per_second", "launcher")  # options of sweep, formerly key=value


def today(args: Sequence[str], known: Set[str]) -> list[str]:
    """The arguments of a command in the current spelling. known: the options of the command."""
    found: list[str] = []
    left = list(args)
    while left:
        word = left.pop(0)
        if word in REWRITERS and word in known | REPLACED:
            found += REWRITERS[word](word, left)
        else:
            found += _word(word, known)
    return found


def said(old: str, new: str) -> None:
    """Print the new spelling of an option on stderr."""
    print(f"note: {old} is now {new}; this is the last version that accepts the old spelling", file=sys.stderr)


def _word(word: str, known: Collection[str]) -> list[str]:
    """`workers=2` as `--workers 2`, also for a command without that option, which then refuses it."""
    key, equals, value = word.partition("=")
    if not equals or key not in WORDS:
        return [word]
    option = f"--{key.replace('_', '-')}"
    if option in known:
        said(word, f"{option} {value}")
    return [option, value]


def _group(option: str, left: list[str]) -> list[str]:
    """One --group for each of several keys after a single --group."""
    keys: list[str] = []
    while left and re.fullmatch(r"\w[\w.]*", left[0]) and not (keys and Path(left[0]).exists()):
        keys.append(left.pop(0))
    new = [word for key in keys for word in (option, key)] or [option]
    if len(keys) > 1:
        said(f"{option} {' '.join(keys)}", " ".join(new))
    return new


def _eps(option: str, left: list[str]) -> list[str]:
    """--eps with its value, 1e-8, if it has none."""
    if left and not left[0].startswith("-"):
        return [option]
    said(option, f"{option} 1e-8")
    return [option, "1e-8"]


def _model(option: str, left: list[str]) -> list[str]:
    """NAME=FILE,FILE for a name followed by its files as separate arguments."""
    if not left or "=" in left[0] or len(left) < 2 or left[1].startswith("-"):
        return [option]
    name, files = left.pop(0), []
    while left and not left[0].startswith("-"):
        files.append(left.pop(0))
    new = f"{name}={','.join(files)}"
    said(f"{option} {name} {' '.join(files)}", f"{option} {new}")
    return [option, new]


def _figures(option: str, left: list[str]) -> list[str]:
    """--out for a .png and a .svg, from the common stem of their names."""
    if not left:
        return [option]
    stem = left.pop(0)
    new = ["--out", f"{stem}.png", "--out", f"{stem}.svg"]
    said(f"{option} {stem}", " ".join(new))
    return new


REWRITERS = {"--group": _group, "--eps": _eps, "--model": _model, "--figures": _figures}
REPLACED = {"--figures"}  # options that no command has any more
