"""The weights of a mixture that follow from the losses on its sources while a run trains (data.online)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scaling_testbed.config.run import RunConfig
from scaling_testbed.data.batches import TrainingBatches
from scaling_testbed.data.manifest import window_entropy_nats
from scaling_testbed.data.online import ENTROPY, EXCESS, OnlineRule
from scaling_testbed.data.shards import PreparedData
from scaling_testbed.errors import ConfigError, UserError
from scaling_testbed.runs.folder import RunFolder


class Mixing:
    """The losses that a rule has seen, and the weights that it has chosen, which hold in `batches`.

    weights: those in force, source -> part of the rows. The batch of a step follows from the seed and the list of
    changes, so the list is the whole state: which windows of a source were used is computed from it.
    """

    def __init__(
        self, rule: OnlineRule, batches: TrainingBatches, weights: Mapping[str, float], over: Mapping[str, float]
    ):
        total = sum(weights.values())
        self.weights = {name: weight / total for name, weight in sorted(weights.items())}
        self._rule, self._batches, self._over = rule, batches, dict(over)
        self._first: dict[str, Any] | None = None
        self._changes: list[dict[str, Any]] = []  # step, losses and weights of each, the oldest first

    def observe(self, step: int, losses: Mapping[str, float], steps: int) -> dict[str, Any]:
        """Take in the losses of an evaluation after `step` updates of `steps`, change the weights if that is due, and
        return what the record of the step says of them.

        The same step may come again, after a stop in its evaluation. Nothing is left to weight after the last step, and
        a loss that is not finite leaves the weights as they are.
        """
        own = {name: losses[name] for name in self.weights}
        last = self._changes[-1] if self._changes else self._first
        if last is None:
            self._first = {"step": step, "losses": own}
        elif last["step"] < step < steps and step % self._rule.every_steps == 0:
            assert self._first is not None
            rounds = [change["losses"] for change in self._changes]
            weights = self._rule.weights(self._first["losses"], [*rounds, own], self._over)
            if weights is not None:
                self._changes.append({"step": step, "losses": own, "weights": weights})
                self._batches.change(step, weights)
                self.weights = weights
        return {"weights_by_source": self.weights}

    def state(self) -> dict[str, Any]:
        """All that was seen and chosen, as plain data."""
        return {"first": self._first, "changes": list(self._changes), "over": self._over}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from the result of `state`. Raises UserError if losses in `over` are others now."""
        if state["over"] != self._over:
            differing = sorted(name for name in self._over if state["over"].get(name) != self._over[name])
            raise UserError(
                f"data.online.over: the loss for {differing[0]} was {state['over'].get(differing[0])} when the run "
                f"began and is {self._over[differing[0]]} now; restore the run that it is taken from"
            )
        self._first = state["first"]
        for change in state["changes"]:
            self._changes.append(change)
            self._batches.change(change["step"], change["weights"])
            self.weights = change["weights"]


def open_mixing(run: RunConfig, data: PreparedData, batches: TrainingBatches) -> Mixing | None:
    """The online weights of a run before its first evaluation; None without data.online. Raises ConfigError that names
    the key if a loss in data.online.over cannot be read."""
    if (rule := run.data.online_rule) is None:
        return None
    sources = data.sources()
    first = run.data.weights_by_step({name: source.train.n_tokens for name, source in sources.items()})[0][1]
    asked = {name: rule.over.get(name, ENTROPY) for name in sorted(sources)} if rule.score == EXCESS else {}
    over = {name: _loss_of(name, value, run, data) for name, value in asked.items()}
    return Mixing(rule, batches, first, over)


def _loss_of(name: str, asked: Any, run: RunConfig, data: PreparedData) -> float:
    """The loss of one source from which its excess counts, in nats per token."""
    if not isinstance(asked, str):
        return float(asked)
    source = data.sources()[name]
    if asked != ENTROPY:
        return _of_reference(name, asked, run, data)
    known = window_entropy_nats(source.manifest, run.batch.sequence_length)
    known = source.manifest.get("entropy_rate_nats") if known is None else known
    if known is None:
        raise ConfigError(f"data.online.over.{name}={ENTROPY} cannot be: {source.folder} does not say its entropy")
    return float(known)


def _of_reference(name: str, folder: str, run: RunConfig, data: PreparedData) -> float:
    """The last loss on a source of a finished run, which was trained on the same mixture or on this source alone."""
    where, row = f"data.online.over.{name}={folder}", RunFolder(Path(folder).expanduser()).result()
    if row is None or row.get("status") != "finished":
        raise ConfigError(f"{where} is no folder of a finished run")
    length = run.batch.sequence_length
    if row.get("batch.sequence_length") != length:
        raise ConfigError(
            f"{where} has losses on sequences of {row.get('batch.sequence_length')} tokens, and this run has "
            f"batch.sequence_length={length}"
        )
    if row.get("data_fingerprint") == data.fingerprint:
        found = (row.get("val_loss_by_set") or {}).get(name)
    elif row.get("data_fingerprint") == data.sources()[name].fingerprint:
        found = row.get("val_loss")
    else:
        raise ConfigError(f"{where} was trained on other data than this mixture or its source {name}")
    if found is None:
        raise ConfigError(f"{where} has no loss on {name}")
    return float(found)
