"""What a run will compute, before it is run: steps, FLOPs, and the parameters that take part. Does not import torch.

Everything is a pure function of the configuration and the step, also where an intervention prunes weights.
"""

from collections.abc import Sequence

from scaling_testbed.config.budget import Pruned
from scaling_testbed.config.run import RunConfig, interventions_of
from scaling_testbed.errors import ConfigError
from scaling_testbed.model import counting
from scaling_testbed.model.config import ModelConfig
from scaling_testbed.model.counting import count_params


def steps_of(run: RunConfig, model: ModelConfig) -> int:
    """Optimizer steps of `run` with its resolved `model`. Raises ConfigError if they are too many, or too few for an
    intervention or for start.rewarm, or if the run begins at one of them that it does not have."""
    steps = run.budget.resolve_steps(count_params(model), run.batch.tokens, pruned_of(run, model))
    if run.start.first_step >= steps:
        raise ConfigError(
            f"start.step={run.start.first_step} is not before the last of the {steps:,} steps of this run; give a "
            "larger budget, or leave step out of start.take"
        )
    if run.start.rewarm > (left := steps - run.start.first_step):
        raise ConfigError(
            f"start.rewarm={run.start.rewarm} is more than the {left:,} steps of this run from its start on; give at "
            "most these, or a larger budget"
        )
    for intervention in interventions_of(run).values():
        intervention.check_steps(steps)
    return steps


def pruned_of(run: RunConfig, model: ModelConfig) -> Pruned | None:
    """Steps of `run` -> number of pruned weights, the mean over its steps; None if it prunes none."""
    if not any(found.pruned(model, 1) for found in interventions_of(run).values()):
        return None
    return lambda steps: pruned_steps(run, model, steps, steps) / steps


def pruned_steps(run: RunConfig, model: ModelConfig, steps: int, made: int) -> int:
    """The sum of the numbers of pruned weights over the first `made` updates of `run`, which has `steps`."""
    return sum(_sum(found.pruned(model, steps), made) for found in interventions_of(run).values())


def _sum(pieces: Sequence[tuple[int, int]], made: int) -> int:
    ends = [*(step for step, _ in pieces[1:]), made]
    return sum(n * max(0, min(end, made) - step) for (step, n), end in zip(pieces, ends, strict=False))


def training_flops(run: RunConfig, model: ModelConfig, steps: int, made: int) -> float:
    """FLOPs of the first `made` updates of `run`, which has `steps`: those of the model
    (model.counting.flops_per_token), without the products of pruned weights, and those that objective and interventions
    add."""
    length = run.batch.sequence_length
    per_token: float = counting.flops_per_token(model, length)
    per_token += run.objective.flops_per_token(model, length)
    per_token += sum(found.flops_per_token(model, length) for found in interventions_of(run).values())
    return run.batch.tokens * (made * per_token - 6 * pruned_steps(run, model, steps, made))


def params_in_use(run: RunConfig, model: ModelConfig, steps: int, made: int) -> tuple[float, int] | None:
    """n_params without pruned weights: the mean over the first `made` updates of `run`, which has `steps`, and that of
    the last of them; None if no weight is pruned in `run`, or no update is made."""
    if not made or pruned_of(run, model) is None:
        return None
    n_params, until = count_params(model).n_params, pruned_steps(run, model, steps, made)
    last = until - pruned_steps(run, model, steps, made - 1)
    return n_params - until / made, n_params - last
