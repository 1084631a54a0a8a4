"""One model on several devices: replicated (DDP) or sharded (FSDP2, `fully_shard`).

In both cases, the gradient after the last micro-batch of a step is that of the mean loss over the global batch.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from scaling_testbed.config.sections import ParallelismConfig
from scaling_testbed.learning.loss_model import LossModel
from scaling_testbed.model.layers import Linear

if TYPE_CHECKING:
    from torch.nn.parallel import DistributedDataParallel


class Replica:
    """A model that this process holds as a whole, alone or as one of several replicas.

    forward: the module to call for training. plain: the same without gradient synchronisation, for evaluation.
    """

    def __init__(self, plain: LossModel, config: ParallelismConfig, device: torch.device):
        self.plain = plain
        self.forward: torch.nn.Module = plain
        self._replicated: DistributedDataParallel | None = None
        if config.kind == "ddp":
            from torch.nn.parallel import DistributedDataParallel

            devices = [device] if device.type == "cuda" else None
            self._replicated = DistributedDataParallel(plain, device_ids=devices, gradient_as_bucket_view=True)
            self.forward = self._replicated

    @contextlib.contextmanager
    def accumulating(self, last: bool) -> Iterator[None]:
        """Context manager for a micro-batch. Gradients are exchanged only in the backward pass of the `last` one."""
        if self._replicated is None or last:
            yield
            return
        with self._replicated.no_sync():
            yield

    @contextlib.contextmanager
    def scoring(self) -> Iterator[None]:
        """Context manager for forward passes without a backward pass."""
        yield


class Sharded(Replica):
    """A model of which this process holds a part of each parameter, built from a model on the meta device.

    The matrices of a block are one group. They are gathered before the block, in bf16 if autocast would round them
    anyway, and freed after it. Embedding, head and gains are another group. They are gathered in fp32, because the
    residual stream and the norms are in fp32 and the head rounds its weight itself. Gradients are reduced in fp32.
    """

    def __init__(self, plain: LossModel, config: ParallelismConfig, device: torch.device, precision: str):
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

        size = torch.distributed.get_world_size()
        if config.shard_size in (None, size):
            mesh = init_device_mesh(device.type, (size,), mesh_dim_names=("shard",))
        else:
            shape = (size // config.shard_size, config.shard_size)
            mesh = init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard"))
        matrices_dtype = torch.bfloat16 if precision == "bf16" else None
        policy = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
        of_block = dataclasses.replace(policy, param_dtype=matrices_dtype)
        linears = [module for module in plain.model.blocks.modules() if isinstance(module, Linear)]
        matrices = {weight for linear in linears for weight in linear.parameters()}
        # The outer group first: it does not look into blocks that are sharded already.
        self._root = fully_shard(plain, mesh=mesh, mp_policy=policy, ignored_params=matrices)  # `plain` itself
        others = set(plain.parameters()) - matrices  # sharding has made them anew
        for block in plain.model.blocks:  # its hooks lie around the block, where torch.compile does not trace them
            fully_shard(block, mesh=mesh, mp_policy=of_block, ignored_params=others)
        for method in ("cross_entropy_at", "ladder_sums_of"):  # they gather the parameters too
            register_fsdp_forward_method(plain, method)
        plain.to_empty(device=device)
        self.plain = self.forward = plain

    @contextlib.contextmanager
    def accumulating(self, last: bool) -> Iterator[None]:
        self._root.set_requires_gradient_sync(last)
        yield

    @contextlib.contextmanager
    def scoring(self) -> Iterator[None]:
        try:
            yield
        finally:  # a signal may end an evaluation
            # The root stays gathered until a backward pass. Without one it would still be gathered during a save.
            self._root.reshard()


def parallelize(
    plain: LossModel, config: ParallelismConfig, device: torch.device, precision: str, seed: int
) -> Replica:
    """Place `plain` as `config` says, with the initial weights of `seed`, which do not depend on the placement.

    The model in `plain` is on `device`, for fsdp on the meta device. Each rank draws each tensor as a whole, one at a
    time, and keeps its part.
    """
    if not config.is_sharded:
        plain.model.init_weights(seed)
        return Replica(plain, config, device)
    placed = Sharded(plain, config, device, precision)
    for name, parameter in plain.model.named_parameters():
        copy_shard(parameter, plain.model.initial_weight(name, seed))
    return placed


@torch.no_grad()
def copy_shard(target: torch.Tensor, whole: torch.Tensor) -> None:
    """Copy this rank's part of `whole` into the DTensor `target`; every rank has the same `whole`."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(target, DTensor)
    mesh, placements = target.device_mesh, target.placements
    part = distribute_tensor(whole.to(target.device), mesh, placements, src_data_rank=None)
    target.to_local().copy_(part.to_local())
