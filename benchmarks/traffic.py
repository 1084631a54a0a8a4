"""What a piece of training asks of the device: bytes, FLOPs and calls by class, counted and not measured.

With the rates of a machine they give a floor of the time: an operator that PyTorch calls by itself moves its inputs and
outputs. Compiled code moves less, because it fuses operators.
"""

from __future__ import annotations

import collections
import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch._library.custom_ops import OPDEFS
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

MATMUL, ATTENTION, HEAD, ELEMENTWISE, OPTIMIZER, COPIES, COMM = CLASSES = (
    "matmul", "attention", "head", "elementwise", "optimizer", "copies", "comm"
)  # fmt: skip
# What an H100 reaches of its data sheet (3.35 TB/s, 989 TFLOP/s) in a large copy and a large product of bf16 matrices.
BYTES_PER_S, FLOPS_PER_S = 3.0e12, 700e12
# Operators that neither read nor write: new memory, and views that PyTorch does not mark as such.
FREE = {"empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "_unsafe_view", "lift_fresh"}
PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "addmv", "mv", "dot"}
MOVES = {"copy_", "_to_copy", "clone", "_local_scalar_dense"}
# Of these operators the first input is a table of which only the rows of the output are read.
LOOKUPS = {"embedding", "index_select", "gather"}


@dataclass
class Amount:
    """bytes: read and written. flops: of matrix products and attention, with masked scores. calls: of operators.
    seconds: the floor of the time, in which each operator is limited by its bytes or by its FLOPs."""

    bytes: int = 0
    flops: int = 0
    calls: int = 0
    seconds: float = 0.0


def class_of(name: str) -> str:
    """The class of an operator, by its name without the overload, such as aten::mm."""
    space, _, short = name.partition("::")
    if "cross_entropy" in short:
        return HEAD
    if "c10d" in space:
        return COMM
    if "attention" in short:
        return ATTENTION
    if short in PRODUCTS:
        return MATMUL
    if short.startswith(("_fused_adam", "_foreach_")):
        return OPTIMIZER
    return COPIES if short in MOVES else ELEMENTWISE


class Traffic(TorchDispatchMode):
    """Counts the operators that are called while it is entered, also in the backward pass. Use `counting`.

    The operators of this project's kernels are looked into. Each tensor that a Triton kernel is given counts once,
    although some kernels read a tensor twice or also write it.
    """

    def __init__(self, bytes_per_s: float, flops_per_s: float) -> None:
        super().__init__()
        self.bytes_per_s, self.flops_per_s = bytes_per_s, flops_per_s
        self.operators: collections.Counter[str] = collections.Counter()
        self.by_class = {name: Amount() for name in CLASSES}
        self.inside: str | None = None  # the class to which everything belongs at present

    @property
    def total(self) -> Amount:
        found = Amount()
        for amount in self.by_class.values():
            for name, value in vars(amount).items():
                setattr(found, name, getattr(found, name) + value)
        return found

    def _add(self, kind: str, n_bytes: int, flops: int = 0) -> None:
        amount = self.by_class[kind]
        amount.bytes += n_bytes
        amount.flops += flops
        amount.seconds += max(n_bytes / self.bytes_per_s, flops / self.flops_per_s)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, function._schema.name
        kind = self.inside or class_of(name)
        if not (function.is_view or name.partition("::")[2] in FREE):
            self.by_class[kind].calls += 1
            self.operators[name] += 1
        own = OPDEFS.get(name) if name.startswith("scaling_testbed::") else None
        if own is not None:
            outer, self.inside = self.inside, kind
            try:
                with self:
                    return own._init_fn(*args, **kwargs)
            finally:
                self.inside = outer
        out = function(*args, **kwargs)
        flops = 0
        if (count := flop_registry.get(function._overloadpacket)) is not None:
            # The formulas do not know the argument out_dtype.
            known = [value for value in args if not isinstance(value, torch.dtype)]
            flops = count(*known, **kwargs, out_val=out)
        self._add(kind, bytes_moved(function, args, kwargs, out), flops)
        return out

    def triton(self, *arguments: Any) -> None:
        """Count a launch of a Triton kernel with these arguments."""
        self._add(self.inside or ELEMENTWISE, sum(map(size, tensors(arguments))))


@contextlib.contextmanager
def counting(bytes_per_s: float = BYTES_PER_S, flops_per_s: float = FLOPS_PER_S) -> Iterator[Traffic]:
    """Count what is called inside of this context, for a device of these rates."""
    traffic = Traffic(bytes_per_s, flops_per_s)

    def begin(*_: Any) -> None:
        traffic.inside = OPTIMIZER

    def end(*_: Any) -> None:
        traffic.inside = None

    hooks = register_optimizer_step_pre_hook(begin), register_optimizer_step_post_hook(end)
    try:
        with _launches_of_triton(traffic.triton), traffic:
            yield traffic
    finally:
        for hook in hooks:
            hook.remove()


@contextlib.contextmanager
def _launches_of_triton(tell: Callable[..., None]) -> Iterator[None]:
    if "triton" not in sys.modules:  # no kernel has been launched yet
        yield
        return
    from triton.runtime.jit import JITFunction

    run = JITFunction.run

    def told(kernel, *args, **kwargs):
        tell(args, kwargs)
        return run(kernel, *args, **kwargs)

    JITFunction.run = told
    try:
        yield
    finally:
        JITFunction.run = run


def bytes_moved(function, args: tuple, kwargs: dict[str, Any], out: Any) -> int:
    """Bytes that an operator reads and writes: its inputs, its outputs, and the inputs that it changes."""
    name = function._schema.name.partition("::")[2]
    if function.is_view or name in FREE:
        return 0
    written = sum(map(size, tensors(out)))
    if name in LOOKUPS:
        return 2 * written
    if name in ("zero_", "fill_"):
        return written
    given = zip(function._schema.arguments, args, strict=False)
    changed = [value for argument, value in given if argument.alias_info is not None and argument.alias_info.is_write]
    if not function._schema.returns:  # else what is changed is returned
        written += sum(map(size, tensors(changed)))
    return sum(map(size, tensors(args, kwargs))) + written


def tensors(*nested: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(nested) if isinstance(leaf, torch.Tensor)]


def size(x: torch.Tensor) -> int:
    """Bytes of a tensor. An expanded one has no more than its storage."""
    return min(x.numel() * x.element_size(), x.untyped_storage().nbytes())
