"""The diagnostics of a saved checkpoint, on the run's own validation tokens."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import torch

from scaling_testbed.config.run import RunConfig
from scaling_testbed.data.batches import ValidationBatches
from scaling_testbed.diagnostics.forward import ForwardProbe
from scaling_testbed.diagnostics.reductions import Reductions
from scaling_testbed.diagnostics.tensors import gradient_statistics, parameter_statistics, update_statistics
from scaling_testbed.evaluation.loading import build_anywhere, open_checkpoint
from scaling_testbed.learning.loss_model import LossModel
from scaling_testbed.learning.optimizers import clip_coefficient
from scaling_testbed.model.transformer import Transformer
from scaling_testbed.processes.device import autocast, choose_device, choose_precision, to_device
from scaling_testbed.runs import state

ROWS = 32  # sequences in a forward pass


def inspect(run: RunConfig, folder: Path, *, step: int | None = None, sequences: int = 32) -> tuple[int, dict]:
    """Return the step and the diagnostics of a checkpoint of `run` in its `folder`, the newest unless `step` is given.

    The forward pass and the gradient use at most `sequences` validation sequences, spread evenly over the validation
    data; `sequences` in the result is their number. The update is the last one of training, relative to the parameters
    after it. It is left out if its learning rate was known only during the step. Raises UserError if the checkpoint
    does not exist or is damaged, or if the data is not that of training.
    """
    saved, data = open_checkpoint(run, folder, step)
    device = choose_device(run.compute)
    model = build_anywhere(run, data, device)
    optimizer = run.optimizer.build(model)
    state.restore_whole(folder, saved.tensors, model, optimizer, device)
    rows = min(sequences, run.batch.micro_batch or ROWS, ROWS)
    length = run.batch.sequence_length
    batches = ValidationBatches(
        data.validation, sequence_length=length, max_tokens=sequences * length, rows=rows, cutting=run.batch.cutting
    )
    found = {"sequences": batches.n_sequences} | _forward(run, model, batches, device)
    found |= _gradients(run, model, batches, device) | parameter_statistics(model, list)
    return saved.step, found | update_statistics(model, run.optimizer, optimizer, found, list)


def _forward(run: RunConfig, model: Transformer, batches: ValidationBatches, device: torch.device) -> dict[str, float]:
    found = Reductions()
    with torch.no_grad(), ForwardProbe(model, found, per_head=True):
        for batch in batches:
            found.weight = len(batch.tokens_BS)
            tokens_BS, _, begins_BT = batch.map(lambda x: to_device(x, device)).tensors
            with autocast(device, choose_precision(run.compute, device)):
                model(tokens_BS[:, :-1], begins_BT)
    return found.result(list, list)


def _gradients(run: RunConfig, model: Transformer, batches: ValidationBatches, device: torch.device) -> dict:
    """Gradient statistics of the mean loss, including the z-loss as in training; global norm, clip coefficient."""
    losses = LossModel(model, dataclasses.replace(run.loss, impl="auto"))
    for batch in batches:
        with autocast(device, choose_precision(run.compute, device)):
            terms = losses(*batch.map(lambda x: to_device(x, device)).tensors)
        (terms.loss / batches.n_tokens).backward()
    found = gradient_statistics(model, list)
    norm = math.sqrt(sum(value**2 for name, value in found.items() if name.startswith("grad_norm/")))
    return found | {"grad_norm": norm, "clip_coefficient": clip_coefficient(norm, run.optimizer.clip_norm)}


def by_place(found: dict[str, float]) -> list[list[dict]]:
    """The numbers as three tables of records: of the whole model, of each block, of each tensor. Single heads are left
    out."""
    whole: dict[str, Any] = {}
    places: dict[str, dict[str, Any]] = {}
    for name, value in found.items():
        quantity, _, place = name.partition("/")
        if not place:
            whole[quantity] = value
        elif "/" not in place:
            places.setdefault(place, {})[quantity] = value
    blocks = [{"block": int(place), **numbers} for place, numbers in places.items() if place.isdigit()]
    tensors = [{"tensor": place, **numbers} for place, numbers in places.items() if not place.isdigit()]
    return [[{"quantity": name, "value": value} for name, value in whole.items()], blocks, tensors]
