"""Accuracy and loss of groups of targets that a source of data tells apart, such as answers that a sequence has told.

Shapes in names: B sequences, T positions, S = T + 1, N targets of a batch.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from scaling_testbed.config.run import RunConfig, flatten
from scaling_testbed.data.batches import ValidationBatches
from scaling_testbed.data.sources.source import Source
from scaling_testbed.errors import UserError
from scaling_testbed.evaluation.loading import load_model
from scaling_testbed.evaluation.scoring import place_of
from scaling_testbed.evaluation.statistics import ratio_of_sums
from scaling_testbed.learning.loss_model import LossModel
from scaling_testbed.processes.device import autocast, to_device

ROWS = 256  # sequences in a pass
DEFINITION = (
    "accuracy: the share of the targets of a group that are the likeliest token. loss: their cross-entropy, in nats.\n"
    "se: standard errors over sequences"
)
Graded = dict[
    str, np.ndarray
]  # group -> for each sequence its targets, those that are likeliest, and their loss [B, 3]


@torch.no_grad()
def grade(
    losses: LossModel, source: Source, batches: ValidationBatches, number: int, device: torch.device, precision: str
) -> Graded:
    """The sums of each sequence of batch `number`, by group."""
    batch = batches.batch(number)
    groups = source.groups(batches.windows(number), batch.tokens_BS)
    scored_BT = np.logical_or.reduce(list(groups.values()))
    tokens_BS = to_device(batch.tokens_BS, device)
    with autocast(device, precision):
        ce_N, is_right_N = losses.greedy_at(tokens_BS, torch.from_numpy(scored_BT).to(device))
    values_BT3 = np.zeros((*scored_BT.shape, 3))
    values_BT3[scored_BT] = torch.stack([torch.ones_like(ce_N), is_right_N.to(ce_N), ce_N], dim=1).double().cpu()
    return {name: (values_BT3 * in_group_BT[:, :, None]).sum(1) for name, in_group_BT in groups.items()}


def of_run(
    run: RunConfig, folder: Path, *, tokens: int, step: int | None = None, average: bool = False
) -> list[dict[str, Any]]:
    """One row for each group of a checkpoint of `run` in its `folder`, the newest unless `step` is given: run, step,
    group, answers, accuracy, accuracy_se, loss, loss_se.

    At most `tokens` tokens of the validation split are read, spread evenly. average: by the average of the weights.
    Raises UserError if the data of the run have no groups, if the checkpoint does not exist or its data have changed,
    or if a loss is not finite.
    """
    if not run.data.group_names:
        raise UserError(f"{folder} was trained on data={run.data.name}, which tells no groups of answers apart")
    device, precision = place_of(run)
    step, model, data = load_model(run, folder, step=step, device=device, average=average)
    length = run.batch.sequence_length
    batches = ValidationBatches(data.validation, sequence_length=length, max_tokens=tokens, rows=ROWS)
    losses = LossModel(model, run.loss)
    found = [grade(losses, run.data, batches, number, device, precision) for number in range(len(batches))]
    rows = []
    for name in run.data.group_names:
        sums_B3 = np.concatenate([one[name] for one in found])
        if not np.isfinite(sums_B3).all():
            raise UserError(f"step {step} of {folder} gives a loss that is not finite: has the run diverged?")
        accuracy, accuracy_se = ratio_of_sums(sums_B3[:, 1], sums_B3[:, 0])
        loss, loss_se = ratio_of_sums(sums_B3[:, 2], sums_B3[:, 0])
        row = {"run": str(folder), "step": step, "group": name, "answers": int(sums_B3[:, 0].sum())}
        rows.append(row | {"accuracy": accuracy, "accuracy_se": accuracy_se, "loss": loss, "loss_se": loss_se})
    return rows


def differing(runs: Sequence[RunConfig]) -> list[dict[str, Any]]:
    """The keys in which the runs differ, with their values, for each run."""
    flat = [flatten(run) for run in runs]
    keys = [key for key in dict.fromkeys(key for one in flat for key in one) if key != "overrides"]
    return [{key: one.get(key) for key in keys if len({repr(other.get(key)) for other in flat}) > 1} for one in flat]


def accuracies(sums: Mapping[str, Sequence[float]]) -> dict[str, float | None]:
    """Group -> its accuracy, from its sums; None where it has no target, or its loss is not finite."""
    return {
        name: right / number if number and math.isfinite(loss) else None for name, (number, right, loss) in sums.items()
    }
