"""The diagnostics of a saved checkpoint, on the run's own validation tokens."""

from pathlib import Path

import torch

from scaling_testbed.config.schema import RunConfig
from scaling_testbed.data.batches import ValidationBatches
from scaling_testbed.diagnostics.forward import ForwardProbe
from scaling_testbed.diagnostics.reductions import Reductions
from scaling_testbed.diagnostics.tensors import parameter_statistics, update_statistics
from scaling_testbed.learning.optimizers import build_optimizer
from scaling_testbed.model.transformer import Transformer
from scaling_testbed.running import state
from scaling_testbed.running.device import autocast, choose_device, choose_precision
from scaling_testbed.running.loading import open_checkpoint

ROWS = 32  # of a forward pass


def inspect(run: RunConfig, folder: Path, *, step: int | None = None, sequences: int = 32) -> tuple[int, dict]:
    """The step and the diagnostics of a checkpoint of `run` in its `folder`, the newest unless `step` is given: of a
    forward pass over at most `sequences` validation sequences, which lie evenly over the validation data, the
    parameters, and the last update. `sequences` in the answer says how many there were. Raises UserError where there
    is no such checkpoint, it is damaged, or the data is not what it was trained on."""
    saved, data = open_checkpoint(run, folder, step)
    device = choose_device(run.compute)
    model = Transformer(run.model.resolved(data.vocab_size), run.parametrization, device=device)
    optimizer = build_optimizer(run.optimizer, model)
    state.restore_whole(saved.tensors, model, optimizer, device)
    found, length = Reductions(), run.batch.sequence_length
    rows = min(sequences, ROWS)
    batches = ValidationBatches(data.validation, sequence_length=length, max_tokens=sequences * length, rows=rows)
    with torch.no_grad(), ForwardProbe(model, found, per_head=True):
        for batch_BS in batches:
            found.weight = len(batch_BS)
            with autocast(device, choose_precision(run.compute, device)):
                model(torch.from_numpy(batch_BS).to(device)[:, :-1])
    numbers = {"sequences": batches.n_windows} | found.result(list, list) | parameter_statistics(model, list)
    return saved.step, numbers | update_statistics(model, optimizer, {}, list)


def by_place(found: dict[str, float]) -> list[list[dict]]:
    """The numbers as three tables of records: of the whole model, of each block, of each tensor. Single heads are left
    out."""
    whole, places = {}, {}
    for name, value in found.items():
        quantity, _, place = name.partition("/")
        if not place:
            whole[quantity] = value
        elif "/" not in place:
            places.setdefault(place, {})[quantity] = value
    blocks = [{"block": int(place), **numbers} for place, numbers in places.items() if place.isdigit()]
    tensors = [{"tensor": place, **numbers} for place, numbers in places.items() if not place.isdigit()]
    return [[{"quantity": name, "value": value} for name, value in whole.items()], blocks, tensors]
