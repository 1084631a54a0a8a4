"""The end of a process that has imported PyTorch: Python takes a second to take its modules apart. Nothing needs that."""

import atexit
import os

from scaling_testbed.progress import release_streams

_status: int | None = None


def at_once() -> None:
    """Let this process end without taking its modules apart, once `planned` knows its exit status.

    For an entry point, before its imports: of the functions that are registered with atexit, the first runs last.
    """
    atexit.register(_end)


def planned(status: int) -> int:
    """Return `status`, with which this process will end."""
    global _status
    _status = status
    return status


def _end() -> None:
    if _status is not None:
        release_streams()
        os._exit(_status)
