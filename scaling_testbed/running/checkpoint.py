"""Checkpoints that are whole or not there.

A checkpoint is a folder `step-XXXXXXXX` of tensor files, `state.json` and `manifest.json` with every file's size and
sha256. It is written beside its final place, flushed to the disk and renamed; the hashes are checked before anything
in it is read; tensors are loaded without unpickling code (weights_only).
"""

import json
import os
import pickle
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from scaling_testbed.errors import UserError
from scaling_testbed.files import fsync_folder, sha256_of
from scaling_testbed.running.config import CheckpointConfig

MANIFEST = "manifest.json"
_STEP_FOLDER = re.compile(r"step-(\d{8})")


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint: `state` is plain data, `tensors` the state dicts by name, on the CPU."""

    step: int
    state: dict[str, Any]
    tensors: dict[str, Any]


def save(folder: Path, step: int, state: dict[str, Any], tensors: dict[str, Any], config: CheckpointConfig) -> Path:
    """Write `folder/step-XXXXXXXX` and drop those that `config` does not keep. Raises UserError when the disk refuses.

    At every moment at least one earlier checkpoint, if there was one, stays whole.
    """
    final = folder / f"step-{step:08d}"
    if final.exists() and _problem(final) is None:
        return final
    work = folder / f"step-{step:08d}.tmp"
    try:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        for name, tensor_state in tensors.items():
            _write(work / f"{name}.pt", lambda file, value=tensor_state: torch.save(value, file))
        _write(work / "state.json", lambda file: file.write(json.dumps({"step": step, **state}).encode()))
        manifest = {path.name: _fingerprint(path) for path in sorted(work.iterdir())}
        _write(work / MANIFEST, lambda file: file.write(json.dumps({"files": manifest}, indent=1).encode()))
        fsync_folder(work)
        if final.exists():  # a damaged one of the same step
            shutil.rmtree(final)
        os.rename(work, final)
        fsync_folder(folder)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
        shutil.rmtree(work, ignore_errors=True)
        raise UserError(
            f"could not write the checkpoint {final}: {_first_line(error)}; earlier ones are intact"
        ) from error
    _retain(folder, config)
    return final


def load_latest(folder: Path) -> Checkpoint | None:
    """The newest checkpoint whose hashes agree, or None where there is none.

    A damaged one is named on stderr and the one before is used. Raises UserError when all are damaged: a run never
    starts again at step 0 by itself.
    """
    for leftover in folder.glob("step-*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)
    damaged = []
    for path in reversed(_step_folders(folder)):
        problem = _problem(path)
        if problem is None:
            return load(path)
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
    state = json.loads((path / "state.json").read_bytes())
    try:
        tensors = {p.stem: torch.load(p, map_location="cpu", weights_only=True) for p in sorted(path.glob("*.pt"))}
    except pickle.UnpicklingError:
        raise UserError(f"checkpoint {path} holds something that is no tensor; it was not loaded") from None
    return Checkpoint(state["step"], state, tensors)


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
        # Renamed first: a kill in mid-deletion must not leave what looks like a checkpoint.
        doomed = path.with_suffix(".tmp")
        os.rename(path, doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def _step_folders(folder: Path) -> list[Path]:
    """Checkpoint folders by step, oldest first."""
    return sorted((path for path in folder.glob("step-*") if _STEP_FOLDER.fullmatch(path.name)), key=_step)


def _step(path: Path) -> int:
    return int(_STEP_FOLDER.fullmatch(path.name).group(1))


def _fingerprint(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": sha256_of(path)}


def _write(path: Path, fill) -> None:
    with open(path, "wb") as file:
        fill(file)
        file.flush()
        os.fsync(file.fileno())


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
