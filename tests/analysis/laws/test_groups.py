"""Groups that are fitted together share what they share in the planted world, and are fitted as apart where nothing is
shared."""

import json

import numpy as np
import pytest

import scaling_testbed as st
from scaling_testbed.analysis.laws.fitting import _drawn, fit
from scaling_testbed.analysis.laws.forms import LAWS
from scaling_testbed.analysis.laws.groups import GROUP, grouped, ways
from scaling_testbed.analysis.laws.study import Fitting, Rows, fit_rows
from scaling_testbed.analyze import main
from scaling_testbed.errors import ConfigError, UserError
from tests.analysis.laws.planted import CHINCHILLA

QUICK = {"starts": 2, "bootstrap": 0, "objective": "lsq_log"}
OWN = {"code": {"E": 1.2}, "prose": {}, "web": {"E": 2.1}}
SCALES = {"code": {"A": 800.0}, "prose": {}, "web": {"A": 200.0, "E": 2.1}}
EXPONENTS = {"code": {"alpha": 0.25, "E": 1.2}, "prose": {}, "web": {"alpha": 0.45, "beta": 0.35}}


def world(own, noise=0.001, ratios=(10, 40, 160), sizes=4, key="data", seed=0):
    """Runs of a chinchilla law with parameters of each group."""
    rng, rows = np.random.default_rng(seed), []
    for group, changed in own.items():
        for n in np.geomspace(1e7, 1e9, sizes):
            for ratio in ratios:
                at = {"n_params": float(n), "n_tokens": float(n * ratio)}
                loss = float(LAWS["chinchilla"].predict(CHINCHILLA | changed, at)) * np.exp(noise * rng.normal())
                rows.append({key: group, **at, "loss": float(loss), "flops": 6 * n * n * ratio})
    return rows


@pytest.fixture(scope="module")
def floors():
    return st.fit_groups(world(OWN), "chinchilla", "data", hold_out="flops>5e20", **QUICK)


def test_a_group_of_few_rows_has_no_interval_because_resamples_do_not_hold_its_noise():
    rows = [row for row in world(OWN) if row["data"] != "web"] + world({"web": OWN["web"]}, sizes=2, ratios=(20, 80))
    found = st.fit_groups(rows, "chinchilla", "data", starts=2, bootstrap=20, objective="lsq_log")
    assert "no intervals for groups of fewer than 5 rows: web (4)" in found.warnings
    assert found.fits["web"].draws == [] and found.fits["web"].ci95 is None
    assert found.fits["code"].draws and found.fits["code"].ci95


def test_groups_that_differ_in_the_floor_share_all_else(floors):
    assert floors.shared == ["A", "B", "alpha", "beta"]
    for name, own in OWN.items():
        assert floors.fits[name].params == pytest.approx(CHINCHILLA | own, rel=0.05)
    (taken,) = [one for one in floors.sharing if one["taken"]]
    assert taken["shared"] == "all but E" and taken["parameters"] == 7 and taken["above_least_aicc"] < 2
    assert [one["parameters"] for one in floors.sharing] == [15, 11, 7, 5]
    assert floors.sharing[-1]["above_least_aicc"] > 50 and floors.sharing[-1]["error_of_dearer_runs"] > 0.02
    assert [one["data"] for one in floors.table()] == ["code", "all", "all", "all", "all", "prose", "web"]
    assert {one["data"] for one in floors.predictions} == set(OWN)
    assert all(one["relative_error"] < 0.01 for one in floors.predictions)


@pytest.mark.parametrize(
    ("own", "shared"),
    [(dict.fromkeys(OWN, {}), ["E", "A", "B", "alpha", "beta"]), (SCALES, ["alpha", "beta"]), (EXPONENTS, [])],
)
def test_what_is_shared_is_found(own, shared):
    assert st.fit_groups(world(own), "chinchilla", "data", **QUICK).shared == shared


def test_without_shared_parameters_the_groups_are_fitted_as_apart():
    rows, names = world(EXPONENTS), list(EXPONENTS)
    joint = grouped(LAWS["chinchilla"], names, list(CHINCHILLA))
    inputs = {key: [row[key] for row in rows] for key in ("n_params", "n_tokens")}
    codes = [float(names.index(row["data"])) for row in rows]
    whole = fit(joint, inputs | {GROUP: codes}, [row["loss"] for row in rows], **QUICK)
    for name in names:
        own = [row for row in rows if row["data"] == name]
        alone = fit_rows(Rows(rows=own), LAWS["chinchilla"], fitting=Fitting(**QUICK)).fit
        assert {key: whole.params[f"{key}[{name}]"] for key in CHINCHILLA} == pytest.approx(alone.params, rel=1e-4)


def test_a_resample_has_the_runs_of_each_group():
    parts, rng = [np.arange(4), np.arange(4, 10)], np.random.default_rng(0)
    drawn = [_drawn(parts, rng) for _ in range(20)]
    assert all(np.sum(rows < 4) == 4 and len(rows) == 10 for rows in drawn)
    assert len({tuple(rows) for rows in drawn}) == 20


def test_ways_of_sharing_leave_out_fixed_parameters_and_repetitions():
    assert ways(LAWS["chinchilla"]) == {
        "none": ["E", "A", "B", "alpha", "beta"], "exponents": ["E", "A", "B"], "all but E": ["E"], "all": [],
    }  # fmt: skip
    assert ways(LAWS["chinchilla"], ["E"]) == {
        "none": ["A", "B", "alpha", "beta"], "exponents": ["A", "B"], "all but E": [],
    }  # fmt: skip
    assert list(ways(LAWS["kaplan_nd"])) == ["none", "exponents", "all but E"]


def test_the_command_keeps_the_groups_for_predict_and_allocate(tmp_path, capsys):
    table, kept = tmp_path / "runs.csv", tmp_path / "fit.json"
    lines = [f"{r['data']},{r['n_params']},{r['n_tokens']},{r['loss']}" for r in world(OWN, noise=0.003)]
    table.write_text("\n".join(["data,N,D,loss", *lines]) + "\n")
    typed = ["fit", str(table), "--law", "chinchilla", "--starts", "2", "--bootstrap", "20", "--objective", "lsq_log"]
    assert main([*typed, "--by", "data", "--out", str(kept)]) == 0
    printed = capsys.readouterr().out
    assert "shared: A, B, alpha, beta" in printed and "resamples of the rows of each data" in printed
    at = {"n_params": 2e9, "n_tokens": 1e11}
    for name, own in OWN.items():
        made = st.predict(kept, of=name, **at)
        assert made["low"] < LAWS["chinchilla"].predict(CHINCHILLA | own, at) < made["high"] < 1.1 * made["low"]
    assert main(["allocate", str(kept), "--of", "web", "--flops", "1e21"]) == 0
    assert main(["report", str(kept), "--out", str(tmp_path / "fit.html")]) == 0
    assert "What the groups share" in (tmp_path / "fit.html").read_text()
    capsys.readouterr()
    for words, said in (
        (["predict", str(kept), "--n-params", "1e9", "--n-tokens", "1e10"], "--of must be one of code, prose, web"),
        (["allocate", str(kept), "--of", "books", "--flops", "1e21"], "--of must be one of code, prose, web"),
        ([*typed[:2], "--by", "data"], "--by also needs --law"),
        ([*typed, "--by", "corpus"], "--by corpus: there is no such column; the columns are"),
        ([*typed, "--by", "data", "--where", "data=web"], "--by data: it has 1 values in the fitted rows"),
    ):
        assert main(words) == 2
        assert said in capsys.readouterr().err
    with pytest.raises(ConfigError, match="next takes no groups; fit one of them alone, with --where"):
        st.next_runs(kept, (1e9, 1e10), 1e20)
    record = json.loads(kept.read_text())
    assert record["by"] == "data" and set(record["groups"]) == set(OWN)
    with pytest.raises(ConfigError, match="of='web': there are no groups"):
        st.predict(st.fit(world(OWN)[:12], **QUICK), of="web", **at)


def test_a_held_out_run_of_another_group_and_a_law_of_best_runs_are_refused():
    with pytest.raises(UserError, match="a held-out run has data=web, which no fitted run has; the groups are code"):
        st.fit_groups(world(OWN), "chinchilla", "data", hold_out="data=web", **QUICK)
    with pytest.raises(ConfigError, match="optimal_lr is a law of best runs: use --where instead"):
        st.fit_groups(world(OWN), "optimal_lr", "data", **QUICK)
