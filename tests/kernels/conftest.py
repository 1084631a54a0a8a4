"""Triton has no wheels for some systems: there only the definitions and the chunked head are tested."""

import importlib.util

import pytest
import torch

from tests.conftest import KERNEL_DEVICE

collect_ignore = []
if importlib.util.find_spec("triton") is None:
    folders = ("attention/test_triton.py", "cross_entropy/test_chunked_and_triton.py", "qk_norm_rope/test_triton.py")
    collect_ignore = ["test_compiled.py", *folders]


def random(*shape, dtype=torch.float64, seed=0):
    """Normal numbers, the same each time."""
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def in_turn(cases, types):
    """(case, type) of each case with one of the types, in turn. The others are slow tests where there is no GPU."""
    others = pytest.mark.slow if KERNEL_DEVICE == "cpu" else ()
    turns = [(case, n, (index + n) % len(types)) for index, case in enumerate(cases) for n in range(len(types))]
    return [pytest.param(case, types[chosen], marks=others if n else ()) for case, n, chosen in turns]
