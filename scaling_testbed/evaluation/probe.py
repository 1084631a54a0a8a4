"""Probes: what linear classifiers find in the frozen hidden states of a checkpoint, by layer and number of labels.

A task gives a class to a position. next_class: that of the next token. past_class:K: that of the token K before, the
token itself for K = 0. FILE.jsonl: the label of a text, read from the state after its last token.

Shapes in names: B sequences, T positions, N examples, D features.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from scaling_testbed.config.run import RunConfig
from scaling_testbed.data.batches import ValidationBatches
from scaling_testbed.data.shards import PreparedData
from scaling_testbed.data.tokenizers import load_tokenizer
from scaling_testbed.diagnostics.states import States, layers_of
from scaling_testbed.errors import ConfigError, UserError, listed
from scaling_testbed.evaluation.classifiers import balanced_accuracy, logistic, naive_bayes
from scaling_testbed.evaluation.loading import load_model
from scaling_testbed.evaluation.scoring import place_of
from scaling_testbed.evaluation.token_losses import PASS_TOKENS
from scaling_testbed.model.transformer import Transformer
from scaling_testbed.processes.device import autocast

NEXT, PAST = "next_class", "past_class"
KINDS_OF_TOKENS = ("space", "lower", "upper", "digit", "other")
LEAST_TOLD = 5  # examples of a class that accuracy is measured on
DEFINITION = (
    "balanced accuracy of Gaussian naive Bayes and of logistic regression with so many labels of each class, on other\n"
    "texts: the mean over draws of the labels, and its standard error. chance is that of a guess"
)
ALL = "all"


@dataclass(frozen=True)
class Examples:
    """Hidden states by layer, their class and whether labels are drawn from them; the others measure accuracy."""

    states_ND: dict[str, np.ndarray]
    class_N: np.ndarray
    drawn_N: np.ndarray


def probe(
    run: RunConfig,
    folder: Path,
    tasks: Sequence[str],
    *,
    labels: Sequence[int],
    layers: Sequence[str] = (ALL,),
    draws: int = 4,
    tokens: int = 32768,
    step: int | None = None,
    average: bool = False,
) -> tuple[int, list[dict[str, Any]]]:
    """The step of a checkpoint of `run` in its `folder`, the newest unless `step` is given, and one row for each task,
    layer and number of labels.

    tasks: see the module. labels: of each class. layers: of `layers_of`, or all. draws: how often labels are drawn.
    tokens: of the validation split at most, spread evenly: labels come from its even windows, and accuracy is that of
    the odd ones. Texts of a file are divided in the same way after a shuffle. A class that is too rare is left out, and
    a number of labels that a class does not have gives a row without accuracies and with the reason.

    Raises ConfigError for an unknown task or layer, and UserError if the checkpoint does not exist, its data have
    changed or have no tokenizer, a file cannot be read, or fewer than two classes are left.
    """
    for task in tasks:
        _check_task(task)
    if min(labels) < 2:
        raise ConfigError(f"--labels must be whole numbers above one; got {min(labels)}")
    there = layers_of(run.model.n_layers)
    if unknown := [layer for layer in layers if layer not in (ALL, *there)]:
        raise ConfigError(f"--layer must be {ALL} or of {', '.join(there)}; got {unknown[0]!r}")
    chosen = there if ALL in layers else [layer for layer in there if layer in layers]
    device, precision = place_of(run)
    step, model, data = load_model(run, folder, step=step, device=device, average=average)
    read = Reader(run, model, data, chosen, device, precision)
    rows = []
    for task in tasks:
        examples, names = read.examples(task, tokens)
        for layer in chosen:
            for number in labels:
                about = {"run": str(folder), "d_model": model.config.d_model, "task": task, "layer": layer}
                found = _accuracies(examples, layer, names, number, draws)
                rows.append(about | {"labels": number, "classes": len(names)} | found)
    return step, rows


def _check_task(task: str) -> None:
    kind, _, back = task.partition(":")
    if task == NEXT or (kind == PAST and back.isdigit()) or Path(task).suffix == ".jsonl":
        return
    raise ConfigError(f"--task must be {NEXT}, {PAST}:K with K from 0 on, or a FILE.jsonl; got {task!r}")


def _accuracies(examples: Examples, layer: str, names: Sequence[str], number: int, draws: int) -> dict[str, Any]:
    """The fields of a row about one layer and number of labels."""
    pools = [np.flatnonzero(examples.drawn_N & (examples.class_N == c)) for c in range(len(names))]
    if short := [f"{name} has {len(pool)}" for name, pool in zip(names, pools, strict=True) if len(pool) < number]:
        return {"chance": 1 / len(names), "note": f"too few labels: {listed(short)}"}
    states_ND, told = examples.states_ND[layer], np.flatnonzero(~examples.drawn_N)
    found: dict[str, list[float]] = {"naive_bayes": [], "logistic": []}
    for draw in range(draws):
        rng = np.random.default_rng((draw, number))
        mine = np.concatenate([rng.choice(pool, number, replace=False) for pool in pools])
        x_ND, class_N = states_ND[mine], examples.class_N[mine]
        made = {
            "naive_bayes": naive_bayes(x_ND, class_N, len(names)),
            "logistic": logistic(x_ND, class_N, len(names), rng),
        }
        for name, scores in made.items():
            found[name].append(balanced_accuracy(scores(states_ND[told]), examples.class_N[told]))
    row: dict[str, Any] = {"chance": 1 / len(names)}
    for name, values in found.items():
        row[name] = float(np.mean(values))
        row[f"{name}_se"] = float(np.std(values, ddof=1)) / math.sqrt(draws) if draws > 1 else None
    return row


class Reader:
    """Reads examples of tasks with one model."""

    def __init__(
        self,
        run: RunConfig,
        model: Transformer,
        data: PreparedData,
        layers: list[str],
        device: torch.device,
        precision: str,
    ):
        self.model, self.data, self.layers = model, data, layers
        self.length, self.device, self.precision = run.batch.sequence_length, device, precision
        self.masked = run.batch.document_masking
        self.tokenizer = load_tokenizer(data.folder)

    def examples(self, task: str, tokens: int) -> tuple[Examples, list[str]]:
        """The examples of a task, and the names of its classes."""
        if Path(task).suffix == ".jsonl":
            states_ND, labels, drawn_N = self._of_file(Path(task))
        else:
            states_ND, labels, drawn_N = self._of_tokens(task, tokens)
        names = [
            name for name in sorted(set(labels.tolist()))
            if (labels[drawn_N] == name).sum() >= 2 and (labels[~drawn_N] == name).sum() >= LEAST_TOLD
        ]  # fmt: skip
        if len(names) < 2:
            raise UserError(f"--task {task}: fewer than two classes have enough examples; give more texts or --tokens")
        kept_N = np.isin(labels, names)
        class_N = np.searchsorted(names, labels[kept_N])
        states_ND = {layer: states[kept_N] for layer, states in states_ND.items()}
        return Examples(states_ND, class_N, drawn_N[kept_N]), names

    def _of_tokens(self, task: str, tokens: int) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
        if self.masked:
            raise ConfigError(
                f"--task {task}: the run has batch.document_masking=true, and this task reads windows across "
                "documents; give a FILE.jsonl of texts"
            )
        shift = 1 if task == NEXT else -int(task.partition(":")[2])
        if -shift >= self.length:
            raise ConfigError(f"--task {task}: a window of training has {self.length} tokens, so K must be smaller")
        windows = ValidationBatches(self.data.validation, sequence_length=self.length, max_tokens=tokens, rows=1)
        if windows.n_sequences < 2:
            raise UserError(f"--tokens {tokens}: a probe needs two windows of {self.length} validation tokens or more")
        rows_BS, class_of = np.concatenate([window.tokens_BS for window in windows]), self._classes()
        first, last = max(0, -shift), self.length
        states = self._states(list(rows_BS[:, :-1]), lambda states_BTD: states_BTD[:, first:last].flatten(0, 1))
        labels_BT = class_of[rows_BS[:, first + shift : last + shift]]
        even_BT = np.broadcast_to(np.arange(len(rows_BS))[:, None] % 2 == 0, labels_BT.shape)
        real = labels_BT.ravel() != ""  # the end of a document is of no class
        return {k: v[real] for k, v in states.items()}, labels_BT.ravel()[real], even_BT.ravel()[real]

    def _classes(self) -> np.ndarray:
        """The class of each token id, by the first character of its text."""
        texts = [self.tokenizer.decode([number]) for number in range(self.data.vocab_size)]
        found = np.array([_kind(text) for text in texts], dtype=object)
        found[self.tokenizer.eos_id] = ""
        return found.astype(str)

    def _of_file(self, path: Path) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
        texts, labels = zip(*_read(path), strict=True)
        ids = self.tokenizer.encode_batch([text.encode() for text in texts])
        rows = [np.array([self.tokenizer.eos_id, *one], np.int64)[-self.length :] for one in ids]
        order = np.random.default_rng(0).permutation(len(rows))
        states = self._states([rows[place] for place in order], lambda states_BTD: states_BTD[:, -1])
        return states, np.array(labels)[order].astype(str), np.arange(len(rows)) % 2 == 0

    @torch.no_grad()
    def _states(
        self, rows: Sequence[np.ndarray], taken: Callable[[torch.Tensor], torch.Tensor]
    ) -> dict[str, np.ndarray]:
        """The states of each layer that `taken` takes of the rows, in their order. A pass has rows of one length."""
        found: dict[str, list[np.ndarray]] = {layer: [] for layer in self.layers}
        first = 0
        with States(self.model, self.layers) as states:
            while first < len(rows):
                last, most = first, max(1, PASS_TOKENS // len(rows[first]))
                while last < len(rows) and last - first < most and len(rows[last]) == len(rows[first]):
                    last += 1
                batch_BT = torch.from_numpy(np.stack(rows[first:last]).astype(np.int64)).to(self.device)
                with autocast(self.device, self.precision):
                    self.model(batch_BT)
                for layer in self.layers:
                    found[layer].append(taken(states.found[layer]).float().cpu().numpy())
                first = last
        return {layer: np.concatenate(parts) for layer, parts in found.items()}


def _kind(text: str) -> str:
    first = text[:1]
    tests = (str.isspace, str.islower, str.isupper, str.isdigit)
    return next((kind for kind, test in zip(KINDS_OF_TOKENS, tests, strict=False) if test(first)), "other")


def _read(path: Path) -> list[tuple[str, str]]:
    """Text and label of each line. Raises UserError, which names file and line."""
    try:
        lines = path.read_bytes().decode().split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or 'it is not UTF-8'}") from None
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            given = json.loads(line)
            text, label = given["text"], given["label"]
            if not (isinstance(text, str) and text and isinstance(label, (str, int))):
                raise ValueError
        except (ValueError, LookupError, TypeError, RecursionError):
            raise UserError(f'{path}:{number}: must be {{"text": "...", "label": "..."}}') from None
        found.append((text, str(label)))
    if not found:
        raise UserError(f"{path} holds no text")
    return found
