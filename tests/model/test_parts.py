"""A part that is registered in one place is right everywhere: built, counted, trained, scored, planned, exported."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from scaling_testbed.config.compose import compose
from scaling_testbed.config.memory import activation_bytes_per_token
from scaling_testbed.config.run import unshardable
from scaling_testbed.errors import ConfigError
from scaling_testbed.evaluation import scoring
from scaling_testbed.evaluation.multiple_choice import Continuation
from scaling_testbed.exporting.families import family_of
from scaling_testbed.kernels.attention import reference
from scaling_testbed.learning.config import CrossEntropyConfig
from scaling_testbed.learning.loss_model import LossModel
from scaling_testbed.model import parts
from scaling_testbed.model.config import ModelConfig
from scaling_testbed.model.counting import count_params, forward_flops
from scaling_testbed.model.layers import Gain, Linear, cast_for_matmul
from scaling_testbed.model.parametrization import ROLES
from scaling_testbed.model.parts import LINEARS, MLPS, NORMALISERS, NORMS, QK_NORMS, RESIDUALS
from scaling_testbed.model.transformer import Transformer
from scaling_testbed.registry import resolve
from tests.config.test_memory import kept_by_autograd

KINDS = [value for value in vars(parts).values() if isinstance(value, parts.Parts)]
CPU = torch.device("cpu")


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.kind)
def test_every_name_leads_to_what_it_says(kind):
    for name, record in kind.items():
        target = getattr(record, next(iter(record.__dataclass_fields__)))
        assert isinstance(record, kind.record)
        assert target is None or callable(resolve(target)), name


def test_what_a_path_claims_is_what_its_kernel_takes():
    known = {record.fused_kind for record in QK_NORMS.values()} - {None}
    assert set(parts.ATTENTION_IMPLS["triton"].normalisers) <= set(NORMALISERS)
    kernel = pytest.importorskip("scaling_testbed.kernels.qk_norm_rope.triton")
    assert known == set(kernel.KINDS)


def test_roles_are_roles():
    assert all(set(mlp.roles) <= set(ROLES) for mlp in MLPS.values())


# ---- parts that only these tests have


def mean_of_positives(scores_BHMN, allowed_MN, n_positions):
    """relu(z) / L: weights that depend on the length of the sequence and do not sum to one."""
    return scores_BHMN.masked_fill(~allowed_MN, 0).relu() / n_positions


class Bias(nn.Module):
    """No statistics: x times a gain, plus another."""

    role, fan_in = "norm", 1

    def __init__(self, width, eps, *, device=None):
        super().__init__()
        self.first, self.second = Gain(width, eps, device=device), Gain(width, eps, device=device)

    def forward(self, x):
        return x.float() * self.first.weight + self.second.weight


class ThreeMatrices(nn.Module):
    """out(relu(in(x)) + relu(gate(x)))."""

    def __init__(self, config, *, device=None):
        super().__init__()
        linear = resolve(LINEARS[config.linear].make)
        self.one = linear(config.d_model, config.d_ff, role="mlp_in", device=device)
        self.two = linear(config.d_model, config.d_ff, role="mlp_gate", device=device)
        self.out = linear(config.d_ff, config.d_model, role="mlp_out", device=device)

    def forward(self, x):
        x = cast_for_matmul(x)
        return self.out(self.one(x).relu() + self.two(x).relu())


class Scaled(Linear):
    """x @ (factor W).T with one learned factor."""

    def __init__(self, d_in, d_out, *, role, device=None):
        super().__init__(d_in, d_out, role=role, device=device)
        self.factor = Gain(1, 0.0, device=device)

    def start(self):
        nn.init.constant_(self.factor.weight, 2.0)

    def effective_weight(self):
        return self.weight * self.factor.weight

    def forward(self, x):
        return nn.functional.linear(x, self.effective_weight())


def sandwich(x, branch, norms, n_layers):
    return norms[2](x + norms[1](branch(norms[0](x))))


def no_mean(x, gain, eps):
    return nn.functional.normalize(x.float(), dim=-1) * gain


@pytest.fixture
def planted(monkeypatch):
    """Each of the parts above, registered under "planted" as a plug-in would."""
    for kind in KINDS:
        monkeypatch.setattr(kind, "_modules", dict(kind._modules))
    NORMALISERS.register("planted", depends_on_length=True, sums_to_one=False, kept_scores=2)(mean_of_positives)
    NORMS.register("planted", gains=2)(Bias)
    MLPS.register("planted", roles=("mlp_in", "mlp_gate", "mlp_out"), kept_widths=3)(ThreeMatrices)
    LINEARS.register("planted", extra_per_matrix=1, makes_weight_anew=True, needs_whole_tensors="a test")(Scaled)
    RESIDUALS.register("planted", norms_per_branch=3, final_norm=False, init_divisor=lambda role, n: 2.0)(sandwich)
    QK_NORMS.register("planted", gains=1, kept=2, keeps_logits=True)(no_mean)
    yield
    for kind in KINDS:
        kind.pop("planted", None)


PLANTED = ["norm", "qk_norm", "mlp", "residual", "linear", "attention_normaliser"]
each_planted = pytest.mark.parametrize("key", PLANTED)


def overrides(key):
    free = ["model.qk_norm=none"] if key == "linear" else []
    return ["model=nano_m", f"model.{key}=planted", *free]


@each_planted
def test_a_new_part_is_counted_as_it_is_built(planted, key):
    for changes in ({}, {"n_kv_heads": 2, "tied_head": True, "qk_norm_axis": "full"}):
        config = ModelConfig(**{key: "planted"}, **changes, attention_impl="reference").resolved(61)
        model = Transformer(config, device=CPU)
        model.init_weights(0)
        assert count_params(config).n_params == sum(p.numel() for p in model.parameters())
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model.logits(torch.zeros(1, 24, dtype=torch.int64))
        assert counter.get_total_flops() / 24 == forward_flops(config, 24)


@each_planted
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_memory_of_a_new_part_is_what_autograd_keeps(planted, key, precision):
    run = compose(overrides(key))
    config = run.model.resolved(257)
    model = Transformer(config, run.parametrization, device=CPU)
    model.init_weights(0)
    for length in (32, 96):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            few, many = kept_by_autograd(model, 2, length), kept_by_autograd(model, 6, length)
        per_token = (many - few) / (4 * length)
        assert activation_bytes_per_token(config, precision, length, "cpu") == pytest.approx(per_token, rel=0.05)


def test_a_dry_run_counts_the_scores_that_a_new_normaliser_keeps(planted):
    changes = {"attention_normaliser": "planted", "n_heads": 4}
    short, long = (activation_bytes_per_token(ModelConfig(**changes).resolved(61), "bf16", T) for T in (100, 300))
    assert long - short == 2 * 4 * 200 * 2 * 4  # layers, heads, positions, kept scores, bytes


def test_a_new_linear_layer_sets_what_follows_from_its_weights(planted, build):
    model = build(linear="planted")
    assert {layer.factor.weight.item() for layer in model.modules() if isinstance(layer, Scaled)} == {2.0}


@each_planted
def test_a_new_part_trains(planted, key, build, tokens):
    model = build(**{key: "planted"})
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    ids, losses = tokens(24), []
    for _ in range(5):
        loss = nn.functional.cross_entropy(model.logits(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    if key == "attention_normaliser":
        assert model.attention_impl == "reference"


def log_likelihoods(model, lengths):
    ids = np.arange(60) % 61
    rows = [Continuation(ids[:length].astype(np.int64), 3, False, False) for length in lengths]
    return scoring.log_likelihoods(LossModel(model, CrossEntropyConfig()), rows, device=CPU, precision="fp32")


@pytest.mark.fault(
    "A17", "What a new optimizer or normaliser says of itself decides its memory, its S and its padding."
)
@pytest.mark.parametrize("normaliser", ["planted", "relu2", "softmax"])
def test_a_sequence_scores_the_same_alone_and_beside_a_longer_one(planted, build, normaliser):
    model = build(attention_normaliser=normaliser)
    alone = log_likelihoods(model, [20])
    beside = log_likelihoods(model, [50, 20, 33])
    assert beside[1] == pytest.approx(alone[0], abs=1e-5)
    padded = model(torch.arange(50)[None])[:, :20]
    differs = not torch.allclose(padded, model(torch.arange(20)[None]), atol=1e-4)
    assert differs == NORMALISERS[normaliser].depends_on_length  # else the scores above would show nothing


def test_a_fused_path_is_not_taken_for_a_new_normaliser(planted):
    for named in ("sdpa", "triton"):
        with pytest.raises(ConfigError, match="^attention_impl must be auto or reference with attention_n"):
            ModelConfig(attention_normaliser="planted", attention_impl=named, d_head=32)


def test_statistics_take_the_weights_of_a_normaliser_that_sums_to_one(build, monkeypatch):
    """And of no other: a softmax's entropy is not another one's."""

    def even(scores_BHMN, allowed_MN, n_positions):
        return allowed_MN / allowed_MN.sum(-1, keepdim=True) + 0 * scores_BHMN

    fact = parts.Normaliser(even, depends_on_length=False, sums_to_one=True, kept_scores=1)
    monkeypatch.setitem(NORMALISERS, "even", fact)
    attention = build(attention_normaliser="even").blocks[0].attention
    q_BHTK = 5 * torch.randn(1, 4, 6, 8, generator=torch.Generator().manual_seed(0))
    expected = torch.tensor(range(1, 7)).log().mean()
    torch.testing.assert_close(attention.statistics(q_BHTK, q_BHTK).entropy_H, expected.expand(4))
    assert (reference.attention_statistics(q_BHTK, q_BHTK, scale=1.0).entropy_H < expected / 2).all()


@each_planted
def test_a_new_part_without_a_counterpart_is_not_exported(planted, key):
    given = {"norm": "rmsnorm", "mlp": "swiglu", "qk_norm": "none", key: "planted"}
    config = ModelConfig(**given).resolved(61)
    if key == "linear":  # which is folded into the weights
        assert family_of(config).architecture == "LlamaForCausalLM"
        return
    with pytest.raises(ConfigError, match=f"^model.{key}=planted has no counterpart"):
        family_of(config)


def test_what_a_run_may_combine_follows_the_facts(planted):
    for named, parameter in (("linear", "model.linear=planted"), ("qk_norm", "model.qk_norm=planted")):
        run = compose(overrides(named))
        assert unshardable(run) == ((parameter, "a test") if named == "linear" else None)
    with pytest.raises(ConfigError, match="model.qk_norm=planted, which keeps attention logits"):
        compose([*overrides("qk_norm"), "optimizer.qk_clip=10"])
    with pytest.raises(ConfigError, match="model.linear=planted cannot be sharded"):
        compose([*overrides("linear"), "parallelism=fsdp"])


def test_kappa_takes_the_place_of_a_qk_norm_in_every_fact(planted):
    config = ModelConfig(qk_norm="none", kappa=2.0, qk_norm_axis="full").resolved(61)
    assert config.query_key_norm is parts.KAPPA and not config.norms_heads_together
    with pytest.raises(ConfigError, match="^kappa must be null unless qk_norm=none"):
        ModelConfig(qk_norm="planted", kappa=2.0)


def test_a_new_layout_starts_as_its_divisor_says(planted, build):
    pre, new = build(residual="pre"), build(residual="planted")
    torch.testing.assert_close(2 * new.blocks[0].mlp.mlp_in.weight, pre.blocks[0].mlp.mlp_in.weight)


def test_a_name_is_registered_once(planted):
    with pytest.raises(ConfigError, match="the MLP 'swiglu' is registered already by scaling_testbed.model.parts"):
        MLPS.register("swiglu", roles=(), kept_widths=0)(ThreeMatrices)
