"""This trainer beside nanoGPT and Hugging Face's Trainer: the part of benchmarks/trainer.py with --nanogpt.

Each trainer trains the same shape on the same tokens (Zipf) from its start to its end in a fresh process; see
benchmarks/peers.py. The trainers take turns, and the first of a round changes with each round. The first SKIP steps of
a process are not counted. All trainers have a tied head, no weight decay and a constant rate.

Before speed counts, losses must be alike. The first must be within START nats of ln V, because every trainer draws its
weights in its own way. The mean of the last quarter must be within ALIKE nats of this trainer's in fp32. A trainer that
disagrees is named, and no ratio is made of it.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import math
import os
import pickle
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import harness, peers
from benchmarks.harness import OUT_OF_MEMORY
from benchmarks.report import Budget, Report, first_line, verdict

ROOT = Path(__file__).resolve().parent.parent
SKIP, START, ALIKE = 3, 0.75, 0.25
SECONDS = {"cpu": 3600.0, "cuda": 480.0}
ROUNDS = 5
LIMIT = {"cpu": 900, "cuda": 240}  # seconds after which a trainer is ended
MEMORY_AIM = 1.1
# Variables that change how memory or threads are handed out. All trainers have those of this process.
SETTINGS = ("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD", "OMP_", "KMP_", "MKL_", "PYTORCH_")
OURS, NANOGPT = "this trainer", "nanoGPT"
PLAIN = ["model.qk_norm=none", "loss.z_loss=0"]
NEEDS = {"HF": ("transformers", "accelerate")}
COLUMNS = [
    ("tokens_per_second", "tokens/s", "count"),
    ("median_s", "ms a step", "ms"),
    ("low_s", "min", "ms"),
    ("high_s", "max", "ms"),
    ("cpu_s", "CPU ms a step", "ms"),
    ("peak_bytes", "peak MiB", "MiB"),
    ("n_params", "parameters", "count"),
    ("first_loss", "first loss", "loss"),
    ("last_loss", "last losses", "loss"),
    ("over", "speed of this / its", "ratio"),
]


@dataclass(frozen=True)
class Variant:
    """A trainer as it is run. trainer: a key of peers.TRAINERS. overrides: further ones, of this project's trainer.
    compile: whether a peer is told to compile."""

    name: str
    trainer: str
    overrides: tuple[str, ...] = ()
    compile: bool = False

    @property
    def ours(self) -> bool:
        return self.trainer == OURS


VARIANTS = {
    "cpu": [
        Variant(OURS, OURS),
        Variant("this trainer without qk-norm and z-loss", OURS, tuple(PLAIN)),
        *(Variant(name, name) for name in (NANOGPT, "HF GPT2", "HF Llama")),
    ],
    "cuda": [
        Variant(OURS, OURS),
        Variant("this trainer without qk-norm and z-loss", OURS, tuple(PLAIN)),
        Variant(NANOGPT, NANOGPT),
        *(Variant(f"{name}, compiled", name, compile=True) for name in (NANOGPT, "HF GPT2", "HF Llama")),
    ],
}
DTYPES = {"cpu": ("fp32", "bf16"), "cuda": ("bf16",)}


@dataclass(frozen=True)
class Size:
    """A model and its batch. batch: sequences, sequences of a pass, tokens of a sequence. aim: the least ratio of speed
    to each peer's best; None: none is stated."""

    label: str
    overrides: tuple[str, ...]
    vocabulary: int
    batch: tuple[int, int, int]
    steps: int
    aim: float | None


def _cpu_sizes() -> list[Size]:
    models = {"nano_s": (257, 40, 150, 1.0), "nano_m": (257, 30, 100, 1.3), "nano_l": (257, 20, 60, 1.5)}
    models["proxy_2m"] = (32000, 9, 14, 1.4)
    wide = [
        Size(f"{name}, V {v:,}, 32 x 128", (f"model={name}",), v, (32, 32, 128), steps, aim)
        for name, (v, steps, _, aim) in models.items()
    ]
    return wide + [
        Size(f"{name}, V {v:,}, 4 x 64", (f"model={name}",), v, (4, 4, 64), steps, None)
        for name, (v, _, steps, _) in models.items()
    ]


def sizes_of(device: str, quick: bool) -> list[Size]:
    if quick:
        return [Size("nano_s, V 257, 4 x 32", ("model=nano_s",), 257, (4, 4, 32), 16, 1.0)]
    if device == "cpu":
        return _cpu_sizes()
    from benchmarks.trainer import SIZES, VOCABULARY

    aims = {"10M": 1.25, "124M": 1.1, "1.3B": 1.1}
    return [
        Size(size.label, size.overrides, VOCABULARY, size.batch, size.steps, aim)
        for begin, aim in aims.items()
        for size in SIZES
        if size.label.startswith(begin)
    ]


# ------------------------------------------------------------------------------------------------ tokens and jobs


def data_overrides(size: Size) -> list[str]:
    sequences, _, length = size.batch
    n_tokens = max(1_000_000, 2 * size.steps * sequences * length)
    return ["data=noise", "data.distribution=zipf", f"data.vocab_size={size.vocabulary}", f"data.n_tokens={n_tokens}"]


QUIET = (
    "checkpoint.every_steps=0",
    "checkpoint.at_end=false",
    "evaluation.every_steps=0",
    "logging.every_steps=1",  # the peers also record every step
    "model.tied_head=true",
    "optimizer.weight_decay=0",
    "schedule=constant",
    "schedule.warmup=0",
    "name=benchmark",
)
LR = 3e-3


def job_of(size: Size, options, device: str, threads: int, folder: Path) -> peers.Job:
    """The job of this trainer in fp32, with its tokens prepared in `folder`, for all trainers."""
    from scaling_testbed.config.compose import compose
    from scaling_testbed.data.preparing.preparation import prepare
    from scaling_testbed.data.shards import open_prepared

    own = [*data_overrides(size), *QUIET, *size.overrides]
    run = compose([*own, f"data_dir={folder}/data"])
    prepared = open_prepared(prepare(run.data, run.tokenizer, data_dir=folder / "data", quiet=True))
    tokens = prepared.train.read(0, prepared.train.n_tokens)
    place = folder / f"tokens-{size.vocabulary}-{len(tokens)}"
    place.mkdir(exist_ok=True)
    tokens.astype(np.uint16).tofile(place / "train.bin")
    (place / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": size.vocabulary}))  # nanoGPT reads it from here
    model = run.model.resolved(size.vocabulary)
    sequences, micro, length = size.batch
    return peers.Job(
        trainer=OURS,
        shape={name: getattr(model, name) for name in ("n_layers", "n_heads", "d_model", "d_ff")},
        vocabulary=size.vocabulary,
        sequences=sequences,
        micro=micro,
        length=length,
        steps=size.steps,
        skip=SKIP,
        lr=LR,
        dtype="fp32",
        device=device,
        threads=threads,
        compile=False,
        overrides=own,
        folder=str(place),
        work="",
        data_dir=f"{folder}/data",
        nanogpt=options.nanogpt and str(Path(options.nanogpt).resolve()),
    )


def run_job(job: peers.Job) -> dict[str, Any]:
    """The result of a job in a fresh process, with its status."""
    environment = os.environ | {"OMP_NUM_THREADS": str(job.threads)}
    with tempfile.TemporaryDirectory() as work:
        command = [sys.executable, "-m", "benchmarks.peers", peers.as_json(dataclasses.replace(job, work=work))]
        try:
            done = subprocess.run(
                command,
                cwd=ROOT,
                env=environment,
                capture_output=True,
                text=True,
                timeout=LIMIT[job.device],
                check=True,
            )
        except subprocess.TimeoutExpired:
            return {"status": f"ended after {LIMIT[job.device]} s"}
        except subprocess.CalledProcessError as error:
            last = (error.stderr.strip().splitlines() or [f"the process ended with {error.returncode}"])[-1]
            out_of_memory = "OutOfMemoryError" in last or harness.is_out_of_memory(RuntimeError(last))
            return {"status": OUT_OF_MEMORY if out_of_memory else f"failed: {first_line(RuntimeError(last))}"}
    return {"status": "ok"} | json.loads(done.stdout.splitlines()[-1])


# ------------------------------------------------------------------------------------------------ a comparison


def variants_of(size: Size, device: str, without: list[str]) -> list[tuple[Variant, str]]:
    """The variants with their type, without those that --without names or whose packages are not installed."""
    pairs = [(variant, dtype) for dtype in DTYPES[device] for variant in VARIANTS[device]]
    return [
        (variant, dtype)
        for variant, dtype in pairs
        if not any(text.lower() in f"{size.label}: {variant.name}, {dtype}".lower() for text in without)
        and not missing(variant)
    ]


def missing(variant: Variant) -> list[str]:
    needed = next((names for begin, names in NEEDS.items() if variant.name.startswith(begin)), ())
    return [name for name in needed if importlib.util.find_spec(name) is None]


def absent(device: str) -> list[str]:
    """The variants that are left out because a package is not installed, with its name."""
    return [f"{one.name} ({', '.join(lacks)} is not installed)" for one in VARIANTS[device] if (lacks := missing(one))]


def measure_size(
    report: Report, options, budget: Budget, device: str, threads: int, folder: Path, size: Size, _
) -> None:
    """Run the trainers in turns. Each result is written when it is there."""
    job = job_of(size, options, device, threads, folder)
    pairs = variants_of(size, device, options.without)
    rows = [{"variant": f"{one.name}, {dtype}", "ours": one.ours, "status": "not measured"} for one, dtype in pairs]
    case: dict[str, Any] = {"label": size.label, "done": False, "rows": rows, "notes": []}
    report.add(case)
    least = 1 if device == "cuda" or options.quick else harness.LEAST_ROUNDS
    share = Budget(budget.left() / 2)
    for turn in range(min(options.rounds, ROUNDS)):
        if turn >= least and share.left() <= 0:
            break
        for place in range(len(pairs)):
            index = (place + turn) % len(pairs)
            (variant, dtype), row = pairs[index], rows[index]
            if budget.left() <= 0 or row["status"] not in ("ok", "not measured"):
                continue
            more = {"trainer": variant.trainer, "dtype": dtype, "compile": variant.compile}
            own = [*job.overrides, *variant.overrides]
            add(row, run_job(dataclasses.replace(job, overrides=own, **more)), job)
            print(f"  {row['variant']}: {_line(row)}", flush=True)
            report.write()
    best_note, *notes = judge(rows, size, math.log(size.vocabulary))
    case["notes"] = [f"{best_note}; {_settings_note(report.data['environment'])}", *notes]
    case["done"] = all(row["status"] != "not measured" for row in rows)
    report.data["not_reached"] += [f"{size.label}: {row['variant']}" for row in rows if row["status"] == "not measured"]
    print(*case["notes"], sep="\n  ", flush=True)
    report.write()


def add(row: dict[str, Any], found: dict[str, Any], job: peers.Job) -> None:
    """Add the result of one process to the row of its variant."""
    if found["status"] == "ok" and not found.get("seconds"):
        found["status"] = "failed: no times; an update did not go through an optimizer of PyTorch"
    row["status"] = found["status"]
    if found["status"] != "ok":
        return
    for name in ("seconds", "cpu_seconds"):
        row[name] = row.get(name, []) + found.get(name, [])
    row["rounds"] = row.get("rounds", 0) + 1
    row["losses"] = found["losses"]
    row["n_params"] = found["n_params"]
    if found["peak_bytes"] is not None:
        row["peak_bytes"] = max(row.get("peak_bytes", 0), found["peak_bytes"])
    row["median_s"] = statistics.median(row["seconds"])
    row["low_s"], row["high_s"] = min(row["seconds"]), max(row["seconds"])
    row["tokens_per_second"] = job.sequences * job.length / row["median_s"]
    row["cpu_s"] = statistics.median(row["cpu_seconds"]) if row["cpu_seconds"] else None
    row["first_loss"] = row["losses"][0]
    row["last_loss"] = statistics.mean(row["losses"][-max(1, len(row["losses"]) // 4) :])


def _line(row: dict[str, Any]) -> str:
    if row["status"] != "ok":
        return row["status"]
    return f"{row['tokens_per_second']:,.0f} tokens/s, losses {row['first_loss']:.3f} to {row['last_loss']:.3f}"


def judge(rows: list[dict[str, Any]], size: Size, start: float) -> list[str]:
    """Check that losses are alike, add the ratio of speeds to each row, and return what is to be said of the aims."""
    measured = [row for row in rows if row["status"] == "ok"]
    trusted = next((row for row in measured if row["variant"].startswith(f"{OURS}, ")), None)
    if trusted is None:
        return ["this trainer was not measured, so no aim can be checked"]
    for row in measured:
        if not abs(row["first_loss"] - start) <= START:
            row["status"] = f"wrong: first loss {row['first_loss']:.3f}, not near ln V = {start:.3f}"
        elif not abs(row["last_loss"] - trusted["last_loss"]) <= ALIKE:
            row["status"] = f"wrong: last losses {row['last_loss']:.3f}, not {trusted['last_loss']:.3f}"
    measured = [row for row in measured if row["status"] == "ok"]
    ours = best(measured, f"{OURS}, ")
    if ours is None:
        return ["the losses of this trainer are wrong, so no aim can be checked"]
    for row in measured:
        row["over"] = ours["tokens_per_second"] / row["tokens_per_second"]
    notes = [f"best of this trainer: {ours['variant']}"]
    for peer in (NANOGPT, "HF GPT2", "HF Llama"):
        notes.append(_speed_note(ours, best(measured, peer), peer, size.aim))
    return [*notes, _memory_note(ours, best(measured, NANOGPT))]


def best(rows: list[dict[str, Any]], begin: str) -> dict[str, Any] | None:
    """The fastest row whose name begins so."""
    found = [row for row in rows if row["variant"].startswith(begin)]
    return max(found, key=lambda row: row["tokens_per_second"], default=None)


def _speed_note(ours: dict[str, Any], peer: dict[str, Any] | None, name: str, aim: float | None) -> str:
    if peer is None:
        return f"speed beside {name} cannot be checked"
    text = f"{peer['over']:.2f} times as fast as {peer['variant']}"
    if ours.get("cpu_s") and peer.get("cpu_s"):
        text += f" (by processor time {peer['cpu_s'] / ours['cpu_s']:.2f})"
    return text if aim is None else verdict(f"{text} (aim: at least {aim})", round(peer["over"], 2) >= aim)


def _memory_note(ours: dict[str, Any], peer: dict[str, Any] | None) -> str:
    if peer is None or not peer.get("peak_bytes") or not ours.get("peak_bytes"):
        return "peak memory beside nanoGPT cannot be checked"
    ratio = ours["peak_bytes"] / peer["peak_bytes"]
    return verdict(
        f"peak memory {ratio:.2f} of {peer['variant']} (aim: at most {MEMORY_AIM})", round(ratio, 2) <= MEMORY_AIM
    )


# ------------------------------------------------------------------------------------------------ the whole


def settings(threads: int) -> dict[str, Any]:
    """What all trainers have in common: threads, and the variables of SETTINGS that are set."""
    found = {name: value for name, value in sorted(os.environ.items()) if name.startswith(SETTINGS)}
    return {"threads": threads, "environment": found | {"OMP_NUM_THREADS": str(threads)}}


def _settings_note(environment: dict[str, str]) -> str:
    return "all trainers with " + ", ".join(f"{name}={value}" for name, value in environment.items())


def nanogpt_commit(folder: str) -> str:
    """The commit of the checkout. Exits if there is no nanoGPT."""
    if not (Path(folder) / "train.py").is_file() or not (Path(folder) / "model.py").is_file():
        raise SystemExit(f"--nanogpt {folder}: no train.py and model.py of github.com/karpathy/nanoGPT there")
    command = ["git", "-C", folder, "rev-parse", "--short=12", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() or "unknown commit"


def main(options, machine: dict[str, Any]) -> int:
    """Compare the trainers on a machine that harness.describe_machine described; the exit status."""
    device = machine["device"]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = int(options.threads or cores)
    commit = nanogpt_commit(options.nanogpt)
    report = Report("peers", machine, COLUMNS, out=options.out, smoke=options.quick, module="trainer")
    report.data["versions"][NANOGPT] = commit
    report.data |= settings(threads)
    report.data["absent"] = absent(device)
    kept = report.keep(("command", "machine", "versions", "threads", "environment"))
    for label in kept:
        print(f"{label}: measured before; remove {report.path} to measure it again", flush=True)
    budget = Budget(options.seconds or SECONDS[device])
    with tempfile.TemporaryDirectory() as folder:
        measure = functools.partial(measure_size, report, options, budget, device, threads, Path(folder))
        sizes = [size for size in sizes_of(device, options.quick) if variants_of(size, device, options.without)]
        return report.run(
            {size.label: functools.partial(measure, size) for size in sizes if size.label not in kept}, budget
        )
