"""Prepare text in tasks that depend only on their own part of the source.

Consecutive units with about `chunk_bytes` of text form a task. Each task writes one train and one validation shard. The
number of workers and interruptions do not change a byte of the result. A task is done once its record exists.
"""

import contextlib
import hashlib
import json
import math
import multiprocessing
import os
import pickle
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from scaling_testbed.data.shards import SPLITS, ShardWriter, fingerprint_of
from scaling_testbed.data.sources.reading import Unit
from scaling_testbed.data.sources.source import split_draw, split_of
from scaling_testbed.data.tokenizers import load_tokenizer
from scaling_testbed.errors import UserError
from scaling_testbed.files import fsync_folder, sha256_of, write_json
from scaling_testbed.plugins import load_plugins, loaded_plugins
from scaling_testbed.progress import ByteProgress

BATCH_DOCUMENTS, BATCH_BYTES = 1024, 4 << 20
MAX_WORKERS = 16


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
    """Keep the finished tasks of an interrupted call, unless its plan was different."""
    plan = hashlib.sha256(repr(tasks).encode()).hexdigest()
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
    with contextlib.suppress(OSError, ValueError, RecursionError, LookupError, TypeError):
        note = json.loads(path.read_bytes())
        return note["value"] if note["sha256"] == fingerprint_of(note["value"]) else None
    return None


def split_rule(source):
    return lambda unit, document: unit.split or split_of(document, source.validation_fraction)


def with_a_validation_document(source, units: list[Unit], progress: ByteProgress):
    """`source`, with a larger validation_fraction if a small corpus has no validation document.

    The new fraction is just large enough for one document. Reading stops at the first validation document, so that the
    function costs nothing for a large corpus.
    """
    fraction = source.validation_fraction
    if not source.read_twice or source.limited or not fraction or any(unit.split for unit in units):
        return source
    draws = []
    for document in (document for unit in units for document in source.documents(unit, [])):
        draws.append(split_draw(document))
        if draws[-1] < fraction:
            return source
    if len(draws) < 2:
        return source
    progress.say(
        f"none of {len(draws)} documents fell into the validation split; the one nearest to it was moved there"
    )
    return replace(source, validation_fraction=math.nextafter(min(draws), 1.0))


def run_tasks(source, tasks, work: Path, description: dict, workers: int | None, progress: ByteProgress) -> list[dict]:
    """Run the tasks and return the records of all tasks in order. Tasks that an earlier call finished are not run."""
    done = {task.index: record for task in tasks if (record := _finished(work, task.index))}
    progress.start(sum(task.weight for task in tasks), sum(task.weight for task in tasks if task.index in done))
    todo = [task for task in tasks if task.index not in done]
    workers = min(workers or min(usable_cores(), MAX_WORKERS), len(todo))
    if source.limited or workers <= 1:
        return _run_in_order(source, tasks, done, work, description, progress)
    for record in _run_in_pool(source, todo, work, description, workers, progress):
        done[record["index"]] = record
    return [done[task.index] for task in tasks]


def usable_cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _finished(work: Path, index: int) -> dict | None:
    """The record of a finished task; None if the task, its counts or its record must be made again."""
    folder = work / "tasks"
    record = read_note(folder / f"{index:05d}.json")
    with contextlib.suppress(OSError):
        return record if record and record["counts"] == sha256_of(folder / f"{index:05d}.npy") else None
    return None


def _run_in_order(source, tasks, done: dict, work: Path, description: dict, progress: ByteProgress) -> list[dict]:
    """Run the tasks in this process, one after the other, and return their records.

    A limit on documents or tokens needs this, because it counts in document order. A validation split of the source
    itself is counted separately. The tokenizer library uses all cores by itself.
    """
    encoder = load_tokenizer(work, description)
    records: list[dict] = []
    used: dict[str | None, list[int]] = {}
    for task in tasks:
        spent = used.setdefault(task.units[0].split, [0, 0])
        left = [None if most is None else most - gone for most, gone in zip(_limits(source), spent, strict=True)]
        if any(rest is not None and rest <= 0 for rest in left):
            continue
        record = done.get(task.index) or run_task(source, task, work, encoder, left, progress.advance)
        records.append(record)
        spent[0] += sum(record["splits"][split]["n_documents"] for split in SPLITS)
        spent[1] += sum(record["splits"][split]["n_tokens"] for split in SPLITS)
    return records


def _limits(source) -> tuple[int | None, int | None]:
    return source.max_documents, source.max_tokens


def run_task(source, task: Task, work: Path, encoder, left=(None, None), advance=None) -> dict:
    """Tokenise the documents of one task into its shards, and return its record, which is written last.

    left: how many documents and tokens it may still write (None: any number).
    """
    writers = {split: ShardWriter(work, f"{split}-{task.index:05d}", encoder.vocab_size) for split in SPLITS}
    totals = {split: {"n_tokens": 0, "n_documents": 0, "n_bytes": 0} for split in SPLITS}
    counts = np.zeros(encoder.vocab_size, dtype=np.int64)
    skipped: list[str] = []
    eos, decide = np.array([encoder.eos_id]), split_rule(source)
    max_documents, tokens_left = left
    pairs = ((unit, document) for unit in task.units for document in source.documents(unit, skipped))
    for batch in _batches(islice(pairs, max_documents)):
        parts: dict[str, list[np.ndarray]] = {split: [] for split in SPLITS}
        encoded = encoder.encode_batch([document for _, document in batch])
        for (unit, document), ids in zip(batch, encoded, strict=True):
            if tokens_left is not None and tokens_left <= 0:
                break
            split = decide(unit, document)
            parts[split] += (ids, eos)
            for key, value in (("n_tokens", len(ids) + 1), ("n_documents", 1), ("n_bytes", len(document))):
                totals[split][key] += value
            tokens_left = None if tokens_left is None else tokens_left - len(ids) - 1
        for split, writer in writers.items():
            if parts[split]:
                tokens = np.concatenate(parts[split])
                writer.write(tokens, batch[0][0].path)
                if split == "train":
                    counts += np.bincount(tokens, minlength=len(counts))
        if advance is not None:
            advance(sum(len(document) for _, document in batch))
        if tokens_left is not None and tokens_left <= 0:
            break
    splits = {split: {**totals[split], "shards": writer.close()} for split, writer in writers.items()}
    return _write_record(work / "tasks", {"index": task.index, "splits": splits, "skipped": skipped}, counts)


def _write_record(folder: Path, record: dict, counts: np.ndarray) -> dict:
    """Write the record of a task. The record marks the task as done, so all other files are synced to disk first."""
    temporary = folder / f"{record['index']:05d}.{os.getpid()}.tmp"
    with open(temporary, "wb") as file:
        np.save(file, counts, allow_pickle=False)
        file.flush()
        os.fsync(file.fileno())
    record["counts"] = sha256_of(temporary)
    os.replace(temporary, folder / f"{record['index']:05d}.npy")
    fsync_folder(folder.parent)
    write_note(folder / f"{record['index']:05d}.json", record)
    return record


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


def _run_in_pool(source, todo, work: Path, description: dict, workers: int, progress: ByteProgress) -> Iterator[dict]:
    """Yield the records of tasks as they finish, from `workers` processes. The processes end when this loop ends."""
    before = set(multiprocessing.active_children())
    threads, plugins = max(1, usable_cores() // workers), [plugin.name for plugin in loaded_plugins()]
    # The source is passed as bytes, because a worker can unpickle it only after it has loaded the plug-ins.
    setup = (os.getpid(), threads, plugins, pickle.dumps(source), work, description)
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


def _start_worker(parent: int, threads: int, plugins: list[str], source: bytes, work: Path, description: dict) -> None:
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):  # the parent gets them too and ends its workers
        signal.signal(number, signal.SIG_IGN)
    os.environ["RAYON_NUM_THREADS"] = str(threads)  # the tokenizer library's threads
    threading.Thread(target=_leave_with, args=(parent,), daemon=True).start()
    load_plugins(plugins)
    _worker.update(source=pickle.loads(source), work=work, encoder=load_tokenizer(work, description))


def _leave_with(parent: int) -> None:
    """Exit when the parent process is gone, because a killed parent cannot end its workers."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _run_in_worker(task: Task) -> dict:
    return run_task(_worker["source"], task, _worker["work"], _worker["encoder"])
