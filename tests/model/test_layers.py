"""Each part computes its formula."""

import pytest
import torch
import torch.nn.functional as F

from scaling_testbed.model.layers import Linear
from scaling_testbed.model.parts import MLPS, NORMS, RESIDUALS
from scaling_testbed.registry import resolve


def drawn(module):
    """Give a module weights, which a built one does not have yet."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(generator=generator)
    return module


@pytest.mark.parametrize("name", NORMS)
def test_a_norm_has_unit_rms_a_gain_and_no_bias(name):
    x = 3 * torch.randn(5, 64) + 2
    norm = resolve(NORMS[name].make)(64, 1e-6)
    assert [parameter for parameter, _ in norm.named_parameters()] == ["weight"]
    with torch.no_grad():
        norm.weight.fill_(1.0)
        out = norm(x)
        torch.testing.assert_close(out.square().mean(-1), torch.ones(5), atol=1e-4, rtol=0)
        assert (out.mean(-1).abs().max() < 1e-5) == (name == "layernorm")
        norm.weight.copy_(torch.arange(64.0))
        torch.testing.assert_close(norm(x), out * torch.arange(64.0))


@pytest.mark.parametrize("name", NORMS)
def test_norm_statistics_and_results_are_fp32_for_bf16_inputs(name):
    norm = drawn(resolve(NORMS[name].make)(64, 1e-6))
    x = (100 + torch.randn(5, 64)).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        out = norm(x)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, norm(x.float()), atol=0, rtol=0)


def test_mlps_compute_their_formulas(tiny):
    x = torch.randn(2, 3, 32)
    gelu, relu2, swiglu = (drawn(resolve(MLPS[name].make)(tiny(mlp=name))) for name in ("gelu", "relu2", "swiglu"))
    hidden = x @ gelu.mlp_in.weight.T
    tanh_form = 0.5 * hidden * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (hidden + 0.044715 * hidden**3)))
    torch.testing.assert_close(gelu(x), tanh_form @ gelu.mlp_out.weight.T, atol=1e-4, rtol=1e-4)
    squared = (x @ relu2.mlp_in.weight.T).clamp(min=0) ** 2
    torch.testing.assert_close(relu2(x), squared @ relu2.mlp_out.weight.T, atol=1e-3, rtol=1e-4)
    gated = F.silu(x @ swiglu.mlp_gate.weight.T) * (x @ swiglu.mlp_in.weight.T)
    torch.testing.assert_close(swiglu(x), gated @ swiglu.mlp_out.weight.T, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize(
    "name, expected",
    [
        ("pre", 5 + (10 * 5 + 1)),
        ("post", 10 * (5 + (5 + 1))),
        ("reordered", 5 + 10 * (5 + 1)),
        ("peri", 5 + 100 * (10 * 5 + 1)),
        ("deepnorm", 10 * (2 * 5 + (5 + 1))),  # 8 layers: alpha = 16^(1/4) = 2
    ],
)
def test_residual_layouts_compute_their_formulas(name, expected):
    norms = [lambda x: 10 * x, lambda x: 100 * x]
    assert RESIDUALS[name].apply(5, lambda x: x + 1, norms, 8) == expected


def test_building_draws_no_random_numbers_and_leaves_weights_that_show():
    before = torch.random.get_rng_state()
    layer = Linear(4, 3, role="q")
    assert torch.equal(before, torch.random.get_rng_state())
    assert layer.weight.isnan().all()
