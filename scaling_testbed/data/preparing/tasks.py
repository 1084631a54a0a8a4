"""Prepare text in tasks that depend only on their own part of the source.

Consecutive units with about `chunk_bytes` of text form a task. Each task writes one train and one validation shard. The
number of workers and interruptions do not change a byte of the result. A task is done once its record exists.

A task also keeps a hash of 8 bytes of each document, so that documents that occur twice are found at the end. All
hashes are then in memory at once: 0.8 GB for 10^8 documents. Where the source has splits of its own, a sample of lines
is kept too, because a text file that begins at another place is cut into other documents.
"""

import contextlib
import hashlib
import multiprocessing
import os
import pickle
import shutil
import signal
import threading
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from scaling_testbed.data.preparing.text_check import TextCheck
from scaling_testbed.data.shard_writer import ShardWriter
from scaling_testbed.data.shards import SPLITS, fingerprint_of
from scaling_testbed.data.sources.marked import parts_of
from scaling_testbed.data.sources.reading import Tally, Unit
from scaling_testbed.data.sources.source import SplitRule, document_hash
from scaling_testbed.errors import UserError
from scaling_testbed.files import fsync_folder, read_json, sha256_of, write_json
from scaling_testbed.plugins import load_plugins, loaded_plugins
from scaling_testbed.progress import ByteProgress

BATCH_DOCUMENTS, BATCH_BYTES = 1024, 4 << 20
MAX_WORKERS = 16
BYTES_A_WORKER = 1 << 20  # to start a process takes about as long as to tokenise them
RECORD_VERSION = 3  # of what a task writes
FEW_LINES = 8  # a smaller sample says nothing
LINE_BYTES, ONE_LINE_IN = 24, 8  # lines of at least so many bytes are sampled, chosen by a checksum


@dataclass(frozen=True)
class Task:
    """One chunk of work: consecutive units with the same `split`."""

    index: int
    units: tuple[Unit, ...]

    @property
    def weight(self) -> int:
        return sum(unit.weight for unit in self.units)


def plan_tasks(units: list[Unit], chunk_bytes: int) -> list[Task]:
    """Group consecutive units into tasks. A task is complete when the weights of its units reach `chunk_bytes`."""
    tasks: list[Task] = []
    open_units: list[Unit] = []
    weight = 0
    for unit in units:
        if open_units and (weight >= chunk_bytes or unit.split != open_units[-1].split):
            tasks.append(Task(len(tasks), tuple(open_units)))
            open_units, weight = [], 0
        open_units.append(unit)
        weight += unit.weight
    return [*tasks, Task(len(tasks), tuple(open_units))] if open_units else tasks


def start_or_resume(work: Path, tasks: list[Task]) -> None:
    """Keep the finished tasks of an interrupted call, unless its plan or the version of their records was different."""
    plan = hashlib.sha256(repr((RECORD_VERSION, tasks)).encode()).hexdigest()
    path = work / "tasks" / "plan.json"
    if read_note(path) == plan:
        return
    shutil.rmtree(work)
    (work / "tasks").mkdir(parents=True)
    write_note(path, plan)


def write_note(path: Path, value: Any) -> None:
    """Write a JSON value into the work folder, with its hash."""
    write_json(path, {"sha256": fingerprint_of(value), "value": value})


def read_note(path: Path) -> Any:
    """The value that `write_note` wrote; None if there is no such file or it is damaged, so that it is made again."""
    with contextlib.suppress(UserError, LookupError, TypeError):
        note = read_json(path)
        return note["value"] if note["sha256"] == fingerprint_of(note["value"]) else None
    return None


def rule_for(source, units: list[Unit], progress: ByteProgress) -> SplitRule:
    """How the documents of `source` are split. If a small corpus has no validation document, one is moved there.

    It is the document nearest to the split among those without a copy, because the copies stay in the train split. If
    each document has copies, it is the one with the fewest, and its copies move too. Reading stops at the first
    validation document, so that the function costs nothing for a large corpus. Raises UserError if all documents are
    the same.
    """
    rule = SplitRule(source.validation_fraction)
    if not source.read_twice or source.limited or not rule.fraction or any(unit.split for unit in units):
        return rule
    copies: Counter[int] = Counter()
    for document in (document for unit in units for document in source.documents(unit, Tally())):
        found = document_hash(document)
        copies[found] += 1
        if rule.of_hash(found) == "validation":
            return rule
    n_documents = copies.total()
    if n_documents < 2:
        return rule
    if len(copies) == 1:
        raise UserError(
            f"{source.name}: all {n_documents:,} documents are the same text, so a validation document would be a "
            f"training document ({source.where()}); {source.too_small}"
        )
    moved, n_moved = min(copies.items(), key=lambda item: (item[1], item[0]))
    what = "the one nearest to it was" if n_moved == 1 else f"each has copies; the {n_moved:,} of one text were"
    progress.say(f"none of {n_documents} documents fell into the validation split; {what} moved there")
    return SplitRule(rule.fraction, moved)


def training_sample(source, units: list[Unit], sample_bytes: int, rule: SplitRule) -> Iterator[bytes]:
    """Yield training documents for a tokenizer, about `sample_bytes` in total.

    The order of the units is fixed by a hash of their position. Each unit gives at most its share, so that one part of
    the corpus does not determine the vocabulary.
    """
    order = sorted(range(len(units)), key=lambda i: hashlib.blake2b(str(i).encode(), digest_size=8).digest())
    share, total = max(1 << 20, sample_bytes // max(1, len(units))), 0
    for i in order:
        taken = 0
        for document in source.documents(units[i], Tally()):
            if rule(units[i], document) != "train":
                continue
            yield document
            taken += len(document)
            if taken >= share or total + taken >= sample_bytes:
                break
        total += taken
        if total >= sample_bytes:
            return


def run_tasks(
    source, rule: SplitRule, tasks, work: Path, description: dict | None, workers: int | None, progress: ByteProgress
) -> list[dict]:
    """Run the tasks and return the records of all tasks in order. Tasks that an earlier call finished are not run."""
    done = {task.index: record for task in tasks if (record := _finished(work, task.index))}
    progress.start(sum(task.weight for task in tasks), sum(task.weight for task in tasks if task.index in done))
    todo = [task for task in tasks if task.index not in done]
    enough = max(1, sum(task.weight for task in todo) // BYTES_A_WORKER)
    workers = min(workers or min(usable_cores(), MAX_WORKERS, enough), len(todo))
    if source.limited or workers <= 1:
        return _run_in_order(source, rule, tasks, done, work, description, progress)
    for record in _run_in_pool(source, rule, todo, work, description, workers, progress):
        done[record["index"]] = record
    return [done[task.index] for task in tasks]


def usable_cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _finished(work: Path, index: int) -> dict | None:
    """The record of a finished task; None if the task, its arrays or its record must be made again."""
    folder = work / "tasks"
    record = read_note(folder / f"{index:05d}.json")
    with contextlib.suppress(OSError):
        if record and all(sha256_of(_array_path(folder, index, key)) == one for key, one in record["arrays"].items()):
            return record
    return None


def _run_in_order(
    source, rule: SplitRule, tasks, done: dict, work: Path, description: dict | None, progress: ByteProgress
) -> list[dict]:
    """Run the tasks in this process, one after the other, and return their records.

    A limit on documents or tokens needs this, because it counts in document order. A validation split of the source
    itself is counted separately. The tokenizer library uses all cores by itself.
    """
    encoder = source.encoder(work, description)
    records: list[dict] = []
    used: dict[str | None, list[int]] = {}
    for task in tasks:
        spent = used.setdefault(task.units[0].split, [0, 0])
        left = [None if most is None else most - gone for most, gone in zip(_limits(source), spent, strict=True)]
        if any(rest is not None and rest <= 0 for rest in left):
            continue
        record = done.get(task.index) or run_task(source, rule, task, work, encoder, left, progress.advance)
        records.append(record)
        spent[0] += sum(record["splits"][split]["n_documents"] for split in SPLITS)
        spent[1] += sum(record["splits"][split]["n_tokens"] for split in SPLITS)
    return records


def _limits(source) -> tuple[int | None, int | None]:
    return source.max_documents, source.max_tokens


def run_task(source, rule: SplitRule, task: Task, work: Path, encoder, left=(None, None), advance=None) -> dict:
    """Tokenise the documents of one task into its shards, and return its record, which is written last.

    left: how many documents and tokens it may still write (None: any number).
    """
    name = "{}-{:05d}".format
    writers = {
        split: ShardWriter(work, name(split, task.index), encoder.vocab_size, masked=source.masked) for split in SPLITS
    }
    totals = {split: {"n_tokens": 0, "n_documents": 0, "n_bytes": 0} for split in SPLITS}
    counts = np.zeros(encoder.vocab_size, dtype=np.int64)
    hashes: dict[str, list[int]] = {name: [] for split in SPLITS for name in (split, f"{split}_lines")}
    tally, checks = Tally(), {split: TextCheck(encoder) for split in SPLITS} if source.is_text else {}
    eos = np.array([] if encoder.eos_id is None else [encoder.eos_id], dtype=np.int64)
    max_documents, tokens_left = left
    pairs = ((unit, document) for unit in task.units for document in source.documents(unit, tally))
    for batch in _batches(islice(pairs, max_documents)):
        parts: dict[str, list[np.ndarray]] = {split: [] for split in SPLITS}
        masks: dict[str, list[np.ndarray]] = {split: [] for split in SPLITS}
        encoded = _encoded(encoder, [document for _, document in batch], source.masked)
        for (unit, document), (ids, counted) in zip(batch, encoded, strict=True):
            if tokens_left is not None and tokens_left <= 0:
                break
            found, n_tokens = document_hash(document), len(ids) + len(eos)
            split = unit.split or rule.of_hash(found)
            parts[split] += (ids, eos)
            if counted is not None:
                masks[split].append(counted[:n_tokens])
            hashes[split].append(found)
            if unit.split and source.is_text:
                hashes[f"{split}_lines"] += _line_hashes(document)
            if checks:
                checks[split].look_at(document, ids, found)
            for key, value in (("n_tokens", n_tokens), ("n_documents", 1), ("n_bytes", len(document))):
                totals[split][key] += value
            tokens_left = None if tokens_left is None else tokens_left - n_tokens
        for split, writer in writers.items():
            if parts[split]:
                tokens = np.concatenate(parts[split])
                mask = np.concatenate(masks[split]) if source.masked else None
                writer.write(tokens, batch[0][0].path, mask)
                if split == "train":
                    counts += np.bincount(tokens if mask is None else tokens[mask], minlength=len(counts))
        if advance is not None:
            advance(sum(len(document) for _, document in batch))
        if tokens_left is not None and tokens_left <= 0:
            break
    splits = {split: writer.record(**totals[split]) for split, writer in writers.items()}
    record = {
        "index": task.index,
        "splits": splits,
        "tally": tally.as_dict(),
        "checks": {split: check.as_dict() for split, check in checks.items()},
    }
    return _write_record(work / "tasks", record, counts, hashes)


def _encoded(encoder, documents: list[bytes], masked: bool) -> list[tuple[np.ndarray, np.ndarray | None]]:
    """The ids of each document, and whether each of them, and an EOS after them, is a target (None: all are). The parts
    of a document that are targets, and those between them, become tokens each on its own, so that no token lies in
    both."""
    if not masked:
        return [(ids, None) for ids in encoder.encode_batch(documents)]
    parts = [parts_of(document) for document in documents]
    ids = iter(encoder.encode_batch([text for found in parts for text, _ in found]))
    encoded: list[tuple[np.ndarray, np.ndarray | None]] = []
    for found in parts:
        of_parts = [(next(ids), is_target) for _, is_target in found]
        counted = [np.full(len(one), is_target) for one, is_target in of_parts]
        encoded.append((np.concatenate([one for one, _ in of_parts]), np.append(np.concatenate(counted), found[-1][1])))
    return encoded


def _line_hashes(document: bytes) -> list[int]:
    """Hashes of a sample of the lines, without regard to capitals, blanks and the kind of line ends."""
    lines = (b" ".join(line.lower().split()) for line in document.splitlines() if len(line) >= LINE_BYTES)
    return [document_hash(line) for line in lines if len(line) >= LINE_BYTES and zlib.crc32(line) % ONE_LINE_IN == 0]


def _write_record(folder: Path, record: dict, counts: np.ndarray, hashes: dict[str, list[int]]) -> dict:
    """Write the record of a task. The record marks the task as done, so all other files are synced to disk first."""
    arrays = {"counts": counts, **{split: np.array(found, dtype=np.uint64) for split, found in hashes.items()}}
    record["arrays"] = {}
    for name, array in arrays.items():
        path = _array_path(folder, record["index"], name)
        temporary = path.with_name(f"{path.stem}.{os.getpid()}.tmp")
        with open(temporary, "wb") as file:
            np.save(file, array, allow_pickle=False)
            file.flush()
            os.fsync(file.fileno())
        record["arrays"][name] = sha256_of(temporary)
        os.replace(temporary, path)
    fsync_folder(folder.parent)
    write_note(folder / f"{record['index']:05d}.json", record)
    return record


def _array_path(folder: Path, index: int, name: str) -> Path:
    return folder / f"{index:05d}.{name}.npy"


def counts_of(work: Path, records: list[dict]) -> np.ndarray:
    """How often each id is a target in the train split, [vocab_size]."""
    return sum(_arrays(work, records, "counts"))  # type: ignore[return-value]  # there is at least one record


def documents_of(work: Path, records: list[dict]) -> dict:
    """How many different documents each split has, and how many validation documents are training documents too; the
    same for a sample of lines, where the source has splits of its own. same_lines: whether the splits have the same
    lines, in whatever order."""
    hashes = {split: np.sort(np.concatenate(_arrays(work, records, split))) for split in SPLITS}
    distinct = {split: int(len(found) and 1 + (found[1:] != found[:-1]).sum()) for split, found in hashes.items()}
    shared = _n_shared(hashes["train"], hashes["validation"])
    del hashes
    lines = {split: np.sort(np.concatenate(_arrays(work, records, f"{split}_lines"))) for split in SPLITS}
    return {
        "distinct": distinct,
        "validation_in_train": shared,
        "sampled_validation_lines": len(lines["validation"]),
        "sampled_validation_lines_in_train": _n_shared(lines["train"], lines["validation"]),
        "same_lines": len(lines["validation"]) >= FEW_LINES
        and np.array_equal(np.unique(lines["train"]), np.unique(lines["validation"])),
    }


def _n_shared(train: np.ndarray, validation: np.ndarray) -> int:
    """How many values of `validation` are in `train`, which is sorted."""
    if not len(train):
        return 0
    at = np.minimum(np.searchsorted(train, validation), len(train) - 1)
    return int((train[at] == validation).sum())


def _arrays(work: Path, records: list[dict], name: str) -> list[np.ndarray]:
    paths = [_array_path(work / "tasks", record["index"], name) for record in records]
    return [np.load(path, allow_pickle=False) for path in paths]


def _batches(pairs: Iterator) -> Iterator[list]:
    batch, size = [], 0
    for pair in pairs:
        batch.append(pair)
        size += len(pair[1])
        if len(batch) >= BATCH_DOCUMENTS or size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


# ------------------------------------------------------------------------------------- other processes

_worker: dict[str, Any] = {}  # the objects that a worker process needs for every task; set once, at its start


def _run_in_pool(
    source, rule: SplitRule, todo, work: Path, description: dict | None, workers: int, progress: ByteProgress
) -> Iterator[dict]:
    """Yield the records of tasks as they finish, from `workers` processes. The processes end when this loop ends."""
    before = set(multiprocessing.active_children())
    threads, plugins = max(1, usable_cores() // workers), [plugin.name for plugin in loaded_plugins()]
    # The source is passed as bytes, because a worker can unpickle it only after it has loaded the plug-ins.
    setup = (os.getpid(), threads, plugins, pickle.dumps(source), rule, work, description)
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start_worker, setup)
    try:
        futures = {pool.submit(_run_in_worker, task): task for task in todo}
        for future in as_completed(futures):
            yield future.result()
            progress.advance(futures[future].weight)
        pool.shutdown()
    except BrokenProcessPool:
        raise UserError(
            f"preparing {source.name}: a worker process died, perhaps for lack of memory\n"
            "Run the same command again with fewer workers; finished chunks are kept."
        ) from None
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for child in set(multiprocessing.active_children()) - before:
            child.terminate()


def _start_worker(
    parent: int,
    threads: int,
    plugins: list[str],
    source: bytes,
    rule: SplitRule,
    work: Path,
    description: dict | None,
) -> None:
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # the parent gets them too and ends its workers
    os.environ["RAYON_NUM_THREADS"] = str(threads)  # the tokenizer library's threads
    threading.Thread(target=_leave_with, args=(parent,), daemon=True).start()
    load_plugins(plugins)
    found = pickle.loads(source)
    _worker.update(source=found, rule=rule, work=work, encoder=found.encoder(work, description))


def _leave_with(parent: int) -> None:
    """Exit when the parent process is gone, because a killed parent cannot end its workers."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _run_in_worker(task: Task) -> dict:
    return run_task(_worker["source"], _worker["rule"], task, _worker["work"], _worker["encoder"])
