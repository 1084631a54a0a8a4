"""Sigma-reparam in training: one power iteration after each update, so that the singular vectors follow the weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

from scaling_testbed.learning.interventions.base import INTERVENTIONS, Context, Intervention

if TYPE_CHECKING:
    from scaling_testbed.learning.optimizers import OptimizerConfig
    from scaling_testbed.model.config import ModelConfig


@INTERVENTIONS.register("sigma_reparam")
class SigmaReparam(Intervention):
    """Makes one power iteration in every model.layers.SigmaReparamLinear after each update (Zhai et al. 2023, arXiv
    2303.06296, section 3.1).

    The singular vectors are buffers of the model, so the intervention has no state. Matrix-vector products do not count
    in the FLOPs.
    """

    key = "model.linear"
    follows_weights = True

    @classmethod
    def asked_by(cls, optimizer: OptimizerConfig, model: ModelConfig) -> SigmaReparam | None:
        return cls() if model.linear == "sigma_reparam" else None

    def attach(self, context: Context) -> None:
        from scaling_testbed.model.layers import SigmaReparamLinear

        self._layers = [module for module in context.model.modules() if isinstance(module, SigmaReparamLinear)]

    def after_update(self, made: bool) -> None:
        if made:
            for layer in self._layers:
                layer.follow()
