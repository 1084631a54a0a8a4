"""Checkpoints that are either complete or absent.

A checkpoint is a folder `step-XXXXXXXX` of tensor files, `state.json`, and `manifest.json` with the size and sha256 of
every file. The folder is written under a temporary name, flushed to disk and renamed. The hashes are checked before any
content is read. Tensors are loaded without unpickling code (weights_only).

The tensors of a sharded run are in the subfolder `shards/`, in the format of torch.distributed.checkpoint. Each rank
writes its part in files of its own. `read` returns the same for both kinds, so that any number of processes can use any
checkpoint.
"""

import contextlib
import json
import math
import os
import pickle
import shutil
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, TypedDict

import torch

from scaling_testbed.config.sections import CheckpointConfig, ParallelismConfig
from scaling_testbed.config.start import STEP_FOLDER
from scaling_testbed.data.shards import PreparedData
from scaling_testbed.errors import UserError, first_line
from scaling_testbed.files import check_version, fsync_folder, os_error_in, read_json, reason_of, sha256_of, space
from scaling_testbed.processes.group import Processes
from scaling_testbed.processes.world import World
from scaling_testbed.progress import say
from scaling_testbed.runs import sharded
from scaling_testbed.runs.folder import is_record
from scaling_testbed.runs.row import is_number, shortened

SCHEMA_VERSION = 1  # of state.json; checkpoints without a version are read too
MANIFEST, STATE = "manifest.json", "state.json"
WAY_OUT = "move it out of its folder, and the same command goes on from the checkpoint before it"
ALONE = Processes(World(), ParallelismConfig())


def _is_spent(value: dict[str, Any]) -> bool:
    """Whether a value of JSON has the steps, tokens and FLOPs of one run. Tokens and FLOPs may be unknown."""
    known = [number for name in ("n_tokens", "flops") if (number := value.get(name)) is not None]
    return type(value.get("steps")) is int and all(map(is_number, known))


def _is_parent(value: Any) -> bool:
    """Whether a value of JSON is an entry of Progress.lineage."""
    return isinstance(value, dict) and isinstance(value.get("run_id"), str) and _is_spent(value)


# What state.json may hold under a name. A checkpoint of an earlier version lacks some of them.
_KINDS: dict[str, Callable[[Any], bool]] = {
    "run_id": lambda value: isinstance(value, str),
    "shapes": lambda value: isinstance(value, str),
    "precision": lambda value: isinstance(value, str),
    "row": lambda value: value is None or is_record(value),
    "lineage": lambda value: isinstance(value, list) and all(map(_is_parent, value)),
    "spent": lambda value: isinstance(value, dict) and _is_spent(value),
    "summary": lambda value: isinstance(value, dict),
    "metrics": lambda value: (
        isinstance(value, dict) and [type(value.get(key)) for key in ("lines", "sha256", "whole")] == [int, str, bool]
    ),
    "micro_batches": lambda value: (
        isinstance(value, dict)
        and all(step.isdecimal() and type(rows) is int and rows > 0 for step, rows in value.items())
    ),
    "restarts": lambda value: type(value) is int and value >= 0,
    "train_loss_last": lambda value: value is None or is_number(value),
    "wall_seconds": lambda value: is_number(value) and 0 <= value < math.inf,
    "steps_by_clock": lambda value: value is None or (type(value) is int and value > 0),
    "updates": lambda value: isinstance(value, dict),
    "averaged": lambda value: type(value) is int and value >= 0,
}


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
    key. At every moment at least one earlier checkpoint, if there is one, is complete. `folder` is made if it does not
    exist, but not the folder that it lies in. Raises UserError if writing fails. If an earlier checkpoint cannot be
    deleted, this is a warning.
    """
    final, work = (folder / f"step-{step:08d}{suffix}" for suffix in ("", ".tmp"))
    if processes.on_main(lambda: _is_saved(final, state.get("run_id"))):
        return final
    try:
        processes.on_main(lambda: _start(work))
        if shards is not None:
            sharded.write_shards(work / sharded.SHARDS, shards)
        processes.on_main(lambda: _finish(work, final, {"step": step, **state}, tensors))
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
        processes.on_main(lambda: shutil.rmtree(work, ignore_errors=True))
        refused = os_error_in(error)
        reason = first_line(error) if refused is None else reason_of(refused)
        room = "" if refused is None else space(final, _n_bytes([tensors, shards]), refused)
        raise UserError(
            f"could not write the checkpoint {final}: {reason}{room}; earlier checkpoints are intact, and the same "
            "command goes on from the last of them"
        ) from error
    processes.on_main(lambda: _retain(folder, config))
    return final


def _is_saved(final: Path, run_id: str | None) -> bool:
    """Whether a whole checkpoint of this run is there already."""
    if not final.exists() or _problem(final) is not None:
        return False
    with contextlib.suppress(UserError):
        return read_state(final).get("run_id") == run_id
    return False


def _start(work: Path) -> None:
    shutil.rmtree(work, ignore_errors=True)
    work.parent.mkdir(exist_ok=True)
    work.mkdir()


def _n_bytes(value: Any) -> int:
    """The bytes of all tensors in nested containers, whole also where they are sharded."""
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return sum(map(_n_bytes, inner))


def _finish(work: Path, final: Path, state: dict[str, Any], tensors: dict[str, Any]) -> None:
    """Write the files of rank 0, hash all files, and give the folder its final name."""
    if is_sharded(work):
        sharded.check_whole(work / sharded.SHARDS)
    for name, tensor_state in tensors.items():
        _write(work / f"{name}.pt", partial(torch.save, tensor_state))
    _write(work / STATE, lambda file: file.write(json.dumps(state).encode()))
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
        say(f"warning: checkpoint {path} is damaged ({problem}); trying the one before", errors=True)
    if damaged:
        raise UserError(
            f"every checkpoint in {folder} is damaged; restore one, or delete the folder to start again from step 0"
        )
    return None


def load(path: Path) -> Checkpoint:
    """Read one checkpoint. Raises UserError if it is damaged or holds anything but tensors and plain data."""
    check_whole(path)
    return read(path)


def check_whole(path: Path) -> None:
    """Raise UserError if a checkpoint is damaged."""
    if problem := _problem(path):
        raise UserError(f"checkpoint {path} is damaged: {problem}")


def read(path: Path, *, mmap: bool = False) -> Checkpoint:
    """Read one checkpoint whose hashes agree. Every tensor of a sharded one is read as a whole.

    mmap: leave tensors on disk until they are used. Raises UserError if it holds anything but tensors and plain data.
    """
    state, tensors = read_state(path), {}
    for name in sorted(_files(path)):
        file = path / name
        if file.parent == path and file.suffix == ".pt":
            tensors[file.stem] = _load(file, mmap)
    if is_sharded(path):
        if not isinstance(groups := tensors.pop("groups", None), dict):
            raise UserError(f"checkpoint {path} cannot be used: groups.pt is no list of groups; {WAY_OUT}")
        try:
            tensors |= sharded.read_whole(path, groups)
        except (LookupError, TypeError, ValueError) as error:
            raise UserError(f"checkpoint {path} cannot be used: {what_is_wrong(error)}; {WAY_OUT}") from None
    return Checkpoint(state["step"], state, tensors)


def read_tensors(path: Path, name: str) -> dict[str, Any]:
    """The tensors that `save` was given under `name`; none if there are none. The hashes of the checkpoint agree."""
    file = path / f"{name}.pt"
    if file.name not in _files(path):
        return {}
    found = _load(file, mmap=False)
    if not isinstance(found, dict):
        raise UserError(f"checkpoint {path} cannot be used: {file.name} is no list of tensors; {WAY_OUT}")
    return found


def what_is_wrong(error: Exception) -> str:
    """An error that content of a checkpoint has raised, in words."""
    return f"it lacks {error}" if isinstance(error, KeyError) else first_line(error)


def _load(file: Path, mmap: bool) -> Any:
    """The tensors in a file whose hash agrees."""
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError:
        reason = "it holds something that is no tensor"
    except Exception as error:  # a file that is no file of tensors can raise anything
        reason = first_line(error)
    raise UserError(f"{file} was not loaded: {reason}; {WAY_OUT}")


def read_state(path: Path) -> dict[str, Any]:
    """The plain data of a checkpoint, including its step. Raises UserError if they are not what `save` writes, or of
    another step than the folder's name says."""
    file = path / STATE
    try:
        state: dict[str, Any] = read_json(file)
    except UserError:
        raise UserError(f"checkpoint {path} cannot be used: {STATE} holds no plain data; {WAY_OUT}") from None
    check_version(file, state.get("schema_version"), SCHEMA_VERSION)
    step = state.get("step")
    if type(step) is not int or STEP_FOLDER.fullmatch(path.name) is None or step != _step(path):
        raise UserError(f"checkpoint {path} cannot be used: its {STATE} is of step {shortened(step)}; {WAY_OUT}")
    for name, is_right in _KINDS.items():
        if name in state and not is_right(state[name]):
            raise UserError(
                f"checkpoint {path} cannot be used: {name} in {STATE} is {shortened(state[name])}; {WAY_OUT}"
            )
    if state.get("row") is not None and state["row"]["step"] != step:
        raise UserError(
            f"checkpoint {path} cannot be used: row in {STATE} is of step {state['row']['step']}; {WAY_OUT}"
        )
    return state


def check_run(path: Path, state: dict[str, Any], run_ids: Collection[str]) -> None:
    """Raise UserError if the checkpoint at `path` with this `state` is of a run with another id than `run_ids`.
    Checkpoints of earlier versions do not name their run."""
    if (saved := state.get("run_id")) is not None and saved not in run_ids:
        raise UserError(f"checkpoint {path} is of the run {saved}, not of {' or '.join(run_ids)}; {WAY_OUT}")


class Fingerprints(TypedDict):
    """Fingerprints of the data that a run is trained on."""

    data_fingerprint: str
    tokenizer_fingerprint: str | None


def check_precision(state: dict[str, Any], precision: str, folder: Path) -> None:
    """Raise UserError unless the run in `folder` was computed in `precision` so far. Checkpoints of earlier versions do
    not say it."""
    if (then := state.get("precision", precision)) != precision:
        raise UserError(
            f"{folder} was computed in {then} so far, and compute.precision=auto means {precision} on this device; "
            f"continue it on a device of the kind that it was started on, or start a new run with another name="
        )


def fingerprints(data: PreparedData) -> Fingerprints:
    """The fingerprints of `data` that the state of a checkpoint stores."""
    return {"data_fingerprint": data.fingerprint, "tokenizer_fingerprint": data.tokenizer_fingerprint}


def check_same_data(state: dict[str, Any], data: PreparedData, folder: Path) -> None:
    """Raise UserError unless `data` is what the run in `folder` was trained on."""
    for key, now in fingerprints(data).items():
        if state.get(key) != now:
            raise UserError(
                f"{folder} was trained on other data: its {key} is {state.get(key)}, that of {data.folder} is {now}; "
                "restore the data, or start a new run with another name="
            )


def is_sharded(path: Path) -> bool:
    """Whether each rank wrote its part of the tensors of this checkpoint."""
    return (path / sharded.SHARDS).is_dir()


def _problem(path: Path) -> str | None:
    """What is wrong with a checkpoint folder, or None."""
    try:
        expected = _files(path)
    except UserError as error:
        return str(error)
    if STATE not in expected:
        return f"{STATE} is not in the manifest"
    for name, (size, digest) in expected.items():
        file = path / name
        try:
            if not file.is_file():
                return f"{shortened(name)} is missing"
            if file.stat().st_size != size:
                return f"{name} has {file.stat().st_size} bytes instead of {shortened(size)}"
            if _fingerprint(file)["sha256"] != digest:
                return f"the hash of {name} does not match"
        except (OSError, ValueError) as error:
            return f"{shortened(name)} cannot be read: {first_line(error)}"
    return next(
        (f"{file.name} is not in the manifest" for file in path.glob("*.pt") if file.name not in expected), None
    )


def _files(path: Path) -> dict[str, tuple[int, str]]:
    """The files in the manifest of a checkpoint, with sizes in bytes and hashes. Other files are ignored. Raises
    UserError if there is no manifest."""
    try:
        files = read_json(path / MANIFEST)["files"]
        return {name: (entry["bytes"], entry["sha256"]) for name, entry in files.items()}
    except (UserError, LookupError, TypeError, AttributeError):
        raise UserError(f"{MANIFEST} is missing or unreadable") from None


def _retain(folder: Path, config: CheckpointConfig) -> None:
    """Delete the checkpoints that `config` does not keep. A failure is a warning: the new checkpoint is saved."""
    kept_steps = set(config.keep_steps)
    others = [path for path in _step_folders(folder) if _step(path) not in kept_steps]
    for path in others[: -config.keep_last]:
        # Renamed first, because a process killed during the deletion must not leave a folder named like a checkpoint.
        doomed = path.with_suffix(".tmp")
        try:
            shutil.rmtree(doomed, ignore_errors=True)
            os.rename(path, doomed)
        except OSError as error:
            say(
                f"warning: the earlier checkpoint {path} cannot be deleted: {reason_of(error)}; the newer ones are "
                "saved, and the run goes on",
                errors=True,
            )
        shutil.rmtree(doomed, ignore_errors=True)


def by_step(folder: Path) -> dict[int, Path]:
    """Step -> checkpoint of a folder of checkpoints, oldest first. Damaged ones are among them."""
    return {_step(path): path for path in _step_folders(folder)}


def _step_folders(folder: Path) -> list[Path]:
    """Checkpoint folders by step, oldest first."""
    return sorted((path for path in folder.glob("step-*") if STEP_FOLDER.fullmatch(path.name)), key=_step)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _fingerprint(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": sha256_of(path)}


def _write(path: Path, fill: Callable[[BinaryIO], object]) -> None:
    with open(path, "wb") as file:
        fill(file)
        file.flush()
        os.fsync(file.fileno())
