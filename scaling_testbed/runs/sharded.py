"""The tensors of a sharded run, in `shards/` of a checkpoint, in the format of torch.distributed.checkpoint.

Each rank writes its part in files of its own. Only the metadata are unpickled when a checkpoint is read.
"""

from __future__ import annotations

import enum
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from scaling_testbed.errors import UserError, first_line
from scaling_testbed.files import os_error_in
from scaling_testbed.runs.folder import ONE_FOLDER

if TYPE_CHECKING:
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, TensorStorageMetadata

SHARDS = "shards"


def write_shards(folder: Path, shards: dict[str, torch.Tensor]) -> None:
    """Write the parts of this rank. Every rank calls this. Raises OSError on all ranks if one fails."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        dcp.save(shards, storage_writer=dcp.FileSystemWriter(folder))
    except CheckpointException as error:  # no subclass of Exception, so no caller would catch it
        reason = next(iter(error.failures.values()))[0]
        # The cause of an error of another rank is lost on the way.
        raise (os_error_in(reason) or OSError("a rank could not write its part as a whole")) from None


def check_whole(folder: Path) -> None:
    """Raise UserError unless the files of all ranks are in `folder`, as `write_shards` has left it."""
    parts = _reader(folder).read_metadata().storage_data.values()
    if lost := sorted(name for name in {part.relative_path for part in parts} if not (folder / name).is_file()):
        raise UserError(f"{folder} lacks {lost[0]}, which another process wrote; {ONE_FOLDER}")


def read_shards(
    path: Path, make: Callable[[str, torch.Size, torch.dtype], torch.Tensor | None], *, alone: bool
) -> dict[str, torch.Tensor]:
    """Fill the tensors that `make` (key, shape, type) returns from a sharded checkpoint whose hashes agree.

    Where it returns None, the tensor is not read. A DTensor gets the part of this rank. alone: only this process reads;
    otherwise all ranks read together.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException

    reader = _reader(path / SHARDS)
    known = reader.read_metadata().state_dict_metadata
    made = {key: make(key, *_shape_and_type(path, key, entry)) for key, entry in known.items()}
    tensors = {key: tensor for key, tensor in made.items() if tensor is not None}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # warning: there is no process group
            dcp.load(tensors, storage_reader=reader, no_dist=alone)
    except CheckpointException as error:
        reason = first_line(next(iter(error.failures.values()))[0])
        raise UserError(f"checkpoint {path} cannot be read: {reason}") from None
    return tensors


def shapes_in(path: Path) -> dict[str, torch.Size]:
    """Key -> shape of the tensors of a sharded checkpoint whose hashes agree."""
    known = _reader(path / SHARDS).read_metadata().state_dict_metadata
    return {key: _shape_and_type(path, key, entry)[0] for key, entry in known.items()}


def _shape_and_type(
    path: Path, key: str, entry: TensorStorageMetadata | BytesStorageMetadata
) -> tuple[torch.Size, torch.dtype]:
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata

    if isinstance(entry, BytesStorageMetadata):
        raise UserError(f"checkpoint {path} holds something that is no tensor: {key}")
    return entry.size, entry.properties.dtype


def _reader(folder: Path) -> FileSystemReader:
    """PyTorch's reader, restricted to the few classes that a `.metadata` file needs when it is unpickled."""
    import torch.distributed.checkpoint as dcp

    class Reader(dcp.FileSystemReader):
        def read_metadata(self, *_args: Any, **_kwargs: Any) -> Metadata:
            try:
                with open(folder / ".metadata", "rb") as file:
                    metadata: Metadata = _MetadataUnpickler(file).load()
                if not isinstance(metadata.state_dict_metadata, dict) or metadata.storage_meta is None:
                    raise ValueError("FileSystemWriter writes both")
                metadata.storage_meta.load_id = self.load_id
            except Exception:  # a pickle that is no pickle can raise anything
                raise UserError(f"{folder}/.metadata holds something that is no metadata; it was not loaded") from None
            return metadata

    return Reader(folder)


class _MetadataUnpickler(pickle.Unpickler):
    ROOMS = ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem")
    CLASSES = {("torch", "Size"), ("torch", "device"), ("torch.serialization", "_get_layout")}
    CLASSES |= {("pathlib", "PosixPath"), ("pathlib._local", "PosixPath")}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):  # how some releases of Python 3.11 pickle a member of an Enum
            return _enum_member
        found = super().find_class(module, name) if module == "torch" or module in self.ROOMS else None
        is_own = isinstance(found, type) and found.__module__ in self.ROOMS
        if is_own or isinstance(found, torch.dtype) or (module, name) in self.CLASSES:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name}")


def _enum_member(kind: type, name: str) -> enum.Enum:
    if isinstance(kind, enum.EnumMeta):
        return kind[name]
    raise pickle.UnpicklingError(f"getattr of {kind}")


def read_whole(path: Path, groups: dict[str, Any]) -> dict[str, Any]:
    """The state dicts of model and optimizer, and the copies of averages, assembled from a sharded checkpoint."""
    flat = read_shards(path, lambda _, shape, dtype: torch.empty(shape, dtype=dtype), alone=True)
    model: dict[str, torch.Tensor] = {}
    averages: dict[str, torch.Tensor] = {}
    states: dict[str, dict[str, torch.Tensor]] = {name: {} for name in groups["names"]}
    for key, tensor in flat.items():
        kind, name, *part = key.split("/")
        if kind == "model":
            model[name] = tensor
        elif kind == "averages":
            averages[f"{name}/{part[0]}"] = tensor
        else:
            states[name][part[0]] = tensor
    numbered = {number: states[name] for number, name in enumerate(groups["names"]) if states[name]}
    optimizer = {"state": numbered, "param_groups": groups["param_groups"]}
    return {"model": model, "optimizer": optimizer} | ({"averages": averages} if averages else {})
