"""The optimizer of a config, in groups chosen by parameter role, with independent or coupled decay."""

from collections.abc import Collection
from typing import Any

import torch

from scaling_testbed.learning.config import AdamAtan2Config, MuonConfig, OptimizerConfig
from scaling_testbed.learning.muon import MuonWithAdamW
from scaling_testbed.learning.tensorwise_adam import AdamAtan2, TensorwiseAdamW
from scaling_testbed.model.parametrization import HIDDEN_ROLES, ROLES, lr_multiplier
from scaling_testbed.model.transformer import Transformer


def parameter_groups(
    config: OptimizerConfig, model: Transformer, roles: Collection[str] = ROLES
) -> list[dict[str, Any]]:
    """Split a model's parameters of these roles into groups of one learning-rate multiplier and one weight decay each.

    The multiplier is the parametrization's times the role's own; whether the decay of a step is multiplied too is the
    parametrization's `scale_weight_decay_with_lr`.

    PyTorch's AdamW multiplies weights by 1 - lr_t * weight_decay, with lr_t the group's current rate, so independent
    decay is weight_decay / peak rate (Wortsman et al. 2023, section 3.2.2).
    """
    groups: dict[tuple[float, float], dict] = {}
    info = model.parameter_info()
    for name, parameter in model.named_parameters():
        role = info[name].role
        if role not in roles:
            continue
        multiplier = lr_multiplier(model.parametrization, info[name], model.config)
        multiplier *= config.lr_multipliers.get(role, 1.0)
        decay = config.weight_decay if config.decay_roles is None or role in config.decay_roles else 0.0
        if config.decay == "independent":
            decay = decay / config.lr
        if not model.parametrization.scale_weight_decay_with_lr:
            decay = decay / multiplier
        group = groups.setdefault(
            (multiplier, decay), {"params": [], "lr_multiplier": multiplier, "weight_decay": decay}
        )
        group["params"].append(parameter)
    return list(groups.values())


def build_optimizer(config: OptimizerConfig, model: Transformer) -> torch.optim.Optimizer:
    """The optimizer of `config` over `parameter_groups`; `set_lr` gives the groups their rates before each step."""
    if isinstance(config, MuonConfig):
        return _build_muon(config, model)
    groups = parameter_groups(config, model)
    common = {"lr": config.lr, "betas": (config.beta1, config.beta2)}
    if isinstance(config, AdamAtan2Config):
        options = {"a": config.a, "b": config.b, "scale_lr_by_param_rms": config.scale_lr_by_param_rms}
        return AdamAtan2(groups, **common, **options)
    if config.update_clipping or config.scale_lr_by_param_rms:
        options = {"update_clipping": config.update_clipping, "scale_lr_by_param_rms": config.scale_lr_by_param_rms}
        return TensorwiseAdamW(groups, **common, eps=config.eps, **options)
    fused = config.fused if config.fused is not None else _can_fuse(model)
    return torch.optim.AdamW(groups, **common, eps=config.eps, fused=fused)


def _build_muon(config: MuonConfig, model: Transformer) -> MuonWithAdamW:
    muon = {
        "lr": config.lr,
        "momentum": config.momentum,
        "nesterov": config.nesterov,
        "ns_steps": config.ns_steps,
        "adjust_lr_fn": config.lr_adjustment,
    }
    adamw = {"lr": config.lr, "betas": (config.beta1, config.beta2), "eps": config.eps, "fused": _can_fuse(model)}
    hidden = parameter_groups(config, model, HIDDEN_ROLES)
    others = parameter_groups(config, model, set(ROLES) - set(HIDDEN_ROLES))
    return MuonWithAdamW(hidden, others, muon, adamw)


def _can_fuse(model: Transformer) -> bool:
    return next(model.parameters()).device.type in ("cpu", "cuda")


def clip_coefficient(norm: float, limit: float | None) -> float:
    """What a gradient of this norm is multiplied by, as torch.nn.utils.clip_grad_norm_ does."""
    return 1.0 if limit is None else min(1.0, limit / (norm + 1e-6))


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group the schedule's rate times the group's multiplier."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_multiplier"]
