"""SGD with momentum against PyTorch's and by hand, and what it costs."""

import pytest
import torch

from scaling_testbed.config.compose import compose
from scaling_testbed.config.memory import estimate_memory
from scaling_testbed.learning.optimizers import SGDConfig, set_lr
from scaling_testbed.model.counting import count_params
from tests.learning.optimizers.conftest import model, weights_after

LRS = [1e-2, 2e-2, 5e-3]


@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.9, False), (0.9, True)])
def test_without_decay_it_is_pytorchs_sgd(momentum, nesterov):
    mine = weights_after(SGDConfig(weight_decay=0.0, momentum=momentum, nesterov=nesterov), LRS)
    transformer = model()
    its = torch.optim.SGD(transformer.parameters(), lr=1.0, momentum=momentum, nesterov=nesterov)
    for index, lr in enumerate(LRS):
        generator = torch.Generator().manual_seed(index)
        for parameter in transformer.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        its.param_groups[0]["lr"] = lr
        its.step()
    for name, parameter in transformer.named_parameters():
        assert torch.equal(mine[name], parameter), name


@pytest.mark.parametrize("decay", ["independent", "coupled"])
def test_the_decay_is_no_part_of_the_momentum(decay):
    """w <- w (1 - lr decay) - lr b with b <- momentum b + g, for a gradient of one."""
    config = SGDConfig(lr=0.1, weight_decay=0.01, momentum=0.5, decay=decay)
    transformer = model()
    optimizer = config.build(transformer)
    expected, momentum = transformer.head_weight_VD.detach().clone(), 0.0
    for lr in (0.1, 0.05):
        for parameter in transformer.parameters():
            parameter.grad = torch.ones_like(parameter)
        set_lr(optimizer, lr)
        optimizer.step()
        momentum = 0.5 * momentum + 1
        shrink = lr / 0.1 * 0.01 if decay == "independent" else lr * 0.01
        expected = expected * (1 - shrink) - lr * momentum
    torch.testing.assert_close(transformer.head_weight_VD.detach(), expected)


def test_a_weight_without_a_gradient_stays_as_it_is():
    transformer = model()
    optimizer = SGDConfig(weight_decay=0.1).build(transformer)
    before = transformer.head_weight_VD.detach().clone()
    optimizer.step()
    assert torch.equal(transformer.head_weight_VD, before)


@pytest.mark.parametrize(("typed", "size"), [([], 4), (["optimizer.momentum=0"], 0)])
def test_a_dry_run_counts_one_moment_or_none(typed, size):
    run = compose(["model=nano_s", "optimizer=sgd", *typed])
    config = run.model.resolved(257)
    n_params = count_params(config).n_params
    assert estimate_memory(run, config, n_params).optimizer == size * n_params
