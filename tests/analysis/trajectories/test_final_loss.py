"""The final loss of an unfinished run: from similar finished runs, with an interval that holds what it says."""

import math

import numpy as np
import pytest

from scaling_testbed.analysis.trajectories.calibration import half_width
from scaling_testbed.analysis.trajectories.final_loss import predict_final
from scaling_testbed.analysis.trajectories.points import curve_of_run, evaluations
from tests.analysis.trajectories.worlds import run


def curve(name, factor=1.0, fall=0.0, *, steps=400, upto=None, **keys):
    """A run whose log loss falls by `fall` more than others over its steps, evenly in the log of the step."""

    def loss(step, rates):
        return factor * (2 + 20 / step) * math.exp(-fall * math.log(step) / math.log(steps))

    row, records = run(name, keys.pop("n", 1000), steps, loss, **keys)
    at, losses, _ = evaluations([one for one in records if upto is None or one["step"] <= upto], name)
    return curve_of_run({**row, "steps": steps}, at, losses)


def test_the_last_loss_falls_as_that_of_finished_runs_from_the_same_part_on():
    """With equal falls the prediction is exact, also for another length and another level of loss."""
    finished = [curve(f"f{place}", 1 + place / 10) for place in range(5)]
    found = predict_final(curve("u", 1.7, upto=200), finished)
    assert found.loss == pytest.approx(1.7 * (2 + 20 / 400)) and found.high - found.low < 1e-9
    assert (found.step, found.n_runs, found.like) == (200, 5, "all but the seed")
    longer = predict_final(curve("u", 1.7, steps=800, upto=400), finished)  # half of its steps
    falls = math.log((2 + 20 / 400) / (2 + 20 / 200))
    assert math.log(longer.loss / (1.7 * (2 + 20 / 400))) == pytest.approx(falls)
    shorter = predict_final(curve("u", upto=200), [curve(f"f{place}", steps=800) for place in range(5)])
    assert shorter.loss / (2 + 20 / 200) == pytest.approx((2 + 20 / 800) / (2 + 20 / 400))


def test_the_interval_is_that_of_the_errors_of_each_finished_run_from_the_others():
    finished = [curve(f"f{place}", fall=fall) for place, fall in enumerate((0, 0.01, 0.02, 0.05, 0.03, 0.04))]
    found = predict_final(curve("u", upto=200), finished)
    part = 1 - math.log(200) / math.log(400)
    falls = np.array([-part * fall for fall in (0, 0.01, 0.02, 0.05, 0.03, 0.04)])
    errors = [fall - np.delete(falls, place).mean() for place, fall in enumerate(falls)]
    width = 2.5706 * math.sqrt(np.mean(np.square(errors)))  # Student's quantile for five degrees of freedom
    assert math.log(found.high / found.loss) == pytest.approx(width, rel=1e-4)
    assert math.log(found.loss / found.low) == pytest.approx(width, rel=1e-4)
    assert (
        str(found) == f"{found.loss:.3f} ± {(found.high - found.low) / 2:.3f}" and 0.01 < found.high - found.loss < 0.1
    )


def test_intervals_of_normal_errors_hold_what_they_say():
    """2,000 times five or nine runs and one more: the interval is Student's up to a factor of n / sqrt(n^2 - 1)."""
    rng = np.random.default_rng(0)
    for n in (5, 9):
        falls = rng.normal(size=(2000, n + 1))
        inside = 0
        for row in falls:
            known = row[:-1]
            errors = known - (known.sum() - known) / (n - 1)
            inside += abs(row[-1] - known.mean()) <= half_width(list(errors))
        assert inside / 2000 == pytest.approx(0.955, abs=0.012)  # three standard errors are 0.014


def test_the_most_similar_runs_are_taken_if_they_are_five():
    same = [curve(f"s{place}", fall=0.01 * place) for place in range(5)]
    rates = [curve(f"r{place}", fall=1.0, lr=10.0**-place) for place in range(3, 6)]
    sizes = [curve(f"n{place}", fall=2.0, n=2000) for place in range(5)]
    other = [curve(f"o{place}", fall=3.0, schedule="cosine") for place in range(9)]
    unfinished = curve("u", upto=200)
    assert predict_final(unfinished, [*same, *rates, *sizes, *other]).like == "all but the seed"
    found = predict_final(unfinished, [*same[:4], *rates, *sizes, *other])
    assert (found.like, found.n_runs) == ("the schedule and the size", 7)
    found = predict_final(unfinished, [*same[:2], *rates[:1], *sizes, *other])
    assert (found.like, found.n_runs) == ("the schedule", 8)
    found = predict_final(unfinished, [*same[:4], *other])
    assert found.loss is None and found.withheld.startswith("4 finished runs of this schedule have a curve")


def test_a_prediction_is_withheld_before_the_end_of_the_warm_up():
    finished = [curve(f"f{place}") for place in range(5)]
    assert "no evaluation yet" in predict_final(curve("u", upto=0), finished).withheld
    assert "after the warm-up" in predict_final(curve("u", upto=40, warmup=40), finished).withheld
    late = [curve(f"f{place}", every=300) for place in range(5)]  # their first evaluation lies after step 200
    assert predict_final(curve("u", upto=200), late).withheld.startswith("0 finished runs")
    assert str(predict_final(curve("u", upto=200), late)) == ""
