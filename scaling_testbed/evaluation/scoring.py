"""Top-1 error of a saved checkpoint on multiple-choice tasks, by the log-likelihood of each choice after its context.

Shapes in names: B sequences, T positions, N scored tokens.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch

from scaling_testbed.config.run import RunConfig
from scaling_testbed.data.tokenizers import load_tokenizer
from scaling_testbed.errors import UserError
from scaling_testbed.evaluation.corpus_tasks import with_made
from scaling_testbed.evaluation.loading import load_model
from scaling_testbed.evaluation.multiple_choice import MEAN, ChoiceTask, Continuation, Document, continuations, remarks
from scaling_testbed.learning.loss_model import LossModel
from scaling_testbed.model.parts import NORMALISERS
from scaling_testbed.processes.device import autocast, choose_device, choose_precision

BATCH_TOKENS = 4096  # in a forward pass, including padding
FEWER = "`analyze tasks --questions`, whose files can be scored"
DEFINITION = (
    "error is 1 - top-1 accuracy, by the sum of the log-likelihoods of a choice's tokens. error_per_byte divides this\n"
    "sum by the UTF-8 bytes of the choice without leading white space. se is the standard error of the mean"
)


@dataclass(frozen=True)
class Scored:
    """A scored document. log_likelihoods: one for each choice, in nats. continuations: the choices as tokens."""

    task: str
    document: Document
    log_likelihoods: list[float]
    continuations: list[Continuation]

    @property
    def predicted(self) -> int:
        """The likeliest choice, the first one if several are equal."""
        return _largest(self.log_likelihoods)

    @property
    def predicted_per_byte(self) -> int:
        """The likeliest choice by log-likelihood per byte, the first one if several are equal."""
        return _largest([x / n for x, n in zip(self.log_likelihoods, self.document.n_bytes, strict=True)])

    @property
    def truncated(self) -> bool:
        """Whether the beginning of the context was left out."""
        return any(one.truncated for one in self.continuations)

    @property
    def tokenised_apart(self) -> bool:
        """Whether some choice and the context were tokenised separately."""
        return any(one.apart for one in self.continuations)

    def record(self) -> dict[str, Any]:
        """One line of the file that `analyze score --out` writes."""
        return {
            "task": self.task,
            "line": self.document.line,
            "gold": self.document.gold,
            "predicted": self.predicted,
            "predicted_per_byte": self.predicted_per_byte,
            "log_likelihoods": self.log_likelihoods,
            "n_bytes": self.document.n_bytes,
            "n_tokens": [one.n_scored for one in self.continuations],
            "truncated": self.truncated,
            "tokenised_apart": self.tokenised_apart,
        }


def _largest(values: Sequence[float]) -> int:
    return max(range(len(values)), key=values.__getitem__)


@dataclass(frozen=True)
class Questions:
    """Tasks whose choices are tokens. rows: the choices of each document, over all tasks."""

    tasks: Sequence[ChoiceTask]
    rows: list[list[Continuation]]

    @classmethod
    def of(cls, tasks: Sequence[ChoiceTask], tokenizer, max_length: int) -> Self:
        """Raises UserError, which names file and line, if a choice is longer than `max_length` or has no token."""
        return cls(tasks, [row for task in tasks for row in continuations(task, tokenizer, max_length=max_length)])

    def remarks(self) -> list[str]:
        """What makes an error doubtful: that of the documents, and contexts that are too long."""
        cut = sum(any(one.truncated for one in row) for row in self.rows)
        of_all = f"{cut} of {len(self.rows)} documents of tasks lose the beginning of their context, which is too long"
        return [*remarks(self.tasks), *([of_all] if cut else [])]

    @property
    def sequences(self) -> list[Continuation]:
        return [one for row in self.rows for one in row]

    def scored(self, log_likelihoods: Sequence[float]) -> list[Scored]:
        """The documents with the log-likelihoods of all `sequences`."""
        values, row, found = iter(log_likelihoods), iter(self.rows), []
        for task in self.tasks:
            for document in task.documents:
                found.append(Scored(task.name, document, [next(values) for _ in document.choices], next(row)))
        return found


def score(
    run: RunConfig,
    folder: Path,
    tasks: Sequence[ChoiceTask | str],
    *,
    step: int | None = None,
    average: bool = False,
    max_length: int | None = None,
) -> tuple[int, list[Scored]]:
    """Score `tasks` by a checkpoint of `run` in its `folder`, the newest unless `step` is given.

    A task that is a name of TASKS_OF_CORPUS is made of the run's corpus, as evaluation.tasks makes it in this run.
    average: by the average of its weights. max_length: how many tokens the model reads at most, by default as many as
    in training; a model can read more, but was not trained for it. Returns the step and the scored documents. Raises
    UserError if the checkpoint does not exist, its data has changed or has no tokenizer, a choice is too long, or a
    log-likelihood is not finite.
    """
    device, precision = place_of(run)
    step, model, data = load_model(run, folder, step=step, device=device, average=average)
    made = with_made(tasks, data.folder, run.evaluation, option=FEWER)
    questions = Questions.of(made, load_tokenizer(data.folder), max_length or run.batch.sequence_length)
    flat = log_likelihoods(LossModel(model, run.loss), questions.sequences, device=device, precision=precision)
    if not all(map(math.isfinite, flat)):
        raise UserError(f"step {step} of {folder} gives log-likelihoods that are not finite: has the run diverged?")
    return step, questions.scored(flat)


def place_of(run: RunConfig) -> tuple[torch.device, str]:
    """The device and the precision in which a checkpoint is scored: those of training, if available."""
    device = choose_device(run.compute)
    return device, choose_precision(run.compute, device)


@torch.no_grad()
def log_likelihoods(
    model: LossModel,
    sequences: Sequence[Continuation],
    *,
    device: torch.device,
    precision: str,
    rank: int = 0,
    size: int = 1,
    poll: Callable[[], object] = lambda: None,
    temperature: float = 1.0,
) -> list[float]:
    """For each sequence, the log-likelihood of its scored tokens given all tokens before them, summed, in nats, with
    the logits divided by `temperature`.

    size: how many processes take the batches in turn. Each has zeros in place of what the others find, so that a sum
    over the ranks has all values. poll: called before each batch, equally often on every rank.
    """
    found = [0.0] * len(sequences)
    batches = list(passes([len(one.ids) for one in sequences], same_length=_needs_same_length(model)))
    for first in range(0, len(batches), size):
        poll()
        # A sharded model needs all ranks: a rank without a batch of its own computes the last and drops it.
        batch = batches[min(first + rank, len(batches) - 1)]
        with autocast(device, precision):
            values = _of_batch(model, [sequences[place] for place in batch], device, temperature)
        if first + rank < len(batches):
            for place, value in zip(batch, values, strict=True):
                found[place] = value
    return found


def passes(lengths: Sequence[int], *, same_length: bool) -> Iterator[list[int]]:
    """Indices of the sequences of each forward pass, the longest first: at most BATCH_TOKENS tokens including padding,
    or one sequence. same_length: without padding, for a normaliser that depends on the length of a sequence."""
    batch: list[int] = []
    for place in sorted(range(len(lengths)), key=lambda place: -lengths[place]):
        full = batch and (len(batch) + 1) * lengths[batch[0]] > BATCH_TOKENS
        if full or (batch and same_length and lengths[place] != lengths[batch[0]]):
            yield batch
            batch = []
        batch.append(place)
    if batch:
        yield batch


@torch.no_grad()
def greedy_log_likelihoods(
    model: LossModel, sequences: Sequence[Continuation], *, device: torch.device, precision: str
) -> list[tuple[float, bool]]:
    """`log_likelihoods`, each with whether every scored token is the likeliest one after those before it."""
    found: list[tuple[float, bool]] = [(0.0, True)] * len(sequences)
    for batch in passes([len(one.ids) for one in sequences], same_length=_needs_same_length(model)):
        row_N, tokens_BT, scored_BT = _tensors([sequences[place] for place in batch], device)
        with autocast(device, precision):
            ce_N, greedy_N = model.greedy_at(tokens_BT, scored_BT)
        misses_B = torch.zeros(len(batch), dtype=torch.int64).index_add_(0, row_N, (~greedy_N).long().cpu())
        values = zip(_sums(len(batch), row_N, ce_N), (misses_B == 0).tolist(), strict=True)
        for place, value in zip(batch, values, strict=True):
            found[place] = value
    return found


def _needs_same_length(model: LossModel) -> bool:
    return NORMALISERS[model.model.config.attention_normaliser].depends_on_length


def _of_batch(model: LossModel, rows: Sequence[Continuation], device: torch.device, temperature: float) -> list[float]:
    """Log-likelihoods of the sequences `rows`, the longest first."""
    row_N, tokens_BT, scored_BT = _tensors(rows, device)
    return _sums(len(rows), row_N, model.cross_entropy_at(tokens_BT, scored_BT, temperature))


def _sums(n_rows: int, row_N: torch.Tensor, ce_N: torch.Tensor) -> list[float]:
    return torch.zeros(n_rows, dtype=torch.float64).index_add_(0, row_N, -ce_N.double().cpu()).tolist()


def _tensors(rows: Sequence[Continuation], device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The row of each scored token (on the CPU), tokens_BT, and scored_BT [B, T - 1] for the targets. Padding is after
    the ends of the sequences, so causal attention does not see it, and it is not scored."""
    tokens_BT = torch.zeros(len(rows), len(rows[0].ids), dtype=torch.int64)
    scored_BT = torch.zeros_like(tokens_BT, dtype=torch.bool)
    for row, one in enumerate(rows):
        tokens_BT[row, : len(one.ids)] = torch.from_numpy(one.ids)
        scored_BT[row, len(one.ids) - one.n_scored : len(one.ids)] = True
    row_N = scored_BT[:, 1:].nonzero()[:, 0]
    return row_N, tokens_BT.to(device), scored_BT[:, 1:].to(device)


def summaries(scored: Sequence[Scored]) -> list[dict[str, Any]]:
    """One row for each task, and with several tasks one for their unweighted mean."""
    names = dict.fromkeys(one.task for one in scored)
    rows = [_summary(name, [one for one in scored if one.task == name]) for name in names]
    return rows if len(rows) == 1 else [*rows, _mean_row(rows)]


def _summary(name: str, scored: Sequence[Scored]) -> dict[str, Any]:
    error, error_se = _mean([one.predicted != one.document.gold for one in scored])
    per_byte, per_byte_se = _mean([one.predicted_per_byte != one.document.gold for one in scored])
    return {
        "task": name,
        "documents": len(scored),
        "chance_error": _mean([one.document.chance_error for one in scored])[0],
        "error": error,
        "error_se": error_se,
        "error_per_byte": per_byte,
        "error_per_byte_se": per_byte_se,
        "truncated": sum(one.truncated for one in scored),
        "tokenised_apart": sum(one.tokenised_apart for one in scored),
    }


def _mean(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean and its standard error, which is None for one value."""
    n, mean = len(values), sum(values) / len(values)
    if n == 1:
        return mean, None
    return mean, math.sqrt(sum((value - mean) ** 2 for value in values) / (n - 1) / n)


def _mean_row(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The unweighted mean over tasks. Tasks are fixed, so the standard error covers only their documents."""
    found: dict[str, Any] = {"task": MEAN}
    for key in ("documents", "truncated", "tokenised_apart"):
        found[key] = sum(row[key] for row in rows)
    for key in ("chance_error", "error", "error_per_byte"):
        found[key] = sum(row[key] for row in rows) / len(rows)
    for key in ("error_se", "error_per_byte_se"):
        errors = [row[key] for row in rows]
        found[key] = None if None in errors else math.sqrt(sum(error**2 for error in errors)) / len(rows)
    return {key: found[key] for key in rows[0]}
