"""The validation loss: cross-entropy per token over the same batches at every evaluation."""

import math
from collections.abc import Callable
from typing import Any

import torch

from scaling_testbed.config.sections import AUTO
from scaling_testbed.errors import UserError, is_memory_error
from scaling_testbed.processes.device import autocast, in_fp64, to_device
from scaling_testbed.training.data import MAIN_SET
from scaling_testbed.training.parts import Parts
from scaling_testbed.training.step import too_little_memory


@torch.no_grad()
def evaluate(parts: Parts, poll: Callable[[], object] = lambda: None) -> dict[str, Any]:
    """Compute val_loss, val_bpb (both of the run's own set) and val_loss_by_set for the record of a step.

    A loss is the sum of the cross-entropy over all targets of a set, divided by their number, in nats. It never
    includes the z-loss. val_bpb is None where the tokenizer loses text or a mask leaves tokens out. The ranks take
    batches in turn, and sums are in float64. `poll` is called before each batch, equally often on every rank, and may
    raise Interrupted. Raises UserError if a file of the data is another now, and TooLittleMemory.
    """
    processes, losses = parts.processes, {}
    for name, batches in parts.validation_sets.items():
        total, n_tokens = 0.0, 0.0
        terms_of_batches = []  # on the device: the host does not wait for each batch
        with parts.placed.scoring():
            for first in range(0, len(batches), processes.world.size):
                poll()
                number = first + processes.world.rank
                try:
                    # A sharded model needs all ranks: a rank without a batch of its own computes the last and drops it.
                    batch = batches.batch(min(number, len(batches) - 1)).map(lambda x: to_device(x, parts.device))
                    with autocast(parts.device, parts.precision):
                        # Compiled code is for one shape. A last batch with fewer sequences would need its own.
                        terms = parts.placed.plain(*batch.tensors, rows=batches.rows if parts.compiled else None)
                except (RuntimeError, MemoryError, OSError) as error:
                    if not is_memory_error(error):
                        raise
                    raise too_little_memory_to_evaluate(parts, batches.rows, error) from None
                if number < len(batches):
                    terms_of_batches.append(torch.stack([in_fp64(terms.ce), in_fp64(terms.n_tokens)]))
        for ce, n_here in torch.stack(terms_of_batches).tolist() if terms_of_batches else []:
            total += ce  # `sum` rounds otherwise from Python 3.12 on
            n_tokens += n_here
        total_of_all, n_tokens_of_all = processes.sum([total, n_tokens])
        losses[name] = total_of_all / n_tokens_of_all
    for prepared in parts.prepared.values():
        prepared.check()
    main, stream = losses[MAIN_SET], parts.data.validation
    n_bytes = None if parts.data.why_no_bits else stream.n_bytes
    return {
        "val_loss": main,
        "val_bpb": bits_per_byte(main, stream.n_tokens, n_bytes),
        "val_loss_by_set": losses,
    }


def evaluate_average(parts: Parts, poll: Callable[[], object] = lambda: None) -> dict[str, Any]:
    """Compute val_loss_average and val_loss_average_by_set for the record of a step: as `evaluate` does, with the
    average in place of the weights; {} without an average, or before the first one."""
    if not parts.averages:
        return {}
    with parts.averages.in_place():
        found = evaluate(parts, poll)
    return {"val_loss_average": found["val_loss"], "val_loss_average_by_set": found["val_loss_by_set"]}


def too_little_memory_to_evaluate(parts: Parts, rows: int, error: BaseException) -> UserError:
    """The error for a person. It asks for a smaller micro-batch if evaluations take as many sequences, and where the
    run can make it smaller by itself."""
    asked = parts.run.evaluation.rows
    if asked is None or (asked == AUTO and parts.run.batch.is_auto):
        return too_little_memory(parts, parts.run, rows, error)
    fewer = f"evaluation.rows={rows // 2}" if rows > 1 else "a smaller batch.sequence_length or model"
    return UserError(f"there is too little memory to evaluate {rows} sequences at a time; try {fewer}")


def bits_per_byte(loss_nats: float, n_tokens: int, n_bytes: int | None) -> float | None:
    """Loss per token as bits per byte of text; None for a source that has no text (n_bytes None or 0).

    n_tokens and n_bytes are those of the whole validation split.
    """
    return loss_nats / math.log(2) * n_tokens / n_bytes if n_bytes else None
