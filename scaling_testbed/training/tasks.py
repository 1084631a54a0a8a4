"""The errors of a run on the tasks of evaluation.tasks, as `analyze score` finds them."""

import math
from collections.abc import Callable
from typing import Any

from scaling_testbed.evaluation.scoring import log_likelihoods, summaries
from scaling_testbed.processes.compilation import uncompiled
from scaling_testbed.runs.row import STOPPED_EARLY
from scaling_testbed.training.parts import Parts


def score(parts: Parts, poll: Callable[[], object] = lambda: None) -> dict[str, Any]:
    """Compute error_by_task for the record of a step: the top-1 error on each task, or None where a log-likelihood is
    not finite. Without tasks, {}.

    The ranks take batches in turn. `poll` is called before each batch, equally often on every rank, and may raise
    Interrupted.
    """
    questions, processes = parts.questions, parts.processes
    if not questions.tasks:
        return {}
    # Sequences have many lengths, and compiled code is for one.
    with parts.placed.scoring(), uncompiled(parts.model):
        found = log_likelihoods(
            parts.placed.plain,
            questions.sequences,
            device=parts.device,
            precision=parts.precision,
            rank=processes.world.rank,
            size=processes.world.size,
            poll=poll,
        )
    found = processes.sum(found)
    if not all(map(math.isfinite, found)):
        return {"error_by_task": None}
    rows = summaries(questions.scored(found))[: len(questions.tasks)]  # without that of their mean
    return {"error_by_task": {row["task"]: row["error"] for row in rows}}


def of_row(parts: Parts, found: dict[str, float] | None, status: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The fields of a row about tasks, and its columns error/NAME. found: error_by_task of the last evaluation. status:
    of the run; only a finished one has errors."""
    tasks = parts.questions.tasks
    if not tasks:
        return {}, {}
    reason = "the run diverged" if status == "diverged" else None
    reason = "the run was stopped early" if status in STOPPED_EARLY else reason
    if reason is None and found is None:
        reason = "a log-likelihood is not finite"
    errors = {task.name: None if reason or found is None else found[task.name] for task in tasks}
    known = [error for error in errors.values() if error is not None]
    fields = {
        "task_error": sum(known) / len(tasks) if known else None,
        "task_error_chance": sum(task.chance_error for task in tasks) / len(tasks),
        "task_error_withheld": reason,
        "task_documents": {task.name: len(task.documents) for task in tasks},
    }
    return fields, {f"error/{name}": error for name, error in errors.items()}
