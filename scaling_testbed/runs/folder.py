"""What a run leaves behind: config.yaml, environment.json, metrics.jsonl and result.json, and who mirrors them.

metrics.jsonl is the truth: one line per recorded step, flushed as it is written.
"""

import contextlib
import gzip
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import yaml

from scaling_testbed.config.sections import LoggingConfig
from scaling_testbed.errors import UserError
from scaling_testbed.files import write_json, write_text
from scaling_testbed.runs.lease import Lease, this_process

WANDB_START_SECONDS = 20  # how long the start of a run may wait for Weights & Biases


class RunFolder:
    """The files of one run. Used as a context manager it holds the folder: a second process is refused."""

    def __init__(self, path: Path):
        self.path = path
        self.checkpoints = path / "checkpoints"
        self._metrics = None
        self._held = False
        self._lease = Lease(path / "lock")

    def __enter__(self):
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lease.__enter__()
            self._held = True
        except OSError as error:
            raise UserError(f"cannot write the run folder {self.path}: {error.strerror}; set runs_dir=") from None
        return self

    def __exit__(self, *_):
        if self._metrics is not None:
            self._metrics.close()
        self._lease.__exit__()

    def result(self) -> dict[str, Any] | None:
        """The row, if this run has one that can be read: an object with at least a status."""
        with contextlib.suppress(OSError, ValueError):
            row = json.loads((self.path / "result.json").read_text())
            return row if isinstance(row, dict) and isinstance(row.get("status"), str) else None
        return None

    def last_job(self) -> str | None:
        """The Slurm job that started this run last, if any did."""
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError, AttributeError):
            return json.loads((self.path / "environment.json").read_text())["starts"][-1].get("job")
        return None

    def check_held(self) -> None:
        """Raise AlreadyRunning, before anything is written, if another process has taken over the folder."""
        if self._held:
            self._lease.check()

    def write_result(self, row: dict[str, Any]) -> None:
        """Replace the row. Raises AlreadyRunning as `check_held` does."""
        self.check_held()
        write_json(self.path / "result.json", _plain(row))

    def start(self, config: dict[str, Any], environment: dict[str, Any]) -> int:
        """Record the configuration and this start's environment; returns how often the run was started before."""
        write_text(self.path / "config.yaml", yaml.safe_dump(config, sort_keys=False))
        starts = []
        with contextlib.suppress(OSError, ValueError, KeyError):
            starts = json.loads((self.path / "environment.json").read_text())["starts"]
        write_json(self.path / "environment.json", {"starts": [*starts, environment]})
        return len(starts)

    def open_metrics(self, keep_before: int) -> list[dict[str, Any]]:
        """Open metrics.jsonl for appending and return its rows; those of step `keep_before` and later are dropped.

        They will be written again: after a kill the file may be ahead of the checkpoint that the run resumes from.
        """
        path = self.path / "metrics.jsonl"
        rows = [row for row in read_metrics(path) if row["step"] < keep_before]
        write_text(path, "".join(_line(row) for row in rows))
        self._metrics = open(path, "a")  # noqa: SIM115 (held as long as the folder)
        return rows

    def write_metrics(self, row: dict[str, Any]) -> None:
        """Append one line and flush it. Raises UserError when the disk refuses, AlreadyRunning as `check_held` does."""
        self.check_held()
        try:
            self._metrics.write(_line(row))
            self._metrics.flush()
        except OSError as error:
            raise UserError(f"cannot write {self.path / 'metrics.jsonl'}: {error.strerror}") from None


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl, or .jsonl.gz. A half-written line (a kill, a full disk) is said on stderr and left
    out."""
    rows = []
    if not path.exists():
        return rows
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    for number, line in enumerate(content.splitlines(), start=1):
        try:
            row = json.loads(line)
            row["step"] + 0
        except (ValueError, KeyError, TypeError):
            print(f"warning: {path}:{number} is no whole record and is left out", file=sys.stderr)
            continue
        rows.append(row)
    return rows


def environment(device: str, precision: str) -> dict[str, Any]:
    """Versions, machine, Slurm job and source state of this start. Nothing else of the environment variables."""
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "host": socket.gethostname(),
        "job": this_process().job,
        "device": device,
        "precision": precision,
        "platform": platform.platform(),
        "versions": versions(),
        "git": git_state(Path(__file__).resolve().parent),
    }


def versions() -> dict[str, str]:
    """Versions of what decides a number."""
    found = {"python": platform.python_version()}
    for package in ("torch", "triton", "numpy", "tokenizers", "scaling-testbed"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def git_state(folder: Path) -> dict[str, str | None]:
    """Commit of the source and a hash of what is changed on top of it (None where clean or not under git)."""

    def git(*arguments):
        return subprocess.run(["git", *arguments], cwd=folder, capture_output=True, timeout=10, check=True).stdout

    try:
        top = git("rev-parse", "--show-toplevel").decode().strip()
        tracked = git("ls-files", "--error-unmatch", str(Path(__file__).resolve()))
        commit = git("rev-parse", "HEAD").decode().strip()
        changes = git("-C", top, "diff", "HEAD") if tracked else b""
    except (OSError, subprocess.SubprocessError):
        return {"commit": None, "dirty": None}
    return {"commit": commit, "dirty": hashlib.sha256(changes).hexdigest()[:12] if changes else None}


class WandbMirror:
    """Sends records on to Weights & Biases, and can neither stop nor delay a run: every failure is one warning."""

    def __init__(self, config: LoggingConfig, folder: RunFolder, run_id: str, name: str, flat_config: dict[str, Any]):
        self._run = None
        if not config.wandb:
            return
        mode = config.wandb_mode
        if mode == "auto" and not _wandb_key():
            mode = "offline"
            print(f"wandb: no key found, recording offline under {folder.path}; `wandb sync` sends it later")
        self._run = self._guarded(
            lambda: _start_wandb(config, mode, folder.path, run_id, name, flat_config), WANDB_START_SECONDS
        )

    def log(self, row: dict[str, Any]) -> None:
        if self._run is not None:
            numbers = {key: value for key, value in row.items() if key != "step" and value is not None}
            self._guarded(lambda: self._run.log(numbers, step=row["step"]), 5)

    def finish(self, row: dict[str, Any]) -> None:
        if self._run is not None:
            summary = {key: row[key] for key in ("status", "val_loss", "val_bpb", "n_params", "n_tokens", "flops")}
            self._guarded(lambda: (self._run.summary.update(summary), self._run.finish()), 20)

    def _guarded(self, action, seconds: float):
        """Run `action` beside the run for at most `seconds`; after any trouble the mirror is off."""
        outcome: dict[str, Any] = {}

        def attempt():
            try:
                outcome["value"] = action()
            except BaseException as error:  # wandb raises its own kinds, SystemExit among them
                outcome["error"] = error

        thread = threading.Thread(target=attempt, daemon=True)
        thread.start()
        thread.join(seconds)
        if "value" in outcome:
            return outcome["value"]
        reason = str(outcome.get("error") or f"no answer in {seconds} s").splitlines()[0]
        print(f"warning: wandb is off for the rest of this run: {reason}", file=sys.stderr)
        self._run = None
        return None


def _start_wandb(config: LoggingConfig, mode: str, folder: Path, run_id: str, name: str, flat_config: dict[str, Any]):
    import wandb

    return wandb.init(
        project=config.project,
        entity=config.entity,
        group=config.group or name,
        id=run_id,
        name=run_id,
        dir=str(folder),
        config=flat_config,
        mode=None if mode == "auto" else mode,
        resume="allow",
        save_code=False,
        settings=wandb.Settings(init_timeout=15, silent=True),
    )


def _wandb_key() -> bool:
    """Whether wandb would find a key: in its variable or in the netrc file."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    netrc = Path(os.environ.get("NETRC", Path.home() / ".netrc"))
    with contextlib.suppress(OSError):
        return "wandb" in netrc.read_text()
    return False


def _line(row: dict[str, Any]) -> str:
    return json.dumps(_plain(row)) + "\n"


def _plain(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become null."""
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
