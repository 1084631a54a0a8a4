"""A user's own token files, read in place: .npy, llm.c, Megatron (.bin beside .idx), and files without a header.

Their preparation writes a manifest and copies no tokens. The type of the ids comes from a header or from data.dtype=.
The type of a file without a header is taken only if it is the only one in which all ids lie in the vocabulary.
"""

import hashlib
import os
import struct
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np

from scaling_testbed.data.manifest import MASK, numpy_dtype
from scaling_testbed.data.shards import HEADER_BYTES, HEADERS, SPLITS, parse_header
from scaling_testbed.data.sources.reading import Tally, check_places, expand, file_identity
from scaling_testbed.data.sources.source import SOURCES, Job, Source, token_record
from scaling_testbed.errors import ConfigError, UserError, check_choice, check_positive, first_line
from scaling_testbed.keys import ADDED_LATER, check_choices, key

ENDINGS = (".bin", ".npy")
FORMATS = ("auto", "nanogpt", "llmc", "megatron", "npy")
# Types that a file without a header may have. The second half is big-endian.
SAID = ("uint8", "uint16", "uint32", "int32", "int64", "uint16_be", "uint32_be", "int32_be", "int64_be")
# Types that are tried if none is said. Ids that fit are the same as int32 and as uint32. uint8 must be said. Floating
# point is never read; it is tried so that its halves are not taken for integers.
TRIED = ("uint16", "uint32", "int64", "uint16_be", "uint32_be", "int64_be", "float32", "float64")
MAX_VOCABULARY = 1 << 24
NPY_MAGIC = b"\x93NUMPY"
MEGATRON_MAGIC = b"MMIDIDX\x00\x00"
# llm.c, llmc/dataloader.h and train_gpt2.py: evaluation sets, models, and states of a test.
OTHER_LLMC = (20240522, 20240326, 20240327)
# The first bytes of files that hold no plain list of ids.
CONTAINERS = {
    b"PK\x03\x04": "a zip file, as .npz files and those of torch.save are",
    b"\x1f\x8b\x08": "a gzip file",
    b"\x28\xb5\x2f\xfd": "a zstandard file",
    b"\xfd7zXZ": "an xz file",
    b"PAR1": "a parquet file",
    b"ARROW1": "an Arrow file",
    b"\x89HDF": "an HDF5 file",
    b"MMIDIDX": "a Megatron index",
}
# Megatron-LM, megatron/core/datasets/indexed_dataset.py: the codes of integer types.
MEGATRON_DTYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16"}
BLOCK_BYTES = 1 << 25
WINDOW, ONE_PLACE_IN, MOST_WINDOWS, PIECE = 32, 64, 1 << 20, 1 << 16
FACTORS = (0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D, 0x27D4EB2F, 0x165667B1)  # of the hash that chooses places, as in xxHash
FACTOR = 0x9E3779B185EBCA87  # of the hash of a window


@SOURCES.register("token_files")
@dataclass(frozen=True, kw_only=True)
class TokenFilesConfig(Source):
    """Existing token files, read in place: .npy, llm.c, Megatron, and files without a header, as of nanoGPT."""

    name: str = "token_files"
    train: Any = key(None, "The .bin or .npy files of the train split: a glob, a folder, or a list of them.")
    validation: Any = key(None, "The files of the validation split.")
    format: str = key(
        "auto",
        "auto: Megatron where an .idx lies beside the .bin, .npy and llm.c where their magic number starts the file, "
        "else nanogpt. nanogpt: token ids without a header.",
        choices=FORMATS,
    )
    dtype: str | None = key(
        None,
        f"The type of the token ids in files without a header: {', '.join(SAID)} (_be: big-endian). null: the only one "
        "in which all ids lie in the vocabulary; where two do, the file is refused.",
        identity=ADDED_LATER,
    )
    vocab_size: int | None = key(None, "The vocabulary of the tokenizer that wrote the files. It must be given.")

    eos_id: int | None = key(
        None,
        "The token id that stands between two documents in the files; that of GPT-2 is 50256. null: it is not known, "
        "so documents cannot be told apart.",
        identity=ADDED_LATER,
    )

    masks: bool = key(
        False,
        "Whether beside each file FILE lies FILE.mask: for each of its tokens a byte, 1 where it is a target of the "
        "loss, and 0 where it is none.",
        identity=ADDED_LATER,
    )

    places: ClassVar[tuple[str, ...]] = ("train", "validation")

    @property
    def masked(self) -> bool:  # type: ignore[override]  # it depends on the keys here
        return self.masks

    def without_documents(self) -> list[str]:
        return [self.kind] if self.eos_id is None else []

    def __post_init__(self):
        check_choices(self)
        for name in SPLITS:
            check_places(name, getattr(self, name))
        check_positive("vocab_size", self.vocab_size)
        if self.vocab_size is not None and self.vocab_size > MAX_VOCABULARY:
            raise ConfigError(f"vocab_size must be at most {MAX_VOCABULARY}, got {self.vocab_size}")
        if self.dtype is not None:
            check_choice("dtype", self.dtype, SAID)
        if self.eos_id is not None and not 0 <= self.eos_id < (self.vocab_size or MAX_VOCABULARY):
            raise ConfigError(f"eos_id must lie in the vocabulary of {self.vocab_size}, got {self.eos_id}")

    def paths(self, split: str, tally: Tally | None = None) -> list[str]:
        """The files of a split, sorted. If a glob matches an .idx file, its .bin file is taken."""
        for field in ("train", "validation", "vocab_size"):
            if getattr(self, field) is None:
                raise ConfigError(f"data.{field} must be given for data=token_files")
        found = expand(f"data.{split}", getattr(self, split), tally, (*ENDINGS, ".idx"))
        taken = {path[:-4] + ".bin" if path.endswith(".idx") else path for path in found}
        if other := sorted(path for path in taken if not path.lower().endswith(ENDINGS)):
            raise UserError(f"data.{split}: {other[0]} is not a .bin or .npy file of tokens")
        return sorted(taken)

    def identity(self) -> dict:
        """The files by path, size and time. The tokenizer is not part of the identity."""
        paths = {split: self.paths(split) for split in SPLITS}
        files = {split: file_identity(found, "/") for split, found in paths.items()}
        trained_on = {os.path.realpath(path) for path in paths["train"]}
        if both := [path for path in paths["validation"] if os.path.realpath(path) in trained_on]:
            raise ConfigError(f"data.validation must not be in data.train too: {both[0]}")
        record: dict[str, Any] = {
            "kind": self.kind,
            "format": self.format,
            "vocab_size": self.vocab_size,
            **files,
        }
        if self.dtype is not None:
            record["dtype"] = self.dtype
        elif self.format in ("auto", "nanogpt"):
            record["type"] = "the only one"  # folders of earlier versions, which took all for uint16, are made again
        if self.eos_id is not None:
            record["eos_id"] = self.eos_id
        if self.masks:
            record["masks"] = {split: file_identity(list(map(mask_of, found)), "/") for split, found in paths.items()}
        return record

    def inputs(self) -> dict[str, list[str]]:
        found = {split: self.paths(split) for split in SPLITS}
        if self.masks:
            found |= {f"{split} masks": list(map(mask_of, paths)) for split, paths in found.items()}
        return found

    def files_left_out(self) -> Tally:
        tally = Tally()
        for split in SPLITS:
            self.paths(split, tally)
        return tally

    def prepare(self, job: Job) -> dict:
        """Read every file once, for its hash and the range of its ids. The files stay in place."""
        tally = Tally()
        paths = {split: self.paths(split, tally) for split in SPLITS}
        assert self.vocab_size is not None, "`paths` raises without it"
        layouts = {
            path: probe(path, self.format, self.dtype, self.vocab_size) for split in SPLITS for path in paths[split]
        }
        if self.dtype is not None and all(layout.format != "nanogpt" for layout in layouts.values()):
            for path in [path for path in layouts if layouts[path].dtype != self.dtype]:
                said = f"its header says {layouts[path].dtype}, not data.dtype={self.dtype}"
                raise UserError(f"{path}: {said}; leave data.dtype out")
        _check_that_splits_differ(paths, layouts)
        job.start(sum(layout.size for layout in layouts.values()))
        windows = Windows(ids for path in paths["validation"] for ids in _ids(path, layouts[path]))
        splits, train_counts, has_eos = {}, np.zeros(self.vocab_size, dtype=np.int64), False
        for split in SPLITS:
            shards, n_targets = [], 0
            for path in paths[split]:
                look = windows.look_at if split == "train" else None
                entry, counts = scan(path, layouts[path], self.vocab_size, look)
                shards.append(entry)
                has_eos |= split == "train" and self.eos_id is not None and counts[self.eos_id] > 0
                if self.masks:
                    entry[MASK], counts = scan_mask(path, layouts[path], self.vocab_size)
                    n_targets += int(counts.sum())
                train_counts += counts * (split == "train")
                job.advance(entry["size"])
            documents = [n for path in paths[split] if (n := layouts[path].n_documents) is not None]
            n_documents = sum(documents) if len(documents) == len(shards) else None
            n_tokens = sum(shard["n_tokens"] for shard in shards)
            masked = {"n_targets": n_targets} if self.masks else {}
            splits[split] = {**token_record(n_tokens, n_documents), **masked, "shards": shards}
        n_found = len(layouts) + tally.n_files
        reading = {"found": n_found, **tally.as_dict()}
        if self.eos_id is not None and not has_eos:
            raise UserError(f"data.eos_id={self.eos_id} is in no file of data.train; give the id that ends a document")
        return self.manifest(splits, train_counts, eos_id=self.eos_id, reading=reading, documents=windows.as_dict())


class Layout(NamedTuple):
    """Where the ids of a token file are. dtype: a name in data.manifest.DTYPES; offset: bytes before the first id."""

    format: str
    dtype: str
    offset: int
    n_tokens: int
    n_documents: int | None = None

    @property
    def size(self) -> int:
        """The size of the file in bytes."""
        return self.offset + self.n_tokens * numpy_dtype(self.dtype).itemsize


def probe(path: str, format: str, dtype: str | None, vocab_size: int) -> Layout:
    """The layout of a token file.

    Raises UserError that names the file if it has another format or type than was said, if its header and its size
    disagree, or if its type is not known.
    """
    try:
        size = os.path.getsize(path)
        with open(path, "rb") as file:
            first = file.read(HEADER_BYTES)
        if not first:
            raise UserError(f"{path}: empty file, no tokens")
        index = Path(path).with_suffix(".idx")
        found = _format_of(path, first, index, format)
        if found == "nanogpt":
            return _probe_headerless(path, size, dtype, vocab_size)
        layout = {"npy": _probe_npy, "llmc": _probe_llmc, "megatron": _probe_megatron}[found](path, size)
    except OSError as error:
        raise UserError(f"{error.filename or path}: cannot be read ({error.strerror})") from None
    return layout


def _format_of(path: str, first: bytes, index: Path, format: str) -> str:
    """The format of a file, from its first bytes. Raises UserError if it is not the one that was said, or not known."""
    found = None
    magic, swapped = (struct.unpack(order, first[:4].ljust(4, b"\0"))[0] for order in ("<i", ">i"))
    llmc = [known for known, _ in HEADERS.values()]
    if first.startswith(NPY_MAGIC):
        found = "npy"
    elif magic in llmc:
        found = "llmc"
    if format == "auto" and index.exists():
        return "megatron"
    if found is not None and format not in ("auto", found):
        raise UserError(f"{path}: its header is that of data.format={found}, not of data.format={format}")
    if format == "auto" and found is None:
        if magic in OTHER_LLMC or swapped in (*OTHER_LLMC, *llmc):
            raise UserError(f"{path}: its header is that of another file of llm.c (magic {magic}), not of token ids")
        if len(first) == HEADER_BYTES and any(first[:12]) and not any(first[12:]):
            raise UserError(
                f"{path}: it starts as a file of llm.c does, but with a wrong magic {magic}; was it damaged? Without a "
                "header, set data.format=nanogpt"
            )
        if b"'descr'" in first[:20]:
            raise UserError(f"{path}: not a .npy file (its magic is damaged); write it again")
        if what := next((what for magic, what in CONTAINERS.items() if first.startswith(magic)), None):
            raise UserError(f"{path}: it is {what}, not a list of token ids; write the ids as .npy")
        if path.endswith(".npy"):
            raise UserError(f"{path}: it does not start as a .npy file does; set data.format, or rename it to .bin")
    return found or ("nanogpt" if format == "auto" else format)


def _probe_headerless(path: str, size: int, dtype: str | None, vocab_size: int) -> Layout:
    """The layout of a file without a header: of the type that was said, or of the only type that is possible."""
    tried = (dtype,) if dtype is not None else TRIED
    left = [name for name in tried if size % numpy_dtype(name).itemsize == 0]
    if not left:
        raise UserError(f"{path}: {size} bytes is not a list of {' or '.join(tried[:3])} tokens; was it cut?")
    outside: dict[str, str] = {}
    if dtype is None:
        for block in _blocks(path, 0, size):
            for name in left:
                ids = np.frombuffer(block, numpy_dtype(name))
                with np.errstate(invalid="ignore"):  # no comparison with NaN holds
                    wrong = ~((ids >= 0) & (ids < vocab_size) & (ids == np.trunc(ids)))
                if ids.dtype.kind == "f":  # a processor that flushes denormal numbers takes them for zero
                    wrong |= (ids < 1) & (ids.view(f"u{ids.itemsize}") != 0)
                if wrong.any():
                    outside[name] = f"token id {ids[wrong][0]} is outside data.vocab_size={vocab_size}, read as {name}"
            left = [name for name in left if name not in outside]
            if len(left) < 2:  # `scan` looks at the rest of the file
                break
    if not left:
        first = next(iter(outside.values()))
        raise UserError(
            f"{path}: {first}, and no other type fits; a wrong data.vocab_size, or a header that is not known?"
        )
    if len(left) > 1 or left[0] not in SAID and dtype is None:
        counts = " or ".join(f"{size // numpy_dtype(name).itemsize:,} ids of {name}" for name in left)
        raise UserError(
            f"{path}: it has no header, and below data.vocab_size={vocab_size} it can be {counts}; type "
            f"data.dtype= with the right one{', or write them as integers' * ('float' in counts)}"
        )
    return Layout("nanogpt", left[0], 0, size // numpy_dtype(left[0]).itemsize)


def _probe_llmc(path: str, size: int) -> Layout:
    dtype, n_tokens = parse_header(path)
    layout = Layout("llmc", dtype, HEADER_BYTES, n_tokens)
    if size != layout.size or n_tokens < 1:
        raise UserError(f"{path}: {size} bytes, but its header announces {n_tokens} tokens ({layout.size} bytes)")
    return layout


def _probe_npy(path: str, size: int) -> Layout:
    """Read the header of a .npy file by NumPy. Its array must have one dimension of integers."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            array = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # NumPy parses the header as Python text, which fails in many ways
        raise UserError(f"{path}: not a .npy file of token ids ({first_line(error)})") from None
    if array.dtype.kind not in "iu":
        raise UserError(f"{path}: it holds {array.dtype.name}, not integers; write the ids as integers")
    if array.ndim != 1:
        raise UserError(f"{path}: it has the shape {array.shape}; write the ids in one dimension, by reshape(-1)")
    dtype = array.dtype.name + ("_be" if array.dtype.newbyteorder("<") != array.dtype else "")
    layout = Layout("npy", dtype, array.offset, len(array))
    if size != layout.size or not layout.n_tokens:
        raise UserError(
            f"{path}: {size} bytes, but its header announces {layout.n_tokens} tokens ({layout.size} bytes)"
        )
    return layout


def _probe_megatron(path: str, size: int) -> Layout:
    """Read the .idx file: magic, version, type code, counts, the length and byte offset of each sequence, and the
    document borders. The sequences must lie one after the other, as Megatron's own tool writes them."""
    index = Path(path).with_suffix(".idx")
    try:
        raw = index.read_bytes()
    except OSError:
        raise UserError(f"{index}: needed beside {path} for the Megatron format, but cannot be read") from None
    if raw[:9] != MEGATRON_MAGIC:
        raise UserError(f"{index}: wrong magic; not a Megatron index. Without it, {path} is read as a list of ids")
    try:
        version, code, n_sequences, n_borders = struct.unpack_from("<QBQQ", raw, 9)
        lengths = np.frombuffer(raw, "<i4", n_sequences, 34)
        pointers = np.frombuffer(raw, "<i8", n_sequences, 34 + 4 * n_sequences)
        borders = np.frombuffer(raw, "<i8", n_borders, 34 + 12 * n_sequences)
    except (struct.error, ValueError, OverflowError):
        raise UserError(f"{index}: cut short; {len(raw)} bytes do not hold what its header announces") from None
    if len(raw) - 34 - 12 * n_sequences - 8 * n_borders not in (0, n_sequences):  # a byte of mode for each sequence
        raise UserError(f"{index}: {len(raw)} bytes, but its header announces {n_sequences} sequences")
    if version != 1 or code not in MEGATRON_DTYPES:
        raise UserError(f"{index}: version {version} with type code {code} is not supported")
    width = np.dtype(MEGATRON_DTYPES[code]).itemsize
    n_tokens = int(lengths.sum(dtype=np.int64))
    if n_tokens * width != size:
        raise UserError(f"{path}: {size} bytes, but {index.name} announces {n_tokens} tokens of {width} bytes")
    expected = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)[:-1]]) * width if n_sequences else pointers
    if not np.array_equal(pointers, expected) or lengths.min() < 0:
        raise UserError(f"{index}: sequences do not lie one after the other in {path}; rewrite it with Megatron's tool")
    if n_borders and (borders[0] < 0 or borders[-1] > n_sequences or (np.diff(borders) < 0).any()):
        raise UserError(f"{index}: its document borders are out of order; rewrite it with Megatron's tool")
    return Layout("megatron", MEGATRON_DTYPES[code], 0, n_tokens, max(0, n_borders - 1))


def _blocks(path: str, start: int, n_bytes: int) -> Iterator[bytes]:
    """Yield `n_bytes` of a file from `start` on, in whole ids. Raises UserError if the file ends before."""
    with open(path, "rb") as file:
        file.seek(start)
        while n_bytes > 0:
            block = file.read(min(BLOCK_BYTES, n_bytes))
            if len(block) < min(BLOCK_BYTES, n_bytes):
                raise UserError(f"{path}: the file was cut while it was read; run the command again")
            yield block
            n_bytes -= len(block)


def _check_that_splits_differ(paths: dict[str, list[str]], layouts: dict[str, Layout]) -> None:
    """Raise UserError if a validation file, or all of them together, hold the same ids as a training file or all."""

    def hash_of(files: tuple[str, ...]) -> str:
        if files not in hashes:
            ids = hashlib.sha256()
            for file in files:
                layout = layouts[file]
                for block in _ids(file, layout):
                    ids.update(block.astype("<i8").tobytes())
            hashes[files] = ids.hexdigest()
        return hashes[files]

    hashes: dict[tuple[str, ...], str] = {}
    parts = {split: [tuple(found), *((path,) for path in found)] for split, found in paths.items()}
    for held_out in parts["validation"]:
        for trained in parts["train"]:
            lengths = [sum(layouts[path].n_tokens for path in files) for files in (held_out, trained)]
            if lengths[0] == lengths[1] and hash_of(held_out) == hash_of(trained):
                names = " and ".join(files[0] if len(files) == 1 else "all files" for files in (held_out, trained))
                raise UserError(
                    f"data.validation and data.train hold the same {lengths[0]:,} token ids ({names}); "
                    "the validation loss would be a training loss; give other data.validation files"
                )


def _ids(path: str, layout: Layout) -> Iterator[np.ndarray]:
    """Yield the ids of a token file in blocks."""
    for block in _blocks(path, layout.offset, layout.size - layout.offset):
        yield np.frombuffer(block, numpy_dtype(layout.dtype))


class Windows:
    """A sample of the places of the validation ids, and which of them are in the training ids.

    A place is a window of WINDOW ids. Its first ids decide whether it is in the sample, one place in ONE_PLACE_IN, so
    that a part of the training file is found wherever it begins.
    """

    def __init__(self, validation: Iterable[np.ndarray]):
        hashes = [_window_hashes(ids) for ids in validation]
        self._hashes = np.unique(np.concatenate(hashes))[:MOST_WINDOWS]
        self._found = np.zeros(len(self._hashes), dtype=bool)

    def look_at(self, ids: np.ndarray) -> None:
        """Look for the validation windows in training ids."""
        if len(self._hashes):
            hashes = _window_hashes(ids)
            at = np.minimum(np.searchsorted(self._hashes, hashes), len(self._hashes) - 1)
            self._found[at[self._hashes[at] == hashes]] = True

    def as_dict(self) -> dict:
        """The counts for the manifest."""
        counts = {"": len(self._hashes), "_in_train": int(self._found.sum())}
        return {f"sampled_validation_windows{which}": count for which, count in counts.items()}


def _window_hashes(ids: np.ndarray) -> np.ndarray:
    """Hashes of the windows in the sample."""
    found = [np.zeros(0, np.uint64)]
    for first in range(0, len(ids) - WINDOW + 1, PIECE):  # pieces that fit the processor's cache
        words = ids[first : first + PIECE + WINDOW - 1].astype(np.uint32)
        n_windows = len(words) - WINDOW + 1
        start = words[:n_windows] * np.uint32(FACTORS[0])
        for place in (1, 2, 3):
            start += words[place : place + n_windows] * np.uint32(FACTORS[place])
        start *= np.uint32(FACTORS[4])
        chosen = np.flatnonzero(start < (1 << 32) // ONE_PLACE_IN)
        hashes = np.zeros(len(chosen), np.uint64)
        for place in range(WINDOW):  # arithmetic modulo 2**64
            hashes *= np.uint64(FACTOR)
            hashes += words[chosen + place]
        found.append(hashes)
    return np.concatenate(found)


def scan(
    path: str, layout: Layout, vocab_size: int, look: Callable[[np.ndarray], None] | None = None
) -> tuple[dict, np.ndarray]:
    """Read a token file once. Return its manifest entry and the counts of each id. look: is called with all ids.

    Raises UserError if an id is outside the vocabulary.
    """
    content, counts = hashlib.sha256(), np.zeros(vocab_size, dtype=np.int64)
    for block in _blocks(path, 0, layout.offset):
        content.update(block)
    for block in _blocks(path, layout.offset, layout.size - layout.offset):
        content.update(block)
        ids = np.frombuffer(block, numpy_dtype(layout.dtype))
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= vocab_size:
            raise UserError(
                f"{path}: token id {low if low < 0 else high} is outside data.vocab_size={vocab_size}, read as "
                f"{layout.dtype}; a wrong data.format, data.dtype or data.vocab_size?"
            )
        counts += np.bincount(ids.astype(np.int64, copy=False), minlength=vocab_size)
        if look is not None:
            look(ids)
    if os.path.getsize(path) != layout.size:
        raise UserError(f"{path}: the file grew while it was read; run the command again")
    entry = {"file": path, "format": layout.format, "dtype": layout.dtype, "offset": layout.offset}
    return {**entry, "n_tokens": layout.n_tokens, "size": layout.size, "sha256": content.hexdigest()}, counts


def mask_of(path: str) -> str:
    """The path of the mask of a token file. Raises UserError if there is none."""
    found = f"{path}.mask"
    if not os.path.isfile(found):
        raise UserError(f"{found}: needed beside {path} because of data.masks=true, but there is no such file")
    return found


def scan_mask(path: str, layout: Layout, vocab_size: int) -> tuple[dict, np.ndarray]:
    """Read the mask of a token file once. Return its manifest entry, and the counts of each id among the targets.

    Raises UserError that names the mask if it has not a byte for each token, or one that is neither 0 nor 1.
    """
    file, content, counts = mask_of(path), hashlib.sha256(), np.zeros(vocab_size, dtype=np.int64)
    if (size := os.path.getsize(file)) != layout.n_tokens:
        raise UserError(f"{file}: {size:,} bytes, but {path} has {layout.n_tokens:,} tokens; write a byte for each")
    start = 0
    for ids in _ids(path, layout):
        mask = np.concatenate([np.frombuffer(block, np.uint8) for block in _blocks(file, start, len(ids))])
        if mask.max(initial=0) > 1:
            raise UserError(f"{file}: a byte is {mask.max()}; write 1 where a token is a target of the loss, else 0")
        content.update(mask.tobytes())
        counts += np.bincount(ids[mask == 1].astype(np.int64, copy=False), minlength=vocab_size)
        start += len(ids)
    entry = {"file": file, "format": MASK, "dtype": "uint8", "offset": 0}
    return {**entry, "n_tokens": layout.n_tokens, "size": size, "sha256": content.hexdigest()}, counts
