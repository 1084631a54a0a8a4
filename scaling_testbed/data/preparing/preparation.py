"""From a source and a tokenizer to a folder of shards. Preparation is parallel, resumable, atomic and deterministic.

A source prepares itself with the methods of `_Job`. Text is processed by the tasks of tasks.py. All files are written
to a hidden folder, which is renamed at the end, so that a folder with a manifest is complete.
"""

import contextlib
import errno
import os
import re
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from scaling_testbed.data.manifest import entries_of, read_manifest, write_manifest
from scaling_testbed.data.preparing import inputs as files_of
from scaling_testbed.data.preparing.tasks import (
    counts_of,
    documents_of,
    plan_tasks,
    read_note,
    rule_for,
    run_tasks,
    start_or_resume,
    training_sample,
    write_note,
)
from scaling_testbed.data.preparing.text_check import checked_text, percent
from scaling_testbed.data.shards import SCHEMA_VERSION, SPLITS, fingerprint_of
from scaling_testbed.data.sources.reading import CHAT_FORMAT, Tally, Unit
from scaling_testbed.data.sources.source import SplitRule, TextSource
from scaling_testbed.data.summary import counted, left_out_line
from scaling_testbed.data.tokenizers import TOKENIZER_FILE, tokenizer_fingerprint
from scaling_testbed.errors import UserError
from scaling_testbed.files import fsync_folder, sha256_of
from scaling_testbed.plugins import source_hash
from scaling_testbed.progress import DETAIL, ByteProgress, say

CHUNK_BYTES = 64 << 20


def folder_name(source, tokenizer) -> str:
    """The folder's name `<source>-<tokenizer>-<hash>`.

    The hash is over everything that determines the tokens, including the code of a plug-in, so that a changed corpus
    gets another folder. For sources of token ids, the tokenizer is part of neither the name nor the hash.
    """
    names, identity = [source.name], {"schema": SCHEMA_VERSION, "source": source.identity()}
    if source.uses_tokenizer:
        names.append(tokenizer.name)
        identity["tokenizer"] = tokenizer.identity()
    made_by = [*(source, tokenizer)[: len(names)], *source.parts().values()]
    if code := [found for one in made_by if (found := source_hash(type(one)))]:
        identity["plugins"] = code
    names = [re.sub(r"[^A-Za-z0-9_.]+", "_", name).strip("._")[:60] or "unnamed" for name in names]
    return "-".join([*names, fingerprint_of(identity)[:10]])


def prepare(
    source, tokenizer, *, data_dir: Path, workers: int | None = None, quiet=False, chunk_bytes=CHUNK_BYTES, tell=True
) -> Path:
    """Prepare the tokens of `source` with `tokenizer` in a folder below `data_dir`, and return the folder.

    Returns at once if the folder is complete, and continues the work of an interrupted call. A second process that
    prepares the same data waits for the first. `workers` defaults to one for each usable core and mebibyte of text, at
    most 16. `tokenizer` may be None for synthetic sources and token files. tell: say what was left out. The parts of a
    source are prepared first. Raises UserError or ConfigError that names the file or key.
    """
    if source.parts():
        source.check_tokenizer(tokenizer)
    options = {"data_dir": data_dir, "workers": workers, "quiet": quiet, "chunk_bytes": chunk_bytes, "tell": tell}
    parts = {name: prepare(part, tokenizer, **options) for name, part in source.parts().items()}
    if found := find_prepared(source, tokenizer, Path(data_dir)):
        for name, part in read_manifest(found).get("sources", {}).items():
            if not (Path(data_dir) / part["folder"]).exists():
                raise UserError(
                    f"{found}: the folder {part['folder']} of its source {name} is gone; delete {found}, and run the "
                    "command again"
                )
        if not quiet:
            say(f"the corpus was prepared before, in {found}", level=DETAIL)
        return found
    folder = Path(data_dir) / folder_name(source, tokenizer)
    progress = ByteProgress(folder.name, quiet=quiet)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"data_dir={data_dir}: cannot be made ({error.strerror})") from None
    try:
        with _alone(folder.parent / f".{folder.name}.lock", progress):
            if not (folder / "manifest.json").exists():
                _build(source, folder, _Job(_work(folder), parts, tokenizer, workers, chunk_bytes, progress))
                if tell and (said := left_out_line(read_manifest(folder))):
                    progress.say(said)
    except OSError as error:
        if error.errno not in (
            errno.ENOSPC,
            errno.EDQUOT,
            errno.EACCES,
            errno.EROFS,
            errno.EPERM,
            errno.EEXIST,
            errno.ENOTDIR,
        ):
            raise
        raise UserError(
            f"{error.filename or data_dir}: cannot be written ({error.strerror}) while preparing {folder.name}\n"
            "Free some space or give another data_dir, then run the same command again; finished chunks are kept."
        ) from None
    finally:
        progress.close()
    return folder


@dataclass(frozen=True)
class Look:
    """What there is of a corpus. name: of its folder, by the files of now. folder: the complete folder with its tokens,
    under this or another name; None if there is none. problem: why the folder of this name is not that of the files of
    now; else None."""

    name: str
    inputs: files_of.Inputs
    folder: Path | None = None
    problem: str | None = None


def look(source, tokenizer, data_dir: Path) -> Look:
    """Look for the folder of these data. Reads no document. Raises UserError or ConfigError if a file is missing.

    It is the folder with their name, or another one that was prepared from files with the same bytes: a file that was
    copied or touched gives the same tokens.
    """
    found = Look(folder_name(source, tokenizer), files_of.inputs_of(source, tokenizer))
    now, folder = found.inputs, data_dir / found.name
    if (folder / "manifest.json").exists():
        problems = now.files and files_of.differences(folder, read_manifest(folder), now)
        return replace(found, problem=problems[0]) if problems else replace(found, folder=folder)
    for other in prepared_folders(data_dir) if now.files else ():
        with contextlib.suppress(UserError):  # a folder that cannot be read
            manifest = read_manifest(other)
            was = manifest.get("inputs") or {}
            alike = [was.get(key) for key in ("settings", "files", "bytes")] == [
                *(now.settings, len(now.files or ()), now.n_bytes)
            ]
            if alike and files_of.differences(other, manifest, now) == []:
                return replace(found, folder=other)
    return found


def find_prepared(source, tokenizer, data_dir: Path) -> Path | None:
    """The complete folder that `look` finds, or None. Raises UserError for a file with other bytes, but the size and
    time that it had."""
    found = look(source, tokenizer, data_dir)
    if found.problem is not None:
        raise UserError(
            f"{found.problem}, but the size and time that it had when {data_dir / found.name} was prepared; `touch` the"
            " file, and run the command again"
        )
    return found.folder


def prepared_folders(data_dir: Path) -> list[Path]:
    """The complete folders below `data_dir`. Hidden folders are being prepared."""
    return sorted(path.parent for path in data_dir.glob("[!.]*/manifest.json"))


@contextlib.contextmanager
def _alone(path: Path, progress: ByteProgress):
    """A context in which no other process prepares the same data. It waits for a process that already does."""
    import filelock

    lock = filelock.FileLock(path)
    try:
        lock.acquire(blocking=False)
    except filelock.Timeout:
        progress.say("another process is preparing the same data; waiting for it")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _work(folder: Path) -> Path:
    return folder.parent / f".{folder.name}.partial"


def _build(source, folder: Path, job: "_Job") -> None:
    """Fill the work folder, write its manifest, and rename it to `folder`."""
    work, tokenizer = job.work, job.tokenizer
    work.mkdir(exist_ok=True)
    for stale in [*work.glob("*.tmp"), *work.glob("tasks/*.tmp")]:
        stale.unlink(missing_ok=True)
    if not (work / "manifest.json").exists():
        manifest = source.prepare(job)
        now = files_of.inputs_of(source, tokenizer)
        if now.files is not None:
            known, read = _hashed(manifest), job.read.intersection(file.path for file in now.files)
            for name, part in source.parts().items():
                known |= files_of.recorded_hashes(job.parts[name], files_of.inputs_of(part, tokenizer))
                read |= known.keys()
            manifest["inputs"] = files_of.record(now, work, known, read or None)
        if folder_name(source, tokenizer) != folder.name:
            shutil.rmtree(work)
            raise UserError(f"{source.name}: the source changed while it was being prepared; run the command again")
        write_manifest(work, {"name": source.name, **manifest})
    shutil.rmtree(work / "tasks", ignore_errors=True)
    try:
        os.rename(work, folder)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        raise UserError(f"{folder}: exists but has no manifest.json; delete it and run the command again") from None
    fsync_folder(folder.parent)


def _hashed(manifest: dict) -> dict[str, str]:
    """Path -> sha256 of token files that stay in place."""
    entries = [entry for split in SPLITS for entry in entries_of(manifest["splits"][split])]
    return {entry["file"]: entry["sha256"] for entry in entries if os.path.isabs(entry["file"])}


@dataclass(frozen=True)
class _Job:
    """The implementation of data.sources.source.Job. read: the paths of a limited source that were read; empty: all."""

    work: Path
    parts: dict[str, Path]
    tokenizer: Any
    workers: int | None
    chunk_bytes: int
    progress: ByteProgress
    read: set[str] = field(default_factory=set)

    def start(self, n_bytes: int) -> None:
        self.progress.start(n_bytes)

    def advance(self, n_bytes: int) -> None:
        self.progress.advance(n_bytes)

    def tokenize(self, source: TextSource) -> dict:
        source.check_tokenizer(self.tokenizer)
        units = source.units(self.chunk_bytes)
        found, tally = source.found(units)
        if not units:
            raise UserError(_empty(source, "nothing to read", tally))
        rule = rule_for(source, units, self.progress)
        tasks = plan_tasks(units, self.chunk_bytes)
        start_or_resume(self.work, tasks)
        description = self._prepare_tokenizer(source, units, rule) if source.uses_tokenizer else None
        records = run_tasks(source, rule, tasks, self.work, description, self.workers, self.progress)
        if source.limited and not (source.uses_tokenizer and self.tokenizer.sample_bytes):
            done = {record["index"] for record in records}
            self.read.update(unit.path for task in tasks if task.index in done for unit in task.units)
        splits = {split: _merge([record["splits"][split] for record in records]) for split in SPLITS}
        for record in records:
            tally.add(record["tally"])
        _check_rows(source, tally)
        reached = {unit.path for record in records for unit in tasks[record["index"]].units}
        found["not_reached"] = len({unit.path for unit in units} - reached)  # because of max_documents or max_tokens
        if not any(splits[split]["n_documents"] for split in SPLITS):
            raise UserError(_empty(source, "no document", tally))
        documents = None if source.validation_is_training else self._documents(source, records, splits)
        encoder = source.encoder(self.work, description)
        if not source.is_text:
            for record in splits.values():
                record["n_bytes"] = None
        return source.manifest(
            splits,
            counts_of(self.work, records),
            tokenizer=description,
            tokenizer_fingerprint=None if description is None else tokenizer_fingerprint(description),
            eos_id=encoder.eos_id,
            skipped_files=tally.n_files,
            reading={**found, **tally.as_dict(), "chat_format": CHAT_FORMAT if tally.chats else None},
            documents=documents,
            text_check=checked_text(encoder, [record["checks"] for record in records]) if source.is_text else None,
        )

    def _documents(self, source: TextSource, records: list[dict], splits: dict[str, dict]) -> dict:
        """What `documents_of` finds. Raises UserError if the validation split is nothing but training text."""
        documents = documents_of(self.work, records)
        same_documents = 0 < splits["validation"]["n_documents"] == documents["validation_in_train"]
        if documents.pop("same_lines") or same_documents:
            what = "document is a training document" if same_documents else "line is a training line"
            raise UserError(
                f"{source.name}: every validation {what} too, so the validation loss would be a training loss "
                f"({source.where()}); name other data"
            )
        return documents

    def _prepare_tokenizer(self, source: TextSource, units: list[Unit], rule: SplitRule) -> dict:
        path = self.work / "tasks" / "tokenizer_description.json"
        known = read_note(path)
        if known is not None and ("sha256" not in known or known["sha256"] == _hash_of(self.work / TOKENIZER_FILE)):
            return known
        for finished in path.parent.glob("[0-9]*.json"):  # with a tokenizer that is not known any more
            finished.unlink()
        if self.tokenizer.sample_bytes:
            self.progress.say("training the tokenizer")
        sample = training_sample(source, units, self.tokenizer.sample_bytes, rule)
        description = self.tokenizer.prepare(sample, self.work)
        write_note(path, description)
        return description


def _empty(source: TextSource, what: str, tally: Tally) -> str:
    left_out = f"\nleft out: {counted(tally.files)}" if tally.files else ""
    return f"{source.name}: empty corpus, {what} in {source.where()}{left_out}"


def _check_rows(source: TextSource, tally: Tally) -> None:
    """Raise UserError if more rows are bad than the source allows."""
    share = tally.n_bad_rows / max(1, tally.rows)
    if share <= source.max_bad_share:
        return
    raise UserError(
        f"{source.name}: {tally.n_bad_rows:,} of {tally.rows:,} rows are bad ({percent(share)}), more than "
        f"data.max_bad={source.max_bad_share:g}: {counted(tally.bad_rows)}\nMend the files, or raise data.max_bad."
    )


def _hash_of(path: Path) -> str | None:
    return sha256_of(path) if path.is_file() else None


def _merge(records: list[dict]) -> dict:
    summed = [key for key in ("n_tokens", "n_targets", "n_documents", "n_bytes") if key in records[0]]
    totals = {key: sum(record[key] for record in records) for key in summed}
    return {**totals, "shards": [shard for record in records for shard in record["shards"]]}
