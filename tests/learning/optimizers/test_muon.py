"""Muon for matrices, AdamW for all else."""

import copy

import pytest
import torch

from scaling_testbed.learning.optimizers import AdamWConfig, MuonConfig, newton_schulz
from tests.learning.optimizers.conftest import model, weights_after


def test_muon_gives_matrices_of_the_blocks_orthogonal_steps_and_all_else_adamws():
    """The step of a matrix of A x B has singular values near one, times 0.2 sqrt(max(A, B)) times the rate."""
    steps = []
    for config in (MuonConfig(lr=1e-3, weight_decay=0.0), AdamWConfig(lr=1e-3, weight_decay=0.0)):
        transformer = model()
        before = {name: parameter.detach().clone() for name, parameter in transformer.named_parameters()}
        after = weights_after(config, [1e-3], transformer)
        steps.append({name: after[name] - before[name] for name in before})
    muon, adamw = steps
    info = transformer.parameter_info()
    for name, step in muon.items():
        if info[name].role in ("norm", "embedding", "head"):
            assert torch.equal(step, adamw[name]), name
        else:
            values = torch.linalg.svdvals(step) / (1e-3 * 0.2 * max(step.shape) ** 0.5)
            assert values.min() > 0.5 and values.max() < 1.3, name
            assert step.square().mean().sqrt() == pytest.approx(0.2e-3, rel=0.25)  # the RMS of AdamW's in training


@pytest.mark.parametrize(("adjustment", "nesterov"), [("match_rms_adamw", True), ("original", False)])
def test_matrices_of_one_shape_together_make_the_steps_of_pytorchs_muon(adjustment, nesterov, monkeypatch):
    """To the bit, in batches of two at most, and from the state dict of PyTorch's Muon."""
    monkeypatch.setattr(newton_schulz, "LARGEST_BATCH", 2 * 24 * 16)
    shapes = [(24, 16), (16, 24), (24, 16), (16, 16), (24, 16)]
    mine, its = ([torch.nn.Parameter(torch.full(shape, 0.5)) for shape in shapes] for _ in range(2))
    options = {"momentum": 0.9, "nesterov": nesterov, "ns_steps": 5, "adjust_lr_fn": adjustment}
    muons = [
        newton_schulz.BatchedMuon([{"params": mine}], 0.02, weight_decay=0.1, **options),
        torch.optim.Muon(its, 0.02, weight_decay=0.1, **options),
    ]
    for step in range(4):
        generator = torch.Generator().manual_seed(step)
        for one, other in zip(mine, its, strict=True):
            one.grad = other.grad = torch.randn(one.shape, generator=generator)
        for muon in muons:
            muon.step()
        if step == 1:
            muons[0].load_state_dict(copy.deepcopy(muons[1].state_dict()))
    for one, other in zip(mine, its, strict=True):
        assert torch.equal(one, other)
        assert torch.equal(muons[0].state[one]["momentum_buffer"], muons[1].state[other]["momentum_buffer"])
