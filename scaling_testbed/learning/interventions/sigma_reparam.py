"""Sigma-reparam in training: singular vectors that follow the weights, one power iteration for each update."""

from __future__ import annotations

from typing import TYPE_CHECKING

from scaling_testbed.learning.interventions.base import INTERVENTIONS, Context, Intervention

if TYPE_CHECKING:
    from scaling_testbed.learning.optimizers import OptimizerConfig
    from scaling_testbed.model.config import ModelConfig


@INTERVENTIONS.register("sigma_reparam")
class SigmaReparam(Intervention):
    """After an update, makes one power iteration in every model.layers.SigmaReparamLinear (Zhai et al. 2023, arXiv
    2303.06296, section 3.1).

    The singular vectors are buffers of the model, so there is no state here. Products of a matrix and a vector are not
    counted in the FLOPs.
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
