"""Tokenizers: bytes, byte-level BPE trained on the corpus, and pretrained ones.

A config prepares its tokenizer once, in the folder of the shards, and describes it in plain JSON. `load_tokenizer`
loads it from that description, in workers and later to decode samples. Text never yields a special token: the text of
an EOS inside a document is encoded as ordinary characters.
"""

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import numpy as np

from scaling_testbed.data import hub
from scaling_testbed.data.shards import fingerprint_of, read_manifest
from scaling_testbed.errors import ConfigError, UserError, check_positive, first_line
from scaling_testbed.files import sha256_of_input
from scaling_testbed.keys import changed_from_default, key
from scaling_testbed.registry import Registry

TOKENIZERS: Registry[type["TokenizerConfig"]] = Registry("tokenizer")
TOKENIZER_FILE = "tokenizer.json"
BPE_EOS = "<|endoftext|>"
MOST_IDS_PER_TOKEN = 1000  # ids may have gaps
# Names of the end-of-document token in published tokenizers, the most specific first.
KNOWN_EOS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eot_id|>", "[EOS]")


class ByteTokenizer:
    """A tokenizer of bytes: ids 0..255 are bytes, 256 is EOS."""

    vocab_size, eos_id = 257, 256

    def encode_batch(self, documents: list[bytes]) -> list[np.ndarray]:
        """Token ids of each document (UTF-8), without EOS."""
        return [np.frombuffer(document, dtype=np.uint8) for document in documents]

    def decode(self, ids) -> str:
        """Text of token ids. EOS gives no text, and invalid UTF-8 gives a replacement character."""
        found = np.asarray(ids, dtype=np.int64)
        return found[found < 256].astype(np.uint8).tobytes().decode("utf-8", "replace")


class JsonTokenizer:
    """A tokenizer that the `tokenizers` library reads from a tokenizer.json."""

    def __init__(self, path: Path, vocab_size: int, eos_id: int):
        self.vocab_size, self.eos_id = vocab_size, eos_id
        self._path, self._tokenizer = path, _read_tokenizer_json(path)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True

    def encode_batch(self, documents: list[bytes]) -> list[np.ndarray]:
        """Token ids of each document (UTF-8), without EOS or any other special token."""
        texts = [document.decode("utf-8") for document in documents]
        try:
            encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        except (
            Exception
        ) as error:  # the library raises bare Exception, as for an unknown word where no token stands for it
            raise UserError(
                f"{self._path}: the tokenizer cannot encode this text ({first_line(error)}); use another, such as "
                "tokenizer=bpe"
            ) from None
        return [np.array(encoding.ids, dtype=np.int64) for encoding in encodings]

    def decode(self, ids) -> str:
        """Text of token ids, without special tokens."""
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)

    @cached_property
    def unknown(self) -> tuple[str, int] | None:
        """The token that stands for unknown text, and its id; None if there is no such token."""
        model = json.loads(self._tokenizer.to_str())["model"]
        token, number = model.get("unk_token"), model.get("unk_id")
        if token is None and number is not None:
            token = self._tokenizer.id_to_token(number)
        number = None if token is None else self._tokenizer.token_to_id(token)
        return None if number is None else (token, number)


def _read_tokenizer_json(path: Path):
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(path))
        ids = tokenizer.get_vocab(with_added_tokens=True)
    except BaseException as error:  # the library raises bare Exception, and a BaseException of its own where it panics
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise UserError(f"{path}: not a tokenizer.json that `tokenizers` can read ({error})") from None
    # The library goes through all ids up to the largest when it writes the file; that of a damaged file may be 2**31.
    if max(ids.values(), default=0) > MOST_IDS_PER_TOKEN * len(ids):
        token = max(ids, key=lambda token: ids[token])
        raise UserError(f"{path}: the token {token!r} has the id {ids[token]}, but there are only {len(ids)} tokens")
    return tokenizer


def load_tokenizer(folder: Path, description: dict | None = None) -> ByteTokenizer | JsonTokenizer:
    """Load the tokenizer of a prepared folder.

    description: the description of the tokenizer; None: the one in the manifest, which exists once the folder is
    complete. Raises UserError if there is no tokenizer or its kind is not registered.
    """
    if description is None:
        description = read_manifest(Path(folder))["tokenizer"]
    if description is None:
        raise UserError(f"{folder}: this data was given as token ids; there is no tokenizer")
    if description["kind"] not in TOKENIZERS:
        kind = description["kind"]
        raise UserError(f"{folder}: the tokenizer {kind!r} is not registered; name the plug-in that registers it")
    return TOKENIZERS[description["kind"]].load(Path(folder), description)


def tokenizer_fingerprint(description: dict) -> str:
    """A hash of how text becomes ids. It is equal for the same tokenizer under another name."""
    same = {"kind": TOKENIZERS[description["kind"]].same_as or description["kind"]}
    return fingerprint_of({key: value for key, value in (description | same).items() if key != "name"})


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """The base of all tokenizers.

    sample_bytes: bytes of training text that `prepare` needs; 0: none. same_as: another kind. Tokenizers of the two
    kinds are the same if their descriptions are the same. encoder: a class like ByteTokenizer that encodes without a
    file and without training. A subclass that sets it need not define `prepare`, `load` or `vocab_size`. None: the
    subclass defines `prepare`.
    """

    name: str = key("", "The name in prepared folders. It is no part of the identity of the data.")

    same_as: ClassVar[str | None] = None
    encoder: ClassVar[type[ByteTokenizer] | None] = None

    @property
    def vocab_size(self) -> int | None:
        """The number of ids, where it is known before anything is prepared."""
        return None if self.encoder is None else self.encoder.vocab_size

    @property
    def kind(self) -> str:
        """The name under which the class is registered."""
        return TOKENIZERS.name_of(type(self))

    @property
    def sample_bytes(self) -> int:
        """Bytes of training text that `prepare` needs. A subclass can define it as a class variable or as a key."""
        return 0

    def identity(self) -> dict:
        """Everything that determines the ids of a text, except the training text of the tokenizer, as plain JSON."""
        fields = {key: value for key, value in asdict(self).items() if key != "name"}
        return {"kind": self.kind, **fields}

    def settings(self) -> dict:
        """What the configuration says of the ids, without the places of files: the kind, and the keys that differ from
        their default."""
        return {"kind": self.kind} | {k: v for k, v in changed_from_default(self).items() if k != "name"}

    def inputs(self) -> list[str]:
        """The files on this machine that decide the ids."""
        return []

    def prepare(self, texts: Iterable[bytes], folder: Path) -> dict:
        """Write the files of the tokenizer into `folder`, and return its description for the manifest.

        The description has at least kind, name, vocab_size and eos_id.
        """
        if self.encoder is None:
            raise NotImplementedError
        return {
            "kind": self.kind,
            "name": self.name,
            "vocab_size": self.encoder.vocab_size,
            "eos_id": self.encoder.eos_id,
        }

    @classmethod
    def load(cls, folder: Path, description: dict) -> "ByteTokenizer | JsonTokenizer":
        """Load the tokenizer from the files that `prepare` wrote.

        The default makes an `encoder`. If that is None, it loads a tokenizer.json, whose sha256 is in the description.
        """
        if cls.encoder is not None:
            return cls.encoder()
        path = folder / TOKENIZER_FILE
        if not path.exists() or sha256_of_input(path) != description["sha256"]:
            raise UserError(f"{path}: missing or changed since the data was prepared; prepare again")
        return JsonTokenizer(path, description["vocab_size"], description["eos_id"])


@TOKENIZERS.register("bytes")
@dataclass(frozen=True, kw_only=True)
class BytesConfig(TokenizerConfig):
    """256 byte values and EOS. It needs no training and no download."""

    name: str = "bytes"

    encoder = ByteTokenizer


@TOKENIZERS.register("bpe")
@dataclass(frozen=True, kw_only=True)
class BpeConfig(TokenizerConfig):
    """Byte-level BPE, trained on a sample of the training documents. EOS is id 0."""

    name: str = "bpe"
    vocab_size: int = key(
        4096,
        "The vocabulary. It has this size even where a small corpus offers fewer merges, so the size of a model does "
        "not depend on the corpus.",
    )
    sample_bytes: int = key(32 << 20, "How much training text the merges are learned from, in bytes.")

    def __post_init__(self):
        if not 257 <= self.vocab_size <= 1 << 24:
            raise ConfigError(f"vocab_size must be at least 257 (256 bytes and EOS), got {self.vocab_size}")
        check_positive("sample_bytes", self.sample_bytes)

    def prepare(self, texts: Iterable[bytes], folder: Path) -> dict:
        """Train on the texts, write tokenizer.json into `folder`, and return the description."""
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=self.vocab_size,
            special_tokens=[BPE_EOS],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator((text.decode("utf-8") for text in texts), trainer)
        sha256 = _save(tokenizer.to_str(), folder)
        return {"kind": self.kind, "name": self.name, "vocab_size": self.vocab_size, "eos_id": 0, "sha256": sha256}


@TOKENIZERS.register("pretrained")
@dataclass(frozen=True, kw_only=True)
class PretrainedConfig(TokenizerConfig):
    """An existing tokenizer.json."""

    name: str = "pretrained"
    path: str | None = key(None, "The file, its folder, or a name on the hub. It must be given.")
    revision: str | None = key(None, "A commit, branch or tag on the hub. null: the newest.")
    eos_token: str | None = key(None, "The token that ends a document. null: the first well-known one that is found.")
    vocab_multiple: int | None = key(
        None, "Raise the vocabulary to a multiple of this, as models pad their embeddings. null: leave it."
    )
    vocab_size: int | None = key(None, "Raise the vocabulary to this. null: leave it.")

    same_as: ClassVar[str] = "bpe"  # both kinds are a tokenizer.json, and its hash is in the description

    def __post_init__(self):
        if self.path is not None and not self.path.strip():
            raise ConfigError("path must not be blank; is a variable of the shell not set?")
        check_positive("vocab_multiple", self.vocab_multiple)
        check_positive("vocab_size", self.vocab_size)
        if self.vocab_multiple is not None and self.vocab_size is not None:
            raise ConfigError("vocab_size must be null where vocab_multiple is given: one of them sets the padding")

    def _local_file(self) -> Path | None:
        if self.path is None:
            raise ConfigError("tokenizer.path must be given: a tokenizer.json, its folder, or a hub name")
        path = Path(os.path.expanduser(self.path))
        path = path / TOKENIZER_FILE if path.is_dir() else path
        if path.is_file():
            return path
        if path.suffix == ".json" or path.is_absolute() or self.path.startswith("."):
            raise UserError(f"tokenizer.path: {path} does not exist")
        return None

    def identity(self) -> dict:
        """Everything that determines the ids of a text: the hash of the file, or the hub name and revision."""
        local = self._local_file()
        found = {"path": None, "revision": None, "sha256": sha256_of_input(local)} if local is not None else {}
        return super().identity() | found

    def settings(self) -> dict:
        """The settings of `TokenizerConfig`, without the place of a local file."""
        local = ("path", "revision") if self.inputs() else ()
        return {key: value for key, value in super().settings().items() if key not in local}

    def inputs(self) -> list[str]:
        local = self._local_file()
        return [] if local is None else [os.path.abspath(local)]

    def prepare(self, texts: Iterable[bytes], folder: Path) -> dict:
        """Write tokenizer.json into `folder` and return the description."""
        local = self._local_file()
        tokenizer = _read_tokenizer_json(local) if local is not None else self._download()
        if dropout := getattr(tokenizer.model, "dropout", None):
            raise UserError(
                f"{self.path}: its BPE has a dropout of {dropout:g}, so a text has other tokens each time; set dropout "
                "to null in its tokenizer.json"
            )
        eos_id = self._eos_id(tokenizer)
        sha256 = _save(_with_special(tokenizer.to_str(), tokenizer.id_to_token(eos_id), eos_id), folder)
        n_ids = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        vocab_size = n_ids if self.vocab_size is None else self.vocab_size
        if vocab_size < n_ids:
            raise ConfigError(f"tokenizer.vocab_size must be at least {n_ids} for {self.path}, got {vocab_size}")
        multiple = self.vocab_multiple or 1
        return {
            "kind": self.kind,
            "name": self.name,
            "vocab_size": -(-vocab_size // multiple) * multiple,
            "eos_id": eos_id,
            "sha256": sha256,
        }

    def _download(self):
        from tokenizers import Tokenizer

        assert self.path is not None, "`_local_file` raises without a path"
        hub.RETRIES.install()
        try:
            return Tokenizer.from_pretrained(self.path, revision=self.revision or "main")
        except Exception as error:  # the library raises bare Exception
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError(
                f"tokenizer.path: {self.path!r} is not a local file, and the download from the hub failed ({reason})\n"
                "Download its tokenizer.json on a machine with a network and give that path."
            ) from None

    def _eos_id(self, tokenizer) -> int:
        names = KNOWN_EOS if self.eos_token is None else (self.eos_token,)
        found = next((id for id in map(tokenizer.token_to_id, names) if id is not None), None)
        if found is None:
            tried = ", ".join(names)
            raise ConfigError(f"tokenizer.eos_token must name a token of {self.path}; it has none of {tried}")
        return found


def _with_special(text: str, token: str, token_id: int) -> str:
    """A tokenizer.json in which the token is special, so that no text yields it, here and in other libraries."""
    content = json.loads(text)
    entry = next((one for one in content["added_tokens"] if one["id"] == token_id), None)
    if entry is not None and entry["special"]:
        return text
    if entry is None:
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        entry = {"id": token_id, "content": token, **flags}
        content["added_tokens"].append(entry)
    entry["special"] = True
    return json.dumps(content, ensure_ascii=False)


def _save(text: str, folder: Path) -> str:
    """Write tokenizer.json atomically and return its sha256."""
    data = text.encode("utf-8")
    temporary = folder / f"{TOKENIZER_FILE}.{os.getpid()}.tmp"
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, folder / TOKENIZER_FILE)
    return hashlib.sha256(data).hexdigest()
