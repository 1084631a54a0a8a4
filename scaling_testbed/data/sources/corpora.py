"""Sources of documents: the interpreter's own library, installed packages, local files, and Hugging Face
datasets.

Each source is a frozen dataclass that can say its identity without reading a document, plan itself as a list
of units in a fixed order, and read the documents of one unit. `SOURCES` names every kind, the synthetic ones
included.
"""

import hashlib
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from scaling_testbed.data.sources.hub import hub_documents, hub_units
from scaling_testbed.data.sources.reading import Unit, as_list, expand, file_identity, plan_file, read_unit, walk
from scaling_testbed.data.sources.synthetic import CopyConfig, MarkovConfig, NoiseConfig
from scaling_testbed.data.sources.token_files import TokenFilesConfig
from scaling_testbed.errors import ConfigError, UserError, check_positive


def split_of(document: bytes, validation_fraction: float) -> str:
    """The split a document belongs to, by a hash of its bytes alone: it never moves when other documents come
    or go, and two copies of one document are never on both sides."""
    return "validation" if split_draw(document) < validation_fraction else "train"


def split_draw(document: bytes) -> float:
    """A number in [0, 1) that stands for the document's bytes."""
    return int.from_bytes(hashlib.blake2b(document, digest_size=8).digest(), "big") / 2.0**64


@dataclass(frozen=True, kw_only=True)
class TextSource:
    """What all sources of documents share. A limit counts documents, or tokens with EOS, of both splits
    together in document order, and stops after the document that reaches it."""

    name: str = "text"
    validation_fraction: float = 0.01
    max_documents: int | None = None
    max_tokens: int | None = None

    def __post_init__(self):
        if not 0.0 <= self.validation_fraction < 1.0:
            raise ConfigError(f"validation_fraction must be at least 0 and less than 1, got {self.validation_fraction}")
        check_positive("max_documents", self.max_documents)
        check_positive("max_tokens", self.max_tokens)

    @property
    def limited(self) -> bool:
        """Whether preparation may stop before the end of the source."""
        return self.max_documents is not None or self.max_tokens is not None

    def identity(self) -> dict:
        """Everything that decides the tokens, as plain JSON, found without reading a document."""
        return {"kind": self.kind, **self.description()["fields"], **self._content()}

    def description(self) -> dict:
        """The record of this source in the manifest."""
        fields = asdict(self)
        del fields["name"]
        return {"kind": self.kind, "fields": fields}

    def _content(self) -> dict:
        return {}

    def units(self, chunk_bytes: int) -> list[Unit]:
        """The whole source as pieces in document order."""
        raise NotImplementedError

    def documents(self, unit: Unit, skipped: list[str]) -> Iterator[bytes]:
        """Documents of one unit as UTF-8, none empty; files that are not UTF-8 are added to `skipped`."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class PythonStdlibConfig(TextSource):
    """The .py files of the running interpreter's standard library, read in place: real text on every
    machine."""

    name: str = "python_stdlib"
    validation_fraction: float = 0.05  # files are few and of very different sizes

    kind = "python_stdlib"
    _folders = ("stdlib",)
    _skip = frozenset({"site-packages", "dist-packages", "__pycache__"})

    def _files(self) -> list[tuple[str, list[str]]]:
        roots = sorted({sysconfig.get_path(name) for name in self._folders})
        found = [(root, [path for path in walk(root, self._skip) if path.endswith(".py")]) for root in roots]
        if not any(paths for _, paths in found):
            raise UserError(f"{self.kind}: no .py file under {', '.join(roots)}; use data=text_files instead")
        return found

    def _content(self) -> dict:
        return {"files": [file_identity(paths, root) for root, paths in self._files()]}

    def units(self, chunk_bytes: int) -> list[Unit]:
        paths = [path for _, paths in self._files() for path in paths]
        return [unit for path in paths for unit in plan_file("files", path, chunk_bytes)]

    def documents(self, unit: Unit, skipped: list[str]) -> Iterator[bytes]:
        return read_unit(unit, "", None, skipped)


@dataclass(frozen=True, kw_only=True)
class PythonPackagesConfig(PythonStdlibConfig):
    """The .py files of the packages installed beside this one: a bigger corpus of the same kind."""

    name: str = "python_packages"
    validation_fraction: float = 0.02

    kind = "python_packages"
    _folders = ("purelib", "platlib")
    _skip = frozenset({"__pycache__"})


@dataclass(frozen=True, kw_only=True)
class TextFilesConfig(TextSource):
    """A person's own files. `files` is a glob, a folder or a list of them. In .jsonl and .parquet a document
    is one row's `text_field`; a .txt, .md or .py file is one document, cut at line ends into documents of at
    most `cut_bytes`, each ended by EOS, so that a single long file can be split too (null: never cut).
    `validation_files`, where given, are the validation split and nothing is split by hash."""

    name: str = "text_files"
    files: Any = None  # str or list[str]
    validation_files: Any = None  # str or list[str]
    text_field: str = "text"
    cut_bytes: int | None = 4096
    validation_fraction: float = 0.05

    kind = "text_files"

    def __post_init__(self):
        super().__post_init__()
        for field in ("files", "validation_files"):
            value = getattr(self, field)
            if not (value is None or isinstance(value, (str, list)) and as_list(value)):
                raise ConfigError(f"{field} must be a glob or a list of globs, got {value!r}")
        if self.cut_bytes is not None and self.cut_bytes < 1024:
            raise ConfigError(f"cut_bytes must be at least 1024 or null, got {self.cut_bytes}")

    def _files(self) -> list[tuple[str | None, list[str]]]:
        if self.files is None:
            raise ConfigError("data.files must be given: a glob, a folder or a list of them, as data.files='*.txt'")
        train, validation = expand("data.files", self.files), expand("data.validation_files", self.validation_files)
        if not validation:
            return [(None, train)]
        if both := set(train) & set(validation):
            raise ConfigError(f"data.validation_files must not be in data.files too: {min(both)}")
        return [("train", train), ("validation", validation)]

    def description(self) -> dict:
        record = super().description()
        record["fields"] |= {"files": as_list(self.files), "validation_files": as_list(self.validation_files)}
        return record

    def identity(self) -> dict:
        """As for every source, but of the files found, not of the globs that found them."""
        record = super().identity()
        del record["files"], record["validation_files"]
        return record

    def _content(self) -> dict:
        return {"contents": [[split, file_identity(paths)] for split, paths in self._files()]}

    def units(self, chunk_bytes: int) -> list[Unit]:
        pairs = [(split, path) for split, paths in self._files() for path in paths]
        return [unit for split, path in pairs for unit in plan_file("data.files", path, chunk_bytes, split)]

    def documents(self, unit: Unit, skipped: list[str]) -> Iterator[bytes]:
        return read_unit(unit, self.text_field, self.cut_bytes, skipped)


@dataclass(frozen=True, kw_only=True)
class HuggingFaceConfig(TextSource):
    """Any dataset that `datasets` can load without running its code. `path` is a hub name, a local folder, or
    a format (`parquet`, `json`) with `data_files`. With `path: json` each line is parsed here, so that files
    whose other fields differ can be mixed. `streaming` reads file by file without a local copy.
    `validation_split`, where given, is the validation split and nothing is split by hash."""

    name: str = "huggingface"
    path: str | None = None
    config_name: str | None = None
    data_files: Any = None  # str or list[str]
    split: str = "train"
    validation_split: str | None = None
    text_field: str = "text"
    revision: str | None = None
    streaming: bool = False

    kind = "huggingface"

    def __post_init__(self):
        super().__post_init__()
        if not (self.data_files is None or isinstance(self.data_files, (str, list)) and as_list(self.data_files)):
            raise ConfigError(f"data_files must be a glob or a list of globs, got {self.data_files!r}")

    def _content(self) -> dict:
        """Local files are watched by size and time; what lies on the hub is pinned by `revision`."""
        if self.path is None:
            raise ConfigError("data.path must be given: a dataset's name on the hub, a folder, or parquet or json")
        local = [name for name in as_list(self.data_files) if "://" not in name]
        if local and self.path in ("parquet", "json", "text", "csv"):
            return {"contents": file_identity(expand("data.data_files", local))}
        if os.path.isdir(self.path):
            return {"contents": file_identity(walk(self.path, frozenset({".git", ".cache"})), self.path)}
        return {}

    def units(self, chunk_bytes: int) -> list[Unit]:
        if self.validation_split is None:
            return hub_units(self, self.split, None, chunk_bytes)
        train = hub_units(self, self.split, "train", chunk_bytes)
        return train + hub_units(self, self.validation_split, "validation", chunk_bytes)

    def documents(self, unit: Unit, skipped: list[str]) -> Iterator[bytes]:
        return hub_documents(self, unit)


SOURCES = {
    "python_stdlib": PythonStdlibConfig,
    "python_packages": PythonPackagesConfig,
    "text_files": TextFilesConfig,
    "huggingface": HuggingFaceConfig,
    "markov": MarkovConfig,
    "noise": NoiseConfig,
    "copy": CopyConfig,
    "token_files": TokenFilesConfig,
}
