"""Triton has no wheels for some systems: there only the definitions and the chunked head are tested."""

import importlib.util

import torch

collect_ignore = []
if importlib.util.find_spec("triton") is None:
    folders = ("attention/test_triton.py", "cross_entropy/test_chunked_and_triton.py", "qk_norm_rope/test_triton.py")
    collect_ignore = ["test_compiled.py", *folders]


def random(*shape, dtype=torch.float64, seed=0):
    """Normal numbers, the same each time."""
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)
