"""Initialisation and learning rate of a parameter by its role: pure functions, without torch.

Equations (i) to (iv) are those of arXiv 2309.14322, section 3.2.4; `ParametrizationConfig` lists them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from scaling_testbed.errors import ConfigError
from scaling_testbed.model.config import ModelConfig, ParametrizationConfig
from scaling_testbed.model.parts import LINEARS, RESIDUALS

ROLES = ("q", "k", "v", "attn_out", "mlp_in", "mlp_gate", "mlp_out", "embedding", "head", "norm")
# The weights of matrix products inside the blocks.
HIDDEN_ROLES = ("q", "k", "v", "attn_out", "mlp_in", "mlp_gate", "mlp_out")


@dataclass(frozen=True)
class ParameterInfo:
    """The facts about a parameter that do not depend on its values.

    role    one of ROLES; a tied head has the role of the embedding
    fan_in  number of inputs summed into one output; by convention d_model for the embedding and 1 for a gain
    layer   index of its block; None outside the blocks
    """

    role: str
    fan_in: int
    layer: int | None


def check_parametrization(parametrization: ParametrizationConfig, config: ModelConfig) -> None:
    """Raise ConfigError if a model cannot follow both configurations."""
    if config.tied_head and parametrization.rules.scales_head_init:
        raise ConfigError(f"tied_head must be false with {parametrization.name}, whose head has its own initialisation")
    if not LINEARS[config.linear].zero_init and parametrization.rules.zero_queries:
        able = " or ".join(name for name, linear in LINEARS.items() if linear.zero_init)
        raise ConfigError(f"linear must be {able} with {parametrization.name}, whose queries start at zero")


def init_std(parametrization: ParametrizationConfig, info: ParameterInfo, config: ModelConfig) -> float:
    """Standard deviation at initialisation, after truncation. 0 means a constant: one for gains, zero for others."""
    if info.role == "norm":
        return 0.0
    if info.role == "q" and parametrization.rules.zero_queries:
        return 0.0
    if info.role == "head" and parametrization.rules.scales_head_init:
        return math.sqrt(_base_fan_in(parametrization, info, config)) / info.fan_in
    return 1.0 / math.sqrt(info.fan_in) / RESIDUALS[config.residual].init_divisor(info.role, config.n_layers)


def lr_multiplier(parametrization: ParametrizationConfig, info: ParameterInfo, config: ModelConfig) -> float:
    """The factor on the learning rate by rule (i). It is always 1 for embeddings and gains."""
    linear_roles = HIDDEN_ROLES + (("head",) if parametrization.scale_head_lr else ())
    if parametrization.rules.scales_lr and info.role in linear_roles:
        return _base_fan_in(parametrization, info, config) / info.fan_in
    return 1.0


def attention_scale(parametrization: ParametrizationConfig, config: ModelConfig) -> float:
    """The factor on q.k for a resolved config. With mup_full it is 1/d_head, whatever the config says."""
    if config.attention_scale == "inverse" or parametrization.rules.inverse_attention_scale:
        return 1.0 / config.head_width
    return 1.0 / math.sqrt(config.head_width)


def _base_fan_in(parametrization: ParametrizationConfig, info: ParameterInfo, config: ModelConfig) -> float:
    """The fan-in of this parameter in a model of the base width.

    Every width of the model (d_ff and all heads together) is taken to be in proportion to d_model, as in a family of
    one shape. Base fan-in over fan-in is then base_width / d_model for every parameter, even if d_ff is rounded.
    """
    return info.fan_in * parametrization.base_width / config.d_model
