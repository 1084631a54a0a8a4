"""The diagnostics of a run, measured before and after an update over all processes of the run."""

import operator

import numpy as np
import torch

from scaling_testbed.config.sections import ParallelismConfig
from scaling_testbed.data.cutting import Batch
from scaling_testbed.diagnostics.config import DiagnosticsConfig
from scaling_testbed.diagnostics.forward import ForwardProbe
from scaling_testbed.diagnostics.reductions import Reductions
from scaling_testbed.diagnostics.tensors import gradient_statistics, parameter_statistics, update_statistics
from scaling_testbed.learning.optimizers import OptimizerConfig
from scaling_testbed.model.transformer import Transformer
from scaling_testbed.processes.compilation import uncompiled
from scaling_testbed.processes.device import autocast
from scaling_testbed.processes.group import Processes
from scaling_testbed.processes.placement import Replica


class Measurement:
    """Measures a placed model: in an extra forward pass without gradients, and from its gradients and moments."""

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
        # A sum over ranks counts each shard once for every copy of the model. A whole model needs no sum.
        size = processes.world.size
        self._copies = size // (parallelism.shard_size or size) if parallelism.is_sharded else None

    @torch.no_grad()
    def forward(self, batch: Batch, rows: int) -> dict[str, float]:
        """Diagnostics of a forward pass over config.sequences sequences of the global batch, `rows` at a time on each
        rank. batch: the slice of this rank, on the device."""
        mine, n_passes = self._chosen(len(batch.tokens_BS), rows)
        found = Reductions()
        with (
            ForwardProbe(self.model, found, per_head=self.config.per_head),
            uncompiled(self.model),
            self.placed.scoring(),
        ):
            for begin in range(0, n_passes * rows, rows):
                here = mine[begin : begin + rows]
                found.weight = len(here)
                # A sharded model needs all ranks: a rank without sequences left computes one with weight 0.
                measured = batch.map(operator.itemgetter(here.tolist() or [0]))
                with autocast(self.device, self.precision):
                    self.placed.plain(*measured.tensors)
        return found.result(self.processes.sum, self.processes.largest)

    def _chosen(self, n_here: int, rows: int) -> tuple[np.ndarray, int]:
        """Indices, in the slice of this rank, of the measured sequences, and the number of passes of the rank that has
        most of them. These sequences are spread evenly over the global batch, so they are the same for any number of
        ranks."""
        world = self.processes.world
        n_batch = n_here * world.size
        n_chosen = min(self.config.sequences or n_batch, n_batch)
        ranks, places = np.divmod(np.arange(n_chosen) * n_batch // n_chosen, n_here)
        most = int(np.bincount(ranks).max())
        return places[ranks == world.rank], -(-most // rows)

    def gradients(self) -> dict[str, float]:
        """Statistics of the current gradients and parameters."""
        parameters = parameter_statistics(self.model, self._sum_over_shards)
        return gradient_statistics(self.model, self._sum_over_shards) | parameters

    def updates(
        self, config: OptimizerConfig, optimizer: torch.optim.Optimizer, before: dict[str, float]
    ) -> dict[str, float]:
        """Statistics of the last update, made by the optimizer of `config`. before: the result of `gradients`."""
        return update_statistics(self.model, config, optimizer, before, self._sum_over_shards)

    def _sum_over_shards(self, values):
        if self._copies is None:
            return values
        return [total / self._copies for total in self.processes.sum(values)]
