"""How a process of Python imports PyTorch and how it ends, both in less time than by default. Does not import torch."""

import atexit
import contextlib
import gc
import os
from collections.abc import Iterator

from scaling_testbed.progress import release_streams

_status: int | None = None


@contextlib.contextmanager
def importing_torch() -> Iterator[None]:
    """Context manager for the first import of PyTorch in a process."""
    # Threads that spin while they wait slow each other down on a busy machine. With one other process on two cores, a
    # nano step took 0.28 s without this and 0.10 s with it. On an idle machine it costs 9%. torch reads it at import.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    gc.disable()  # nothing that an import makes is garbage, and looking for it takes a fifth of the import's time
    try:
        yield
    finally:
        gc.enable()


def end_at_once() -> None:
    """Let this process end without taking its modules apart, once `planned` knows its exit status. With PyTorch that
    takes a second. For an entry point, before its imports: of the functions registered with atexit, the first runs
    last."""
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
