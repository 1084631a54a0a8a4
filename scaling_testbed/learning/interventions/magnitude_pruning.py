"""Sparse pre-training: the smallest weights are pruned while a run trains, and stay zero."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from scaling_testbed.errors import ConfigError, check_choice
from scaling_testbed.learning.interventions.base import INTERVENTIONS, Context, Intervention
from scaling_testbed.learning.optimizers.base import local_part
from scaling_testbed.model.counting import weights_by_role
from scaling_testbed.model.parametrization import HIDDEN_ROLES
from scaling_testbed.model.parts import LINEARS

if TYPE_CHECKING:
    import torch

    from scaling_testbed.model.config import ModelConfig

ROLES = (*HIDDEN_ROLES, "head")
STRUCTURES = ("none", "2:4")
PRUNED, ALWAYS_KEPT = -1, 2**31 - 1  # keys below and above the bits of every magnitude


@INTERVENTIONS.register("magnitude_pruning")
class MagnitudePruning(Intervention):
    """Prunes the weights of smallest magnitude in the matrices of the blocks and in the head (Jin et al. 2025, arXiv
    2501.12486, after the code of the authors, github.com/tjingrant/sparse-llm-code).

    sparsity     S, the part of these weights that is pruned in the end
    begin, end   where the pruning begins and ends, as parts of the compute of the run, if an update costs as much as
                 its living weights. Embedding, gains and attention scores do not count in it
    every_steps  updates between two events of pruning. With n events the density after the i-th is (1 - S)^(i/n)
    structure    none; or 2:4: of four consecutive inputs of an output at most two are pruned, so that S = 1/2 ends in
                 2:4 sparsity

    One threshold goes over all matrices. A pruned weight never returns: its gradient is zero before the clip, and the
    weight is zero after each update, whatever decay and moments do. In the code of the authors the mask is a parameter,
    whose gradient enters the clip; here it is not.
    """

    not_averaged = "the average would hold weights that were pruned later"

    def __init__(
        self,
        sparsity: float,
        begin: float = 0.25,
        end: float = 0.75,
        every_steps: int = 100,
        structure: str = "none",
    ):
        if not 0 <= sparsity < 1:
            raise ConfigError(f"sparsity must be in [0, 1); got {sparsity}")
        check_choice("structure", structure, STRUCTURES)
        if structure == "2:4" and sparsity > 0.5:
            raise ConfigError(f"sparsity must be at most 0.5 with structure=2:4; got {sparsity}")
        if not 0 <= begin <= end <= 1:
            raise ConfigError(f"begin must be from 0 to end={end}, and end at most 1; got {begin}")
        if not isinstance(every_steps, int) or every_steps < 1:
            raise ConfigError(f"every_steps must be a whole number of at least 1; got {every_steps}")
        self.sparsity, self.begin, self.end, self.every_steps = sparsity, begin, end, every_steps
        self.structure = structure

    def check(self, model: ModelConfig) -> None:
        where = "interventions.magnitude_pruning"
        if model.tied_head:
            raise ConfigError(f"{where} needs model.tied_head=false: it prunes the head and keeps the embedding")
        if LINEARS[model.linear].makes_weight_anew:
            raise ConfigError(
                f"{where} cannot be with model.linear={model.linear}, which makes another matrix of its weights; use "
                "model.linear=plain"
            )
        if self.structure == "2:4":
            widths = {"d_model": model.d_model, "heads x d_head": model.n_heads * model.head_width}
            for name, width in (widths | {"d_ff": model.ff_width}).items():
                if width % 4:
                    raise ConfigError(f"{where}.structure=2:4 needs inputs in groups of four; {name} is {width}")

    def check_steps(self, steps: int) -> None:
        events = self.events(steps)
        if self.begin < self.end and (len(events) < 2 or (self.begin > 0 and events[0] == 0)):
            raise ConfigError(
                f"interventions.magnitude_pruning.every_steps={self.every_steps} is too long for a run of {steps:,} "
                "steps, whose pruning would have fewer than two events or begin at once; type a smaller every_steps"
            )

    def events(self, steps: int) -> range:
        """The updates (from 0) of a run of `steps` before which weights are pruned, multiples of every_steps.

        With the density as the cost of an update, a ramp that is geometric in steps is linear in compute: from begin to
        end it takes (end - begin) ln(1 / (1 - S)) / S of the steps of the dense run of the same compute.
        """
        living = 1 - self.sparsity
        ramp = (self.end - self.begin) * (-math.log(living) / self.sparsity if self.sparsity else 1.0)
        whole = self.begin + ramp + (1 - self.end) / living
        first, last = (
            min(round(part / whole * steps / self.every_steps), (steps - 1) // self.every_steps)
            for part in (self.begin, self.begin + ramp)
        )
        return range(first * self.every_steps, last * self.every_steps + 1, self.every_steps)

    def kept(self, n_weights: int, event: int, steps: int) -> int:
        """The number of living weights after an event (from 0), of `n_weights`."""
        return max(1, int((1 - self.sparsity) ** ((event + 1) / len(self.events(steps))) * n_weights))

    def pruned(self, model: ModelConfig, steps: int) -> Sequence[tuple[int, int]]:
        n_weights, events = _prunable(model), self.events(steps)
        return [(step, n_weights - self.kept(n_weights, event, steps)) for event, step in enumerate(events)]

    def bytes_kept(self, model: ModelConfig) -> int:
        """The masks: one bool for each weight."""
        return _prunable(model)

    def attach(self, context: Context) -> None:
        import torch

        info = context.model.parameter_info()
        self._parameters = {name: p for name, p in context.model.named_parameters() if info[name].role in ROLES}
        self._pruned = {name: torch.zeros_like(_here(p), dtype=torch.bool) for name, p in self._parameters.items()}
        self._roles = {name: info[name].role for name in self._parameters}
        self._n_weights, self._n_by_role, self._places = 0, dict.fromkeys(ROLES, 0), dict[str, int]()
        for name, parameter in self._parameters.items():
            self._places[name] = self._n_weights + _offset(parameter)  # of the first weight here, among all in a row
            self._n_weights += parameter.numel()
            self._n_by_role[self._roles[name]] += parameter.numel()
        self._living = dict(self._n_by_role)
        self._sum: Callable[[Sequence[float]], list[float]] = list  # every process has all weights, unless sharded
        if any(hasattr(p, "to_local") for p in self._parameters.values()):
            self._sum = context.sum
        here = sum(_here(p).numel() for p in self._parameters.values())
        self._copies = round(self._sum([here])[0] / self._n_weights)

    def before_update(self, step: int, steps: int) -> None:
        events = self.events(steps)
        if step in events:
            self._prune(self.kept(self._n_weights, events.index(step), steps))

    def after_backward(self) -> None:
        for name, parameter in self._parameters.items():
            if parameter.grad is not None:
                local_part(parameter.grad).masked_fill_(self._pruned[name], 0.0)

    def after_update(self, made: bool) -> None:
        if made:
            self._zero()

    def _zero(self) -> None:
        for name, parameter in self._parameters.items():
            _here(parameter).masked_fill_(self._pruned[name], 0.0)

    def _prune(self, keep: int) -> None:
        """Prune all living weights but the `keep` largest. Of equal weights the first are kept, by the order of the
        parameters and their places in them. Counts are whole numbers, so any sharding prunes the same weights."""
        keys = {name: self._keys(_here(p), self._pruned[name]) for name, p in self._parameters.items()}

        def above(key: int) -> int:
            return self._count([(found > key).sum() for found in keys.values()])

        threshold = _first(lambda key: above(key) < keep, 0, ALWAYS_KEPT)
        wanted = keep - above(threshold)  # of those that are equal to the threshold
        places = {name: (found == threshold).view(-1).nonzero()[:, 0] for name, found in keys.items()}
        numbers = {name: found + self._places[name] for name, found in places.items()}

        def before(place: int) -> int:
            return self._count([(found < place).sum() for found in numbers.values()])

        end = _first(lambda place: before(place) >= wanted, 0, self._n_weights)
        for name, found in keys.items():
            kept = found > threshold
            kept.view(-1)[places[name][numbers[name] < end]] = True
            self._pruned[name] = ~kept
        self._count_living()
        self._zero()

    def _keys(self, weight: torch.Tensor, pruned: torch.Tensor) -> torch.Tensor:
        """int32 in the shape of `weight`, in the order of magnitudes: the bits of |w|, PRUNED or ALWAYS_KEPT."""
        import torch

        keys = weight.abs().contiguous().view(torch.int32).masked_fill_(pruned, PRUNED)
        if self.structure == "2:4":
            groups = keys.view(keys.numel() // 4, 4)  # there may be none here
            largest = groups.argsort(dim=-1, descending=True, stable=True)[:, :2]
            groups.scatter_(-1, largest, ALWAYS_KEPT)
        return keys

    def _count(self, here: Sequence[torch.Tensor]) -> int:
        """The sum of counts of this process's parts over all processes."""
        import torch

        return round(self._sum([torch.stack(list(here)).sum().item()])[0] / self._copies)

    def _count_living(self) -> None:
        here = dict.fromkeys(ROLES, 0.0)
        for name, pruned in self._pruned.items():
            here[self._roles[name]] += pruned.numel() - pruned.sum().item()
        self._living = {
            role: round(count / self._copies) for role, count in zip(ROLES, self._sum(list(here.values())), strict=True)
        }

    def tensors(self) -> dict[str, torch.Tensor]:
        return {name: _whole(self._pruned[name], parameter).cpu() for name, parameter in self._parameters.items()}

    def restore_tensors(self, tensors: dict[str, torch.Tensor]) -> None:
        for name, parameter in self._parameters.items():
            if tensors[name].shape != parameter.shape:
                raise ValueError(f"the mask of {name} has shape {list(tensors[name].shape)}")
            self._pruned[name] = _part(tensors[name], parameter)
        self._count_living()

    def row(self) -> dict[str, Any]:
        """density_by_role: role -> the part of its weights that lives."""
        return {"density_by_role": {role: self._living[role] / n for role, n in self._n_by_role.items() if n}}


def _prunable(model: ModelConfig) -> int:
    """The number of weights that may be pruned."""
    counts = weights_by_role(model)
    return sum(counts.get(role, 0) for role in ROLES)


def _first(holds: Callable[[int], bool], low: int, high: int) -> int:
    """The smallest number from `low` to `high` for which `holds`, which is true from one number on, and at `high`."""
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle + 1, high)
    return low


def _here(parameter: torch.Tensor) -> torch.Tensor:
    """This process's part of a parameter, without a gradient, sharing its memory."""
    return local_part(parameter.detach())


def _offset(parameter: torch.Tensor) -> int:
    """The place of the first weight of this process's part in the whole parameter, which is sharded by rows."""
    if not hasattr(parameter, "to_local"):
        return 0
    mesh = parameter.device_mesh  # type: ignore[attr-defined]
    (dim,) = (place for place, kind in enumerate(parameter.placements) if kind.is_shard())  # type: ignore[attr-defined]
    rows_of_a_part = -(-parameter.shape[0] // mesh.size(dim))
    first = min(mesh.get_local_rank(dim) * rows_of_a_part, parameter.shape[0])
    return int(first * math.prod(parameter.shape[1:]))


def _whole(here: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The whole mask of which `here` is this process's part, sharded as `like` is. Every process calls it."""
    if not hasattr(like, "to_local"):
        return here
    import torch
    from torch.distributed.tensor import DTensor

    part = here.to(torch.uint8)  # gloo gathers no bools
    mesh, placements = like.device_mesh, like.placements  # type: ignore[attr-defined]
    whole = DTensor.from_local(part, mesh, placements, shape=like.shape, stride=like.stride(), run_check=False)
    return whole.full_tensor().bool()


def _part(whole: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """This process's part of a whole mask, on the device of `like`."""
    if not hasattr(like, "to_local"):
        return whole.to(like.device).clone()
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = like.device_mesh, like.placements  # type: ignore[attr-defined]
    part = distribute_tensor(whole.to(like.device), mesh, placements, src_data_rank=None)
    return part.to_local().clone()
