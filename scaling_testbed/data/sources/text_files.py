"""A person's own files: plain text, JSON lines, parquet."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from scaling_testbed.data.sources.reading import Unit, as_list, expand, file_identity, plan_file, read_unit
from scaling_testbed.data.sources.source import SOURCES, TextSource
from scaling_testbed.errors import ConfigError


@SOURCES.register("text_files")
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

    where_fields: ClassVar[tuple[str, ...]] = ("files",)
    too_small: ClassVar[str] = "add text, or name data.validation_files"

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

    def content(self) -> dict:
        return {"contents": [[split, file_identity(paths)] for split, paths in self._files()]}

    def units(self, chunk_bytes: int) -> list[Unit]:
        pairs = [(split, path) for split, paths in self._files() for path in paths]
        return [unit for split, path in pairs for unit in plan_file("data.files", path, chunk_bytes, split)]

    def documents(self, unit: Unit, skipped: list[str]) -> Iterator[bytes]:
        return read_unit(unit, self.text_field, self.cut_bytes, skipped)
