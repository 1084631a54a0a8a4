"""How often the intervals of the other kinds of numbers hold the truth: best and critical rates, shares, diagnostics
and numbers of laws. test_effects.py has those of S and of the best loss."""

import math
from types import SimpleNamespace

import numpy as np
import pytest

from scaling_testbed.analysis.curves.critical_rate import critical_rate
from scaling_testbed.analysis.curves.grouping import Curve
from scaling_testbed.analysis.curves.instability import Quantity
from scaling_testbed.analysis.curves.intervals import interval
from scaling_testbed.papers.effects import pooled
from scaling_testbed.papers.lines import Line
from scaling_testbed.papers.measures import BEST_LR, CRITICAL_LR, Place, Value, kept_gain, measured_as
from scaling_testbed.papers.sparse_pretraining import gap_to_dense_line
from tests.analysis.curves.noise import COMMON, LRS, MEANS, losses

STUDIES = 300
HELD = (0.9, 0.99)  # of 300 intervals at 95 %, fewer or more hold the truth once in some 10,000 times
WIDTHS = (16, 32, 64)
# Mean losses and standard deviations of three seeds, from studies/mup_simple_lr_cpu
MUP_LRS = (0.001, 0.0018, 0.0032, 0.0058, 0.0105, 0.019, 0.034, 0.061)
MUP = {
    "steep": (
        (2.213, 2.01, 1.849, 1.725, 1.663, 1.669, 1.704, 1.77),
        (0.022, 0.013, 0.01, 0.01, 0.01, 0.011, 0.01, 0.023),
    ),
    "flat": (
        (2.476, 2.349, 2.247, 2.168, 2.131, 2.124, 2.146, 2.194),
        (0.035, 0.017, 0.021, 0.019, 0.01, 0.043, 0.01, 0.022),
    ),
}


def place_of(losses_SL, lrs, **recorded):
    """A place whose runs have these losses [seeds, rates]. recorded: further values [seeds] of each row."""
    rows = {
        (lr, seed): {"status": "finished", "val_loss": float(loss), "val_loss_initial": 6.0}
        | {name: values_S[seed] for name, values_S in recorded.items()}
        for seed, own_L in enumerate(losses_SL)
        for lr, loss in zip(lrs, own_L, strict=True)
    }
    row = next(iter(rows.values()))
    return Place(Curve({}, 1e4, (16, 2), list(lrs), list(range(len(losses_SL))), rows, {}, [], row))


def held(numbers, truth):
    """The share of intervals that hold the truth. numbers: those of the seeds of each study."""
    ends = [interval(list(own)) for own in numbers]
    return sum(one.low <= truth <= one.high for one in ends) / len(ends)


@pytest.mark.parametrize("n_seeds", [3, 10])
@pytest.mark.parametrize(("shape", "least"), [("steep", HELD[0]), ("flat", 0.83)])
def test_the_interval_of_the_best_rate(shape, least, n_seeds):
    """Where three rates are about equally good and one is noisy, the vertex jumps with the rate that it is around."""
    (mean, sd), rng = MUP[shape], np.random.default_rng(n_seeds)
    truth = BEST_LR.of(None, place_of([mean], MUP_LRS)).by_seed[0]
    found = []
    for _ in range(STUDIES):
        common, own = rng.standard_normal((n_seeds, 1)), rng.standard_normal((n_seeds, len(mean)))
        noisy = np.array(mean) + np.array(sd) * (math.sqrt(COMMON) * common + math.sqrt(1 - COMMON) * own)
        found.append(BEST_LR.of(None, place_of(noisy, MUP_LRS)).by_seed.values())
    assert least <= held(found, truth) <= HELD[1]


@pytest.mark.parametrize("n_seeds", [3, 10])
def test_the_interval_of_a_share_that_is_kept(n_seeds):
    measure, rng = kept_gain(0.3), np.random.default_rng(n_seeds)
    (truth,) = measure.of(None, place_of([MEANS["none", 64]], LRS)).by_seed.values()
    found = [
        measure.of(None, place_of(losses(rng, ("none", 64), n_seeds), LRS)).by_seed.values() for _ in range(STUDIES)
    ]
    assert HELD[0] <= held(found, truth) <= HELD[1]


@pytest.mark.parametrize("n_seeds", [3, 10])
def test_the_interval_of_a_ratio_of_diagnostics(n_seeds):
    """What a seed adds to both sides is no part of it."""
    rng, measure, found = np.random.default_rng(n_seeds), measured_as(Quantity(name="peak")), []

    def value(truth, factors_S):
        values = [{"step": 40, "peak": truth * factor} for factor in factors_S]
        at = place_of(np.full((n_seeds, 1), 2.0), [0.1], diagnostics_at_step=values)
        return measure.of(None, Place(at.curve, 0.1))

    for _ in range(STUDIES):
        shared, own, other = np.exp(rng.standard_normal((3, n_seeds)) * [[0.4], [0.5], [0.1]])
        terms = [(1.0, value(30.0, shared * own)), (-1.0, value(10.0, shared * other))]
        (effect,), _ = pooled([("", terms)], ratio=True)
        found.append(effect.by_seed.values())
    assert HELD[0] <= held(found, math.log(3)) <= HELD[1]


def trend_of_critical_rate(rng, n_seeds):
    points = []
    for width in WIDTHS:
        found = critical_rate(LRS, losses(rng, ("none", width), n_seeds), range(n_seeds), intervals=False).by_seed
        capped = {seed: min(value, math.log(LRS[-1])) for seed, value in found.items()}
        points.append((24.0 * width**2, "", Value(capped)))
    (effect,), _ = pooled([("", Line(CRITICAL_LR, "", None, points, "N").trend())])
    return list(effect.by_seed.values())


@pytest.mark.parametrize("n_seeds", [3, 10])
def test_the_interval_of_a_trend_of_the_critical_rate(n_seeds):
    """It holds what a seed has in the mean."""
    rng = np.random.default_rng(n_seeds)
    truth = float(np.mean(trend_of_critical_rate(rng, 3000)))
    found = [trend_of_critical_rate(rng, n_seeds) for _ in range(STUDIES)]
    assert HELD[0] <= held(found, truth) <= HELD[1]


@pytest.mark.parametrize("n_seeds", [3, 10])
def test_the_interval_of_a_number_of_a_law(n_seeds):
    """The signed distance of pruned runs from the line of dense ones, each with noise."""
    rng, sizes, average, gap, found = np.random.default_rng(n_seeds), (2e4, 3.3e4, 4.9e4, 6.8e4), 4.7e4, 0.02, []

    def row(n, n_average, above):
        loss = 2.0 - 0.2 * math.log(n_average / 2e4) + above + 0.02 * rng.standard_normal()
        return {"val_loss": loss, "n_params": n, "n_params_no_input_embedding": n, "n_params_average": n_average}

    for _ in range(STUDIES):
        own = []
        for _ in range(n_seeds):
            rows = [*(row(n, n, 0.0) for n in sizes), row(sizes[-1], average, gap)]
            own.append(gap_to_dense_line(SimpleNamespace(study=SimpleNamespace(rows=rows)))[0].number)
        found.append(own)
    assert HELD[0] <= held(found, gap) <= HELD[1]
