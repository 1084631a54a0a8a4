"""What AdamW does to an update and to its rate."""

import pytest
import torch

from scaling_testbed.learning.optimizers import AdamWConfig
from tests.learning.optimizers.conftest import model, weights_after


def test_update_clipping_changes_nothing_while_the_update_rms_is_below_one():
    """A constant gradient has g^2 equal to its own second moment: RMS is 1 and nothing is clipped."""

    def run(update_clipping):
        transformer = model()
        optimizer = AdamWConfig(lr=1e-2, update_clipping=update_clipping).build(transformer)
        for _ in range(3):
            for parameter in transformer.parameters():
                parameter.grad = torch.full_like(parameter, 0.5)
            optimizer.step()
        return transformer.head_weight_VD

    assert torch.allclose(run(True), run(False), atol=1e-6)


def test_update_clipping_divides_the_step_after_a_gradient_spike_by_its_rms():
    def steps(update_clipping):
        transformer = model()
        optimizer = AdamWConfig(lr=1e-3, weight_decay=0.0, update_clipping=update_clipping).build(transformer)
        for size in (1e-3, 1e-3, 1.0):
            before = transformer.head_weight_VD.detach().clone()
            for parameter in transformer.parameters():
                parameter.grad = torch.full_like(parameter, size)
            optimizer.step()
        return transformer.head_weight_VD.detach() - before

    second = (0.05 * 0.95**2 * 1e-6 + 0.05 * 0.95 * 1e-6 + 0.05) / (1 - 0.95**3)
    rms = 1.0 / second**0.5
    assert rms > 1.5
    assert torch.allclose(steps(True) * rms, steps(False), rtol=1e-4)


def test_a_rate_scaled_by_the_weights_gives_each_tensor_steps_in_proportion_to_its_rms():
    """max(RMS(w), 1e-3) times AdamW's step, E.14: also of a tensor of zeros."""
    names, steps = None, []
    for scaled in (False, True):
        transformer = model()
        with torch.no_grad():
            transformer.blocks[0].attention.q.weight.zero_()
        before = {name: parameter.detach().clone() for name, parameter in transformer.named_parameters()}
        config = AdamWConfig(lr=1e-3, weight_decay=0.0, scale_lr_by_param_rms=scaled)
        after = weights_after(config, [1e-3], transformer)
        names = list(before)
        steps.append([after[name] - before[name] for name in names])
    for name, plain, scaled in zip(names, *steps, strict=True):
        factor = max(before[name].square().mean().sqrt().item(), 1e-3)
        assert torch.allclose(scaled, factor * plain, rtol=1e-3, atol=1e-7), name
        assert scaled.any()


def test_coupled_decay_is_not_scaled_by_the_rms_of_the_weights():
    transformer = model()
    before = transformer.head_weight_VD.detach().clone()
    config = AdamWConfig(lr=0.1, decay="coupled", weight_decay=0.5, scale_lr_by_param_rms=True)
    after = weights_after(config, [0.1], transformer, gradients=0.0)
    torch.testing.assert_close(after["head.weight"], before * (1 - 0.1 * 0.5))


@pytest.mark.parametrize("fields", [{}, {"update_clipping": True}, {"scale_lr_by_param_rms": True}], ids=str)
def test_the_step_of_a_tensor_at_a_time_is_pytorchs_but_for_the_factor_of_its_rate(fields):
    """With weights and updates of RMS one the factors are one too."""
    weights = []
    for options in ({}, fields):
        transformer = model()
        with torch.no_grad():
            for parameter in transformer.parameters():
                parameter.div_(parameter.square().mean().sqrt())
        weights.append(weights_after(AdamWConfig(lr=1e-3, eps=1e-3, **options), [1e-3], transformer))
    for name, plain in weights[0].items():
        assert torch.allclose(weights[1][name], plain, rtol=1e-4, atol=1e-6), name
