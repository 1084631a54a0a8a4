"""What training minimises, beside the plain cross-entropy. No torch here, so that a grid can be planned.

An objective is a dataclass in its own file, registered by name, which a file in configs/objective/ fills:

    @OBJECTIVES.register("label_noise")
    @dataclass(frozen=True, kw_only=True)
    class LabelNoise(Weighted): ...

It gets the hidden states of a micro-batch and returns a sum to minimise, with the cross-entropy beside it. Validation
does not know it: a validation loss is always the plain cross-entropy.

Shapes in names: B sequences, T positions, D model width, V vocabulary.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from scaling_testbed.keys import key
from scaling_testbed.registry import Registry

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from scaling_testbed.learning.config import CrossEntropyConfig
    from scaling_testbed.learning.loss import LossTerms
    from scaling_testbed.model.config import ModelConfig
    from scaling_testbed.model.transformer import Transformer

OBJECTIVES: Registry[type[Objective]] = Registry("objective")


@dataclass(frozen=True, kw_only=True)
class Given:
    """A micro-batch after the forward pass.

    tokens_BS: token ids [B, T + 1]. targets_BT: int64, -100 at a position that has none. begins_BT: the begins of
    documents, as for Transformer.forward, or None. hidden_BTD: the final hidden states.
    weight_VD: the head, which multiplies them. softcap: of the logits. loss: z-loss, and the path that computes
    cross-entropies. beside: what `Built.beside` gave, on the device.
    """

    tokens_BS: Tensor
    targets_BT: Tensor
    begins_BT: Tensor | None
    hidden_BTD: Tensor
    weight_VD: Tensor
    softcap: float | None
    loss: CrossEntropyConfig
    beside: Mapping[str, Tensor]

    @property
    def valid_BT(self) -> Tensor:
        """Whether a position has a target."""
        from scaling_testbed.learning.loss import IGNORE

        return self.targets_BT != IGNORE

    def cross_entropy(self, weights_BT: Tensor | None = None) -> LossTerms:
        """The cross-entropy with the z-loss; with weights_BT each token's cross-entropy counts so many times, and
        `objective` is the weighted sum. The weights are fp32 and have no gradient. They may be negative, and the z-loss
        has no weight. Where there is no target they may be anything."""
        import torch

        from scaling_testbed.learning.loss import LossTerms, cross_entropy, z_loss_of

        weights_N = None if weights_BT is None else torch.where(self.valid_BT, weights_BT, 0.0).flatten()
        loss, ce_N, log_z_N = cross_entropy(
            self.loss,
            self.hidden_BTD.flatten(0, 1),
            self.weight_VD,
            self.targets_BT.flatten(),
            softcap=self.softcap,
            weights_N=weights_N,
        )
        weighted = None if weights_N is None else (weights_N * ce_N).sum()
        return LossTerms(loss, ce_N.sum(), z_loss_of(self.loss, log_z_N), self.valid_BT.sum(), weighted)

    def ce_BT(self) -> Tensor:
        """The cross-entropy of each target without a gradient, 0 where there is none: one more pass through the
        head."""
        import torch

        from scaling_testbed.learning.loss import cross_entropy

        with torch.no_grad():
            hidden_ND, targets_N = self.hidden_BTD.flatten(0, 1), self.targets_BT.flatten()
            found = cross_entropy(self.loss, hidden_ND, self.weight_VD, targets_N, softcap=self.softcap)
        return found.ce_N.view_as(self.targets_BT)


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What is known of a run before it has data. sources: the names of the parts of its mixture, in rising order; empty
    if it has none. weights_change: whether their weights change during the run. begins_in_run: whether it begins in the
    state of another run (start.run). grows: whether its model is made larger than that of the other run."""

    model: ModelConfig
    sequence_length: int
    sources: tuple[str, ...]
    weights_change: bool
    begins_in_run: bool
    grows: bool


@dataclass(frozen=True, kw_only=True)
class Stream:
    """The training sequences of a source. rows: how many of them a batch has, on average. targets: how many targets a
    sequence has, on average. data_fingerprint: of its corpus. documents: the sequences as a data.cutting.Cut that tells
    their documents apart, where they are known."""

    rows: float
    targets: float
    data_fingerprint: str
    documents: Callable[[], Any]


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """What an objective can use when it is built, in each process.

    folder: of the run. device, precision: of the forward passes. on_main: calls a function in the first process, and
    gives its result, plain data, in all. load_model: (folder of a finished run, step) -> its model, frozen and on the
    device, which has the tokenizer of this run; and run_id, step, weights_sha256, n_params, val_loss, and tokens and
    FLOPs of its training. open_targets: the stored targets in a folder (data.targets.Targets), of the sequences of this
    run. streams: of the sources of a mixture by name, else of the only one. start: the run_id and the step of the run
    in whose state this one begins, or None. losses_at_start: loads the weights of that run, and gives a function from
    batches (data.cutting.Batch) to the cross-entropy ce_BT of each target under these weights, 0 where there is none,
    as an array. It raises UserError if they are not there. All processes must call load_model and open_targets.
    """

    folder: Path
    device: torch.device
    precision: str
    on_main: Callable[[Callable[[], Any]], Any]
    load_model: Callable[[Path, int], tuple[Transformer, Mapping[str, Any]]]
    open_targets: Callable[[Path], Any]
    streams: Mapping[str, Stream]
    start: Mapping[str, object] | None
    losses_at_start: Callable[[], Callable[[Any], Any]]


@dataclass(frozen=True, kw_only=True)
class Built:
    """An objective at work. terms: of a micro-batch; None: the cross-entropy. divisor: what a step divides the sum over
    its batch by, a number that all steps share; None: the number of targets of the batch. beside: what batches have
    beside the tokens (data.batches.Beside), or None. row: the fields that it adds to the run's row. teacher: what row
    and checkpoints record of a finished run that it learns from, with its weights_sha256; None if there is none."""

    terms: Callable[[Given], LossTerms] | None = None
    divisor: float | None = None
    beside: Any = None
    teacher: Mapping[str, Any] | None = None
    row: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Objective(abc.ABC):
    """The base of all objectives. A subclass defines `build`.

    is_cross_entropy: whether it is the cross-entropy. An objective with other probabilities at its minimum is read
    after one temperature too: validation then has ce_scaled. looked_up: the keys that `resolved` gives a value.
    """

    is_cross_entropy: ClassVar[bool] = False
    looked_up: ClassVar[tuple[str, ...]] = ()

    name: str = key("", "The objective of training.")

    def check(self, asked: Asked) -> None:  # noqa: B027 (most have nothing to check)
        """Raise ConfigError that names the key if it cannot be the objective of such a run."""

    def resolved(self) -> Objective:
        """This objective with the values of the keys that are looked up in files. Raises ConfigError or UserError."""
        return self

    @property
    def reads_run(self) -> tuple[Path, int] | None:
        """The folder and the step of a finished run whose checkpoint it reads; None if it reads none."""
        return None

    def flops_per_token(self, model: ModelConfig, sequence_length: int) -> float:
        """The FLOPs that it adds to training on one token, counted as in model.counting.flops_per_token. `model` is
        resolved."""
        return 0

    def bytes_kept(self, model: ModelConfig) -> int:
        """Bytes of the tensors that each process keeps for it between steps, unsharded. `model` is resolved."""
        return 0

    @abc.abstractmethod
    def build(self, surroundings: Surroundings) -> Built:
        """What a run needs of it. Called once in each process, after the data are prepared. Raises UserError."""


class Weighted(Objective):
    """An objective whose gradient is that of the cross-entropy with a weight for each token, which has no gradient.

    A subclass defines `weights`, and `value` if the sum of weighted cross-entropies is not its value.
    """

    def flops_per_token(self, model: ModelConfig, sequence_length: int) -> float:
        return 2 * model.d_model * model.known_vocab_size  # the weights need the cross-entropies first

    @abc.abstractmethod
    def weights(self, ce_BT: Tensor, valid_BT: Tensor) -> Tensor:
        """The weights [B, T], from the cross-entropy of each target, which is 0 where valid_BT is false. They may be
        anything there."""

    def value(self, ce_BT: Tensor, valid_BT: Tensor) -> Tensor:
        """The value of the objective, summed: what training records as train_objective."""
        import torch

        return torch.where(valid_BT, self.weights(ce_BT, valid_BT) * ce_BT, 0.0).sum()

    def build(self, surroundings: Surroundings) -> Built:
        return Built(terms=self._terms)

    def _terms(self, given: Given) -> LossTerms:
        ce_BT, valid_BT = given.ce_BT(), given.valid_BT
        terms = given.cross_entropy(self.weights(ce_BT, valid_BT))
        return terms._replace(objective=self.value(ce_BT, valid_BT))
