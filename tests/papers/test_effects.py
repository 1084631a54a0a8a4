"""Verdicts on effects: their words, how often they are wrong, and their correction for the number of claims."""

from types import SimpleNamespace

import numpy as np
import pytest

from scaling_testbed.analysis.curves.critical_rate import critical_rate
from scaling_testbed.analysis.curves.intervals import interval
from scaling_testbed.analysis.curves.lr_sensitivity import best_by_seed, by_seed, sensitivity
from scaling_testbed.papers.declaration import Declaration
from scaling_testbed.papers.effects import (
    AGREES,
    AT_MOST,
    CANNOT_TELL,
    DIFFERENCE,
    DISAGREES,
    EQUALITY,
    NO_DIFFERENCE,
    Asked,
    Effect,
    Question,
    Verdict,
    corrected,
    farther,
    pooled,
    summed,
)
from scaling_testbed.papers.lines import Line
from scaling_testbed.papers.measures import Measure, Value
from tests.analysis.curves.noise import LRS, MEANS, losses

WIDTHS = (16, 32, 64)
EVIDENCE = SimpleNamespace(declaration=Declaration(margins={"S": 0.05}), undeclared=lambda measure=None: None)
S = Measure("S", lambda *_: None, "S")
STUDIES = 1000


def word(numbers, kind=DIFFERENCE, bound=0, margin=None):
    effect = Effect(dict(enumerate(numbers)), bound=bound)
    return Question("", "S", lambda _: Asked([effect]), kind, margin)(EVIDENCE)


@pytest.mark.parametrize(
    ("numbers", "kind", "verdict"),
    [
        ((0.10, 0.11, 0.12), DIFFERENCE, AGREES),
        ((-0.10, -0.11, -0.12), DIFFERENCE, DISAGREES),
        ((0.001, -0.001, 0.002), DIFFERENCE, NO_DIFFERENCE),
        ((0.030, 0.031, 0.032), DIFFERENCE, NO_DIFFERENCE),  # it is there, and does not count
        ((0.10, 0.30, -0.10), DIFFERENCE, CANNOT_TELL),
        ((0.04, 0.06, 0.02), DIFFERENCE, CANNOT_TELL),
        ((0.030, 0.045, 0.045), DIFFERENCE, CANNOT_TELL),  # it is there, and may be too small to count
        ((0.001, -0.001, 0.002), EQUALITY, AGREES),
        ((0.10, 0.11, 0.12), EQUALITY, DISAGREES),
        ((-0.10, -0.11, -0.12), EQUALITY, DISAGREES),
        ((0.10, 0.30, -0.10), EQUALITY, CANNOT_TELL),
        ((-0.10, -0.11, -0.12), AT_MOST, AGREES),
        ((0.10, 0.11, 0.12), AT_MOST, DISAGREES),
        ((0.04, 0.06, 0.02), AT_MOST, CANNOT_TELL),
        ((0.10,), DIFFERENCE, CANNOT_TELL),
    ],
)
def test_the_word_for_an_effect(numbers, kind, verdict):
    assert word(numbers, kind).word == verdict


def test_an_effect_is_told_with_its_interval_seeds_and_margin():
    assert word((0.10, 0.11, 0.12)).words == (
        "The effect is +0.110 nats (95 % interval from +0.085 to +0.135; 3 seeds; margin 0.050)"
    )
    assert word((0.10,)).words == "One seed, so there is no interval. The effect is +0.100 nats; margin 0.050"


@pytest.mark.parametrize(
    ("measure", "per", "said"),
    [
        ("octaves", "per tenfold N", "+0.110 octaves per tenfold N (95 %"),
        ("loss", "", "+0.110 nats (95 %"),
        ("share", "per tenfold N", "+0.110 per tenfold N (95 %"),
        ("share", "", "+0.110 (95 %"),
    ],
)
def test_an_effect_has_the_unit_of_its_measure_and_what_it_is_a_change_over(measure, per, said):
    asked = Asked([Effect({0: 0.10, 1: 0.11, 2: 0.12})])
    assert Question("", measure, lambda _: asked, margin=0.05, per=per)(EVIDENCE).said.startswith(
        f"The effect is {said}"
    )


@pytest.mark.parametrize(
    ("bound", "numbers", "verdict"),
    [
        (1, (0.10, 0.11, 0.12), AGREES),
        (1, (-0.10, -0.11, -0.12), CANNOT_TELL),
        (1, (0.001, -0.001, 0.002), CANNOT_TELL),
        (-1, (-0.10, -0.11, -0.12), DISAGREES),
        (-1, (0.10, 0.11, 0.12), CANNOT_TELL),
    ],
)
def test_a_bound_supports_only_what_it_bounds(bound, numbers, verdict):
    found = word(numbers, bound=bound)
    assert found.word == verdict and ("is at least " if bound > 0 else "is at most ") in found.words


def test_a_sum_of_values_has_common_seeds_and_the_bound_of_its_censored_ones():
    known, above = Value({0: 1.0, 1: 2.0, 2: 9.0}), Value({0: 3.0, 1: 3.0}, censored=frozenset([1]))
    assert summed([(1.0, above), (-1.0, known)]) == ({0: 2.0, 1: 1.0}, 1)
    assert summed([(1.0, known), (-1.0, above)])[1] == -1
    assert summed([(1.0, above), (-1.0, above)])[1] is None


def test_seeds_that_a_condition_lacks_are_left_out_and_said_to_be():
    three, one = Value({0: 3.0, 1: 3.1, 2: 3.2}), Value({1: 1.0})
    places = [("N=16: 3 and 3", [(1.0, three), (-1.0, Value({0: 2.0, 1: 2.0, 2: 2.0}))])]
    assert pooled(places)[1] == []
    effects, remarks = pooled([*places, ("N=32: 3 and 1", [(1.0, three), (-1.0, one)])])
    assert list(effects[0].by_seed) == [1]
    assert remarks == ["seeds 0, 2 are left out, because not all conditions have them: see N=32"]
    said = Question("", "S", lambda _: Asked(effects, remarks=remarks))(EVIDENCE)
    assert said.words.startswith("One seed, so there is no interval") and "Seeds 0, 2 are left out" in said.words


def of_places(numbers_PS, kind=EQUALITY, margin=0.05):
    (effect,), _ = pooled([("at", [(1.0, Value(dict(enumerate(own_S))))]) for own_S in numbers_PS.tolist()])
    return Question("", "S", lambda _: Asked([effect]), kind, margin)(EVIDENCE)


@pytest.mark.parametrize(("differs", "verdict"), [(0.0, AGREES), (0.1, CANNOT_TELL)])
def test_differences_of_both_signs_are_no_equality(differs, verdict):
    """In the mean over places they cancel. Noise does not count as a difference."""
    numbers_PS = 0.01 * np.random.default_rng(0).standard_normal((4, 5)) + differs * np.array([[1], [-1], [1], [-1]])
    found = of_places(numbers_PS)
    told = "; at 4 of 4 places within the margin" if verdict == AGREES else "; at 0 of 4 places within the margin"
    assert found.word == verdict and told in found.words, found.words


def share_equal(differs_P, sd, n_seeds, studies=100, margin=0.02):
    """The share of studies in which places with these differences count as equal."""
    rng, means_PS = np.random.default_rng([n_seeds, len(differs_P)]), np.array(differs_P)[:, None]
    noisy = (means_PS + sd * rng.standard_normal((len(differs_P), n_seeds)) for _ in range(studies))
    return sum(of_places(numbers_PS, margin=margin).word == AGREES for numbers_PS in noisy) / studies


@pytest.mark.parametrize("n_seeds", [3, 5, 10])
@pytest.mark.parametrize("differs_P", [(1,), (1, -1), (1, -1) * 4, (1, *(0,) * 7)], ids=str)
def test_a_place_that_differs_by_the_margin_seldom_counts_as_equal(differs_P, n_seeds):
    for sd in (0.005, 0.016, 0.05):
        assert share_equal(0.02 * np.array(differs_P), sd, n_seeds) <= 0.08  # 0.025, and the noise of 100 studies


@pytest.mark.parametrize(("n_places", "n_seeds", "sd"), [(1, 3, 0.004), (4, 5, 0.006), (8, 10, 0.01), (4, 10, 0.013)])
def test_equal_places_count_as_equal_where_the_noise_is_small_beside_the_margin(n_places, n_seeds, sd):
    assert share_equal(np.zeros(n_places), sd, n_seeds) >= 0.8


def error_over(one, other):
    """The verdict that the first of two arms has the larger error, by its effect."""
    terms = farther(*(Value(dict(enumerate(numbers))) for numbers in (one, other)))
    (effect,), _ = pooled([("at", terms)])
    return Question("", "S", lambda _: Asked([effect]), margin=0.001)(EVIDENCE)


@pytest.mark.parametrize("sign", [1, -1])
def test_the_larger_error_is_told_whatever_the_signs(sign):
    large, small = [0.30, 0.31, 0.32], [sign * value for value in (0.10, 0.11, 0.12)]
    assert error_over(large, small).word == AGREES and error_over(small, large).word == DISAGREES
    assert error_over(large, small).effect == pytest.approx(0.2)


@pytest.mark.parametrize("error", [0.0, 0.02, 1.0])
@pytest.mark.parametrize("n_seeds", [3, 10])
def test_the_noisier_of_two_arms_with_one_error_has_no_larger_one(n_seeds, error):
    """The means of its absolute errors would be larger."""
    rng, said = np.random.default_rng(n_seeds), []
    for _ in range(STUDIES // 2):
        noisy, quiet = (error + sd * rng.standard_normal(n_seeds) for sd in (0.05, 0.01))
        said.append(error_over(noisy.tolist(), (-quiet).tolist()).word)
    assert max(said.count(AGREES), said.count(DISAGREES)) <= 0.045 * len(said), said.count(AGREES)


def test_places_with_bounds_on_both_sides_give_no_effect_and_the_reason():
    known, above = Value({0: 1.0, 1: 2.0}), Value({0: 3.0, 1: 3.5}, censored=frozenset([1]))
    places = [("one", [(1.0, above), (-1.0, known)]), ("other", [(1.0, known), (-1.0, above)])]
    assert pooled(places) == ([], ["at least so large at one place, at most so large at another"])


def test_of_several_effects_the_one_that_speaks_most_against_the_claim_is_told():
    def judged(kind):
        asked = Asked([Effect({0: mean, 1: mean + 1e-3}) for mean in (0.001, 0.010)])
        return Question("", "S", lambda _: asked, kind)(EVIDENCE).effect

    assert judged(AT_MOST) == pytest.approx(0.0105) and judged(DIFFERENCE) == pytest.approx(0.0015)


def test_a_claim_about_several_effects_needs_all_of_them():
    def judged(*effects):
        asked = Asked([Effect(dict(enumerate(numbers))) for numbers in effects])
        return Question("", "S", lambda _: asked)(EVIDENCE).word

    plus, minus, noise = (0.10, 0.11, 0.12), (-0.10, -0.11, -0.12), (0.10, 0.30, -0.10)
    assert judged(plus, plus) == AGREES and judged(plus, minus) == DISAGREES and judged(plus, noise) == CANNOT_TELL


def test_words_are_corrected_for_the_number_of_claims():
    verdicts = [Verdict(word=AGREES, words="a", p=0.001), Verdict(word=AGREES, words="b", p=0.03)]
    verdicts += [Verdict(word=CANNOT_TELL, words="c")]
    found = corrected(verdicts)
    assert [one.word for one in found] == [AGREES, CANNOT_TELL, CANNOT_TELL]
    assert found[1].words == "It agrees alone (p 0.03), but not among 3 claims (Holm: p 0.06). b"


# ------------------------------------------------------------------------------------------- calibration


def values_of(rng, n_seeds, norm, shared_WS):
    """The S of each seed at each width."""
    return [
        Value(by_seed(losses(rng, (norm, width), n_seeds, shared_S), range(n_seeds)))
        for width, shared_S in zip(WIDTHS, shared_WS, strict=True)
    ]


def difference(found, other):
    places = [(str(w), [(1.0, a), (-1.0, b)]) for w, a, b in zip(WIDTHS, found, other, strict=True)]
    (effect,), _ = pooled(places)
    return effect


def trend(values):
    points = [(24.0 * width**2, "", value) for width, value in zip(WIDTHS, values, strict=True)]
    (effect,), _ = pooled([("", Line(S, "", None, points, "N").trend())])
    return effect


def truth_of(norm):
    return [Value({0: sensitivity(MEANS[norm, width], np.inf)}) for width in WIDTHS]


@pytest.mark.parametrize("n_seeds", [3, 5, 10])
def test_the_intervals_of_effects_and_trends_hold_what_they_promise(n_seeds):
    rng = np.random.default_rng(n_seeds)
    effect_truth = difference(truth_of("none"), truth_of("layernorm")).by_seed[0]
    trend_truth = trend(truth_of("none")).by_seed[0]
    held = np.zeros(2)
    for _ in range(STUDIES):
        shared_WS = rng.standard_normal((len(WIDTHS), n_seeds))
        none, normed = (values_of(rng, n_seeds, norm, shared_WS) for norm in ("none", "layernorm"))
        found = difference(none, normed), trend(none)
        for at, (effect, truth) in enumerate(zip(found, (effect_truth, trend_truth), strict=True)):
            ends = interval(list(effect.by_seed.values()))
            held[at] += ends.low <= truth <= ends.high
    assert ((held / STUDIES >= 0.92) & (held / STUDIES <= 0.98)).all(), held


def best_of(rng, n_seeds, places, shared_WS):
    """The best loss of each seed at each place, as verdicts compare it."""
    return [
        Value(best_by_seed(losses(rng, place, n_seeds, shared_S), range(n_seeds)))
        for place, shared_S in zip(places, shared_WS, strict=True)
    ]


@pytest.mark.parametrize("n_seeds", [3, 5, 10])
@pytest.mark.parametrize(
    ("one", "other", "least"),
    [
        ([("none", width) for width in WIDTHS], [("layernorm", width) for width in WIDTHS], 0.92),
        ([("flat", 0)] * 3, [("layernorm", 16)] * 3, 0.9),  # a best rate that is hard to tell beside one that is not
    ],
    ids=["norms", "flat"],
)
def test_the_intervals_of_effects_on_the_best_loss_hold_what_they_promise(one, other, least, n_seeds):
    rng = np.random.default_rng(n_seeds)
    truth = np.mean([min(MEANS[a]) - min(MEANS[b]) for a, b in zip(one, other, strict=True)])
    held, off = 0, []
    for _ in range(STUDIES):
        shared_WS = rng.standard_normal((len(WIDTHS), n_seeds))
        effect = difference(*(best_of(rng, n_seeds, places, shared_WS) for places in (one, other)))
        ends = interval(list(effect.by_seed.values()))
        held += ends.low <= truth <= ends.high
        off.append(ends.mean - truth)
    assert least <= held / STUDIES <= 0.98, held
    assert abs(np.mean(off)) < (0.001 if least == 0.92 else 0.0035)  # not corrected, the latter is 0.0073 with 3 seeds


def critical_rates(rng, n_seeds, norm, width, shared_S):
    """The logarithm of the critical rate of each seed."""
    seeds = range(n_seeds)
    found = critical_rate(LRS, losses(rng, (norm, width), n_seeds, shared_S), seeds, intervals=False).by_seed
    return Value({seed: min(value, np.log(LRS[-1])) for seed, value in found.items()})


def test_the_interval_of_an_effect_on_the_critical_rate_holds_what_a_seed_has_in_the_mean():
    """It is not the critical rate of the mean curve, where that has a kink."""
    rng = np.random.default_rng(0)
    many, held, studies = 5000, 0, STUDIES // 2
    none, normed = ([critical_rates(rng, many, n, w, None) for w in WIDTHS] for n in ("none", "layernorm"))
    truth = np.mean(list(difference(normed, none).by_seed.values()))
    for _ in range(studies):
        shared_WS = rng.standard_normal((len(WIDTHS), 5))
        none, normed = (
            [critical_rates(rng, 5, n, w, shared_S) for w, shared_S in zip(WIDTHS, shared_WS, strict=True)]
            for n in ("none", "layernorm")
        )
        ends = interval(list(difference(normed, none).by_seed.values()))
        held += ends.low <= truth <= ends.high
    assert 0.92 <= held / studies <= 0.98


@pytest.mark.parametrize("n_seeds", [3, 5, 10])
def test_without_an_effect_at_most_one_in_twenty_claims_agrees_or_disagrees(n_seeds):
    """Two arms of one kind, judged with a margin that is small beside the noise."""
    rng = np.random.default_rng(n_seeds)
    question = Question("", "S", lambda effect: Asked([effect]), margin=0.001)
    said = []
    for _ in range(STUDIES):
        shared_WS = rng.standard_normal((len(WIDTHS), n_seeds))
        effect = difference(*(values_of(rng, n_seeds, "none", shared_WS) for _ in range(2)))
        said.append(question._one(effect, 0.001).word)
    assert said.count(AGREES) <= 0.05 * STUDIES and said.count(DISAGREES) <= 0.05 * STUDIES


def test_of_five_claims_without_an_effect_one_or_more_are_told_in_one_of_twenty_studies():
    rng = np.random.default_rng(0)
    wrong = 0
    for _ in range(STUDIES):
        made = [word(rng.standard_normal(4), margin=0.001) for _ in range(5)]
        wrong += any(one.word in (AGREES, DISAGREES) for one in corrected(made))
    assert wrong <= 0.065 * STUDIES


def test_a_claim_that_two_are_equal_agrees_in_one_of_forty_studies_where_they_differ_by_the_margin():
    rng = np.random.default_rng(0)
    said = [word(0.05 + 0.01 * rng.standard_normal(5), EQUALITY).word for _ in range(STUDIES)]
    assert said.count(AGREES) <= 0.04 * STUDIES


@pytest.mark.parametrize(
    ("kind", "levels", "least"),
    [(DIFFERENCE, (0.3, 0.1, 0.2), 0.1), (AT_MOST, (-0.1, 0.4, 0.2), 0.4), (EQUALITY, (0.01, -0.4, 0.2), -0.4)],
)
@pytest.mark.parametrize("whole", [True, False])
def test_of_several_effects_the_one_that_speaks_least_for_the_claim_is_said(kind, levels, least, whole):
    effects = [Effect({seed: level + 0.001 * seed for seed in (-1, 0, 1)}) for level in levels]
    effects += [] if whole else [Effect({0: 0.001})]  # a single seed has no p-value
    found = Question("", "S", lambda _: Asked(effects), kind, 0.05)(EVIDENCE)
    if whole:
        assert found.effect == pytest.approx(least) and found.said.startswith(f"The effect is {least:+.3f} nats (95 %")
    else:
        assert found.word == CANNOT_TELL and found.p is None and found.n_seeds == 1 and found.said
