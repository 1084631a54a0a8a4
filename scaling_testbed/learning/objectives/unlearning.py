"""What the objectives of unlearning share: rows of some sources of a mixture are forgotten, the others are retained.

A batch has rows of all sources, and one backward pass of a sum serves them: F + retain_weight R. F is a mean over the
documents, or tokens, to forget, R the mean cross-entropy over the tokens of all other sources. A mean is a sum over the
rows of a batch divided by the number that a batch has on average, so that micro-batches and processes change nothing.
The z-loss is that of all targets.

A document is what a sequence holds of one: with batch.packing=documents a whole one, or a piece of a long one.

Shapes in names: N and B sequences, T positions.
"""

from __future__ import annotations

import abc
import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np

from scaling_testbed.errors import ConfigError, check_not_negative, listed
from scaling_testbed.keys import key
from scaling_testbed.learning.objectives.base import Asked, Built, Given, Objective, Stream, Surroundings

if TYPE_CHECKING:
    from torch import Tensor

    from scaling_testbed.learning.loss import LossTerms
    from scaling_testbed.model.config import ModelConfig

RETAIN = 0  # the role of the rows of a source that has no other one
AT_ONCE = 1 << 14  # tokens that are read at once


class Rows(NamedTuple):
    """Rows of a micro-batch, of all roles. ce_BT: the cross-entropy of each target, 0 where there is none. valid_BT:
    whether a position has a target. begins_BT: int64, the position at which the document of a position begins. beside:
    the further arrays of the objective."""

    ce_BT: Tensor
    valid_BT: Tensor
    begins_BT: Tensor
    beside: Mapping[str, Tensor]

    def sums(self, values_BT: Tensor) -> Tensor:
        """For each position the sum of the values over its document [B, T]."""
        sums_BT = values_BT.new_zeros(values_BT.shape).scatter_add(1, self.begins_BT, values_BT)
        return sums_BT.gather(1, self.begins_BT)

    def once(self, values_BT: Tensor) -> Tensor:
        """Values of documents at one position of each document with a target, and 0 elsewhere."""
        import torch

        position_T = torch.arange(values_BT.shape[1], device=values_BT.device)
        first_BT = (position_T == self.begins_BT) & (self.sums(self.valid_BT.to(values_BT.dtype)) > 0)
        return values_BT.where(first_BT, 0)


class Part(NamedTuple):
    """What rows of a role add to the objective. weights_BT: the derivative with respect to the cross-entropy of each
    target. values_BT: numbers whose sum is the value."""

    weights_BT: Tensor
    values_BT: Tensor


@dataclass(frozen=True, kw_only=True)
class Unlearning(Objective):
    """The base of the objectives of unlearning. A subclass defines `part` and, if it has more roles, `roles`.

    by_document: whether its mean is over documents; else it is over tokens.
    """

    forget: str = key("forget", "The source in data.sources that is to be forgotten.")
    retain_weight: float = key(
        1.0,
        "The weight of the mean cross-entropy over the tokens of all other sources. 0: they are not trained on. Where "
        "data.weights gives them no rows, nothing is retained.",
    )

    by_document: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_not_negative("retain_weight", self.retain_weight)

    @property
    def roles(self) -> dict[str, str]:
        """Key of the objective -> the source that it names, in the order of their codes 1, 2, ..."""
        return {"forget": self.forget}

    @abc.abstractmethod
    def part(self, role: str, rows: Rows) -> Part:
        """What rows of a role add, where each of them counts once."""

    def arrays(self, surroundings: Surroundings) -> tuple[dict[str, np.ndarray], dict[str, object]]:
        """Further arrays [N, T] of the sequences to forget, by name, and fields for the row."""
        return {}, {}

    def flops_per_token(self, model: ModelConfig, sequence_length: int) -> float:
        return 2 * model.d_model * model.known_vocab_size  # the weights need the cross-entropies first

    def check(self, asked: Asked) -> None:
        for name, source in self.roles.items():
            if source not in asked.sources:
                there = (
                    f"data.sources has {listed(list(asked.sources))}" if asked.sources else "the data are no mixture"
                )
                raise ConfigError(f"objective.{name}={source} must be a source of data=mixture; {there}")
        if len(set(self.roles.values())) < len(self.roles):
            raise ConfigError(f"objective.{' and objective.'.join(self.roles)} must be different sources")
        if asked.weights_change:
            raise ConfigError(
                f"objective={self.name} takes means over the rows of a step, whose number must stay; leave out "
                "data.weight_changes and data.online"
            )

    def build(self, surroundings: Surroundings) -> Built:
        streams, sources = surroundings.streams, list(self.roles.values())
        for name, source in self.roles.items():
            if not streams[source].rows:
                raise ConfigError(f"objective.{name}={source} has no rows; give data.weights.{source} a number above 0")
        retained = [one for name, one in streams.items() if name not in sources and one.rows]
        targets = sum(one.rows * one.targets for one in streams.values())  # of a batch
        begins, scales = {}, {}
        for name, source in self.roles.items():
            begins[source], n_documents = documents_of(streams[source])
            counted = n_documents if self.by_document else streams[source].targets
            scales[name] = targets / (streams[source].rows * counted)
        of_retained = sum(one.rows * one.targets for one in retained)
        scale = self.retain_weight * targets / of_retained if retained else 0.0
        more, row = self.arrays(surroundings)
        beside = Beside({source: code for code, source in enumerate(sources, 1)}, begins, self.forget, more)
        terms = functools.partial(self._terms, scale=scale, scales=scales)
        return Built(terms=terms, divisor=targets, beside=beside, row=row)

    def _terms(self, given: Given, scale: float, scales: Mapping[str, float]) -> LossTerms:
        """The terms of a micro-batch. scale: of each retained token. scales: of each document or token with a role."""
        ce_BT, valid_BT = given.ce_BT(), given.valid_BT
        rows = Rows(ce_BT, valid_BT, given.beside["begins"].long(), given.beside)
        role_B1 = given.beside["role"][:, None]
        weights_BT = valid_BT.to(ce_BT.dtype) * scale
        values_BT = ce_BT * scale
        for code, name in enumerate(self.roles, 1):
            part = self.part(name, rows)
            weights_BT = (scales[name] * part.weights_BT).where(role_B1 == code, weights_BT)
            values_BT = (scales[name] * part.values_BT).where(role_B1 == code, values_BT)
        return given.cross_entropy(weights_BT)._replace(objective=values_BT.sum())


class Beside:
    """What lies beside the tokens: role [N], begins [N, T] of the documents, and the further arrays of the objective,
    which are 0 for the rows of other sources. codes: of the sources with a role."""

    def __init__(
        self,
        codes: Mapping[str, int],
        begins: Mapping[str, np.ndarray],
        forget: str,
        more: Mapping[str, np.ndarray],
    ):
        self._codes = codes
        self._arrays = {"begins": dict(begins)} | {name: {forget: array} for name, array in more.items()}

    def of(self, source: str, numbers: np.ndarray) -> dict[str, np.ndarray]:
        found = {"role": np.full(len(numbers), self._codes.get(source, RETAIN), dtype=np.int64)}
        for name, of_sources in self._arrays.items():
            some = next(iter(of_sources.values()))
            empty = np.zeros((len(numbers), some.shape[1]), dtype=some.dtype)
            found[name] = of_sources[source][numbers] if source in of_sources else empty
        return found


def documents_of(stream: Stream) -> tuple[np.ndarray, float]:
    """For each position of each sequence of a source the position at which its document begins, int32 [N, T], and how
    many documents with a target a sequence has on average."""
    begins, n_documents = [], 0
    for batch in batches_of(stream):
        batch = batch.explicit()
        targets_BT, begins_BT = batch.targets_BT, batch.begins_BT
        if begins_BT is None:
            begins_BT = np.zeros(targets_BT.shape, dtype=np.int32)
        row_K, position_K = np.nonzero(targets_BT >= 0)
        counted_BT = np.zeros(targets_BT.shape, dtype=bool)
        counted_BT[row_K, begins_BT[row_K, position_K]] = True
        begins.append(begins_BT.astype(np.int32))
        n_documents += int(counted_BT.sum())
    begins_NT = np.concatenate(begins)
    return begins_NT, n_documents / len(begins_NT)


def batches_of(stream: Stream) -> Iterator[Any]:
    """All sequences of a source, as batches of NumPy arrays in their order."""
    cut = stream.documents()
    rows = max(1, AT_ONCE // cut.length)
    for first in range(0, cut.number, rows):
        yield cut.batch(np.arange(first, min(first + rows, cut.number)))
