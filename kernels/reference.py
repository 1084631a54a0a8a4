"""What the definitions of several kernels share. "Wide" is fp32, or the input's own type where that is wider (fp64 in
tests)."""

from __future__ import annotations

import contextlib

import torch


def wide(x: torch.Tensor) -> torch.Tensor:
    """`x` in fp32, or untouched where it is fp32 or wider already."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def softcap_scores(scores: torch.Tensor, softcap: float | None) -> torch.Tensor:
    """Bound `scores` smoothly to (-softcap, softcap): s tanh(x / s) (Gemma 2, arXiv 2408.00118, section 2).
    None leaves them alone."""
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)


def without_autocast(device_type: str):
    """A context in which products are computed in their inputs' type."""
    if device_type == "meta":  # which torch.compile can tell from the others, unlike is_autocast_available in 2.11
        return contextlib.nullcontext()
    return torch.autocast(device_type, enabled=False)
