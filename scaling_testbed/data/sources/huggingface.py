"""Datasets of Hugging Face. Only this module imports `datasets`, and only inside its functions.

It never runs a dataset script. datasets 4 and later cannot run one, and this module does not allow an older version to.
"""

import functools
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from scaling_testbed.data import hub
from scaling_testbed.data.manifest import fingerprint_of
from scaling_testbed.data.sources.reading import (
    Tally,
    Unit,
    as_list,
    check_places,
    expand,
    file_identity,
    row_of_json,
    walk,
)
from scaling_testbed.data.sources.source import SOURCES, RowSource
from scaling_testbed.data.watched import state_of
from scaling_testbed.errors import ConfigError, UserError
from scaling_testbed.keys import key

FORMATS = ("arrow", "csv", "json", "pandas", "parquet", "text", "webdataset", "xml")  # that `datasets` reads


@SOURCES.register("huggingface")
@dataclass(frozen=True, kw_only=True)
class HuggingFaceConfig(RowSource):
    """Any dataset that `datasets` can load without running the code of the dataset."""

    name: str = "huggingface"
    path: str | None = key(
        None,
        "A name on the hub, a local folder, or a format (parquet, json, ...) with data_files. The lines of json are "
        "parsed here, so files whose other fields differ can be mixed.",
    )
    config_name: str | None = key(None, "The dataset's configuration, where it has several.")
    data_files: Any = key(None, "A file, a glob, or a list of them, for `path` a format.")
    split: str = key("train", "The split of the dataset that is read.")
    validation_split: str | None = key(
        None,
        "The split of the dataset that is the validation split. null: documents of `split` are split by their hash.",
    )
    revision: str | None = key(None, "A commit, branch or tag on the hub. null: the newest.")
    streaming: bool = key(False, "Whether the dataset is read file by file, without a local copy.")

    where_fields: ClassVar[tuple[str, ...]] = ("path", "data_files")
    read_twice: ClassVar[bool] = False  # it may come over a network

    def __post_init__(self):
        super().__post_init__()
        check_places("data_files", self.data_files)
        for name in ("path", "split", "validation_split"):
            if (value := getattr(self, name)) is not None and not str(value).strip():
                raise ConfigError(f"{name} must not be blank; is a variable of the shell not set?")
        if self.validation_split == self.split:
            raise ConfigError(f"validation_split must not be the split that is trained on: {self.split}")

    def settings(self) -> dict:
        """The settings of `Source`, without the places of local files."""
        record = super().settings()
        if self._local_files() is not None:
            record.pop("data_files", None)
            if os.path.isdir(self.path or ""):
                del record["path"]
        return record

    def inputs(self) -> dict[str, list[str]] | None:
        local = self._local_files()
        return None if local is None else {"files": local[1]}

    def content(self) -> dict:
        """The sizes and times of local files; empty for a dataset on the hub, whose content `revision` identifies."""
        local = self._local_files()
        return {} if local is None else {"contents": file_identity(local[1], local[0])}

    def _local_files(self) -> tuple[str | None, list[str]] | None:
        if self.path is None:
            raise ConfigError("data.path must be given: a dataset's name on the hub, a folder, or parquet or json")
        return _local_files(self.path, as_list(self.data_files))

    def units(self, chunk_bytes: int) -> list[Unit]:
        if self.validation_split is None:
            return _units(self, self.split, None, chunk_bytes)
        train = _units(self, self.split, "train", chunk_bytes)
        return train + _units(self, self.validation_split, "validation", chunk_bytes)

    def documents(self, unit: Unit, tally: Tally) -> Iterator[bytes]:
        return _documents(self, unit, tally)


def _local_files(path: str, data_files: Sequence[str]) -> tuple[str | None, list[str]] | None:
    """The folder and the files of a dataset on this machine; None for one on the hub."""
    if path in FORMATS and not data_files:  # `datasets` would take all files of the current folder
        raise ConfigError(f"data.data_files must name the files, because data.path={path} is a format")
    local = [name for name in data_files if "://" not in name]
    if local and path in ("parquet", "json", "text", "csv"):
        return None, expand("data.data_files", local)
    if os.path.isdir(path):
        root = os.path.abspath(path)
        return root, walk(root, frozenset({".git", ".cache"}), follow=True)
    return None


def _units(source, hub_split: str, split: str | None, chunk_bytes: int) -> list[Unit]:
    """Row ranges of about `chunk_bytes` of a downloaded dataset, or the files of a streamed dataset."""
    _load_cached.cache_clear()  # the files may have changed since this process loaded them
    dataset = _load(source, hub_split)
    if source.streaming:
        return [Unit(hub_split, "hub_shard", i, i + 1, chunk_bytes, split) for i in range(dataset.num_shards)]
    rows = len(dataset)
    row_bytes = max(1, dataset.data.nbytes // max(rows, 1))
    per_unit = max(1, chunk_bytes // row_bytes)
    return [
        Unit(hub_split, "hub_rows", start, min(start + per_unit, rows), min(per_unit, rows - start) * row_bytes, split)
        for start in range(0, rows, per_unit)
    ]


def _documents(source, unit: Unit, tally: Tally) -> Iterator[bytes]:
    """Yield the documents of one unit, none empty."""
    dataset = _load(source, unit.path)
    if source.streaming:
        rows = dataset.shard(num_shards=dataset.num_shards, index=unit.start)
        first, where = 0, f"shard {unit.start} "
    else:
        rows = dataset.select(range(unit.start, unit.stop))
        first, where = unit.start, ""
    label = f"{_label(source)}: split {unit.path}, {where}row"
    return source.rows.read(_rows(source, rows, first), lambda number: f"{label} {number}", tally)


def _rows(source, rows, number: int) -> Iterator[tuple[int, Any]]:
    """Pairs of a row's number, counted from `number`, and the row."""
    iterator = iter(rows)
    while True:
        with _one_line(source):
            record = next(iterator, None)
        if record is None:
            return
        if source.path != "json":
            yield number, record
        elif record["text"].strip():
            yield number, row_of_json(record["text"], source.rows.columns)
        number += 1


def _label(source) -> str:
    files = as_list(source.data_files)
    return f"dataset {source.path}" + (f" ({files[0]}{', ...' if len(files) > 1 else ''})" if files else "")


class _one_line:
    """A context that turns an exception of `datasets` into a UserError that names the dataset."""

    def __init__(self, source):
        self.source = source

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        if isinstance(error, UserError) or not isinstance(error, Exception):
            return
        cause = error.__cause__ or error
        lines = str(cause).strip().splitlines() or [""]
        raise UserError(
            f"{_label(self.source)} cannot be read: {type(cause).__name__}: {lines[0]}\nCheck data.path, "
            "data.config_name, data.data_files, data.split and data.revision, or the network."
        ) from None


def _load(source, hub_split: str):
    with _one_line(source):
        return _load_cached(
            source.path,
            source.config_name,
            tuple(as_list(source.data_files)),
            hub_split,
            source.revision,
            source.streaming,
            tuple(source.rows.keys.items()),
        )


@functools.lru_cache(maxsize=4)
def _load_cached(path, config_name, data_files, hub_split, revision, streaming, fields):
    import datasets

    hub.RETRIES.install()
    cache = None
    if local := _local_files(path, data_files):
        # `datasets` takes a file with the same time for the same file. An edit whose time was set back is another one.
        states = fingerprint_of([[file, *state_of(os.stat(file))] for file in local[1]])
        cache = os.path.join(datasets.config.HF_DATASETS_CACHE, f"scaling-testbed-{states}")
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # it would log each error that `_one_line` tells
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    # JSON files are read as lines of text, so that files can be mixed whose other fields have different types (those of
    # RedPajama do).
    dataset = datasets.load_dataset(
        "text" if path == "json" else path,
        config_name,
        data_files=list(data_files) or None,
        split=hub_split,
        revision=revision,
        streaming=streaming,
        cache_dir=cache,
    )
    names = dataset.column_names
    if path == "json" or names is None:
        return dataset
    columns = []
    for field, named_by in fields:
        columns.append(field if field in names else field.split(".")[0])
        if columns[-1] not in names:
            raise UserError(f"dataset {path}: no field {field!r} (fields: {', '.join(names)}); set {named_by}")
    return dataset.select_columns(list(dict.fromkeys(columns)))
