"""The configuration of a model as plain data. Nothing here needs torch, so that a sweep can be planned without it."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from scaling_testbed.errors import ConfigError, check_choice, check_positive
from scaling_testbed.keys import ADDED_LATER, check_choices, key
from scaling_testbed.model import parts
from scaling_testbed.registry import Registry

QK_NORM_AXES = ("head", "full")
ATTENTION_SCALES = ("inverse_sqrt", "inverse")
D_FF_RULES = {
    "4x": lambda d_model: 4 * d_model,
    # 8d/3 rounded up to a multiple of 256 keeps a gated MLP near 8d^2 weights (open_lm, arXiv 2403.08540).
    "swiglu_256": lambda d_model: 256 * -(-(8 * d_model // 3) // 256),
}

MOST_LAYERS = 100_000  # counts and plans look at each layer


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The architecture. The defaults are those of Wortsman et al. 2023 (arXiv 2309.14322, section 2.1).

    n_kv_heads, d_head, d_ff and vocab_size may be None; `resolved` then sets them by a rule.
    """

    name: str = key("custom", "A label for people; other keys decide the model.")
    d_model: int = key(64, "Width of the residual stream.")
    n_layers: int = key(2, "Number of blocks. 0: embedding, norm and head only, which is a bigram model.")
    n_heads: int = key(4, "Number of query heads.")
    n_kv_heads: int | None = key(None, "Number of key and value heads. null: n_heads.")
    d_head: int | None = key(None, "Width of a head; it must be even. null: d_model / n_heads.")
    d_ff: int | None = key(None, "Width of the MLP. null: by d_ff_rule.")
    d_ff_rule: str = key(
        "4x",
        "The width of the MLP where d_ff is null. 4x: 4 d_model. swiglu_256: 8 d_model / 3, rounded up to a multiple "
        "of 256, as in open_lm.",
        choices=D_FF_RULES,
    )
    vocab_size: int | None = key(
        None, "Rows of the embedding; at least the vocabulary of the data. null: the vocabulary of the data."
    )
    norm: str = key("layernorm", "The norm of the residual stream.", choices=parts.NORMS)
    norm_eps: float = key(1e-6, "The eps of all norms.")
    qk_norm: str = key(
        "layernorm", "The norm of queries and keys before the rotation, with gains.", choices=parts.QK_NORMS
    )
    qk_norm_axis: str = key(
        "head",
        "What the qk-norm goes over. head: d_head, with one gain of d_head that all heads share. full: all heads "
        "together.",
        choices=QK_NORM_AXES,
    )
    kappa: float | None = key(
        None,
        "With it, q and k become sqrt(kappa) z / RMS(z) in each head, without gains and in place of a qk-norm. This "
        "sets the size of the attention logits (Wortsman et al. 2023, Fig. 10). It needs qk_norm=none. null: not used.",
    )
    mlp: str = key("gelu", "The MLP.", choices=parts.MLPS)
    tied_head: bool = key(False, "Whether the head is the embedding matrix.")
    attention_scale: str = key(
        "inverse_sqrt",
        "The factor on q.k. inverse_sqrt: 1 / sqrt(d_head). inverse: 1 / d_head.",
        choices=ATTENTION_SCALES,
    )
    attention_softcap: float | None = key(
        None, "c: an attention score z becomes c tanh(z / c). null: scores are not capped."
    )
    attention_window: int | None = key(
        None, "Number of keys that a query sees, its own position included. null: all of the past."
    )
    attention_normaliser: str = key(
        "softmax",
        "How scores z become weights. relu2: L^(-1/2) relu(z)^2 with L the length of the sequence, on the reference "
        "path only (Wortsman et al. 2023, E.11).",
        choices=parts.NORMALISERS,
    )
    final_softcap: float | None = key(None, "c: an output logit z becomes c tanh(z / c). null: logits are not capped.")
    residual: str = key(
        "pre",
        "The residual layout, with f a branch and n a norm. pre: x + f(n(x)). post: n(x + f(x)). reordered: x + "
        "n(f(x)) (OLMo 2). peri: x + n(f(n(x))). deepnorm: n(alpha x + f(x)) with alpha = (2 n_layers)^(1/4).",
        choices=parts.RESIDUALS,
    )
    rope_base: float = key(10000.0, "The base of the rotary position embedding.")
    attention_impl: str = key(
        "auto",
        "The path that computes attention: reference, sdpa (PyTorch's; no softcap, no window), triton. auto: sdpa "
        "where it can, else triton on a GPU, else reference. It is picked once, when the model is built.",
    )
    qk_norm_impl: str = key(
        "auto",
        "The path that norms and rotates queries and keys: reference, triton (one kernel). auto: triton on a GPU, else "
        "reference.",
    )
    qkv_impl: str = key(
        "auto",
        "The path that makes queries, keys and values: separate (three products), together (one product with the three "
        "weights side by side; plain linear layers only). auto: separate.",
        identity=ADDED_LATER,
    )
    embedding_gradient_scale: float | None = key(
        None,
        "a: the gradient that the embedding gets through its look-up is multiplied by a, e <- a e + (1 - a) stop(e) "
        "(GLM-130B, arXiv 2210.02414, section 2.3, a = 0.1). A tied matrix keeps its gradient as the head. Adam's "
        "update does not depend on the size of a gradient; with Adam this acts through the clipping of the global norm "
        "and through eps. null: not used.",
        identity=ADDED_LATER,
    )
    linear: str = key(
        "plain",
        "The weight of every matrix product, with that of an untied head. plain: W. sigma_reparam: gamma W / sigma(W), "
        "with sigma the largest singular value and gamma learned (Zhai et al. 2023, arXiv 2303.06296, section 3.1). It "
        "is meant for qk_norm=none: a qk-norm leaves the gammas of q and k without effect.",
        identity=ADDED_LATER,
        choices=parts.LINEARS,
    )

    def __post_init__(self):
        for name in ("d_model", "n_heads", "n_kv_heads", "d_head", "d_ff", "vocab_size", "attention_window"):
            check_positive(name, getattr(self, name))
        for name in ("norm_eps", "kappa", "attention_softcap", "final_softcap", "rope_base"):
            check_positive(name, getattr(self, name))
        if self.embedding_gradient_scale is not None and not 0 < self.embedding_gradient_scale <= 1:
            raise ConfigError(
                f"embedding_gradient_scale must be null or in (0, 1], got {self.embedding_gradient_scale}"
            )
        if not 0 <= self.n_layers <= MOST_LAYERS:
            raise ConfigError(f"n_layers must lie between 0 and {MOST_LAYERS:,}, got {self.n_layers}")
        check_choices(self)
        self._check_heads()
        for name in parts.IMPLS:
            self._check_impl(name)

    def _check_heads(self):
        if self.d_head is None and self.d_model % self.n_heads:
            raise ConfigError(
                f"d_model must be a multiple of n_heads={self.n_heads} unless d_head is set, got {self.d_model}"
            )
        if self.head_width % 2:
            raise ConfigError(
                f"d_head must be even, because the rotary embedding rotates pairs of features, got {self.head_width}"
            )
        if self.n_kv_heads is not None and self.n_heads % self.n_kv_heads:
            raise ConfigError(f"n_kv_heads must be a divisor of n_heads ({self.n_heads}), got {self.n_kv_heads}")
        if self.kappa is not None and parts.QK_NORMS[self.qk_norm].function is not None:
            raise ConfigError(
                f"kappa must be null unless qk_norm=none, because it replaces the qk-norm, got qk_norm={self.qk_norm}"
            )

    def _check_impl(self, name: str):
        named, impls = getattr(self, name), parts.IMPLS[name]
        check_choice(name, named, (parts.AUTO, *impls))
        if named != parts.AUTO and (lacking := impls[named].lacks(self)):
            able = " or ".join((parts.AUTO, *parts.able_impls(name, self)))
            raise ConfigError(f"{name} must be {able} with {lacking}, got {named}")

    @property
    def head_width(self) -> int:
        """d_head, or its value by rule if it is None."""
        return self.d_head or self.d_model // self.n_heads

    @property
    def kv_heads(self) -> int:
        """n_kv_heads, or its value by rule if it is None."""
        return self.n_kv_heads or self.n_heads

    @property
    def ff_width(self) -> int:
        """d_ff, or its value by rule if it is None."""
        return self.d_ff or D_FF_RULES[self.d_ff_rule](self.d_model)

    @property
    def known_vocab_size(self) -> int:
        """vocab_size. Raises ConfigError if it is not known yet; `resolved` sets it."""
        if self.vocab_size is None:
            raise ConfigError("vocab_size must be known: use config.resolved(vocab_size)")
        return self.vocab_size

    @property
    def query_key_norm(self) -> parts.QKNorm:
        """The facts about the norm of queries and keys: that of kappa if it is set, else that of `qk_norm`."""
        return parts.QK_NORMS[self.qk_norm] if self.kappa is None else parts.KAPPA

    @property
    def norms_heads_together(self) -> bool:
        """Whether the norm of queries and keys goes over all heads together."""
        return self.qk_norm_axis == "full" and not self.query_key_norm.per_head

    def with_auto_paths(self) -> "ModelConfig":
        """The same model on the paths that `auto` takes, so that any device can compute it."""
        paths: dict[str, Any] = dict.fromkeys(parts.IMPLS, parts.AUTO)
        return dataclasses.replace(self, **paths)

    def resolved(self, vocab_size: int) -> "ModelConfig":
        """The same model with all rules applied.

        The rules are n_kv_heads = n_heads, d_head = d_model / n_heads, d_ff by d_ff_rule, and the data's `vocab_size`
        unless the config has a larger, padded vocabulary. Raises ConfigError if the config's own vocabulary is smaller
        than the data's.
        """
        if self.vocab_size is not None and self.vocab_size < vocab_size:
            raise ConfigError(f"vocab_size must be at least the data's {vocab_size}, got {self.vocab_size}")
        return dataclasses.replace(
            self,
            n_kv_heads=self.kv_heads,
            d_head=self.head_width,
            d_ff=self.ff_width,
            vocab_size=self.vocab_size or vocab_size,
        )


@dataclass(frozen=True, kw_only=True)
class GrowthConfig:
    """How a larger model is made of a smaller one; see model/growth.py.

    width: fpi | aki, for twice the width; None: the same width. fpi copies, so that no result changes. aki takes the
    second copies from the next layer. noise: the std of the antisymmetric noise that lets copies part, as a multiple of
    the RMS of the parent's matrix. depth: zero | repeat | stack, for more layers; None: as many. Without width and
    depth nothing grows.
    """

    width: str | None = None
    noise: float = 1.0
    depth: str | None = None

    def __post_init__(self) -> None:
        if self.width not in (None, "fpi", "aki"):
            raise ConfigError(f"start.grow.width must be fpi or aki; got {self.width!r}")
        if self.depth not in (None, "zero", "repeat", "stack"):
            raise ConfigError(f"start.grow.depth must be zero, repeat or stack; got {self.depth!r}")
        if isinstance(self.noise, bool) or not isinstance(self.noise, (int, float)) or not 0 <= self.noise < 100:
            raise ConfigError(f"start.grow.noise must be a number from 0 to 100; got {self.noise!r}")


@dataclass(frozen=True, kw_only=True)
class Rules:
    """The rules of ParametrizationConfig that a parametrization has, (i) to (iv) in order."""

    scales_lr: bool = False
    scales_head_init: bool = False
    inverse_attention_scale: bool = False
    zero_queries: bool = False


PARAMETRIZATIONS: Registry[Rules] = Registry("parametrization")
PARAMETRIZATIONS.add("standard", Rules())
PARAMETRIZATIONS.add("mup_simple", Rules(scales_lr=True))
PARAMETRIZATIONS.add("mup_intermediate", Rules(scales_lr=True, scales_head_init=True))
PARAMETRIZATIONS.add(
    "mup_full", Rules(scales_lr=True, scales_head_init=True, inverse_attention_scale=True, zero_queries=True)
)


@dataclass(frozen=True, kw_only=True)
class ParametrizationConfig:
    """How initialisation and learning rate depend on width: arXiv 2309.14322, section 3.2.4 and E.5.

    Rules: (i) the learning rate of linear layers is multiplied by base_fan_in / fan_in; (ii) the standard deviation of
    the head's initialisation is sqrt(base_fan_in) / fan_in; (iii) the attention scale is 1 / d_head; (iv) query
    projections start at zero. mup_simple has rule (i), mup_intermediate (i) and (ii), mup_full all four, standard none.

    Rule (iv) with a qk-norm makes the first step unusual. The norm of a zero query has the slope 1 / sqrt(norm_eps), so
    the gradient of q is much larger than all others in the global norm, and the gradient of k is zero.
    """

    name: str = key("standard", "Which of the rules hold.", choices=PARAMETRIZATIONS)
    base_width: int = key(
        256, "The d_model at which rules (i) and (ii) change nothing. The paper's smallest model has 256."
    )
    scale_head_lr: bool = key(True, "Whether rule (i) holds for the head too. The paper leaves it open.")
    scale_weight_decay_with_lr: bool = key(
        True,
        "Whether rule (i) multiplies the weight decay too. The paper leaves it open. It does where the factor is "
        "applied to the whole AdamW update, as in nanodo.",
    )

    def __post_init__(self):
        check_choices(self)
        check_positive("base_width", self.base_width)

    @property
    def rules(self) -> Rules:
        """The rules of this parametrization."""
        return PARAMETRIZATIONS[self.name]
