"""Files that are there whole or not at all, also after a power cut."""

import contextlib
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from scaling_testbed.errors import UserError


def write_text(path: Path, text: str) -> None:
    """Replace a file in one step. Raises UserError naming it when the disk refuses."""
    work = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(work, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(work, path)
        fsync_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            work.unlink()
        raise UserError(f"cannot write {path}: {error.strerror}") from None


def write_json(path: Path, value: Any) -> None:
    """`write_text` of a JSON value, one entry per line."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def fsync_folder(folder: Path) -> None:
    """Make renames inside a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: str | Path) -> str:
    """sha256 of a file's bytes, as hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
