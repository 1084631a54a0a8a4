"""Learning-rate schedules: pure functions of the step, without torch, so that grids can be planned and plotted.

Steps count completed updates: `lr(step, ...)` is the rate of the update from step to step + 1, for step = 0, 1, ...,
steps - 1. In a warm-up of w steps that begins at zero, update n has the rate peak * n / w. The last update of a run has
the rate of the floor.

The floor `min_lr` is absolute and not a fraction of the peak (Wortsman et al. 2023, section 2.1). The floor in use is
never above the peak.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from scaling_testbed.errors import ConfigError, check_not_negative, check_positive
from scaling_testbed.keys import ADDED_LATER, check_choices, key
from scaling_testbed.registry import Registry

SCHEDULES: Registry[type["Schedule"]] = Registry("schedule")


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The base of all schedules: a linear warm-up, then `after_warmup`."""

    name: str = key("schedule", "The kind of schedule.")
    warmup: float = key(
        0.05, "Length of the warm-up: steps if it is 1 or more, a fraction of the schedule's length if it is less."
    )
    warmup_start: float = key(
        0.0,
        "The rate before the first update, as a fraction of the peak. Wortsman et al. 2023 does not state it; the "
        "public nanodo starts at 0.1.",
    )
    min_lr: float = key(1e-5, "The floor of the rate. It is absolute and not a fraction of the peak.")
    steps: int | None = key(
        None,
        "The schedule's length in steps. null: the length of the run. A longer schedule lets a run stop early without "
        "another rate at any step.",
    )
    warmup_tokens: float | None = key(
        None,
        "Length of the warm-up in tokens, in place of schedule.warmup. It is rounded to whole steps, at least one.",
        identity=ADDED_LATER,
    )

    def __post_init__(self) -> None:
        if not 0 <= self.warmup < math.inf or (self.warmup > 1 and self.warmup != int(self.warmup)):
            raise ConfigError(f"warmup must be a whole number of steps, or a fraction below 1; got {self.warmup}")
        if not 0 <= self.warmup_start <= 1:
            raise ConfigError(f"warmup_start must lie between 0 and 1; got {self.warmup_start}")
        check_not_negative("min_lr", self.min_lr)
        check_positive("steps", self.steps)
        check_positive("warmup_tokens", self.warmup_tokens)

    def warmup_steps(self, run_steps: int, tokens_per_step: int | None = None) -> int:
        """The number of warm-up steps in a run of `run_steps` updates. Raises ValueError if it is given in tokens, and
        the tokens of a step are not."""
        if self.warmup_tokens is not None:
            if tokens_per_step is None:
                raise ValueError("warmup_tokens needs the tokens of a step")
            return max(1, round(self.warmup_tokens / tokens_per_step))
        return round(self.warmup * self.length(run_steps)) if self.warmup < 1 else int(self.warmup)

    def length(self, run_steps: int) -> int:
        """The schedule's length in steps."""
        return self.steps or run_steps

    def decay_begin(self, run_steps: int, tokens_per_step: int | None = None) -> int | None:
        """The number of updates before the first one whose rate is below the peak, where the rate is at the peak from
        the warm-up to there, and a longer run differs only after it. None for other schedules. Raises ValueError as
        `warmup_steps` does."""
        return None

    def shortest(self, made: int, warmup: int) -> int | None:
        """The least number of steps, `made` or more, of a run whose first `made` updates have the rates of any longer
        run. None if no number has, because the rates depend on it from the beginning. warmup: its steps."""
        return None

    def lr(self, step: int, run_steps: int, peak: float, tokens_per_step: int | None = None) -> float:
        """The rate of the update after `step` completed updates of `run_steps`, for the peak rate `peak`. Raises
        ValueError as `warmup_steps` does."""
        warmup, done = self.warmup_steps(run_steps, tokens_per_step), step + 1
        if done < warmup:
            return peak * (self.warmup_start + (1 - self.warmup_start) * done / warmup)
        return self.after_warmup(done, warmup, self.length(run_steps), peak, min(self.min_lr, peak))

    def after_warmup(self, done: int, warmup: int, total: int, peak: float, floor: float) -> float:
        raise NotImplementedError


def _progress(done: int, begin: int, end: int) -> float:
    """The fraction of the way from `begin` to `end` at `done`, in [0, 1]."""
    return min(1.0, max(0.0, (done - begin) / max(1, end - begin)))


@SCHEDULES.register("cosine")
@dataclass(frozen=True, kw_only=True)
class CosineConfig(Schedule):
    """Half a period of a cosine, from the peak to the floor (Wortsman et al. 2023, section 2.1)."""

    name: str = "cosine"

    def after_warmup(self, done: int, warmup: int, total: int, peak: float, floor: float) -> float:
        return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * _progress(done, warmup, total)))


@SCHEDULES.register("linear")
@dataclass(frozen=True, kw_only=True)
class LinearConfig(Schedule):
    """A straight line from the peak to the floor."""

    name: str = "linear"

    def after_warmup(self, done: int, warmup: int, total: int, peak: float, floor: float) -> float:
        return peak + (floor - peak) * _progress(done, warmup, total)


@SCHEDULES.register("constant")
@dataclass(frozen=True, kw_only=True)
class ConstantConfig(Schedule):
    """The peak rate until the end. The floor is not used."""

    name: str = "constant"

    def shortest(self, made: int, warmup: int) -> int:
        return max(1, made)

    def after_warmup(self, done: int, warmup: int, total: int, peak: float, floor: float) -> float:
        return peak


@SCHEDULES.register("inverse_sqrt")
@dataclass(frozen=True, kw_only=True)
class InverseSqrtConfig(Schedule):
    """peak * sqrt(warmup / step), never below the floor (Vaswani et al. 2017, equation 3)."""

    name: str = "inverse_sqrt"

    def shortest(self, made: int, warmup: int) -> int:
        return max(1, made)

    def after_warmup(self, done: int, warmup: int, total: int, peak: float, floor: float) -> float:
        return max(floor, peak * math.sqrt(max(1, warmup) / max(1, warmup, done)))


@SCHEDULES.register("wsd")
@dataclass(frozen=True, kw_only=True)
class WarmupStableDecayConfig(Schedule):
    """The peak, then a decay to the floor over the last part of the schedule (Hu et al. 2024, MiniCPM)."""

    name: str = "wsd"
    decay_fraction: float = key(0.2, "The part of the schedule in which the rate decays.")
    decay_shape: str = key(
        "linear",
        "The shape of the decay. sqrt: 1 - sqrt(progress) (Haegele et al. 2024).",
        choices=("linear", "sqrt", "cosine"),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choices(self)
        if not 0 < self.decay_fraction <= 1:
            raise ConfigError(f"decay_fraction must be above 0 and at most 1; got {self.decay_fraction}")

    def decay_begin(self, run_steps: int, tokens_per_step: int | None = None) -> int:
        """As in Schedule; the decay is the last part of the run."""
        return self._begin(self.warmup_steps(run_steps, tokens_per_step), self.length(run_steps))

    def shortest(self, made: int, warmup: int) -> int | None:
        """As in Schedule; the decay begins after `made` updates, or after the warm-up."""
        if self.decay_fraction == 1:
            return None
        begin = max(1, made, warmup)
        steps = math.floor(begin / (1 - self.decay_fraction))
        while self._begin(warmup, steps) < begin:
            steps += 1
        return steps

    def _begin(self, warmup: int, total: int) -> int:
        return max(warmup, total - round(self.decay_fraction * total))

    def after_warmup(self, done: int, warmup: int, total: int, peak: float, floor: float) -> float:
        begin = self._begin(warmup, total)
        return floor + (peak - floor) * _DECAY_SHAPES[self.decay_shape](_progress(done, begin, total))


_DECAY_SHAPES: dict[str, Callable[[float], float]] = {
    "linear": lambda progress: 1 - progress,
    "sqrt": lambda progress: 1 - math.sqrt(progress),
    "cosine": lambda progress: 0.5 * (1 + math.cos(math.pi * progress)),
}
