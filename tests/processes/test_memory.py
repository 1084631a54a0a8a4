"""The memory that is left, and what errors say when there is none."""

import subprocess

import numpy as np
import pytest
import torch

from scaling_testbed.errors import bytes_asked_for, is_memory_error
from scaling_testbed.processes.device import free_memory_bytes

CPU = torch.device("cpu")


def test_errors_of_memory_are_known_with_what_was_asked_for():
    """PyTorch's and NumPy's own, for more than there is; that of CUDA as its message is."""
    with pytest.raises(RuntimeError) as of_torch:
        torch.empty(1 << 55, dtype=torch.uint8)
    assert is_memory_error(of_torch.value) and bytes_asked_for(of_torch.value) == 1 << 55
    with pytest.raises(MemoryError) as of_numpy:
        np.empty(1 << 55, dtype=np.uint8)
    assert is_memory_error(of_numpy.value)
    of_cuda = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.50 GiB. GPU 0 has 3 MiB free.")
    assert is_memory_error(of_cuda) and bytes_asked_for(of_cuda) == 3 << 29
    assert not is_memory_error(RuntimeError("shapes do not match"))


def test_what_is_free_respects_the_limit_of_the_process_and_its_neighbours(python):
    free = free_memory_bytes(CPU)
    assert free > 2**20 and free_memory_bytes(CPU, 4) == pytest.approx(free / 4, rel=0.2)
    code = """
import resource, torch
from scaling_testbed.processes.device import free_memory_bytes
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**28,) * 2)
print(free_memory_bytes(torch.device("cpu")))
"""
    told = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout
    assert int(told) == pytest.approx(2**28, rel=0.05)
