"""A thread that writes checkpoints beside training, one at a time, from a copy of the state in host memory."""

import copy
import threading
from collections.abc import Callable
from typing import Any, Self

import torch

from scaling_testbed.errors import first_line
from scaling_testbed.progress import say


class Writer:
    """Writes one checkpoint at a time in a thread. As a context manager it leaves no thread behind: it waits for the
    last one, also after an error or a signal, so that the folder is held until the checkpoint has its name."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.wait()
        else:
            self.settle()

    def start(self, write: Callable[[], object]) -> None:
        """Call `write` in a thread, after the one before has ended. Raises the error of the one before."""
        self.wait()

        def work() -> None:
            try:
                write()
            except BaseException as error:
                self._error = error

        self._thread = threading.Thread(target=work, name="checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Wait until nothing is being written. Raises the error with which the last writing ended."""
        if self._thread is not None:
            self._thread.join()
        self._thread, error, self._error = None, self._error, None
        if error is not None:
            raise error

    def settle(self, seconds: float | None = None) -> None:
        """Wait as `wait` does, for `seconds` at most, where another error ends the run: that of the thread is a warning
        beside it."""
        if self._thread is not None:
            self._thread.join(seconds)
        if self._error is not None:
            say(f"warning: {first_line(self._error)}", errors=True)
        self._error = None


@torch.no_grad()
def on_host(value: Any) -> Any:
    """A copy of nested containers with their tensors in host memory, where nothing that training does changes it.

    A tensor of a CUDA GPU is copied to page-locked memory, without a copy on the GPU. Tensors that share memory share
    it in the copy too, so that the files of a checkpoint do not grow.
    """
    copies: dict[tuple[Any, ...], torch.Tensor] = {}
    memo: dict[int, torch.Tensor] = {}
    for tensor in _tensors_in(value):
        if tensor.device.type != "cpu":
            key = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
            if key not in copies:
                on_cuda = tensor.device.type == "cuda"
                target = torch.empty_like(tensor, device="cpu", pin_memory=on_cuda)
                copies[key] = target.copy_(tensor, non_blocking=on_cuda)
            memo[id(tensor)] = copies[key]
    if any(device.type == "cuda" for device, *_ in copies):
        torch.cuda.synchronize()
    return copy.deepcopy(value, memo)


def _tensors_in(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [tensor for entry in inner for tensor in _tensors_in(entry)]
