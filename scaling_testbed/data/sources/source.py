"""The base classes of data sources, and their registry.

A source is a frozen dataclass. It knows its identity without reading a document, and prepares its tokens with the
methods of a `Job`. Most sources give documents (`TextSource`): they list their units in a fixed order and read the
documents of one unit, and the preparation tokenises the documents. Other sources give token ids.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np

from scaling_testbed.data.manifest import SPLITS, smallest_dtype
from scaling_testbed.data.online import OnlineRule
from scaling_testbed.data.sources.reading import Rows, Tally, Unit
from scaling_testbed.data.tokenizers import ByteTokenizer, JsonTokenizer, TokenizerConfig, load_tokenizer
from scaling_testbed.errors import ConfigError, UserError, check_positive
from scaling_testbed.keys import ADDED_LATER, changed_from_default, check_choices, identifies, key
from scaling_testbed.registry import Registry

SOURCES: Registry[type["Source"]] = Registry("data source")

OF_THE_RUN = ("name", "skip_steps")  # the fields of a source that decide no token


@dataclass(frozen=True)
class Canary:
    """A string that is planted in a train split (Carlini et al. 2019, arXiv 1802.08232).

    repeats: how often. others: other secrets of the same form, all of them or random ones. n_secrets: how many secrets
    of this form there are.
    """

    prompt: str
    secret: str
    repeats: int
    others: Sequence[str]
    n_secrets: int


class Job(Protocol):
    """The interface of one preparation to a source. work: the folder for the shards. parts: name -> folder of each of
    the source's `parts`, which are prepared already."""

    work: Path
    parts: Mapping[str, Path]

    def tokenize(self, source: "TextSource") -> dict:
        """Write the documents of `source` as shards into `work`, and return the manifest."""

    def start(self, n_bytes: int) -> None:
        """Start to show the progress of `n_bytes` of work."""

    def advance(self, n_bytes: int) -> None:
        """Add `n_bytes` to the bytes done."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """The base of all sources.

    uses_tokenizer: whether the tokens depend on the tokenizer. masked: whether some of its tokens may be no targets of
    the loss. where_fields: the fields that messages show as its place. places: the fields that only say where files
    are; `inputs` lists these files. too_small: the advice in the message if a split has no document. knows_entropy:
    whether the manifest has the entropy rate. online_rule: how the weights of the parts follow from losses; None if
    they do not. group_names: see `groups`.
    """

    name: str = key("", "The name in front of prepared folders. It is no part of the identity of the data.")
    skip_steps: list[int] = key(
        [],
        "Steps whose batches are left out of training, as [a,b): from step a on, a run trains on what it would have "
        "trained on b - a steps later. More numbers are further pairs, in rising order. It is for a run that begins "
        "before a spike of another one (start.run). The prepared data are the same.",
        identity=ADDED_LATER,
    )

    uses_tokenizer: ClassVar[bool] = False
    where_fields: ClassVar[tuple[str, ...]] = ()
    places: ClassVar[tuple[str, ...]] = ()
    too_small: ClassVar[str] = "add documents"
    knows_entropy: ClassVar[bool] = False
    online_rule: ClassVar[OnlineRule | None] = None
    masked: ClassVar[bool] = False
    group_names: ClassVar[tuple[str, ...]] = ()

    @property
    def kind(self) -> str:
        """The name under which the class is registered."""
        return SOURCES.name_of(type(self))

    def identity(self) -> dict:
        """Everything about the source that determines the tokens, as plain JSON. It must not read a document."""
        left_out = {*OF_THE_RUN} | {
            field.name for field in fields(self) if not identifies(field, getattr(self, field.name))
        }
        there = {name: value for name, value in self.description()["fields"].items() if name not in left_out}
        return {"kind": self.kind, **there}

    def settings(self) -> dict:
        """What the configuration says of the tokens, without the places of files, as plain JSON: the kind, and the keys
        that differ from their default."""
        return {"kind": self.kind} | {
            k: v for k, v in changed_from_default(self).items() if k not in (*OF_THE_RUN, *self.places)
        }

    def parts(self) -> Mapping[str, "Source"]:
        """The sources that this one is made of, by name, in rising order. Each is prepared in a folder of its own."""
        return {}

    def weights_by_step(self, train_tokens: Mapping[str, int]) -> list[tuple[int, dict[str, float]]]:
        """The weights of the parts: (the step from which on they hold, name -> weight), in rising order from step 0 on.
        train_tokens: of each part by its name, or of the source itself, under any name, if it has none."""
        return [(0, dict.fromkeys(train_tokens, 1.0))]

    def without_documents(self) -> list[str]:
        """The kinds of the sources in this one of which it is known, without data, that no EOS ends a document."""
        return sorted({kind for part in self.parts().values() for kind in part.without_documents()})

    def check_length(self, sequence_length: int) -> None:
        """Raise ConfigError if the sequences of this source are not as long as those of a batch."""
        for part in self.parts().values():
            part.check_length(sequence_length)

    def groups(self, numbers_N: np.ndarray, tokens_NS: np.ndarray) -> Mapping[str, np.ndarray]:
        """The groups of targets whose accuracy is told apart: each of `group_names` -> whether each target is in it,
        bool [N, S - 1]. numbers_N, tokens_NS: windows of the validation split. The targets are the tokens from the
        second on."""
        return {}

    def check_tokenizer(self, tokenizer: TokenizerConfig) -> None:
        """Raise ConfigError if the tokenizer does not suit this source."""

    def inputs(self) -> dict[str, list[str]] | None:
        """The files that decide the tokens, in the order in which they are read: what they are for, such as the name of
        a split -> absolute paths. Empty if the configuration alone decides; None if it is not known.

        By them the data of a finished run are compared with those at hand. Raises UserError if there are none.
        """
        return None

    def files_left_out(self) -> Tally:
        """The files that the places of this source name now, and that are left out. The default is none."""
        return Tally()

    def canaries(self, others: int) -> list[Canary]:
        """The strings that this source plants, with so many other secrets for each; the default is none."""
        return []

    def description(self) -> dict:
        """The record of this source in the manifest."""
        return {"kind": self.kind, "fields": {k: v for k, v in asdict(self).items() if k not in OF_THE_RUN}}

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
        """The manifest, from the records of the splits and the counts [vocab_size] of each id among the targets of the
        train split.

        Raises UserError if a split is empty, or has no target.
        """
        for split in SPLITS:
            if not splits[split]["n_tokens"]:
                raise UserError(
                    f"{self.name}: too small to split, no document in {split} ({self.where()}); {self.too_small}"
                )
            if splits[split].get("n_targets") == 0:
                raise UserError(
                    f"{self.name}: no token in {split} is a target of the loss ({self.where()}); give other data"
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


def token_record(n_tokens: int, n_documents: int | None) -> dict:
    """The record of a split without text, but for its shards. Its bytes are unknown, so bits per byte cannot be
    computed."""
    return {"n_tokens": n_tokens, "n_documents": n_documents, "n_bytes": None}


@dataclass(frozen=True, kw_only=True)
class TextSource(Source):
    """The base of all sources of documents.

    read_twice: whether its documents may be read one more time to look for a validation document.
    validation_is_training: whether its validation documents are training documents on purpose.
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
    validation_is_training: ClassVar[bool] = False

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

    def documents(self, unit: Unit, tally: Tally) -> Iterator[bytes]:
        """Yield the documents of one unit as UTF-8, none empty. `tally` counts what is left out, by reason.

        A document of a `masked` source may be `marked.Marked`, which says what of it is a target.
        """
        raise NotImplementedError

    def found(self, units: list[Unit]) -> tuple[dict, Tally]:
        """What was found and read, as plain JSON, and what is left out before any file is opened.

        The default is empty, for a source without files.
        """
        return {}, Tally()

    def encoder(self, folder: Path, description: dict | None) -> "ByteTokenizer | JsonTokenizer | IdEncoder":
        """What turns documents into token ids. folder, description: of the tokenizer."""
        return load_tokenizer(folder, description)

    @property
    def is_text(self) -> bool:
        """Whether documents are text. Otherwise they are token ids, as `Rows` gives them."""
        return True

    @property
    def max_bad_share(self) -> float:
        """The share of rows that may be bad. More of them stop the preparation."""
        return 0.0


@dataclass(frozen=True, kw_only=True)
class RowSource(TextSource):
    """The base of the sources whose documents are rows with named fields."""

    text_field: str = key(
        "text",
        "The field with the text of a row, which is a document. a.b is field b inside field a. A list of messages "
        "{role, content} becomes a text of lines 'role: content'.",
    )
    prompt_field: str | None = key(
        None,
        "A field with a text that stands in front of that of `text_field` in the document, with nothing in between. It "
        "is read by the model and is no target of the loss.",
        identity=ADDED_LATER,
    )
    answers_only: bool = key(
        False,
        "Whether only what the assistant says in a list of messages is a target of the loss: the content of each "
        "message whose role is assistant, and the empty line or the EOS after it.",
        identity=ADDED_LATER,
    )
    ids_field: str | None = key(
        None,
        "The field with token ids, in place of a text. No tokenizer is applied. The vocabulary is `vocab_size`, or "
        "that of tokenizer=, whose EOS then ends each document.",
        identity=ADDED_LATER,
    )
    vocab_size: int | None = key(
        None, "The vocabulary of the token ids in `ids_field`. Then no EOS is added.", identity=ADDED_LATER
    )
    on_bad: str = key(
        "stop",
        "What a bad row does: one that is not JSON, CSV or UTF-8, or has no such field, or no text in it. stop: it "
        "stops the preparation, and its place is named. skip: it is left out and counted. A whole text file that is "
        "not UTF-8 is left out and counted in both cases.",
        identity=ADDED_LATER,
        choices=("stop", "skip"),
    )
    max_bad: float = key(
        0.001,
        "The largest share of rows that on_bad=skip may leave out. More stop the preparation.",
        identity=ADDED_LATER,
    )

    def __post_init__(self):
        super().__post_init__()
        check_choices(self)
        for name in ("text_field", "prompt_field", "ids_field"):
            if (field := getattr(self, name)) is not None and not (isinstance(field, str) and field.strip()):
                raise ConfigError(f"{name} must name a field, got {field!r}")
        if not 0.0 <= self.max_bad < 1.0:
            raise ConfigError(f"max_bad must be at least 0 and less than 1, got {self.max_bad}")
        check_positive("vocab_size", self.vocab_size)
        if self.vocab_size is not None and self.ids_field is None:
            raise ConfigError("vocab_size needs ids_field, because a tokenizer has a vocabulary of its own")
        if self.prompt_field is not None and self.answers_only:
            raise ConfigError("answers_only is for lists of messages, and prompt_field for texts; leave one out")
        if self.prompt_field is not None and self.prompt_field == self.text_field:
            raise ConfigError(
                f"prompt_field and text_field are both {self.text_field!r}, so that each answer would stand in its "
                "prompt; name two fields"
            )
        for name in ("prompt_field", "answers_only"):
            if self.ids_field is not None and getattr(self, name):
                raise ConfigError(f"{name} cannot be with ids_field, which holds no text; leave one out")

    @property
    def rows(self) -> Rows:
        return Rows(self.text_field, self.ids_field, self.on_bad == "skip", self.prompt_field, self.answers_only)

    @property
    def masked(self) -> bool:  # type: ignore[override]  # it depends on the keys here
        return self.prompt_field is not None or self.answers_only

    @property
    def uses_tokenizer(self) -> bool:  # type: ignore[override]  # it depends on the keys here
        return self.vocab_size is None

    @property
    def is_text(self) -> bool:
        return self.ids_field is None

    @property
    def max_bad_share(self) -> float:
        return self.max_bad

    def check_tokenizer(self, tokenizer: TokenizerConfig) -> None:
        super().check_tokenizer(tokenizer)
        if self.ids_field and not self.vocab_size and (tokenizer.encoder is not None or tokenizer.sample_bytes):
            raise ConfigError(
                f"data.ids_field needs data.vocab_size, or the tokenizer that wrote the ids (tokenizer=pretrained "
                f"tokenizer.path=); tokenizer={tokenizer.kind} did not write them"
            )

    def encoder(self, folder: Path, description: dict | None) -> "ByteTokenizer | JsonTokenizer | IdEncoder":
        if self.ids_field is None:
            return super().encoder(folder, description)
        if self.vocab_size is not None:
            return IdEncoder(self.vocab_size, None)
        tokenizer = load_tokenizer(folder, description)
        return IdEncoder(tokenizer.vocab_size, tokenizer.eos_id)


class IdEncoder:
    """Takes documents that are token ids already, as `Rows` gives them. eos_id: None if no EOS ends a document."""

    def __init__(self, vocab_size: int, eos_id: int | None):
        self.vocab_size, self.eos_id = vocab_size, eos_id

    def encode_batch(self, documents: list[bytes]) -> list[np.ndarray]:
        """Token ids of each document. An EOS at its end is left out, because one is added."""
        found = [np.frombuffer(document, dtype="<i8") for document in documents]
        return [ids[:-1] if self.eos_id is not None and len(ids) and ids[-1] == self.eos_id else ids for ids in found]


def split_of(document: bytes, validation_fraction: float) -> str:
    """The split of a document, by a hash of its bytes only.

    The split does not change when other documents are added or removed. All copies of a document are in the same split.
    """
    return "validation" if split_draw(document) < validation_fraction else "train"


def split_draw(document: bytes) -> float:
    """A number in [0, 1) from a hash of the document's bytes."""
    return document_hash(document) / 2.0**64


def document_hash(document: bytes) -> int:
    """A hash of the document's bytes, of 64 bits."""
    return int.from_bytes(hashlib.blake2b(document, digest_size=8).digest(), "big")


@dataclass(frozen=True)
class SplitRule:
    """The split of each document of one preparation.

    fraction: as in `split_of`. moved: the hash of a document that is in validation whatever the fraction.
    """

    fraction: float
    moved: int | None = None

    def __call__(self, unit: Unit, document: bytes) -> str:
        return unit.split or self.of_hash(document_hash(document))

    def of_hash(self, found: int) -> str:
        """The split of a document of a unit without a split of its own, by its `document_hash`."""
        return "validation" if found / 2.0**64 < self.fraction or found == self.moved else "train"
