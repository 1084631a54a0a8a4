"""Judges of claims about conditions: each function returns a Question, which gives a verdict on the evidence.

lines.py has those about a quantity along N, the learning rate or a key, law_claims.py those about laws.
"""

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from scaling_testbed.analysis.curves import instability
from scaling_testbed.analysis.curves.calls import places_of
from scaling_testbed.analysis.curves.grouping import SCAN, Curve
from scaling_testbed.analysis.curves.instability import LAST_MEAN, Quantity, measured, value_of
from scaling_testbed.analysis.curves.intervals import ALPHA, exact_share, p_share_above
from scaling_testbed.analysis.curves.lr_sensitivity import diverged
from scaling_testbed.analysis.figures.words import ARM, in_sentence, setting, settings, word
from scaling_testbed.analysis.rows.conditions import same, text
from scaling_testbed.analysis.rows.study import Row, name_of, number
from scaling_testbed.papers.described import in_words
from scaling_testbed.papers.effects import (
    AGREES,
    AT_MOST,
    CANNOT_TELL,
    DIFFERENCE,
    DISAGREES,
    EQUALITY,
    Asked,
    Effect,
    Question,
    Terms,
    Verdict,
    each_of,
    farther,
    few,
    pooled,
)
from scaling_testbed.papers.measures import (
    BEST_LOSS,
    LOSS,
    SIZE,
    Evidence,
    Measure,
    Place,
    Value,
    best_lr,
    critical_rates,
    measured_as,
    places,
    size_name,
)
from scaling_testbed.papers.paper import Judge

Settings = Mapping[str, object]  # keys and their values; a tuple lists alternatives


class Each(tuple[object, ...]):
    """Values of a key that a claim is about, each of them. A plain tuple lists values of which a study has some."""


WIDTH = "model.d_model"
SAME_N = 0.15  # difference of ln N: widths come in steps, so two shapes rarely have exactly one size
EACH, LARGEST, HIGHEST = "each", "largest size", "highest rate"  # where to compare


def pairs(found: Sequence[Curve], one: Settings, other: Settings) -> Iterator[tuple[Curve, Curve]]:
    """Pairs of curves with the settings `one` and `other`, which name the same keys, and equal in all else.

    The curves of a pair have the same shape. For the key `scan` they have different shapes and the same number of
    parameters to within 15 %.
    """
    for a, b in itertools.product(found, found):
        near = abs(math.log(max(a.n_params, 1) / max(b.n_params, 1))) < SAME_N
        alike = near and a.shape != b.shape if SCAN in one else a.shape == b.shape
        if alike and a.fits(one) and b.fits(other) and remaining(a, *one) == remaining(b, *one):
            yield a, b


def remaining(curve: Curve, *keys: str) -> tuple[tuple[str, str], ...]:
    """The condition of a curve without some keys."""
    return tuple(item for item in curve.condition.items() if item[0] not in keys)


def alternatives(settings: Settings, found: Iterable[Curve]) -> list[Settings]:
    """The settings with one value of each tuple: all of an Each, and those of a plain tuple that some curve has."""
    found = list(found)
    choices = []
    for key, value in settings.items():
        values = value if isinstance(value, tuple) else (value,)
        some = isinstance(value, tuple) and not isinstance(value, Each)
        choices.append([one for one in values if not some or any(curve.fits({key: one}) for curve in found)])
    return [dict(zip(settings, chosen, strict=True)) for chosen in itertools.product(*choices)]


def missing_of(evidence: Evidence, measure: Measure, found: Iterable[Curve]) -> list[str]:
    """The reasons why these curves cannot be judged by a measure: missing runs, and places that have runs and no value.

    Such runs often diverged, so the others alone would be a choice by the result.
    """
    gaps = []
    for curve in found:
        without = [place for place in places(curve, measure.level) if measure.of(evidence, place) is None]
        gaps += measure.missing(evidence, curve) or [f"{measure.name} at {place}" for place in without]
    return gaps


def values_at(evidence: Evidence, measure: Measure, curve: Curve) -> dict[float | None, tuple[Place, Value]]:
    """The measured values of a curve by rate; None is the rate of a measure of the whole curve."""
    taken = ((place, measure.of(evidence, place)) for place in places(curve, measure.level))
    return {place.lr: (place, value) for place, value in taken if value is not None}


def up_to_measured(found: Sequence[Curve]) -> list[Curve]:
    """The curves up to the largest measured size."""
    largest = max((curve.n_params for curve in found if curve.runs), default=math.inf)
    return [curve for curve in found if curve.n_params <= largest]


def said(value: object) -> str:
    """The text of a wanted value in a sentence."""
    return "/".join(map(text, value)) if isinstance(value, tuple) else text(value)


def said_of(wanted: Settings) -> str:
    """The text of wanted settings in a sentence."""
    return ", ".join(setting(key, said(value)) for key, value in wanted.items())


def said_after(first: Settings, wanted: Settings) -> str:
    """The same after other settings of the same keys: without the key if there is only one, else what differs."""
    if len(wanted) == 1:
        return said_of(dict.fromkeys([ARM], *wanted.values()))
    return said_of({key: value for key, value in wanted.items() if value != first[key]})


def varying(conditions: Iterable[Iterable[tuple[str, str]]]) -> list[str]:
    """The keys that have several values in conditions, as `remaining` gives them."""
    found = [dict(condition) for condition in conditions]
    return [key for key in dict.fromkeys(itertools.chain(*found)) if len({one.get(key) for one in found}) > 1]


def of_varying(curve: Curve, vary: Sequence[str]) -> list[str]:
    """The settings of a curve in the keys that vary, in words."""
    return [setting(key, curve.condition[key]) for key in vary]


def in_full(settings: Settings) -> str:
    """The settings as a declaration records them."""
    return ", ".join(f"{key}={said(value)}" for key, value in settings.items())


def by_keys(lower: Settings, higher: Settings) -> str:
    """The keys in which two sets of settings differ, as a declaration records them."""
    every = [any(isinstance(own.get(key), Each) for own in (lower, higher)) for key in lower]
    return f"by {', '.join('each ' * each + key for key, each in zip(lower, every, strict=True))}"


def among(where: Settings | None) -> str:
    """The runs that a judge is about, as a declaration records them; empty if it is all."""
    return f"where {in_full(where)}" if where else ""


def of_largest(found: Sequence[Curve]) -> list[Curve]:
    """The curves of the largest size."""
    top = max((curve.n_params for curve in found), default=0)
    return [curve for curve in found if curve.n_params == top]


def compare(
    measure: Measure,
    key: str,
    lower: object,
    higher: object,
    where: Settings | None = None,
    at: str = EACH,
    margin: float | None = None,
    factor: float | None = None,
    contrary: bool = False,
) -> Judge:
    """The judge that the measure is lower with one value of a key than with another, as `between` says it."""
    return between(measure, {key: lower}, {key: higher}, where, at, margin, factor, contrary)


def between(
    measure: Measure,
    lower: Settings,
    higher: Settings,
    where: Settings | None = None,
    at: str = EACH,
    margin: float | None = None,
    factor: float | None = None,
    contrary: bool = False,
) -> Judge:
    """The judge that the measure is lower with one set of settings than with another, with all else equal.

    The effect is the difference, for a measure compared by ratio that of the logarithms, in the mean over the places.
    lower, higher: values of the same keys; None: a run without the key. Each of `alternatives` has an effect of its
    own, and all must be so. at: EACH place of a pair, the LARGEST size only, or the HIGHEST rate that both have.
    margin, or factor for a ratio: the least effect that counts, where it is not the declared one. contrary: the claim
    is that there is no such gain.
    """

    def ask(evidence: Evidence) -> Asked:
        scope = evidence.having(where)
        ways = list(itertools.product(alternatives(lower, scope), alternatives(higher, scope)))
        found = [(way, pair) for way in ways for pair in pairs(scope, *way)]
        if at == LARGEST:
            top = max((low.n_params for _, (low, _) in found), default=0)
            found = [(way, pair) for way, pair in found if pair[0].n_params == top]
        named = [f"{measure.name} with {said_of(one)} beside {said_after(one, other)}" for one, other in ways]
        compared: dict[str, list[tuple[str, Terms]]] = {name: [] for name in named}
        vary = varying(remaining(low, *lower) for _, (low, _) in found)  # in which pairs of one place differ
        for way, (low, high) in found:
            rest = of_varying(low, vary)
            ours, theirs = (values_at(evidence, measure, curve) for curve in (low, high))
            shared = [rate for rate in ours if rate in theirs]
            for rate in shared[-1 if at == HIGHEST else 0 :]:
                (place, one), (_, other) = ours[rate], theirs[rate]
                terms = farther(other, one) if measure.errors else [(1.0, other), (-1.0, one)]
                words = f"{one.text} with {said_of(way[0])} and {other.text} with {said_after(*way)}"
                words += critical_rates([one, other])
                compared[named[ways.index(way)]].append((f"{', '.join([str(place), *rest])}: {words}", terms))
        gaps = missing_of(evidence, measure, itertools.chain(*(pair for _, pair in found)) if found else scope)
        return Asked(gaps=gaps) if gaps else each_of(compared, measure.ratio)

    places_of = {EACH: "mean over sizes", LARGEST: "at the largest size", HIGHEST: "at the highest rate"}[at]
    if measure.level != SIZE and at == EACH:
        places_of = "mean over sizes and rates"
    over = "over" if measure.ratio else "less"
    estimand = f"{measure.name} with {said_of(higher)} {over} with {said_after(higher, lower)}, {places_of}"
    return Question(
        estimand,
        measure.margin,
        ask,
        AT_MOST if contrary else DIFFERENCE,
        math.log(factor) if factor is not None else margin,
        measure.ratio,
        scope=", ".join(filter(None, [by_keys(lower, higher), among(where)])),
    )


def opposite_at_ends(measure: Measure, key: str, one: object, other: object) -> Judge:
    """The judge that one value of a key gives the lower measure at the smallest size, and the higher at the largest.

    Each remaining condition has two effects, and all must be so.
    """

    def ask(evidence: Evidence) -> Asked:
        found = [pair for pair in pairs(evidence.curves, {key: one}, {key: other}) if pair[0].runs and pair[1].runs]
        gaps = missing_of(evidence, measure, itertools.chain(*found))
        ends: dict[str, list[tuple[str, Terms]]] = {}
        for rest in dict.fromkeys(remaining(a, key) for a, _ in found):
            own = sorted((pair for pair in found if remaining(pair[0], key) == rest), key=lambda pair: pair[0].n_params)
            if own[0][0].n_params == own[-1][0].n_params:
                gaps.append(f"a second size of {settings(dict(rest))}")
                continue
            for pair, sign in ((own[0], 1.0), (own[-1], -1.0)):
                mine, yours = (measure.of(evidence, Place(curve)) for curve in pair)
                name = ", ".join([size_name(pair[0]), *itertools.starmap(setting, rest)])
                ends[f"{measure.name} of {name}"] = []
                if mine is not None and yours is not None:
                    both = f"{mine.text} with {setting(key, said(one))}, {yours.text} with {said(other)}"
                    both += critical_rates([mine, yours])
                    ends[f"{measure.name} of {name}"] = [(f"{name}: {both}", [(sign, yours), (-sign, mine)])]
        return each_of(ends, measure.ratio, gaps)

    estimand = (
        f"{measure.name} with {setting(key, said(other))} less with {said(one)} at the smallest size, and its opposite "
        "at the largest"
    )
    return Question(estimand, measure.margin, ask, ratio=measure.ratio, scope=key)


def coincide_below_best(key: str, one: object, other: object, margin: float | None = None) -> Judge:
    """The judge that two curves are equal at rates up to the lower of their best rates, in the mean over these."""

    def ask(evidence: Evidence) -> Asked:
        compared: list[tuple[str, Terms]] = []
        gaps = []
        for a, b in pairs(evidence.curves, {key: one}, {key: other}):
            gaps += a.missing + b.missing
            most = min(map(best_lr, (a, b))) if a.runs and b.runs else 0.0
            for lr in (lr for lr in a.lrs if a.rows(lr) and b.rows(lr) and lr <= most):
                ours, theirs = (LOSS.of(evidence, Place(curve, lr)) for curve in (a, b))
                if ours is not None and theirs is not None:
                    compared.append((f"{size_name(a)} at lr={lr:g}", [(1.0, theirs), (-1.0, ours)]))
        effects, remarks = pooled(compared)
        return Asked(effects, gaps, remarks)

    estimand = (
        f"loss with {setting(key, said(other))} less with {said(one)}, mean over sizes and over rates up to the lower "
        "best rate"
    )
    return Question(estimand, "loss", ask, EQUALITY, margin, scope=key)


def loss_beside(
    key: str,
    plain: Settings,
    low: float,
    high: float = math.inf,
    *,
    within: float | None = None,
    above: float | None = None,
) -> Judge:
    """The judge of the loss at the values of a key from low to high.

    With `within`, the loss at each of these values must be at most so many nats above that at the smallest value. With
    `above`, it must be at least so many nats above it in the mean over these values. With neither, it must be above the
    loss of a model with the settings `plain`, to which the key does not apply. Models of one width are compared.
    """
    short = word(key)
    of_least = above is not None or within is not None

    def ask(evidence: Evidence) -> Asked:
        found = [curve for curve in evidence.curves if curve.runs and not curve.fits(plain)]
        found = [curve for curve in found if curve.settings.get(key) is not None]
        value_of_key = {id(curve): number(curve.settings, key) for curve in found}
        least = min(value_of_key.values(), default=math.nan)
        bases = [curve for curve in evidence.having(plain) if curve.runs]
        if of_least:
            bases = [curve for curve in found if value_of_key[id(curve)] == least]
        compared: dict[str, list[tuple[str, Terms]]] = {}
        gaps = list(evidence.missing)
        for curve in sorted(found, key=lambda curve: (curve.n_params, value_of_key[id(curve)])):
            value = value_of_key[id(curve)]
            if any(curve is base for base in bases) or not low * (1 - 1e-9) <= value <= high * (1 + 1e-9):
                continue
            alike = [base for base in bases if _beside(curve, base, key, *(() if of_least else plain))]
            at = f"{size_name(curve)}, {short}={value:g}"
            if len(alike) != 1:
                gaps.append(f"{at}: {len(alike)} conditions {beside} have its width, and one is compared")
                continue
            ours, base = (BEST_LOSS.of(evidence, Place(one)) for one in (curve, alike[0]))
            compared[at] = []
            if ours is not None and base is not None:
                compared[at] = [(f"{at}: {ours.text}, beside {base.text} {beside}", [(1.0, ours), (-1.0, base)])]
        if within is None:
            compared = {"all": [place for places in compared.values() for place in places]}
        return each_of(compared, known_gaps=gaps)

    some = f"from {low:g} on" if high == math.inf else f"up to {high:g}"
    beside = f"at the smallest {short}" if of_least else "without layers"
    kind, margin = (AT_MOST, within) if within is not None else (DIFFERENCE, above)
    reach = "on" if high == math.inf else f"to {high:g}"
    scope = f"{key} from {low:g} {reach}, {'without' if of_least else 'beside'} {in_full(plain)}"
    return Question(f"loss at {short} {some} less that {beside}", "loss", ask, kind, margin, scope=scope)


def _beside(curve: Curve, base: Curve, *keys: str) -> bool:
    """Whether two curves have one width, and equal conditions apart from some keys."""
    alike = same(curve.settings.get(WIDTH), base.settings.get(WIDTH))
    return alike and remaining(curve, *keys) == remaining(base, *keys)


def positive(
    measure: Measure, where: Settings | None = None, at: str = EACH, every: bool = False, below: bool = False
) -> Judge:
    """The judge that the measure is above zero, or a ratio above one, in the mean over the places.

    at: EACH place, the LARGEST size only, or the largest size at its HIGHEST rate with a result. every: it must be so
    at each size, not in the mean over sizes. below: the claim is that it is below.
    """

    def ask(evidence: Evidence) -> Asked:
        scope = evidence.having(where)
        chosen = (
            scope if at == EACH else of_largest([curve for curve in scope if curve.runs] if at == HIGHEST else scope)
        )
        named: dict[str, list[tuple[str, Terms]]] = {}
        vary = varying(curve.condition.items() for curve in chosen)  # in which curves of one size differ
        for curve in chosen:
            found = values_at(evidence, measure, curve)
            asked = [place for place in places(curve, measure.level) if every or place.lr in found]
            for place in asked[-1 if at == HIGHEST else 0 :]:
                about = f"{measure.name} of {settings(curve.condition)} at {place}"
                own = named.setdefault(about if every else "all", [])
                if place.lr in found:
                    value = found[place.lr][1]
                    at_place = ", ".join([str(place), *of_varying(curve, vary)])
                    words = f"{value.text}{critical_rates([value])}"
                    own.append((f"{at_place}: {words}", [(-1.0 if below else 1.0, value)]))
        gaps = missing_of(evidence, measure, chosen)
        return each_of(named, measure.ratio, gaps)

    over = "mean over sizes" if measure.level == SIZE else "mean over sizes and rates"
    sizes = "at each size" if every else over if at == EACH else f"at the {at}"
    side = f"{'below' if below else 'above'} {'one' if measure.ratio else 'zero'}"
    scope = ", ".join(filter(None, [side, among(where)]))
    return Question(f"{measure.name}, {sizes}", measure.margin, ask, ratio=measure.ratio, scope=scope)


@dataclass(frozen=True)
class HarmedPastThreshold:
    """The judge that places whose quantity passes the threshold are harmed, and others are not: a `share` of both.

    A place is a size and a rate, in the mean over seeds, because the seeds of a place are no independent calls. A place
    is harmed if its loss is at least the declared excess above the best of its size; a diverged run counts as its
    initial loss. The intervals of the two shares are exact (Clopper and Pearson 1934) for independent places; those of
    one size are not quite. If a run past the threshold was stopped before the end of its schedule, the verdict is
    "cannot tell", unless the run diverged.
    """

    quantity: Quantity
    where: Settings | None = None
    share: float = 0.9

    @property
    def estimand(self) -> str:
        return (
            f"share of sizes and rates with a {in_sentence(self.quantity.name)} "
            f"{'above' if self.quantity.above else 'below'} {self.quantity.threshold:g} that are harmed, and of the "
            f"others that are not; both must be {self.share:.0%} or more"
        )

    def __call__(self, evidence: Evidence) -> Verdict:
        quantity = self.quantity
        scope = [curve for curve in evidence.having(self.where) if curve.runs]
        values, bad = places_of(scope, quantity, evidence.declaration.critical_excess)
        past = [is_bad for value, is_bad in zip(values, bad, strict=True) if quantity.passes(value)]
        others = [not is_bad for value, is_bad in zip(values, bad, strict=True) if not quantity.passes(value)]
        rows = [row for curve in scope for row in curve.runs.values() if not diverged(row) and _cut_short(row)]
        cut = sum(quantity.passes(value) for row in rows if (value := value_of(row, quantity)) is not None)
        reason = evidence.undeclared()
        if gaps := missing_of(evidence, measured_as(quantity), scope):
            reason = reason or f"missing or withheld: {few(gaps)}"
        if not past:
            reason = reason or "no measured place passes the threshold"
        if len({seed for curve in scope for _, seed in curve.runs}) < 2:
            reason = reason or "one seed"
        if cut:
            reason = reason or f"{cut} runs past the threshold were stopped before the end of their schedule"
        words = (
            f"{_share(past)} sizes and rates past {quantity.threshold:g} are harmed, {_share(others)} others are not"
        )
        if reason:
            return Verdict(word=CANNOT_TELL, words=f"{reason}; {words}")
        return _of_calls([past, others] if others else [past], words, self.share, whole=bool(others))


def _share(right: Sequence[bool]) -> str:
    if not right:
        return "0 of 0"
    low, high = exact_share(sum(right), len(right))
    return f"{sum(right)} of {len(right)} [{low:.0%}, {high:.0%}]"


def _of_calls(sides: Sequence[Sequence[bool]], words: str, share: float, whole: bool) -> Verdict:
    """The verdict on calls of two kinds, by whether they are right: both must be so. whole: there are both kinds."""
    counts = [(sum(right), len(right)) for right in sides]
    against = 2 * len(counts) * min(p_share_above(n - right, n, 1 - share) for right, n in counts)
    if whole and all(right / n >= share and exact_share(right, n)[0] > 0.5 for right, n in counts):
        return Verdict(word=AGREES, words=words, p=max(2 * p_share_above(right, n, 0.5) for right, n in counts))
    return Verdict(word=DISAGREES if against <= ALPHA else CANNOT_TELL, words=words, p=min(1.0, against))


def _cut_short(row: Row) -> bool:
    return (row.get("schedule.steps") or 0) > (row.get("steps_planned") or math.inf)


def largest_foretold(quantity: Quantity, factor: float = 3.0) -> Judge:
    """The judge that the fit to the smaller sizes predicts the largest within a factor, in the mean over rates.

    The effect is the logarithm of the factor less the absolute error of the logarithm; the verdict tells this error as
    a factor.
    """

    def ask(evidence: Evidence) -> Asked:
        _, made = instability.analyse(evidence.study, evidence.group, quantity, hold_out_largest=True)
        named: list[tuple[str, Terms]] = []
        for one in made:
            if one.predicted is None or one.measured is None:
                continue
            errors = {
                seed: math.log(factor) - abs(math.log(value / one.predicted))
                for seed, value in one.measured_by_seed.items()
            }
            named.append(
                (
                    f"lr={one.series.lr:g}: predicted {one.predicted:.3g}, measured {one.measured:.3g}",
                    [(1.0, Value(errors))],
                )
            )
        effects, remarks = pooled(named)
        words = few([name for name, _ in named], 8)
        layered = [curve for curve in up_to_measured(evidence.curves) if curve.n_params]
        gaps = missing_of(evidence, measured_as(quantity), layered)
        return Asked([Effect(e.by_seed, words, e.bound) for e in effects], gaps, remarks)

    estimand = (
        f"error of the predicted {in_sentence(quantity.name)} at the largest size, as a factor, mean over rates, which "
        f"must be at most {factor:g}"
    )
    called, limit = "The error", math.log(factor)
    scope = in_words(quantity)
    return Question(estimand, "recorded", ask, margin=0.0, ratio=True, called=called, limit=limit, scope=scope)


def smaller_below_eps(grad: str, update: str) -> Judge:
    """The judge that, of runs that differ in eps, those with a gradient RMS below their eps have smaller updates."""

    def ask(evidence: Evidence) -> Asked:
        found: dict[int, tuple[list[float], list[float]]] = {}
        gaps = list(evidence.missing)
        for curve in evidence.curves:
            for (_, seed), row in curve.runs.items():
                means = measured(row, LAST_MEAN)
                if not (means.get(grad) and means.get(update)):
                    gaps.append(f"{in_sentence(grad)} and {in_sentence(update)} of {name_of(row)}")
                else:
                    found.setdefault(seed, ([], []))[means[grad] >= number(row, "optimizer.eps")].append(means[update])
        ratios = {
            seed: math.log(float(np.median(others)) / float(np.median(below)))
            for seed, (below, others) in found.items()
            if below and others
        }
        n_below, n_others = (sum(len(own[side]) for own in found.values()) for side in (0, 1))
        words = f"{n_below} runs with a gradient RMS below their eps, {n_others} others"
        effects = [Effect(ratios, words)] if ratios else []
        return Asked(effects, gaps, [] if ratios else [words])

    scope = f"{update} by {grad}"
    return Question("median update RMS above eps over that below", "recorded", ask, ratio=True, scope=scope)
