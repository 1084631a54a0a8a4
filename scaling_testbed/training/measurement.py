"""Diagnostics of a run: what is measured around an update, over all processes of the run."""

import contextlib
from collections.abc import Iterator

import numpy as np
import torch

from scaling_testbed.config.sections import ParallelismConfig
from scaling_testbed.diagnostics.config import DiagnosticsConfig
from scaling_testbed.diagnostics.forward import ForwardProbe
from scaling_testbed.diagnostics.reductions import Reductions
from scaling_testbed.diagnostics.tensors import gradient_statistics, parameter_statistics, update_statistics
from scaling_testbed.learning.optimizers import OptimizerConfig
from scaling_testbed.model.transformer import Transformer
from scaling_testbed.processes.device import autocast
from scaling_testbed.processes.group import Processes
from scaling_testbed.processes.placement import Replica


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
        # Each shard is there once for every copy of the model; what is whole needs no sum.
        size = processes.world.size
        self._copies = size // (parallelism.shard_size or size) if parallelism.is_sharded else None

    @torch.no_grad()
    def forward(self, batch_BS: np.ndarray, rows: int) -> dict[str, float]:
        """Of a forward pass over config.sequences of the global batch, `rows` at a time on each rank; `batch_BS` is
        this rank's slice of it."""
        mine, n_passes = self._chosen(len(batch_BS), rows)
        found = Reductions()
        with (
            ForwardProbe(self.model, found, per_head=self.config.per_head),
            _uncompiled(self.model),
            self.placed.scoring(),
        ):
            for begin in range(0, n_passes * rows, rows):
                here = mine[begin : begin + rows]
                found.weight = len(here)
                # A rank with none left goes along, as a sharded model needs all of them, and says nothing.
                tokens_BS = torch.from_numpy(batch_BS[here if len(here) else [0]]).to(self.device)
                with autocast(self.device, self.precision):
                    self.placed.plain(tokens_BS)
        return found.result(self.processes.sum, self.processes.largest)

    def _chosen(self, n_here: int, rows: int) -> tuple[np.ndarray, int]:
        """Places in this rank's slice of the sequences that are measured, which lie evenly over the global batch and so
        are the same for any number of ranks; and how many passes the rank with the most of them makes."""
        world = self.processes.world
        n_batch = n_here * world.size
        n_chosen = min(self.config.sequences or n_batch, n_batch)
        ranks, places = np.divmod(np.arange(n_chosen) * n_batch // n_chosen, n_here)
        most = int(np.bincount(ranks).max())
        return places[ranks == world.rank], -(-most // rows)

    def gradients(self) -> dict[str, float]:
        """Of the gradients and parameters as they are."""
        parameters = parameter_statistics(self.model, self._sum_over_shards)
        return gradient_statistics(self.model, self._sum_over_shards) | parameters

    def updates(
        self, config: OptimizerConfig, optimizer: torch.optim.Optimizer, before: dict[str, float]
    ) -> dict[str, float]:
        """Of the update just made by the optimizer of `config`; `before` is what `gradients` found."""
        return update_statistics(self.model, config, optimizer, before, self._sum_over_shards)

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
