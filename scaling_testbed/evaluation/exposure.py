"""How well a checkpoint knows planted strings by heart: the exposure of their secrets.

The exposure of a secret is log2 |R| - log2 rank, where rank is its place among all secrets R of its form, ordered by
the loss of the model after the same prompt (Carlini et al. 2019, arXiv 1802.08232, section 4.2). Where there are many,
it is estimated by a random sample of others (section 4.3): the rank is among these and the secret itself.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from scaling_testbed.config.run import RunConfig
from scaling_testbed.data.batches import ONLY
from scaling_testbed.data.documents import documents
from scaling_testbed.data.shards import PreparedData
from scaling_testbed.data.sources.source import Canary
from scaling_testbed.data.tokenizers import load_tokenizer
from scaling_testbed.errors import ConfigError, UserError
from scaling_testbed.evaluation.loading import load_model
from scaling_testbed.evaluation.multiple_choice import Continuation
from scaling_testbed.evaluation.scoring import log_likelihoods, place_of
from scaling_testbed.learning.loss_model import LossModel

DEFINITION = (
    "loss: nats per token of the secret after its prompt. exposure: log2(others + 1) - log2(rank), in bits; rank is\n"
    "its place among so many others of its form. It is at most log2(others + 1); of secrets that the model does not\n"
    "know it is 1.44 in the mean. at_most: the share of secrets that have this largest exposure"
)


@dataclass(frozen=True)
class Exposed:
    """A planted string and what a model knows of it.

    loss: of its secret, in nats per token. rank: 1 if no other secret has a lower loss, of others + 1. exposure: in
    bits. exact: whether the others are all secrets of this form.
    """

    source: str
    number: int
    repeats: int
    prompt: str
    loss: float
    n_tokens: int
    others: int
    rank: int
    exposure: float
    exact: bool


def exposures(
    run: RunConfig, folder: Path, others: int, *, step: int | None = None, average: bool = False
) -> tuple[int, list[Exposed]]:
    """The step of a checkpoint of `run` in its `folder`, the newest unless `step` is given, and each string that its
    data plant, in their order. A string is read after an EOS, as documents are in training.

    others: the number of other secrets that each is compared with; all of them if there are no more. average: by the
    average of the weights. Raises ConfigError if the data plant nothing, and UserError if a string is longer than the
    sequences of the run, if the strings are not those of the prepared data, and what `load_model` raises.
    """
    sources = {name: part for name, part in (run.data.parts() or {ONLY: run.data}).items() if part.canaries(0)}
    if not sources:
        raise ConfigError(f"{folder}: its data plant no strings; train with data=canaries as a source of data=mixture")
    device, precision = place_of(run)
    step, model, data = load_model(run, folder, step=step, device=device, average=average)
    losses, tokenizer, found = LossModel(model, run.loss), load_tokenizer(data.folder), []
    for name, source in sources.items():
        prepared = data.sources().get(name, data)
        canaries = source.canaries(others)
        _check_planted(name or run.data.name, canaries, prepared, tokenizer)
        for number, canary in enumerate(canaries):
            rows = _tokens(tokenizer, canary.prompt, (canary.secret, *canary.others))
            if (longest := max(len(row.ids) for row in rows) - 1) > run.batch.sequence_length:
                raise UserError(
                    f"{folder}: a planted string has {longest} tokens, more than batch.sequence_length="
                    f"{run.batch.sequence_length}"
                )
            values = log_likelihoods(losses, rows, device=device, precision=precision)
            means = [-value / row.n_scored for value, row in zip(values, rows, strict=True)]
            if not all(map(math.isfinite, means)):
                raise UserError(f"step {step} of {folder} gives losses that are not finite: has the run diverged?")
            found.append(_exposed(name or run.data.name, number, canary, means, rows[0].n_scored))
    return step, found


def _tokens(tokenizer, prompt: str, secrets: Sequence[str]) -> list[Continuation]:
    """Each secret as tokens after EOS and prompt. Prompt and secret become tokens each on its own, as in training."""
    before, *after = tokenizer.encode_batch([text.encode() for text in (prompt, *secrets)])
    ids = [np.concatenate([[tokenizer.eos_id], before, own]).astype(np.int64) for own in after]
    return [Continuation(whole, len(own), False, True) for whole, own in zip(ids, after, strict=True)]


def _check_planted(name: str, canaries: Sequence[Canary], data: PreparedData, tokenizer) -> None:
    """Raise UserError unless the strings are the validation documents of their source."""
    now = [_tokens(tokenizer, one.prompt, [one.secret])[0].ids[1:] for one in canaries]
    then = [one.tokens[:-1] for one in documents(data, "validation")]
    if len(now) != len(then) or not all(map(np.array_equal, now, then)):
        raise UserError(f"{data.folder}: the strings that {name} plants now are not those that were prepared")


def _exposed(name: str, number: int, canary: Canary, losses: Sequence[float], n_tokens: int) -> Exposed:
    own, *others = losses
    rank = 1 + sum(other <= own for other in others)  # of equal losses the secret is the last
    return Exposed(
        source=name,
        number=number,
        repeats=canary.repeats,
        prompt=canary.prompt,
        loss=own,
        n_tokens=n_tokens,
        others=len(others),
        rank=rank,
        exposure=math.log2(len(others) + 1) - math.log2(rank),
        exact=len(others) + 1 == canary.n_secrets,
    )


def summaries(found: Sequence[Exposed]) -> list[dict[str, Any]]:
    """One row for each source and number of repeats: means over strings, with their standard errors."""
    rows = []
    for source, repeats in sorted({(one.source, one.repeats) for one in found}):
        here = [one for one in found if (one.source, one.repeats) == (source, repeats)]
        row: dict[str, Any] = {"source": source, "repeats": repeats, "strings": len(here)}
        for name in ("loss", "exposure"):
            values = np.array([getattr(one, name) for one in here])
            row[name] = float(values.mean())
            row[f"{name}_se"] = float(values.std(ddof=1)) / math.sqrt(len(here)) if len(here) > 1 else None
        row["at_most"] = sum(one.rank == 1 for one in here) / len(here)
        rows.append(row | {"others": here[0].others, "exact": all(one.exact for one in here)})
    return rows


def records(found: Sequence[Exposed]) -> list[dict[str, Any]]:
    """One record for each string."""
    return [dataclasses.asdict(one) for one in found]
