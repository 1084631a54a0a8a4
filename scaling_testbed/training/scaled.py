"""The validation loss after one temperature, beside the loss of validation.py and on the same batches."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from scaling_testbed.data.batches import ValidationBatches
from scaling_testbed.errors import is_memory_error
from scaling_testbed.learning.temperature import LADDER, fitted
from scaling_testbed.processes.compilation import uncompiled
from scaling_testbed.processes.device import autocast, to_device
from scaling_testbed.training.data import MAIN_SET
from scaling_testbed.training.parts import Parts
from scaling_testbed.training.validation import too_little_memory_to_evaluate


def evaluate_scaled(parts: Parts, poll: Callable[[], object] = lambda: None) -> dict[str, Any]:
    """Compute ce_scaled, ce_scaled_temperature, ce_scaled_by_set and, with an average of the weights,
    ce_scaled_average for the record of a step; {} where the run does not ask for them and its objective is the
    cross-entropy.

    Sequences are counted from 0 over a set. The temperature is fitted on the even ones, and the loss, in nats per
    token, is that of the odd ones. It is None where a sum is not finite, and for a set of one sequence. `poll` is
    called before each batch, equally often on every rank.
    """
    if parts.run.objective.is_cross_entropy and not parts.run.evaluation.ce_scaled:
        return {}
    sets = {name: _of_set(parts, batches, poll) for name, batches in parts.validation_sets.items()}
    loss, temperature = sets[MAIN_SET]
    found = {
        "ce_scaled": loss,
        "ce_scaled_temperature": temperature,
        "ce_scaled_by_set": {name: loss for name, (loss, _) in sets.items()},
    }
    if parts.averages:
        with parts.averages.in_place():
            found["ce_scaled_average"] = _of_set(parts, parts.validation_sets[MAIN_SET], poll)[0]
    return found


@torch.no_grad()
def _of_set(parts: Parts, batches: ValidationBatches, poll: Callable[[], object]) -> tuple[float | None, float | None]:
    """ce_scaled and the temperature of one set."""
    world, model = parts.processes.world, parts.placed.plain
    sums, n_odd = np.zeros((2, len(LADDER), 3)), 0.0
    with parts.placed.scoring(), uncompiled(parts.model):
        for first in range(0, len(batches), world.size):
            poll()
            number = first + world.rank
            place = min(number, len(batches) - 1)  # see `evaluate`
            try:
                batch = batches.batch(place)
                of_set_B = place * batches.rows + np.arange(len(batch.tokens_BS))
                odd_B = torch.from_numpy(of_set_B % 2 == 1).to(parts.device)
                there = batch.map(lambda x: to_device(x, parts.device))
                with autocast(parts.device, parts.precision):
                    here = model.ladder_sums_of(odd_B, *there.tensors)
            except (RuntimeError, MemoryError, OSError) as error:
                if not is_memory_error(error):
                    raise
                raise too_little_memory_to_evaluate(parts, batches.rows, error) from None
            if number < len(batches):
                sums += here.cpu().numpy()
                n_odd += batch.n_targets(of_set_B % 2 == 1)
    *of_all, n_odd = parts.processes.sum([*sums.ravel().tolist(), n_odd])
    even, odd = np.reshape(of_all, sums.shape).tolist()
    found = fitted(even, odd) if n_odd else None
    if found is None:
        return None, None
    temperature, total = found
    return total / n_odd, temperature
