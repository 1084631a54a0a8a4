"""The source code of installed packages: of pinned wheels, which are the same everywhere, or of all packages."""

import base64
import csv
import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any, ClassVar

from scaling_testbed.data.manifest import fingerprint_of
from scaling_testbed.data.sources.python_stdlib import PythonStdlibConfig
from scaling_testbed.data.sources.reading import Tally, Unit, as_list
from scaling_testbed.data.sources.source import SOURCES
from scaling_testbed.errors import ConfigError, UserError, listed
from scaling_testbed.keys import ADDED_LATER, key

PINNED = re.compile(r"([A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?) ?== ?([A-Za-z0-9.!+_-]+)")
STRONG = ("sha256", "sha384", "sha512")  # hashes that a RECORD may use


@SOURCES.register("python_packages")
@dataclass(frozen=True, kw_only=True)
class PythonPackagesConfig(PythonStdlibConfig):
    """The .py files of pinned pure-Python wheels, the same text on every machine, or of all installed packages."""

    name: str = "python_packages"
    validation_fraction: float = 0.02
    packages: Any = key(
        None,
        'Pinned wheels, as ["sympy==1.14.0"]: their .py files, each checked against the RECORD of its wheel. null: all '
        "installed packages, which differ between machines.",
        identity=ADDED_LATER,
    )

    where_fields: ClassVar[tuple[str, ...]] = ("packages",)
    _folders = ("purelib", "platlib")
    _skip = frozenset({"__pycache__"})

    def __post_init__(self):
        super().__post_init__()
        if self.packages is None:
            return
        pinned = _pinned(self.packages)
        names = [name for name, _ in pinned]
        if not names or len(set(names)) < len(names):
            raise ConfigError(f"packages must name at least one package, and none of them twice; got {self.packages!r}")

    @cached_property
    def _wheels(self) -> list["Wheel"]:
        return [find_wheel(name, version) for name, version in sorted(_pinned(self.packages))]

    @cached_property
    def _wheel_of(self) -> dict[str, tuple["Wheel", str]]:
        """The wheel and the name in its RECORD of each path."""
        return {str(wheel.root / name): (wheel, name) for wheel in self._wheels for name in wheel.files}

    def content(self) -> dict:
        if self.packages is None:
            return super().content()
        return {"packages": [[wheel.name, wheel.version, fingerprint_of(wheel.files)] for wheel in self._wheels]}

    def inputs(self) -> dict[str, list[str]]:
        """None for pinned wheels: name, version and RECORD decide, and a file that differs from RECORD is refused."""
        return super().inputs() if self.packages is None else {}

    def _paths(self) -> list[str]:
        if self.packages is None:
            return super()._paths()
        for wheel in self._wheels:
            if changed := [name for name, (size, _) in wheel.files.items() if _size(wheel.root / name) != size]:
                raise _changed(wheel, changed)
        return list(self._wheel_of)

    def documents(self, unit: Unit, tally: Tally) -> Iterator[bytes]:
        """The documents of `TextSource`. The bytes that are read are checked against the hash in RECORD."""
        if self.packages is None:
            yield from super().documents(unit, tally)
            return
        documents = list(super().documents(unit, tally))
        text = documents[0] if documents else Path(unit.path).read_bytes()  # no document: it is not UTF-8
        wheel, name = self._wheel_of[unit.path]
        if _hash_like(wheel.files[name][1], text) != wheel.files[name][1]:
            raise _changed(wheel, [name for name in wheel.files if not _is_whole(wheel, name)])
        yield from documents


@dataclass(frozen=True)
class Wheel:
    """An installed pure-Python wheel. files: size and hash (`sha256=...`) of the .py files in its RECORD, sorted."""

    name: str
    version: str
    root: Path
    files: dict[str, tuple[int, str]]


def find_wheel(name: str, version: str) -> Wheel:
    """The installed wheel of this name (normalised) and version.

    Raises UserError with the pip command that mends it, if another version is installed, or something else than a
    wheel; ConfigError if it is no pure-Python wheel.
    """
    pinned = f"{name}=={version}"
    try:
        distribution = metadata.distribution(name)
        there = distribution.metadata["Version"]
    except (metadata.PackageNotFoundError, KeyError):
        raise UserError(f"data.packages: {name} is not installed; type: pip install {pinned}") from None
    again = f"type: pip install --force-reinstall --no-deps {pinned}"
    if _is_editable(distribution):
        raise UserError(f"data.packages: {name} is installed as editable, not from a wheel; {again}")
    if there is None or _without_zeros(there) != _without_zeros(version):
        raise UserError(f"data.packages: {name} {there} is installed, not {version}; type: pip install {pinned}")
    record, about = distribution.read_text("RECORD"), distribution.read_text("WHEEL")
    root = Path(str(distribution.locate_file("")))
    if not record or not about or not root.is_dir():  # no folder: a zip file
        raise UserError(f"data.packages: {name} {there} was not installed from a wheel (it has no RECORD); {again}")
    tags = re.findall(r"^Tag: *(\S+)", about, re.MULTILINE)
    if not re.search(r"^Root-Is-Purelib: *true", about, re.MULTILINE) or not all(t.endswith("-none-any") for t in tags):
        raise ConfigError(
            f"data.packages must be pure-Python wheels; {name} {there} is built for each platform, and its files differ"
        )
    try:
        files = dict(sorted(_recorded(record)))
    except (ValueError, csv.Error) as error:
        raise UserError(f"data.packages: the RECORD of {name} {there} is damaged ({error}); {again}") from None
    if not files:
        raise ConfigError(f"data.packages must have .py files; {name} {there} has none")
    return Wheel(name, there, root, files)


def _pinned(packages: Any) -> list[tuple[str, str]]:
    """The normalised name and the version of each pinned package. Raises ConfigError if one has no version."""
    found = []
    if not isinstance(packages, (str, list)):
        raise ConfigError(f"packages must be a list of NAME==VERSION or null, got {packages!r}")
    for text in as_list(packages):
        match = PINNED.fullmatch(text.strip())
        if match is None:
            raise ConfigError(f"packages must be a list of NAME==VERSION, as {_example(text)}; got {text!r}")
        found.append((re.sub(r"[-_.]+", "-", match[1]).lower(), match[2]))
    return found


def _example(text: str) -> str:
    """NAME==VERSION of the installed version of the package that was typed, or of sympy."""
    name = re.match(r"[A-Za-z0-9._-]*", text.strip())
    try:
        return f"{name[0]}=={metadata.version(name[0])}" if name else "sympy==1.14.0"
    except (metadata.PackageNotFoundError, ValueError):
        return "sympy==1.14.0"


def _is_editable(distribution: metadata.Distribution) -> bool:
    try:
        record = json.loads(distribution.read_text("direct_url.json") or "{}")
        return bool(record.get("dir_info", {}).get("editable"))
    except (ValueError, AttributeError):
        return False


def _without_zeros(version: str) -> str:
    """1.14 and 1.14.0 are the same version."""
    return re.sub(r"(\.0)+$", "", version)


def _recorded(record: str) -> Iterator[tuple[str, tuple[int, str]]]:
    """The .py files that the lines of a RECORD name inside the wheel's own folder, with size and hash."""
    for row in csv.reader(record.splitlines()):
        if not row or not row[0].endswith(".py") or row[0].startswith("/") or ".." in row[0].split("/"):
            continue  # pip adds scripts, with a path of this machine in them, outside of the folder
        name, digest, size = row
        if digest.partition("=")[0] not in STRONG:
            raise ValueError(f"no sha256 of {name}")
        yield name, (int(size), digest)


def _hash_like(recorded: str, content: bytes) -> str:
    """The hash of bytes by the algorithm of a hash in a RECORD, in the same spelling."""
    algorithm = recorded.partition("=")[0]
    digest = hashlib.new(algorithm, content).digest()
    return f"{algorithm}={base64.urlsafe_b64encode(digest).rstrip(b'=').decode()}"


def _size(path: Path) -> int | None:
    """The size of a file; None if it is not there."""
    try:
        return path.stat().st_size
    except OSError:
        return None


def _is_whole(wheel: Wheel, name: str) -> bool:
    try:
        return _hash_like(wheel.files[name][1], (wheel.root / name).read_bytes()) == wheel.files[name][1]
    except OSError:
        return False


def _changed(wheel: Wheel, names: list[str]) -> UserError:
    return UserError(
        f"data.packages: {listed(names)} in {wheel.root} differ from the RECORD of {wheel.name} {wheel.version}; type: "
        f"pip install --force-reinstall --no-deps {wheel.name}=={wheel.version}"
    )
