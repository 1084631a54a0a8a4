"""The environment of each start of a run: installed versions, machine, driver, Slurm job and state of the source."""

import contextlib
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scaling_testbed.files import write_json, write_text
from scaling_testbed.plugins import plugins_of
from scaling_testbed.runs.lease import this_process

LONGEST_DIFF = 1 << 20  # characters; of a longer diff only hash and length are kept
SOURCES = ("scaling_testbed", "kernels", "configs")  # the diff includes new files in these folders
DRIVER_FILE = Path("/proc/driver/nvidia/version")
COMMIT_VARIABLE = "SCALING_TESTBED_COMMIT"  # of an image that was built without .git


def environment(device: str, precision: str, plugins: Sequence[str] = ()) -> dict[str, Any]:
    """Describe this start of a run with these plug-ins: machine, driver, Slurm job and state of the source.

    `record_start` stores the entries `installed` and `diff` once for all starts. Other environment variables are not
    recorded.
    """
    git, diff = git_state(Path(__file__).resolve().parent)
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "host": socket.gethostname(),
        "job": this_process().job,
        "device": device,
        "precision": precision,
        "platform": platform.platform(),
        "driver": driver(),
        "versions": versions(),
        "plugins": [plugin.record() for plugin in plugins_of(plugins)],
        "git": git,
        "installed": installed(),
        "diff": diff,
    }


def record_start(folder: Path, start: dict[str, Any]) -> int:
    """Add a start, as `environment` returns it, to environment.json in a run's folder. Returns the number of earlier
    starts.

    Each list of installed versions is stored once under its hash, and the starts refer to it. Uncommitted changes are
    stored as uncommitted-HASH.diff beside the file. So a run that is started many times repeats neither.
    """
    path = folder / "environment.json"
    starts, lists = [], {}
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError, AttributeError):
        known = json.loads(path.read_text())
        starts, lists = [*known["starts"]], {**known.get("installed", {})}
    packages, diff = start["installed"], start["diff"]
    start = {key: value for key, value in start.items() if key != "diff"} | {"installed": _hash(json.dumps(packages))}
    if diff is not None and len(diff) <= LONGEST_DIFF:
        name = f"uncommitted-{start['git']['dirty']}.diff"
        start["git"] = {**start["git"], "diff": name}
        if not (folder / name).exists():
            write_text(folder / name, diff)
    write_json(path, {"starts": [*starts, start], "installed": {**lists, start["installed"]: packages}})
    return len(starts)


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that can change a number."""
    found = {"python": platform.python_version()}
    for package in ("torch", "triton", "numpy", "tokenizers", "scaling-testbed"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def installed() -> dict[str, str]:
    """The version of every distribution that can be imported, by name."""
    found: dict[str, str] = {}
    for distribution in importlib.metadata.distributions():
        # `distribution.metadata` parses the whole file, including the description, and takes ten times as long.
        head = distribution.read_text("METADATA") or distribution.read_text("PKG-INFO") or ""
        name, version = (re.search(rf"^{key}: *(\S+)", head, re.MULTILINE) for key in ("Name", "Version"))
        if name and version:
            found.setdefault(name[1].lower(), version[1])  # Python imports the first of several
    return dict(sorted(found.items()))


def driver() -> dict[str, str | None] | None:
    """Versions of the NVIDIA driver, and of CUDA as this PyTorch was built with; None without either."""
    import torch

    found = None
    with contextlib.suppress(OSError):
        match = re.search(r"\s(\d+\.\d[\d.]*)\s", DRIVER_FILE.read_text())
        found = match and match[1]
    return {"nvidia": found, "cuda": torch.version.cuda} if found or torch.version.cuda else None


def git_state(folder: Path) -> tuple[dict[str, Any], str | None]:
    """Commit of the source, with hash and length of the uncommitted changes, and these changes as a diff that includes
    new sources. The diff is None if nothing is changed or the source is not under git.

    If the source is not under git, the commit is the value of COMMIT_VARIABLE, if it is set.
    """

    def git(*arguments: str, may_differ: bool = False) -> bytes:
        ran = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, timeout=10)
        if ran.returncode and not (may_differ and ran.returncode == 1):
            raise OSError(f"git {arguments[0]} ended with {ran.returncode}")
        return ran.stdout

    try:
        top = git("rev-parse", "--show-toplevel").decode().strip()
        tracked = git("ls-files", "--error-unmatch", str(Path(__file__).resolve()))
        commit = git("rev-parse", "HEAD").decode().strip()
        changes = git("-C", top, "diff", "--no-ext-diff", "HEAD") if tracked else b""
        listed = git("-C", top, "ls-files", "-z", "--others", "--exclude-standard", "--", *SOURCES) if tracked else b""
        for path in filter(None, listed.split(b"\0")):
            changes += git("-C", top, "diff", "--no-index", "--", os.devnull, os.fsdecode(path), may_differ=True)
    except (OSError, subprocess.SubprocessError):
        return {"commit": os.environ.get(COMMIT_VARIABLE) or None, "dirty": None}, None
    if not changes:
        return {"commit": commit, "dirty": None}, None
    diff = changes.decode(errors="replace")
    return {"commit": commit, "dirty": _hash(changes), "diff_length": len(diff)}, diff


def _hash(content: str | bytes) -> str:
    content = content.encode() if isinstance(content, str) else content
    return hashlib.sha256(content).hexdigest()[:12]
