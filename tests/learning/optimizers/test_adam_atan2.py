"""Adam-atan2 beside Adam."""

import math

import torch

from scaling_testbed.learning.optimizers import AdamAtan2Config, AdamWConfig
from tests.learning.optimizers.conftest import model, weights_after


def test_adam_atan2_is_adam_for_a_constant_gradient_and_bounded_for_a_spike():
    """atan2(m, sqrt(v)) = pi / 4 where m = sqrt(v); after tiny gradients a large one gives at most a pi / 2."""

    def steps(config):
        transformer, taken = model(), []
        optimizer = config.build(transformer)
        for size in (1e-4, 1e-4, 1.0):
            before = transformer.head_weight_VD.detach().clone()
            for parameter in transformer.parameters():
                parameter.grad = torch.full_like(parameter, size)
            optimizer.step()
            taken.append((before - transformer.head_weight_VD.detach()) / 1e-3)
        return taken

    adam = steps(AdamWConfig(lr=1e-3, weight_decay=0.0, eps=1e-30))
    atan2 = steps(AdamAtan2Config(lr=1e-3, weight_decay=0.0))
    for mine, its in zip(atan2[:2], adam[:2], strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-3, atol=1e-4)
    ratio = adam[2]
    torch.testing.assert_close(atan2[2], 4 / math.pi * torch.atan(ratio), rtol=1e-3, atol=1e-4)
    half = steps(AdamAtan2Config(lr=1e-3, weight_decay=0.0, a=0.5, b=2.0))[0]
    torch.testing.assert_close(half, torch.full_like(half, 0.5 * math.atan(0.5)), rtol=1e-3, atol=1e-4)


def test_adam_atan2_does_not_know_the_size_of_gradients_and_survives_none():
    """AdamW's eps makes tiny gradients matter less; here there is none."""
    transformer = model()
    start = transformer.head_weight_VD.detach().clone()
    still = weights_after(AdamAtan2Config(weight_decay=0.0), [1e-3], transformer, gradients=0.0)
    assert torch.equal(still["head.weight"], start)
    for config, same in ((AdamAtan2Config(), True), (AdamWConfig(), False)):
        large, tiny = (weights_after(config, [1e-3] * 2, gradients=size) for size in (1.0, 2.0**-36))
        assert all(torch.equal(large[name], tiny[name]) for name in large) == same
