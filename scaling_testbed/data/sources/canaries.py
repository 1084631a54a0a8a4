"""Random strings that a corpus can only know by heart: to measure memorisation, and to have something to forget.

A canary is a prompt of real text and a secret of random letters (Carlini et al. 2019, "The Secret Sharer", arXiv
1802.08232, section 4.1). Nothing but the training text says how a prompt goes on.
"""

import functools
import itertools
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from scaling_testbed.data.manifest import SPLITS
from scaling_testbed.data.sources.marked import Marked
from scaling_testbed.data.sources.python_packages import PythonPackagesConfig
from scaling_testbed.data.sources.reading import Tally, Unit, plan_file
from scaling_testbed.data.sources.source import SOURCES, Canary
from scaling_testbed.errors import ConfigError, UserError, check_positive
from scaling_testbed.keys import key

LETTERS = "abcdefghijklmnopqrstuvwxyz"
PROMPTS, SECRETS, OTHERS = range(3)  # independent random streams
WHOLE = 1 << 62  # bytes of a unit: a file is not divided
TRIES = 1000  # places in the text that are looked at for one prompt


@SOURCES.register("canaries")
@dataclass(frozen=True, kw_only=True)
class CanariesConfig(PythonPackagesConfig):
    """Random strings after prompts from pinned packages, as documents, each planted a known number of times.

    Only the secret and the EOS after it are targets of the loss. The train split has string number n
    `repeats[n % len(repeats)]` times. The validation split has each once, also those that are never in training: its
    loss is that of the secrets, known by heart or not.
    """

    name: str = "canaries"
    validation_fraction: float = 0.0  # the splits do not come from a hash
    number: int = key(40, "The number of different strings.")
    repeats: list[int] = key(
        [1],
        "How often the train split has each string: string number n has entry n modulo their number, so that [0,1,4,16]"
        " gives four groups of equal size. 0: it is in the validation split only.",
    )
    packages: Any = key(
        ["sympy==1.14.0"],
        "Where the prompts are from: pinned wheels, the same text on every machine. null: all installed packages.",
    )
    prompt_bytes: int = key(16, "The length of the prompts, which are pieces of the packages' .py files in ASCII.")
    secret_letters: int = key(47, "The length of the secrets, random letters from a to z.")
    refusal: str | None = key(
        None,
        "A text that stands in place of each secret, again and again up to its length: what a model should say to a "
        "prompt instead. null: the secrets.",
    )
    seed: int = key(0, "The seed of the strings. It is not the seed of the run.")

    masked: ClassVar[bool] = True
    validation_is_training: ClassVar[bool] = True
    too_small: ClassVar[str] = "plant strings: data.repeats needs a number above zero"

    def __post_init__(self):
        super().__post_init__()
        for name in ("number", "prompt_bytes", "secret_letters"):
            check_positive(name, getattr(self, name))
        if not self.repeats or any(not isinstance(n, int) or isinstance(n, bool) or n < 0 for n in self.repeats):
            raise ConfigError(f"repeats must be whole numbers that are not negative, got {self.repeats}")
        if not any(self.repeats[: self.number]):
            raise ConfigError(f"repeats must have a number above zero for one of the strings, got {self.repeats}")
        if self.refusal is not None and not (self.refusal.strip() and self.refusal.isascii()):
            raise ConfigError(f"refusal must be a text in ASCII, got {self.refusal!r}")
        if self.seed < 0:
            raise ConfigError(f"seed must not be negative, got {self.seed}")
        if self.validation_fraction or self.limited:
            raise ConfigError(
                "validation_fraction, max_documents and max_tokens cannot be: data.number and data.repeats say which "
                "documents there are"
            )

    def units(self, chunk_bytes: int) -> list[Unit]:
        weight = self.number * (self.prompt_bytes + self.secret_letters)
        return [Unit("", "canaries", 0, self.number, weight, split) for split in SPLITS]

    def documents(self, unit: Unit, tally: Tally) -> Iterator[bytes]:
        texts = [
            Marked.joined([(prompt.encode(), False), ((self._instead or secret).encode(), True)])
            for prompt, secret in self._strings
        ]
        if unit.split != "train":
            yield from texts
            return
        counts = [self.repeats[number % len(self.repeats)] for number in range(self.number)]
        for time in range(max(counts)):
            yield from (text for text, count in zip(texts, counts, strict=True) if count > time)

    def found(self, units: list[Unit]) -> tuple[dict, Tally]:
        return {}, Tally()

    def canaries(self, others: int) -> list[Canary]:
        if self.refusal is not None:
            return []
        n_secrets = len(LETTERS) ** self.secret_letters
        found = []
        for number, (prompt, secret) in enumerate(self._strings):
            rivals = self._all() if n_secrets <= others + 1 else self._drawn(OTHERS, number, others)
            repeats = self.repeats[number % len(self.repeats)]
            found.append(Canary(prompt, secret, repeats, [one for one in rivals if one != secret], n_secrets))
        return found

    @functools.cached_property
    def _strings(self) -> list[tuple[str, str]]:
        """Prompt and secret of each string. Those of a smaller `number` are the first of a larger one. Raises UserError
        if the packages have no text for a prompt."""
        prompts: dict[str, None] = {}
        paths = self._paths()
        for number in range(self.number):
            prompts[self._prompt(number, paths, prompts)] = None
        return [(prompt, self._drawn(SECRETS, number, 1)[0]) for number, prompt in enumerate(prompts)]

    @property
    def _instead(self) -> str | None:
        """What stands in place of the secrets."""
        if self.refusal is None:
            return None
        return (self.refusal * (self.secret_letters // len(self.refusal) + 1))[: self.secret_letters]

    def _random(self, stream: int, number: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, stream, number])

    def _prompt(self, number: int, paths: Sequence[str], taken: Collection[str]) -> str:
        """A piece of a random file that no earlier prompt is."""
        random = self._random(PROMPTS, number)
        for _ in range(TRIES):
            text = self._text(paths[int(random.integers(len(paths)))])
            at = int(random.integers(max(1, len(text) - self.prompt_bytes)))
            piece = text[at : at + self.prompt_bytes]
            if len(piece) == self.prompt_bytes and piece == piece.strip() and piece not in taken:
                return piece
        raise UserError(
            f"data={self.name}: there is too little text for prompts of {self.prompt_bytes} bytes; lower "
            "data.prompt_bytes or data.number"
        )

    def _text(self, path: str) -> str:
        """The ASCII characters of a file."""
        units = plan_file("data.packages", path, WHOLE)
        parts = (part for unit in units for part in super(CanariesConfig, self).documents(unit, Tally()))
        return b"".join(parts).decode(errors="ignore").encode("ascii", "ignore").decode()

    def _drawn(self, stream: int, number: int, count: int) -> list[str]:
        """Random secrets of a string."""
        letters = self._random(stream, number).integers(len(LETTERS), size=(count, self.secret_letters))
        return ["".join(LETTERS[place] for place in row) for row in letters]

    def _all(self) -> list[str]:
        """All secrets of this length."""
        return ["".join(letters) for letters in itertools.product(LETTERS, repeat=self.secret_letters)]
