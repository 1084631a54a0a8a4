"""A user's own token files, read in place: nanoGPT, llm.c, and Megatron (.bin beside .idx).

Their preparation writes a manifest and copies no tokens.
"""

import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from scaling_testbed.data.shards import HEADER_BYTES, HEADERS, SPLITS, parse_header
from scaling_testbed.data.sources.reading import as_list, expand, file_identity
from scaling_testbed.data.sources.source import SOURCES, Job, Source, token_record
from scaling_testbed.errors import ConfigError, UserError, check_positive
from scaling_testbed.files import sha256_of
from scaling_testbed.keys import check_choices, key

FORMATS = ("auto", "nanogpt", "llmc", "megatron")
MEGATRON_MAGIC = b"MMIDIDX\x00\x00"
# Megatron-LM, megatron/core/datasets/indexed_dataset.py: the codes of integer types.
MEGATRON_DTYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16"}
SCAN_TOKENS = 1 << 24


@SOURCES.register("token_files")
@dataclass(frozen=True, kw_only=True)
class TokenFilesConfig(Source):
    """Existing token files of nanoGPT, llm.c or Megatron, read in place."""

    name: str = "token_files"
    train: Any = key(None, "The .bin files of the train split: a glob, a folder, or a list of them.")
    validation: Any = key(None, "The .bin files of the validation split.")
    format: str = key(
        "auto",
        "auto: Megatron where an .idx lies beside the .bin, llm.c where its magic number starts the file, else nanoGPT "
        "(uint16 without a header).",
        choices=FORMATS,
    )
    vocab_size: int | None = key(None, "The vocabulary of the tokenizer that wrote the files. It must be given.")

    places: ClassVar[tuple[str, ...]] = ("train", "validation")

    def __post_init__(self):
        check_choices(self)
        check_positive("vocab_size", self.vocab_size)

    def paths(self, split: str) -> list[str]:
        """The .bin files of a split, sorted. If a glob matches an .idx file, its .bin file is taken."""
        for field in ("train", "validation", "vocab_size"):
            if getattr(self, field) is None:
                raise ConfigError(f"data.{field} must be given for data=token_files")
        patterns = [f"{name}/*.bin" if os.path.isdir(name) else name for name in as_list(getattr(self, split))]
        found = {path[:-4] + ".bin" if path.endswith(".idx") else path for path in expand(f"data.{split}", patterns)}
        if other := sorted(path for path in found if not path.endswith(".bin")):
            raise UserError(f"data.{split}: {other[0]} is not a .bin file of tokens")
        return sorted(found)

    def identity(self) -> dict:
        """The files by path, size and time. The tokenizer is not part of the identity."""
        paths = {split: self.paths(split) for split in ("train", "validation")}
        if both := set(paths["train"]) & set(paths["validation"]):
            raise ConfigError(f"data.validation must not be in data.train too: {min(both)}")
        files = {split: file_identity(found, "/") for split, found in paths.items()}
        return {"kind": self.kind, "format": self.format, "vocab_size": self.vocab_size, **files}

    def inputs(self) -> dict[str, list[str]]:
        return {split: self.paths(split) for split in SPLITS}

    def prepare(self, job: Job) -> dict:
        """Read every file once, for its hash and the range of its ids. The files stay in place."""
        paths = {split: self.paths(split) for split in SPLITS}
        layouts = {path: probe(path, self.format) for split in SPLITS for path in paths[split]}
        assert self.vocab_size is not None, "`paths` raises without it"
        job.start(sum(os.path.getsize(path) for path in layouts))
        splits, train_counts = {}, np.zeros(self.vocab_size, dtype=np.int64)
        for split in SPLITS:
            shards = []
            for path in paths[split]:
                entry, counts = scan(path, layouts[path], self.vocab_size)
                shards.append(entry)
                train_counts += counts * (split == "train")
                job.advance(entry["size"])
            documents = [layouts[path]["n_documents"] for path in paths[split]]
            n_documents = None if None in documents else sum(documents)
            splits[split] = token_record(sum(shard["n_tokens"] for shard in shards), n_documents, shards)
        return self.manifest(splits, train_counts)


def probe(path: str, format: str = "auto") -> dict:
    """The layout of a token file: {format, dtype, offset (bytes), n_tokens, n_documents}.

    Raises UserError that names the file if its magic number or its size is wrong.
    """
    size = os.path.getsize(path)
    if size == 0:
        raise UserError(f"{path}: empty file, no tokens")
    index = Path(path).with_suffix(".idx")
    if format == "auto":
        format = "megatron" if index.exists() else "llmc" if _has_llmc_magic(path) else "nanogpt"
    if format == "megatron":
        return {"format": format, "offset": 0, **_probe_megatron(path, index, size)}
    if format == "llmc":
        dtype, n_tokens = parse_header(path)
        expected = HEADER_BYTES + n_tokens * np.dtype(dtype).itemsize
        if size != expected or not n_tokens:
            raise UserError(f"{path}: {size} bytes, but its header announces {n_tokens} tokens ({expected} bytes)")
        return {"format": format, "dtype": dtype, "offset": HEADER_BYTES, "n_tokens": n_tokens, "n_documents": None}
    if size % 2:
        raise UserError(f"{path}: {size} bytes is not a list of uint16 tokens; set data.format")
    first = np.fromfile(path, "<u2", 1 << 16)
    if len(first) >= 64 and not first[1::2].any() and first.any():
        raise UserError(f"{path}: every second token is 0, so the ids seem to be uint32; write them as uint16")
    return {"format": format, "dtype": "uint16", "offset": 0, "n_tokens": size // 2, "n_documents": None}


def _has_llmc_magic(path: str) -> bool:
    with open(path, "rb") as file:
        raw = file.read(8)
    return len(raw) == 8 and struct.unpack("<ii", raw) in HEADERS.values()


def _probe_megatron(path: str, index: Path, size: int) -> dict:
    """Read the .idx file: magic, version, type code, counts, the length and byte offset of each sequence, and the
    document borders. The sequences must lie one after the other, as Megatron's own tool writes them."""
    try:
        raw = index.read_bytes()
    except OSError:
        raise UserError(f"{index}: needed beside {path} for the Megatron format, but cannot be read") from None
    if raw[:9] != MEGATRON_MAGIC:
        raise UserError(f"{index}: wrong magic; not a Megatron index")
    try:
        version, code, n_sequences, n_borders = struct.unpack_from("<QBQQ", raw, 9)
        lengths = np.frombuffer(raw, "<i4", n_sequences, 34)
        pointers = np.frombuffer(raw, "<i8", n_sequences, 34 + 4 * n_sequences)
    except (struct.error, ValueError):
        raise UserError(f"{index}: cut short; {len(raw)} bytes do not hold what its header announces") from None
    if version != 1 or code not in MEGATRON_DTYPES:
        raise UserError(f"{index}: version {version} with type code {code} is not supported")
    width = np.dtype(MEGATRON_DTYPES[code]).itemsize
    n_tokens = int(lengths.sum(dtype=np.int64))
    if n_tokens * width != size:
        raise UserError(f"{path}: {size} bytes, but {index.name} announces {n_tokens} tokens of {width} bytes")
    expected = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)[:-1]]) * width if n_sequences else pointers
    if not np.array_equal(pointers, expected):
        raise UserError(f"{index}: sequences do not lie one after the other in {path}; rewrite it with Megatron's tool")
    return {"dtype": MEGATRON_DTYPES[code], "n_tokens": n_tokens, "n_documents": max(0, n_borders - 1)}


def scan(path: str, layout: dict, vocab_size: int) -> tuple[dict, np.ndarray]:
    """Read a token file once. Return its manifest entry and the counts of each id.

    Raises UserError if an id is outside the vocabulary.
    """
    tokens = np.memmap(
        path,
        dtype=np.dtype(layout["dtype"]).newbyteorder("<"),
        mode="r",
        offset=layout["offset"],
        shape=(layout["n_tokens"],),
    )
    counts = np.zeros(vocab_size, dtype=np.int64)
    for start in range(0, len(tokens), SCAN_TOKENS):
        block = np.asarray(tokens[start : start + SCAN_TOKENS])
        low, high = int(block.min()), int(block.max())
        if low < 0 or high >= vocab_size:
            raise UserError(
                f"{path}: token id {low if low < 0 else high} is outside data.vocab_size={vocab_size}; a wrong "
                "data.format or vocab_size?"
            )
        counts += np.bincount(block, minlength=vocab_size)
    layout = {key: layout[key] for key in ("format", "dtype", "offset", "n_tokens")}
    return {"file": path, **layout, "size": os.path.getsize(path), "sha256": sha256_of(path)}, counts
