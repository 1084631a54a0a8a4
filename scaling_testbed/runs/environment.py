"""Where and from what a run was started: versions, machine, Slurm job and the state of the source."""

import contextlib
import hashlib
import importlib.metadata
import platform
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

from scaling_testbed.plugins import loaded_plugins
from scaling_testbed.runs.lease import this_process


def environment(device: str, precision: str) -> dict[str, Any]:
    """Versions, machine, Slurm job, plug-ins and source state of this start. Of the environment variables nothing
    else."""
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "host": socket.gethostname(),
        "job": this_process().job,
        "device": device,
        "precision": precision,
        "platform": platform.platform(),
        "versions": versions(),
        "plugins": [plugin.record() for plugin in loaded_plugins()],
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
