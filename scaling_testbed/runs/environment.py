"""The environment of each start of a run: installed versions, machine, driver, Slurm job and state of the source.

The source can be had again from the records of a run: the commit and the uncommitted changes, or, where the source is
not under git, as in an image or from a wheel, an archive of it. The same holds for plug-ins.
"""

import contextlib
import gzip
import hashlib
import importlib.metadata
import io
import json
import os
import platform
import re
import socket
import subprocess
import tarfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scaling_testbed.errors import UserError
from scaling_testbed.files import check_version, read_json, write_bytes, write_json
from scaling_testbed.plugins import Plugin, plugins_of
from scaling_testbed.progress import say
from scaling_testbed.runs.lease import this_process

SCHEMA_VERSION = 1  # of environment.json; files without a version are read too
RECORD = "environment.json"
LONGEST_PLAIN, LONGEST_KEPT = (
    1 << 20,
    1 << 28,
)  # bytes of a diff: a longer one is compressed; of the longest only its hash
SOURCES = ("scaling_testbed", "kernels", "configs")  # the diff includes new files in these folders
DRIVER_FILE, PROCESSOR_FILE = Path("/proc/driver/nvidia/version"), Path("/proc/cpuinfo")
COMMIT_VARIABLE = "SCALING_TESTBED_COMMIT"  # of an image that was built without .git
PACKAGE = Path(__file__).resolve().parents[1]
# Variables by which PyTorch's libraries compute in other precisions or orders. None of them is a secret.
ARITHMETIC = (
    *("NVIDIA_TF32_OVERRIDE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "CUBLAS_WORKSPACE_CONFIG", "NCCL_ALGO", "NCCL_PROTO"),
    *("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "ONEDNN_DEFAULT_FPMATH_MODE", "DNNL_MAX_CPU_ISA"),
    *("DNNL_DEFAULT_FPMATH_MODE", "MKL_CBWR", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "TRITON_INTERPRET"),
)


def environment(device: str, precision: str, plugins: Sequence[str] = ()) -> dict[str, Any]:
    """Describe this start of a run with these plug-ins: machine, driver, Slurm job and state of the source.

    `record_start` stores the entries `installed` and `files` once for all starts. `files` has names and contents of
    files that the record needs. No environment variable is recorded but those of ARITHMETIC.
    """
    git, files = source_state()
    loaded = plugins_of(plugins)
    for plugin in loaded:
        files |= _archive_of(plugin)
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "host": socket.gethostname(),
        "job": this_process().job,
        "device": device,
        "precision": precision,
        "platform": platform.platform(),
        "processor": processor(),
        "driver": driver(),
        "versions": versions(),
        "variables": {name: os.environ[name] for name in ARITHMETIC if name in os.environ},
        "plugins": [plugin.record() for plugin in loaded],
        "git": git,
        "installed": installed(),
        "files": files,
    }


def record_start(folder: Path, start: dict[str, Any]) -> int:
    """Add a start, as `environment` returns it, to environment.json in a run's folder. Returns the number of earlier
    starts.

    Each list of installed versions is stored once under its hash, and the starts refer to it. The files of a start have
    their hash in their names. So a run that is started many times repeats none. A record that cannot be read is kept
    as environment.damaged.json. Raises UserError if a newer version has written it.
    """
    path = folder / RECORD
    starts, lists = _earlier(path)
    packages = start["installed"]
    entry = {key: value for key, value in start.items() if key != "files"} | {"installed": _hash(json.dumps(packages))}
    for name, content in start.get("files", {}).items():
        if not (folder / name).exists():
            write_bytes(folder / name, content)
    found = {"starts": [*starts, entry], "installed": {**lists, entry["installed"]: packages}}
    write_json(path, {"schema_version": SCHEMA_VERSION, **found})
    return len(starts)


def _earlier(path: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The starts and the lists of installed versions in an environment.json."""
    known = {}
    try:
        known = read_json(path)
    except FileNotFoundError:
        return [], {}
    except UserError:  # it is damaged
        pass
    check_version(path, known.get("schema_version"), SCHEMA_VERSION)
    with contextlib.suppress(LookupError, TypeError, AttributeError):
        starts, lists = [*known["starts"]], {**known.get("installed", {})}
        if all(isinstance(start, dict) for start in starts):
            return starts, lists
    aside = path.with_suffix(".damaged.json")
    say(f"warning: {path} is damaged; it is kept as {aside.name}, and the record of earlier starts ends", errors=True)
    with contextlib.suppress(OSError):
        os.replace(path, aside)
    return [], {}


def source_change(folder: Path) -> str | None:
    """How the source, the versions and the variables of the last start in a run's folder differ from those of the start
    before, or None."""
    starts, _ = _earlier(folder / RECORD)
    sources = [start["git"] for start in starts[-2:] if isinstance(start.get("git"), dict)]
    said = [
        " with changes ".join(filter(None, (_text(git, "commit", "files"), _text(git, "dirty")))) for git in sources
    ]
    found = [f"{said[0]} then, {said[1]} now"] if len(said) == 2 and said[0] != said[1] else []
    then, now = ([start.get("versions") for start in starts[-2:]] + [None, None])[:2]
    if isinstance(then, dict) and isinstance(now, dict):
        names = [name for name in now if name in then and then[name] != now[name]]
        found += [f"{name} {str(then[name])[:20]} then, {str(now[name])[:20]} now" for name in names]
    before, after = ([start.get("variables") for start in starts[-2:]] + [None, None])[:2]
    if isinstance(before, dict) and isinstance(after, dict):
        changed = [name for name in ARITHMETIC if before.get(name) != after.get(name)]
        names = [name for name in changed if not name.endswith("_NUM_THREADS")]  # each slot of a sweep has its own
        found += [f"{name} {before.get(name, 'unset')} then, {after.get(name, 'unset')} now" for name in names]
    return "; ".join(found) or None


def _text(git: Mapping[str, Any], *names: str) -> str | None:
    found = next((git[name] for name in names if git.get(name)), None)
    return found if found is None else str(found)[:12]


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


def processor() -> dict[str, Any]:
    """The model of the processor, the cores that this process may use, and the instructions and threads that PyTorch
    uses. Both can change the last bits of a sum."""
    import torch

    model = None
    with contextlib.suppress(OSError):
        match = re.search(
            r"^(?:model name|cpu model|Processor|uarch)\s*:\s*(.+)$", PROCESSOR_FILE.read_text(), re.MULTILINE
        )
        model = match and match[1]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "model": model or platform.processor() or platform.machine(),
        "cores": cores,
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }


def driver() -> dict[str, str | None] | None:
    """Versions of the NVIDIA driver, and of CUDA, cuDNN and NCCL as this PyTorch uses them; None without any."""
    import torch

    found = cudnn = nccl = None
    with contextlib.suppress(OSError):
        match = re.search(r"\s(\d+\.\d[\d.]*)\s", DRIVER_FILE.read_text())
        found = match and match[1]
    if torch.version.cuda:
        with contextlib.suppress(RuntimeError):  # versions at run and at build time do not go together
            cudnn = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
        with contextlib.suppress(AttributeError, RuntimeError):  # a build without NCCL
            nccl = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
    known = {"nvidia": found, "cuda": torch.version.cuda, "cudnn": cudnn and str(cudnn), "nccl": nccl}
    return known if any(known.values()) else None


def source_state() -> tuple[dict[str, Any], dict[str, bytes]]:
    """The state of the source, and the files from which it can be had again, by name.

    Under git: the commit, and the hash and length of the uncommitted changes, which are a diff that includes new
    sources. `git apply` in the commit gives them back. Else: the commit of the image or of the installed package, where
    it is known, and the hash of the files of the package, which are an archive.
    """
    try:
        commit, changes = _git_state()
    except (OSError, subprocess.SubprocessError):
        contents = {path.relative_to(PACKAGE.parent).as_posix(): path.read_bytes() for path in _source_files(PACKAGE)}
        archive, name = _archive(contents)
        of_package = os.environ.get(COMMIT_VARIABLE) or _commit_of_installation()
        return {"commit": of_package, "dirty": None, "files": name}, {f"source-{name}.tar.gz": archive}
    if not changes:
        return {"commit": commit, "dirty": None}, {}
    dirty = _hash(changes)
    state = {"commit": commit, "dirty": dirty, "diff_length": len(changes)}
    if len(changes) > LONGEST_KEPT:
        say(
            f"warning: the uncommitted changes have {len(changes):,} bytes and are not kept, only their hash",
            errors=True,
        )
        return state, {}
    short = len(changes) <= LONGEST_PLAIN
    name = f"uncommitted-{dirty}.diff" + ("" if short else ".gz")
    return {**state, "diff": name}, {name: changes if short else gzip.compress(changes, mtime=0)}


def _git_state() -> tuple[str, bytes]:
    """The commit of the source and its uncommitted changes. Raises OSError or SubprocessError without git."""
    # A repository of another user, as in a container, and settings of a user that change the form of a diff.
    settings = ("safe.directory=*", "diff.noprefix=false", "diff.mnemonicPrefix=false", "core.quotePath=true")
    options = [word for setting in settings for word in ("-c", setting)]
    form = ("--no-color", "--no-ext-diff", "--no-textconv", "--binary")
    own = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}

    def git(*arguments: str, may_differ: bool = False) -> bytes:
        ran = subprocess.run(["git", *options, *arguments], cwd=PACKAGE, capture_output=True, timeout=30, env=own)
        if ran.returncode and not (may_differ and ran.returncode == 1):
            raise OSError(f"git {arguments[0]} ended with {ran.returncode}")
        return ran.stdout

    top = git("rev-parse", "--show-toplevel").decode().removesuffix("\n")
    git("ls-files", "--error-unmatch", str(PACKAGE / "__init__.py"))
    commit = git("rev-parse", "HEAD").decode().strip()
    changes = git("-C", top, "diff", *form, "HEAD")
    sources = [str(PACKAGE.parent / name) for name in SOURCES]
    listed = git("-C", top, "ls-files", "-z", "--others", "--exclude-standard", "--", *sources)
    for path in filter(None, listed.split(b"\0")):
        name = os.fsdecode(path)
        changes += git("-C", top, "diff", *form, "--no-index", "--", os.devnull, name, may_differ=True)
    return commit, changes


def _commit_of_installation() -> str | None:
    """The commit that pip has installed the package from (PEP 610), or None."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError, ValueError, LookupError, TypeError):
        found = importlib.metadata.distribution("scaling-testbed")
        if Path(str(found.locate_file("scaling_testbed"))).resolve() == PACKAGE:
            commit = json.loads(found.read_text("direct_url.json") or "{}")["vcs_info"]["commit_id"]
            return commit if isinstance(commit, str) else None
    return None


def _archive_of(plugin: Plugin) -> dict[str, bytes]:
    """An archive of the source of a plug-in and of what it imports, by its name."""
    origin = Path(plugin.origin)
    files = [origin] if origin.is_file() else sorted(origin.rglob("*.py"))
    files += map(Path, plugin.imports)
    top = os.path.commonpath([origin.parent, *(path.parent for path in files)])
    with contextlib.suppress(OSError):  # it was deleted after it was loaded
        contents = {path.relative_to(top).as_posix(): path.read_bytes() for path in files}
        archive, name = _archive(contents)
        return {f"plugin-{origin.stem}-{name}.tar.gz": archive}
    return {}


def _source_files(folder: Path) -> list[Path]:
    """The files of a folder and of folders that it links to, without what Python has compiled."""
    found = [Path(place) / name for place, _, names in os.walk(folder, followlinks=True) for name in names]
    return sorted(path for path in found if "__pycache__" not in path.parts and path.is_file())


def _archive(contents: Mapping[str, bytes]) -> tuple[bytes, str]:
    """A tar.gz of these files, the same whenever they are the same, and the hash of their names and contents."""
    packed, digest = io.BytesIO(), hashlib.sha256()
    with gzip.GzipFile(fileobj=packed, mode="wb", mtime=0) as outer, tarfile.open(fileobj=outer, mode="w") as tar:
        for name, content in sorted(contents.items()):
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
            digest.update(f"{name}\0{len(content)}\0".encode("utf-8", "surrogateescape") + content)
    return packed.getvalue(), digest.hexdigest()[:12]


def _hash(content: str | bytes) -> str:
    content = content.encode() if isinstance(content, str) else content
    return hashlib.sha256(content).hexdigest()[:12]
