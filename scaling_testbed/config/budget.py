"""How long a run trains. Only this module converts a budget, given in one of four units, to steps."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from scaling_testbed.errors import ConfigError, check_positive
from scaling_testbed.keys import ADDED_LATER, check_choices, key
from scaling_testbed.model.counting import ParamCounts

UNITS = ("tokens", "tokens_per_param", "flops", "steps")
TOKENS_PER_PARAM = 20  # without a budget; Hoffmann et al. 2022
Pruned = Callable[[int], float]  # steps of a run -> number of pruned weights, the mean over its steps
CONVENTIONS = ("n_params", "n_params_non_embedding", "n_params_no_input_embedding", "n_params_no_qk_gains")

MOST_STEPS = 10**12  # at a thousand a second, these take 30 years


@dataclass(frozen=True, kw_only=True)
class BudgetConfig:
    """How long a run trains, in at most one of four units. Without any, 20 tokens per parameter (Hoffmann et al. 2022).

    A budget that is no whole number of steps is rounded to the nearest one.
    """

    tokens: float | None = key(None, "Training tokens D.")
    tokens_per_param: float | None = key(None, "Training tokens per parameter, M = D / N (Gadre et al. 2024).")
    flops: float | None = key(None, "Training FLOPs, 6 N D.")
    steps: float | None = key(None, "Optimizer steps.")
    hours: float | None = key(
        None,
        "Hours of training and evaluation, of all starts together, beside one of the other units, which is the upper "
        "limit. The run ends by the clock, with the decay of schedule=wsd in time, so the clock chooses the number of "
        "steps.",
        identity=ADDED_LATER,
    )
    params: str = key(
        "n_params",
        "What N counts in tokens_per_param and flops. n_params: all parameters. n_params_non_embedding: without "
        "embedding and head. n_params_no_input_embedding: with the head, without the embedding. n_params_no_qk_gains: "
        "all but the gains of the qk-norm.",
        choices=CONVENTIONS,
    )

    def __post_init__(self) -> None:
        check_choices(self)
        given = [unit for unit in UNITS if getattr(self, unit) is not None]
        if len(given) > 1:
            both = " and ".join(f"budget.{unit}={getattr(self, unit):g}" for unit in given)
            raise ConfigError(f"the budget is given twice: {both}; keep one and set the other to null")
        for unit in given:
            check_positive(unit, getattr(self, unit))
        check_positive("hours", self.hours)

    def resolve_steps(self, counts: ParamCounts, tokens_per_step: int, pruned: Pruned | None = None) -> int:
        """Optimizer steps for a model with the counts `counts` (fields as in CONVENTIONS), at least one.

        A budget that is no whole number of steps is rounded to the nearest one. pruned: of a run that prunes weights;
        in `flops` the pruned weights do not count, and in `tokens_per_param` they do. Raises ConfigError if the steps
        are more than MOST_STEPS.
        """
        exact = self._exact_steps(counts, tokens_per_step, pruned)
        if not exact <= MOST_STEPS:
            raise ConfigError(f"the budget is {exact:.3g} steps, more than any run can make; give fewer")
        return math.ceil(exact) if self.steps is not None else max(1, round(exact))

    def rounding(self, counts: ParamCounts, tokens_per_step: int, pruned: Pruned | None = None) -> str | None:
        """How the budget is rounded to whole steps, in words; None if it is a whole number to two decimals."""
        given = counts, tokens_per_step, pruned
        exact, steps = self._exact_steps(*given), self.resolve_steps(*given)
        if abs(exact - steps) < 0.005:
            return None
        unit = next((unit for unit in UNITS if getattr(self, unit) is not None), "tokens_per_param")
        value = TOKENS_PER_PARAM if getattr(self, unit) is None else getattr(self, unit)
        return (
            f"budget.{unit}={value:g} is {exact:,.2f} steps of {tokens_per_step:,} tokens; rounded to {steps:,} "
            f"step{'s' if steps > 1 else ''}, {steps * tokens_per_step:,} tokens"
        )

    def exact_tokens(self, counts: ParamCounts, tokens_per_step: int, pruned: Pruned | None = None) -> float:
        """The training tokens that are asked for, before they are rounded to whole steps."""
        return self._exact_steps(counts, tokens_per_step, pruned) * tokens_per_step

    def _exact_steps(self, counts: ParamCounts, tokens_per_step: int, pruned: Pruned | None) -> float:
        if self.steps is not None:
            return self.steps
        n_params: int = getattr(counts, self.params)
        if self.tokens is not None:
            tokens = self.tokens
        elif self.flops is not None and pruned is not None:
            return self._steps_while_pruned(n_params, tokens_per_step, pruned)
        elif self.flops is not None:
            tokens = self.flops / (6 * n_params)
        else:
            tokens = (TOKENS_PER_PARAM if self.tokens_per_param is None else self.tokens_per_param) * n_params
        return tokens / tokens_per_step

    def _steps_while_pruned(self, n_params: int, tokens_per_step: int, pruned: Pruned) -> float:
        """The steps T with 6 T (N - pruned(T)) tokens_per_step = flops. It grows with T, and is taken as linear between
        whole numbers."""
        if self.params == "n_params_non_embedding":
            raise ConfigError(
                "budget.params=n_params_non_embedding cannot be with budget.flops in a run that prunes weights: how "
                "many of them are in the head is not known before the run; use budget.params=n_params"
            )
        assert self.flops is not None

        def flops(steps: int) -> float:
            return 6 * steps * (n_params - pruned(steps)) * tokens_per_step

        low, high = 0, 1
        while flops(high) <= self.flops:
            low, high = high, 2 * high
            if low > MOST_STEPS:
                return float(low)  # too many, as resolve_steps says
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if flops(middle) <= self.flops else (low, middle)
        start = flops(low) if low else 0.0
        return low + (self.flops - start) / (flops(high) - start)
