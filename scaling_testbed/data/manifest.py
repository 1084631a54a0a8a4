"""manifest.json of a prepared folder: its version, the hash of itself, and its shape.

The hashes of the shards stand in the manifest. The manifest's own hash is over the rest of its content as canonical
JSON. A damaged manifest is refused, whatever its damage.
"""

import hashlib
import json
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from scaling_testbed.errors import UserError
from scaling_testbed.files import MissingFile, read_json, write_json

NAME = "manifest.json"
VERSION = 2
WITHOUT_HASH = 1  # manifests of this version have no hash of themselves; all else is the same
OWN_HASH = "manifest_sha256"
SPLITS = ("train", "validation")
MAX_VOCABULARY = 1 << 31
# Types of token ids. The suffix _be says big-endian; all others are little-endian.
_WIDE = ("uint16", "uint32", "uint64", "int16", "int32", "int64")
DTYPES = ("uint8", "int8", *_WIDE, *(f"{name}_be" for name in _WIDE))


def numpy_dtype(name: str) -> np.dtype:
    """The NumPy type of a name in DTYPES."""
    return np.dtype(name.removesuffix("_be")).newbyteorder(">" if name.endswith("_be") else "<")


def smallest_dtype(vocab_size: int) -> str:
    """uint16 if every id fits, else uint32."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def fingerprint_of(value) -> str:
    """A hash of a JSON value, as 16 hex digits."""
    return _sha256_of_json(value)[:16]


def write_manifest(folder: Path, content: dict) -> None:
    """Write manifest.json with its version and its hash. Raises UserError if its shape is wrong."""
    manifest = json.loads(json.dumps({"schema_version": VERSION, **content}))
    manifest[OWN_HASH] = _sha256_of_json(manifest)
    if fault := next(_faults(manifest), None):
        raise UserError(
            f"{content.get('name')}: this data source made a wrong manifest: {fault}; correct its `prepare`"
        )
    write_json(folder / NAME, manifest)


def read_manifest(folder: Path) -> dict:
    """Read manifest.json of a prepared folder.

    Raises UserError that names the file if it is missing, damaged or of another version.
    """
    path, advice = folder / NAME, f"delete {folder} and prepare again"
    try:
        manifest: dict = read_json(path, advice=advice)
    except MissingFile:
        raise UserError(f"{path} does not exist: {folder} is not prepared data") from None
    version: Any = manifest.get("schema_version")
    if not _is(int, version):
        raise UserError(f"{path} has no schema_version; it is damaged; {advice}")
    if version not in (VERSION, WITHOUT_HASH):
        newer = f"update this program, or {advice}" if version > VERSION else advice
        raise UserError(f"{path} has schema version {str(version)[:20]}, not {VERSION}; {newer}")
    if OWN_HASH in manifest or version != WITHOUT_HASH:
        rest = {key: value for key, value in manifest.items() if key != OWN_HASH}
        if manifest.get(OWN_HASH) != _sha256_of_json(rest):
            raise UserError(f"{path} differs from the hash in it; it was changed or damaged; {advice}")
    if fault := next(_faults(manifest), None):
        raise UserError(f"{path}: {fault}; it is damaged; {advice}")
    return manifest


def _sha256_of_json(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _is(kind: type | tuple[type, ...], value: Any) -> bool:
    """Whether a JSON value has this type. A truth value is no number."""
    return isinstance(value, kind) and not isinstance(value, bool)


REQUIRED: dict[str, Any] = {"name": str, "source": dict, "vocab_size": int, "dtype": str, "splits": dict}
OR_NULL: dict[str, Any] = {
    "tokenizer": dict,
    "tokenizer_fingerprint": str,
    "eos_id": int,
    "unigram_entropy_nats": (int, float),
    "entropy_rate_nats": (int, float),
}
MASK = "mask"  # the format of a file that says for each token of a shard, in a byte, whether it counts as a target
BY_CONTEXT = "entropies_by_context_nats"  # see SyntheticSource; null or absent: not known
OF_A_SHARD: dict[str, Any] = {"file": str, "format": str, "dtype": str, "sha256": str} | dict.fromkeys(
    ("offset", "n_tokens", "size"), int
)


def _faults(manifest: dict) -> Iterator[str]:
    """Yield what is wrong with the shape of a manifest. Each check relies on the ones before it: ask for the first."""
    yield from _wrong_types(manifest, REQUIRED)
    yield from _wrong_types(manifest, OR_NULL, or_null=True)
    vocab_size, eos_id, tokenizer = manifest["vocab_size"], manifest["eos_id"], manifest["tokenizer"]
    if not 1 <= vocab_size <= MAX_VOCABULARY:
        yield f"vocab_size lies outside 1 to {MAX_VOCABULARY}"
    if manifest["dtype"] != smallest_dtype(vocab_size):
        yield f"dtype {manifest['dtype']!r} is not that of a vocabulary of {vocab_size}"
    if eos_id is not None and not 0 <= eos_id < vocab_size:
        yield f"eos_id lies outside the vocabulary of {vocab_size}"
    if (tokenizer is None) != (manifest["tokenizer_fingerprint"] is None):
        yield "one of tokenizer and tokenizer_fingerprint is null, and the other is not"
    if tokenizer is not None:
        yield from _wrong_types(tokenizer, {"kind": str}, "tokenizer.")
        for key in ("vocab_size", "eos_id"):
            if not _is(int, tokenizer.get(key)) or tokenizer[key] != manifest[key]:
                yield f"{key} is not the tokenizer's {key}"
        if not re.fullmatch("[0-9a-f]{16}", manifest["tokenizer_fingerprint"]):
            yield "tokenizer_fingerprint is not 16 hex digits"
    unigram, rate = manifest["unigram_entropy_nats"], manifest["entropy_rate_nats"]
    if unigram is not None and not 0 <= unigram <= math.log(vocab_size) + 1e-6:
        yield f"unigram_entropy_nats lies outside 0 to ln {vocab_size}"
    if rate is not None and not 0 <= rate <= math.log(vocab_size) + 1e-6:
        yield f"entropy_rate_nats lies outside 0 to ln {vocab_size}"
    by_context = manifest.get(BY_CONTEXT)  # absent in older manifests
    if by_context is not None and not (
        isinstance(by_context, list) and by_context and all(_is_entropy(x, vocab_size) for x in by_context)
    ):
        yield f"{BY_CONTEXT} holds no entropies from 0 to ln {vocab_size}"
    for split in SPLITS:
        yield from _faults_of_split(manifest["splits"].get(split), f"splits.{split}")
    sources = manifest.get("sources", {})  # of a mixture: the manifest of each, with its folder
    if not isinstance(sources, dict):
        yield "sources has a wrong type"
    for name, source in sources.items():
        if not isinstance(source, dict):
            yield f"sources.{name} is no object"
        yield from _wrong_types(source, {"folder": str}, f"sources.{name}.")
        yield from (f"sources.{name}: {fault}" for fault in _faults(source))
    if sources and any(
        len(manifest["splits"][split]["shards"]) != sum(len(one["splits"][split]["shards"]) for one in sources.values())
        for split in SPLITS
    ):
        yield "splits has other shards than its sources"


def _is_entropy(value: Any, vocab_size: int) -> bool:
    return _is((int, float), value) and -1e-9 <= value <= math.log(vocab_size) + 1e-6


def entries_of(record: dict) -> list[dict]:
    """The entries of the files of a split: each shard, and after it its mask if it has one."""
    return [entry for shard in record["shards"] for entry in (shard, shard.get(MASK)) if entry is not None]


def window_entropy_nats(manifest: dict, length: int) -> float | None:
    """The lowest mean loss on windows of `length` tokens and their targets; None where it is not known.

    The target after the i-th token of a window has i known tokens, so the first targets have a higher entropy than the
    rate.
    """
    by_context = manifest.get(BY_CONTEXT)
    if by_context is None:
        return None
    return sum(by_context[min(i, len(by_context) - 1)] for i in range(1, length + 1)) / length


def _faults_of_split(record: Any, name: str) -> Iterator[str]:
    if not isinstance(record, dict):
        yield f"{name} is missing"
    yield from _wrong_types(record, {"n_tokens": int, "shards": list}, f"{name}.")
    yield from _wrong_types(record, {"n_documents": int, "n_bytes": int}, f"{name}.", or_null=True)
    if "n_targets" in record:  # tokens that count as targets; absent where no shard has a mask
        yield from _wrong_types(record, {"n_targets": int}, f"{name}.")
    for key in ("n_documents", "n_bytes"):
        if record[key] is not None and record[key] < 0:
            yield f"{name}.{key} is negative"
    for number, shard in enumerate(record["shards"]):
        where = f"{name}.shards[{number}]"
        yield from _faults_of_shard(shard, where)
        if (mask := shard.get(MASK)) is not None:  # absent where each token counts
            yield from _faults_of_shard(mask, f"{where}.{MASK}")
            if [mask[key] for key in ("format", "dtype", "n_tokens")] != [MASK, "uint8", shard["n_tokens"]]:
                yield f"{where}.{MASK} is no byte for each token"
    if (n_targets := record.get("n_targets")) is not None and not 0 <= n_targets <= record["n_tokens"]:
        yield f"{name}.n_targets lies outside 0 to n_tokens"
    if not record["shards"] or record["n_tokens"] != sum(shard["n_tokens"] for shard in record["shards"]):
        yield f"{name}.n_tokens is not the sum over its shards"
    if record["n_documents"] is not None and record["n_documents"] > record["n_tokens"]:
        yield f"{name} has more documents than tokens"


def _faults_of_shard(shard: Any, where: str) -> Iterator[str]:
    if not isinstance(shard, dict):
        yield f"{where} is no object"
    yield from _wrong_types(shard, OF_A_SHARD, f"{where}.")
    if shard["dtype"] not in DTYPES:
        yield f"{where}.dtype is no type of token ids"
    if not re.fullmatch("[0-9a-f]{64}", shard["sha256"]):
        yield f"{where}.sha256 is not 64 hex digits"
    if not shard["file"] or "\0" in shard["file"] or not _encodes(shard["file"]):
        yield f"{where}.file is no name of a file"
    if shard["offset"] < 0 or shard["n_tokens"] < 1:
        yield f"{where} has no tokens, or a negative offset"
    if shard["size"] != shard["offset"] + shard["n_tokens"] * numpy_dtype(shard["dtype"]).itemsize:
        yield f"{where}: size is not that of n_tokens tokens after the offset"


def _encodes(name: str) -> bool:
    try:
        os.fsencode(name)
    except UnicodeEncodeError:
        return False
    return True


def _wrong_types(value: dict, types: dict[str, Any], prefix: str = "", or_null: bool = False) -> Iterator[str]:
    for key, kind in types.items():
        if key not in value:
            yield f"{prefix}{key} is missing"
        elif not (_is(kind, value[key]) or or_null and value[key] is None):
            yield f"{prefix}{key} has a wrong type"
