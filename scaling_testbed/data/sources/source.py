"""The base classes of data sources, and their registry.

A source is a frozen dataclass. It knows its identity without reading a document, and prepares its tokens with the
methods of a `Job`. Most sources give documents (`TextSource`): they list their units in a fixed order and read the
documents of one unit, and the preparation tokenises the documents. Other sources give token ids.
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
from scaling_testbed.keys import changed_from_default, key
from scaling_testbed.registry import Registry

SOURCES: Registry[type["Source"]] = Registry("data source")


class Job(Protocol):
    """The interface of one preparation to a source. work: the folder for the shards."""

    work: Path

    def tokenize(self, source: "TextSource") -> dict:
        """Write the documents of `source` as shards into `work`, and return the manifest."""

    def start(self, n_bytes: int) -> None:
        """Start to show the progress of `n_bytes` of work."""

    def advance(self, n_bytes: int) -> None:
        """Add `n_bytes` to the bytes done."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """The base of all sources.

    uses_tokenizer: whether the tokens depend on the tokenizer. where_fields: the fields that messages show as its
    place. places: the fields that only say where files are; `inputs` lists these files. too_small: the advice in the
    message if a split has no document.
    """

    name: str = key("", "The name in front of prepared folders. It is no part of the identity of the data.")

    uses_tokenizer: ClassVar[bool] = False
    where_fields: ClassVar[tuple[str, ...]] = ()
    places: ClassVar[tuple[str, ...]] = ()
    too_small: ClassVar[str] = "add documents"

    @property
    def kind(self) -> str:
        """The name under which the class is registered."""
        return SOURCES.name_of(type(self))

    def identity(self) -> dict:
        """Everything about the source that determines the tokens, as plain JSON. It must not read a document."""
        return {"kind": self.kind, **self.description()["fields"]}

    def settings(self) -> dict:
        """What the configuration says of the tokens, without the places of files, as plain JSON: the kind, and the keys
        that differ from their default."""
        return {"kind": self.kind} | {
            k: v for k, v in changed_from_default(self).items() if k not in ("name", *self.places)
        }

    def inputs(self) -> dict[str, list[str]] | None:
        """The files that decide the tokens, in the order in which they are read: what they are for, such as the name of
        a split -> absolute paths. Empty if the configuration alone decides; None if it is not known.

        By them the data of a finished run are compared with those at hand. Raises UserError if there are none.
        """
        return None

    def description(self) -> dict:
        """The record of this source in the manifest."""
        fields = asdict(self)
        del fields["name"]
        return {"kind": self.kind, "fields": fields}

    def where(self) -> str:
        """The place that the source reads, for messages."""
        fields = self.description()["fields"]
        return ", ".join(f"{key} {fields[key]}" for key in self.where_fields if fields.get(key)) or self.kind

    def prepare(self, job: Job) -> dict:
        """Write the tokens of both splits into the job's folder, or leave token files in place; return the manifest.

        Raises UserError or ConfigError that names the file or key.
        """
        raise NotImplementedError

    def manifest(self, splits: dict[str, dict], counts: np.ndarray, **more: Any) -> dict:
        """The manifest, from the records of the splits and the counts [vocab_size] of each id in the train split.

        Raises UserError if a split is empty.
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
    """The record of a split without text. Its bytes are unknown, so bits per byte cannot be computed."""
    return {"n_tokens": n_tokens, "n_documents": n_documents, "n_bytes": None, "shards": shards}


@dataclass(frozen=True, kw_only=True)
class TextSource(Source):
    """The base of all sources of documents.

    read_twice: whether its documents may be read one more time to look for a validation document.
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
        """The identity of `Source`, with `content`."""
        return {**super().identity(), **self.content()}

    def content(self) -> dict:
        """Data that identify the text itself, such as the sizes and times of files. They are part of the identity."""
        return {}

    def prepare(self, job: Job) -> dict:
        return job.tokenize(self)

    def units(self, chunk_bytes: int) -> list[Unit]:
        """The units of the whole source, in document order."""
        raise NotImplementedError

    def documents(self, unit: Unit, skipped: list[str]) -> Iterator[bytes]:
        """Yield the documents of one unit as UTF-8, none empty. Files that are not UTF-8 are added to `skipped`."""
        raise NotImplementedError


def split_of(document: bytes, validation_fraction: float) -> str:
    """The split of a document, by a hash of its bytes only.

    The split does not change when other documents are added or removed. All copies of a document are in the same split.
    """
    return "validation" if split_draw(document) < validation_fraction else "train"


def split_draw(document: bytes) -> float:
    """A number in [0, 1) from a hash of the document's bytes."""
    return int.from_bytes(hashlib.blake2b(document, digest_size=8).digest(), "big") / 2.0**64
