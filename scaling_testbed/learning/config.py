"""What can be set about learning, free of torch so that a grid can be planned without importing it."""

from dataclasses import dataclass, field

from scaling_testbed.errors import ConfigError, check_choice, check_positive
from scaling_testbed.model.parametrization import ROLES


@dataclass(frozen=True, kw_only=True)
class AdamWConfig:
    """AdamW (Loshchilov and Hutter 2019) with the defaults of Wortsman et al. 2023, section 2.1.

    decay: with s the schedule's factor in [0, 1], lr the peak rate and u Adam's update, a step is
        independent: w <- w - s (lr u + weight_decay w)
        coupled:     w <- w - s lr (u + weight_decay w)      (what PyTorch and Optax do)
    decay_roles: the parameter roles that decay; None: all of them, norm gains and embeddings included. (The paper
        does not say; the public nanodo excludes nothing.)
    lr_multipliers: role -> factor on the learning rate, on top of the parametrization's.
    clip_norm: global gradient norm to clip at; None: no clipping, the norm is still recorded.
    update_clipping: divide each tensor's rate by max(1, RMS(g / sqrt(second moment))): StableAdamW (Wortsman et al.
        2023, "Stable and low-precision training for large-scale vision-language models", algorithm 2).
    fused: PyTorch's one-kernel step; None: where it exists. Not available together with update_clipping.
    """

    name: str = "adamw"
    lr: float = 1e-2
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 1e-4
    decay: str = "independent"
    decay_roles: list[str] | None = None
    lr_multipliers: dict[str, float] = field(default_factory=dict)
    clip_norm: float | None = 1.0
    update_clipping: bool = False
    fused: bool | None = None

    def __post_init__(self):
        check_choice("decay", self.decay, ("independent", "coupled"))
        check_positive("lr", self.lr)
        check_positive("clip_norm", self.clip_norm)
        for key in ("beta1", "beta2"):
            if not 0 <= getattr(self, key) < 1:
                raise ConfigError(f"{key} must lie in [0, 1); got {getattr(self, key)}")
        for key in ("eps", "weight_decay"):
            if getattr(self, key) < 0:
                raise ConfigError(f"{key} must not be negative; got {getattr(self, key)}")
        for role in self.decay_roles or []:
            check_choice("decay_roles", role, ROLES)
        for role, factor in self.lr_multipliers.items():
            check_choice("lr_multipliers", role, ROLES)
            check_positive(f"lr_multipliers.{role}", factor)
        if self.update_clipping and self.fused:
            raise ConfigError("fused cannot be true together with update_clipping")


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
    chunk_mib: int | None = field(default=None, metadata={"identity": False})

    def __post_init__(self):
        check_choice("impl", self.impl, LOSS_IMPLS)
        check_positive("chunk_mib", self.chunk_mib)
        if self.z_loss < 0:
            raise ConfigError(f"z_loss must not be negative; got {self.z_loss}")
