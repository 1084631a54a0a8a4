"""Muon for the matrices inside the blocks, AdamW for all other parameters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from scaling_testbed.errors import ConfigError, check_positive
from scaling_testbed.keys import key
from scaling_testbed.learning.optimizers.adamw import MOMENTS_BYTES, adam_update, can_fuse, no_moments
from scaling_testbed.learning.optimizers.base import OPTIMIZERS, OptimizerConfig, Update, parameter_groups
from scaling_testbed.model.parametrization import HIDDEN_ROLES, ROLES

if TYPE_CHECKING:
    import torch

    from scaling_testbed.model.transformer import Transformer


@OPTIMIZERS.register("muon")
@dataclass(frozen=True, kw_only=True)
class MuonConfig(OptimizerConfig):
    """Muon (Jordan et al. 2024) for the matrices inside the blocks, AdamW for all other parameters.

    Muon's update is its momentum, orthogonalised by Newton-Schulz iterations in bf16. The weight decay acts equally on
    both kinds of parameters. A rate has another meaning than for AdamW, so their sensitivities S are not comparable.
    """

    needs_whole_tensors = "it orthogonalises whole matrices"

    name: str = "muon"
    momentum: float = key(0.95, "Muon's momentum.")
    nesterov: bool = key(True, "Whether Muon's momentum is Nesterov's.")
    ns_steps: int = key(5, "The number of Newton-Schulz iterations.")
    lr_adjustment: str = key(
        "match_rms_adamw",
        "The factor on the rate of a matrix of A outputs and B inputs. match_rms_adamw: 0.2 sqrt(max(A, B)), which "
        "gives an update about the RMS of AdamW's, so that both kinds can share a rate (Liu et al. 2025, arXiv "
        "2502.16982, eq. 4). original: sqrt(max(1, A / B)).",
        choices=("match_rms_adamw", "original"),
    )
    beta1: float = key(0.9, "AdamW's decay of the first moment.")
    beta2: float = key(0.95, "AdamW's decay of the second moment.")
    eps: float = key(1e-8, "AdamW's eps.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_fractions("momentum", "beta1", "beta2")
        check_positive("eps", self.eps)
        if not 1 <= self.ns_steps < 100:
            raise ConfigError(f"ns_steps must be 1 to 99; got {self.ns_steps}")

    def build(self, model: Transformer) -> torch.optim.Optimizer:
        import torch

        from scaling_testbed.learning.optimizers.combined import Combined
        from scaling_testbed.learning.optimizers.newton_schulz import BatchedMuon

        betas = (self.beta1, self.beta2)
        others = parameter_groups(self, model, set(ROLES) - set(HIDDEN_ROLES))
        parts: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(others, lr=self.lr, betas=betas, eps=self.eps, fused=can_fuse(model))
        ]
        if hidden := parameter_groups(self, model, HIDDEN_ROLES):  # a model may have no blocks
            muon = BatchedMuon(
                hidden,
                self.lr,
                momentum=self.momentum,
                nesterov=self.nesterov,
                ns_steps=self.ns_steps,
                adjust_lr_fn=self.lr_adjustment,
            )
            parts.append(muon)
        return Combined(parts)

    def bytes_per_weight(self, role: str) -> int:
        """Bytes of optimizer state for each weight of a role. Muon has one moment, fp32."""
        return 4 if role in HIDDEN_ROLES else MOMENTS_BYTES

    def first_state(self, group: dict[str, Any], parameter: torch.Tensor) -> dict[str, torch.Tensor]:
        from scaling_testbed.learning.optimizers.newton_schulz import no_momentum

        return {"momentum_buffer": no_momentum(parameter)} if "ns_steps" in group else no_moments(group, parameter)

    @property
    def rate_means(self) -> str:
        return f"an orthogonal matrix per step, times the factor of lr_adjustment={self.lr_adjustment} (Muon)"

    def update_of(self, group: dict[str, Any], state: dict[str, Any]) -> Update | None:
        """The update of AdamW's parameters; None for Muon's, because its iterations would have to be repeated."""
        return None if "momentum_buffer" in state else adam_update(group, state)
