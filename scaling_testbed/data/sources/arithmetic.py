"""Sums or products with a share of wrong answers, and unseen ones with right answers to judge by."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from scaling_testbed.data.sources.source import SOURCES
from scaling_testbed.data.sources.synthetic import GeneratedSource, check_range
from scaling_testbed.errors import ConfigError
from scaling_testbed.keys import check_choices, key

SIGN, EQUALS = 10, 11  # the tokens after the ten digits


@SOURCES.register("arithmetic")
@dataclass(frozen=True, kw_only=True)
class ArithmeticConfig(GeneratedSource):
    """Problems a + b = c or a * b = c, a token for each character. Numbers have all their digits, with leading zeros.
    Only the digits of c are targets. No problem is in both splits; the validation split has right answers."""

    name: str = "arithmetic"
    digits: int = key(2, "The digits of a and b.")
    operation: str = key("add", "add or multiply.", choices=("add", "multiply"))
    n_problems: int = key(1_500, "The problems of the train split, all different.")
    n_validation_problems: int = key(2_000, "The problems of the validation split, all different.")
    answer_noise: float = key(
        0.0, "The share of the training problems with a wrong answer, which is any other with equal chance."
    )

    masked: ClassVar[bool] = True

    def __post_init__(self):
        super().__post_init__()
        check_choices(self)
        check_range("digits", self.digits, 1, 3)
        check_range("n_problems", self.n_problems, 1)
        check_range("n_validation_problems", self.n_validation_problems, 1)
        check_range("answer_noise", self.answer_noise, 0, 1)
        if (asked := self.n_problems + self.n_validation_problems) > (there := 100**self.digits):
            raise ConfigError(
                f"n_problems and n_validation_problems must be at most {there:,} together with digits={self.digits}, "
                f"got {asked:,}"
            )

    @property
    def vocab_size(self) -> int:
        """The digits, the sign of the operation, and the equals sign."""
        return 12

    @property
    def answer_digits(self) -> int:
        """The digits of c."""
        return self.digits + 1 if self.operation == "add" else 2 * self.digits

    @property
    def problem_tokens(self) -> int:
        """The tokens of a problem."""
        return 2 * self.digits + 2 + self.answer_digits

    def check_length(self, sequence_length: int) -> None:
        if sequence_length % self.problem_tokens:
            raise ConfigError(
                f"batch.sequence_length={sequence_length} must be {self.problem_tokens} or a multiple of it, so that a "
                f"sequence of data={self.name} has whole problems"
            )

    def problems(self, split: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """a, b and c of each problem of a split, int64 [number]. c is wrong for the share `answer_noise` of the train
        split."""
        order = self.random("table").permutation(100**self.digits)
        n_train = self.n_problems
        chosen = order[:n_train] if split == "train" else order[n_train : n_train + self.n_validation_problems]
        a, b = np.divmod(chosen, 10**self.digits)
        right = self._answer(a, b)
        if split != "train":
            return a, b, right
        random, n_answers = self.random("train"), int(self._answer(10**self.digits - 1, 10**self.digits - 1)) + 1
        is_wrong = random.permutation(n_train) < round(self.answer_noise * n_train)
        other = (right + random.integers(1, n_answers, size=n_train)) % n_answers
        return a, b, np.where(is_wrong, other, right)

    def _answer(self, a, b):
        return a + b if self.operation == "add" else a * b

    def tokens(self, split: str) -> np.ndarray:
        """One problem after the other, and once more the first, so that the last one is in a whole window too."""
        a, b, c = self.problems(split)
        columns = [_digits(a, self.digits), np.full((len(a), 1), SIGN), _digits(b, self.digits)]
        problems = np.concatenate([*columns, np.full((len(a), 1), EQUALS), _digits(c, self.answer_digits)], axis=1)
        return np.concatenate([problems, problems[:1]]).reshape(-1)

    def mask(self, split: str) -> np.ndarray:
        number = self.n_problems if split == "train" else self.n_validation_problems
        of_one = np.arange(self.problem_tokens) >= self.problem_tokens - self.answer_digits
        return np.tile(of_one, number + 1)

    def entropy_rate_nats(self) -> float:
        """0: a right answer follows from its problem."""
        return 0.0

    def entropies_by_context_nats(self) -> list[float]:
        return [0.0]


def _digits(numbers: np.ndarray, width: int) -> np.ndarray:
    """The decimal digits of each number, int64 [len(numbers), width]."""
    return numbers[:, None] // 10 ** np.arange(width)[::-1] % 10
