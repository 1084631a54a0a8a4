"""What every source of data answers for itself, and the kinds that there are.

A source is a frozen dataclass that can say its identity without reading a document, and that prepares its tokens with
the tools of a `Job`. Most give documents (`TextSource`): they plan themselves as a list of units in a fixed order and
read the documents of one unit; the rest is the tokenizer's. Others give token ids.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np

from scaling_testbed.data.shards import SPLITS, smallest_dtype
from scaling_testbed.data.sources.reading import Unit
from scaling_testbed.errors import ConfigError, UserError, check_positive
from scaling_testbed.keys import key
from scaling_testbed.registry import Registry

SOURCES: Registry[type["Source"]] = Registry("data source")


class Job(Protocol):
    """One preparation, as a source sees it. work: the folder to write shards into."""

    work: Path

    def tokenize(self, source: "TextSource") -> dict:
        """The documents of `source` as shards in `work`; returns the manifest."""

    def start(self, n_bytes: int) -> None:
        """Begin counting towards `n_bytes` of work, for a person to see."""

    def advance(self, n_bytes: int) -> None:
        """So many more bytes are done."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """The base of all sources.

    uses_tokenizer: whether the tokenizer decides the tokens too. where_fields: the fields that name its place to a
    person. too_small: what to do where a split has no document.
    """

    name: str = key("", "The name in front of prepared folders. It is no part of the identity of the data.")

    uses_tokenizer: ClassVar[bool] = False
    where_fields: ClassVar[tuple[str, ...]] = ()
    too_small: ClassVar[str] = "add documents"

    @property
    def kind(self) -> str:
        """The name it is registered under."""
        return SOURCES.name_of(type(self))

    def identity(self) -> dict:
        """Everything about the source that decides the tokens, as plain JSON, found without reading a document."""
        return {"kind": self.kind, **self.description()["fields"]}

    def description(self) -> dict:
        """The record of this source in the manifest."""
        fields = asdict(self)
        del fields["name"]
        return {"kind": self.kind, "fields": fields}

    def where(self) -> str:
        """What it reads, for messages."""
        fields = self.description()["fields"]
        return ", ".join(f"{key} {fields[key]}" for key in self.where_fields if fields.get(key)) or self.kind

    def prepare(self, job: Job) -> dict:
        """Leave the tokens of both splits in the job's folder, or where they are; returns the manifest.

        Raises UserError or ConfigError naming the file or field.
        """
        raise NotImplementedError

    def manifest(self, splits: dict[str, dict], counts: np.ndarray, **more: Any) -> dict:
        """The manifest, from the records of the splits and how often each id [vocab_size] occurs in the train split.

        Raises UserError where a split is empty.
        """
        for split in SPLITS:
            if not splits[split]["n_tokens"]:
                raise UserError(
                    f"{self.name}: too small to split, no document in {split} ({self.where()}); {self.too_small}"
                )
        share = counts[counts > 0] / counts.sum()
        return {
            "source": self.description(),
            "tokenizer": None,
            "tokenizer_fingerprint": None,
            "vocab_size": len(counts),
            "dtype": smallest_dtype(len(counts)),
            "eos_id": None,
            "unigram_entropy_nats": float(-(share * np.log(share)).sum()),
            "entropy_rate_nats": None,
            "skipped_files": 0,
            **more,
            "splits": splits,
        }


def token_record(n_tokens: int, n_documents: int | None, shards: list[dict]) -> dict:
    """The record of a split that was never text: its bytes are unknown, so bits per byte cannot be had."""
    return {"n_tokens": n_tokens, "n_documents": n_documents, "n_bytes": None, "shards": shards}


@dataclass(frozen=True, kw_only=True)
class TextSource(Source):
    """What all sources of documents share.

    read_twice: whether its documents may be read once more to look for one that belongs to the validation split.
    """

    name: str = "text"
    validation_fraction: float = key(
        0.01, "The part of the documents that is the validation split. A hash of its text decides for each document."
    )
    max_documents: int | None = key(
        None, "Stop after so many documents, of both splits together, in their order. null: no limit."
    )
    max_tokens: int | None = key(
        None,
        "Stop after the document with which the tokens of both splits, each document's EOS included, reach this "
        "number. null: no limit.",
    )

    uses_tokenizer: ClassVar[bool] = True
    read_twice: ClassVar[bool] = True

    def __post_init__(self):
        if not 0.0 <= self.validation_fraction < 1.0:
            raise ConfigError(f"validation_fraction must be at least 0 and less than 1, got {self.validation_fraction}")
        check_positive("max_documents", self.max_documents)
        check_positive("max_tokens", self.max_tokens)

    @property
    def limited(self) -> bool:
        """Whether preparation may stop before the end of the source."""
        return self.max_documents is not None or self.max_tokens is not None

    def identity(self) -> dict:
        """As for every source, and what stands for the content."""
        return {**super().identity(), **self.content()}

    def content(self) -> dict:
        """What stands for the text itself, such as the sizes and times of files; part of the identity."""
        return {}

    def prepare(self, job: Job) -> dict:
        return job.tokenize(self)

    def units(self, chunk_bytes: int) -> list[Unit]:
        """The whole source as pieces in document order."""
        raise NotImplementedError

    def documents(self, unit: Unit, skipped: list[str]) -> Iterator[bytes]:
        """Documents of one unit as UTF-8, none empty; files that are not UTF-8 are added to `skipped`."""
        raise NotImplementedError


def split_of(document: bytes, validation_fraction: float) -> str:
    """The split a document belongs to, by a hash of its bytes alone: it never moves when other documents come
    or go, and two copies of one document are never on both sides."""
    return "validation" if split_draw(document) < validation_fraction else "train"


def split_draw(document: bytes) -> float:
    """A number in [0, 1) that stands for the document's bytes."""
    return int.from_bytes(hashlib.blake2b(document, digest_size=8).digest(), "big") / 2.0**64
