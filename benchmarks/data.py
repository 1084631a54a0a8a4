"""Batches of tokens and tokenising, beside nanoGPT's and those of Hugging Face datasets.

    python -m benchmarks.data [--nanogpt FOLDER] [--rounds N] [--seconds S] [--without TEXT ...] [--out DIR] [--quick]

A batch is what a step asks for: int64 inputs and targets [B, T] on the CPU, from the same random tokens on disk, in
files that the system has in memory. nanoGPT's is its own get_batch, taken from train.py of the checkout; that of
datasets is a shuffled DataLoader over a dataset of windows.

Tokenising starts from one JSON file with a document in each line, uses one tokenizer.json (byte-level BPE with 4,096
tokens), and ends with token files on disk, in one process with one thread. The peers are datasets.map with a document
at a time, as in nanoGPT's prepare.py, and with batches of documents; both then write the tokens as nanoGPT does. This
project also splits off validation documents, counts tokens and bytes, and hashes what it wrote.

Before anything is timed, each batch is looked up in the tokens, and all ways must give the same number of tokens.
"""

from __future__ import annotations

import ast
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

os.environ |= {"RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}

import numpy as np
import torch

from benchmarks import harness
from benchmarks.report import Budget, Report, verdict
from scaling_testbed.config.compose import compose
from scaling_testbed.config.run import RunConfig
from scaling_testbed.data.batches import TrainingBatches
from scaling_testbed.data.manifest import read_manifest
from scaling_testbed.data.preparing.preparation import prepare
from scaling_testbed.data.shards import PreparedData, open_prepared

OURS = "this project"
SHAPES = [(4, 64), (32, 128), (8, 512), (12, 1024)]
CALLS = 50  # batches that are timed together
N_TOKENS, TEXT_BYTES = 4_000_000, 4_000_000
QUICK_TOKENS, QUICK_BYTES = 100_000, 60_000
EOS = "<|endoftext|>"
COLUMNS = [("median_s", "ms", "ms"), ("low_s", "min", "ms"), ("high_s", "max", "ms")]
COLUMNS += [("tokens_per_s", "tokens/s", "count"), ("mb_per_s", "MB/s", "ratio"), ("ratio", "of ours", "ratio")]
Ways = dict[str, Callable[[], Any]]

# ------------------------------------------------------------------------------------------------ batches


def batch_ways(data: PreparedData, shape: tuple[int, int], folder: Path, nanogpt: str | None) -> Ways:
    """The ways to get a batch, by name."""
    ways: Ways = {OURS: our_batches(data, shape)}
    if nanogpt:
        ways["nanoGPT's get_batch"] = nanogpt_batches(Path(nanogpt), folder, shape)
    ways["datasets, DataLoader"] = datasets_batches(folder / "train.bin", shape)
    return ways


def our_batches(data: PreparedData, shape: tuple[int, int]) -> Callable[[], tuple]:
    batches = TrainingBatches(data.train, sequences=shape[0], sequence_length=shape[1], seed=0)
    steps = iter(range(10**9))

    def batch():
        tokens_BS = torch.from_numpy(batches.batch(next(steps)).tokens_BS)
        return tokens_BS[:, :-1], tokens_BS[:, 1:]

    return batch


def nanogpt_batches(checkout: Path, folder: Path, shape: tuple[int, int]) -> Callable[[], tuple]:
    """get_batch of nanoGPT's train.py, with the global variables that it reads."""
    source = ast.parse((checkout / "train.py").read_text())
    (function,) = (node for node in source.body if isinstance(node, ast.FunctionDef) and node.name == "get_batch")
    of_module = {"np": np, "torch": torch, "os": os, "device": "cpu", "device_type": "cpu", "data_dir": str(folder)}
    of_module |= {"batch_size": shape[0], "block_size": shape[1]}
    exec(compile(ast.Module([function], []), str(checkout / "train.py"), "exec"), of_module)
    return partial(of_module["get_batch"], "train")


def datasets_batches(file: Path, shape: tuple[int, int]) -> Callable[[], tuple]:
    import datasets

    datasets.disable_progress_bars()
    tokens, (rows, length) = np.memmap(file, np.uint16, "r"), shape
    starts = np.arange((len(tokens) - 1) // length) * length
    windows = [tokens[start : start + length + 1] for start in starts]
    kept = file.with_name(f"windows-{length}")
    if not kept.exists():
        datasets.Dataset.from_dict({"ids": windows}).save_to_disk(str(kept))
    loader = torch.utils.data.DataLoader(
        datasets.load_from_disk(str(kept)).with_format("torch"), batch_size=rows, shuffle=True, drop_last=True
    )

    def endless() -> Iterator[torch.Tensor]:
        while True:
            for found in loader:
                yield found["ids"].long()

    batches = endless()

    def batch():
        tokens_BS = next(batches)
        return tokens_BS[:, :-1], tokens_BS[:, 1:]

    return batch


def check_batch(found: tuple, tokens: np.ndarray, shape: tuple[int, int]) -> str | None:
    """What is wrong with a batch: shape, type, targets, or a row that is not in the tokens. None if nothing is."""
    inputs_BT, targets_BT = found
    if not inputs_BT.shape == targets_BT.shape == shape or not inputs_BT.dtype == targets_BT.dtype == torch.int64:
        return f"{inputs_BT.dtype} {list(inputs_BT.shape)}"
    if not torch.equal(inputs_BT[:, 1:], targets_BT[:, :-1]):
        return "the targets are not the next tokens"
    windows = np.lib.stride_tricks.sliding_window_view(tokens, shape[1])
    row = inputs_BT[-1].numpy()
    places = np.flatnonzero((tokens[: len(windows)] == row[0]) & (windows[:, 1] == row[1]))
    return None if (windows[places] == row).all(1).any() else "a row is not in the tokens"


def compare_batches(report: Report, options, data: PreparedData, shape: tuple[int, int], seconds: float) -> None:
    folder = data.folder.parent
    tokens = data.train.read(0, data.train.n_tokens).astype(np.uint16)
    tokens.tofile(folder / "train.bin")
    ways = without(batch_ways(data, shape, folder, options.nanogpt), options)
    wrong = {name: check_batch(way(), tokens, shape) for name, way in ways.items()}
    rows = timed_in_turns(ways, wrong, options.rounds, 2 * seconds, calls=CALLS)
    for row in rows:
        if row["status"] == "ok":
            row["tokens_per_s"] = shape[0] * shape[1] / row["median_s"]
    report.add({"label": f"a batch of {shape[0]} x {shape[1]} tokens", "rows": rows, "notes": judged(rows)})


# ------------------------------------------------------------------------------------------------ tokenising


def write_documents(file: Path, n_bytes: int) -> int:
    """Write source files of sympy, which PyTorch requires, as JSON lines. Returns the bytes of their text."""
    import sympy

    written = 0
    with open(file, "w") as lines:
        for path in sorted(Path(sympy.__file__).parent.rglob("*.py")):
            if text := path.read_text(encoding="utf-8"):
                lines.write(json.dumps({"text": text}) + "\n")
                written += len(text.encode())
            if written >= n_bytes:
                break
    return written


def train_tokenizer(documents: Path, file: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=4096, special_tokens=[EOS], initial_alphabet=alphabet, show_progress=False)
    texts = [json.loads(line)["text"] for line in documents.read_text().splitlines()[:20]]
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(file))


def tokenising_ways(documents: Path, tokenizer: Path) -> Ways:
    """The ways to tokenise, by name. Each returns the number of tokens."""
    words = [f"data.files=['{documents}']", "tokenizer=pretrained", f"tokenizer.path='{tokenizer}'"]
    run = compose(["data=text_files", *words])
    return {
        OURS: partial(our_preparation, run, documents.parent),
        "datasets.map": partial(datasets_preparation, documents, tokenizer, batched=False),
        "datasets.map, batched": partial(datasets_preparation, documents, tokenizer, batched=True),
    }


def our_preparation(run: RunConfig, folder: Path) -> int:
    with tempfile.TemporaryDirectory(dir=folder) as place:
        manifest = read_manifest(
            prepare(run.data, run.tokenizer, data_dir=Path(place), workers=1, quiet=True, tell=False)
        )
        return sum(split["n_tokens"] for split in manifest["splits"].values())


def datasets_preparation(documents: Path, tokenizer: Path, *, batched: bool) -> int:
    import datasets
    from tokenizers import Tokenizer

    datasets.disable_progress_bars()
    encoder = Tokenizer.from_file(str(tokenizer))
    eos = encoder.token_to_id(EOS)

    def one(example):
        ids = encoder.encode(example["text"], add_special_tokens=False).ids + [eos]
        return {"ids": ids, "len": len(ids)}

    def several(examples):
        found = encoder.encode_batch_fast(examples["text"], add_special_tokens=False)
        ids = [one.ids + [eos] for one in found]
        return {"ids": ids, "len": list(map(len, ids))}

    with tempfile.TemporaryDirectory(dir=documents.parent) as folder:
        texts = datasets.load_dataset("json", data_files=str(documents), split="train", cache_dir=folder)
        tokenized = texts.map(several if batched else one, batched=batched, remove_columns=["text"])
        n_tokens = int(np.sum(tokenized["len"], dtype=np.uint64))
        file = np.memmap(f"{folder}/train.bin", dtype=np.uint16, mode="w+", shape=(n_tokens,))
        at, n_shards = 0, min(1024, len(tokenized))
        for index in range(n_shards):
            shard = tokenized.shard(num_shards=n_shards, index=index, contiguous=True).with_format("numpy")
            ids = np.concatenate(shard["ids"])
            file[at : at + len(ids)] = ids
            at += len(ids)
        file.flush()
    return n_tokens


def compare_tokenising(report: Report, options, folder: Path, n_bytes: int, seconds: float) -> None:
    documents, tokenizer = folder / "documents.jsonl", folder / "tokenizer.json"
    n_bytes = write_documents(documents, n_bytes)
    train_tokenizer(documents, tokenizer)
    ways = without(tokenising_ways(documents, tokenizer), options)
    counts = {name: way() for name, way in ways.items()}
    wanted = counts.get(OURS, next(iter(counts.values()), 0))
    wrong = {name: None if found == wanted else f"{found:,} tokens, not {wanted:,}" for name, found in counts.items()}
    rows = timed_in_turns(ways, wrong, options.rounds, 2 * seconds, calls=1)
    for row in rows:
        if row["status"] == "ok":
            row["tokens_per_s"], row["mb_per_s"] = wanted / row["median_s"], n_bytes / 1e6 / row["median_s"]
    report.add({"label": f"tokenising {n_bytes / 1e6:.1f} MB of Python", "rows": rows, "notes": judged(rows)})


# ------------------------------------------------------------------------------------------------ both


def without(ways: Ways, options) -> Ways:
    """The ways that --without leaves."""
    left_out = [text.lower() for text in options.without]
    return {name: way for name, way in ways.items() if not any(text in name.lower() for text in left_out)}


def timed_in_turns(ways: Ways, wrong: dict[str, str | None], rounds: int, seconds: float, calls: int) -> list[dict]:
    """A row for each way, with the wall seconds of a call; `calls` of them are timed together. wrong: why a way is not
    timed. Each way has been called before."""
    times: dict[str, list[float]] = {name: [] for name in ways if wrong[name] is None}
    budget = Budget(seconds)
    for turn in range(rounds):
        names = list(times)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            began = time.perf_counter()
            for _ in range(calls):
                ways[name]()
            times[name].append((time.perf_counter() - began) / calls)
        if turn + 1 >= harness.LEAST_ROUNDS and budget.left() < 0:
            break
    rows = []
    for name in ways:
        row: dict[str, Any] = {"variant": name, "ours": name == OURS, "status": "ok"}
        if found := times.get(name):
            row |= {"seconds": found, "median_s": statistics.median(found), "low_s": min(found), "high_s": max(found)}
            if OURS in times:
                row["ratio"] = row["median_s"] / statistics.median(times[OURS])
        else:
            row["status"] = f"wrong, not timed: {wrong[name]}"
        rows.append(row)
    return rows


def judged(rows: list[dict[str, Any]]) -> list[str]:
    """The verdict on the aim: no peer is faster."""
    peers = [row["ratio"] for row in rows if "ratio" in row and not row["ours"]]
    return (
        [verdict(f"the fastest peer takes {min(peers):.2f} of our time (aim: at least 1)", round(min(peers), 2) >= 1)]
        if peers
        else []
    )


def main(argv: list[str] | None = None) -> int:
    more = {"--nanogpt": "a checkout of nanoGPT"}
    options = harness.arguments(__doc__, argv, seconds=240, more=more)
    torch.set_num_threads(1)
    machine = harness.describe_machine(harness.choose_device("cpu"))
    report = Report("data", machine, COLUMNS, out=options.out and Path(options.out), smoke=options.quick)
    if options.nanogpt is None:
        report.data["absent"].append("nanoGPT (--nanogpt FOLDER names a checkout)")
    n_tokens, n_bytes = (QUICK_TOKENS, QUICK_BYTES) if options.quick else (N_TOKENS, TEXT_BYTES)
    with tempfile.TemporaryDirectory() as place:
        run = compose(["data=noise", "data.vocab_size=257", f"data.n_tokens={n_tokens}"])
        data = open_prepared(prepare(run.data, run.tokenizer, data_dir=Path(place), quiet=True))
        work: dict[str, Callable[[float], object]] = {
            f"a batch of {shape[0]} x {shape[1]} tokens": partial(compare_batches, report, options, data, shape)
            for shape in (SHAPES[:1] if options.quick else SHAPES)
        }
        work["tokenising"] = partial(compare_tokenising, report, options, Path(place), n_bytes)
        return report.run(work, Budget(options.seconds))


if __name__ == "__main__":
    sys.exit(main())
