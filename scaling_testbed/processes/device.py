"""The hardware of a run: device, precision, determinism, and the peak FLOP/s that utilisation is relative to."""

import contextlib
import functools
import os
import re
import resource
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from scaling_testbed.config.sections import ComputeConfig
from scaling_testbed.errors import ConfigError

# Dense bf16 tensor-core peak in FLOP/s from NVIDIA's data sheets (without sparsity). A line fits a device whose name
# has all its words; the first line that fits counts.
PEAK_BF16_FLOPS = {
    "GB200": 2500e12,
    "B200": 2250e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "GH200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10": 125e12,
    "GeForce RTX 4090": 165e12,
}
OTHER_PEAK = {"Laptop", "D", "MIG"}  # words that mark another card, or a part of one


def choose_device(config: ComputeConfig, local_rank: int = 0) -> torch.device:
    """The device of a run. Raises ConfigError if compute.device names one that is not available."""
    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("compute.device=cuda, but PyTorch sees no GPU here; use compute.device=auto")
    if name == "cuda" and local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"process {local_rank + 1} of this machine has no GPU: PyTorch sees {torch.cuda.device_count()}; start one "
            "process for each GPU"
        )
    if name == "mps" and not torch.backends.mps.is_available():
        raise ConfigError("compute.device=mps, but PyTorch sees no Apple GPU here; use compute.device=auto")
    return torch.device(name, local_rank) if name == "cuda" else torch.device(name)


def choose_precision(config: ComputeConfig, device: torch.device) -> str:
    """The precision of a run, fp32 or bf16. Raises ConfigError if the GPU does not support bf16."""
    has_bf16 = device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    if config.precision == "bf16" and not has_bf16:
        raise ConfigError(
            f"compute.precision=bf16, but {torch.cuda.get_device_name(device)} does not support it; use fp32"
        )
    if config.precision == "auto":
        return "bf16" if device.type == "cuda" and has_bf16 else "fp32"
    return config.precision


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager:
    """Context in which matrix products are in bf16 if `precision` is bf16. Parameters stay in fp32."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")


def configure_torch(config: ComputeConfig) -> None:
    """Set threads and determinism for the whole process, whatever an earlier run in it has set. Must be called before
    the first kernel runs."""
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    # Denormal numbers make a CPU a hundred times slower. Adam's moments have many of them, and they do not matter.
    torch.set_flush_denormal(True)
    torch.use_deterministic_algorithms(config.deterministic)
    # Of the kernels of attention on a GPU, only flash and the plain one have a deterministic backward pass.
    torch.backends.cuda.enable_cudnn_sdp(not config.deterministic)
    torch.backends.cuda.enable_mem_efficient_sdp(not config.deterministic)
    # Filling would write each new buffer once more, such as those of logits. Nothing here reads a buffer before it is
    # written.
    torch.utils.deterministic.fill_uninitialized_memory = not config.deterministic  # type: ignore[attr-defined]
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def to_device(rows: np.ndarray, device: torch.device) -> torch.Tensor:
    """Token ids as an int64 tensor on `device`, other numbers in their own type. To a GPU whole numbers travel as
    int32, and are int64 there. They come from pinned memory, and the host does not wait for them."""
    tokens = torch.from_numpy(rows)
    if device.type != "cuda":
        return tokens.to(device)
    if tokens.is_floating_point():
        return tokens.pin_memory().to(device, non_blocking=True)
    return tokens.to(torch.int32).pin_memory().to(device, non_blocking=True).long()


def in_fp64(values: torch.Tensor) -> torch.Tensor:
    """`values` in fp64; on the host if they are on an Apple GPU, which has no fp64."""
    return (values.cpu() if values.device.type == "mps" else values).double()


class HostCopy:
    """A copy of a small tensor in the memory of the host. It begins at once; `read` waits for it."""

    def __init__(self, values: torch.Tensor):
        self._done = None
        if values.device.type != "cuda":
            self._copy = values.clone()
            return
        self._copy = torch.empty_like(values, device="cpu", pin_memory=True)
        self._copy.copy_(values, non_blocking=True)
        self._done = torch.cuda.Event()
        self._done.record()

    def read(self) -> list[float]:
        if self._done is not None:
            self._done.synchronize()
        return self._copy.tolist()


@contextlib.contextmanager
def on_side_stream(device: torch.device) -> Iterator[None]:
    """Context manager for work on another stream of a GPU, between the work before and after it. PyTorch asks for it
    before a capture (its notes on CUDA graphs). It is the same stream each time, because PyTorch keeps the memory of
    each stream for this stream."""
    if device.type != "cuda":
        yield
        return
    side, here = _side_stream(device), torch.cuda.current_stream(device)
    side.wait_stream(here)
    with torch.cuda.stream(side):
        yield
    here.wait_stream(side)


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def device_name(device: torch.device) -> str:
    """The product name of a GPU, or of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as lines:
        for line in lines:
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return device.type


def peak_flops(device: torch.device, precision: str) -> float | None:
    """The device's peak in FLOP/s for this precision; None where it is not known (all but bf16 on listed GPUs)."""
    if device.type != "cuda" or precision != "bf16":
        return None
    words = set(re.split(r"[ -]", device_name(device)))
    if words & OTHER_PEAK:
        return None
    return next((peak for name, peak in PEAK_BF16_FLOPS.items() if words.issuperset(name.split())), None)


def free_memory_bytes(device: torch.device, n_processes: int = 1) -> int | None:
    """The memory in bytes that each of `n_processes` on this machine can still use; None if it is not known.

    On a CPU the least of: what the kernel says is available, what is left of the limits of the control groups of this
    process, each divided by the number of processes, and what is left of the process's limit of address space.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    shared = [left for left in (_available(), *_left_in_cgroups()) if left is not None]
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    own = [] if limit == resource.RLIM_INFINITY else [limit - _address_space()]
    found = [left // n_processes for left in shared] + own
    return max(0, min(found)) if found else None


def _available() -> int | None:
    with contextlib.suppress(OSError), open("/proc/meminfo") as lines:
        for line in lines:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    with contextlib.suppress(ValueError, OSError):  # not on Linux
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def _address_space() -> int:
    with contextlib.suppress(OSError):
        return int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    return 0


def _left_in_cgroups() -> Iterator[int]:
    """What is left of each limit of memory that the control groups of this process have, of version 1 and 2. Files in
    the page cache count as left, because the kernel gives them up."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, group = line.split(":", 2)
            if controllers == "":
                root, limit, usage, cached = Path("/sys/fs/cgroup"), "memory.max", "memory.current", "inactive_file"
            elif "memory" in controllers.split(","):
                root, limit = Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"
                usage, cached = "memory.usage_in_bytes", "total_inactive_file"
            else:
                continue
            inner = root / group.lstrip("/")
            for folder in {root, inner, *(up for up in inner.parents if up.is_relative_to(root))}:
                with contextlib.suppress(OSError, ValueError):  # "max", or no such folder in a container
                    most = int((folder / limit).read_text())
                    used = int((folder / usage).read_text())
                    stat = dict(entry.split() for entry in (folder / "memory.stat").read_text().splitlines())
                    yield most - used + int(stat.get(cached, 0))


def peak_memory_bytes(device: torch.device) -> int:
    """The largest memory so far, in bytes: allocated on the GPU, or resident in the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
