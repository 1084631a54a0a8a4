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
from dataclasses import dataclass
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
AT_ONCE = max(2, (os.cpu_count() or 1) - 2)  # runs at the same time on a GPU; each works mostly on the host
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

Call = Callable[[], dict[str, Any]]
Calls = list[Call]


def make_all(tasks: dict[str, Calls], at_once: int, budget: Budget) -> Iterator[tuple[str, dict[str, Any]]]:
    """The name of each task with the answer of its last call, as soon as it is there.

    The calls of a task are made one after another, each in a forked process, and `at_once` tasks at the same time. All
    but the last must kill their process. When the time is over, the rest is not made.
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
                if len(calls) == 1:
                    yield name, answer
                elif process.exitcode == -signal.SIGKILL:
                    start(name, calls[1:])
                else:  # the next call would begin anew, and look like one that goes on
                    yield name, {"status": f"failed: it was to be killed, and {answer['status']}"}
    finally:
        for _, _, process in running.values():
            process.kill()
            process.join()


def compared(name: str, run: dict[str, Any], with_run: dict[str, Any], *, bits: bool) -> dict[str, Any]:
    """The row of `run` beside `with_run`. bits: whether the same bits are promised."""
    row = {"variant": name, "ours": True, "status": run["status"]}
    if row["status"] != "ok":
        return row
    if with_run["status"] != "ok":
        return row | {"status": f"failed: there is nothing to compare it with ({with_run['status']})"}
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


@dataclass(frozen=True)
class Case:
    """A case of the result, from the answers of the tasks `needs`."""

    needs: tuple[str, ...]
    make: Callable[[dict[str, dict[str, Any]]], dict[str, Any]]


def measure(report: Report, tasks: dict[str, Calls], cases: dict[str, Case], at_once: int, budget: Budget) -> None:
    """Make the tasks, and add each case to the report when its tasks are done."""
    found: dict[str, dict[str, Any]] = {}
    report.data["not_reached"] = list(cases)
    report.write()
    for name, answer in make_all(tasks, at_once, budget):
        found[name] = answer
        for label in [label for label in report.data["not_reached"] if set(cases[label].needs) <= set(found)]:
            report.data["not_reached"].remove(label)
            report.add({"label": label} | cases[label].make(found))


def modes(on_gpu: bool, call: Callable[..., Call]) -> tuple[dict[str, Calls], dict[str, Case]]:
    """The tasks and the cases of runs of one process. On a CPU, compiled runs are tested elsewhere."""
    tasks, cases = {"reference": [call("reference", REFERENCE)]}, {}
    for mode, words in MODES.items():
        if not on_gpu and "compute.compile=true" in words:
            continue
        names = tuple(f"{mode}/{name}" for name in (STRAIGHT, AGAIN, RESUMED))
        for name in names[:2]:
            tasks[name] = [call(name, words)]
        tasks[names[2]] = [call(names[2], words, kill=True), call(names[2], words)]
        case = partial(case_of_mode, mode, promised="compute.deterministic=true" in words)
        cases[mode] = Case(("reference", *names), case)
    return tasks, cases


def case_of_mode(mode: str, found: dict[str, dict[str, Any]], promised: bool) -> dict[str, Any]:
    straight = found[f"{mode}/{STRAIGHT}"]
    rows = [compared(f"{STRAIGHT}, beside the reference path", straight, found["reference"], bits=False)]
    rows += [compared(name, found[f"{mode}/{name}"], straight, bits=promised) for name in (AGAIN, RESUMED)]
    again, resumed = (bool(row.get("same_weights") and row.get("same_losses")) for row in rows[1:])
    if promised:
        return {"rows": rows, "notes": [verdict("the same bits again, and after a kill", again and resumed)]}
    said = {True: "the same bits", False: "other bits"}
    return {"rows": rows, "notes": [f"not promised: {said[again]} again, {said[resumed]} after a kill"]}


def placements(call: Callable[..., Call]) -> tuple[dict[str, Calls], dict[str, Case]]:
    """The tasks and the cases of runs with a group of processes."""
    tasks, cases = {"alone": [call("alone", [])]}, {}

    def beside_alone(names: tuple[str, ...], found: dict[str, dict[str, Any]]) -> dict[str, Any]:
        return {"rows": [compared(name, found[name], found["alone"], bits=False) for name in names]}

    for kind, words in PLACEMENTS.items():
        tasks[kind] = [call(kind, words, environment=rank(0, 1, free_port()))]
        cases[f"{kind}, one process"] = Case(("alone", kind), partial(beside_alone, (kind,)))
    port, names = free_port(), ("rank 0", "rank 1")
    for number, name in enumerate(names):
        tasks[name] = [call("two", PLACEMENTS["ddp"], environment=rank(number, 2, port), shared=True)]
    cases["ddp, two processes"] = Case(("alone", *names), partial(beside_alone, names))
    return tasks, cases


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

        def call(name: str, more: list[str], **how: Any) -> Call:
            return partial(make_run, [*words, f"runs_dir={folder}/{name}", *more], **how)

        tasks, cases = placements(call) if options.processes else modes(on_gpu, call)
        # The processes of a group wait for each other.
        measure(report, tasks, cases, AT_ONCE if on_gpu else 2 if options.processes else 1, budget)
    report.finish()
    return report.status


if __name__ == "__main__":
    sys.exit(main())
