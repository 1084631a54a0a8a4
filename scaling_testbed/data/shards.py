"""Token files (shards) and the folders that hold them.

A shard is one `.bin` file in the format of llm.c: a header of 256 int32 (magic, version, number of tokens, zeros), then
the token ids in uint16 or uint32. Beside it may lie a mask: a `.mask` file with a byte for each token, 1 where it is a
target of the loss and 0 where it is none. A prepared folder holds shards and `manifest.json`, which is
written last. When a folder is opened, the size and header of every file are checked. The sha256 of a file is checked
unless the unchanged file was checked before.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from scaling_testbed.data.manifest import (
    MASK,
    SPLITS,
    entries_of,
    fingerprint_of,
    read_manifest,
)
from scaling_testbed.data.watched import WatchedTokens, state_of
from scaling_testbed.errors import UserError, first_line
from scaling_testbed.files import read_json, sha256_of_input, write_json

SCHEMA_VERSION = 1  # of the shards; part of the name of a prepared folder
HEADER_BYTES = 256 * 4
# llm.c, dev/data/data_common.py: (magic, version) of GPT-2 and of Llama-3 token files.
HEADERS = {"uint16": (20240520, 1), "uint32": (20240801, 7)}


def header_bytes(dtype: str, n_tokens: int) -> bytes:
    """The header of a shard: the 1024 bytes before the tokens."""
    header = np.zeros(256, dtype="<i4")
    header[:3] = (*HEADERS[dtype], n_tokens)
    return header.tobytes()


def parse_header(path: str | Path) -> tuple[str, int]:
    """Return (dtype, n_tokens) from a shard's header. Raises UserError if the header is not that of a shard."""
    try:
        with open(path, "rb") as file:
            raw = file.read(HEADER_BYTES)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    if len(raw) < HEADER_BYTES:
        raise UserError(f"{path}: {len(raw)} bytes is too short for a token shard's header")
    magic, version, n_tokens = (int(value) for value in np.frombuffer(raw, dtype="<i4", count=3))
    for dtype, expected in HEADERS.items():
        if (magic, version) == expected:
            return dtype, n_tokens
    raise UserError(f"{path}: wrong magic {magic} version {version}; not a token shard (20240520 or 20240801)")


class TokenStream:
    """The tokens of one split as one long sequence over its shards. They are read when they are needed, and threads may
    read them.

    n_bytes: number of bytes of the text (EOS adds none); None if the source has no text. eos_id: the token that ends a
    document; None if there is none. masks: of each shard, not 0 where a token counts as a target; None for a shard
    whose tokens all count. is_masked: whether a shard has one.
    """

    def __init__(
        self,
        label: str,
        arrays: Sequence[np.ndarray | WatchedTokens],
        n_bytes: int | None = None,
        eos_id: int | None = None,
        masks: Sequence[np.ndarray | WatchedTokens | None] = (),
    ):
        self.label, self.n_bytes, self.eos_id = label, n_bytes, eos_id
        self.arrays, self.masks = arrays, list(masks) or [None] * len(arrays)
        self.is_masked = any(mask is not None for mask in self.masks)
        self._counted = [
            np.broadcast_to(np.uint8(1), len(array)) if mask is None else mask
            for array, mask in zip(arrays, self.masks, strict=True)
        ]
        self._ends = np.cumsum([len(array) for array in arrays], dtype=np.int64)
        self.n_tokens = int(self._ends[-1]) if arrays else 0

    def read(self, start: int, length: int) -> np.ndarray:
        """Tokens [start, start + length). Raises IndexError beyond the ends, and UserError if a file has changed."""
        return self._read(self.arrays, start, length)

    def counted(self, start: int, length: int) -> np.ndarray:
        """Whether each of the tokens [start, start + length) counts as a target, bool [length]; raises as `read`."""
        return self._read(self._counted, start, length) != 0

    def _read(self, arrays: Sequence[np.ndarray | WatchedTokens], start: int, length: int) -> np.ndarray:
        if start < 0 or length < 0 or start + length > self.n_tokens:
            raise IndexError(f"{self.label}: tokens {start} to {start + length} of {self.n_tokens}")
        shard = int(np.searchsorted(self._ends, start, side="right"))
        parts = []
        while length > 0:
            array = arrays[shard]
            at = start - (int(self._ends[shard]) - len(array))
            part = array[at : at + length]
            parts.append(part)
            start, length, shard = start + len(part), length - len(part), shard + 1
        if not parts:
            return np.empty(0, dtype=np.int64)
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def gather(self, starts: np.ndarray, length: int) -> np.ndarray:
        """Rows of `length` tokens at each start, int64 [len(starts), length]. Raises UserError if a file changed."""
        return self._gather(self.arrays, starts, length)

    def gather_counted(self, starts: np.ndarray, length: int) -> np.ndarray:
        """Whether each of the tokens that `gather` gives counts as a target, bool [len(starts), length]."""
        return self._gather(self._counted, starts, length) != 0

    def _gather(self, arrays: Sequence[np.ndarray | WatchedTokens], starts: np.ndarray, length: int) -> np.ndarray:
        rows = np.empty((len(starts), length), dtype=np.int64)
        if len(arrays) == 1:
            for row, start in zip(rows, starts.tolist(), strict=True):
                row[:] = arrays[0][start : start + length]
        else:
            for row, start in zip(rows, starts.tolist(), strict=True):
                row[:] = self._read(arrays, start, length)
        return rows

    def check(self) -> None:
        """Raise UserError if a file of this stream is not the one that was opened."""
        for array in (*self.arrays, *self.masks):
            if isinstance(array, WatchedTokens):
                array.check()


@dataclass(frozen=True)
class PreparedData:
    """An opened folder of shards.

    Fingerprints depend on the tokens and the tokenizer, and not on names, paths or times. `tokenizer_fingerprint` is
    None if the source has no tokenizer.
    """

    folder: Path
    manifest: dict
    train: TokenStream
    validation: TokenStream

    @property
    def vocab_size(self) -> int:
        return self.manifest["vocab_size"]

    @property
    def tokenizer_fingerprint(self) -> str | None:
        return self.manifest["tokenizer_fingerprint"]

    def stray_shards(self) -> list[str]:
        """Names of token files and masks in the folder that the manifest does not name. They are not read."""
        named = {entry["file"] for entry in _files(self.manifest)}
        there = [*self.folder.glob("*.bin"), *self.folder.glob("*.mask")]
        return sorted(path.name for path in there if path.name not in named)

    @property
    def text_lost(self) -> str | None:
        """How the tokenizer loses text, so that bits per byte means nothing. None if it loses none, or if an earlier
        version prepared the corpus, which did not look."""
        return (self.manifest.get("text_check") or {}).get("lost")

    @property
    def why_no_bits(self) -> str | None:
        """Why a loss on the validation split says nothing of its bytes of text; None if it does, or if there is no
        text."""
        record = self.manifest["splits"]["validation"]
        if record["n_bytes"] is None:
            return None
        if (n_targets := record.get("n_targets", record["n_tokens"])) < record["n_tokens"]:
            left_out = record["n_tokens"] - n_targets
            return f"{left_out:,} of {record['n_tokens']:,} validation tokens are no targets"
        return self.text_lost

    @property
    def fingerprint(self) -> str:
        return data_fingerprint(self.manifest)

    def sources(self) -> dict[str, "PreparedData"]:
        """The corpora that a mixture is made of, by name, over the same open files; empty for all others."""
        found, at = {}, dict.fromkeys(SPLITS, 0)
        for name, manifest in self.manifest.get("sources", {}).items():
            folder, streams = _beside(self.folder, manifest["folder"]), {}
            for split in SPLITS:
                record, whole = manifest["splits"][split], getattr(self, split)
                here = slice(at[split], at[split] + len(record["shards"]))
                at[split] = here.stop
                streams[split] = TokenStream(
                    f"{split} split of {folder}",
                    whole.arrays[here],
                    record["n_bytes"],
                    manifest["eos_id"],
                    whole.masks[here],
                )
            found[name] = PreparedData(folder, manifest, **streams)
        return found

    def check(self) -> None:
        """Raise UserError if a file is not the one that was opened: it was changed, cut, replaced or removed."""
        self.train.check()
        self.validation.check()


def data_fingerprint(manifest: dict) -> str:
    """The fingerprint of the tokens and the tokenizer that a manifest describes. That of a mixture has the names of its
    sources too, because weights name them."""
    if sources := manifest.get("sources"):
        return fingerprint_of({name: data_fingerprint(source) for name, source in sources.items()})
    content: list[Any] = [manifest["vocab_size"], manifest["tokenizer_fingerprint"]]
    for split in SPLITS:
        content.append([_same_tokens(shard) for shard in manifest["splits"][split]["shards"]])
    return fingerprint_of(content)


def _same_tokens(shard: dict) -> list[Any]:
    """Values of a shard's entry that decide its tokens, and which of them count as targets. The number of tokens says
    how wide an id is."""
    order = [shard["dtype"]] if shard["dtype"].endswith("_be") else []
    mask = [] if shard.get(MASK) is None else [{MASK: shard[MASK]["sha256"]}]
    return [shard["sha256"], shard["n_tokens"], shard["offset"], *order, *mask]


def _files(manifest: dict) -> list[dict]:
    """The entries of all files of a prepared folder."""
    return [entry for split in SPLITS for entry in entries_of(manifest["splits"][split])]


def open_prepared(folder: Path | str, verify: bool = True) -> PreparedData:
    """Open a prepared folder.

    Sizes and headers are always checked. With `verify` the sha256 of each shard is checked too. A check is remembered
    with the file's size, times and inode, so that only the first opening reads all files. Raises UserError that names a
    file which is missing, replaced, truncated or changed. Files that the manifest does not name are ignored.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    entries = _files(manifest)
    paths = [_shard_path(folder, entry) for entry in entries]
    if len(set(paths)) < len(paths):
        raise UserError(f"{folder / 'manifest.json'} names a shard twice; delete {folder} and prepare again")
    for path, entry in zip(paths, entries, strict=True):
        check_shape(path, entry)
    streams = {}
    for split in SPLITS:
        record = manifest["splits"][split]
        arrays = [WatchedTokens(_shard_path(folder, entry), entry) for entry in record["shards"]]
        masks = [
            None if (mask := entry.get(MASK)) is None else WatchedTokens(_shard_path(folder, mask), mask)
            for entry in record["shards"]
        ]
        streams[split] = TokenStream(f"{split} split of {folder}", arrays, record["n_bytes"], manifest["eos_id"], masks)
    if verify:  # after the files were opened, so that a change since then is noticed
        check_hashes(folder, paths, entries)
    return PreparedData(folder, manifest, **streams)


def changed_shard(folder: Path, manifest: dict) -> str | None:
    """How a shard of a prepared folder differs from its manifest; None if none does.

    Only a shard that has another size, or another state than when it was checked, is read. A shard that is gone, or was
    never checked here, is left out.
    """
    entries = _files(manifest)
    there = [(path, entry) for entry in entries if (path := _shard_path(folder, entry)).exists()]
    try:
        for path, entry in there:
            check_shape(path, entry)
        check_hashes(folder, [path for path, _ in there], [entry for _, entry in there], only_known=True)
    except UserError as error:
        return first_line(error)
    return None


def _shard_path(folder: Path, entry: dict) -> Path:
    """The path of a shard. Prepared shards lie in the folder itself, and those of a mixture in folders beside it. A
    user's own token files have absolute paths."""
    path = Path(entry["file"])
    if path.parts[:1] == ("..",) and len(path.parts) == 3 and path.parts[1] != "..":
        return _beside(folder, path.parts[1]) / path.name
    if not path.is_absolute() and path.name != entry["file"]:
        raise UserError(f"{folder / 'manifest.json'}: {entry['file']!r} lies outside the folder")
    return folder / path


def _beside(folder: Path, name: str) -> Path:
    """The folder `name` beside `folder`, also where `folder` is a link or the current folder."""
    return (folder.parent if folder.name else folder.absolute().parent) / name


def check_shape(path: Path, entry: dict) -> None:
    """Raise UserError if a file has not the size, or a shard not the header, of its entry in a manifest."""
    try:
        size = path.stat().st_size
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}, but the manifest names it; prepare again") from None
    if size != entry["size"]:
        raise UserError(f"{path}: {size} bytes, but {entry['size']} in the manifest; the file was cut or replaced")
    if entry["format"] == "llmc":
        found = (*parse_header(path), HEADER_BYTES)
        if found != (wanted := (entry["dtype"], entry["n_tokens"], entry["offset"])):
            raise UserError(f"{path}: header says {found}, the manifest {wanted}; the file was replaced")


def check_hashes(folder: Path, paths: list[Path], entries: list[dict], only_known: bool = False) -> None:
    """Raise UserError for a shard with another hash. only_known: leave out those that were never checked."""
    cache_path = folder / ".verified.json"
    known = {}
    with suppress(UserError):  # a damaged memory is as good as none
        known = read_json(cache_path)
    states = [[*state_of(path.stat())] for path in paths]
    wanted = [[*state, entry["sha256"]] for state, entry in zip(states, entries, strict=True)]
    names = [str(path.absolute()) for path in paths]
    checked = [i for i, name in enumerate(names) if name in known or not only_known]
    stale = [i for i in checked if known.get(names[i]) != wanted[i]]
    if not stale:
        return
    with ThreadPoolExecutor(min(8, len(stale))) as pool:  # hashing releases the interpreter lock
        for i, found in zip(stale, pool.map(sha256_of_input, [paths[i] for i in stale]), strict=True):
            if found != entries[i]["sha256"]:
                raise UserError(f"{paths[i]}: sha256 differs from the manifest; the file was changed or replaced")
    with suppress(UserError):  # the files of a read-only folder are hashed at each opening
        write_json(cache_path, {names[i]: wanted[i] for i in checked})
