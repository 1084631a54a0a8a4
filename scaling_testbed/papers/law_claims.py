"""Judges of claims about laws: a number of each data set, e.g. the error of a prediction, and its limit.

The law is fitted to the runs of each seed, and the numbers of the seeds are judged as in effects.py, with the limit as
zero. A number that is an error of predictions counts noise as an error too. An equality keeps the sign of each seed's
number, and the limit is its margin. The verdict is "cannot tell" where the plan or a seed lacks a run, or where a run
diverged at all rates. Published rows have no seeds. Their numbers are facts about that table, and the claim agrees or
disagrees by them alone.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

from scaling_testbed.analysis.curves.grouping import seed_of
from scaling_testbed.analysis.rows.conditions import text
from scaling_testbed.analysis.rows.study import LR, Row, name_of
from scaling_testbed.papers.described import in_words
from scaling_testbed.papers.effects import (
    AGREES,
    CANNOT_TELL,
    DIFFERENCE,
    DISAGREES,
    EQUALITY,
    UNITS,
    Asked,
    Effect,
    Question,
    Verdict,
    few,
)
from scaling_testbed.papers.measures import Evidence
from scaling_testbed.papers.paper import Judge
from scaling_testbed.papers.predictions import Numbers

SAME = 1.25  # a number that changes by at most this factor counts as unchanged
BATCH = ("batch.sequences", "batch.sequence_length")
FACTOR = 1.1  # numbers differ if their ratio is larger than this


@dataclasses.dataclass(frozen=True)
class Part:
    """One number beside its limit. effect: positive if the claim is right. counts: whether it supports the claim."""

    effect: float
    words: str
    counts: bool = True


def _of_seeds(evidence: Evidence) -> tuple[dict[int, Evidence], list[str]]:
    """The evidence of each seed that was run at all places, and what the other seeds lack; the evidence of all rows as
    one, if there are not two such seeds."""
    rows = evidence.study.rows
    places: dict[int | None, dict[tuple[object, ...], Row]] = {}
    for row in rows:
        places.setdefault(None if row.get("seed") is None else seed_of(row), {})[_place(row, evidence)] = row
    everywhere = {place: row for own in places.values() for place, row in own.items()}
    seeds = sorted(seed for seed, own in places.items() if seed is not None and len(own) == len(everywhere))
    if len(seeds) < 2:
        return {0: evidence}, []
    lacking = [
        f"a run of seed {seed} like {name_of(row)}"
        for seed, own in places.items()
        for place, row in everywhere.items()
        if place not in own
    ]
    found = {}
    for seed in seeds:
        own = [row for row in rows if row.get("seed") == seed]
        study = dataclasses.replace(evidence.study, rows=own, missing=[])
        found[seed] = Evidence(study, evidence.group, evidence.lr_range)
    return found, lacking


def _place(row: Row, evidence: Evidence, but: str | None = None) -> tuple[object, ...]:
    """Where a run lies among those of its seed: its data, N and tokens, and all keys that vary, without `but`."""
    keys = (LR, *BATCH, *evidence.group)
    varied = (text(row.get(key)) for key in keys if key != but)
    return (row.get("dataset") or row.get("data.name"), row.get("n_params"), row.get("n_tokens"), *varied)


def _gaps(evidence: Evidence) -> list[str]:
    """The planned runs without a result, and the diverged runs of places where no rate of the same seed has a result.

    A run that diverged beside other rates is no gap: laws go by the best rate of a place, which it is not.
    """
    rows = evidence.study.rows
    ends = {(row.get("seed"), _place(row, evidence, but=LR)) for row in rows if row.get("status") != "diverged"}
    bad = [row for row in rows if (row.get("seed"), _place(row, evidence, but=LR)) not in ends]
    return [*map(name_of, evidence.study.missing), *(f"{name_of(row)} diverged" for row in bad)]


@dataclasses.dataclass(frozen=True)
class LawQuestion:
    """A judge of parts, one for each data set.

    estimand, margin, kind, ratio, called, limit, side, scope: as of a Question. unit: of what there must be one or
    more. measure: whose unit the effects have; None: none.
    """

    estimand: str
    parts: Callable[[Evidence], list[Part]]
    unit: str = "data sets"
    margin: float = 0.0
    kind: str = DIFFERENCE
    ratio: bool = False
    called: str = "The number"
    limit: float | None = None
    side: int = 1
    measure: str | None = None
    scope: str = ""

    @property
    def described(self) -> str:
        return self._question.described

    @property
    def _question(self) -> Question:
        return Question(
            self.estimand,
            self.measure or "recorded",
            self._ask,
            self.kind,
            self.margin,
            self.ratio,
            self.called,
            self.limit,
            self.side,
            scope=self.scope,
        )

    def __call__(self, evidence: Evidence) -> Verdict:
        if all(row.get("seed") is None for row in evidence.study.rows):
            parts, margin = self.parts(evidence), self.margin
            if self.kind == EQUALITY:
                parts, margin = [dataclasses.replace(one, effect=_room(margin, one.effect)) for one in parts], 0.0
            return _weighed(parts, self.unit, margin, _left_out(evidence))
        return self._question(evidence)

    def _ask(self, evidence: Evidence) -> Asked:
        of_seeds, lacking = _of_seeds(evidence)
        if gaps := _gaps(evidence) or lacking:
            return Asked(gaps=gaps)
        by_seed = {seed: self.parts(own) for seed, own in of_seeds.items()}
        effects = []
        if not any(by_seed.values()):
            return Asked(gaps=[self.unit])
        if len({len(parts) for parts in by_seed.values()}) > 1:
            return Asked(gaps=[f"the seeds have different {self.unit}"])
        for parts in zip(*by_seed.values(), strict=True):
            if not all(part.counts for part in parts):
                return Asked(remarks=[f"too near to the fitted runs to count: {parts[0].words}"])
            first = f"Seed {min(by_seed)}: " if len(by_seed) > 1 else ""
            by_part = {seed: part.effect for seed, part in zip(by_seed, parts, strict=True)}
            effects.append(Effect(by_part, first + parts[0].words))
        return Asked(effects, (), _left_out(evidence))


def _room(limit: float, number: float) -> float:
    """What is left up to a limit; a number at the limit is within it."""
    return (limit - abs(number)) or 1e-12


def _left_out(evidence: Evidence) -> list[str]:
    """The number of runs that were left out of the laws."""
    bad = sum(row.get("status") == "diverged" for row in evidence.study.rows)
    counts = ((bad, "diverged"), (len(evidence.study.missing), "without a result"))
    left_out = ", ".join(f"{number} {what}" for number, what in counts if number)
    return [f"left out: {left_out}"] if left_out else []


def _weighed(parts: Sequence[Part], unit: str, margin: float, remarks: Sequence[str]) -> Verdict:
    """The verdict by the effects beyond the margin: at least half of the parts, and none against them."""
    words = "; ".join([few([part.words for part in parts], 8) or f"no {unit} to judge by", *remarks])
    plus = sum(part.counts and part.effect > margin for part in parts)
    minus = sum(part.counts and part.effect < -margin for part in parts)
    if plus and not minus and 2 * plus >= len(parts):
        return Verdict(word=AGREES, words=words)
    if minus and not plus and 2 * minus >= len(parts):
        return Verdict(word=DISAGREES, words=words)
    near = len(parts) - plus - minus
    return Verdict(
        word=CANNOT_TELL, words=f"{words}; {plus} for it, {minus} against, {near} too close" if parts else words
    )


def within(measure: Numbers, limit: float, reach: float = 0.0, beyond: bool = False) -> Judge:
    """The judge that each number is at most a limit or, with `beyond`, above it.

    reach: a small error counts only if the predicted run has at least this many times the compute of the fitted runs. A
    large error always counts.
    """

    def parts(evidence: Evidence) -> list[Part]:
        found = []
        for one in measure(evidence):
            effect = (limit - one.number) * (-1 if beyond else 1) or 1e-12
            found.append(Part(effect, one.words, effect < 0 or one.reach >= reach))
        return found

    estimand = f"number, which must be {'above' if beyond else 'at most'} {limit:.3g}"
    scope = in_words(measure) + (f"; an error counts from {reach:g} times the compute on" if reach else "")
    return LawQuestion(estimand, parts, limit=limit, side=-1 if beyond else 1, scope=scope)


def near(measure: Numbers, limit: float, ratio: bool = False, unit_of: str | None = None) -> Judge:
    """The judge that each number is zero, to less than a limit on both sides.

    ratio: the numbers are logarithms of ratios, and the limit is a factor. unit_of: the measure whose unit they have.
    """

    def parts(evidence: Evidence) -> list[Part]:
        return [Part(one.number, one.words) for one in measure(evidence)]

    margin = math.log(limit) if ratio else limit
    called = "ratio" if ratio else "difference"
    unit = f" {UNITS[unit_of]}" if unit_of in UNITS else ""
    reach = f"a factor of {limit:g} of one" if ratio else f"{limit:g}{unit} of zero"
    return LawQuestion(
        f"{called}, which must be within {reach}",
        parts,
        margin=margin,
        kind=EQUALITY,
        ratio=ratio,
        called=f"The {called}",
        measure=unit_of,
        scope=in_words(measure),
    )


def same_over(measure: Numbers, factor: float = SAME) -> Judge:
    """The judge that the numbers of all data sets, at least two, lie within a factor of each other."""

    def parts(evidence: Evidence) -> list[Part]:
        found = measure(evidence)
        numbers = [one.number for one in found]
        words = "; ".join(one.words for one in found)
        return [Part(math.log(factor * min(numbers) / max(numbers)), words)] if len(found) > 1 else []

    called, limit = "The largest number over the least", math.log(factor)
    estimand = f"largest number over the least, which must be at most {factor:g}"
    scope = in_words(measure)
    return LawQuestion(estimand, parts, "second data set", ratio=True, called=called, limit=limit, scope=scope)


def less(measure: Numbers, other: Numbers, factor: float = FACTOR) -> Judge:
    """The judge that a number is less than another one of the same data set; it counts from a factor on."""

    def parts(evidence: Evidence) -> list[Part]:
        found = []
        for one, more in zip(measure(evidence), other(evidence), strict=True):
            gain = math.log(max(more.number, 1e-9) / max(one.number, 1e-9))
            found.append(Part(gain, f"{one.words}, {more.words}"))
        return found

    called = "The other number over the number"
    estimand = f"other number over the number, which must be above {factor:g}"
    scope = f"{in_words(measure)} beside {in_words(other)}"
    return LawQuestion(estimand, parts, margin=math.log(factor), ratio=True, called=called, scope=scope)
