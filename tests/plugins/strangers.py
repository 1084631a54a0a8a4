"""What a stranger adds to a run, one entry each: a module, the files of configs/ that choose it, and what to type.

One more is one more entry; every way of starting a run then uses it together with the others.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Stranger:
    """code: of my_NAME.py. configs: files by their path in the folder of configs=. proof: of the row and the run's
    folder, whether the run was made of it."""

    name: str
    code: str
    configs: dict[str, str]
    overrides: list[str]
    proof: Callable[[dict[str, Any], Path], bool]


SOURCE = Stranger(
    "source",
    """
from dataclasses import dataclass
from scaling_testbed.data.sources.reading import Unit
from scaling_testbed.data.sources.source import SOURCES, TextSource

@SOURCES.register("counting")
@dataclass(frozen=True, kw_only=True)
class CountingConfig(TextSource):
    name: str = "counting"
    last: int = 400

    def units(self, chunk_bytes):
        return [Unit("", "numbers", n, n + 100, 3000) for n in range(0, self.last, 100)]

    def documents(self, unit, skipped):
        return (f"{n} is before {n + 1}, and that is all. ".encode() for n in range(unit.start, unit.stop))
""",
    {"data/numbers.yaml": "defaults:\n  - /schema/data/counting@_here_\nvalidation_fraction: 0.3\nlast: 500\n"},
    ["data=numbers"],
    lambda row, folder: (row["data.last"], row["data.validation_fraction"]) == (500, 0.3),
)

TOKENIZER = Stranger(
    "tokenizer",
    """
from dataclasses import dataclass
from typing import ClassVar
import numpy as np
from scaling_testbed.data.tokenizers import TOKENIZERS, TokenizerConfig

class Nibbles:
    vocab_size, eos_id = 17, 16

    def encode_batch(self, documents):
        halves = (np.frombuffer(text, dtype=np.uint8) for text in documents)
        return [np.stack([half >> 4, half & 15], axis=1).reshape(-1) for half in halves]

@TOKENIZERS.register("nibbles")
@dataclass(frozen=True, kw_only=True)
class NibblesConfig(TokenizerConfig):
    name: str = "nibbles"
    vocab_size: ClassVar[int] = 17

    def prepare(self, texts, folder):
        return {"kind": "nibbles", "name": self.name, "vocab_size": 17, "eos_id": 16}

    @classmethod
    def load(cls, folder, description):
        return Nibbles()
""",
    {"tokenizer/halves.yaml": "defaults:\n  - /schema/tokenizer/nibbles@_here_\n"},
    ["tokenizer=halves"],
    lambda row, folder: 2 < row["unigram_entropy_nats"] < 2.8,  # of 17 ids; of bytes it would be above 3
)

SCHEDULE = Stranger(
    "schedule",
    """
from dataclasses import dataclass
from scaling_testbed.learning.schedules import SCHEDULES, Schedule

@SCHEDULES.register("staircase")
@dataclass(frozen=True, kw_only=True)
class StaircaseConfig(Schedule):
    name: str = "staircase"
    factor: float = 0.5

    def after_warmup(self, done, warmup, total, peak, floor):
        return max(floor, peak * self.factor**done)
""",
    {"schedule/stairs.yaml": "defaults:\n  - /schema/schedule/staircase@_here_\nwarmup: 0\nfactor: 0.25\n"},
    ["schedule=stairs"],
    lambda row, folder: rates(folder)[:2] == [row["optimizer.lr"] / 4, row["optimizer.lr"] / 16],
)


def rates(folder: Path) -> list[float]:
    """The learning rate of each update."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line["lr"] for line in lines if "lr" in line]


STRANGERS = [SOURCE, TOKENIZER, SCHEDULE]

LAW = """
from scaling_testbed.analysis.laws.forms import LAWS, Law, Param

LAWS.add("saturating", Law(
    "saturating", "L = E + A/N + B/D", "a stranger", ("n_params", "n_tokens"), "loss",
    (Param("E", (0.1, 3.0)), Param("A", (1.0, 1e6), 1e-30, 1e60, True), Param("B", (1.0, 1e8), 1e-30, 1e60, True)),
    lambda p, x: p["E"] + p["A"] / x["n_params"] + p["B"] / x["n_tokens"],
))
"""
