"""Diagnostics of a run: what is measured around an update, over all processes of the run."""

import contextlib
from collections.abc import Iterator

import numpy as np
import torch

from scaling_testbed.diagnostics.config import DiagnosticsConfig
from scaling_testbed.diagnostics.forward import ForwardProbe
from scaling_testbed.diagnostics.reductions import Reductions
from scaling_testbed.diagnostics.tensors import gradient_statistics, parameter_statistics, update_statistics
from scaling_testbed.model.transformer import Transformer
from scaling_testbed.running.config import ParallelismConfig
from scaling_testbed.running.device import autocast
from scaling_testbed.running.distributed import Processes
from scaling_testbed.running.parallel import Replica


class Measurement:
    """Measures a placed model from the side: a forward pass of its own without gradients, gradients, moments."""

    def __init__(
        self,
        config: DiagnosticsConfig,
        parallelism: ParallelismConfig,
        placed: Replica,
        processes: Processes,
        device: torch.device,
        precision: str,
    ):
        self.config, self.placed, self.processes = config, placed, processes
        self.device, self.precision = device, precision
        self.model: Transformer = placed.plain.model
        sharded = parallelism.kind == "fsdp"
        # Each shard is there once for every copy of the model; what is whole needs no sum.
        self._copies = processes.world.size // (parallelism.shard_size or processes.world.size) if sharded else None

    @torch.no_grad()
    def forward(self, batch_BS: np.ndarray, rows: int) -> dict[str, float]:
        """Of a forward pass over this rank's part of config.sequences of the batch, `rows` at a time."""
        limit = self.config.sequences
        here = len(batch_BS) if limit is None else min(len(batch_BS), max(1, limit // self.processes.world.size))
        found = Reductions()
        with (
            ForwardProbe(self.model, found, per_head=self.config.per_head),
            _uncompiled(self.model),
            self.placed.scoring(),
        ):
            for begin in range(0, here, rows):
                tokens_BS = torch.from_numpy(batch_BS[begin : min(begin + rows, here)]).to(self.device)
                with autocast(self.device, self.precision):
                    self.placed.plain(tokens_BS)
        return found.result(self.processes.sum, self.processes.largest, self.processes.world.size)

    def gradients(self) -> dict[str, float]:
        """Of the gradients and parameters as they are."""
        parameters = parameter_statistics(self.model, self._sum_over_shards)
        return gradient_statistics(self.model, self._sum_over_shards) | parameters

    def updates(self, optimizer: torch.optim.Optimizer, before: dict[str, float]) -> dict[str, float]:
        """Of the update just made; `before` is what `gradients` found."""
        return update_statistics(self.model, optimizer, before, self._sum_over_shards)

    def _sum_over_shards(self, values):
        if self._copies is None:
            return values
        return [total / self._copies for total in self.processes.sum(values)]


@contextlib.contextmanager
def _uncompiled(model: Transformer) -> Iterator[None]:
    """Hooks are not seen by a compiled model, or compile it again."""
    compiled, model._compiled_call_impl = model._compiled_call_impl, None
    try:
        yield
    finally:
        model._compiled_call_impl = compiled
