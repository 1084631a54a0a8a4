"""What a sweep file declares before its runs: how its results will be judged.

    declared:
      lr_range: [1e-3, 1]                 # the rates of S
      critical_excess: 0.25               # nats above the best loss, for the critical rate
      margins: {S: 0.05, loss: 0.02, critical_lr: 1.25}       # the least effects that count, by measure
      seed_sd: {S: 0.03, loss: 0.01}      # of a paired difference at one size, for `sweep plan`

A margin of a measure that is compared by its ratio is a factor. measures.py names the measures. The first `sweep run`
or `submit` of a folder copies the declaration to sweep.json, with the experiment, the seeds and the rates of the sweep,
the date and the commit, and with each claim of the experiment and how it is judged (described.py). A change after the
first result is recorded there beside it, with the number of runs that had a result by then. Verdicts go by what was
declared before the first result. Only the claims of that experiment are judged, and of these only those that were
recorded, as they were recorded. Earlier versions recorded no claims; then all claims of the experiment are judged.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from scaling_testbed.analysis.curves.critical_rate import EXCESS
from scaling_testbed.analysis.curves.lr_sensitivity import DEFAULT_RANGE
from scaling_testbed.analysis.rows.study import Study
from scaling_testbed.errors import ConfigError

KEYS = ("lr_range", "critical_excess", "margins", "seed_sd")
FACTORS = ("critical_lr", "best_lr", "recorded")  # measures that are compared by their ratio
DIFFERENCES = ("S", "loss", "share", "logit", "octaves")
MEASURES = (*DIFFERENCES, *FACTORS)
CLAIM, JUDGED = "claim", "judged"  # of a recorded claim
NOT_DECLARED = "this claim was not declared before the runs"
WORDS = {"critical_lr": "critical rate", "best_lr": "best rate", "recorded": "diagnostic", "logit": "output logit"}


@dataclass(frozen=True, kw_only=True)
class Declaration:
    """How a study is judged.

    margins: the least effect that counts, by measure; a factor for FACTORS. seed_sd: the standard deviation over seeds
    of a paired difference at one size, of logarithms for FACTORS. experiment: PAPER/NAME, whose claims are meant; None
    if the sweep names none. seeds, rates: those of the sweep. claims: the text (CLAIM) of each claim of the experiment
    and how it is judged (JUDGED); None if they were not recorded. date, commit: when it was declared; None before that.
    results: how many runs had a result when it was last changed. changed: whether it was changed after the first
    result. first: what was declared before that.
    """

    lr_range: tuple[float, float] = DEFAULT_RANGE
    critical_excess: float = EXCESS
    margins: Mapping[str, float] = field(default_factory=dict)
    seed_sd: Mapping[str, float] = field(default_factory=dict)
    experiment: str | None = None
    seeds: Sequence[int] = ()
    rates: Sequence[float] = ()
    claims: Sequence[Mapping[str, str]] | None = None
    date: str | None = None
    commit: str | None = None
    results: int = 0
    changed: bool = False
    first: "Declaration | None" = None

    def margin(self, measure: str) -> float | None:
        """The margin of a measure on the scale of its differences: of a factor, the logarithm. None: none declared."""
        value = self.margins.get(measure)
        return math.log(value) if value is not None and measure in FACTORS else value

    @property
    def counted(self) -> "Declaration":
        """The declaration that verdicts go by: what was declared first."""
        return self.first or self

    def judges_as(self, other: "Declaration") -> bool:
        """Whether both judge results in the same way. seed_sd is for plans and judges nothing."""
        keys = (*(key for key in KEYS if key != "seed_sd"), "experiment", "seeds", "rates")
        alike = all(_plain(getattr(self, key)) == _plain(getattr(other, key)) for key in keys)
        if not alike or self.claims is None or other.claims is None:
            return alike
        reasons, gone = compared(self.claims, other.claims)
        return not any(reasons) and not gone

    def record(self) -> dict[str, Any]:
        """The declaration as it stands in sweep.json."""
        own = {field.name: _plain(getattr(self, field.name)) for field in dataclasses.fields(self)}
        if self.claims is None:
            del own["claims"]
        return {**own, "first": self.first and self.first.record()}

    def __str__(self) -> str:
        margins = ", ".join(_margin_text(name, value) for name, value in self.margins.items())
        low, high = self.lr_range
        said = f"the claims of {self.experiment}; " if self.experiment else ""
        said += f"S over rates from {low:g} to {high:g}; critical rate at {self.critical_excess:g} nats above the best"
        said += f"; margins: {margins}" if margins else "; no margins"
        said += f"; seeds {', '.join(map(str, self.seeds))}" if self.seeds else ""
        said += f"; rates {', '.join(f'{lr:g}' for lr in self.rates)}" if self.rates else ""
        when = f"{'changed' if self.changed else 'declared'} {self.date}" if self.date else "declared"
        said += f"; {when}" + (f" at commit {self.commit[:12]}{self.commit[40:]}" if self.commit else "")
        if self.results:
            said += f", when {self.results} runs had a result"
            return f"{said}. Before that: {self.first}" if self.first else said
        return f"{said}, before any run had a result" if self.date else said


def compared(
    declared: Sequence[Mapping[str, str]], now: Sequence[Mapping[str, str]]
) -> tuple[list[str | None], list[str]]:
    """For each claim of now the reason why it is not as it was declared, None if it is; and the texts of the declared
    claims that are not among them.

    A claim with other words is the same if it alone is judged so, and the declared one alone was.
    """
    left = list(declared)
    reasons: list[str | None] = [NOT_DECLARED] * len(now)
    for place, one in enumerate(now):
        if one in left:
            left.remove(one)
            reasons[place] = None
    for place, one in enumerate(now):
        found = next((other for other in left if other[CLAIM] == one[CLAIM]), None)
        if reasons[place] and found:
            left.remove(found)
            reasons[place] = f"it is judged otherwise than was declared: declared {found[JUDGED]}, now {one[JUDGED]}"
    before, after = (Counter(one[JUDGED] for one in some) for some in (declared, now))
    for place, one in enumerate(now):
        found = next((other for other in left if other[JUDGED] == one[JUDGED]), None)
        if reasons[place] == NOT_DECLARED and found and before[one[JUDGED]] == after[one[JUDGED]] == 1:
            left.remove(found)
            reasons[place] = None
    return reasons, [one[CLAIM] for one in left]


def _margin_text(measure: str, value: float) -> str:
    unit = " nats" if measure in ("S", "loss") else ""
    return f"{WORDS.get(measure, measure)} {'a factor of ' * (measure in FACTORS)}{value:g}{unit}"


def _plain(value: Any) -> Any:
    return dict(value) if isinstance(value, Mapping) else list(value) if isinstance(value, (list, tuple)) else value


def parsed(entry: Any, **more: Any) -> Declaration:
    """The declaration of a sweep file's `declared`. Raises ConfigError, which names the key."""
    if not isinstance(entry, Mapping):
        raise ConfigError(f"declared must be a mapping of {', '.join(KEYS)}; got {entry!r}")
    if unknown := [key for key in entry if key not in KEYS]:
        raise ConfigError(f"declared has no key {unknown[0]}; it has {', '.join(KEYS)}")
    found: dict[str, Any] = {}
    if "lr_range" in entry:
        ends = entry["lr_range"]
        if not isinstance(ends, Sequence) or isinstance(ends, str) or len(ends) != 2:
            raise ConfigError(f"declared.lr_range must be [LOW, HIGH]; got {ends!r}")
        found["lr_range"] = tuple(_number("lr_range", end) for end in ends)
        if found["lr_range"][0] >= found["lr_range"][1]:
            raise ConfigError(f"declared.lr_range must be [LOW, HIGH] with LOW < HIGH; got {ends!r}")
    if "critical_excess" in entry:
        found["critical_excess"] = _number("critical_excess", entry["critical_excess"])
    for key in ("margins", "seed_sd"):
        found[key] = _by_measure(key, entry.get(key, {}))
    for name in (name for name, value in found["margins"].items() if name in FACTORS and value <= 1):
        raise ConfigError(f"declared.margins.{name} is a factor; it must be above 1")
    return Declaration(**found, **more)


def _by_measure(key: str, entry: Any) -> dict[str, float]:
    if not isinstance(entry, Mapping):
        raise ConfigError(f"declared.{key} must be a mapping of measures to numbers; got {entry!r}")
    if unknown := [name for name in entry if name not in MEASURES]:
        raise ConfigError(f"declared.{key} has no measure {unknown[0]}; it has {', '.join(MEASURES)}")
    return {name: _number(f"{key}.{name}", value) for name, value in entry.items()}


def _number(name: str, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if isinstance(value, bool) or not 0 < number < math.inf:
        raise ConfigError(f"declared.{name} must be a number greater than zero; got {value!r}")
    return number


def of_study(study: Study) -> tuple[Declaration, bool]:
    """The declaration that counts in a study and whether it has one; otherwise the defaults, without margins. Raises
    ConfigError, which names sweep.json, if it cannot be read."""
    found = recorded_in(study)
    return found.counted if found else Declaration(), found is not None


def recorded_in(study: Study) -> Declaration | None:
    """All that the sweep.json of a study declares, with later changes. Raises ConfigError as `of_study`."""
    try:
        return recorded(study.declared)
    except ConfigError as error:
        raise ConfigError(f"sweep.json of {study.path}: {error}") from None


OF_THE_RECORD = (
    *(("seeds", list), ("rates", list), ("claims", list), ("experiment", str)),
    *(("date", str), ("commit", str), ("results", int)),
)


def recorded(content: Any) -> Declaration | None:
    """The declaration of a sweep.json, None if it has none. Raises ConfigError if it cannot be read."""
    if content is None:
        return None
    if not isinstance(content, Mapping):
        raise ConfigError(f"declared must be a mapping; got {content!r}")
    own = parsed({key: content[key] for key in KEYS if content.get(key) is not None})
    about = {field.name for field in dataclasses.fields(Declaration)} - {*KEYS, "first"}
    more = {key: content[key] for key in about if content.get(key) is not None}
    for key, kind in OF_THE_RECORD:
        if key in more and not isinstance(more[key], kind):
            raise ConfigError(f"declared.{key} must be a {kind.__name__}; got {more[key]!r}")
    for key in ("seeds", "rates"):
        if wrong := [one for one in more.get(key, []) if isinstance(one, bool) or not isinstance(one, (int, float))]:
            raise ConfigError(f"declared.{key} must hold numbers; got {wrong[0]!r}")
    for one in more.get("claims", []):
        if not isinstance(one, Mapping) or not all(isinstance(one.get(key), str) for key in (CLAIM, JUDGED)):
            raise ConfigError(f"declared.claims must hold mappings with the texts {CLAIM} and {JUDGED}; got {one!r}")
    if "claims" in more:
        more["claims"] = [{key: one[key] for key in (CLAIM, JUDGED)} for one in more["claims"]]
    return dataclasses.replace(own, **more, first=recorded(content.get("first")))
