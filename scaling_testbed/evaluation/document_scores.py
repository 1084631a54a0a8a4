"""Scores of the documents of a prepared corpus by finished runs: one row for each document.

A document is read after an EOS, as in training, in pieces of as many tokens as a sequence of the run has; a later piece
begins with the last token of the one before. Its EOS is predicted too. Where the corpus has a mask, only the tokens
that are targets are scored.

Shapes in names: B pieces, T positions, N tokens, V vocabulary.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from scaling_testbed.config.run import RunConfig
from scaling_testbed.data.documents import Document, documents, eos_of
from scaling_testbed.data.shards import PreparedData
from scaling_testbed.errors import ConfigError, UserError
from scaling_testbed.evaluation.loading import load_model
from scaling_testbed.evaluation.scoring import passes, place_of
from scaling_testbed.evaluation.token_losses import logits_in_parts
from scaling_testbed.learning.loss import IGNORE
from scaling_testbed.learning.loss_model import LossModel
from scaling_testbed.model.parts import NORMALISERS
from scaling_testbed.model.transformer import Transformer
from scaling_testbed.processes.device import autocast
from scaling_testbed.progress import Progress

AT_ONCE = 512  # documents that are cut into pieces together
DEFINITION = (
    "loss: cross-entropy of a document's targets, its EOS included, in nats per token. el2n: the mean over its\n"
    "targets of the norm of p - y, the probabilities less the token that came (Paul et al. 2021). gradient_norm: of\n"
    "its loss"
)


@dataclass(frozen=True)
class Scorer:
    """A checkpoint that scores documents. name: of its columns."""

    name: str
    step: int
    model: Transformer
    losses: LossModel
    length: int
    device: torch.device
    precision: str


def named_runs(typed: Sequence[str]) -> dict[str, Path]:
    """The folders of RUN_DIR or NAME=RUN_DIR by name, which is that of the folder unless it is typed.

    Raises ConfigError for a name that cannot be a part of a column's name, and for one that is there twice.
    """
    found: dict[str, Path] = {}
    for word in typed:
        name, equals, folder = word.partition("=")
        if not equals or Path(word).exists():
            name, folder = Path(word).resolve().name, word
        if not re.fullmatch(r"\w+", name, re.ASCII):
            raise ConfigError(f"{word}: write NAME=RUN_DIR, with a NAME of letters, digits and _")
        if name in found:
            raise ConfigError(f"{word}: another run is named {name}; write NAME=RUN_DIR")
        found[name] = Path(folder)
    return found


def open_scorer(name: str, run: RunConfig, folder: Path, corpus: PreparedData, *, average: bool = False) -> Scorer:
    """The newest checkpoint of `run` in its `folder`. Raises UserError if there is none, or if `corpus` has another
    tokenizer than the data of the run."""
    device, precision = place_of(run)
    step, model, data = load_model(run, folder, step=None, device=device, average=average)
    if (data.tokenizer_fingerprint, data.vocab_size) != (corpus.tokenizer_fingerprint, corpus.vocab_size):
        raise UserError(f"{folder} was trained with another tokenizer than that of {corpus.folder}")
    losses = LossModel(model, dataclasses.replace(run.loss, impl="auto", z_loss=0.0))
    return Scorer(name, step, model, losses, run.batch.sequence_length, device, precision)


def score_documents(
    scorers: Sequence[Scorer], corpus: PreparedData, split: str, *, gradient: bool = False, limit: int | None = None
) -> list[dict[str, Any]]:
    """One row for each document of a split of `corpus`, the first `limit` of them: document (its place, from 0 on),
    source, n_tokens, where the corpus has a mask n_targets, and for each scorer loss_NAME, el2n_NAME and, if asked for,
    gradient_norm_NAME. The scores of a document without a target are null.

    Shows the progress on standard error. Raises UserError if the corpus has no EOS, or a score is not finite.
    """
    eos_id, rows = eos_of(corpus), list[dict[str, Any]]()
    total = corpus.manifest["splits"][split]["n_documents"] or 0
    progress = Progress(prefix="score_documents: ", errors=True)
    progress.start(min(total, limit or total))
    for batch in _batched(itertools.islice(documents(corpus, split), limit), AT_ONCE):
        found = [
            {"document": len(rows) + place, "source": one.source, "n_tokens": len(one.tokens)}
            | ({} if one.counted is None else {"n_targets": int(one.counted.sum())})
            for place, one in enumerate(batch)
        ]
        texts = [_text(one, eos_id) for one in batch]
        for scorer in scorers:
            columns = dict(zip(("loss", "el2n"), _means(scorer, texts), strict=True))
            if gradient:
                columns["gradient_norm"] = [_gradient_norm(scorer, text) for text in texts]
            for name, values in columns.items():
                for row, value in zip(found, values, strict=True):
                    if value is not None and not math.isfinite(value):
                        raise UserError(f"{scorer.name}: {name} of document {row['document']} is not finite")
                    row[f"{name}_{scorer.name}"] = value
        rows += found
        progress.move(len(rows), f"{len(rows):,} documents")
    progress.close()
    return rows


def _batched(items: Iterator, size: int) -> Iterator[list]:
    while batch := list(itertools.islice(items, size)):
        yield batch


@dataclass(frozen=True)
class _Text:
    """A document after an EOS: its inputs, and its tokens as targets, IGNORE where they are none."""

    inputs: np.ndarray
    targets: np.ndarray

    @property
    def n_targets(self) -> int:
        return int((self.targets != IGNORE).sum())

    def pieces(self, length: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """Inputs and targets [<= length] of each piece. Each token of the document is predicted once."""
        there = [slice(first, first + length) for first in range(0, len(self.inputs), length)]
        return [(self.inputs[piece], self.targets[piece]) for piece in there]


def _text(one: Document, eos_id: int) -> _Text:
    targets = one.tokens if one.counted is None else np.where(one.counted, one.tokens, IGNORE)
    return _Text(np.concatenate([[eos_id], one.tokens[:-1]]), targets)


@torch.no_grad()
def _means(scorer: Scorer, texts: Sequence[_Text]) -> tuple[list[float | None], list[float | None]]:
    """The mean cross-entropy and EL2N of the targets of each text; None where it has none."""
    pieces = [(place, *piece) for place, text in enumerate(texts) for piece in text.pieces(scorer.length)]
    sums = torch.zeros(len(texts), 2, dtype=torch.float64)
    normaliser = NORMALISERS[scorer.model.config.attention_normaliser]
    for batch in passes([len(inputs) + 1 for _, inputs, _ in pieces], same_length=normaliser.depends_on_length):
        of_text_B = torch.tensor([pieces[number][0] for number in batch])
        inputs_BT = _padded([pieces[number][1] for number in batch]).clamp_min(0).to(scorer.device)
        targets_BT = _padded([pieces[number][2] for number in batch])
        real_BT, targets_BT = targets_BT != IGNORE, targets_BT.to(scorer.device)
        if not real_BT.any():
            continue
        with autocast(scorer.device, scorer.precision):
            hidden_ND = scorer.model(inputs_BT)[real_BT.to(scorer.device)]
            targets_N = targets_BT[targets_BT != IGNORE]
            parts = [_of_part(*part) for part in logits_in_parts(scorer.model, hidden_ND, targets_N)]
        values_N2 = torch.cat(parts).double().cpu()
        sums.index_add_(0, of_text_B[:, None].expand_as(real_BT)[real_BT], values_N2)
    counts = [text.n_targets for text in texts]
    loss, el2n = (
        [total / count if count else None for total, count in zip(of_all, counts, strict=True)]
        for of_all in sums.T.tolist()
    )
    return loss, el2n


def _of_part(logits_NV: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
    """Cross-entropy and EL2N [N, 2]: ||p - y||^2 = sum p^2 - 2 p_y + 1."""
    log_p_NV = logits_NV.log_softmax(-1)
    p_NV = log_p_NV.exp()
    p_N = p_NV.gather(1, targets_N[:, None])[:, 0]
    square_N = (p_NV.square().sum(-1) - p_N.square()) + (1 - p_N).square()
    return torch.stack([F.nll_loss(log_p_NV, targets_N, reduction="none"), square_N.sqrt()], dim=1)


def _gradient_norm(scorer: Scorer, text: _Text) -> float | None:
    """The norm of the gradient of the mean cross-entropy of a text, over all parameters (GraNd, Paul et al. 2021); None
    for a text without a target."""
    if not text.n_targets:
        return None
    scorer.model.zero_grad()
    for inputs, targets in text.pieces(scorer.length):
        tokens = np.append(inputs, inputs[-1])[None]  # the last column is not used where there are targets
        with autocast(scorer.device, scorer.precision):
            terms = scorer.losses(*(torch.from_numpy(one).to(scorer.device) for one in (tokens, targets[None])))
        (terms.loss / text.n_targets).backward()
    squares = [one.grad.double().square().sum().item() for one in scorer.model.parameters() if one.grad is not None]
    scorer.model.zero_grad()
    return math.sqrt(sum(squares))


def _padded(rows: Sequence[np.ndarray]) -> torch.Tensor:
    """Rows of different lengths as one tensor, with IGNORE after their ends."""
    found = torch.full((len(rows), max(map(len, rows))), IGNORE, dtype=torch.int64)
    for place, row in enumerate(rows):
        found[place, : len(row)] = torch.from_numpy(row)
    return found


def summaries(rows: Sequence[dict[str, Any]], scorers: Sequence[Scorer]) -> list[dict[str, Any]]:
    """One row for each scorer: the mean of each score over documents, and the loss per token of all of them. Documents
    without a target are left out; tokens: the targets of the others."""
    rows = [row for row in rows if row.get("n_targets") != 0]
    n_targets = np.array([row.get("n_targets", row["n_tokens"]) for row in rows])
    found = []
    for scorer in scorers:
        row = {"run": scorer.name, "step": scorer.step, "documents": len(rows), "tokens": int(n_targets.sum())}
        for name in ("loss", "el2n", "gradient_norm"):
            if rows and f"{name}_{scorer.name}" in rows[0]:
                row[name] = float(np.mean([one[f"{name}_{scorer.name}"] for one in rows]))
        losses = np.array([one[f"loss_{scorer.name}"] for one in rows])
        found.append(row | {"loss_per_token": float((losses * n_targets).sum() / n_targets.sum()) if rows else None})
    return found


def check_table(path: Path, rows: Sequence[dict[str, Any]], corpus: PreparedData) -> None:
    """Raise UserError, which names the file, unless `rows` are of the training documents of `corpus`, each once and in
    their order."""
    lengths = [len(one.tokens) for one in documents(corpus)]
    if len(rows) != len(lengths):
        raise UserError(f"{path} has {len(rows):,} documents, and the train split of {corpus.folder} {len(lengths):,}")
    for place, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        if (row.get("document"), row.get("n_tokens")) != (place, length):
            raise UserError(
                f"{path}: row {place + 1} is not document {place} of {corpus.folder}, of {length} tokens; score its "
                "train split anew"
            )
