"""The peak that utilisation is measured against belongs to the card that runs, or is not known."""

import contextlib
from types import SimpleNamespace

import pytest
import torch

from scaling_testbed.config.sections import ComputeConfig
from scaling_testbed.processes import device as module


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("NVIDIA L40", None),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA RTX A1000", None),
        ("NVIDIA A10G", None),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA GB200", 2500e12),
    ],
)
def test_a_card_has_its_own_peak(monkeypatch, name, peak):
    monkeypatch.setattr(module, "device_name", lambda device: name)
    assert module.peak_flops(torch.device("cuda"), "bf16") == peak
    assert module.peak_flops(torch.device("cuda"), "fp32") is None
    assert module.peak_flops(torch.device("cpu"), "bf16") is None


def test_a_run_inherits_no_switch_of_determinism_from_an_earlier_one_in_its_process():
    def switches():
        cuda = torch.backends.cuda
        return (
            torch.are_deterministic_algorithms_enabled(),
            torch.utils.deterministic.fill_uninitialized_memory,
            (cuda.cudnn_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.flash_sdp_enabled()),
        )

    module.configure_torch(ComputeConfig())
    before = switches()
    assert before == (False, True, (True, True, True))
    module.configure_torch(ComputeConfig(deterministic=True))
    assert switches() == (True, False, (False, False, True))
    module.configure_torch(ComputeConfig())
    assert switches() == before


def test_an_apple_gpu_has_no_fp64_so_the_host_has_it():
    on_gpu = SimpleNamespace(device=torch.device("mps"), cpu=lambda: torch.ones(2))
    assert module.in_fp64(on_gpu).dtype is module.in_fp64(torch.ones(2)).dtype is torch.float64


def test_work_beside_the_main_stream_of_a_gpu_has_the_same_stream_each_time(monkeypatch):
    """PyTorch keeps the freed memory of each stream for that stream alone."""
    used = []

    class Stream:
        def __init__(self, device):
            self.wait_stream = lambda other: None

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext(used.append(stream)))
    module._side_stream.cache_clear()
    for _ in range(2):
        with module.on_side_stream(torch.device("cuda", 0)):
            pass
    module._side_stream.cache_clear()
    assert len(used) == 2 and used[0] is used[1]
