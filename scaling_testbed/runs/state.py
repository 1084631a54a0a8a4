"""The state of a run in a checkpoint, and how model and optimizer are restored from it, whole or sharded."""

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from scaling_testbed.errors import UserError
from scaling_testbed.learning.averaging import Averages
from scaling_testbed.model.transformer import Transformer
from scaling_testbed.processes.placement import copy_shard
from scaling_testbed.runs import checkpoint, sharded


def shapes(model: Transformer) -> str:
    """A hash of names, shapes and types of the parameters of `model`, the same for a whole and a sharded one."""
    known = sorted((name, list(value.shape), str(value.dtype)) for name, value in model.named_parameters())
    return hashlib.sha256(json.dumps(known).encode()).hexdigest()[:16]


def load_weights(model: Transformer, weights: Any, path: Path) -> None:
    """Load the weights of a checkpoint at `path` into a whole model. Raises UserError unless names and shapes are those
    of `model`."""
    if not isinstance(weights, dict) or not all(isinstance(value, torch.Tensor) for value in weights.values()):
        raise UserError(f"checkpoint {path} cannot be used: it holds no weights of a model; {checkpoint.WAY_OUT}")
    check_shapes(path, {name: value.shape for name, value in weights.items()}, model.state_dict())
    model.load_state_dict(weights)


def check_shapes(path: Path, saved: Mapping[str, torch.Size], here: Mapping[str, torch.Tensor]) -> None:
    """Raise UserError, which names the first difference, unless the checkpoint at `path` has tensors with the names and
    shapes of those of this model."""
    for name in [*saved, *here]:
        there, mine = saved.get(name), here[name].shape if name in here else None
        if there != mine:
            what = [f"of shape {list(shape)}" if shape is not None else "missing" for shape in (there, mine)]
            raise UserError(
                f"checkpoint {path} is of another model: {name} is {what[0]} there and {what[1]} in this run; "
                f"{checkpoint.WAY_OUT}"
            )


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
    path: Path,
    model: Transformer,
    optimizer: torch.optim.Optimizer,
    device: torch.device,
    *,
    sharded: bool,
    averages: Mapping[str, torch.Tensor],
) -> None:
    """Restore a checkpoint of either kind whose hashes agree. sharded: whether the model is sharded now. averages:
    Averages.tensors, which are restored too."""
    if sharded and checkpoint.is_sharded(path):
        _restore_shards(path, model, optimizer, averages)
        return
    tensors = checkpoint.read(path, mmap=sharded).tensors
    if sharded:
        with refused_in_one_line(path):
            _shard_whole(tensors, model, optimizer, path)
    else:
        restore_whole(path, tensors, model, optimizer, device)
    _restore_averages(path, tensors, averages)


def restore_averages(path: Path, saved: checkpoint.Checkpoint, averages: Averages) -> None:
    """Restore the average of a whole model from a checkpoint at `path`."""
    _restore_averages(path, saved.tensors, averages.tensors)
    averages.n = saved.state.get("averaged", 0)


@torch.no_grad()
def _restore_averages(path: Path, tensors: dict[str, Any], averages: Mapping[str, torch.Tensor]) -> None:
    with refused_in_one_line(path):
        for name, mine in averages.items():
            saved = tensors["averages"][name]
            copy_shard(mine, saved) if hasattr(mine, "to_local") else mine.copy_(saved)


def begin_from(
    path: Path,
    model: Transformer,
    optimizer: torch.optim.Optimizer,
    device: torch.device,
    *,
    sharded: bool,
    moments: bool,
    averages: Mapping[str, torch.Tensor],
    grown: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]] | None = None,
) -> None:
    """Load the weights of another run's checkpoint of either kind, whose hashes agree.

    grown: makes the weights of this model of those of the parent, whole and on the CPU; None: they are its own.
    moments: take the moments and the random state too. averages: Averages.tensors, if they are taken too, else {}. The
    settings of the optimizer, such as its weight decay, stay those of this run. Raises UserError if they are of another
    model, or if the optimizer groups its parameters otherwise.
    """
    if sharded and checkpoint.is_sharded(path) and grown is None:
        _restore_shards(path, model, optimizer, averages, moments=moments)
        return
    tensors = checkpoint.read(path, mmap=sharded).tensors
    if not moments:
        tensors.pop("rng", None)
        tensors["optimizer"] = {"state": {}}
    if grown is not None:
        with refused_in_one_line(path):
            tensors["model"] = grown(tensors["model"])
    with refused_in_one_line(path):
        if moments:
            _check_groups(path, tensors["optimizer"]["param_groups"], optimizer)
        tensors["optimizer"]["param_groups"] = optimizer.state_dict()["param_groups"]
    if sharded:
        with refused_in_one_line(path):
            _shard_whole(tensors, model, optimizer, path)
    elif moments:
        restore_whole(path, tensors, model, optimizer, device)
    else:
        load_weights(model, tensors.get("model"), path)
    _restore_averages(path, tensors, averages)


def _check_groups(path: Path, saved: list[dict[str, Any]], optimizer: torch.optim.Optimizer) -> None:
    """Raise UserError unless the parameters are grouped as in the optimizer of the checkpoint at `path`: in it they
    have numbers and no names."""
    there, here = ([len(group["params"]) for group in groups] for groups in (saved, optimizer.param_groups))
    if there != here:
        raise UserError(
            f"checkpoint {path} has moments of {there} parameters in groups, and the optimizer of this run has {here}, "
            "because their settings differ; type start.take without optimizer"
        )


def restore_whole(
    path: Path, tensors: dict[str, Any], model: Transformer, optimizer: torch.optim.Optimizer, device: torch.device
) -> None:
    """Restore a model that this process holds as a whole, and its optimizer, from the tensors of the checkpoint at
    `path`. Raises UserError if they are of another model or optimizer."""
    load_weights(model, tensors.get("model"), path)
    with refused_in_one_line(path):
        optimizer.state.clear()  # else it and the loaded one would take memory together
        optimizer.load_state_dict(tensors["optimizer"])
        if "rng" in tensors:  # a sharded run draws no random numbers and stores no state of them
            torch.set_rng_state(tensors["rng"]["cpu"])
            if device.type == "cuda" and "cuda" in tensors["rng"]:
                torch.cuda.set_rng_state(tensors["rng"]["cuda"], device)


@contextlib.contextmanager
def refused_in_one_line(path: Path) -> Iterator[None]:
    """Context manager for a use of what the checkpoint at `path` holds. It raises a UserError if the content does not
    fit this run. A lack of memory and a lost process stay what they are."""
    try:
        yield
    except (torch.OutOfMemoryError, dist.DistError):
        raise
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise UserError(
            f"checkpoint {path} cannot be used: {checkpoint.what_is_wrong(error)}; {checkpoint.WAY_OUT}"
        ) from error


def _restore_shards(
    path: Path,
    model: Transformer,
    optimizer: torch.optim.Optimizer,
    averages: Mapping[str, torch.Tensor],
    *,
    moments: bool = True,
) -> None:
    """Restore from a sharded checkpoint. Every rank reads its parts; the number of ranks may have changed. moments:
    whether those are restored too."""
    parameters = dict(model.named_parameters())
    saved = sharded.shapes_in(path)
    weights = {key.removeprefix("model/"): shape for key, shape in saved.items() if key.startswith("model/")}
    check_shapes(path, weights, parameters)
    if lacking := sorted(set(averages) - {key.removeprefix("averages/") for key in saved}):
        raise UserError(f"checkpoint {path} has no average of {lacking[0]}; {checkpoint.WAY_OUT}")
    if lost := sorted({key.split("/")[1] for key in saved if key.startswith("optimizer/")} - set(parameters)):
        raise UserError(f"checkpoint {path} is of another model: it has moments of {lost[0]}; {checkpoint.WAY_OUT}")

    def place(key: str, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor | None:
        kind, name, *part = key.split("/")
        parameter = parameters[name]
        if kind == "model":
            return parameter.detach()
        if kind == "averages":
            return averages.get(f"{name}/{part[0]}")
        if not moments:
            return None
        return _tensor_of_state(optimizer, parameter, part[0], shape, dtype)

    sharded.read_shards(path, place, alone=False)


def _shard_whole(tensors: dict[str, Any], model: Transformer, optimizer: torch.optim.Optimizer, path: Path) -> None:
    """Restore a sharded model from a whole checkpoint. Every rank reads each tensor in turn and keeps its part."""
    weights = {name: value.shape for name, value in tensors["model"].items()}
    check_shapes(path, weights, dict(model.named_parameters()))
    for name, parameter in model.named_parameters():
        copy_shard(parameter, tensors["model"][name])
    parameters = list(_optimizer_names(model, optimizer))
    for number, state in tensors["optimizer"]["state"].items():
        parameter = parameters[number]
        for key, value in state.items():
            mine = _tensor_of_state(optimizer, parameter, key, value.shape, value.dtype)
            copy_shard(mine, value) if value.dim() else mine.copy_(value)


def _tensor_of_state(
    optimizer: torch.optim.Optimizer, parameter: torch.Tensor, key: str, shape: torch.Size, dtype: torch.dtype
) -> torch.Tensor:
    """The tensor of the optimizer's state under `key`. An optimizer whose first step creates its state gets it here: a
    moment that is sharded like its parameter, or the number of steps, which a fused optimizer keeps on the device."""
    state: dict[str, torch.Tensor] = optimizer.state[parameter]
    if key not in state and len(shape):
        state[key] = torch.zeros_like(parameter, dtype=dtype, requires_grad=False)
    elif key not in state:
        fused = any(group.get("fused") for group in optimizer.param_groups)
        state[key] = torch.zeros(shape, dtype=dtype, device=parameter.device if fused else "cpu")
    return state[key]


def _optimizer_names(model: Transformer, optimizer: torch.optim.Optimizer) -> dict[torch.Tensor, str]:
    """The optimizer's parameters in its order, with their names in the model."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {parameter: names[parameter] for group in optimizer.param_groups for parameter in group["params"]}
