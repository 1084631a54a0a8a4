"""A user's own files: plain text, JSON lines, CSV, parquet."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from scaling_testbed.data.sources.reading import (
    Tally,
    Unit,
    as_list,
    check_places,
    expand,
    file_identity,
    plan_file,
    read_unit,
)
from scaling_testbed.data.sources.source import SOURCES, RowSource
from scaling_testbed.errors import ConfigError
from scaling_testbed.keys import key


@SOURCES.register("text_files")
@dataclass(frozen=True, kw_only=True)
class TextFilesConfig(RowSource):
    """Your own files: .txt, .jsonl, .csv (each also .gz and .zst), .md, .py and .parquet."""

    name: str = "text_files"
    files: Any = key(None, "A glob, a folder, or a list of them.")
    validation_files: Any = key(
        None, "The same for the validation split. null: documents of `files` are split by their hash."
    )
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
            check_places(name, getattr(self, name))
        if self.cut_bytes is not None and self.cut_bytes < 1024:
            raise ConfigError(f"cut_bytes must be at least 1024 or null, got {self.cut_bytes}")

    def _files(self, tally: Tally | None = None) -> list[tuple[str | None, list[str]]]:
        if self.files is None:
            raise ConfigError("data.files must be given: a glob, a folder or a list of them, as data.files='*.txt'")
        train = expand("data.files", self.files, tally)
        if self.validation_files is None:
            return [(None, train)]
        validation = expand("data.validation_files", self.validation_files, tally)
        real = {os.path.realpath(path) for path in train}
        if both := [path for path in validation if os.path.realpath(path) in real]:
            raise ConfigError(f"data.validation_files must not be in data.files too: {both[0]}")
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

    def files_left_out(self) -> Tally:
        tally = Tally()
        self._files(tally)
        return tally

    def inputs(self) -> dict[str, list[str]]:
        return {split or "both splits": paths for split, paths in self._files()}

    def content(self) -> dict:
        return {"contents": [[split, file_identity(paths)] for split, paths in self._files()]}

    def units(self, chunk_bytes: int) -> list[Unit]:
        pairs = [(split, path) for split, paths in self._files() for path in paths]
        return [unit for split, path in pairs for unit in plan_file("data.files", path, chunk_bytes, split)]

    def documents(self, unit: Unit, tally: Tally) -> Iterator[bytes]:
        return read_unit(unit, self.rows, self.cut_bytes, tally)

    def found(self, units: list[Unit]) -> tuple[dict, Tally]:
        tally, with_units = Tally(), {unit.path for unit in units}
        taken = [path for _, paths in self._files(tally) for path in paths]
        found = len(taken) + tally.n_files
        for path in taken:
            if path not in with_units:
                tally.leave_out("empty", path)
        return {"found": found, "bytes": sum(map(os.path.getsize, taken))}, tally
