"""A GPU whose kernels do nothing, for a CUDA build of PyTorch on a machine without a GPU.

runtime.c and libraries.c take the place of CUDA's libraries. PyTorch and Triton then run as on an H100: they choose
kernels, allocate, launch, copy and wait. Only the numbers are missing. `build` and `environment` are for the process
that starts another one with the stand-in. The rest is for that other process.
"""

import contextlib
import ctypes
import os
import subprocess
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
LIBRARY = "libcuda.so.1"
# As in stand_in.h.
COUNTERS = ("launches", "products", "collectives", "graphs", "to_device", "to_host", "within", "fills", "waits")
COUNTERS += ("allocations",)
N_NOTED = 4096
LAUNCHES = ("launches", "products", "collectives", "graphs", "within", "fills")  # what the host queues on the GPU
PACKAGE = f"{ROOT}/scaling_testbed/"


def build(python: str, folder: Path) -> str | None:
    """Compile the stand-in into `folder`, for the PyTorch of the interpreter `python`. Returns why not, or None."""
    code = "import sysconfig, torch; assert torch.version.cuda, 'its PyTorch is for CPUs'; "
    code += "print(sysconfig.get_path('purelib'))"
    asked = subprocess.run([python, "-c", code], capture_output=True, text=True)
    if asked.returncode:
        return (asked.stderr.strip() or "it cannot be started").splitlines()[-1]
    site = Path(asked.stdout.strip())
    # The headers of CUDA's package lack the folder crt, which triton has.
    headers = [*site.glob("nvidia/cu*/include"), site / "triton/backends/nvidia/include"]
    command = ["cc", "-shared", "-fPIC", "-O1", "-w", f"-Wl,-soname,{LIBRARY}", "-o", str(folder / LIBRARY)]
    command += [option for path in headers for option in ("-isystem", str(path))]
    command += [str(HERE / "runtime.c"), str(HERE / "libraries.c"), "-ldl"]
    try:
        made = subprocess.run(command, capture_output=True, text=True)
    except OSError:
        return "there is no C compiler (cc)"
    return made.stderr.strip() or None


def environment(folder: Path) -> dict[str, str]:
    """The environment of a process that has the stand-in that `build` has put into `folder`."""
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return inherited | {
        "LD_PRELOAD": str(folder / LIBRARY),
        "TRITON_LIBCUDA_PATH": str(folder),
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }


# ------------------------------------------------------------------------------------------- in the other process


def counts() -> Counter[str]:
    """What this process has asked of the stand-in so far, by the names of COUNTERS."""
    numbers = (ctypes.c_long * len(COUNTERS)).in_dll(ctypes.CDLL(None), "stand_in_counters")
    return Counter(dict(zip(COUNTERS, numbers, strict=True)))


def launches(counted: Counter[str]) -> int:
    return sum(counted[name] for name in LAUNCHES)


def collectives(since: Counter[str]) -> list[float]:
    """For each collective after the count `since`, the part of the kernels since then that were launched before it."""
    now, noted = counts(), (ctypes.c_long * N_NOTED).in_dll(ctypes.CDLL(None), "stand_in_collectives")
    first, last = (count["launches"] + count["products"] for count in (since, now))
    numbers = range(since["collectives"], now["collectives"])
    return [(noted[number % N_NOTED] - first) / (last - first) for number in numbers]


@contextlib.contextmanager
def places_of_waits() -> Iterator[Counter[str]]:
    """Count by line the places in the package at which the host waits for the GPU."""
    found: Counter[str] = Counter()

    def note() -> None:
        stack = [frame for frame in traceback.extract_stack() if frame.filename.startswith(PACKAGE)]
        place = stack[-1] if stack else None
        found[f"{place.filename.removeprefix(PACKAGE)}: {place.line}" if place else "outside of the package"] += 1

    call = ctypes.CFUNCTYPE(None)
    slot = call.in_dll(ctypes.CDLL(None), "stand_in_on_wait")
    kept = call(note)
    ctypes.memmove(ctypes.addressof(slot), ctypes.addressof(kept), ctypes.sizeof(ctypes.c_void_p))
    try:
        yield found
    finally:
        ctypes.memset(ctypes.addressof(slot), 0, ctypes.sizeof(ctypes.c_void_p))


def complete() -> None:
    """Do what the libraries of the stand-in cannot, before anything is computed."""
    _replace_cudnn_attention()
    _count_one_token_a_batch()


def _count_one_token_a_batch() -> None:
    """An evaluation divides by the tokens that the GPU has counted, which here are none."""
    import torch

    tolist = torch.Tensor.tolist

    def counted(values):
        found = tolist(values)
        return [[x or 1.0 for x in row] for row in found] if values.is_cuda and values.ndim == 2 else found

    torch.Tensor.tolist = counted


def _replace_cudnn_attention() -> None:
    """Let cuDNN's attention only allocate its results, and count as one launch. cuDNN itself needs a GPU."""
    import torch
    from torch.utils._pytree import tree_map_only

    warnings.filterwarnings("ignore", "Warning only once for all operators")
    library = ctypes.CDLL(None)
    registered = torch.library.Library("aten", "IMPL")
    _kept.append(registered)

    def stand_in(operator):
        @torch.compiler.disable
        def call(*args, **kwargs):
            args, kwargs = tree_map_only(torch.Tensor, lambda x: x.to("meta"), (args, kwargs))
            library.stand_in_count(COUNTERS.index("launches"))
            return tree_map_only(torch.Tensor, lambda x: torch.empty_like(x, device="cuda"), operator(*args, **kwargs))

        return call

    for name in ("_scaled_dot_product_cudnn_attention", "_scaled_dot_product_cudnn_attention_backward"):
        registered.impl(name, stand_in(getattr(torch.ops.aten, name).default), "CUDA", allow_override=True)


_kept: list = []  # what must live as long as the process
