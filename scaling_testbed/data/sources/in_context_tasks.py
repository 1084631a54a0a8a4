"""Tasks that a model can memorise, or learn from the sequence itself (Kirsch et al. 2022, arXiv 2212.04458).

A task is a random table from symbols to labels. A sequence asks for the label of one symbol after another, and tells
each answer: Q(x_1) P(x_1, y_1) Q(x_2) P(x_2, y_2) ... There is a token Q(x) for each symbol, and a token P(x, y) for
each pair of symbol and label. Only the answers P are targets. The pair in one token lets a model of two layers look an
answer up, where one token for x and one for y asks for more.

Shapes in names: N sequences, P pairs of a sequence, K symbols.
"""

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from scaling_testbed.data.sources.source import SOURCES
from scaling_testbed.data.sources.synthetic import MAX_TOKENS, MAX_VOCABULARY, STREAMS, GeneratedSource, check_range
from scaling_testbed.errors import ConfigError
from scaling_testbed.keys import key

MAX_TASKS = 1 << 20
TABLE = 3  # the random stream of the tables
UNSEEN = 1 << 40  # the number of the first task that is in no train split
GROUPS = ("train_task_seen", "train_task_new", "unseen_task_seen", "unseen_task_new")


@SOURCES.register("in_context_tasks")
@dataclass(frozen=True, kw_only=True)
class InContextTasksConfig(GeneratedSource):
    """Random tables, asked one symbol after another. The first half of the validation split has tasks of the train
    split, and the second half a new task in each sequence."""

    name: str = "in_context_tasks"
    n_tasks: int = key(64, "The number of tasks in the train split.")
    n_symbols: int = key(16, "The number of symbols x.")
    n_labels: int = key(8, "The number of labels y.")
    pairs: int = key(24, "The answers in a sequence. batch.sequence_length must be twice as many.")
    n_sequences: int = key(100_000, "The sequences of the train split.")
    n_validation_sequences: int = key(2_000, "The sequences of the validation split.")

    masked: ClassVar[bool] = True
    group_names: ClassVar[tuple[str, ...]] = GROUPS

    def __post_init__(self):
        super().__post_init__()
        check_range("n_tasks", self.n_tasks, 1, MAX_TASKS)
        check_range("n_symbols", self.n_symbols, 1)
        check_range("n_labels", self.n_labels, 2)
        check_range("pairs", self.pairs, 2)
        check_range("n_sequences", self.n_sequences, 1, MAX_TOKENS // (2 * self.pairs))
        check_range("n_validation_sequences", self.n_validation_sequences, 2, MAX_TOKENS // (2 * self.pairs))
        if self.vocab_size > MAX_VOCABULARY:
            raise ConfigError(f"n_symbols * (1 + n_labels) must be at most {MAX_VOCABULARY}, got {self.vocab_size}")

    @property
    def vocab_size(self) -> int:
        """K symbols, and K times n_labels pairs of symbol and label."""
        return self.n_symbols * (1 + self.n_labels)

    def check_length(self, sequence_length: int) -> None:
        if sequence_length != 2 * self.pairs:
            raise ConfigError(
                f"batch.sequence_length={sequence_length} must be {2 * self.pairs}, which is a sequence of "
                f"data={self.name} with data.pairs={self.pairs}"
            )

    def table(self, task: int) -> np.ndarray:
        """The label of each symbol in a task, int64 [K]."""
        return np.random.default_rng([self.seed, TABLE, task]).integers(self.n_labels, size=self.n_symbols)

    def tokens(self, split: str) -> np.ndarray:
        """One sequence after the other, and once more the first, so that the last one is a whole window too."""
        number = self._number(split)
        x_NP = self.random(split).integers(self.n_symbols, size=(number, self.pairs))
        drawn_N = np.random.default_rng([self.seed, STREAMS[split], 1]).random(number)
        tasks_N = (drawn_N * self.n_tasks).astype(np.int64)  # the symbols are the same for any number of tasks
        n_known = number if split == "train" else self._n_known
        tables = np.stack([self.table(task) for task in range(self.n_tasks)])
        unseen = [self.table(UNSEEN + n) for n in range(number - n_known)]
        y_NP = np.concatenate([tables[tasks_N[:n_known, None], x_NP[:n_known]], *self._rows(unseen, x_NP[n_known:])])
        pairs_NP = self.n_symbols + x_NP * self.n_labels + y_NP
        sequences = np.stack([x_NP, pairs_NP], axis=2).reshape(number, -1)
        return np.concatenate([sequences, sequences[:1]]).reshape(-1)

    def _rows(self, tables: list[np.ndarray], x_NP: np.ndarray) -> list[np.ndarray]:
        return [np.stack(tables)[np.arange(len(tables))[:, None], x_NP]] if tables else []

    def mask(self, split: str) -> np.ndarray:
        return np.arange((self._number(split) + 1) * 2 * self.pairs) % 2 == 1

    def groups(self, numbers_N: np.ndarray, tokens_NS: np.ndarray) -> Mapping[str, np.ndarray]:
        """The answers in the second half of a sequence, by whether the task is one of the train split, and whether the
        symbol was there before. A new task can have the table of one of the train split, and is then no unseen one."""
        x_NP = tokens_NS[:, : 2 * self.pairs : 2]
        place_P = np.arange(self.pairs)
        seen_NP = ((x_NP[:, :, None] == x_NP[:, None, :]) & (place_P[:, None] > place_P)).any(2)
        late_P = place_P >= self.pairs // 2
        known_N1 = np.array([self._is_known(number) for number in numbers_N.tolist()])[:, None]
        found = {}
        for name, kind_N1 in (("train_task", known_N1), ("unseen_task", ~known_N1)):
            for which, there_NP in (("seen", seen_NP), ("new", ~seen_NP)):
                in_group = np.zeros((len(x_NP), 2 * self.pairs), dtype=bool)
                in_group[:, ::2] = kind_N1 & there_NP & late_P
                found[f"{name}_{which}"] = in_group
        return found

    def entropy_rate_nats(self) -> float:
        """The lowest mean loss of an answer on the validation split, of a model that has all tables of the train split,
        and is told in which half of the split a sequence is.

        In the second half a symbol is new with probability (1 - 1/K)^i after i others, and its label is then uniform.
        In the first half, the answers of a sequence tell ln n - ln(1 + C) nats together, where C of the other n - 1
        tables agree with it on its M different symbols: C is binomial with probability n_labels^-M. Both are means over
        random tables.
        """
        unseen = math.log(self.n_labels) * float(np.mean((1 - 1 / self.n_symbols) ** np.arange(self.pairs)))
        known = sum(p * self._told_nats(m) for m, p in enumerate(self._distinct()) if p > 0) / self.pairs
        return (known * self._n_known + unseen * (self._number("validation") - self._n_known)) / self._number(
            "validation"
        )

    def entropies_by_context_nats(self) -> list[float]:
        """The same for each window, because windows are whole sequences."""
        return [self.entropy_rate_nats()]

    def _distinct(self) -> np.ndarray:
        """The probabilities of 0, 1, ... K different symbols in a sequence."""
        p = np.zeros(self.n_symbols + 1)
        p[0] = 1
        m = np.arange(self.n_symbols + 1)
        for _ in range(self.pairs):
            p = p * m / self.n_symbols + np.append(0, (p * (1 - m / self.n_symbols))[:-1])
        return p

    def _told_nats(self, distinct: int) -> float:
        n, q = self.n_tasks, float(self.n_labels) ** -distinct
        k = np.arange(1, n)
        log_choices = np.append(0, np.cumsum(np.log((n - k) / k)))
        p = np.exp(log_choices + np.arange(n) * math.log(q) + (n - 1 - np.arange(n)) * math.log1p(-q))
        return math.log(n) - float((p * np.log1p(np.arange(n))).sum())

    def _is_known(self, number: int) -> bool:
        """Whether the task of a validation sequence has a table of the train split."""
        return number < self._n_known or self.table(UNSEEN + number - self._n_known).tobytes() in self._known_tables

    @functools.cached_property
    def _known_tables(self) -> frozenset[bytes]:
        return frozenset(self.table(task).tobytes() for task in range(self.n_tasks))

    def _number(self, split: str) -> int:
        return self.n_sequences if split == "train" else self.n_validation_sequences

    @property
    def _n_known(self) -> int:
        """The sequences of the validation split with tasks of the train split."""
        return self.n_validation_sequences // 2
