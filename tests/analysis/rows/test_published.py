"""The published numbers of Gadre et al. 2024 and Muennighoff et al. 2023, from their published runs where these are at
hand beside the project."""

import csv
import math
from pathlib import Path

import numpy as np
import pytest

from scaling_testbed.analysis.laws import columns, frontier
from scaling_testbed.analysis.laws.downstream import Chain
from scaling_testbed.analysis.laws.fitting import LSQ, Problem, fit
from scaling_testbed.analysis.laws.forms import LAWS
from scaling_testbed.analysis.rows.conditions import parse

DATA = Path(__file__).resolve().parents[4] / "shared" / "data"
TESTBED, DATABLATIONS = DATA / "mlfoundations-scaling", DATA / "datablations182.csv"
at_hand = pytest.mark.skipif(not TESTBED.is_dir(), reason="the published runs are not at hand")
# RedPajama: N, D, loss on C4, error over 17 tasks. Five runs for the loss, one more for the error, two to be predicted.
EIGHT = [
    (10_569_312, 211_386_240, 5.38702091510821, 0.8134857367566677),
    (10_569_312, 3_382_179_840, 4.572292613487238, 0.7671019083970938),
    (78_914_048, 1_578_280_960, 3.899942990231468, 0.7250451834543663),
    (153_677_376, 3_073_547_520, 3.531147408490181, 0.6710080283365267),
    (411_616_256, 8_232_325_120, 3.149769456671634, 0.6365529066499542),
    (1_439_795_200, 28_795_904_000, 2.768756661738063, 0.5473253052024281),
    (1_439_795_200, 921_468_928_000, 2.502053562117363, 0.47521523167105284),
    (6_889_410_560, 137_788_211_200, 2.424993099368689, 0.47163718062288623),
]

CHEAP = "tokens_per_param=20 and n_params<1e9 or tokens_per_param=320 and n_params<2e7"
# E, a, b, eta of the loss; epsilon, k, gamma of the error over 17 tasks and over 46
LAW = {
    "c4": ((1.5083, 141.3, 189.5, 0.2425 / 2), (0.8497, 2.0789, 0.7561), (0.7589, 1.2885, 0.9722)),
    "redpajama": ((1.8366, 212.2, 366.7, 0.2729 / 2), (0.8570, 2.2065, 0.7146), (0.7608, 1.3229, 0.8907)),
    "refinedweb": ((1.7345, 157.1, 246.2, 0.2544 / 2), (0.8653, 2.2148, 0.7070), (0.7677, 1.1281, 0.8215)),
}
# (data, N > 2e9): predicted and actual loss, predicted and actual error over 17 tasks, relative error over 46, all of
# runs that were fitted by neither law
PREDICTED = {
    ("redpajama", False): (2.5198, 2.5021, 0.4925, 0.4752, 0.03436),
    ("redpajama", True): (2.4427, 2.4250, 0.4719, 0.4716, 0.02097),
    ("c4", False): (2.5094, 2.4724, 0.5380, 0.4910, 0.03082),
    ("c4", True): (2.2799, 2.3822, 0.4789, 0.4796, 0.00074),
    ("refinedweb", False): (2.5313, 2.5314, 0.4954, 0.4690, 0.04298),
    ("refinedweb", True): (2.4150, 2.4547, 0.4637, 0.4505, 0.02759),
}


@pytest.fixture(scope="module")
def rows():
    found, _ = columns.read(TESTBED, "mlfoundations-scaling", [], "n_params")
    assert len(found) == 104
    return found


def fitted(name, rows, **more):
    inputs, observed = columns.values(rows, LAWS[name])
    return fit(LAWS[name], inputs, observed, objective=LSQ, starts=8, bootstrap=0, **more)


def chains(rows, data):
    """The law of the loss, from five runs, chained with each of the two laws of the error, from six."""
    own = [row for row in rows if row["dataset"] == data]
    five = [row for row in own if parse("", CHEAP)(row)]
    six = [row for row in own if parse("", f"{CHEAP} or tokens_per_param=20 and n_params<2e9")(row)]
    loss = fitted("over_training", five)
    errors = [fitted("loss_to_error", [row | {"error": row[f"error_{n}"]} for row in six]) for n in (17, 46)]
    assert (len(five), len(six)) == (5, 6)
    return [Chain(loss, error) for error in errors]


@at_hand
@pytest.mark.parametrize("data", LAW)
def test_the_published_laws_and_predictions_are_recovered(rows, data):
    of_17, of_46 = chains(rows, data)
    for found, published in zip((of_17.loss, of_17.downstream, of_46.downstream), LAW[data], strict=True):
        assert list(found.params.values()) == pytest.approx(published, rel=5e-4)
    held = [row for row in rows if row["dataset"] == data
            and (row["n_params"] > 2e9 or row["n_params"] > 1e9 and row["tokens_per_param"] > 20)]  # fmt: skip
    assert len(held) == 2
    for row in held:
        loss, loss_was, error, error_was, apart = PREDICTED[data, row["n_params"] > 2e9]
        assert (row["loss"], row["error_17"]) == pytest.approx((loss_was, error_was), abs=6e-5)
        assert of_17.predict(row) == pytest.approx((loss, error), abs=6e-5)
        assert abs(of_46.predict(row)[1] / row["error_46"] - 1) == pytest.approx(apart, abs=6e-6)


def test_the_headline_errors_are_recovered_to_every_digit():
    """Of RedPajama's 1.4B at 640 tokens per parameter and 6.9B at 20, as the authors' notebook prints them."""
    rows = [dict(zip(("n_params", "n_tokens", "loss", "error"), row, strict=True)) for row in EIGHT]
    chain = Chain(fitted("over_training", rows[:5]), fitted("loss_to_error", rows[:6]))
    found = []
    for row in rows[6:]:
        loss, error = chain.predict(row)
        found += [abs(loss / row["loss"] - 1), abs(error / row["error"] - 1)]
    assert [f"{100 * one:.4f}" for one in found] == ["0.7103", "3.6365", "0.7320", "0.0464"]


@at_hand
def test_the_ladder_of_the_grid_search_is_recovered():
    found, _ = columns.read(TESTBED, "mlfoundations-scaling-grid", [], "n_params")
    front = frontier.pareto(found)
    assert len(found) == 435 and len({row["n_params"] for row in found}) == 50
    kept = [row for row in front if not 5.2e16 < row["flops"] < 5.2e17]
    law = fitted("compute", kept)
    at_1e18 = (law.params["C0"] / 1e18) ** law.params["alpha"]
    assert len(kept) == 21
    assert (law.params["E"], at_1e18, law.params["alpha"]) == pytest.approx((1.4199, 1.7595, 0.1739), abs=1e-4)
    picked = {10_569_312: 5.145, 78_914_048: 3.271, 153_677_376: 2.888, 411_616_256: 2.462}
    on_front = {row["n_params"]: float(law.predict(row)) for row in kept}
    assert {n: on_front[n] for n in picked} == pytest.approx(picked, abs=6e-4)
    places = frontier.rungs(kept, [float(law.predict(row)) for row in kept], 4)
    assert {kept[place]["n_params"] for place in places} >= {10_569_312, 78_914_048, 411_616_256}


FIXED = {"E": math.exp(0.6254804), "A": math.exp(6.255414), "B": math.exp(7.3049974)} | dict.fromkeys(
    ("alpha", "beta"), 0.3526596
)


@at_hand
def test_the_published_optimum_of_repeated_tokens_is_one_of_several():
    with open(DATABLATIONS, newline="") as file:
        read = list(csv.DictReader(file))
    names = {"n_params": "N", "n_tokens": "D", "unique_tokens": "U"}
    inputs = {ours: np.array([float(row[theirs]) for row in read]) for ours, theirs in names.items()}
    observed = np.array([float(row["loss"]) for row in read])
    problem = Problem(LAWS["data_constrained"], inputs, observed, "huber_log", FIXED)
    published = np.log([15.387756, 5.309743])
    assert problem.value(published) == pytest.approx(0.01582593, abs=1e-8)
    predicted = LAWS["data_constrained"].predict(problem.params(published), inputs)
    r2 = 1 - np.sum((predicted - observed) ** 2) / np.sum((observed - observed.mean()) ** 2)
    assert r2 == pytest.approx(0.7722046, abs=1e-7)
    found = fit(LAWS["data_constrained"], inputs, observed, fixed=FIXED, starts=32, bootstrap=0)
    assert found.objective["value"] < 0.015807
    others = [(one["params"]["R_D"], one["params"]["R_N"], one["objective"]) for one in found.optima]
    assert any(one == pytest.approx((15.37, 5.315, 0.0158259), rel=1e-3) for one in others)
    assert any(one == pytest.approx((46.99, 2.33, 0.0158074), rel=1e-3) for one in others)
    assert any("other optima of near-equal objective" in text and "R_D=15.37" in text for text in found.warnings)
