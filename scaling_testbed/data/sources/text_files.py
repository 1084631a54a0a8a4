"""A user's own files: plain text, JSON lines, parquet."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from scaling_testbed.data.sources.reading import Unit, as_list, expand, file_identity, plan_file, read_unit
from scaling_testbed.data.sources.source import SOURCES, TextSource
from scaling_testbed.errors import ConfigError
from scaling_testbed.keys import key


@SOURCES.register("text_files")
@dataclass(frozen=True, kw_only=True)
class TextFilesConfig(TextSource):
    """Your own files: .txt, .md, .py, .jsonl (also .gz and .zst) and .parquet."""

    name: str = "text_files"
    files: Any = key(None, "A glob, a folder, or a list of them.")
    validation_files: Any = key(
        None, "The same for the validation split. null: documents of `files` are split by their hash."
    )
    text_field: str = key("text", "The field with the text, in .jsonl and .parquet, where a row is a document.")
    cut_bytes: int | None = key(
        4096,
        "A .txt, .md or .py file is cut at line ends into documents of at most so many bytes, so that one long file "
        "can be split too. null: a file is one document.",
    )
    validation_fraction: float = 0.05

    where_fields: ClassVar[tuple[str, ...]] = ("files",)
    places: ClassVar[tuple[str, ...]] = ("files", "validation_files")
    too_small: ClassVar[str] = "add text, or name data.validation_files"

    def __post_init__(self):
        super().__post_init__()
        for name in ("files", "validation_files"):
            value = getattr(self, name)
            if not (value is None or isinstance(value, (str, list)) and as_list(value)):
                raise ConfigError(f"{name} must be a glob or a list of globs, got {value!r}")
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
        """The identity of `TextSource`, with the files found in place of the globs."""
        record = super().identity()
        del record["files"], record["validation_files"]
        return record

    def inputs(self) -> dict[str, list[str]]:
        return {split or "both splits": paths for split, paths in self._files()}

    def content(self) -> dict:
        return {"contents": [[split, file_identity(paths)] for split, paths in self._files()]}

    def units(self, chunk_bytes: int) -> list[Unit]:
        pairs = [(split, path) for split, paths in self._files() for path in paths]
        return [unit for split, path in pairs for unit in plan_file("data.files", path, chunk_bytes, split)]

    def documents(self, unit: Unit, skipped: list[str]) -> Iterator[bytes]:
        return read_unit(unit, self.text_field, self.cut_bytes, skipped)
