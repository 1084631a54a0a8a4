"""Every reader of files: a valid file, how the project reads it, and what a plain parser says of the same bytes."""

import contextlib
import csv
import gzip
import io
import itertools
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import rich.console
import torch
import yaml

from scaling_testbed.analysis.rows import published, study
from scaling_testbed.analysis.rows.names import is_text
from scaling_testbed.config.compose import _hashes_of_last_start, compose_many, fill, recorded_run
from scaling_testbed.config.run import run_folder_path, with_later_keys
from scaling_testbed.config.sections import CheckpointConfig
from scaling_testbed.data import shards, targets
from scaling_testbed.data.preparing import preparation
from scaling_testbed.data.sources import filtered, reading, token_files
from scaling_testbed.data.sources.text_files import TextFilesConfig
from scaling_testbed.data.summary import describe
from scaling_testbed.data.tokenizers import BpeConfig, BytesConfig, PretrainedConfig, load_tokenizer
from scaling_testbed.data.watched import WatchedTokens
from scaling_testbed.evaluation import comparison, multiple_choice
from scaling_testbed.exporting.tokenizer import tokenizer_files
from scaling_testbed.files import sha256_of
from scaling_testbed.learning.objectives import npo
from scaling_testbed.progress import ByteProgress
from scaling_testbed.report import law as law_pages
from scaling_testbed.runs import checkpoint, environment, lease
from scaling_testbed.runs import folder as records
from scaling_testbed.runs.hopeless import HOPELESS_FILE, Hopeless
from scaling_testbed.sweeps import grid, plan, slurm, status, view
from tests.faults import damage as d
from tests.training.conftest import TINY

CALL = Hopeless(
    step=2, predicted_loss=5.0, predicted_low=4.5, predicted_high=5.5, predicted_n_runs=5, predicted_like="any",
    best_loss=3.0, best_run="abcdef012345", margin=0.05,
)  # fmt: skip
REFERENCE_OF = {"start": {"run_id": "0123456789ab", "step": 3}, "source": "forget", "data": "0123"}
NOTHING = object()  # what a plain parser says where it cannot read


@dataclass(frozen=True)
class Reader:
    """name: of the reader. make: writes the valid file and its surroundings into an empty folder, and returns its path.
    read: what the project makes of the file. form: the damage that fits. plain: what a plain parser makes of the
    damaged bytes (NOTHING where it cannot read them); None: the file is protected by a hash, and only its own content
    may be read. kept: files beside it that reading may change, restored before the next reading. beside: a file that a
    message may name in its place.
    """

    name: str
    make: Callable[[Path], Path]
    read: Callable[[Path], Any]
    form: tuple
    plain: Callable[[bytes], Any] | None = None
    kept: str = ""
    beside: str = ""


READERS: list[Reader] = []


def reader(name: str, form: tuple, plain: Callable | None = None, kept: str = ""):
    """Registers a class of two functions, `make` and `read`."""

    def add(cls):
        READERS.append(Reader(name, cls.make, cls.read, form, plain, kept))
        return cls

    return add


DOCUMENTS = [f"Document {i}: naïve café {'日本' * (i % 3)} line {i}\n" * (i % 4 + 1) for i in range(12)]
EOS = "<|endoftext|>"


def jsonl(rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def as_json(data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return NOTHING


def json_lines(data: bytes) -> list:
    """The JSON value of each line that is one."""
    found = [as_json(line) for line in data.split(b"\n")]
    return [value for value in found if value is not NOTHING]


def unzipped(parse: Callable) -> Callable:
    def plain(data: bytes):
        try:
            return parse(gzip.decompress(data))
        except Exception:
            return NOTHING

    return plain


# ------------------------------------------------------------------------------------------------ prepared data


def corpus(folder: Path, tokenizer=None) -> Path:
    (folder / "text.jsonl").write_text(jsonl({"text": text} for text in DOCUMENTS))
    source = TextFilesConfig(files=str(folder / "text.jsonl"), validation_fraction=0.3)
    return preparation.prepare(source, tokenizer or BytesConfig(), data_dir=folder / "data", quiet=True)


def tokens_of(folder: Path) -> list:
    data = shards.open_prepared(folder)
    streams = [stream.read(0, stream.n_tokens).tolist() for stream in (data.train, data.validation)]
    counts = [stream.n_bytes for stream in (data.train, data.validation)]
    return [data.fingerprint, data.vocab_size, data.manifest, streams, counts, describe(data)]


@reader("manifest.json of a corpus", d.JSON, kept=".verified.json")
class _Manifest:
    make = staticmethod(lambda folder: corpus(folder) / "manifest.json")
    read = staticmethod(lambda path: tokens_of(path.parent))


@reader("shard of a corpus", d.BYTES, kept=".verified.json")
class _Shard:
    make = staticmethod(lambda folder: next(corpus(folder).glob("train*.bin")))
    read = staticmethod(lambda path: tokens_of(path.parent))


@reader("mask of a shard", d.BYTES, kept=".verified.json")
class _Mask:
    @staticmethod
    def make(folder):
        (folder / "pairs.jsonl").write_text(jsonl({"text": text, "prompt": "in front"} for text in DOCUMENTS))
        source = TextFilesConfig(files=str(folder / "pairs.jsonl"), validation_fraction=0.3, prompt_field="prompt")
        path = preparation.prepare(source, BytesConfig(), data_dir=folder / "data", quiet=True)
        return next(path.glob("train*.mask"))

    @staticmethod
    def read(path):
        train = shards.open_prepared(path.parent).train
        return [tokens_of(path.parent), train.counted(0, train.n_tokens).tolist()]


@reader(".verified.json of a corpus", d.JSON)
class _Verified:
    @staticmethod
    def make(folder):
        path = corpus(folder)
        tokens_of(path)
        return path / ".verified.json"

    read = staticmethod(lambda path: tokens_of(path.parent))


@reader("losses that an objective compares with", d.BYTES)
class _ReferenceLosses:
    @staticmethod
    def make(folder):
        npo.write_losses(folder / npo.FILE, np.arange(12.0).reshape(3, 4), REFERENCE_OF)
        return folder / npo.FILE

    @staticmethod
    def read(path):
        losses_NT, sha256 = npo.read_losses(path, REFERENCE_OF)
        return [losses_NT.tolist(), sha256]


@reader("documents of a filtered corpus", d.JSON)
class _KeptDocuments:
    @staticmethod
    def make(folder):
        path = folder / "kept.json"
        filtered.write_kept(path, shards.open_prepared(corpus(folder)), [0, 2], {"where": ["loss<2"], "n_tokens": 9})
        return path

    read = staticmethod(filtered.read_kept)


def stored_targets(folder: Path) -> Path:
    layout = targets.Layout(n_sequences=5, length=3, top_k=2, vocab_size=97)
    writer, ids = targets.Writer(folder / "targets", layout), np.arange(30).reshape(5, 3, 2)
    writer.write(0, ids, -np.arange(30).reshape(5, 3, 2) / 16)
    teacher = {"run_id": "abcdef012345", "step": 3, "weights_sha256": "0" * 64, "flops": 1e9}
    grid = {"data_fingerprint": "0" * 16, "sequence_length": 3, "packing": "windows", "document_masking": False}
    writer.finish({"teacher": teacher, **grid, "temperature": 1.0})
    return folder / "targets"


def targets_of(folder: Path) -> list:
    found = targets.open_targets(folder)
    return [found.manifest, {name: array.tolist() for name, array in found.of("", np.arange(5)).items()}]


@reader("manifest.json of targets", d.JSON, kept=".verified.json")
class _TargetsManifest:
    make = staticmethod(lambda folder: stored_targets(folder) / "manifest.json")
    read = staticmethod(lambda path: targets_of(path.parent))


@reader("file of targets", d.BYTES, kept=".verified.json")
class _TargetsFile:
    make = staticmethod(lambda folder: stored_targets(folder) / "log_p-00000.bin")
    read = staticmethod(lambda path: targets_of(path.parent))


@reader("tokenizer.json of a corpus", d.JSON)
class _Tokenizer:
    make = staticmethod(lambda folder: corpus(folder, BpeConfig(vocab_size=300)) / "tokenizer.json")

    @staticmethod
    def read(path):
        description = shards.read_manifest(path.parent)["tokenizer"]
        files = tokenizer_files(path.parent, description, 16)
        return [ids.tolist() for ids in load_tokenizer(path.parent).encode_batch([b"naive line 3"])], files


@reader("tokenizer.json of somebody", d.JSON, plain=lambda data: "anything")
class _Pretrained:
    @staticmethod
    def make(folder):
        path = folder / "given" / "tokenizer.json"
        path.parent.mkdir()
        shutil.copy(corpus(folder, BpeConfig(vocab_size=300)) / "tokenizer.json", path)
        return path

    @staticmethod
    def read(path):
        work = path.parent / "work"
        work.mkdir(exist_ok=True)
        config = PretrainedConfig(path=str(path))
        description = config.prepare([], work)
        encoder = load_tokenizer(work, description)
        ids = encoder.encode_batch([text.encode() for text in DOCUMENTS])
        assert all(len(one) == 0 or 0 <= one.min() <= one.max() < description["vocab_size"] for one in ids)
        return "anything"  # its content is the tokenizer: any that the library reads is one


# ------------------------------------------------------------------------------------------------ token files

TOKENS = np.arange(300) % 97


def probed(path: Path) -> list:
    layout = token_files.probe(str(path), "auto", None, 97)
    entry, counts = token_files.scan(str(path), layout, 97)
    return [WatchedTokens(path, entry)[0 : layout.n_tokens].tolist(), counts.tolist()]


def counted(tokens) -> Any:
    tokens = np.asarray(tokens, np.int64)
    fits = len(tokens) and tokens.min() >= 0 and tokens.max() < 97
    return [tokens.tolist(), np.bincount(tokens, minlength=97).tolist()] if fits else NOTHING


def plain_nanogpt(data: bytes) -> Any:
    """The one reading of ids without a header in which all are of the vocabulary; NOTHING where there are several."""
    types = [
        f"{order}{kind}" for kind in ("u2", "u4", "u8") for order in "<>" if data and len(data) % int(kind[1]) == 0
    ]
    found = [read for read in (counted(np.frombuffer(data, dtype)) for dtype in types) if read is not NOTHING]
    return found[0] if len(found) == 1 else NOTHING


@reader("token file of nanoGPT", d.BYTES, plain=plain_nanogpt)
class _NanoGpt:
    @staticmethod
    def make(folder):
        (folder / "train.bin").write_bytes(TOKENS.astype("<u2").tobytes())
        return folder / "train.bin"

    read = staticmethod(probed)


def plain_llmc(data: bytes) -> Any:
    if len(data) < 1024 or tuple(np.frombuffer(data[:8], "<i4")) != (20240520, 1):
        return plain_nanogpt(data)
    return counted(np.frombuffer(data[1024:], "<u2")) if len(data) % 2 == 0 else NOTHING


@reader("token file of llm.c", d.BYTES, plain=plain_llmc)
class _Llmc:
    @staticmethod
    def make(folder):
        (folder / "train.bin").write_bytes(shards.header_bytes("uint16", 300) + TOKENS.astype("<u2").tobytes())
        return folder / "train.bin"

    read = staticmethod(probed)


def plain_npy(data: bytes) -> Any:
    try:
        array = np.load(io.BytesIO(data), allow_pickle=False)
    except Exception:
        return NOTHING
    return counted(array) if array.ndim == 1 and array.dtype.kind in "iu" else NOTHING


@reader("token file of NumPy", d.BYTES, plain=plain_npy)
class _Npy:
    @staticmethod
    def make(folder):
        np.save(folder / "train.npy", TOKENS.astype(">i4"))
        return folder / "train.npy"

    read = staticmethod(probed)


@reader("index of Megatron", d.BYTES, plain=lambda data: counted(TOKENS))
class _Megatron:
    @staticmethod
    def make(folder):
        (folder / "train.bin").write_bytes(TOKENS.astype("<u2").tobytes())
        lengths, head = [100, 200], token_files.MEGATRON_MAGIC + (1).to_bytes(8, "little") + bytes([8])
        counts = (2).to_bytes(8, "little") + (3).to_bytes(8, "little")
        arrays = np.array(lengths, "<i4").tobytes() + np.array([0, 200], "<i8").tobytes()
        (folder / "train.idx").write_bytes(head + counts + arrays + np.array([0, 1, 2], "<i8").tobytes())
        return folder / "train.idx"

    read = staticmethod(lambda path: probed(path.with_suffix(".bin")))


# ------------------------------------------------------------------------------------------------ text


def documents_of(path: Path) -> list:
    source, tally = TextFilesConfig(files=str(path), cut_bytes=None), reading.Tally()
    found = [text.decode() for unit in source.units(64) for text in source.documents(unit, tally)]
    return found


TEXT = (str, type(None))


def plain_jsonl(data: bytes) -> Any:
    found = []
    for line in data.split(b"\n"):
        if line.strip():
            row = as_json(line)
            if not isinstance(row, dict) or not (row.get("text", 0) == [] or isinstance(row.get("text", 0), TEXT)):
                return NOTHING  # an empty list is a chat without a message
            found.append((row["text"] or "").encode("utf-8", "replace").decode())
    return [text for text in found if text]


def plain_text(data: bytes) -> Any:
    try:
        return [data.decode()] if data.count(0) <= len(data) // 4 and data else []  # more: no text, and left out
    except UnicodeDecodeError:
        return []  # the file is left out


def text_reader(ending: str, form: tuple, plain: Callable, pack: Callable[[bytes], bytes]) -> None:
    def make(folder):
        content = "".join(DOCUMENTS) if "txt" in ending else jsonl({"text": text} for text in DOCUMENTS)
        (folder / f"corpus.{ending}").write_bytes(pack(content.encode()))
        return folder / f"corpus.{ending}"

    READERS.append(Reader(f"text in .{ending}", make, documents_of, form, plain))


def csv_text(rows) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def plain_csv_text(data: bytes) -> Any:
    try:
        lines = list(csv.reader(io.StringIO(data.decode("utf-8-sig"), newline=""), strict=True))
    except (UnicodeDecodeError, csv.Error):
        return NOTHING
    rows = [dict(zip(lines[0], line, strict=False)) for line in lines[1:] if line]
    return [row["text"] for row in rows if row.get("text")]


def zstd(data: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


def unzstd(data: bytes) -> bytes:
    with pyarrow.CompressedInputStream(pyarrow.BufferReader(data), "zstd") as stream:
        return stream.read()


def plain_zstd(data: bytes) -> Any:
    try:
        return plain_jsonl(unzstd(data))
    except Exception:
        return NOTHING


def parquet(rows: list[dict]) -> bytes:
    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sink, row_group_size=5)
    return sink.getvalue()


def parquet_rows(data: bytes) -> Any:
    try:
        return pyarrow.parquet.read_table(pyarrow.BufferReader(data)).to_pylist()
    except Exception:
        return NOTHING


def plain_parquet(data: bytes) -> Any:
    rows = parquet_rows(data)
    if rows is NOTHING or not all(isinstance(row.get("text", 0), (str, bytes, type(None))) for row in rows):
        return NOTHING
    texts = [row["text"] for row in rows if row["text"]]
    try:
        return [text.decode() if isinstance(text, bytes) else text for text in texts]
    except UnicodeDecodeError:
        return NOTHING


def typed_table(data: bytes, a: int, b: int) -> bytes:
    """A table of other values, types, names or numbers of rows."""
    rows = parquet_rows(data)
    with contextlib.suppress(Exception):
        return parquet(d.changed(rows, a, b))
    return d.flip(data, a, b)


PARQUET = (*d.BYTES, *[typed_table] * 8)
text_reader("jsonl", d.JSON_LINES, plain_jsonl, bytes)
text_reader("jsonl.gz", d.packed(d.JSON_LINES), unzipped(plain_jsonl), lambda data: gzip.compress(data, mtime=0))
text_reader("jsonl.zst", d.packed(d.JSON_LINES, unzstd, zstd), plain_zstd, zstd)
text_reader("txt", d.LINES, plain_text, bytes)
text_reader("txt.gz", d.packed(d.LINES), unzipped(plain_text), lambda data: gzip.compress(data, mtime=0))
text_reader("csv", d.CSV, plain_csv_text, lambda data: csv_text(json_lines(data)).encode())
text_reader(
    "parquet", PARQUET, plain_parquet, lambda data: parquet([json.loads(line) for line in data.split(b"\n") if line])
)


# ------------------------------------------------------------------------------------------------ work of prepare


def interrupted(name: str):
    """A preparation that was interrupted when all its tasks were done, seen from the file `name`."""

    def make(folder):
        (folder / "text.jsonl").write_text(jsonl({"text": text} for text in DOCUMENTS))
        source = TextFilesConfig(files=str(folder / "text.jsonl"), validation_fraction=0.3)
        job = _job(folder)
        (folder / "work").mkdir()
        job.tokenize(source)
        return folder / "work" / "tasks" / name

    def read(path):
        folder = path.parent.parent.parent
        source = TextFilesConfig(files=str(folder / "text.jsonl"), validation_fraction=0.3)
        return _job(folder).tokenize(source)

    return make, read


def _job(folder):
    return preparation._Job(folder / "work", {}, BytesConfig(), 1, 512, ByteProgress("x", quiet=True))


for _name, _form in (
    ("plan.json", d.JSON),
    ("00000.json", d.JSON),
    ("00001.counts.npy", d.BYTES),
    ("tokenizer_description.json", d.JSON),
):
    READERS.append(Reader(f"tasks/{_name} of prepare", *interrupted(_name), _form, kept="all"))


# ------------------------------------------------------------------------------------------------ a run's records

METRICS = [{"step": step, "lr": 1e-3, "train_loss": 3.0 - step / 9, "tokens": step * 128} for step in range(9)]
METRICS[0]["val_loss"], METRICS[8]["val_loss"] = 4.0, 2.5


def is_record(row) -> bool:
    """A line of metrics.jsonl has names with numbers or null, and a step."""
    if not isinstance(row, dict) or type(row.get("step")) is not int or row["step"] < 0:
        return False
    return all(
        value is None or isinstance(value, float) or isinstance(value, int) and abs(value) <= MOST
        for value in row.values()
    )


MOST = sys.float_info.max


def plain_metrics(data: bytes) -> Any:
    return [row for row in map(as_json, data.splitlines()) if is_record(row)]


@reader("metrics.jsonl", d.JSON_LINES, plain=plain_metrics)
class _Metrics:
    @staticmethod
    def make(folder):
        (folder / "metrics.jsonl").write_text(jsonl(METRICS))
        return folder / "metrics.jsonl"

    read = staticmethod(records.read_metrics)


@reader("metrics.jsonl.gz", d.packed(d.JSON_LINES), plain=unzipped(plain_metrics))
class _MetricsGz:
    @staticmethod
    def make(folder):
        (folder / "metrics.jsonl.gz").write_bytes(gzip.compress(jsonl(METRICS).encode(), mtime=0))
        return folder / "metrics.jsonl.gz"

    read = staticmethod(records.read_metrics)


def planned(folder: Path) -> plan.PlannedRun:
    values: dict = {
        "vocab_size": 97,
        "n_tokens": 1024,
        "tokens_per_step": 128,
        "steps": 8,
        "flops_6nd": 1e9,
        "flops": 1e9,
    }
    values |= {"params": "n_params", "budget_n_params": 1000, "n_params": 1000, "memory_bytes": 10**6}
    config = {"optimizer.lr": 1e-3, "seed": 0, "n_params_non_embedding": 900}
    more = {"varied": {"optimizer.lr": "1e-3"}, "overrides": ["optimizer.lr=1e-3"], "config": config}
    return plan.PlannedRun(run_id="0123456789ab", folder=str(folder / "0123456789ab"), **values, **more)


ROW = {"schema_version": 1, "run_id": "0123456789ab", "status": "finished", "error": None, "steps": 8, "seed": 0}
ROW |= {"val_loss": 2.5, "val_loss_initial": 4.0, "optimizer.lr": 1e-3, "n_params_non_embedding": 900, "plugins": {}}
ROW |= {"val_loss_by_set": {"validation": 2.5}, "flops": 1e9, "wall_seconds": 3.0, "n_params": 1000, "n_tokens": 1024}


def sweep_folder(folder: Path) -> Path:
    runs = folder / "sweep"
    run = runs / "0123456789ab"
    run.mkdir(parents=True)
    (runs / "plan.jsonl").write_text(jsonl([asdict(planned(runs))] * 1))
    about = {"sweep": "tiny", "scale": None, "paper": None, "experiment": None, "description": "d", "analysis": None}
    about["draws"] = [{"samples": 2, "seed": 0, "method": "sobol", "axes": {"optimizer.lr": {"uniform": ["0", "1"]}}}]
    (runs / "sweep.json").write_text(json.dumps(about))
    (run / "metrics.jsonl").write_text(jsonl(METRICS))
    return runs


def looked_at(runs: Path) -> list:
    """What `sweep status` shows."""
    known = plan.told_apart(plan.remembered(runs))
    states = [status.read_state(run) for run in known]
    console = rich.console.Console(file=io.StringIO(), width=100)
    console.print(view.status_table(states))
    console.print(view.loss_table(states))
    return [state.record() for state in states]


@reader("result.json by sweep status", d.JSON, plain=lambda data: "anything")
class _Result:
    @staticmethod
    def make(folder):
        path = sweep_folder(folder) / "0123456789ab" / "result.json"
        path.write_text(json.dumps(ROW))
        return path

    @staticmethod
    def read(path):
        looked_at(path.parent.parent)
        return "anything"


@reader("result.json by analyze", d.JSON, plain=lambda data: [with_later_keys(as_json(data))])
class _ResultAnalysed:
    make = _Result.make

    @staticmethod
    def read(path):
        (path.parent.parent / "plan.jsonl").unlink(missing_ok=True)
        found = study.load(path.parent.parent)
        return [{key: value for key, value in row.items() if key != "label"} for row in found.rows + found.missing]


@reader("result.json by collect", d.JSON, plain=lambda data: [as_json(data)])
class _ResultCollected:
    make = _Result.make

    @staticmethod
    def read(path):
        runs = path.parent.parent
        lines, table, _ = status.collect(runs)
        pyarrow.parquet.read_table(table)
        return [json.loads(line) for line in lines.read_text().split("\n") if line]


@reader("metrics.jsonl by sweep status", d.JSON_LINES, plain=lambda data: "anything")
class _Last:
    make = staticmethod(lambda folder: sweep_folder(folder) / "0123456789ab" / "metrics.jsonl")

    @staticmethod
    def read(path):
        looked_at(path.parent.parent)
        return "anything"


@reader("plan.jsonl by sweep status", d.JSON_LINES, plain=lambda data: "anything")
class _Plan:
    make = staticmethod(lambda folder: sweep_folder(folder) / "plan.jsonl")

    @staticmethod
    def read(path):
        looked_at(path.parent)
        return "anything"


@reader("plan.jsonl by analyze", d.JSON_LINES, plain=lambda data: [row.get("run_id") for row in json_lines(data)])
class _PlanAnalysed:
    make = _Plan.make

    @staticmethod
    def read(path):
        return [row["run_id"] for row in study.load(path.parent).missing]


@reader("sweep.json", d.JSON, plain=lambda data: "anything")
class _About:
    make = staticmethod(lambda folder: sweep_folder(folder) / "sweep.json")

    @staticmethod
    def read(path):
        plan._sweep_of(path.parent)
        study.load(path.parent)
        return "anything"


@reader("environment.json", d.JSON, plain=lambda data: "anything")
class _Environment:
    @staticmethod
    def make(folder):
        environment.record_start(folder, environment.environment("cpu", "fp32") | {"diff": None})
        return folder / "environment.json"

    @staticmethod
    def read(path):
        before = path.read_bytes()
        records.RunFolder(path.parent).last_job()
        _hashes_of_last_start(path.parent)
        start = {"host": "h", "installed": {"torch": "2"}, "git": {"commit": "c", "dirty": None}, "diff": None}
        environment.record_start(path.parent, start)
        found = json.loads(path.read_text())
        assert found["starts"][-1]["host"] == "h" and isinstance(found["installed"], dict)
        path.write_bytes(before)
        return "anything"


@reader("hopeless.json", d.JSON, plain=lambda data: "anything")
class _Hopeless:
    @staticmethod
    def make(folder):
        path = sweep_folder(folder) / "0123456789ab"
        CALL.write(path)
        return path / HOPELESS_FILE

    @staticmethod
    def read(path):
        (state,) = looked_at(path.parent.parent)
        found = state["hopeless"]
        assert found is None or {type(value) for value in found.values()} <= {int, float, str}
        return "anything"


@reader("lock", d.JSON, plain=lambda data: "anything")
class _Lock:
    @staticmethod
    def make(folder):
        (folder / "lock").write_text(json.dumps({"host": "another-machine", "pid": 4321, "job": "77_3"}))
        return folder / "lock"

    @staticmethod
    def read(path):
        str(lease.owner_of(path))
        before = path.read_bytes()
        with contextlib.suppress(lease.AlreadyRunning), records.RunFolder(path.parent):
            pass
        path.write_bytes(before)
        return "anything"


# ------------------------------------------------------------------------------------------------ run folder


@reader("config.yaml of a run", d.YAML, plain=lambda data: "anything")
class _Config:
    @staticmethod
    def make(folder):
        words = ["data=markov", "model=bigram", "budget.steps=4", f"runs_dir={folder}"]
        (run,) = compose_many([words])
        path = run_folder_path(run)
        path.mkdir(parents=True)
        recorded = {"name": run.name, "seed": 0, "data_dir": run.data_dir, "overrides": words}
        (path / "config.yaml").write_text(yaml.safe_dump(recorded, sort_keys=False))
        return path / "config.yaml"

    @staticmethod
    def read(path):
        recorded_run(path.parent)
        return "anything"


# ------------------------------------------------------------------------------------------------ checkpoints

WEIGHTS = {"w": torch.arange(12.0).reshape(3, 4), "b": torch.ones(3)}


def saved(folder: Path) -> Path:
    return checkpoint.save(folder / "checkpoints", 3, {"note": [3, None]}, {"model": WEIGHTS}, CheckpointConfig())


def rehashed(path: Path) -> None:
    """The manifest says of every file what is there now, as someone would write it who changes a file."""
    manifest = {name.name: {"bytes": name.stat().st_size, "sha256": sha256_of(name)} for name in path.iterdir()
                if name.name != "manifest.json"}  # fmt: skip
    (path / "manifest.json").write_text(json.dumps({"files": manifest}))


def loaded(path: Path) -> list:
    found = checkpoint.load(path)
    return [found.step, found.state["note"], {name: value.tolist() for name, value in found.tensors["model"].items()}]


for _name, _form in (("manifest.json", d.JSON), ("state.json", d.JSON), ("model.pt", d.BYTES)):
    READERS.append(
        Reader(
            f"{_name} of a checkpoint",
            lambda folder, name=_name: saved(folder) / name,
            lambda path: loaded(path.parent),
            _form,
        )
    )


@reader("model.pt of a checkpoint, with the right hash", d.BYTES, plain=lambda data: "anything")
class _Rehashed:
    make = staticmethod(lambda folder: saved(folder) / "model.pt")

    @staticmethod
    def read(path):
        rehashed(path.parent)
        loaded(path.parent)
        return "anything"


@reader("state.json of a checkpoint, with the right hash", d.JSON, plain=lambda data: "anything")
class _StateRehashed:
    make = staticmethod(lambda folder: saved(folder) / "state.json")

    @staticmethod
    def read(path):
        rehashed(path.parent)
        found = checkpoint.load(path.parent)
        assert found.step == 3
        return "anything"


# ------------------------------------------------------------------------------------------------ sweep files

SWEEP = """\
description: a sweep
analysis: lr_sensitivity
overrides: [data=markov, budget.steps=4]
axes:
  model: [bigram, nano_s]
  optimizer.lr: [1e-3, 1e-2]
together:
  - {batch.sequences: [8, 16], batch.sequence_length: [16, 8]}
exclude:
  - {model: bigram, optimizer.lr: 1e-2}
draw: {samples: 2, seed: 1, axes: {optimizer.weight_decay: {log_uniform: [1e-3, 1]}, loss.z_loss: {choice: [0, 1e-4]}}}
seeds: [0, 1]
scales:
  small: {seeds: [0]}
"""


def plain_sweep(data: bytes) -> Any:
    try:
        content = yaml.load(data, yaml.CSafeLoader)
        return [content.get("description") or ""]
    except Exception:
        return NOTHING


@reader("sweep file", d.YAML, plain=lambda data: "anything")
class _Sweep:
    @staticmethod
    def make(folder):
        (folder / "mine.yaml").write_text(SWEEP)
        return folder / "mine.yaml"

    @staticmethod
    def read(path):
        sweep = grid.load_sweep(str(path))
        for point in sweep.points():
            assert all(isinstance(text, str) for text in [*point, *point.values()])
            plan._overrides(sweep, point)
        return "anything"


@reader("launcher file", d.YAML, plain=lambda data: "anything")
class _Launcher:
    @staticmethod
    def make(folder):
        content = {"time": "8:00:00", "account": "007", "nodes": 2, "requeue": False, "memory": "64G"}
        content |= {"setup": ["module load cuda"], "sbatch": ["--mail-type END"], "gpus_per_node": 4}
        (folder / "mine.yaml").write_text(yaml.safe_dump(content))
        return folder / "mine.yaml"

    @staticmethod
    def read(path):
        config = fill(slurm.SlurmConfig, path, "launcher", [])
        slurm.job_script(path.parent / "runs" / "001", [planned(path.parent)], config)
        return "anything"


@reader("tasks.txt of a submission", d.LINES, plain=lambda data: "anything")
class _Tasks:
    @staticmethod
    def make(folder):
        (folder / "tasks.txt").write_text(slurm.task_line(planned(folder), slurm.SlurmConfig()) + "\n")
        return folder / "tasks.txt"

    @staticmethod
    def read(path):
        found = slurm._task_folder(path.parent, 0)
        assert found is None or isinstance(found, str)
        return "anything"


@reader("configuration in configs=", d.YAML, plain=lambda data: "anything")
class _Choice:
    @staticmethod
    def make(folder):
        (folder / "model").mkdir()
        (folder / "model" / "mine.yaml").write_text("defaults: [nano_s, _self_]\nd_model: 48\nn_layers: 3\n")
        return folder / "model" / "mine.yaml"

    @staticmethod
    def read(path):
        compose_many([[*TINY, f"configs={path.parent.parent}", "model=mine"]])
        return "anything"


# ------------------------------------------------------------------------------------------------ tables

TABLE = [
    {"run_id": f"r{i}", "status": "finished", "optimizer.lr": 10.0 ** (i % 5 - 4), "n_params": 10**6 * (1 + i % 3),
     "n_tokens": 2 * 10**7 * (1 + i % 3), "val_loss": 3.0 + i / 10, "val_loss_initial": 10.5, "name": "a b"}
    for i in range(15)
]  # fmt: skip


def is_rows(value) -> bool:
    return isinstance(value, list) and all(isinstance(row, dict) for row in value)


def plain_lines(data: bytes) -> Any:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return NOTHING
    found = [
        as_json(line.encode()) for line in text.replace("\r\n", "\n").replace("\r", "\n").split("\n") if line.strip()
    ]
    return found if is_rows(found) else NOTHING


def plain_list(data: bytes) -> Any:
    found = as_json(data)
    found = found.get("rows") if isinstance(found, dict) else found
    return found if is_rows(found) else NOTHING


def plain_csv(data: bytes) -> Any:
    """Each cell as a number where Python reads one, as text otherwise."""
    try:
        lines = list(csv.reader(io.StringIO(data.decode("utf-8-sig"), newline="")))
    except (UnicodeDecodeError, csv.Error):
        return NOTHING
    lines = [*itertools.dropwhile(lambda line: not any(map(str.strip, line)), lines)]
    head = [name.strip(" \t\u00a0") for name in lines[0]] if lines else []
    return [
        {name: plain_cell(cell, name) for name, cell in zip_longest(head, line, fillvalue="") if name}
        for line in lines[1:] if any(map(str.strip, line))
    ]  # fmt: skip


def plain_cell(cell: str, name: str) -> Any:
    for number in (int, float):
        with contextlib.suppress(ValueError):
            if not is_text(name) and "_" not in cell:
                return number(cell)
    word = cell.strip().lower()
    return {"": None, "na": None, "n/a": None, "null": None, "-": None, "true": True, "false": False}.get(
        word, cell.strip()
    )


def plain_cells(data: bytes) -> Any:
    """The rows of a parquet table. What pandas writes has nan in place of nothing."""
    rows = parquet_rows(data)
    return (
        rows
        if rows is NOTHING
        else [{key: None if cell != cell else cell for key, cell in row.items()} for row in rows]
    )


def table_reader(ending: str, form: tuple, plain: Callable, content: bytes) -> None:
    def make(folder):
        (folder / f"table.{ending}").write_bytes(content)
        return folder / f"table.{ending}"

    def read(path):
        found = study.read_table(path)
        study.load(path)
        return found

    READERS.append(Reader(f"table in .{ending}", make, read, form, plain))


table_reader("csv", d.CSV, plain_csv, csv_text(TABLE).encode())
table_reader("jsonl", d.JSON_LINES, plain_lines, jsonl(TABLE).encode())
table_reader("jsonl.gz", d.packed(d.JSON_LINES), unzipped(plain_lines), gzip.compress(jsonl(TABLE).encode(), mtime=0))
table_reader("json", d.JSON, plain_list, json.dumps({"rows": TABLE}).encode())
table_reader("parquet", PARQUET, plain_cells, parquet(TABLE))


# ------------------------------------------------------------------------------------------------ laws


def law_reader(kind: str, record: dict) -> None:
    def make(folder):
        (folder / f"{kind}.json").write_text(json.dumps(record))
        return folder / f"{kind}.json"

    def read(path):
        assert law_pages.is_law(path) in (True, False)
        found = law_pages.read(path)
        inputs = {"n_params": 1e7, "n_tokens": 2e8}
        if isinstance(found, law_pages.Chain):
            found.record(inputs)
        elif isinstance(found, law_pages.Selection):
            found.records(), found.predict(inputs)
        else:
            found.summary(), found.table(), found.about_intervals()
            found.predict(inputs), found.interval(inputs), found.extrapolation(inputs)
        law_pages._content(path)
        return "anything"

    READERS.append(Reader(f"law of {kind}", make, read, d.JSON, lambda data: "anything"))


FIT = {"law": "chinchilla", "params": {"E": 1.7, "A": 400.0, "B": 410.0, "alpha": 0.34, "beta": 0.28}, "ci95": None}
FIT |= {"objective": {"name": "huber_log", "value": 0.1}, "n_rows": 20, "starts": {"tried": 6, "reached_best": 4}}
FIT |= {"warnings": [], "fixed": {}, "optima": [], "largest": {"n_params": 1e8, "n_tokens": 2e9}, "smallest": {}}
FIT |= {"residuals": [0.01, -0.01], "draws": [FIT["params"], FIT["params"]], "size": "n_params"}


ROWS = [{"n_params": 1e7, "n_tokens": 2e8, "loss": 3.0, "predicted": 3.01}]
ROWS[0] |= {"actual": 3.0, "relative_error": 0.003, "low": 2.9, "high": 3.1, "extrapolation": 1.0, "inside": True}
ERROR = FIT | {"law": "loss_to_error", "params": {"epsilon": 0.9, "k": 2.0, "gamma": 0.7}}
ERROR |= {"draws": [ERROR["params"]] * 2, "largest": {"loss": 4.0}}
law_reader("fit", FIT | {"fitted": ROWS * 20, "predictions": ROWS, "where": ["a=1"], "rows": "x.csv"})
law_reader("downstream", {"loss": FIT, "downstream": ERROR, "fitted_loss": ROWS, "fitted_downstream": ROWS,
                          "predictions": ROWS, "warnings": [], "rows": "x.csv"})  # fmt: skip
COMPARED = {"law": "chinchilla", "parameters": 5, "above_least_aicc": 0.0, "error_of_left_out_sizes": 0.01}
COMPARED |= {"error_of_dearer_runs": 0.01, "share": 1.0}
law_reader("laws", {"laws": [COMPARED], "reason": "the best", "calibrated": "calibrated", "fits": {"chinchilla": FIT},
                    "errors_of_dearer_runs": [0.01, -0.02], "reach_of_errors": [1.5, 3.0], "predictions": ROWS,
                    "warnings": [], "rows": "x.csv"})  # fmt: skip


# ------------------------------------------------------------------------------------------------ published rows

MODEL = {"name": "m", "dataset_name": "c4_original", "results": [{"val_data": ["x/eval_data/c4_val"], "loss": 3.0}]}
MODEL["hyperparameters"] = {"params": 153_677_376, "params_no_embed": 1e8, "tokens": 3e9, "chinchilla_multiplier": 1}
MODEL["hyperparameters"] |= {"lr": 1e-3, "wd": 0.1, "warmup": 100}


def published_folder(folder: Path) -> Path:
    for name in ("models", "evals"):
        (folder / "exp_data" / name).mkdir(parents=True)
    (folder / "exp_data" / "models" / "m.json").write_text(json.dumps(MODEL))
    scores = {"eval_metrics": {"icl": {"task": 0.5, "other": 0.3}}}
    (folder / "exp_data" / "evals" / "evaluation_m_heavy.json").write_text(json.dumps(scores))
    (folder / "exp_data" / "eval_metadata.csv").write_text("Eval Task,Random baseline\ntask,25\nother,25\n")
    name = "d=96_l=8_h=4-512-0.003-0.033-1-20000000-100-3e-05"
    (folder / "exp_data" / "grid.json").write_text(json.dumps({name: 3.5}))
    return folder / "exp_data"


def published_reader(name: str, form: tuple, source: str) -> None:
    def read(path):
        published.SOURCES[source](next(parent for parent in path.parents if parent.name == "exp_data"))
        return "anything"

    make = lambda folder: published_folder(folder) / name  # noqa: E731
    beside = "eval_metadata.csv"
    READERS.append(Reader(f"published {name}", make, read, form, lambda data: "anything", beside=beside))


published_reader("models/m.json", d.JSON, "mlfoundations-scaling")
published_reader("evals/evaluation_m_heavy.json", d.JSON, "mlfoundations-scaling")
published_reader("eval_metadata.csv", d.CSV, "mlfoundations-scaling")
published_reader("grid.json", d.JSON, "mlfoundations-scaling-grid")


# ------------------------------------------------------------------------------------------------ evaluation

TASK = [{"context": f"{i} plus 1 is", "choices": [f" {i + 1}", f" {i}"], "gold": i % 2} for i in range(6)]


def plain_task(data: bytes) -> Any:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return NOTHING
    rows = [
        as_json(line.encode()) for line in text.replace("\r\n", "\n").replace("\r", "\n").split("\n") if line.strip()
    ]
    try:
        return [[row["context"], tuple(row["choices"]), row["gold"]] for row in rows]
    except (TypeError, KeyError):
        return NOTHING


@reader("task of multiple choice", d.JSON_LINES, plain=plain_task)
class _Task:
    @staticmethod
    def make(folder):
        (folder / "sums.jsonl").write_text(jsonl(TASK))
        return folder / "sums.jsonl"

    @staticmethod
    def read(path):
        (task,) = multiple_choice.read_tasks([path])
        return [[one.context, one.choices, one.gold] for one in task.documents]


@reader("scores", d.JSON_LINES, plain=lambda data: "anything")
class _Scores:
    @staticmethod
    def make(folder):
        base = {"n_bytes": [2, 2], "log_likelihoods": [-1.0, -2.0]}
        rows = [{"task": "sums", "line": i + 1, "gold": i % 2, "predicted": 0, "predicted_per_byte": 1, **base}
                for i in range(5)]  # fmt: skip
        (folder / "scores.jsonl").write_text(jsonl(rows))
        return folder / "scores.jsonl"

    @staticmethod
    def read(path):
        comparison.read_models({"a": [path]}, "gold_loss")
        return "anything"
