"""What a model is, as plain data. Nothing here needs torch, so that a sweep can be planned without it."""

import dataclasses
from dataclasses import dataclass, field

from scaling_testbed.errors import ConfigError, check_choice, check_positive
from scaling_testbed.keys import ADDED_LATER
from scaling_testbed.model import parts
from scaling_testbed.registry import Registry

QK_NORM_AXES = ("head", "full")
ATTENTION_SCALES = ("inverse_sqrt", "inverse")
D_FF_RULES = {
    "4x": lambda d_model: 4 * d_model,
    # 8d/3 rounded up to a multiple of 256 keeps a gated MLP near 8d^2 weights (open_lm, arXiv 2403.08540).
    "swiglu_256": lambda d_model: 256 * -(-(8 * d_model // 3) // 256),
}


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The architecture. The defaults are those of Wortsman et al. 2023 (arXiv 2309.14322, section 2.1).

    n_kv_heads, d_head, d_ff and vocab_size may be None, which means by rule: see `resolved`.

    d_ff_rule       used where d_ff is None: 4x | swiglu_256
    qk_norm         of queries and keys before the rotation, with gains: none | layernorm | rmsnorm
    qk_norm_axis    head: over d_head, one gain of d_head shared by all heads | full: over all heads together
    kappa           if set, q and k become sqrt(kappa) z / RMS(z) per head, without gains, in place of a qk-norm, which
                    imposes the size of the attention logits (arXiv 2309.14322, Fig. 10)
    residual        with f a branch: pre x+f(n(x)) | post n(x+f(x)) | reordered x+n(f(x)) (OLMo 2) |
                    peri x+n(f(n(x))) | deepnorm n(alpha x+f(x)), alpha = (2 n_layers)^(1/4)
    attention_scale inverse_sqrt: 1/sqrt(d_head) | inverse: 1/d_head
    attention_window
                    how many keys a query sees, its own among them; None: all of the past
    attention_normaliser
                    what makes weights of scores z: softmax | relu2 L^(-1/2) relu(z)^2, with L the length of the
                    sequence at hand, on the reference path only (E.11)
    attention_impl  the path that computes attention: reference | sdpa (PyTorch's; no softcap, no window) | triton |
                    auto: sdpa where it can, else triton on a GPU, else reference; picked once, when the model is built
    qk_norm_impl    the path that norms and rotates queries and keys: reference | triton (one kernel) | auto: triton
                    on a GPU, else reference
    embedding_gradient_scale
                    a: the gradient of the embedding through its look-up is multiplied by a, e <- a e + (1 - a) stop(e)
                    (GLM-130B, arXiv 2210.02414, section 2.3, a = 0.1); a tied matrix keeps its gradient as the head.
                    Adam's update does not know the size of a gradient, so with it this acts through the clipping of
                    the global norm and through eps. None: it is not touched
    linear          every matrix product's weight, an untied head's included: plain W | sigma_reparam
                    gamma W / sigma(W), sigma the largest singular value, gamma learned (Zhai et al. 2023, arXiv
                    2303.06296, section 3.1; see layers.SigmaReparamLinear). Meant for qk_norm=none: a qk-norm leaves
                    the gammas of q and k without effect
    n_layers        0 gives embedding, norm and head only: a bigram model
    """

    name: str = "custom"
    d_model: int = 64
    n_layers: int = 2
    n_heads: int = 4
    n_kv_heads: int | None = None
    d_head: int | None = None
    d_ff: int | None = None
    d_ff_rule: str = "4x"
    vocab_size: int | None = None
    norm: str = "layernorm"
    norm_eps: float = 1e-6
    qk_norm: str = "layernorm"
    qk_norm_axis: str = "head"
    kappa: float | None = None
    mlp: str = "gelu"
    tied_head: bool = False
    attention_scale: str = "inverse_sqrt"
    attention_softcap: float | None = None
    attention_window: int | None = None
    attention_normaliser: str = "softmax"
    final_softcap: float | None = None
    residual: str = "pre"
    rope_base: float = 10000.0
    attention_impl: str = "auto"
    qk_norm_impl: str = "auto"
    embedding_gradient_scale: float | None = field(default=None, metadata=ADDED_LATER)
    linear: str = field(default="plain", metadata=ADDED_LATER)

    def __post_init__(self):
        for key in ("d_model", "n_heads", "n_kv_heads", "d_head", "d_ff", "vocab_size", "attention_window"):
            check_positive(key, getattr(self, key))
        for key in ("norm_eps", "kappa", "attention_softcap", "final_softcap", "rope_base"):
            check_positive(key, getattr(self, key))
        if self.embedding_gradient_scale is not None and not 0 < self.embedding_gradient_scale <= 1:
            raise ConfigError(
                f"embedding_gradient_scale must be null or in (0, 1], got {self.embedding_gradient_scale}"
            )
        if self.n_layers < 0:
            raise ConfigError(f"n_layers must be zero or more, got {self.n_layers}")
        check_choice("d_ff_rule", self.d_ff_rule, D_FF_RULES)
        check_choice("norm", self.norm, parts.NORMS)
        check_choice("qk_norm", self.qk_norm, parts.QK_NORMS)
        check_choice("qk_norm_axis", self.qk_norm_axis, QK_NORM_AXES)
        check_choice("mlp", self.mlp, parts.MLPS)
        check_choice("attention_scale", self.attention_scale, ATTENTION_SCALES)
        check_choice("attention_normaliser", self.attention_normaliser, parts.NORMALISERS)
        check_choice("residual", self.residual, parts.RESIDUALS)
        check_choice("linear", self.linear, parts.LINEARS)
        self._check_heads()
        for key in parts.IMPLS:
            self._check_impl(key)

    def _check_heads(self):
        if self.d_head is None and self.d_model % self.n_heads:
            raise ConfigError(
                f"d_model must be a multiple of n_heads={self.n_heads} or d_head be given, got {self.d_model}"
            )
        if self.head_width % 2:
            raise ConfigError(
                f"d_head must be even, because rotary positions turn pairs of features, got {self.head_width}"
            )
        if self.n_kv_heads is not None and self.n_heads % self.n_kv_heads:
            raise ConfigError(f"n_kv_heads must be a divisor of n_heads ({self.n_heads}), got {self.n_kv_heads}")
        if self.kappa is not None and parts.QK_NORMS[self.qk_norm].function is not None:
            raise ConfigError(
                f"kappa must be null unless qk_norm=none, whose place it takes, got qk_norm={self.qk_norm}"
            )

    def _check_impl(self, key: str):
        named, impls = getattr(self, key), parts.IMPLS[key]
        check_choice(key, named, (parts.AUTO, *impls))
        if named != parts.AUTO and (lacking := impls[named].lacks(self)):
            able = " or ".join((parts.AUTO, *parts.able_impls(key, self)))
            raise ConfigError(f"{key} must be {able} with {lacking}, got {named}")

    @property
    def head_width(self) -> int:
        """d_head, by its rule where it is not given."""
        return self.d_head or self.d_model // self.n_heads

    @property
    def kv_heads(self) -> int:
        """n_kv_heads, by its rule where it is not given."""
        return self.n_kv_heads or self.n_heads

    @property
    def ff_width(self) -> int:
        """d_ff, by its rule where it is not given."""
        return self.d_ff or D_FF_RULES[self.d_ff_rule](self.d_model)

    @property
    def known_vocab_size(self) -> int:
        """vocab_size. Raises ConfigError where it is not known yet: see `resolved`."""
        if self.vocab_size is None:
            raise ConfigError("vocab_size must be known: use config.resolved(vocab_size)")
        return self.vocab_size

    @property
    def query_key_norm(self) -> parts.QKNorm:
        """What is true of the norm of queries and keys: kappa's where it is set, else that of `qk_norm`."""
        return parts.QK_NORMS[self.qk_norm] if self.kappa is None else parts.KAPPA

    @property
    def norms_heads_together(self) -> bool:
        """Whether that norm is over all heads together."""
        return self.qk_norm_axis == "full" and not self.query_key_norm.per_head

    def resolved(self, vocab_size: int) -> "ModelConfig":
        """The same model with nothing left to a rule: n_kv_heads (n_heads), d_head (d_model / n_heads), d_ff
        (d_ff_rule), and the vocabulary: the data's `vocab_size` unless the config has a larger, padded one.

        Raises ConfigError where the config's own vocabulary is smaller than the data's.
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
class Rules:
    """Which of the rules of ParametrizationConfig a parametrization has, (i) to (iv) in order."""

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

    Rules: (i) learning rate of linear layers times base_fan_in / fan_in; (ii) head init std sqrt(base_fan_in)
    / fan_in; (iii) attention scale 1 / d_head; (iv) query projections start at zero.
    mup_simple is (i), mup_intermediate (i) and (ii), mup_full all four, standard none.

    base_width      the d_model at which (i) and (ii) change nothing; the paper's smallest is 256
    scale_head_lr   whether the head is a "linear layer" in rule (i), which the paper leaves open
    scale_weight_decay_with_lr
                    whether a weight's decay shrinks with its learning rate in (i), which the paper leaves
                    open. It does where the multiplier is applied to the whole AdamW update, as nanodo does

    With (iv) and a qk-norm the first step is peculiar: the norm of a zero query has the slope 1 / sqrt(norm_eps), so
    that the gradient of q dwarfs the others in the global norm, and k's is zero.
    """

    name: str = "standard"
    base_width: int = 256
    scale_head_lr: bool = True
    scale_weight_decay_with_lr: bool = True

    def __post_init__(self):
        check_choice("name", self.name, PARAMETRIZATIONS)
        check_positive("base_width", self.base_width)

    @property
    def rules(self) -> Rules:
        """Those that it has."""
        return PARAMETRIZATIONS[self.name]
