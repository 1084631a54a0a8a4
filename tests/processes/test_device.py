"""The peak that utilisation is measured against belongs to the card that runs, or is not known."""

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
