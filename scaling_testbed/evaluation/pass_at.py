"""pass@N of tasks with one right text: the chance that of N samples at least one is right, without sampling.

A sample is right if it begins with the right text, token by token as the tokenizer writes it after the context. Its
probability P is then the product of the probabilities of these tokens, and pass@N is the mean of 1 - (1 - P)^N over the
documents, exactly. Without a task, the documents are the answers of the run's own validation split (answers.py).

Shapes in names: D documents.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from scaling_testbed.config.run import RunConfig
from scaling_testbed.data.tokenizers import load_tokenizer
from scaling_testbed.errors import ConfigError, UserError
from scaling_testbed.evaluation.answers import answers_of
from scaling_testbed.evaluation.loading import load_model
from scaling_testbed.evaluation.multiple_choice import ChoiceTask
from scaling_testbed.evaluation.scoring import Questions, log_likelihoods, place_of
from scaling_testbed.learning.loss_model import LossModel

ANSWERS = "answers"  # of the validation split
DEFINITION = (
    "pass@N is the mean over documents of 1 - (1 - P)^N, where P is the probability that a sample at this temperature\n"
    "begins with the right choice; se is the standard error of this mean. log_p is the mean of log P, in nats"
)


@dataclass(frozen=True)
class Likely:
    """A document and log P of its right choice at a temperature, in nats."""

    task: str
    line: int
    temperature: float
    log_p: float
    n_tokens: int
    truncated: bool


def likelihoods_of_right(
    run: RunConfig,
    folder: Path,
    tasks: Sequence[ChoiceTask],
    temperatures: Sequence[float],
    *,
    step: int | None = None,
    average: bool = False,
    max_length: int | None = None,
) -> tuple[int, list[Likely]]:
    """The step of a checkpoint of `run` in its `folder`, and log P of the right choice of each document of `tasks` at
    each temperature; without tasks, of each answer of its validation split, as the task ANSWERS. Arguments and errors
    are those of `scoring.score` and `answers_of`; the wrong choices are not read."""
    device, precision = place_of(run)
    step, model, data = load_model(run, folder, step=step, device=device, average=average)
    length = max_length or run.batch.sequence_length
    if tasks:
        questions = Questions.of(tasks, load_tokenizer(data.folder), length)
        documents = [(task.name, document) for task in tasks for document in task.documents]
        right = [row[document.gold] for row, (_, document) in zip(questions.rows, documents, strict=True)]
        places = [(name, document.line) for name, document in documents]
    else:
        answers = answers_of(data, run.batch.sequence_length, length)
        right, places = [one for _, one in answers], [(ANSWERS, number) for number, _ in answers]
    losses, found = LossModel(model, run.loss), []
    for temperature in temperatures:
        flat = log_likelihoods(losses, right, device=device, precision=precision, temperature=temperature)
        if not all(map(math.isfinite, flat)):
            raise UserError(f"step {step} of {folder} gives log-likelihoods that are not finite: has the run diverged?")
        found += [
            Likely(name, line, temperature, min(log_p, 0.0), one.n_scored, one.truncated)
            for (name, line), one, log_p in zip(places, right, flat, strict=True)
        ]
    return step, found


def pass_at(log_p_D, n: int) -> np.ndarray:
    """1 - (1 - P)^N of each log P, as -expm1(N log(1 - P)), in fp64.

    log(1 - P) is log(-expm1(log P)) where P is above one half, and log1p(-P) below, so that neither a tiny P nor one
    near 1 loses digits.
    """
    log_p_D = np.asarray(log_p_D, dtype=np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):  # P = 1: the logarithm of 0
        missed_D = np.where(log_p_D > -math.log(2), np.log(-np.expm1(log_p_D)), np.log1p(-np.exp(log_p_D)))
    return -np.expm1(n * missed_D)


def summaries(found: Sequence[Likely], samples: Sequence[int]) -> list[dict[str, Any]]:
    """One row for each task and temperature, with pass@N and its standard error for each N of `samples`."""
    rows = []
    for name, temperature in dict.fromkeys((one.task, one.temperature) for one in found):
        here = [one for one in found if (one.task, one.temperature) == (name, temperature)]
        log_p_D = np.array([one.log_p for one in here])
        row = {"task": name, "temperature": temperature, "documents": len(here), "log_p": float(log_p_D.mean())}
        for n in samples:
            values_D = pass_at(log_p_D, n)
            row[f"pass@{n}"] = float(values_D.mean())
            row[f"pass@{n}_se"] = float(values_D.std(ddof=1)) / math.sqrt(len(here)) if len(here) > 1 else None
        rows.append(row | {"truncated": sum(one.truncated for one in here)})
    return rows


def records(found: Sequence[Likely]) -> list[dict[str, Any]]:
    """One record for each document and temperature."""
    return [dataclasses.asdict(one) for one in found]


def check_temperatures(temperatures: Sequence[float]) -> None:
    """Raise ConfigError unless all are positive and none is given twice."""
    if odd := [one for one in temperatures if not 0 < one < math.inf]:
        raise ConfigError(f"--temperatures must be positive numbers; got {odd[0]:g}: the likeliest text has no pass@N")
    if len(set(temperatures)) < len(temperatures):
        raise ConfigError(f"--temperatures {','.join(f'{one:g}' for one in temperatures)}: a number is given twice")
