"""Effects, the one number of each seed that a claim is about, and the verdicts on them.

An effect is positive where the claim is right; that of an AT_MOST claim is what the claim denies. It is computed for
each seed first, from the runs of that seed in all conditions and sizes, and then judged by Student's t over the seeds:

- agrees: the interval excludes zero on the side of the claim, and the mean is at least the declared margin.
- disagrees: the interval excludes zero on the other side.
- no difference: the interval lies within the margin on both sides.
- cannot tell: anything else. Also with one seed, without a declared margin, or where a planned run is missing.

A claim that two things are the same (EQUALITY) agrees where the interval lies within the margin, and disagrees where it
excludes zero and the mean is at least the margin. It agrees only if the interval of each of its places lies within the
margin too: differences of both signs cancel in the mean. A claim that one thing is not better (AT_MOST) needs only the
upper end below the margin. A claim about several effects agrees if all of them do; it disagrees if one
of them does, after Holm's correction for their number. The p-values of all claims of a study are corrected together,
see paper.py.
"""

import math
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from scaling_testbed.analysis.curves.intervals import ALPHA, Interval, interval, p_above, p_below
from scaling_testbed.errors import listed
from scaling_testbed.evaluation.statistics import holm
from scaling_testbed.papers.measures import NATS, Evidence, Value

AGREES, DISAGREES, NO_DIFFERENCE, CANNOT_TELL = "agrees", "disagrees", "no difference", "cannot tell"
UNITS = {"S": NATS, "loss": NATS, "octaves": "octaves"}  # of the measures that have one
DIFFERENCE, EQUALITY, AT_MOST = "difference", "equality", "at most"  # kinds of claims


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """A word and what led to it.

    word: one of the four. words: the numbers in a sentence. effect, low, high: the mean over seeds and its 95 %
    interval, of a ratio the logarithms; None if there is none. said: these numbers in a sentence. Of several effects
    that must all be so, they are those of the one that speaks least for the claim. p: before the correction for the
    number of claims.
    """

    word: str
    words: str
    said: str = ""
    effect: float | None = None
    low: float | None = None
    high: float | None = None
    margin: float | None = None
    p: float | None = None
    n_seeds: int = 0


@dataclass(frozen=True)
class Effect:
    """One number of each seed, positive where the claim is right; of a ratio, the logarithm.

    words: the values that it was made of. bound: 1 if the numbers are lower bounds, because a value was censored, and
    -1 if they are upper bounds. places: the numbers of each place, of which by_seed is the mean; empty if there is one.
    """

    by_seed: Mapping[int, float]
    words: str = ""
    bound: int = 0
    places: Sequence[Mapping[int, float]] = ()


Terms = Sequence[tuple[float, Value]]  # a sum of values with coefficients


@dataclass(frozen=True)
class Asked:
    """The effects of a claim, the reasons why they are not whole, and remarks."""

    effects: Sequence[Effect] = ()
    gaps: Sequence[str] = ()
    remarks: Sequence[str] = ()


def summed(terms: Terms) -> tuple[dict[int, float], int | None]:
    """The sum of values with coefficients for each common seed, and its bound; None if its bounds contradict."""
    seeds = set.intersection(*(set(value.by_seed) for _, value in terms)) if terms else set()
    sums = {seed: sum(factor * value.by_seed[seed] for factor, value in terms) for seed in sorted(seeds)}
    signs = {factor > 0 for factor, value in terms if factor and value.censored & seeds}
    return sums, 0 if not signs else None if len(signs) > 1 else 1 if True in signs else -1


def pooled(places: Sequence[tuple[str, Terms]], ratio: bool = False) -> tuple[list[Effect], list[str]]:
    """The mean over places of a sum of values, as one effect, and remarks on places that are left out.

    places: (name, terms). A place where the sum is zero for each seed is left out, because its runs are the same by
    construction, e.g. muParam at its base width; unless they all diverged, which is no difference. So is a place where
    both sides are censored. A remark on each of the values' notes counts its curves.
    """
    kept: list[tuple[str, dict[int, float], int]] = []
    remarks = _notes(places)
    for name, terms in places:
        sums, bound = summed(terms)
        if not sums:
            remarks.append(f"{name}: no common seed")
        elif bound is None:
            remarks.append(f"{name}: not known on both sides")
        elif not any(sums.values()) and not any(value.capped for _, value in terms):
            remarks.append(f"{name}: the same by construction")
        else:
            kept.append((name, sums, bound))
    bounds = {bound for _, _, bound in kept if bound}
    if len(bounds) > 1:
        return [], [*remarks, "at least so large at one place, at most so large at another"]
    if not kept:
        return [], remarks
    seeds = sorted(set.intersection(*(set(sums) for _, sums, _ in kept)))
    remarks += _left_out(places, seeds)
    several = len(kept) > 1
    by_seed = {seed: _mean([sums[seed] for _, sums, _ in kept]) for seed in seeds}
    own = [{seed: sums[seed] for seed in seeds} for _, sums, _ in kept] if several else []
    words = [f"{name} ({signed(_mean(sums.values()), ratio)})" if several else name for name, sums, _ in kept]
    words = [words[0], *(one.removeprefix("N=") for one in words[1:])]  # the first one says what is counted
    return [Effect(by_seed, few(words, 8), bounds.pop() if bounds else 0, own)], remarks


def _notes(places: Sequence[tuple[str, Terms]]) -> list[str]:
    """The notes of values, each with the number of curves that it is about."""
    values = {id(value): value for _, terms in places for _, value in terms}.values()
    found = Counter(note for value in values for note in value.notes)
    return [f"{note} in {count} of {len(values)} curves" for note, count in found.items()]


def farther(one: Value, other: Value) -> Terms:
    """|a| - |b| for the expectations a and b of two signed errors, as a sum of both with coefficients.

    |a| > |b| where a - b and a + b have one sign, so the seeds must tell both from zero. The sum is the one that they
    tell less, scaled to the difference of the means without their signs. The mean of absolute errors would count noise
    as an error, and favour the quieter side.
    """
    seeds = sorted(set(one.by_seed) & set(other.by_seed))
    sums = {sign: interval([one.by_seed[s] + sign * other.by_seed[s] for s in seeds]) for sign in (-1.0, 1.0)}
    least = min(sums, key=lambda sign: _clear(sums[sign]))
    mean = sums[least].mean
    scale = min(abs(ends.mean) for ends in sums.values()) / abs(mean) if mean else 1.0
    factor = math.copysign(scale, sums[-least].mean)
    return [(factor, one), (factor * least, other)]


def _clear(ends: Interval) -> tuple[float, float]:
    """How clearly the seeds tell a mean from zero: in reaches of its interval, and with one seed by its size."""
    reach = ends.high - ends.mean
    return (abs(ends.mean) / reach if reach else math.inf), abs(ends.mean)


def each_of(
    groups: Mapping[str, Sequence[tuple[str, Terms]]], ratio: bool = False, known_gaps: Sequence[str] = ()
) -> Asked:
    """One effect for each group of places, all of which must be so. A group that gives none is a gap.

    groups: what is judged, in words, and its places, as `pooled` takes them.
    """
    effects: list[Effect] = []
    gaps, remarks = list(known_gaps), []
    for name, places in groups.items():
        made, own = pooled(places, ratio)
        effects += made
        if made or len(groups) == 1:
            remarks += own
        else:
            gaps.append(few(own) or name)
    return Asked(effects, gaps, remarks)


def _left_out(places: Sequence[tuple[str, Terms]], kept: Collection[int]) -> list[str]:
    """A remark on the seeds that some condition lacks, so that no number of theirs counts; empty if there are none."""
    there = {seed for _, terms in places for _, value in terms for seed in value.by_seed}
    if not (lost := sorted(there - set(kept))):
        return []
    lacking = next(name for name, terms in places if any(lost[0] not in value.by_seed for _, value in terms))
    which = f"seed {lost[0]} is" if len(lost) == 1 else f"seeds {listed([str(seed) for seed in lost])} are"
    return [f"{which} left out, because not all conditions have them: see {lacking.partition(':')[0]}"]


def _mean(numbers: Collection[float]) -> float:
    return sum(numbers) / len(numbers)


def few(names: Sequence[str], most: int = 3) -> str:
    """The first names of a list, and how many more there are."""
    names = list(dict.fromkeys(names))
    return "; ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def signed(value: float, ratio: bool = False) -> str:
    """The text of an effect: with its sign, or as a factor."""
    if not ratio:
        return f"{value:+.3g}" if abs(value) >= 10 else f"{value:+.3f}"
    return f"x{math.exp(value):.3g}" if abs(value) < 700 else f"e^{value:+.3g}"


def _number(value: float, ratio: bool) -> str:
    """The text of an effect in a sentence, which says itself whether it is a factor."""
    return signed(value, ratio).lstrip("x")


@dataclass(frozen=True)
class Question:
    """A judge of effects.

    estimand: what one number of each seed is, in words. measure: the name of the margin in a declaration. ask: gives
    the effects of a study. margin: the least effect that counts, of a ratio its logarithm; None: the declared one.
    ratio: whether the effects are logarithms of ratios. called: what the verdict calls the effect. limit, side: where
    there is a limit, the effects are side (limit - number), with side 1 or -1, and the verdict tells the number. per:
    what the effect is a change over, e.g. "per tenfold N". scope: what the estimand does not say, e.g. of which runs;
    for `described`.
    """

    estimand: str
    measure: str
    ask: Callable[[Evidence], Asked]
    kind: str = DIFFERENCE
    margin: float | None = None
    ratio: bool = False
    called: str = "The effect"
    limit: float | None = None
    side: int = 1
    per: str = ""
    scope: str = ""

    @property
    def described(self) -> str:
        """How it judges, in one line: its estimand and scope, its kind, and its margin and limit."""
        unit = f" {UNITS[self.measure]}" if self.measure in UNITS and not self.ratio else ""
        own = f"margin {self._exactly(self.margin)}{unit}" if self.margin else "without a margin"
        margin = f"the declared margin of {self.measure}" if self.margin is None else own
        limit = "" if self.limit is None else f"{'at most' if self.side > 0 else 'above'} {self._exactly(self.limit)}"
        kind = f"{self.kind} (of logarithms)" if self.ratio else self.kind
        return "; ".join(filter(None, [self.estimand, self.scope, kind, margin, limit]))

    def _exactly(self, number: float) -> str:
        return f"a factor of {math.exp(number):.10g}" if self.ratio else f"{number:.10g}"

    def __call__(self, evidence: Evidence) -> Verdict:
        asked = self.ask(evidence)
        remarks = few(asked.remarks, 6)
        remarks = remarks[:1].upper() + remarks[1:]
        if asked.gaps:
            return Verdict(word=CANNOT_TELL, words=joined(f"missing or withheld: {few(asked.gaps)}", remarks))
        if not asked.effects:
            return Verdict(word=CANNOT_TELL, words=joined(f"these runs do not give the {self.estimand}", remarks))
        margin = self.margin if self.margin is not None else evidence.declaration.margin(self.measure)
        made = [self._one(effect, margin) for effect in asked.effects]
        verdict = made[0] if len(made) == 1 else self._all(made)
        verdict = replace(verdict, words=joined(verdict.words, remarks))
        if reason := evidence.undeclared(self.measure if self.margin is None else None):
            return replace(verdict, word=CANNOT_TELL, words=joined(reason, verdict.words), p=None)
        return verdict

    def _one(self, effect: Effect, margin: float | None) -> Verdict:
        numbers = list(effect.by_seed.values())
        if not numbers:
            return Verdict(word=CANNOT_TELL, words="no seed was run in all conditions")
        if bad := [seed for seed, value in effect.by_seed.items() if not math.isfinite(value)]:
            return Verdict(word=CANNOT_TELL, words=joined(f"the effect of seed {bad[0]} is not finite", effect.words))
        effect_is = f"{self.called} is {'at least ' * (effect.bound > 0)}{'at most ' * (effect.bound < 0)}"
        effect_is += "a factor of " * self.ratio
        unit = "" if self.ratio else UNITS.get(self.measure, "")
        unit = "".join(f" {word}" for word in (unit, self.per) if word)
        n = len(numbers)
        if n < 2:
            said = f"One seed, so there is no interval. {effect_is}{self._text(numbers[0])}{unit}{self._beside(margin)}"
            words = joined(said, effect.words)
            return Verdict(word=CANNOT_TELL, words=words, said=said, effect=numbers[0], n_seeds=1)
        ends = interval(numbers)
        low, high = (-math.inf if effect.bound < 0 else ends.low), (math.inf if effect.bound > 0 else ends.high)
        least, most = (high, low) if self.limit is not None and self.side > 0 else (low, high)  # of the number
        shown = f"from {self._text(least)}" if math.isfinite(least) else "up"
        shown += f" to {self._text(most)}" if math.isfinite(most) else " upwards"
        said = f"{effect_is}{self._text(ends.mean)}{unit} (95 % interval {shown}; {n} seeds{self._beside(margin)})"
        word, p = _judged(self.kind, numbers, effect.bound, low, high, margin or 0.0)
        if self.kind == EQUALITY and word == AGREES and effect.places:
            made = [self._one(Effect(place), margin) for place in effect.places]
            widest = max(made, key=lambda one: max(-(one.low or 0.0), one.high or 0.0))
            reaches = " to ".join(self._text(end) for end in (widest.low, widest.high) if end is not None)
            equal = sum(one.word == AGREES for one in made)
            said += f"; at {equal} of {len(made)} places within the margin, at one of them from {reaches}"
            p = max(p, *(one.p or 0.0 for one in made))
            word = AGREES if equal == len(made) else CANNOT_TELL
        return Verdict(
            word=word,
            words=joined(said, effect.words),
            said=said,
            effect=ends.mean,
            low=low,
            high=high,
            margin=margin,
            p=p,
            n_seeds=n,
        )

    def _text(self, effect: float) -> str:
        """The text of an effect, or of the number beside the limit."""
        if self.limit is None:
            return _number(effect, self.ratio)
        number = self.limit - self.side * effect
        return f"{math.exp(number) if self.ratio else number:.3g}"

    def _beside(self, margin: float | None) -> str:
        """The limit or the margin, as the end of a list."""
        if self.limit is not None:
            return f"; limit {math.exp(self.limit) if self.ratio else self.limit:.3g}"
        return f"; margin {_number(margin, self.ratio).lstrip('+')}" if margin is not None and margin > 0 else ""

    def _all(self, made: Sequence[Verdict]) -> Verdict:
        """The verdict on several effects that must all be so."""
        words = few([one.words for one in made], 6)
        worst = min(made, key=lambda one: _speaks_for(self.kind, one.effect or 0.0))
        known = [one.p for one in made if one.p is not None]
        if len(known) < len(made):
            return replace(worst, word=CANNOT_TELL, words=words, p=None, n_seeds=min(one.n_seeds for one in made))
        corrected = holm(known)
        against = [p for one, p in zip(made, corrected, strict=True) if one.word == DISAGREES and p <= ALPHA]
        own = {one.word for one in made}
        word = DISAGREES if against else own.pop() if len(own) == 1 else CANNOT_TELL
        return replace(worst, word=word, words=words, p=min(against) if against else max(known))


def _speaks_for(kind: str, effect: float) -> float:
    """How much an effect speaks for a claim of this kind."""
    return effect if kind == DIFFERENCE else -effect if kind == AT_MOST else -abs(effect)


def joined(*parts: str) -> str:
    """Parts as sentences, without the last full stop. Only the first letter of all becomes a capital: a part can begin
    with the name of a data set."""
    said = ". ".join(filter(None, parts))
    return said[:1].upper() + said[1:]


def _judged(
    kind: str, numbers: Sequence[float], bound: int, low: float, high: float, margin: float
) -> tuple[str, float]:
    """The word for the numbers of the seeds, and the p-value of the test that led to it, or of the nearest one."""
    mean = sum(numbers) / len(numbers)
    above, below = 2 * p_above(numbers, 0.0), 2 * p_below(numbers, 0.0)
    under = 1.0 if bound > 0 else 2 * p_below(numbers, margin)  # of the hypothesis that the effect reaches the margin
    over = 1.0 if bound < 0 else 2 * p_above(numbers, -margin)
    above, below = (1.0 if bound < 0 else above), (1.0 if bound > 0 else below)
    same = max(under, over)
    within = -margin < low and high < margin
    if kind == AT_MOST:
        if high < margin:
            return AGREES, min(1.0, under)
        return (DISAGREES if low > 0 and mean >= margin else CANNOT_TELL), min(1.0, above, under)
    if kind == EQUALITY:
        if within:
            return AGREES, min(1.0, same)
        differs = (low > 0 or high < 0) and abs(mean) >= margin
        return (DISAGREES if differs else CANNOT_TELL), min(1.0, above, below, same)
    if within:
        return NO_DIFFERENCE, min(1.0, same)
    if low > 0 and mean >= margin:
        return AGREES, min(1.0, above)
    return (DISAGREES if high < 0 else CANNOT_TELL), min(1.0, above, below, same)


def corrected(verdicts: Sequence[Verdict], not_judged: int = 0) -> list[Verdict]:
    """The verdicts of all claims of a study, after Holm's correction of their p-values.

    A claim without a p-value counts too, because it was declared, and so do those that are not judged any more. A word
    that does not hold any more becomes "cannot tell".
    """
    n_claims = len(verdicts) + not_judged
    adjusted = holm([*(1.0 if one.p is None else one.p for one in verdicts), *[1.0] * not_judged])[: len(verdicts)]
    found = []
    for one, p in zip(verdicts, adjusted, strict=True):
        if one.word != CANNOT_TELL and one.p is not None and p > ALPHA:
            reason = f"it {one.word} alone (p {one.p:.2g}), but not among {n_claims} claims (Holm: p {p:.2g})"
            one = replace(one, word=CANNOT_TELL, words=joined(reason, one.words))
        found.append(one)
    return found
