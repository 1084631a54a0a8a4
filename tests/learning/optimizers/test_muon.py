"""Muon for matrices, AdamW for all else."""

import pytest
import torch

from scaling_testbed.learning.optimizers import AdamWConfig, MuonConfig
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
