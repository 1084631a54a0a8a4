"""AdamW with independent or coupled decay, in groups chosen by parameter role."""

import torch

from scaling_testbed.learning.config import AdamWConfig
from scaling_testbed.model.parametrization import lr_multiplier
from scaling_testbed.model.transformer import Transformer


def parameter_groups(config: AdamWConfig, model: Transformer) -> list[dict]:
    """Split a model's parameters into groups of one learning-rate multiplier and one weight decay each.

    The multiplier is the parametrization's times the role's own; whether the decay of a step is multiplied too is the
    parametrization's `scale_weight_decay_with_lr`.

    PyTorch's AdamW multiplies weights by 1 - lr_t * weight_decay, with lr_t the group's current rate, so independent
    decay is weight_decay / peak rate (Wortsman et al. 2023, section 3.2.2).
    """
    groups: dict[tuple[float, float], dict] = {}
    info = model.parameter_info()
    for name, parameter in model.named_parameters():
        role = info[name].role
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


def build_optimizer(config: AdamWConfig, model: Transformer) -> torch.optim.Optimizer:
    """AdamW over `parameter_groups`; `set_lr` gives the groups their rates before each step."""
    groups = parameter_groups(config, model)
    common = {"lr": config.lr, "betas": (config.beta1, config.beta2), "eps": config.eps}
    if config.update_clipping:
        return StableAdamW(groups, **common)
    device = next(model.parameters()).device.type
    fused = config.fused if config.fused is not None else device in ("cpu", "cuda")
    return torch.optim.AdamW(groups, **common, fused=fused)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group the schedule's rate times the group's multiplier."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_multiplier"]


class StableAdamW(torch.optim.Optimizer):
    """AdamW whose rate is divided, tensor by tensor, by max(1, RMS) with RMS^2 = mean(g^2 / max(v, eps^2)).

    v is the bias-corrected second moment, this step's gradient included (Wortsman et al. 2023, arXiv 2304.13013,
    algorithm 2, which corrects the bias through a step-dependent beta). The decay is not divided, so that the
    clipping of an update changes nothing else.
    """

    def __init__(self, params, lr, betas, eps, weight_decay=0.0):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    def _update(self, parameter, group):
        state, gradient, (beta1, beta2) = self.state[parameter], parameter.grad, group["betas"]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        state["step"] += 1
        step = state["step"].item()
        tensors = (parameter, gradient, state["exp_avg"], state["exp_avg_sq"])
        weights, gradient, exp_avg, exp_avg_sq = (_here(x) for x in tensors)
        exp_avg.lerp_(gradient, 1 - beta1)
        exp_avg_sq.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        second = exp_avg_sq / (1 - beta2**step)
        rms = _mean_of_whole(gradient.square() / second.clamp(min=group["eps"] ** 2), parameter).sqrt()
        update = exp_avg / (1 - beta1**step) / (second.sqrt() + group["eps"])
        weights.mul_(1 - group["lr"] * group["weight_decay"])
        weights.sub_(update * (group["lr"] / rms.clamp(min=1)))


def _here(x: torch.Tensor) -> torch.Tensor:
    """The part of a sharded tensor (a DTensor) that lies in this process, sharing its memory; `x` if it is whole."""
    return x.to_local() if hasattr(x, "to_local") else x


def _mean_of_whole(here: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The mean over the whole tensor of which `here` is this process's part, as `like` is sharded."""
    if not hasattr(like, "to_local"):
        return here.mean()
    from torch.distributed.tensor import DTensor  # half a second that an unsharded run need not spend

    whole = DTensor.from_local(
        here, like.device_mesh, like.placements, shape=like.shape, stride=like.stride(), run_check=False
    )
    # Not its mean: the parts need not be of one size.
    return whole.sum().full_tensor() / like.numel()
