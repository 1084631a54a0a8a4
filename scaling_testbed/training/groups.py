"""The accuracy of a run on groups of targets that its data tell apart, as `analyze in_context` finds it."""

from collections.abc import Callable
from typing import Any

import numpy as np

from scaling_testbed.errors import is_memory_error
from scaling_testbed.evaluation.target_groups import accuracies, grade
from scaling_testbed.processes.compilation import uncompiled
from scaling_testbed.training.data import MAIN_SET
from scaling_testbed.training.parts import Parts
from scaling_testbed.training.validation import too_little_memory_to_evaluate


def evaluate_groups(parts: Parts, poll: Callable[[], object] = lambda: None) -> dict[str, Any]:
    """Compute accuracy_by_group for the record of a step, on the run's own validation set; {} where the data tell no
    groups apart.

    The ranks take batches in turn. `poll` is called before each batch, equally often on every rank.
    """
    names, world = parts.run.data.group_names, parts.processes.world
    if not names:
        return {}
    batches, sums = parts.validation_sets[MAIN_SET], np.zeros((len(names), 3))
    with parts.placed.scoring(), uncompiled(parts.model):
        for first in range(0, len(batches), world.size):
            poll()
            number = min(first + world.rank, len(batches) - 1)  # see `evaluate`
            try:
                found = grade(parts.placed.plain, parts.run.data, batches, number, parts.device, parts.precision)
            except (RuntimeError, MemoryError, OSError) as error:
                if not is_memory_error(error):
                    raise
                raise too_little_memory_to_evaluate(parts, batches.rows, error) from None
            if first + world.rank < len(batches):
                sums += np.stack([found[name].sum(0) for name in names])
    of_all = np.reshape(parts.processes.sum(sums.ravel().tolist()), sums.shape).tolist()
    return {"accuracy_by_group": accuracies(dict(zip(names, of_all, strict=True)))}
