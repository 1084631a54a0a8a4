"""Where the Triton kernels can run. This module does not import triton, so that it works without triton."""

from __future__ import annotations

import contextlib
import importlib.util
import os

import torch

# From 3.10 on, Triton fuses multiply and add only if this is set. The kernels were checked with fusion. Triton reads
# the variable when it is imported.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

# Whether the kernels run in Triton's interpreter, slowly on the CPU. Triton reads this when a kernel is defined.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")

OLDEST_CAPABILITY = (8, 0)  # bf16 tensor cores
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def why_not(device: torch.device) -> str | None:
    """The reason why the Triton kernels cannot run on `device`, for an error message; None if they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device.type == "cuda":
        if INTERPRETED:
            return "TRITON_INTERPRET is set, which is for CPUs"
        if torch.cuda.get_device_capability(device) < OLDEST_CAPABILITY:
            return f"{torch.cuda.get_device_name(device)} is older than compute capability 8.0"
        return None
    if device.type == "cpu" and INTERPRETED:
        return None
    return f"it needs a CUDA GPU, not {device.type} (with TRITON_INTERPRET=1 a CPU can, slowly, for tests)"


def on_device(x: torch.Tensor) -> contextlib.AbstractContextManager:
    """A context in which the device of `x` is the current device, on which Triton launches."""
    return torch.cuda.device_of(x) if x.is_cuda else contextlib.nullcontext()


def require(x: torch.Tensor, what: str) -> None:
    """Raise RuntimeError that names `what` if `x` is neither on a GPU nor on a CPU under Triton's interpreter.

    The check is cheap. It does not check the kind of GPU; `why_not` does so once, when a path is chosen.
    """
    if not (x.is_cuda or INTERPRETED):
        raise RuntimeError(f"{what} cannot run: {why_not(x.device)}")
