"""The facts about each part of a model that is chosen by name: one record for each name.

Counting, memory, parametrization, scoring, export, diagnostics and the checks of a configuration read these records. No
other file holds these facts. A new part is one registration, here or in a plug-in:

    @NORMALISERS.register("relu2", depends_on_length=True, sums_to_one=False, kept_scores=2)
    def relu_squared(scores_BHMN, allowed_MN, n_positions): ...

Nothing here imports torch, because sweeps are planned without torch. A function that needs torch is named as
"module:attribute". `registry.resolve` imports it when a model is built.

Shapes in names: B sequences, H query heads, M queries, N keys.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from scaling_testbed.kernels.limits import (
    ATTENTION_D_HEADS,
    QK_NORM_ROPE_WIDEST_HEAD,
    QK_NORM_ROPE_WIDEST_ROW,
    padded_row,
)
from scaling_testbed.registry import Registry, resolve

if TYPE_CHECKING:
    from scaling_testbed.model.config import ModelConfig

Target = Callable[..., Any] | str  # a function or class, or the "module:attribute" that names it
Record = TypeVar("Record")  # the facts of a part
AUTO = "auto"  # in place of a path's name: the first path that can compute the model

LAYERS, ATTENTION = "scaling_testbed.model.layers", "scaling_testbed.model.attention"
QK_NORM_ROPE = "scaling_testbed.kernels.qk_norm_rope.reference"
TRITON_WHY_NOT = "scaling_testbed.kernels.support:why_not"


class Parts(Registry[Record]):
    """The parts of one kind, by name. record: the class of their records, whose first field is the function."""

    def __init__(self, kind: str, record: Callable[..., Record]):
        super().__init__(kind)
        self.record = record

    def register(self, name: str, **facts: Any) -> Callable[[Any], Any]:
        """A decorator that adds a function or class with its facts and returns it unchanged."""

        def add(function: Any) -> Any:
            self.add(name, self.record(function, **facts), module=function.__module__)
            return function

        return add


# ---- norms


@dataclass(frozen=True)
class Norm:
    """A norm of the residual stream or of a branch.

    make         (width, eps, *, device) -> nn.Module with fp32 output
    gains        number of learned numbers for each feature
    kept         number of fp32 tensors of the input's size that its backward pass needs
    counterpart  its name in an export to Hugging Face (exporting/families.py); None if no exported model has it
    """

    make: Target
    gains: int = field(kw_only=True)
    kept: int = field(default=1, kw_only=True)
    counterpart: str | None = field(default=None, kw_only=True)


NORMS = Parts("norm", Norm)
NORMS.add("layernorm", Norm(f"{LAYERS}:LayerNorm", gains=1, counterpart="layer_norm"), module=__name__)
NORMS.add("rmsnorm", Norm(f"{LAYERS}:RMSNorm", gains=1, counterpart="rms_norm"), module=__name__)


# ---- norms of queries and keys


@dataclass(frozen=True)
class QKNorm:
    """The norm of queries and keys before the rotation.

    function     (x, gain or None, eps) -> fp32, over the last dimension; None: queries and keys are not changed
    gains        number of learned numbers for each normed feature: 1 or 0
    kept         number of fp32 tensors of the input's size that its backward pass needs
    keeps_logits whether attention logits do not change when the weights of queries and keys shrink
    per_head     whether it always goes over each head, whatever ModelConfig.qk_norm_axis says
    fused_kind   its name in the kernel that norms and rotates at once; None if the kernel does not have it
    counterpart  its name in an export to Hugging Face; None if no exported model has it
    """

    function: Target | None
    gains: int = field(kw_only=True)
    kept: int = field(kw_only=True)
    keeps_logits: bool = field(kw_only=True)
    per_head: bool = field(default=False, kw_only=True)
    fused_kind: str | None = field(default=None, kw_only=True)
    counterpart: str | None = field(default=None, kw_only=True)


_NORMED: dict[str, Any] = {"gains": 1, "kept": 1, "keeps_logits": True}
QK_NORMS = Parts("norm of queries and keys", QKNorm)
QK_NORMS.add("none", QKNorm(None, gains=0, kept=0, keeps_logits=False, counterpart="none"), module=__name__)
QK_NORMS.add(
    "layernorm",
    QKNorm(f"{QK_NORM_ROPE}:layer_norm", fused_kind="layernorm", counterpart="layer_norm", **_NORMED),
    module=__name__,
)
QK_NORMS.add(
    "rmsnorm",
    QKNorm(f"{QK_NORM_ROPE}:rms_norm", fused_kind="rmsnorm", counterpart="rms_norm", **_NORMED),
    module=__name__,
)
# The norm that ModelConfig.kappa puts in place of the named norm: sqrt(kappa) z / RMS(z) in each head.
KAPPA = QKNorm(
    f"{QK_NORM_ROPE}:rms_norm", gains=0, kept=1, keeps_logits=True, per_head=True, counterpart="rms_norm"
)  # fmt: skip


# ---- MLPs


@dataclass(frozen=True)
class MLP:
    """The MLP of a block.

    make         (config, *, device) -> nn.Module from [B, T, d_model] to [B, T, d_model]
    roles        the roles of its matrices (parametrization.ROLES), each d_model x d_ff or d_ff x d_model
    kept_widths  number of tensors that its backward pass needs, each with d_ff features per token in the type of the
                 products
    counterpart  the hidden_act of an export to Hugging Face; None if no exported model has it. The MLP is then
                 out(act(gate(x)) * in(x)) or, without the role mlp_gate, out(act(in(x))), and each of its matrices is
                 an attribute with the name of its role
    """

    make: Target
    roles: tuple[str, ...] = field(kw_only=True)
    kept_widths: int = field(kw_only=True)
    counterpart: str | None = field(default=None, kw_only=True)

    @property
    def n_matrices(self) -> int:
        return len(self.roles)


_PLAIN, _GATED = ("mlp_in", "mlp_out"), ("mlp_gate", "mlp_in", "mlp_out")
MLPS = Parts("MLP", MLP)
MLPS.add(
    "gelu", MLP(f"{LAYERS}:gelu_mlp", roles=_PLAIN, kept_widths=2, counterpart="gelu_pytorch_tanh"), module=__name__
)
MLPS.add("swiglu", MLP(f"{LAYERS}:swiglu_mlp", roles=_GATED, kept_widths=4, counterpart="silu"), module=__name__)
MLPS.add("relu2", MLP(f"{LAYERS}:relu2_mlp", roles=_PLAIN, kept_widths=2, counterpart="relu2"), module=__name__)


# ---- residual layouts


def _as_it_is(role: str, n_layers: int) -> float:
    return 1.0


@dataclass(frozen=True)
class Residual:
    """How a branch joins the residual stream.

    apply        (x_BTD, branch, the branch's norms, n_layers) -> x_BTD
    norms_per_branch  number of norms of a branch
    final_norm   whether one more norm comes after the last block
    init_divisor (role, n_layers) -> the divisor of the standard deviation of a parameter's initialisation
    skips_zero   whether a branch that gives zero leaves the stream as it is, with no norm after the branch, whose slope
                 is large at zero
    counterpart  the place of the norms in an export to Hugging Face; None if no exported model has this layout
    """

    apply: Target
    norms_per_branch: int = field(kw_only=True)
    final_norm: bool = field(kw_only=True)
    init_divisor: Callable[[str, int], float] = field(default=_as_it_is, kw_only=True)
    skips_zero: bool = field(default=False, kw_only=True)
    counterpart: str | None = field(default=None, kw_only=True)


RESIDUALS = Parts("residual layout", Residual)


@RESIDUALS.register(
    "pre", norms_per_branch=1, final_norm=True, skips_zero=True, counterpart="norms before the branches"
)
def _pre(x, branch, norms, n_layers):
    return x + branch(norms[0](x))


@RESIDUALS.register("post", norms_per_branch=1, final_norm=False, counterpart="norms after the sums")
def _post(x, branch, norms, n_layers):
    return norms[0](x + branch(x))


@RESIDUALS.register("reordered", norms_per_branch=1, final_norm=True, counterpart="norms after the branches")
def _reordered(x, branch, norms, n_layers):
    """OLMo 2, arXiv 2501.00656, section 3.3."""
    return x + norms[0](branch(x))


@RESIDUALS.register("peri", norms_per_branch=2, final_norm=True, counterpart="norms around the branches")
def _peri(x, branch, norms, n_layers):
    """Peri-LN, arXiv 2502.02732."""
    return x + norms[1](branch(norms[0](x)))


def _deepnorm_divisor(role: str, n_layers: int) -> float:
    """DeepNorm shrinks MLP, output and value projections at initialisation (arXiv 2203.00555, Fig. 2)."""
    return (8 * n_layers) ** 0.25 if role in ("v", "attn_out", "mlp_in", "mlp_gate", "mlp_out") else 1.0


@RESIDUALS.register(
    "deepnorm",
    norms_per_branch=1,
    final_norm=False,
    init_divisor=_deepnorm_divisor,
    counterpart="norms after the sums, deepnorm",
)
def _deepnorm(x, branch, norms, n_layers):
    """DeepNorm for a decoder, arXiv 2203.00555, Fig. 2."""
    return norms[0]((2 * n_layers) ** 0.25 * x + branch(x))


# ---- linear layers


@dataclass(frozen=True)
class Linear:
    """The matrix products inside the blocks and of an untied head.

    make         (d_in, d_out, *, role, device) -> layers.Linear, which may override `effective_weight()` and `start()`
    extra_per_matrix  number of learned numbers for each matrix in addition to its weights
    makes_weight_anew whether each forward pass computes the matrix that multiplies the inputs from the parameter
    needs_whole_tensors
                 why it cannot work on a part of its weight; None: it can
    keeps_logits whether attention logits do not change when the weights of queries and keys shrink
    zero_init    whether its weight may start at zero
    joins        whether it is x @ weight.T and nothing else, so that the products of one input can be one product
    rate_means   how it changes the meaning of one unit of learning rate; None: it does not. Rates with different
                 meanings are not compared
    """

    make: Target
    extra_per_matrix: int = field(default=0, kw_only=True)
    makes_weight_anew: bool = field(default=False, kw_only=True)
    needs_whole_tensors: str | None = field(default=None, kw_only=True)
    keeps_logits: bool = field(default=False, kw_only=True)
    zero_init: bool = field(default=True, kw_only=True)
    joins: bool = field(default=False, kw_only=True)
    rate_means: str | None = field(default=None, kw_only=True)


LINEARS = Parts("linear layer", Linear)
LINEARS.add("plain", Linear(f"{LAYERS}:Linear", joins=True), module=__name__)
LINEARS.add(
    "sigma_reparam",
    Linear(
        f"{LAYERS}:SigmaReparamLinear",
        extra_per_matrix=1,  # gamma
        makes_weight_anew=True,
        needs_whole_tensors="its singular vectors are those of whole matrices",
        keeps_logits=True,  # the scale of the weight cancels
        zero_init=False,  # W / sigma(W) would be 0 / 0
        rate_means="sigma-reparam divides each matrix by its largest singular value",
    ),
    module=__name__,
)


# ---- normalisers: attention scores to weights


@dataclass(frozen=True)
class Normaliser:
    """A function from attention scores to weights. Every path that does not list its normalisers can compute it.

    function     (scores_BHMN, allowed, n_positions) -> weights_BHMN, zero where a key is not allowed; `allowed` is
                 [M, N], or [B, 1, M, N] where documents are told apart; n_positions is the length of the whole
                 sequence, of which M and N may be a part
    depends_on_length  whether the weights of a query depend on n_positions, that is on tokens after it. If so,
                 sequences of different lengths cannot share a batch, nor documents a sequence
    sums_to_one  whether the weights of a query sum to one, so that they have an entropy
    kept_scores  number of fp32 tensors of the scores' size that autograd keeps for it, including the weights
    counterpart  its name in an export to Hugging Face; None if no exported model has it
    """

    function: Target
    depends_on_length: bool = field(kw_only=True)
    sums_to_one: bool = field(kw_only=True)
    kept_scores: int = field(kw_only=True)
    counterpart: str | None = field(default=None, kw_only=True)


NORMALISERS = Parts("attention normaliser", Normaliser)
NORMALISERS.add(
    "softmax",
    Normaliser(
        "scaling_testbed.kernels.attention.reference:softmax",
        depends_on_length=False,
        sums_to_one=True,
        kept_scores=1,
        counterpart="softmax",
    ),
    module=__name__,
)


@NORMALISERS.register("relu2", depends_on_length=True, sums_to_one=False, kept_scores=2, counterpart="relu2")
def relu_squared(scores_BHMN, allowed, n_positions: int):
    """L^(-1/2) relu(z)^2 with L the length of the sequence, the same for every query (Wortsman et al. 2023, arXiv
    2309.14322, E.11)."""
    return scores_BHMN.masked_fill(~allowed, 0).relu().square() * n_positions**-0.5


# ---- paths: several ways to compute the same result


@dataclass(frozen=True)
class Impl:
    """A path. `auto` takes the first path, in the order of registration, that can compute the config on the device.

    function     the function that computes the result; the subclasses below give its arguments
    needs        (device) -> the reason why it cannot run on the device, or None; None: it runs on every device
    automatic_on types of devices on which `auto` may take it; None: all
    """

    function: Target
    needs: Target | None = field(default=None, kw_only=True)
    automatic_on: tuple[str, ...] | None = field(default=None, kw_only=True)

    def why_not(self, device) -> str | None:
        """The reason why it cannot run on a torch.device, or None."""
        return None if self.needs is None else resolve(self.needs)(device)

    def is_automatic_on(self, device) -> bool:
        """Whether `auto` may take it on a torch.device."""
        return (self.automatic_on is None or device.type in self.automatic_on) and self.why_not(device) is None

    def lacks(self, config: ModelConfig) -> str | None:
        """The first setting of `config` that it cannot compute, as "key=value", or None."""
        raise NotImplementedError


@dataclass(frozen=True)
class AttentionImpl(Impl):
    """A path of attention. function: it has the arguments of kernels.attention.reference.attention.

    normalisers  the normalisers that it supports; None: any
    softcap, window  whether it supports them
    documents    whether it tells documents apart, by an argument begins_BT: the position at which the document of each
                 position begins
    masks        whether it then takes a mask [B, 1, T, T] of them too, mask_B1TT, in the type of the products, which
                 all layers share
    d_heads      the widths of a head that it supports; None: any
    statistics   (q, k, scale, softcap, window, normaliser) -> AttentionStatistics; None: it has none
    kept         number of tensors, each with the features of all query heads, that autograd keeps in the type of the
                 products: queries, keys, values, the result, and the input of the output projection if that is another
                 tensor
    kept_wide    number of such tensors that it keeps in fp32
    keeps_scores whether autograd keeps the tensors of the normaliser (kept_scores) and the result of a softcap
    widened_on_cpu
                 the most numbers in the keys of a head with which bf16 inputs on a CPU are computed in fp32; 0: never.
                 Autograd then keeps queries, keys, values and the result in fp32
    """

    normalisers: tuple[str, ...] | None = field(default=None, kw_only=True)
    softcap: bool = field(default=True, kw_only=True)
    window: bool = field(default=True, kw_only=True)
    documents: bool = field(default=False, kw_only=True)
    masks: bool = field(default=False, kw_only=True)
    d_heads: tuple[int, ...] | None = field(default=None, kw_only=True)
    statistics: Target | None = field(default=None, kw_only=True)
    kept: int = field(kw_only=True)
    kept_wide: int = field(default=0, kw_only=True)
    keeps_scores: bool = field(default=False, kw_only=True)
    widened_on_cpu: int = field(default=0, kw_only=True)

    def lacks(self, config: ModelConfig) -> str | None:
        if self.normalisers is not None and config.attention_normaliser not in self.normalisers:
            return f"attention_normaliser={config.attention_normaliser}"
        return self.lacks_scores(config)

    def lacks_scores(self, config: ModelConfig) -> str | None:
        """`lacks` without the check of the normaliser."""
        if config.attention_softcap is not None and not self.softcap:
            return f"attention_softcap={config.attention_softcap}"
        if config.attention_window is not None and not self.window:
            return f"attention_window={config.attention_window}"
        if self.d_heads is not None and config.head_width not in self.d_heads:
            return f"d_head={config.head_width} (not one of {', '.join(map(str, self.d_heads))})"
        return None


ATTENTION_IMPLS = Parts("path of attention", AttentionImpl)
# PyTorch's attention on a CPU, forward and backward, takes 1.0 to 3.4 times as long in bf16 as widened to fp32 if the
# keys of a head have at most this many numbers (16 to 128 features; PyTorch 2.13 on one core of an AMD Zen 5). With
# more numbers it takes 0.8 to 1.1 times as long.
SDPA_WIDENED_ON_CPU = 2**14
ATTENTION_IMPLS.add(
    "sdpa",
    AttentionImpl(
        f"{ATTENTION}:sdpa_attention",
        normalisers=("softmax",),
        softcap=False,
        window=False,
        documents=True,
        masks=True,
        kept=5,
        widened_on_cpu=SDPA_WIDENED_ON_CPU,
    ),
    module=__name__,
)
ATTENTION_IMPLS.add(
    "triton",
    AttentionImpl(
        f"{ATTENTION}:triton_attention",
        needs=TRITON_WHY_NOT,
        automatic_on=("cuda",),
        normalisers=("softmax",),
        documents=True,
        d_heads=ATTENTION_D_HEADS,
        statistics=f"{ATTENTION}:triton_statistics",
        kept=4,
    ),
    module=__name__,
)
ATTENTION_IMPLS.add(
    "reference",
    AttentionImpl(
        "scaling_testbed.kernels.attention.reference:attention",
        documents=True,
        statistics="scaling_testbed.kernels.attention.reference:attention_statistics",
        kept=1,
        kept_wide=3,
        keeps_scores=True,
    ),
    module=__name__,
)


@dataclass(frozen=True)
class QKNormImpl(Impl):
    """A path of the norm and rotation of queries and keys.

    function     (Attention, q_BTD, k_BTD, cos_TR, sin_TR) -> q_BHTK, k_BGTK
    widest_head  the largest width of a head that it supports; None: any
    widest_row   the most features of all heads that it norms together, padded (limits.padded_row); None: any number
    """

    widest_head: int | None = field(default=None, kw_only=True)
    widest_row: int | None = field(default=None, kw_only=True)

    def lacks(self, config: ModelConfig) -> str | None:
        if self.widest_head is not None and config.head_width > self.widest_head:
            return f"d_head={config.head_width} (more than {self.widest_head})"
        together = config.norms_heads_together and config.query_key_norm.fused_kind is not None
        row = padded_row(config.n_heads, config.head_width)
        if self.widest_row is not None and together and row > self.widest_row:
            return f"qk_norm_axis=full (over {row} features with padding, more than {self.widest_row})"
        return None


QK_NORM_IMPLS = Parts("path of the norm of queries and keys", QKNormImpl)
QK_NORM_IMPLS.add(
    "triton",
    QKNormImpl(
        f"{ATTENTION}:fused_queries_and_keys",
        needs=TRITON_WHY_NOT,
        automatic_on=("cuda",),
        widest_head=QK_NORM_ROPE_WIDEST_HEAD,
        widest_row=QK_NORM_ROPE_WIDEST_ROW,
    ),
    module=__name__,
)
QK_NORM_IMPLS.add("reference", QKNormImpl(f"{ATTENTION}:plain_queries_and_keys"), module=__name__)


@dataclass(frozen=True)
class QKVImpl(Impl):
    """A path of the products that make queries, keys and values.

    function     (Attention, x_BTD) -> q_BTD, k_BTD, v_BTD
    joins        whether it is one product with a copy of the three weights. Autograd then keeps the copy, and queries,
                 keys and values as one tensor
    """

    joins: bool = field(default=False, kw_only=True)

    def lacks(self, config: ModelConfig) -> str | None:
        return f"linear={config.linear}" if self.joins and not LINEARS[config.linear].joins else None


QKV_IMPLS = Parts("path of queries, keys and values", QKVImpl)
QKV_IMPLS.add("separate", QKVImpl(f"{ATTENTION}:separate_products"), module=__name__)
QKV_IMPLS.add("together", QKVImpl(f"{ATTENTION}:one_product", joins=True), module=__name__)

# Key of ModelConfig -> its paths.
IMPLS: Mapping[str, Mapping[str, Impl]] = {
    "attention_impl": ATTENTION_IMPLS,
    "qk_norm_impl": QK_NORM_IMPLS,
    "qkv_impl": QKV_IMPLS,
}


def able_impls(key: str, config: ModelConfig) -> list[str]:
    """The names of the paths of `key` that can compute `config`, the preferred path first."""
    return [name for name, impl in IMPLS[key].items() if impl.lacks(config) is None]


def choose_impl(key: str, config: ModelConfig, device=None) -> str:
    """The path that `config.<key>` stands for: the named path, or the path that `auto` takes.

    device: a torch.device; None: a device on which every path runs.
    """
    named = getattr(config, key)
    if named != AUTO:
        return named
    return next(name for name in able_impls(key, config) if device is None or IMPLS[key][name].is_automatic_on(device))
