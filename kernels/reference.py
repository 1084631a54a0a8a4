"""Functions that the reference definitions of several kernels share.

"Wide" is fp32, or the input's own type if that is wider (fp64 in tests).
"""

from __future__ import annotations

import contextlib

import torch


def wide(x: torch.Tensor) -> torch.Tensor:
    """`x` in fp32, or unchanged if it is fp32 or wider already."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def softcap_scores(scores: torch.Tensor, softcap: float | None) -> torch.Tensor:
    """Bound `scores` smoothly to (-softcap, softcap): s tanh(x / s) (Gemma 2, arXiv 2408.00118, section 2).
    None leaves them unchanged."""
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)


def without_autocast(device_type: str):
    """A context in which matrix products are computed in the type of their inputs."""
    # torch.compile can trace this comparison. In torch 2.11 it cannot trace torch.amp.is_autocast_available.
    if device_type == "meta":
        return contextlib.nullcontext()
    return torch.autocast(device_type, enabled=False)
