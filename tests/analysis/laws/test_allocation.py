"""Plans with repeated tokens, and intervals of plans, against brute force and against plans of each resample."""

import json
from dataclasses import asdict, replace

import numpy as np
import pytest

import scaling_testbed as st
from scaling_testbed.analysis.laws.allocation import allocate
from scaling_testbed.analysis.laws.fitted import Fit, from_record, with_ratios
from scaling_testbed.analysis.laws.forms import LAWS
from scaling_testbed.analyze import main
from scaling_testbed.errors import ConfigError
from tests.analysis.laws.planted import PLANTED

FLOPS, UNIQUE = 1e21, 1e10
OTHERS = [{}, {"alpha": 0.33}, {"beta": 0.27}, {"B": 500.0}, {"A": 450.0}]


def fitted(law):
    """A law that was not fitted: its parameters, and five resamples with other ones."""
    at = {"n_params": np.array([1e7, 1e9]), "n_tokens": np.array([1e8, 1e12]), "unique_tokens": np.array([1e8, 1e11])}
    seen = with_ratios({key: at[key] for key in LAWS[law].inputs})
    return Fit(
        law=law, params=PLANTED[law], ci95=None, objective={"name": "lsq_log", "value": 0.0}, n_rows=20,
        starts={"tried": 1, "reached_best": 1}, warnings=[], residuals=[0.001, -0.001] * 10,
        draws=[PLANTED[law] | other for other in OTHERS],
        largest={key: float(values.max()) for key, values in seen.items()},
        smallest={key: float(values.min()) for key, values in seen.items()},
    )  # fmt: skip


def test_repeated_tokens_are_planned_as_brute_force_finds():
    fit = fitted("data_constrained")
    (best, smaller) = allocate(fit, FLOPS, (1.0, 0.75), UNIQUE)
    n = np.geomspace(1e7, 1e12, 200001)
    inputs = {"n_params": n, "n_tokens": FLOPS / 6 / n, "unique_tokens": UNIQUE}
    losses = LAWS["data_constrained"].predict(fit.params, inputs)
    assert best.n_params == pytest.approx(n[np.argmin(losses)], rel=1e-2)
    assert best.loss == pytest.approx(losses.min(), rel=1e-9)
    assert float(fit.predict(smaller.inputs)) == pytest.approx(best.loss) and smaller.compute > 1
    free = allocate(fitted("chinchilla"), FLOPS, (1.0,))[0]
    assert best.loss > free.loss  # repeated tokens are worth less
    assert best.record()["epochs"] == best.n_tokens / UNIQUE > 2


def test_without_repetition_the_plan_is_that_of_chinchilla():
    made, plain = (allocate(fitted(law), FLOPS, (1.0, 0.75), unique)
                   for law, unique in (("data_constrained", 1e14), ("chinchilla", None)))  # fmt: skip
    for one, other in zip(made, plain, strict=True):
        assert (one.n_params, one.n_tokens) == pytest.approx((other.n_params, other.n_tokens), rel=1e-4)


@pytest.mark.parametrize(("law", "unique"), [("chinchilla", None), ("data_constrained", UNIQUE)])
def test_the_intervals_of_a_plan_are_those_of_the_plans_of_the_resamples(law, unique):
    fit = fitted(law)
    found = st.allocate(fit, flops=FLOPS, unique_tokens=unique, inference_tokens=1e10)
    each = [allocate(replace(fit, params=draw, draws=[]), FLOPS, (1.0, 0.75), unique) for draw in fit.draws]
    for share, place in ((1.0, 0), (0.75, 1)):
        (record,) = [one for one in found if one["share_of_optimal_n"] == share]
        for name in ("n_params", "n_tokens", "flops", "tokens_per_param", "times_compute"):
            values = [one[place].record()[name] for one in each]
            assert (record[f"{name}_low"], record[f"{name}_high"]) == pytest.approx((min(values), max(values)), 1e-3)
        assert record["total_flops_low"] <= record["total_flops"] <= record["total_flops_high"]
    assert (found[0]["epochs_low"] > 1) if unique else ("epochs_low" not in found[0])


def test_plans_outside_of_the_fitted_runs_are_marked_and_epochs_count():
    fit = fitted("data_constrained")
    assert fit.largest["epochs"] == 10 and fit.extrapolation(
        {"n_params": 1e8, "n_tokens": 4e9, "unique_tokens": 1e8}
    ) == pytest.approx(4)
    (best, *_) = st.allocate(fit, flops=FLOPS, unique_tokens=UNIQUE)
    assert best["note"] == "outside of the fitted runs" and best["extrapolation"] > 1
    inside = st.allocate(fitted("chinchilla"), flops=3e18)[0]
    assert inside["note"] == "" and inside["extrapolation"] == 1


@pytest.mark.parametrize(
    ("law", "unique", "said"),
    [
        (
            "data_constrained",
            None,
            "allocate needs --unique-tokens U: the tokens that there are; data_constrained depends",
        ),
        ("chinchilla", 1e9, "--unique-tokens: chinchilla has no limit of unique tokens; fit data_constrained"),
        ("data_constrained", 0, "--unique-tokens must be a number greater than zero; got 0"),
    ],
)
def test_a_limit_needs_its_law_and_the_law_its_limit(law, unique, said):
    with pytest.raises(ConfigError, match=said):
        st.allocate(fitted(law), flops=FLOPS, unique_tokens=unique)


def test_the_command_shows_epochs_and_intervals(tmp_path, capsys):
    path = tmp_path / "fit.json"
    path.write_text(json.dumps(asdict(fitted("data_constrained"))))
    assert from_record(json.loads(path.read_text())).largest["epochs"] == 10
    assert main(["allocate", str(path), "--flops", "1e21", "--unique-tokens", "1B"]) == 0
    printed = capsys.readouterr().out
    assert "epochs" in printed and " to " in printed and "each with its own best size" in printed
