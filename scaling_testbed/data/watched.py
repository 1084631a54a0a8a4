"""The tokens of one file, read while the file is watched.

The bytes are read by pread and not through a memory map: a process that touches a mapped page beyond the new end of a
file that was cut is killed by SIGBUS. After each read the state of the file is compared with its state when it was
opened, so that no token of a file that was overwritten in place reaches a batch.
"""

import functools
import hashlib
import itertools
import os
from pathlib import Path
from typing import Any

import numpy as np

from scaling_testbed.data.manifest import numpy_dtype
from scaling_testbed.errors import UserError

OPEN_FILES = 128  # of one process, so that a corpus of many shards does not meet the limit of open files
State = tuple[int, int, int, int]


def state_of(stat: os.stat_result) -> State:
    """Size, times and inode of a file. ctime cannot be set back, so an edit in place and a replacement show."""
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino


class _Open:
    """An open file. The last user closes it, which may be a thread that still reads while the file is put aside."""

    def __init__(self, path: Path):
        self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "fd"):
            os.close(self.fd)


@functools.lru_cache(maxsize=OPEN_FILES)
def _opened(path: Path, opening: int) -> _Open:
    """The open file at `path`. opening: a number that is another for each opening of the file."""
    return _Open(path)


_openings = itertools.count()


class WatchedTokens:
    """The tokens of a file as a sequence that can be sliced.

    entry: its record in the manifest. Raises UserError that names the file if it is cut or overwritten while it is in
    use. A change of its times alone is none: its bytes are then hashed once. A file that is replaced or removed stays
    open, and is read as it was.
    """

    def __init__(self, path: Path, entry: dict[str, Any]):
        self.path, self._sha256, self._offset = path, entry["sha256"], entry["offset"]
        self._dtype = numpy_dtype(entry["dtype"])
        self._n_tokens = entry["n_tokens"]
        self._state, self._opening = state_of(os.stat(path)), next(_openings)
        needed = self._offset + self._n_tokens * self._dtype.itemsize
        if self._state[0] < needed:
            raise UserError(
                f"{path}: {self._state[0]:,} bytes, but {self._n_tokens:,} tokens need {needed:,}; prepare again"
            )

    def __len__(self) -> int:
        return self._n_tokens

    def __getitem__(self, at: slice) -> np.ndarray:
        """The tokens [start, stop), with a step of 1."""
        start, stop, _ = at.indices(self._n_tokens)
        width = self._dtype.itemsize
        size, offset = max(0, stop - start) * width, self._offset + start * width
        try:
            file = _opened(self.path, self._opening)
            raw = os.pread(file.fd, size, offset)
            while len(raw) < size and (more := os.pread(file.fd, size - len(raw), offset + len(raw))):
                raw += more
            self._check(file)
        except OSError as error:
            raise self._gone(error) from None
        return np.frombuffer(raw, self._dtype)

    def check(self) -> None:
        """Raise UserError if the opened file has other bytes now than when it was opened."""
        try:
            self._check(_opened(self.path, self._opening))
        except OSError as error:
            raise self._gone(error) from None

    def _check(self, file: _Open) -> None:
        """`touch`, `chmod`, a new link and a removal change only the state of a file, so its bytes are hashed then."""
        found = state_of(os.fstat(file.fd))
        if found == self._state:
            return
        if found[0] != self._state[0]:
            raise self._changed(f"it has {found[0]:,} bytes now and had {self._state[0]:,}")
        digest, at = hashlib.sha256(), 0
        while block := os.pread(file.fd, 1 << 20, at):
            digest.update(block)
            at += len(block)
        if digest.hexdigest() != self._sha256:
            raise self._changed("its sha256 is another now")
        self._state = found

    def _changed(self, what: str) -> UserError:
        return UserError(
            f"{self.path} was changed while it was in use: {what}; restore it, then the same command goes on"
        )

    def _gone(self, error: OSError) -> UserError:
        return UserError(
            f"{self.path} cannot be read any more ({error.strerror}); restore it, then the same command goes on"
        )
