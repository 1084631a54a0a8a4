"""What can be set about learning, free of torch so that a grid can be planned without importing it."""

import dataclasses
import math
from dataclasses import dataclass, field

from scaling_testbed.errors import ConfigError, check_choice, check_not_negative, check_positive
from scaling_testbed.keys import ADDED_LATER, EXECUTION_ONLY
from scaling_testbed.model.parametrization import ROLES


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """What all optimizers have, with the defaults of Wortsman et al. 2023, section 2.1.

    decay: with s the schedule's factor in [0, 1], lr the peak rate and u the optimizer's update, a step is
        independent: w <- w - s (lr u + weight_decay w)
        coupled:     w <- w - s lr (u + weight_decay w)      (what PyTorch and Optax do)
    weight_decay_steps: None: weight_decay is the same in a run of any length. A number of steps T: it is that of a run
        of T steps, and one of t steps multiplies it by T / t, so that a weight without gradient shrinks as much over
        either (cf. Wang and Aitchison 2024, arXiv 2405.13698). In very short runs that holds the weights near zero
        at low rates, since lr / weight_decay sets their scale.
    decay_roles: the parameter roles that decay; None: all of them, norm gains and embeddings included. (The paper
        does not say; the public nanodo excludes nothing.)
    lr_multipliers: role -> factor on the learning rate, on top of the parametrization's.
    clip_norm: global gradient norm to clip at; None: no clipping, the norm is still recorded.
    skip_spikes_sigmas: leave out an update whose loss or gradient norm lies more than so many standard deviations above
        the mean of the last `skip_spikes_window` updates that were made (OLMo 2, arXiv 2501.00656, has 6 and 128); see
        learning/spikes.py. None: every update is made.
    qk_clip: tau: after an update, the query and key weights of a head whose largest attention logit in that step's
        batch was S > tau are shrunk so that its logits become tau / S of what they were (Kimi K2, arXiv 2507.20534,
        section 2.1, where tau is 100); see learning/qk_clip.py. Not with what norms queries and keys. None: never.
    """

    name: str = ""
    lr: float = 1e-2
    weight_decay: float = 1e-4
    weight_decay_steps: float | None = field(default=None, metadata=ADDED_LATER)
    decay: str = "independent"
    decay_roles: list[str] | None = None
    lr_multipliers: dict[str, float] = field(default_factory=dict)
    clip_norm: float | None = 1.0
    skip_spikes_sigmas: float | None = field(default=None, metadata=ADDED_LATER)
    skip_spikes_window: int = field(default=128, metadata=ADDED_LATER)
    qk_clip: float | None = field(default=None, metadata=ADDED_LATER)

    def __post_init__(self):
        check_choice("decay", self.decay, ("independent", "coupled"))
        for key in ("lr", "weight_decay_steps", "clip_norm", "skip_spikes_sigmas", "qk_clip"):
            check_positive(key, getattr(self, key))
        if self.skip_spikes_window < 4:
            raise ConfigError(f"skip_spikes_window must be at least 4; got {self.skip_spikes_window}")
        check_not_negative("weight_decay", self.weight_decay)
        for role in self.decay_roles or []:
            check_choice("decay_roles", role, ROLES)
        for role, factor in self.lr_multipliers.items():
            check_choice("lr_multipliers", role, ROLES)
            check_positive(f"lr_multipliers.{role}", factor)

    def for_length(self, steps: int) -> "OptimizerConfig":
        """The same with the weight decay of a schedule of `steps` steps, however few of them the run takes."""
        if self.weight_decay_steps is None:
            return self
        decay = self.weight_decay * self.weight_decay_steps / steps
        return dataclasses.replace(self, weight_decay=decay, weight_decay_steps=None)

    def _check_fractions(self, *keys: str) -> None:
        for key in keys:
            if not 0 <= getattr(self, key) < 1:
                raise ConfigError(f"{key} must lie in [0, 1); got {getattr(self, key)}")


@dataclass(frozen=True, kw_only=True)
class AdamWConfig(OptimizerConfig):
    """AdamW (Loshchilov and Hutter 2019).

    update_clipping: divide each tensor's rate by max(1, RMS(g / sqrt(second moment))): StableAdamW (Wortsman et al.
        2023, "Stable and low-precision training for large-scale vision-language models", algorithm 2).
    scale_lr_by_param_rms: multiply each tensor's rate by max(RMS(w), 1e-3) of the weights before the step (Adafactor,
        arXiv 1804.04235, algorithm 4; Wortsman et al. 2023, E.14). The decay is not multiplied, independent or
        coupled: neither is it in Optax's Adafactor, and the paper's independent decay knows no rate.
    fused: PyTorch's one-kernel step; None: where it exists. Not available together with the two above.
    """

    name: str = "adamw"
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    update_clipping: bool = False
    scale_lr_by_param_rms: bool = field(default=False, metadata=ADDED_LATER)
    fused: bool | None = None

    def __post_init__(self):
        super().__post_init__()
        self._check_fractions("beta1", "beta2")
        check_positive("eps", self.eps)  # with 0 the embedding of a token that never came would be 0/0
        for key in ("update_clipping", "scale_lr_by_param_rms"):
            if getattr(self, key) and self.fused:
                raise ConfigError(f"fused cannot be true together with {key}")


@dataclass(frozen=True, kw_only=True)
class AdamAtan2Config(OptimizerConfig):
    """Adam-atan2 (Everett et al. 2024, arXiv 2407.05872): Adam's update m / (sqrt(v) + eps) becomes
    a atan2(m, b sqrt(v)), with m and v its bias-corrected moments. It does not change when all gradients of a tensor
    are multiplied by a number, so there is no eps, and it is at most a pi / 2.

    a: 4 / pi, with b = 1, makes the update of a constant gradient one, as Adam's is.
    scale_lr_by_param_rms: as in AdamW.
    """

    name: str = "adam_atan2"
    beta1: float = 0.9
    beta2: float = 0.95
    a: float = 4 / math.pi
    b: float = 1.0
    scale_lr_by_param_rms: bool = False

    def __post_init__(self):
        super().__post_init__()
        self._check_fractions("beta1", "beta2")
        check_positive("a", self.a)
        check_positive("b", self.b)


@dataclass(frozen=True, kw_only=True)
class MuonConfig(OptimizerConfig):
    """Muon (Jordan et al. 2024) for the matrices inside the blocks, AdamW for all other parameters.

    Muon's update is its momentum orthogonalised by `ns_steps` Newton-Schulz iterations in bf16. Its decay is the one
    above, by the group's rate, so the same for both kinds.

    lr_adjustment: what multiplies the rate of a matrix of A x B (outputs x inputs):
        match_rms_adamw: 0.2 sqrt(max(A, B)), so that an update has about the RMS of AdamW's and both kinds can share a
            rate (Liu et al. 2025, arXiv 2502.16982, eq. 4)
        original: sqrt(max(1, A / B))
        Either way a rate does not mean what it means for AdamW: their LR sensitivities are not to be compared.
    beta1, beta2, eps: AdamW's.
    """

    name: str = "muon"
    momentum: float = 0.95
    nesterov: bool = True
    ns_steps: int = 5
    lr_adjustment: str = "match_rms_adamw"
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8

    def __post_init__(self):
        super().__post_init__()
        self._check_fractions("momentum", "beta1", "beta2")
        check_positive("eps", self.eps)
        check_choice("lr_adjustment", self.lr_adjustment, ("match_rms_adamw", "original"))
        if not 1 <= self.ns_steps < 100:
            raise ConfigError(f"ns_steps must be 1 to 99; got {self.ns_steps}")


# Config files name one of these as their schema.
OPTIMIZERS = {"adamw": AdamWConfig, "adam_atan2": AdamAtan2Config, "muon": MuonConfig}

LOSS_IMPLS = ("auto", "reference", "chunked", "triton")


@dataclass(frozen=True, kw_only=True)
class CrossEntropyConfig:
    """Cross-entropy plus z-loss, z_loss * mean(log^2 Z) (Chowdhery et al. 2022, PaLM, section 5).

    impl: reference (all logits at once) | chunked (a part of the tokens at a time) | triton (the same in Triton
        kernels, on a GPU) | auto (triton where it can run on a GPU, else chunked).
    chunk_mib: MiB of logits held at once by chunked and triton; None: 64 on a CPU; on a GPU 1024, or
        what 4096 tokens take if that is more and at most a sixteenth of its memory.
    """

    name: str = "cross_entropy"
    z_loss: float = 1e-4
    impl: str = "auto"
    chunk_mib: int | None = field(default=None, metadata=EXECUTION_ONLY)

    def __post_init__(self):
        check_choice("impl", self.impl, LOSS_IMPLS)
        check_positive("chunk_mib", self.chunk_mib)
        check_not_negative("z_loss", self.z_loss)

    def logits_bytes(self, tokens: int, vocab_size: int) -> int:
        """Bytes of logits that a GPU holds at once for so many tokens: of the reference's the logits, their softmax and
        their gradient, of the others' a chunk."""
        everything = 4 * tokens * vocab_size
        if self.impl == "reference":
            return 3 * everything
        return min(self.chunk_mib * 2**20 if self.chunk_mib else 2**30, everything)
