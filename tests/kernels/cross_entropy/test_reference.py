"""The definition of the loss head agrees with slower, plainer ones."""

import pytest
import torch
import torch.nn.functional as F

from scaling_testbed.kernels.cross_entropy import reference
from tests.kernels.conftest import random


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_cross_entropy_equals_torch_s_and_log_z_is_the_normaliser(softcap):
    hidden, weight = random(9, 6), random(17, 6, seed=1)
    targets = torch.arange(9)
    logits = hidden @ weight.T
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    ce, log_z = reference.linear_cross_entropy(hidden, weight, targets, softcap=softcap)
    torch.testing.assert_close(ce, F.cross_entropy(logits, targets, reduction="none"))
    torch.testing.assert_close(log_z, logits.exp().sum(-1).log())


def test_ignored_targets_have_neither_loss_nor_log_z_nor_gradient():
    hidden = random(5, 6, dtype=torch.bfloat16).requires_grad_()
    targets = torch.tensor([3, -100, 0, -100, 16])
    ce, log_z = reference.linear_cross_entropy(hidden, random(17, 6, dtype=torch.bfloat16, seed=1), targets)
    assert ce.dtype == log_z.dtype == torch.float32
    (ce + log_z).sum().backward()
    ignored = targets == -100
    for values in (ce, log_z, hidden.grad):
        assert (values[ignored] == 0).all() and (values[~ignored] != 0).any()
