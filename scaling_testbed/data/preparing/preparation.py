"""From a source and a tokenizer to a folder of shards: parallel, resumable, atomic, and the same every time.

Text goes through the tasks of tasks.py; synthetic sources are drawn and written; token files are read once
for their hash and the range of their ids, and stay where they are. Everything is built in a hidden folder
that is renamed when it is complete, so that a folder with a manifest is whole.
"""

import contextlib
import errno
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np

from scaling_testbed.data.preparing.tasks import (
    plan_tasks,
    run_tasks,
    split_rule,
    start_or_resume,
    with_a_validation_document,
)
from scaling_testbed.data.shards import (
    SCHEMA_VERSION,
    SPLITS,
    ShardWriter,
    fingerprint_of,
    smallest_dtype,
)
from scaling_testbed.data.sources.corpora import TextSource
from scaling_testbed.data.sources.reading import Unit
from scaling_testbed.data.sources.token_files import TokenFilesConfig, probe, scan
from scaling_testbed.data.tokenizers import tokenizer_fingerprint, training_sample
from scaling_testbed.errors import UserError
from scaling_testbed.files import fsync_folder, write_json
from scaling_testbed.progress import ByteProgress

CHUNK_BYTES = 64 << 20


def folder_name(source, tokenizer) -> str:
    """`<source>-<tokenizer>-<hash>`; sources that give token ids leave the tokenizer out of both name and
    hash. The hash is over everything that decides the tokens, so a changed corpus gets another folder."""
    names, identity = [source.name], {"schema": SCHEMA_VERSION, "source": source.identity()}
    if isinstance(source, TextSource):
        names.append(tokenizer.name)
        identity["tokenizer"] = tokenizer.identity()
    names = [re.sub(r"[^A-Za-z0-9_.]+", "_", name).strip("._")[:60] or "unnamed" for name in names]
    return "-".join([*names, fingerprint_of(identity)[:10]])


def prepare(
    source, tokenizer, *, data_dir: Path, workers: int | None = None, quiet=False, chunk_bytes=CHUNK_BYTES
) -> Path:
    """Makes sure that the tokens of `source` under `tokenizer` lie ready in a folder below `data_dir`;
    returns it.

    Returns at once where that was done before, and goes on where an earlier call was interrupted. A second
    process that asks for the same data waits for the first. `workers` defaults to the usable cores, at most
    16. `tokenizer` may be None for synthetic sources and token files. Raises UserError or ConfigError naming
    the file or field.
    """
    folder = Path(data_dir) / folder_name(source, tokenizer)
    if (folder / "manifest.json").exists():
        return folder
    progress = ByteProgress(folder.name, quiet=quiet)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"data_dir={data_dir}: cannot be made ({error.strerror})") from None
    try:
        with _alone(folder.parent / f".{folder.name}.lock", progress):
            if not (folder / "manifest.json").exists():
                _build(source, tokenizer, folder, workers, progress, chunk_bytes)
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


@contextlib.contextmanager
def _alone(path: Path, progress: ByteProgress):
    """While entered, no other process prepares the same data; waits for one that does."""
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


def _build(source, tokenizer, folder: Path, workers: int | None, progress: ByteProgress, chunk_bytes: int) -> None:
    """Fills the work folder, writes its manifest, and renames it to `folder`."""
    work = folder.parent / f".{folder.name}.partial"
    work.mkdir(exist_ok=True)
    for stale in [*work.glob("*.tmp"), *work.glob("tasks/*.tmp")]:
        stale.unlink(missing_ok=True)
    if not (work / "manifest.json").exists():
        if isinstance(source, TextSource):
            manifest = _prepare_text(source, tokenizer, work, workers, progress, chunk_bytes)
        elif isinstance(source, TokenFilesConfig):
            manifest = _prepare_token_files(source, progress)
        else:
            manifest = _prepare_synthetic(source, work)
        if folder_name(source, tokenizer) != folder.name:
            shutil.rmtree(work)
            raise UserError(f"{source.name}: the source changed while it was being prepared; run the command again")
        write_json(work / "manifest.json", {"schema_version": SCHEMA_VERSION, "name": source.name, **manifest})
    shutil.rmtree(work / "tasks", ignore_errors=True)
    try:
        os.rename(work, folder)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        raise UserError(f"{folder}: exists but has no manifest.json; delete it and run the command again") from None
    fsync_folder(folder.parent)


def _manifest(source, splits: dict, counts: np.ndarray, **fields) -> dict:
    """The manifest, from the records of the splits and how often each id occurs in the train split."""
    for split in SPLITS:
        if not splits[split]["n_tokens"]:
            advice = "add text, or name data.validation_files" if source.kind == "text_files" else "add documents"
            raise UserError(f"{source.name}: too small to split, no document in {split} ({_where(source)}); {advice}")
    share = counts[counts > 0] / counts.sum()
    return {
        "source": source.description(),
        "tokenizer": None,
        "tokenizer_fingerprint": None,
        "vocab_size": len(counts),
        "dtype": smallest_dtype(len(counts)),
        "eos_id": None,
        "unigram_entropy_nats": float(-(share * np.log(share)).sum()),
        "entropy_rate_nats": None,
        "skipped_files": 0,
        **fields,
        "splits": splits,
    }


def _where(source) -> str:
    fields = source.description()["fields"]
    given = [f"{key} {fields[key]}" for key in ("files", "path", "data_files") if fields.get(key)]
    return ", ".join(given) or source.kind


def _prepare_text(source, tokenizer, work: Path, workers: int | None, progress: ByteProgress, chunk_bytes: int) -> dict:
    units = source.units(chunk_bytes)
    if not units:
        raise UserError(f"{source.name}: empty corpus, nothing to read in {_where(source)}")
    source = with_a_validation_document(source, units, progress)
    tasks = plan_tasks(units, chunk_bytes)
    start_or_resume(work, tasks)
    description = _prepare_tokenizer(source, tokenizer, units, work, progress)
    records = run_tasks(source, tasks, work, description, workers, progress)
    counts = sum(np.load(work / "tasks" / f"{record['index']:05d}.npy", allow_pickle=False) for record in records)
    splits = {split: _merge([record["splits"][split] for record in records]) for split in SPLITS}
    skipped = [path for record in records for path in record["skipped"]]
    reason = f"skipped {len(skipped)} files that are not UTF-8, the first {skipped[0]}" if skipped else ""
    if not any(splits[split]["n_documents"] for split in SPLITS):
        raise UserError(f"{source.name}: empty corpus, no document in {_where(source)}\n{reason}".rstrip())
    if skipped:
        progress.say(reason)
    return _manifest(
        source,
        splits,
        counts,
        tokenizer=description,
        tokenizer_fingerprint=tokenizer_fingerprint(description),
        eos_id=description["eos_id"],
        skipped_files=len(skipped),
    )


def _merge(records: list[dict]) -> dict:
    totals = {key: sum(record[key] for record in records) for key in ("n_tokens", "n_documents", "n_bytes")}
    return {**totals, "shards": [shard for record in records for shard in record["shards"]]}


def _prepare_tokenizer(source, tokenizer, units: list[Unit], work: Path, progress: ByteProgress) -> dict:
    path = work / "tasks" / "tokenizer_description.json"
    if path.exists():
        return json.loads(path.read_text())
    if tokenizer.identity()["kind"] == "bpe":
        progress.say("training the tokenizer")
    decide = split_rule(source)
    sample = training_sample(source, units, getattr(tokenizer, "sample_bytes", 0), decide)
    description = tokenizer.prepare(sample, work)
    write_json(path, description)
    return description


def _prepare_synthetic(source, work: Path) -> dict:
    splits = {}
    for split in SPLITS:
        tokens = source.tokens(split)
        writer = ShardWriter(work, f"{split}-00000", source.vocab_size)
        writer.write(tokens, source.name)
        if split == "train":
            counts = np.bincount(tokens, minlength=source.vocab_size)
        splits[split] = _token_record(len(tokens), source.n_documents(len(tokens)), writer.close())
    return _manifest(source, splits, counts, entropy_rate_nats=source.entropy_rate_nats())


def _prepare_token_files(source: TokenFilesConfig, progress: ByteProgress) -> dict:
    paths = {split: source.paths(split) for split in SPLITS}
    layouts = {path: probe(path, source.format) for split in SPLITS for path in paths[split]}
    progress.start(sum(os.path.getsize(path) for path in layouts))
    splits, train_counts = {}, np.zeros(source.vocab_size, dtype=np.int64)
    for split in SPLITS:
        shards = []
        for path in paths[split]:
            entry, counts = scan(path, layouts[path], source.vocab_size)
            shards.append(entry)
            train_counts += counts * (split == "train")
            progress.advance(entry["size"])
        documents = [layouts[path]["n_documents"] for path in paths[split]]
        n_documents = None if None in documents else sum(documents)
        splits[split] = _token_record(sum(shard["n_tokens"] for shard in shards), n_documents, shards)
    return _manifest(source, splits, train_counts)


def _token_record(n_tokens: int, n_documents: int | None, shards: list[dict]) -> dict:
    """A split that was never text: its bytes are unknown, so bits per byte cannot be had."""
    return {"n_tokens": n_tokens, "n_documents": n_documents, "n_bytes": None, "shards": shards}
