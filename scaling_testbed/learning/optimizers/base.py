"""The base class of optimizer configurations, and the parameter groups of a model.

A new optimizer is one file with a dataclass that derives from OptimizerConfig and is registered in OPTIMIZERS. No other
file refers to it by name.
"""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from scaling_testbed.errors import ConfigError, check_choice, check_not_negative, check_positive
from scaling_testbed.keys import ADDED_LATER, check_choices, key
from scaling_testbed.model.parametrization import ROLES, lr_multiplier
from scaling_testbed.model.parts import LINEARS
from scaling_testbed.registry import Registry

if TYPE_CHECKING:
    import torch

    from scaling_testbed.model.transformer import Transformer

# Name -> the dataclass that a file in configs/optimizer/ fills.
OPTIMIZERS: Registry[type[OptimizerConfig]] = Registry("optimizer")

# The meaning of a learning rate for AdamW. Other optimizers describe theirs relative to it.
AS_ADAMW = "about one per step and weight (AdamW)"


class Update(NamedTuple):
    """The last update of a tensor by an optimizer.

    direction: the tensor that the rate multiplies, without the decay; fp64, for this process's part of the tensor.
    n_below_eps: the number of coordinates whose root of the second moment is below eps, as a scalar tensor; None if
    there is no eps.
    """

    direction: torch.Tensor
    n_below_eps: torch.Tensor | None


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig(abc.ABC):
    """The base of all optimizers. The defaults are those of Wortsman et al. 2023, section 2.1.

    A subclass defines `build`, `bytes_per_weight` and `rate_means`. It sets `needs_whole_tensors` to None if it can be
    sharded. It defines `update_of` if its state determines the last update, and `first_state` if its state can be made
    before the first step.
    """

    # The reason why it cannot update a sharded tensor part by part; None: it can.
    needs_whole_tensors: ClassVar[str | None] = "it does not declare that it can update a part of a tensor"

    name: str = key("", "The kind of optimizer.")
    lr: float = key(1e-2, "The peak learning rate.")
    weight_decay: float = key(1e-4, "The weight decay, in the sense of `decay`.")
    weight_decay_steps: float | None = key(
        None,
        "null: weight_decay is the same in a run of any length. T: it is the decay of a run of T steps, and a run of t "
        "steps multiplies it by T / t. A weight without gradient then shrinks equally over both (cf. Wang and "
        "Aitchison 2024, arXiv 2405.13698). lr / weight_decay sets the scale of weights, so in very short runs at low "
        "rates this holds them near zero.",
        identity=ADDED_LATER,
    )
    decay: str = key(
        "independent",
        "How the decay acts. With s the schedule's factor in [0, 1], lr the peak rate and u the optimizer's update: "
        "independent: w <- w - s (lr u + weight_decay w). coupled: w <- w - s lr (u + weight_decay w), as in PyTorch "
        "and Optax.",
        choices=("independent", "coupled"),
    )
    decay_roles: list[str] | None = key(
        None,
        f"The roles of parameters that decay, among {', '.join(ROLES)}. null: all, with norm gains and embeddings. "
        "Wortsman et al. 2023 does not say; the public nanodo excludes nothing.",
    )
    lr_multipliers: dict[str, float] = key(
        {},
        "Role of a parameter -> factor on its learning rate, in addition to the parametrization's. Type "
        "+optimizer.lr_multipliers.ROLE=FACTOR.",
    )
    clip_norm: float | None = key(
        1.0, "The global gradient norm is clipped to this. null: no clipping; the norm is still recorded."
    )
    skip_spikes_sigmas: float | None = key(
        None,
        "Leave out an update whose loss or gradient norm is more than so many standard deviations above the mean of "
        "the last skip_spikes_window updates that were made. OLMo 2 (arXiv 2501.00656) uses 6 and 128. null: every "
        "update is made.",
        identity=ADDED_LATER,
    )
    skip_spikes_window: int = key(128, "The number of updates that skip_spikes_sigmas looks at.", identity=ADDED_LATER)
    qk_clip: float | None = key(
        None,
        "tau: after an update, where the largest attention logit S of a head in that step's batch was above tau, the "
        "query and key weights of that head are shrunk so that its logits are multiplied by tau / S. Kimi K2 (arXiv "
        "2507.20534, section 2.1) uses 100. Not available with a qk-norm or kappa. null: never.",
        identity=ADDED_LATER,
    )

    def __post_init__(self) -> None:
        check_choices(self)
        for name in ("lr", "weight_decay_steps", "clip_norm", "skip_spikes_sigmas", "qk_clip"):
            check_positive(name, getattr(self, name))
        if self.skip_spikes_window < 4:
            raise ConfigError(f"skip_spikes_window must be at least 4; got {self.skip_spikes_window}")
        check_not_negative("weight_decay", self.weight_decay)
        for role in self.decay_roles or []:
            check_choice("decay_roles", role, ROLES)
        for role, factor in self.lr_multipliers.items():
            check_choice("lr_multipliers", role, ROLES)
            check_positive(f"lr_multipliers.{role}", factor)

    @abc.abstractmethod
    def build(self, model: Transformer) -> torch.optim.Optimizer:
        """Build the optimizer over `parameter_groups`. `set_lr` sets the rates of the groups before each step.

        Each step multiplies the weights by 1 - lr * weight_decay of their group. `parameter_groups` sets weight_decay
        so that this holds for both kinds of decay. The state must contain everything that later steps need, because
        checkpoints save and restore only the state.
        """

    @abc.abstractmethod
    def bytes_per_weight(self, role: str) -> int:
        """Bytes of optimizer state for each weight of a role."""

    def first_state(self, group: dict[str, Any], parameter: torch.Tensor) -> dict[str, torch.Tensor]:
        """The state of a tensor of `group` before the first step, with the types, devices and values that the first
        step would start from. A moment is sharded like its parameter. Empty: the first step makes the state."""
        return {}

    @property
    def can_be_captured(self) -> bool:
        """Whether a step on a GPU can be part of a CUDA graph: it reads no tensor on the host, and the
        rate can be a tensor."""
        return False

    @property
    def clips_in_step(self) -> bool:
        """Whether the optimizer divides gradients by the scalar tensor `grad_scale` on their device in its own step."""
        return False

    @property
    @abc.abstractmethod
    def rate_means(self) -> str:
        """The meaning of one unit of learning rate, in a few words; AS_ADAMW if it is the same as for AdamW.

        The row records it. S is never compared between runs whose meanings differ.
        """

    def update_of(self, group: dict[str, Any], state: dict[str, Any]) -> Update | None:
        """The last update of a tensor, from its group and its state; None if the state does not determine it."""
        return None

    def rate_of(
        self, optimizer: torch.optim.Optimizer, group: dict[str, Any], parameter: torch.nn.Parameter
    ) -> float | torch.Tensor | None:
        """The rate that multiplied the last update of a tensor of `group`.

        Returns None if only the step itself knew the rate and an earlier process made that step.
        """
        rate: float = group["lr"]
        return rate

    def for_length(self, steps: int) -> OptimizerConfig:
        """The same config with the weight decay for a schedule of `steps` steps, even if the run stops earlier."""
        if self.weight_decay_steps is None:
            return self
        decay = self.weight_decay * self.weight_decay_steps / steps
        return dataclasses.replace(self, weight_decay=decay, weight_decay_steps=None)

    def _check_fractions(self, *names: str) -> None:
        """Raise ConfigError unless all these keys are in [0, 1)."""
        for name in names:
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name} must be in [0, 1); got {getattr(self, name)}")


def rate_meaning(optimizer: OptimizerConfig, linear: str) -> str:
    """The meaning of one unit of learning rate for `optimizer` and a model with `model.linear` = `linear`."""
    changed = LINEARS[linear].rate_means if linear in LINEARS else f"model.linear={linear} is not registered here"
    return f"{optimizer.rate_means}; {changed}" if changed else optimizer.rate_means


def parameter_groups(
    config: OptimizerConfig, model: Transformer, roles: Collection[str] = ROLES
) -> list[dict[str, Any]]:
    """Split a model's parameters of these roles into groups with the same learning-rate multiplier and weight decay.

    The multiplier is the parametrization's factor times the factor of the role in `lr_multipliers`. The key
    `scale_weight_decay_with_lr` of the parametrization says whether the multiplier also multiplies the decay of a step.

    PyTorch's AdamW multiplies weights by 1 - lr_t * weight_decay, with lr_t the group's current rate. Independent decay
    is therefore weight_decay / peak rate in a group (Wortsman et al. 2023, section 3.2.2).
    """
    groups: dict[tuple[float, float], dict[str, Any]] = {}
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


def create_state(config: OptimizerConfig, optimizer: torch.optim.Optimizer) -> None:
    """Create the state of `optimizer`, which `config` built, before its first step. Too little memory then shows before
    training, and a first step that is left out leaves the state as it is without that step."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if state := config.first_state(group, parameter):
                optimizer.state[parameter] = state


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the tensors in the state of `optimizer`, all shards together. Counts of steps, which are scalars, are
    left out."""
    import torch

    values = [value for state in optimizer.state.values() for value in state.values()]
    return sum(x.numel() * x.element_size() for x in values if isinstance(x, torch.Tensor) and x.dim())


def leave_out_where(optimizer: torch.optim.Optimizer, bad: torch.Tensor) -> bool:
    """Let every step of `optimizer` change nothing while the scalar `bad` on its device is 1.0. Returns whether it can.

    PyTorch's fused optimizers can, for torch.amp.GradScaler, and mark it by `_step_supports_amp_scaling`. Those of this
    package do the same.
    """
    steps = getattr(optimizer, "parts", [optimizer])
    if not all(getattr(step, "_step_supports_amp_scaling", False) for step in steps):
        return False
    for step in steps:
        step.found_inf = bad
    return True


def take_back(optimizer: torch.optim.Optimizer, n: int) -> None:
    """Take the last `n` steps, which were left out (`leave_out_where`), out of the counts that are kept on the host.
    Counts on the device have left them out."""
    for step in getattr(optimizer, "parts", [optimizer]):
        if hasattr(step, "take_back"):
            step.take_back(n)


@contextlib.contextmanager
def kept_where(bad: torch.Tensor | None, *tensors: torch.Tensor) -> Iterator[None]:
    """Context manager for a change of `tensors`, which are as before after it if the scalar `bad` on their device is
    1.0. None: they are changed."""
    before = [local_part(x).clone() for x in tensors] if bad is not None else []
    yield
    if bad is not None:
        for x, kept in zip(map(local_part, tensors), before, strict=True):
            x.copy_(kept.where(bad.bool(), x))


def set_lr(optimizer: torch.optim.Optimizer, lr: float | torch.Tensor) -> None:
    """Set the rate of every group to `lr`, the schedule's rate, times the group's multiplier."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_multiplier"]


def clip_coefficient(norm: float, limit: float | None) -> float:
    """The factor on a gradient of this norm, as in torch.nn.utils.clip_grad_norm_."""
    return 1.0 if limit is None else min(1.0, limit / (norm + 1e-6))


def clip_divisor(norm: torch.Tensor, limit: float | None) -> torch.Tensor:
    """1 / clip_coefficient of a norm that stays on its device; a scalar of the same type."""
    return ((norm + 1e-6) / (math.inf if limit is None else limit)).clamp(min=1.0)


def local_part(x: torch.Tensor) -> torch.Tensor:
    """This process's part of a sharded tensor (a DTensor), sharing its memory; `x` itself if it is not sharded."""
    return x.to_local() if hasattr(x, "to_local") else x
