"""A grown model computes what the small one computes, and its copies part in training."""

import itertools
from dataclasses import replace

import pytest
import torch

from scaling_testbed.errors import ConfigError
from scaling_testbed.model.config import GrowthConfig, ModelConfig, ParametrizationConfig
from scaling_testbed.model.growth import grow
from scaling_testbed.model.transformer import Transformer

SMALL = ModelConfig(d_model=16, n_layers=2, n_heads=4, d_head=4, d_ff=24, vocab_size=19)
WIDE = {"d_model": 32, "n_heads": 8, "d_ff": 48}
FPI = GrowthConfig(width="fpi")
VARIANTS = [
    {"norm": norm, "residual": residual, "mlp": mlp}
    for norm, residual, mlp in itertools.product(
        ("layernorm", "rmsnorm"), ("pre", "post", "reordered", "peri", "deepnorm"), ("gelu", "swiglu")
    )
]
VARIANTS += [{"qk_norm": "none"}, {"qk_norm": "rmsnorm", "qk_norm_axis": "full"}, {"n_kv_heads": 2}]
VARIANTS += [{"qk_norm": "none", "kappa": 3.0}, {"mlp": "relu2", "n_kv_heads": 1}, {"attention_window": 3}]
TOKENS = torch.randint(0, 19, (3, 11), generator=torch.Generator().manual_seed(0))


def trained_like(config, **options):
    """A model whose gains and matrices are those of no fresh one."""
    model = Transformer(config.resolved(19), **options)
    model.init_weights(seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


def grown(small, how, seed=0, **changes):
    n_kv_heads = {"n_kv_heads": 2 * small.config.n_kv_heads} if how.width else {}
    model = Transformer(replace(small.config, **n_kv_heads, **changes), small.parametrization)
    shapes = {name: value.shape for name, value in model.named_parameters()}
    made = grow(
        small.state_dict(), small.config, model.config, how, model.parameter_info(), shapes,
        lambda name: model.initial_weight(name, seed), seed,
    )  # fmt: skip
    model.to(made["embedding.weight"].dtype).load_state_dict(made)
    return model


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: "-".join(map(str, variant.values())))
def test_twice_the_width_gives_the_same_logits(variant):
    """In fp64, because in fp32 the noise is rounded: by 1e-5 in the logits, and more after a gated MLP."""
    small = trained_like(replace(SMALL, **variant)).double()
    large = grown(small, FPI, **WIDE)
    before, after = small.logits(TOKENS), large.logits(TOKENS)
    assert before.std() > 0.1
    torch.testing.assert_close(after, before, atol=1e-7, rtol=1e-6)


def test_the_rules_of_mup_change_no_logit_of_a_grown_model():
    mup = ParametrizationConfig(name="mup_full", base_width=16)
    small = trained_like(SMALL, parametrization=mup)
    torch.testing.assert_close(grown(small, FPI, **WIDE).logits(TOKENS), small.logits(TOKENS), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("noise", "lives"), [(1.0, True), (0.1, True), (0.0, False)])
def test_copies_part_in_training_with_noise_and_stay_equal_without(noise, lives):
    large = grown(trained_like(SMALL), GrowthConfig(width="fpi", noise=noise), **WIDE)
    optimizer = torch.optim.AdamW(large.parameters(), lr=1e-2)
    hidden = large.typed_blocks[0].mlp.mlp_in
    for _ in range(20):
        logits = large.logits(TOKENS[:, :-1])
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), TOKENS[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    x = torch.randn(7, 32, generator=torch.Generator().manual_seed(3))
    x[:, 16:] = x[:, :16]
    first, second = hidden(x).chunk(2, dim=1)  # the units' two copies, on a stream with equal copies
    alike = torch.equal(first, second)
    assert alike is not lives
    if lives:
        assert (first - second).norm() > 0.01 * first.norm()


def test_noise_is_drawn_anew_for_each_matrix_and_seed_and_its_size_is_that_of_the_matrix():
    small = trained_like(SMALL)
    one, two, other = (grown(small, FPI, seed=seed, **WIDE).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(value, two[name]) for name, value in one.items())
    name = "blocks.0.mlp.mlp_in.weight"
    assert not torch.equal(one[name], other[name])
    noise = (one[name][:, :16] - one[name][:, 16:]) / 2
    assert noise.std() == pytest.approx(small.state_dict()[name].square().mean().sqrt().item(), rel=0.1)
    assert not torch.equal(
        noise, (one["blocks.1.mlp.mlp_in.weight"][:, :16] - one["blocks.1.mlp.mlp_in.weight"][:, 16:]) / 2
    )


def test_blocks_of_zero_change_no_bit_and_are_alive():
    small = trained_like(SMALL)
    large = grown(small, GrowthConfig(depth="zero"), n_layers=5)
    assert torch.equal(large.logits(TOKENS), small.logits(TOKENS))
    large.logits(TOKENS).square().sum().backward()
    assert all(block.mlp.mlp_out.weight.grad.abs().max() > 0 for block in large.typed_blocks)


@pytest.mark.parametrize(("depth", "sources"), [("repeat", [0, 0, 1, 1]), ("stack", [0, 1, 0, 1])])
def test_repeated_blocks_are_those_of_the_parent(depth, sources):
    small = trained_like(SMALL)
    state, old = grown(small, GrowthConfig(depth=depth), n_layers=4).state_dict(), small.state_dict()
    for layer, source in enumerate(sources):
        for part in ("attention.q.weight", "mlp.mlp_out.weight", "mlp_norms.0.weight"):
            assert torch.equal(state[f"blocks.{layer}.{part}"], old[f"blocks.{source}.{part}"])


def test_width_and_depth_together_keep_the_logits():
    small = trained_like(SMALL)
    large = grown(small, GrowthConfig(width="fpi", depth="zero"), n_layers=3, **WIDE)
    torch.testing.assert_close(large.logits(TOKENS), small.logits(TOKENS), atol=1e-5, rtol=1e-5)


def test_aki_takes_the_second_copies_from_the_next_layer():
    small = trained_like(SMALL)
    state = grown(small, GrowthConfig(width="aki", noise=0.0), **WIDE).state_dict()
    old = small.state_dict()
    name = "blocks.{}.attention.q.weight"
    assert torch.equal(state[name.format(0)][:16, :16], old[name.format(0)] / 2)
    assert torch.equal(state[name.format(0)][16:, 16:], old[name.format(1)] / 2)
    assert torch.equal(state[name.format(1)][16:, :16], old[name.format(1)] / 2)  # the last layer has none above it
    assert torch.equal(state["head.weight"], torch.cat([old["head.weight"]] * 2, dim=1) / 2)


@pytest.mark.parametrize(
    ("how", "changes", "said"),
    [
        (FPI, {"d_model": 48, "n_heads": 8, "d_ff": 48}, "model.d_model must be 32 with start.grow.width"),
        (FPI, {"d_model": 32, "n_heads": 8, "d_ff": 40}, "model.d_ff must be 48"),
        (FPI, {"d_model": 32, "n_heads": 16, "d_ff": 48}, "model.n_heads must be 8"),
        (FPI, {**WIDE, "n_layers": 3}, "model.n_layers must be 2 without start.grow.depth"),
        (FPI, {**WIDE, "tied_head": True}, "model.tied_head=false"),
        (FPI, {**WIDE, "linear": "sigma_reparam"}, "cannot be with model.linear=sigma_reparam"),
        (GrowthConfig(depth="zero"), {"n_layers": 2}, "model.n_layers must be above 2"),
        (GrowthConfig(depth="stack"), {"n_layers": 5}, "must be a multiple of 2"),
        (GrowthConfig(depth="zero"), {"n_layers": 4, "residual": "peri"}, "model.residual=pre"),
        (GrowthConfig(depth="zero"), {"n_layers": 4, "d_model": 32}, "model.d_model must be 16 without"),
    ],
)
def test_a_size_that_cannot_be_made_is_refused_in_one_line(how, changes, said):
    with pytest.raises(ConfigError, match=said):
        grown(trained_like(SMALL), how, **changes)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"width": "wider"}, "must be fpi or aki"),
        ({"depth": "more"}, "must be zero, repeat or stack"),
        ({"width": "fpi", "noise": -1}, "must be a number from 0"),
        ({"width": "fpi", "noise": "much"}, "must be a number from 0"),
    ],
)
def test_a_way_of_growth_that_is_none_is_refused(options, said):
    with pytest.raises(ConfigError, match=f"start.grow.*{said}"):
        GrowthConfig(**options)
