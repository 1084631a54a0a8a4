"""Stored targets: the likeliest next tokens by a teacher, for each position of the training sequences of a corpus.

A folder of targets has files of token ids and of log-probabilities, a part of the sequences each, and `manifest.json`,
which is written last. Targets are addressed by the number of a sequence, and a teacher reads one sequence at a time.
So they belong to one grid: the tokens of a corpus, the length of its sequences, and how it is cut into them.

The log-probabilities are fp16, rounded to nearest: log p has a relative error of at most 2^-11, so p has one of at most
|log p| / 2048, 0.3 % at p = 0.002.

Shapes in names: N sequences, T positions, K tokens.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from scaling_testbed.data.cutting import Cutting
from scaling_testbed.data.manifest import fingerprint_of, numpy_dtype, smallest_dtype
from scaling_testbed.data.shards import PreparedData, TokenStream, check_hashes, check_shape
from scaling_testbed.data.watched import WatchedTokens
from scaling_testbed.errors import UserError
from scaling_testbed.files import MissingFile, check_version, read_json, sha256_of, write_bytes, write_json

VERSION = 1
NAME = "manifest.json"
FOLDER = "targets"  # in the folder of the corpus
PART_BYTES = 1 << 26  # of the two files of a part, at most
GRID = ("data_fingerprint", "sequence_length", "packing", "document_masking")
IDS, LOG_P = "target_ids", "target_log_p"  # names of the arrays of a batch
ADVICE = "delete the folder and make it again by `analyze prepare_targets`"


def grid_of(data: PreparedData, length: int, cutting: Cutting) -> dict[str, Any]:
    """What decides the sequences of a corpus, by the names in GRID."""
    values = (data.fingerprint, length, cutting.packing, cutting.document_masking)
    return dict(zip(GRID, values, strict=True))


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The arrays of targets: n_sequences x length x top_k ids and log-probabilities, in parts of whole sequences."""

    n_sequences: int
    length: int
    top_k: int
    vocab_size: int

    @property
    def ids_dtype(self) -> str:
        return smallest_dtype(self.vocab_size)

    @property
    def values(self) -> int:
        """Ids of one sequence."""
        return self.length * self.top_k

    @property
    def n_bytes(self) -> int:
        """Bytes of all files but the manifest."""
        return self.n_sequences * self.values * self._bytes_each

    @property
    def _bytes_each(self) -> int:
        return numpy_dtype(self.ids_dtype).itemsize + 2

    def parts(self) -> list[range]:
        """The numbers of the sequences of each part."""
        each = max(1, PART_BYTES // (self.values * self._bytes_each))
        return [range(first, min(first + each, self.n_sequences)) for first in range(0, self.n_sequences, each)]


class Writer:
    """Writes targets into a folder, a part at a time. Parts of an earlier attempt that are whole are kept."""

    def __init__(self, folder: Path, layout: Layout):
        self.folder, self.layout = folder, layout
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot make the folder {folder}: {error.strerror}; give another place by --out") from None

    def missing(self) -> list[int]:
        """The places of the parts that are still to be written."""
        return [place for place, numbers in enumerate(self.layout.parts()) if not self._is_there(place, numbers)]

    def write(self, place: int, ids_NTK: np.ndarray, log_p_NTK: np.ndarray) -> None:
        """Write the part at `place`. Raises UserError that names the file if it cannot be written."""
        ids, log_p = self._paths(place)
        write_bytes(ids, ids_NTK.astype(numpy_dtype(self.layout.ids_dtype)).tobytes())
        write_bytes(log_p, log_p_NTK.astype("<f2").tobytes())

    def finish(self, about: Mapping[str, Any]) -> dict[str, Any]:
        """Write the manifest of all parts, and return it. about: the fields of `Targets.manifest` that say whose
        targets these are, and of which sequences."""
        files: dict[str, list[dict[str, Any]]] = {"ids": [], "log_p": []}
        mass = 0.0
        for place, numbers in enumerate(self.layout.parts()):
            count = len(numbers) * self.layout.values
            for kind, path in zip(files, self._paths(place), strict=True):
                entry = {"file": path.name, "n_values": count, "size": path.stat().st_size, "sha256": sha256_of(path)}
                files[kind].append(entry)
            mass += float(np.exp(np.fromfile(self._paths(place)[1], "<f2").astype(np.float64)).sum())
        shape = {"n_sequences": self.layout.n_sequences, "top_k": self.layout.top_k}
        shape |= {"vocab_size": self.layout.vocab_size}
        tail = max(0.0, 1 - mass / (self.layout.n_sequences * self.layout.length))
        content = {**about, **shape, "mean_tail": tail, "files": files}
        manifest = {"schema_version": VERSION, **content, "fingerprint": fingerprint_of(content)}
        write_json(self.folder / NAME, manifest)
        return manifest

    def _paths(self, place: int) -> tuple[Path, Path]:
        return self.folder / f"ids-{place:05}.bin", self.folder / f"log_p-{place:05}.bin"

    def _is_there(self, place: int, numbers: range) -> bool:
        """Whether both files have their size. A file is written whole or not at all."""
        values = len(numbers) * self.layout.values
        sizes = (values * numpy_dtype(self.layout.ids_dtype).itemsize, values * 2)
        paths = self._paths(place)
        return all(path.is_file() and path.stat().st_size == n for path, n in zip(paths, sizes, strict=True))


class Targets:
    """The targets in a folder.

    manifest: teacher (run_id, step, weights_sha256, n_params, n_tokens, flops), the grid of the sequences, temperature,
    top_k, n_sequences, precision, pass_flops of the pass of the teacher, and mean_tail, the mean probability outside
    the K tokens over all positions.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any]):
        self.folder, self.manifest = folder, manifest
        self.top_k, self.length = int(manifest["top_k"]), int(manifest["sequence_length"])
        self._ids, self._log_p = (self._stream(kind) for kind in ("ids", "log_p"))

    @property
    def fingerprint(self) -> str:
        return str(self.manifest["fingerprint"])

    def check_grid(self, grid: Mapping[str, Any]) -> None:
        """Raise UserError, which names the first difference, unless the targets are of these sequences."""
        for name in GRID:
            if self.manifest[name] != grid[name]:
                raise UserError(
                    f"the targets in {self.folder} are of other sequences: {name} is {self.manifest[name]} there and "
                    f"{grid[name]} in this run; a target belongs to the sequence that the teacher has read"
                )

    def of(self, source: str, numbers: np.ndarray) -> dict[str, np.ndarray]:
        """The token ids [N, T, K], int64, and their log-probabilities [N, T, K], fp16, the likeliest first, of the
        sequences with these numbers. Raises UserError if a file has changed."""
        values = self.length * self.top_k
        starts, shape = numbers * values, (len(numbers), self.length, self.top_k)
        bits = self._log_p.gather(starts, values).astype("<u2")
        return {IDS: self._ids.gather(starts, values).reshape(shape), LOG_P: bits.view("<f2").reshape(shape)}

    def _stream(self, kind: str) -> TokenStream:
        """One kind of files as one long sequence. Log-probabilities are read as the bits of fp16."""
        dtype = smallest_dtype(self.manifest["vocab_size"]) if kind == "ids" else "uint16"
        entries = self.manifest["files"][kind]
        paths = [self.folder / entry["file"] for entry in entries]
        for path, entry in zip(paths, entries, strict=True):
            check_shape(path, entry | {"format": "raw"})
        arrays = [
            WatchedTokens(path, {"sha256": entry["sha256"], "offset": 0, "dtype": dtype, "n_tokens": entry["n_values"]})
            for path, entry in zip(paths, entries, strict=True)
        ]
        return TokenStream(f"{kind} of {self.folder}", arrays)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a folder of targets. Raises UserError that names the file if it is missing, damaged or of a newer
    version."""
    path = folder / NAME
    try:
        found: dict[str, Any] = read_json(path, advice=ADVICE)
    except MissingFile:
        raise UserError(
            f"{folder} has no whole targets: it has no {NAME}; make them by `analyze prepare_targets`, which goes on "
            "where it was stopped"
        ) from None
    check_version(path, found.get("schema_version"), VERSION)
    content = {key: value for key, value in found.items() if key not in ("schema_version", "fingerprint")}
    if found.get("fingerprint") != fingerprint_of(content):
        raise UserError(f"{path} differs from the hash in it; it was changed or damaged; {ADVICE}")
    return found


def open_targets(folder: Path) -> Targets:
    """The targets in a folder. Sizes are checked, and hashes unless the unchanged file was checked before. Raises
    UserError that names a file which is missing, cut, replaced or changed."""
    targets = Targets(folder, read_manifest(folder))
    entries = [entry for kind in ("ids", "log_p") for entry in targets.manifest["files"][kind]]
    check_hashes(folder, [folder / entry["file"] for entry in entries], entries)
    return targets
