"""How often the 95 % intervals of S and of the critical rate hold the truth, under the noise of real seeds."""

import math
from pathlib import Path

import numpy as np
import pytest

from scaling_testbed.analysis.curves.critical_rate import critical_rate
from scaling_testbed.analysis.curves.intervals import detectable, interval, jackknife, p_above, p_below
from scaling_testbed.analysis.curves.lr_sensitivity import analyse, by_seed, sensitivity
from scaling_testbed.analysis.rows.study import Study
from tests.analysis.conftest import make_row
from tests.analysis.curves.noise import COMMON, LRS, MEANS, losses

STUDIES = 1000
HELD = (0.92, 0.98)  # of 1,000 intervals at 95 %, fewer or more hold the truth once in some 20,000 times


def simulated(place, n_seeds):
    rng = np.random.default_rng([n_seeds, len(MEANS), list(MEANS).index(place)])
    return (losses(rng, place, n_seeds) for _ in range(STUDIES))


@pytest.mark.parametrize("n_seeds", [3, 5, 10])
@pytest.mark.parametrize("place", [("none", 64), ("layernorm", 64), ("flat", 0)], ids=lambda place: f"{place[0]}")
def test_the_intervals_of_s_and_of_the_critical_rate_hold_what_they_promise(place, n_seeds):
    truth = sensitivity(MEANS[place], math.inf)
    critical = critical_rate(LRS, np.array([MEANS[place]]), [0]).rate
    held_s = held_rate = 0
    seeds = range(n_seeds)
    for losses_SL in simulated(place, n_seeds):
        s = interval(list(by_seed(losses_SL, seeds).values()))
        held_s += s.low <= truth <= s.high
        rate = critical_rate(LRS, losses_SL, seeds)
        held_rate += rate.low <= critical <= (rate.high or math.inf)
    assert HELD[0] <= held_s / STUDIES <= HELD[1]
    assert HELD[0] <= held_rate / STUDIES <= HELD[1]


@pytest.mark.parametrize("place", [("none", 16), ("none", 32), ("layernorm", 16), ("layernorm", 32)], ids=str)
def test_the_intervals_of_three_seeds_hold_the_truth_at_other_sizes_too(place):
    """At width 16 without qk-norm the critical rate is at a kink of the curve."""
    truth, critical = sensitivity(MEANS[place], math.inf), critical_rate(LRS, np.array([MEANS[place]]), [0]).rate
    held_s = held_rate = 0
    for losses_SL in simulated(place, 3):
        s, rate = interval(list(by_seed(losses_SL, range(3)).values())), critical_rate(LRS, losses_SL, range(3))
        held_s += s.low <= truth <= s.high
        held_rate += rate.low <= critical <= (rate.high or math.inf)
    assert HELD[0] <= held_s / STUDIES <= HELD[1] and HELD[0] <= held_rate / STUDIES <= HELD[1]


@pytest.mark.parametrize(("place", "n_seeds"), [(("flat", 0), 10), (("none", 64), 3)], ids=str)
def test_the_critical_rates_of_the_seeds_by_which_effects_are_judged_hold_the_truth(place, n_seeds):
    """Where the best rate is hard to tell, too."""
    critical = math.log(critical_rate(LRS, np.array([MEANS[place]]), [0]).rate)
    held = 0
    for losses_SL in simulated(place, n_seeds):
        by_seed = critical_rate(LRS, losses_SL, range(n_seeds), intervals=False).by_seed
        ends = interval([min(value, math.log(LRS[-1])) for value in by_seed.values()])
        held += ends.low <= critical <= (math.inf if math.inf in by_seed.values() else ends.high)
    assert HELD[0] <= held / STUDIES <= HELD[1]


def test_the_smaller_s_of_two_ranges_of_coupled_decay_is_too_low_by_a_tenth_of_its_interval():
    """At a tie of the two ranges, where the choice between them costs the most."""
    lrs = (1e-4, *(rate * 3e-1 for rate in LRS))
    assert lrs[1] == pytest.approx(3e-4)
    means = np.array((2.3, 2.12, 2.05, 2.0, 2.05, 2.1, 2.2, 2.3))
    sds = np.array((0.012, 0.012, 0.012, 0.015, 0.03, 0.05, 0.08, 0.1))
    truth, rng, off, reach, held = means[1:].mean() - 2.0, np.random.default_rng(0), [], [], 0
    for _ in range(STUDIES // 2):
        noise_SL = rng.standard_normal((3, 1)) * COMMON**0.5 + rng.standard_normal((3, 8)) * (1 - COMMON) ** 0.5
        rows = [
            make_row(lr, loss, seed=seed, optimizer__decay="coupled")
            for seed, own_L in enumerate(means + sds * noise_SL)
            for lr, loss in zip(lrs, own_L.tolist(), strict=True)
        ]
        (found,) = analyse(Study(name="coupled", path=Path("."), rows=rows), [])
        assert found.range_rule == "coupled decay: smaller of two ranges"
        held += found.low <= truth <= found.high
        off.append(found.s - truth)
        reach.append((found.high - found.low) / 2)
    assert HELD[0] <= held / (STUDIES // 2) <= HELD[1]
    assert -0.1 * np.mean(reach) < np.mean(off) < -0.001


def test_the_jackknife_takes_off_most_of_the_bias_of_s():
    truth = sensitivity(MEANS["flat", 0], math.inf)
    plain, corrected = [], []
    for losses_SL in simulated(("flat", 0), 3):
        plain.append(sensitivity(losses_SL.mean(axis=0), math.inf) - truth)
        corrected.append(np.mean(list(by_seed(losses_SL, range(3)).values())) - truth)
    assert np.mean(plain) > 0.006 and abs(np.mean(corrected)) < 0.6 * np.mean(plain)


def test_the_jackknife_leaves_a_mean_as_it_is():
    values = np.array([[1.0], [2.0], [6.0]])
    assert jackknife(lambda mean: float(mean[0]), values) == pytest.approx(3.0)
    assert jackknife(lambda mean: float(mean[0] ** 2), values[:1]) == 1.0


def test_an_interval_is_students():
    found = interval([1.0, 2.0, 3.0])
    assert (found.mean, found.low, found.high) == pytest.approx((2, 2 - 4.302653 / 3**0.5, 2 + 4.302653 / 3**0.5))
    assert p_above([1.0, 2.0, 3.0], 0.0) == pytest.approx(0.0370900, rel=1e-5)
    assert p_below([1.0, 2.0, 3.0], 0.0) == pytest.approx(1 - 0.0370900, rel=1e-5)
    one = interval([1.0])
    assert (one.low, one.high, p_above([1.0], 0.0)) == (-math.inf, math.inf, 1.0)


@pytest.mark.parametrize("margin", [0.0, 0.03])
@pytest.mark.parametrize("n_seeds", [3, 5, 8])
def test_the_effect_that_can_be_detected_is_detected_in_four_of_five_studies(n_seeds, margin):
    """It must be told from zero, and reach the margin."""
    rng = np.random.default_rng(n_seeds)
    effect = detectable(0.02, n_seeds, margin)
    found = [interval(effect + 0.02 * rng.standard_normal(n_seeds)) for _ in range(2000)]
    assert 0.77 <= np.mean([one.low > 0 and one.mean >= margin for one in found]) <= 0.83


@pytest.mark.parametrize("n_seeds", [3, 5])
def test_the_effect_that_the_strictest_of_several_claims_detects_passes_its_corrected_test(n_seeds):
    rng = np.random.default_rng(n_seeds)
    effect = detectable(0.02, n_seeds, n_claims=7)
    found = [2 * p_above(effect + 0.02 * rng.standard_normal(n_seeds), 0.0) for _ in range(2000)]
    assert 0.77 <= np.mean(np.array(found) <= 0.05 / 7) <= 0.83


def test_a_critical_rate_is_interpolated_in_the_logarithm_of_the_rate():
    found = critical_rate([1e-3, 1e-2, 1e-1], np.array([[2.0, 1.0, 1.5]]), [0])
    assert found.rate == pytest.approx(10**-1.5) and found.low is None and str(found) == "0.0316"
    assert critical_rate([1e-3, 1e-2, 1e-1], np.array([[2.0, 1.0, 1.5]]), [0], excess=0.5).rate == pytest.approx(0.1)


@pytest.mark.parametrize("losses_L", [(2.0, 1.0, 1.2), (3.0, 2.0, 1.0)])
def test_a_critical_rate_that_no_rate_passes_lies_above_the_highest(losses_L):
    found = critical_rate([1e-3, 1e-2, 1e-1], np.array([losses_L]), [7])
    assert found.rate is None and found.by_seed == {7: math.inf} and str(found) == "above 0.1"
    assert found.record() == {"critical_lr": None, "critical_low": None, "critical_high": None, "critical_above": 0.1}


def test_the_interval_of_a_critical_rate_is_open_where_the_seeds_do_not_exclude_it():
    losses_SL = np.array([[2.0, 1.0, 1.5], [2.0, 1.0, 1.1], [2.0, 1.0, 1.4]])
    found = critical_rate([1e-3, 1e-2, 1e-1], losses_SL, range(3))
    assert found.low is not None and found.high is None and found.low < found.rate and "open" in str(found)
