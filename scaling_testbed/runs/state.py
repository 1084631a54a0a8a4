"""The state of a run in a checkpoint, and how model and optimizer are restored from it, whole or sharded."""

from pathlib import Path
from typing import Any

import torch

from scaling_testbed.model.transformer import Transformer
from scaling_testbed.processes.placement import copy_shard
from scaling_testbed.runs import checkpoint, sharded


def whole_state(model: Transformer, optimizer: torch.optim.Optimizer, device: torch.device) -> dict[str, Any]:
    """State dicts of a model that this process holds as a whole and of its optimizer, and the random state."""
    rng = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        rng["cuda"] = torch.cuda.get_rng_state(device)
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "rng": rng}


def sharded_state(
    model: Transformer, optimizer: torch.optim.Optimizer
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The state of a sharded model: what rank 0 writes, and the DTensors `model/NAME` and `optimizer/NAME/KEY`."""
    shards = {f"model/{name}": parameter.detach() for name, parameter in model.named_parameters()}
    names = _optimizer_names(model, optimizer)
    for parameter, state in optimizer.state.items():
        shards |= {f"optimizer/{names[parameter]}/{key}": value for key, value in state.items()}
    groups = {"names": list(names.values()), "param_groups": optimizer.state_dict()["param_groups"]}
    return {"groups": groups}, shards


def restore(
    path: Path, model: Transformer, optimizer: torch.optim.Optimizer, device: torch.device, *, sharded: bool
) -> None:
    """Restore a checkpoint of either kind whose hashes agree. sharded: whether the model is sharded now."""
    if not sharded:
        restore_whole(checkpoint.read(path).tensors, model, optimizer, device)
    elif checkpoint.is_sharded(path):
        _restore_shards(path, model, optimizer)
    else:
        _shard_whole(checkpoint.read(path, mmap=True).tensors, model, optimizer)


def restore_whole(
    tensors: dict[str, Any], model: Transformer, optimizer: torch.optim.Optimizer, device: torch.device
) -> None:
    """Restore a model that this process holds as a whole, and its optimizer, from the tensors of a checkpoint."""
    model.load_state_dict(tensors["model"])
    optimizer.load_state_dict(tensors["optimizer"])
    if "rng" in tensors:  # a sharded run draws no random numbers and stores no state of them
        torch.set_rng_state(tensors["rng"]["cpu"])
        if device.type == "cuda" and "cuda" in tensors["rng"]:
            torch.cuda.set_rng_state(tensors["rng"]["cuda"], device)


def _restore_shards(path: Path, model: Transformer, optimizer: torch.optim.Optimizer) -> None:
    """Restore from a sharded checkpoint. Every rank reads its parts; the number of ranks may have changed."""
    parameters = dict(model.named_parameters())

    def place(key: str, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        kind, name, *part = key.split("/")
        parameter = parameters[name]
        if kind == "model":
            return parameter.detach()
        empty = optimizer.state[parameter][part[0]] = _empty_state(optimizer, parameter, shape, dtype)
        return empty

    sharded.read_shards(path, place, alone=False)


def _shard_whole(tensors: dict[str, Any], model: Transformer, optimizer: torch.optim.Optimizer) -> None:
    """Restore a sharded model from a whole checkpoint. Every rank reads each tensor in turn and keeps its part."""
    for name, parameter in model.named_parameters():
        copy_shard(parameter, tensors["model"][name])
    parameters = list(_optimizer_names(model, optimizer))
    for number, state in tensors["optimizer"]["state"].items():
        parameter = parameters[number]
        for key, value in state.items():
            mine = _empty_state(optimizer, parameter, value.shape, value.dtype)
            copy_shard(mine, value) if value.dim() else mine.copy_(value)
            optimizer.state[parameter][key] = mine


def _empty_state(
    optimizer: torch.optim.Optimizer, parameter: torch.Tensor, shape: torch.Size, dtype: torch.dtype
) -> torch.Tensor:
    """An empty tensor for a moment, sharded like its parameter, or for the number of steps, which a fused optimizer
    keeps on the device."""
    if len(shape):
        return torch.zeros_like(parameter, dtype=dtype, requires_grad=False)
    fused = any(group.get("fused") for group in optimizer.param_groups)
    return torch.zeros(shape, dtype=dtype, device=parameter.device if fused else "cpu")


def _optimizer_names(model: Transformer, optimizer: torch.optim.Optimizer) -> dict[torch.Tensor, str]:
    """The optimizer's parameters in its order, with their names in the model."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {parameter: names[parameter] for group in optimizer.param_groups for parameter in group["params"]}
