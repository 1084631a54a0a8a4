"""Checkpoints that are either complete or absent.

A checkpoint is a folder `step-XXXXXXXX` of tensor files, `state.json`, and `manifest.json` with the size and sha256 of
every file. The folder is written under a temporary name, flushed to disk and renamed. The hashes are checked before any
content is read. Tensors are loaded without unpickling code (weights_only).

The tensors of a sharded run are in the subfolder `shards/`, in the format of torch.distributed.checkpoint. Each rank
writes its part in files of its own. `read` returns the same for both kinds, so that any number of processes can use any
checkpoint.
"""

import json
import os
import pickle
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, TypedDict

import torch

from scaling_testbed.config.sections import CheckpointConfig, ParallelismConfig
from scaling_testbed.data.shards import PreparedData
from scaling_testbed.errors import UserError, first_line
from scaling_testbed.files import fsync_folder, sha256_of
from scaling_testbed.processes.group import Processes
from scaling_testbed.processes.world import World
from scaling_testbed.runs import sharded

MANIFEST = "manifest.json"
ALONE = Processes(World(), ParallelismConfig())
_STEP_FOLDER = re.compile(r"step-(\d{8})")


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint. state: plain data. tensors: state dicts by name, on the CPU."""

    step: int
    state: dict[str, Any]
    tensors: dict[str, Any]


def save(
    folder: Path,
    step: int,
    state: dict[str, Any],
    tensors: dict[str, Any],
    config: CheckpointConfig,
    *,
    shards: dict[str, torch.Tensor] | None = None,
    processes: Processes = ALONE,
) -> Path:
    """Write `folder/step-XXXXXXXX`, and delete the checkpoints that `config` does not keep.

    Every rank calls this. Rank 0 writes `tensors` and the manifest. Each rank writes its parts of `shards`, DTensors by
    key. At every moment at least one earlier checkpoint, if there is one, is complete. Raises UserError if writing
    fails.
    """
    final, work = (folder / f"step-{step:08d}{suffix}" for suffix in ("", ".tmp"))
    if processes.on_main(lambda: final.exists() and _problem(final) is None):
        return final
    try:
        processes.on_main(lambda: _start(work))
        if shards is not None:
            sharded.write_shards(work / sharded.SHARDS, shards)
        processes.on_main(lambda: _finish(work, final, {"step": step, **state}, tensors))
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
        processes.on_main(lambda: shutil.rmtree(work, ignore_errors=True))
        raise UserError(
            f"could not write the checkpoint {final}: {first_line(error)}; earlier ones are intact"
        ) from error
    processes.on_main(lambda: _retain(folder, config))
    return final


def _start(work: Path) -> None:
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)


def _finish(work: Path, final: Path, state: dict[str, Any], tensors: dict[str, Any]) -> None:
    """Write the files of rank 0, hash all files, and give the folder its final name."""
    for name, tensor_state in tensors.items():
        _write(work / f"{name}.pt", partial(torch.save, tensor_state))
    _write(work / "state.json", lambda file: file.write(json.dumps(state).encode()))
    files = sorted(path for path in work.rglob("*") if path.is_file())
    manifest = {path.relative_to(work).as_posix(): _fingerprint(path) for path in files}
    _write(work / MANIFEST, lambda file: file.write(json.dumps({"files": manifest}, indent=1).encode()))
    for inner in {path.parent for path in files} | {work}:
        fsync_folder(inner)
    if final.exists():  # a damaged one of the same step
        shutil.rmtree(final)
    os.rename(work, final)
    fsync_folder(final.parent)


def latest(folder: Path) -> Path | None:
    """The path of the newest checkpoint whose hashes agree, or None if there is no checkpoint.

    A damaged checkpoint is reported on stderr, and the one before it is used. Raises UserError if all are damaged: a
    run never starts again from step 0 automatically.
    """
    for leftover in folder.glob("step-*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)
    damaged = []
    for path in reversed(_step_folders(folder)):
        problem = _problem(path)
        if problem is None:
            return path
        damaged.append(path)
        print(f"warning: checkpoint {path} is damaged ({problem}); trying the one before", file=sys.stderr)
    if damaged:
        raise UserError(
            f"every checkpoint in {folder} is damaged; restore one, or delete the folder to start again from step 0"
        )
    return None


def load(path: Path) -> Checkpoint:
    """Read one checkpoint. Raises UserError if it is damaged or holds anything but tensors and plain data."""
    if problem := _problem(path):
        raise UserError(f"checkpoint {path} is damaged: {problem}")
    return read(path)


def read(path: Path, *, mmap: bool = False) -> Checkpoint:
    """Read one checkpoint whose hashes agree. Every tensor of a sharded one is read as a whole.

    mmap: leave tensors on disk until they are used. Raises UserError if it holds anything but tensors and plain data.
    """
    state = read_state(path)
    try:
        files = sorted(path.glob("*.pt"))
        tensors = {file.stem: torch.load(file, map_location="cpu", weights_only=True, mmap=mmap) for file in files}
    except pickle.UnpicklingError:
        raise UserError(f"checkpoint {path} holds something that is no tensor; it was not loaded") from None
    if is_sharded(path):
        tensors |= sharded.read_whole(path, tensors.pop("groups"))
    return Checkpoint(state["step"], state, tensors)


def read_state(path: Path) -> dict[str, Any]:
    """The plain data of a checkpoint, including its step."""
    state: dict[str, Any] = json.loads((path / "state.json").read_bytes())
    return state


class Fingerprints(TypedDict):
    """Fingerprints of the data that a run is trained on."""

    data_fingerprint: str
    tokenizer_fingerprint: str | None


def fingerprints(data: PreparedData) -> Fingerprints:
    """The fingerprints of `data` that the state of a checkpoint stores."""
    return {"data_fingerprint": data.fingerprint, "tokenizer_fingerprint": data.tokenizer_fingerprint}


def check_same_data(state: dict[str, Any], data: PreparedData, folder: Path) -> None:
    """Raise UserError unless `data` is what the run in `folder` was trained on."""
    for key, now in fingerprints(data).items():
        if state[key] != now:
            raise UserError(
                f"{folder} was trained on other data: its {key} is {state[key]}, that of {data.folder} is {now}; "
                "restore the data, or start a new run with another name="
            )


def is_sharded(path: Path) -> bool:
    """Whether each rank wrote its part of the tensors of this checkpoint."""
    return (path / sharded.SHARDS).is_dir()


def _problem(path: Path) -> str | None:
    """What is wrong with a checkpoint folder, or None."""
    try:
        files = json.loads((path / MANIFEST).read_bytes())["files"]
        expected = {name: (entry["bytes"], entry["sha256"]) for name, entry in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} is missing or unreadable"
    if "state.json" not in expected:
        return "state.json is not in the manifest"
    for name, (size, digest) in expected.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes instead of {size}"
        if _fingerprint(file)["sha256"] != digest:
            return f"the hash of {name} does not match"
    return None


def _retain(folder: Path, config: CheckpointConfig) -> None:
    kept_steps = set(config.keep_steps)
    others = [path for path in _step_folders(folder) if _step(path) not in kept_steps]
    for path in others[: -config.keep_last]:
        # Renamed first, because a process killed during the deletion must not leave a folder named like a checkpoint.
        doomed = path.with_suffix(".tmp")
        os.rename(path, doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def _step_folders(folder: Path) -> list[Path]:
    """Checkpoint folders by step, oldest first."""
    return sorted((path for path in folder.glob("step-*") if _STEP_FOLDER.fullmatch(path.name)), key=_step)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _fingerprint(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": sha256_of(path)}


def _write(path: Path, fill: Callable[[BinaryIO], object]) -> None:
    with open(path, "wb") as file:
        fill(file)
        file.flush()
        os.fsync(file.fileno())
