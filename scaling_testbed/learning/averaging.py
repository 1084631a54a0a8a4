"""Averages of the weights over the steps of a run, which are evaluated beside the weights and train nothing.

A kind of average is a dataclass in AVERAGINGS, which a file in configs/averaging/ fills. It says how many copies of the
weights it keeps, and what an update does to them. Importing this module does not import torch.
"""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from scaling_testbed.errors import ConfigError, check_positive
from scaling_testbed.keys import key
from scaling_testbed.learning.optimizers.base import local_part
from scaling_testbed.registry import Registry

if TYPE_CHECKING:
    import torch

AVERAGINGS: Registry[type[Averaging]] = Registry("averaging")


@dataclass(frozen=True, kw_only=True)
class Averaging(abc.ABC):
    """The base of all averages. A subclass defines `copies` and `share`, and with several copies `slot`."""

    name: str = key("", "The kind of average.")

    @property
    @abc.abstractmethod
    def copies(self) -> int:
        """How many tensors it keeps for each one of the model, in fp32."""

    @property
    def every(self) -> int:
        """Updates between two additions."""
        return 1

    def remark(self, first: int, steps: int) -> str | None:
        """What to say if a run from update `first` to update `steps` has nothing to average; else None."""
        if not self.copies or first // self.every < steps // self.every:
            return None
        return (
            f"averaging.every_steps={self.every} takes no weights before the last of {steps:,} steps, so there is no "
            "average; set fewer"
        )

    def slot(self, n: int) -> int:
        """The copy that addition number n (from 1) goes to."""
        return 0

    @abc.abstractmethod
    def share(self, n: int) -> float:
        """The share of the new weights in this copy after addition number n (from 1)."""


@AVERAGINGS.register("none")
@dataclass(frozen=True, kw_only=True)
class NoAveraging(Averaging):
    """No average."""

    name: str = "none"

    @property
    def copies(self) -> int:
        return 0

    def share(self, n: int) -> float:
        return 1.0


@AVERAGINGS.register("ema")
@dataclass(frozen=True, kw_only=True)
class EmaConfig(Averaging):
    """An exponential moving average over all updates: the weights after update i of n have the weight decay^(n - i).

    The weights sum to one, as with the moments of Adam after its correction of the bias. So the initial weights have
    no part in it, and no warm-up of the decay is needed.
    """

    name: str = "ema"
    decay: float = key(0.999, "The decay of the average per update; it looks back about 1 / (1 - decay) updates.")

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise ConfigError(f"decay must be at least 0 and less than 1; got {self.decay}")

    @property
    def copies(self) -> int:
        return 1

    def share(self, n: int) -> float:
        return (1 - self.decay) / (1 - self.decay**n)


@AVERAGINGS.register("latest")
@dataclass(frozen=True, kw_only=True)
class LatestConfig(Averaging):
    """The mean of the k latest of the weights that are taken every few updates (Kaddour 2022, arXiv 2209.14981)."""

    name: str = "latest"
    k: int = key(5, "How many weights the mean is of; each is kept.")
    every_steps: int = key(100, "Updates between two of them.")

    def __post_init__(self) -> None:
        check_positive("k", self.k)
        check_positive("every_steps", self.every_steps)

    @property
    def copies(self) -> int:
        return self.k

    @property
    def every(self) -> int:
        return self.every_steps

    def slot(self, n: int) -> int:
        return (n - 1) % self.k

    def share(self, n: int) -> float:
        return 1.0


class Averages:
    """The copies of an average of these parameters, and the number of additions to them.

    parameters: by name. A sharded one has sharded copies. tensors: by "NAME/SLOT"; of the shape and type of the
    parameter, which is fp32.
    """

    def __init__(self, config: Averaging, parameters: Mapping[str, torch.Tensor]):
        import torch

        self.config, self.n = config, 0
        self._parameters = dict(parameters)
        self.tensors = {
            f"{name}/{slot}": torch.zeros_like(parameter, requires_grad=False)
            for slot in range(config.copies)
            for name, parameter in self._parameters.items()
        }

    def __bool__(self) -> bool:
        """Whether there is an average yet."""
        return bool(self.tensors) and self.n > 0

    def add(self, step: int, bad: torch.Tensor | None = None) -> None:
        """Take the weights after update number `step` (from 1), unless the average leaves this step out. bad: see
        Parts.bad; the weights then stay what they are, and so does the average."""
        if not self.tensors or step % self.config.every:
            return
        import torch

        self.n += 1
        slot, share = self.config.slot(self.n), self.config.share(self.n)
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                copy, now = local_part(self.tensors[f"{name}/{slot}"]), local_part(parameter)
                if share == 1 and bad is None:
                    copy.copy_(now)
                else:
                    copy.lerp_(now, share if bad is None else share * (1 - bad))

    def take_back(self, made: int, kept: int) -> None:
        """Take what was added after update number `kept`, of `made`, out of the count: these updates were bad."""
        if self.tensors:
            self.n -= made // self.config.every - kept // self.config.every

    def mean(self, name: str) -> torch.Tensor:
        """The average of the parameter `name`, for this process's part of it. There must be one."""
        kept = [local_part(self.tensors[f"{name}/{slot}"]) for slot in range(min(self.n, self.config.copies))]
        total = kept[0].clone()
        for copy in kept[1:]:
            total += copy
        return total / len(kept)

    def into_parameters(self) -> None:
        """Give each parameter its average."""
        import torch

        with torch.no_grad():
            for name, parameter in self._parameters.items():
                local_part(parameter).copy_(self.mean(name))

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Context manager in which the parameters hold their averages. After it they hold their own bits again."""
        import torch

        own = {name: local_part(parameter).clone() for name, parameter in self._parameters.items()}
        try:
            self.into_parameters()
            yield
        finally:
            with torch.no_grad():
                for name, parameter in self._parameters.items():
                    local_part(parameter).copy_(own[name])
