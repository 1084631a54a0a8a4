"""A whole update as one CUDA graph: the host starts forward, backward, clip and optimizer by one launch.

It pays where the host needs longer to launch the kernels of a step than the GPU needs to compute them.
"""

import dataclasses
from collections.abc import Callable

import torch

from scaling_testbed.data.cutting import Batch
from scaling_testbed.errors import UserError, first_line
from scaling_testbed.learning.optimizers import set_lr
from scaling_testbed.processes.device import on_side_stream
from scaling_testbed.processes.interrupts import Interrupts
from scaling_testbed.training.parts import Parts
from scaling_testbed.training.step import Inputs, Made, is_measured, make_update

WARM_UP = 3  # updates without the graph: they compile kernels and choose algorithms


class StepGraph:
    """Makes the updates of a run as `make_update` does, with the same bits, from a graph after the first updates.

    The tensors of the batch and the rate keep their place; a replay reads what they hold. The rate is fp32 in every
    update, also in those without the graph, where it would otherwise be a double. A measured update is made without
    the graph.
    """

    def __init__(self, parts: Parts):
        self._parts = parts
        self._lr = torch.zeros((), device=parts.device)
        self._warm, self._rows = 0, 0
        self._batch = Batch(tokens_BS=torch.empty(0))
        self._values = torch.empty(0)
        self._replay: Callable[[], None] | None = None

    def make(self, given: Inputs, interrupts: Interrupts, rows: int) -> Made:
        """Make an update. Raises UserError if the step cannot be captured, and what `make_update` raises."""
        interrupts.check()
        parts = self._parts
        parts.processes.step = given.step
        self._lr.fill_(given.lr)
        try:
            if rows != self._rows:  # another micro-batch needs other kernels
                self._rows, self._warm, self._replay = rows, 0, None
            if is_measured(parts, given.step) or self._warm < WARM_UP:
                self._warm += 1
                with on_side_stream(parts.device):
                    return make_update(parts, dataclasses.replace(given, lr=self._lr), interrupts, rows)
            replay = self._replay = self._replay or self._capture(given, interrupts)
            for held, new in zip(self._batch.arrays, given.batch.arrays, strict=True):
                held.copy_(new)
            replay()
            return Made(values=self._values, n_tokens=given.n_tokens, skipped=False, diagnostics={})
        finally:
            set_lr(parts.optimizer, given.lr)  # checkpoints hold numbers

    def _capture(self, given: Inputs, interrupts: Interrupts) -> Callable[[], None]:
        self._batch = given.batch.map(torch.clone)
        static = dataclasses.replace(given, batch=self._batch, lr=self._lr)
        groups = self._parts.optimizer.param_groups
        for group in groups:
            group["capturable"] = True
        try:
            work = lambda: make_update(self._parts, static, interrupts, self._rows).values  # noqa: E731
            self._values, replay = captured(work)
        except RuntimeError as error:
            raise UserError(
                f"a step of this run cannot be captured in a CUDA graph: {first_line(error)}; use "
                "compute.cuda_graph=false"
            ) from error
        finally:
            for group in groups:
                group["capturable"] = False
        return replay


def captured(work: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, Callable[[], None]]:
    """The tensor that `work` returns, and what computes it again, with all else that `work` does on the GPU."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        values = work()
    return values, graph.replay
