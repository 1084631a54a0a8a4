"""Weights of a mixture that follow from the losses on its sources, after Skill-It (Chen et al. 2023, arXiv 2307.14430).

A rule is a pure function of the losses of past evaluations. It only appends entries to the weights by step, from which
the batches follow as from `data.weight_changes`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from scaling_testbed.errors import ConfigError

RAW, EXCESS, RATIO = SCORES = ("raw", "excess", "ratio_to_initial")
ENTROPY = "entropy"
DECIMALS = 6  # so that sums in another order, over other numbers of processes, give the same weights


@dataclass(frozen=True, kw_only=True)
class OnlineRule:
    """How the weights follow from the losses. It is `data.online`; see `MixtureConfig`.

    At each multiple of `every_steps`, the weight of source i is floor + (1 - n floor) e_i / sum(e), where n is the
    number of sources, e_i = exp(eta sum_j A_ij S_j), and S_j is the sum of the scores of source j over the last
    `window` such evaluations (section 3.2 of the paper, algorithm 1; the floor is added here).

    score: raw, the loss; excess, the loss less that of `over`; ratio_to_initial, the loss divided by that of the first
    evaluation. over: source -> `entropy`, a loss in nats, or the folder of a finished run. matrix: i -> j -> A_ij;
    what is left out is 0. Empty: the identity.
    """

    every_steps: int
    eta: float = 0.5
    window: int = 3
    floor: float = 0.01
    score: str = EXCESS
    over: Mapping[str, Any] = field(default_factory=dict)
    matrix: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    def next_change(self, step: int) -> int:
        """The first step after `step` at which the weights change."""
        return (step // self.every_steps + 1) * self.every_steps

    def largest_share(self, n_sources: int) -> float:
        """The largest weight that a source can get."""
        return 1 - (n_sources - 1) * self.floor

    def weights(
        self, first: Mapping[str, float], rounds: Sequence[Mapping[str, float]], over: Mapping[str, float]
    ) -> dict[str, float] | None:
        """Source -> its weight, which add up to 1 but for rounding; None if a loss is not finite.

        first: the losses by source of the first evaluation. rounds: those of the evaluations at multiples of
        `every_steps`, the oldest first. over: the losses from which an excess counts. All in nats per token.
        """
        names, last = sorted(first), rounds[-self.window :]
        if not all(math.isfinite(losses[name]) for losses in (first, *last) for name in names):
            return None
        scores = {
            name: sum(self._score(losses[name], first[name], over.get(name)) for losses in last) for name in names
        }
        logits = {
            name: self.eta * sum(self._row(name, names)[other] * scores[other] for other in names) for name in names
        }
        top = max(logits.values())
        parts = {name: math.exp(logit - top) for name, logit in logits.items()}
        total, rest = sum(parts.values()), 1 - len(names) * self.floor
        return {name: round(self.floor + rest * part / total, DECIMALS) for name, part in parts.items()}

    def _score(self, loss: float, first: float, over: float | None) -> float:
        if self.score == EXCESS:
            assert over is not None
            return loss - over
        return loss / first if self.score == RATIO else loss

    def _row(self, name: str, names: Sequence[str]) -> dict[str, float]:
        """The row of the matrix of one source, with all columns."""
        row = self.matrix.get(name, {}) if self.matrix else {name: 1.0}
        return {other: float(row.get(other, 0.0)) for other in names}


def read_rule(typed: Mapping[str, Any], sources: Mapping[str, Any]) -> OnlineRule:
    """The rule that `data.online` says. sources: those of the mixture by name. Raises ConfigError."""
    known = [one.name for one in fields(OnlineRule)]
    if odd := [name for name in typed if name not in known]:
        raise ConfigError(f"data.online has no key {odd[0]}; it has {', '.join(known)}")
    if "every_steps" not in typed:
        raise ConfigError("data.online needs every_steps, such as data.online.every_steps=100")
    if len(sources) < 2:
        raise ConfigError("data.online needs two sources or more, and data.sources has one")
    rule = OnlineRule(**typed)
    for name in ("every_steps", "window"):
        value = getattr(rule, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigError(f"data.online.{name} must be a whole number from 1 up, got {value!r}")
    _check_number("eta", rule.eta, 0, math.inf)
    _check_number("floor", rule.floor, 0, 1 / len(sources))
    if rule.score not in SCORES:
        raise ConfigError(f"data.online.score must be one of {', '.join(SCORES)}, got {rule.score!r}")
    _check_over(rule, sources)
    _check_matrix(rule, sources)
    return rule


def _check_number(name: str, value: Any, low: float, below: float) -> None:
    if not _is_number(value) or not low <= value < below:
        under = f" and below {below:.3g}" if below < math.inf else ""
        raise ConfigError(f"data.online.{name} must be a number that is at least {low}{under}, got {value!r}")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _check_over(rule: OnlineRule, sources: Mapping[str, Any]) -> None:
    if not isinstance(rule.over, Mapping):
        raise ConfigError(f"data.online.over must be {{SOURCE: {ENTROPY}, NATS or RUN}}, got {rule.over!r}")
    _check_names("over", rule.over, sources)
    if rule.over and rule.score != EXCESS:
        raise ConfigError(f"data.online.over is for data.online.score={EXCESS}, and it is {rule.score}; leave it out")
    for name, value in rule.over.items():
        if not (_is_number(value) or (isinstance(value, str) and value.strip())):
            raise ConfigError(
                f"data.online.over.{name} must be {ENTROPY}, a loss in nats, or a run folder, got {value!r}"
            )
    for name, source in sources.items():
        if rule.score == EXCESS and rule.over.get(name, ENTROPY) == ENTROPY and not source.knows_entropy:
            raise ConfigError(
                f"data.online.score={EXCESS} needs data.online.over.{name}, because the entropy of data.sources.{name} "
                f"is not known: type data.online.over.{name}=RUN, the folder of a finished run, or "
                f"data.online.score={RAW}"
            )


def _check_matrix(rule: OnlineRule, sources: Mapping[str, Any]) -> None:
    if not isinstance(rule.matrix, Mapping) or not all(isinstance(row, Mapping) for row in rule.matrix.values()):
        raise ConfigError(f"data.online.matrix must be {{SOURCE: {{SOURCE: NUMBER}}}}, got {rule.matrix!r}")
    _check_names("matrix", rule.matrix, sources)
    for name, row in rule.matrix.items():
        _check_names(f"matrix.{name}", row, sources)
        for other, value in row.items():
            if not _is_number(value):
                raise ConfigError(f"data.online.matrix.{name}.{other} must be a number, got {value!r}")


def _check_names(where: str, named: Mapping[str, Any], sources: Mapping[str, Any]) -> None:
    if unknown := [name for name in named if name not in sources]:
        raise ConfigError(
            f"data.online.{where}.{unknown[0]} is no source; data.sources has {', '.join(sorted(sources))}"
        )
