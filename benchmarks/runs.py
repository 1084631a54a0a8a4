"""Whether whole runs on this machine end as they should: the same bits, and losses as by the reference path.

    python -m benchmarks.runs [--device cpu] [--seconds S] [--out DIR]                runs of one process
    python -m benchmarks.runs --processes [--device cpu] [--seconds S] [--out DIR]    ddp and fsdp

A run has forty steps. Each is made in a process of its own, and runs that do not depend on each other are made at the
same time.

of one process   in each mode: a run straight through, the same again, and one that is killed after its checkpoint of
                 step 20 and started again. Are weights and losses the same to the bit? compute.deterministic=true
                 promises it. The default does not on a GPU, because the backward pass of cuDNN's attention sums in any
                 order. And a run by the reference path: are the losses those of the other paths?
--processes      ddp and fsdp in a world of one process, beside the run without them; and ddp with two processes that
                 share one device and communicate by gloo.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import multiprocessing
import multiprocessing.connection
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

from benchmarks import harness
from benchmarks.report import Budget, Report, first_line, verdict
from benchmarks.trainer import in_child, probe

STEPS, SAVED, KILLED = 40, 20, 30
RUN = [
    "model=proxy_2m",
    "data=noise",
    "evaluation.rows=4",
    "data.vocab_size=2048",
    "data.n_tokens=700000",
    "batch.sequences=16",
    "batch.sequence_length=256",
    "evaluation.tokens=16384",
    "evaluation.every_steps=0",
    f"budget.steps={STEPS}",
    f"checkpoint.every_steps={SAVED}",
    "name=runs",
]
CPU_RUN = [*RUN, "model=nano_s", "data.vocab_size=64", "batch.sequences=4", "batch.sequence_length=32"]
MODES = {
    "default": [],
    "deterministic": ["compute.deterministic=true"],
    "compiled": ["compute.compile=true"],
    "deterministic and compiled": ["compute.deterministic=true", "compute.compile=true"],
}
REFERENCE = ["loss.impl=reference", "model.attention_impl=reference", "model.qk_norm_impl=reference"]
STRAIGHT, AGAIN, RESUMED = "straight", "again", "killed and started again"
AT_ONCE = max(1, (os.cpu_count() or 1) - 2)  # runs at the same time on a GPU; each works mostly on the host
PLACEMENTS = {"ddp": ["parallelism=ddp"], "fsdp": ["parallelism=fsdp"]}
# Relative difference of losses. bf16 logits differ from fp32 ones; forty steps on small batches enlarge it.
FIRST, ALL = 2e-3, 2e-2
COLUMNS = [
    ("same_weights", "same weights", "yes"),
    ("same_losses", "same losses", "yes"),
    ("first_difference", "first loss differs by", "small"),
    ("largest_difference", "losses differ by at most", "small"),
    ("run_seconds", "s", "s"),
]


# ------------------------------------------------------------------------------------------------ in the child


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def rank(number: int, size: int, port: int) -> dict[str, str]:
    """The variables of a process of a group, as torchrun sets them."""
    return {
        "RANK": str(number),
        "LOCAL_RANK": str(number),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def make_run(words: list[str], *, kill: bool = False, environment: dict[str, str] | None = None, shared=False) -> dict:
    """Train in this process. Returns the losses of all steps, and the folder.

    kill: whether the process kills itself in step KILLED. shared: whether the processes of the run share one device.
    """
    from scaling_testbed.config.compose import compose
    from scaling_testbed.config.run import run_folder_path
    from scaling_testbed.training import run as training

    os.environ.update(environment or {})
    real, began = training.inputs, time.perf_counter()

    def inputs(parts, step):
        if kill and step == KILLED:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(parts, step)

    run = compose(words)
    with mock.patch.object(training, "inputs", inputs), one_device() if shared else contextlib.nullcontext():
        row = training.train(run, quiet=True)
    if row["status"] != "finished":
        return {"status": f"failed: {row['status']}: {row.get('error')}"}
    folder = run_folder_path(run)
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    losses = {line["step"]: line["train_loss"] for line in lines if "train_loss" in line}
    return {"status": "ok", "losses": losses, "folder": str(folder), "run_seconds": time.perf_counter() - began}


@contextlib.contextmanager
def one_device():
    """Let all processes use the first GPU and communicate by gloo: NCCL wants a GPU for each."""
    import torch.distributed as dist

    from scaling_testbed.training import parts

    group, choose = dist.init_process_group, parts.choose_device
    with (
        mock.patch.object(dist, "init_process_group", lambda backend, **more: group("gloo", **more)),
        mock.patch.object(parts, "choose_device", lambda config, local_rank=0: choose(config)),
    ):
        yield


def _send(sender, call: Callable[[], dict[str, Any]]) -> None:
    try:
        answer = call()
    except Exception as error:
        answer = {"status": f"failed: {first_line(error)}"}
    sender.send(answer)


# ------------------------------------------------------------------------------------------------ in the parent

Calls = list[Callable[[], dict[str, Any]]]


def make_all(tasks: dict[str, Calls], at_once: int, budget: Budget) -> Iterator[tuple[str, dict[str, Any]]]:
    """The name of each task with the answer of its last call, as soon as it is there.

    The calls of a task are made one after another, each in a forked process, and `at_once` tasks at the same time. When
    the time is over, the rest is not made.
    """
    waiting, running = list(tasks.items()), {}
    context = multiprocessing.get_context("fork")

    def start(name: str, calls: Calls) -> None:
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_send, args=(sender, calls[0]))
        process.start()
        sender.close()
        running[receiver] = name, calls, process

    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                start(*waiting.pop(0))
            done = multiprocessing.connection.wait(list(running), timeout=max(0.0, budget.left()))
            if not done:
                return
            for receiver in done:
                name, calls, process = running.pop(receiver)
                try:
                    answer = receiver.recv()
                except EOFError:
                    process.join()
                    answer = {"status": f"failed: the process ended with {process.exitcode}"}
                process.join()
                if len(calls) > 1:
                    start(name, calls[1:])
                else:
                    yield name, answer
    finally:
        for _, _, process in running.values():
            process.kill()
            process.join()


def compared(name: str, run: dict[str, Any], with_run: dict[str, Any], *, bits: bool) -> dict[str, Any]:
    """The row of `run` beside `with_run`. bits: whether the same bits are promised."""
    row = {"variant": name, "ours": True, "status": run["status"]}
    if row["status"] != "ok":
        return row
    if with_run.get("status") != "ok":
        return row | {"status": "there is nothing to compare it with"}
    differences = [relative(run["losses"].get(step), loss) for step, loss in with_run["losses"].items()]
    row |= {"first_difference": differences[0], "largest_difference": max(differences)}
    row |= {"same_losses": run["losses"] == with_run["losses"], "run_seconds": run["run_seconds"]}
    row["same_weights"] = same_weights(run["folder"], with_run["folder"])
    if bits and not (row["same_losses"] and row["same_weights"]):
        row["status"] = "wrong: other bits"
    elif not (differences[0] <= FIRST and max(differences) <= ALL):
        row["status"] = f"wrong: losses differ by {differences[0]:.1e} at first, and by at most {max(differences):.1e}"
    return row


def relative(value: float | None, expected: float) -> float:
    if value is None:
        return math.inf
    return 0.0 if value == expected else abs(value - expected) / abs(expected)


def same_weights(folder: str, other: str) -> bool:
    """Whether the last checkpoints of two runs hold the same weights."""
    import torch

    from scaling_testbed.runs import checkpoint

    first, second = (
        checkpoint.read(checkpoint.by_step(Path(path) / "checkpoints")[STEPS]).tensors["model"]
        for path in (folder, other)
    )
    return set(first) == set(second) and all(torch.equal(first[name], second[name]) for name in first)


def measure_modes(report: Report, call: Callable[..., Callable], at_once: int, budget: Budget) -> None:
    """Make the runs of one process, and add a case for each mode when its runs are there."""
    modes = MODES if report.data["device"] == "cuda" else {name: MODES[name] for name in ("default", "deterministic")}
    tasks = {"reference": [call("reference", REFERENCE)]}
    for mode, words in modes.items():
        for name in (STRAIGHT, AGAIN):
            tasks[f"{mode}/{name}"] = [call(f"{mode}/{name}", words)]
        ended = call(f"{mode}/killed", words)
        tasks[f"{mode}/{RESUMED}"] = [call(f"{mode}/killed", words, kill=True), ended]
    found: dict[str, dict[str, Any]] = {}
    left = dict(modes)
    for name, answer in make_all(tasks, at_once, budget):
        found[name] = answer
        for mode in [m for m in left if {f"{m}/{n}" for n in (STRAIGHT, AGAIN, RESUMED)} | {"reference"} <= set(found)]:
            report.add(case_of_mode(mode, found, promised="compute.deterministic=true" in left.pop(mode)))
    report.data["not_reached"] = list(left)


def case_of_mode(mode: str, found: dict[str, dict[str, Any]], promised: bool) -> dict[str, Any]:
    straight = found[f"{mode}/{STRAIGHT}"]
    rows = [compared(f"{STRAIGHT}, beside the reference path", straight, found["reference"], bits=False)]
    rows += [compared(name, found[f"{mode}/{name}"], straight, bits=promised) for name in (AGAIN, RESUMED)]
    same = [bool(row.get("same_weights") and row.get("same_losses")) for row in rows[1:]]
    text = f"{mode}: the same bits again, and after a kill"
    return {"label": mode, "rows": rows, "notes": [verdict(text, all(same)) if promised else f"{text}: {same}"]}


def measure_placements(report: Report, call: Callable[..., Callable], at_once: int, budget: Budget) -> None:
    """Make the runs of groups, and add a case for each when it and the run without a group are there."""
    alone = dict(make_all({"alone": [call("alone", [])]}, 1, budget)).get("alone", {"status": "failed: not reached"})
    report.add({"label": "one process, no group", "rows": [compared("alone", alone, alone, bits=True)]})
    for name, words in PLACEMENTS.items():
        made = dict(make_all({name: [call(name, words, environment=rank(0, 1, free_port()))]}, 1, budget))
        report.add(
            {"label": f"{name}, world of one", "rows": [compared(name, made[n], alone, bits=False) for n in made]}
        )
    port = free_port()
    both = {
        str(number): [call("two", PLACEMENTS["ddp"], environment=rank(number, 2, port), shared=True)]
        for number in range(2)
    }
    made = dict(make_all(both, 2, budget))
    report.add(
        {"label": "ddp, two processes", "rows": [compared(f"rank {n}", made[n], alone, bits=False) for n in made]}
    )


def main(argv: Sequence[str] | None = None) -> int:
    options = harness.arguments(__doc__, argv, seconds=60, flags={"--processes": "ddp and fsdp"})
    importlib.import_module("scaling_testbed.training.run")  # so that the forked processes need not import it
    budget = Budget(options.seconds)
    machine = in_child(probe, options.device, 60)
    if "machine" not in machine:
        raise SystemExit(f"cannot measure this machine: {machine['status']}")
    on_gpu = machine["device"] == "cuda"
    name = "processes" if options.processes else "runs"
    report = Report(name, machine, COLUMNS, out=options.out, smoke=options.quick or not on_gpu)
    with tempfile.TemporaryDirectory() as folder:
        words = [*(RUN if on_gpu else CPU_RUN), f"data_dir={folder}/data", f"compute.device={machine['device']}"]

        def call(name: str, more: list[str], **how: Any) -> Callable[[], dict[str, Any]]:
            return partial(make_run, [*words, f"runs_dir={folder}/{name}", *more], **how)

        measure = measure_placements if options.processes else measure_modes
        measure(report, call, AT_ONCE if on_gpu else 1, budget)
    report.finish()
    return report.status


if __name__ == "__main__":
    sys.exit(main())
