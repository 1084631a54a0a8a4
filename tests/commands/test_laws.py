"""The doors of the laws: what is typed, printed and kept."""

import html
import json
import re

import numpy as np
import pytest

from scaling_testbed.analysis.laws.forms import LAWS
from scaling_testbed.analyze import main
from tests.analysis.laws.planted import PLANTED


@pytest.fixture
def runs(tmp_path):
    """A CSV of runs of a planted over-training law with noise: five sizes, four multipliers."""
    rng = np.random.default_rng(0)
    lines = ["name,n_params,n_tokens,loss,top1"]
    for n in np.geomspace(1e7, 1.6e8, 5):
        for ratio in (20, 40, 80, 160):
            at = {"n_params": n, "n_tokens": ratio * n}
            loss = float(LAWS["over_training"].predict(PLANTED["over_training"], at)) * np.exp(rng.normal(0, 0.003))
            error = float(LAWS["loss_to_error"].predict(PLANTED["loss_to_error"], {"loss": loss}))
            lines.append(f"n{n:.0f}m{ratio},{n:.0f},{ratio * n:.0f},{loss},{error}")
    path = tmp_path / "runs.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


FAST = ["--starts", "6", "--bootstrap", "20", "--objective", "lsq_log"]


def fit(runs, *more):
    return ["fit", str(runs), "--law", "over_training", *FAST, *more]


def test_fit_prints_parameters_and_held_out_runs(runs, capsys):
    assert main(fit(runs, "--hold-out", "n_params>1e8")) == 0
    printed = capsys.readouterr().out
    assert "eta" in printed and "lsq_log" in printed and "16 rows" in printed and "relative_error" in printed
    assert printed.count("yes") + printed.count("no ") >= 4


def test_json_stands_alone_and_out_keeps_the_same(runs, tmp_path, capsys):
    kept = tmp_path / "deep" / "fit.json"
    assert main(fit(runs, "--hold-out", "n_params>1e8", "--json", "--out", str(kept))) == 0
    record = json.loads(capsys.readouterr().out)
    assert record == json.loads(kept.read_text())
    assert {"law", "params", "ci95", "objective", "n_rows", "starts", "warnings", "predictions"} <= set(record)
    assert record["n_rows"] == 16 and len(record["predictions"]) == 4
    assert record["params"] == pytest.approx(PLANTED["over_training"], rel=0.3)
    for one in record["predictions"]:
        assert one["relative_error"] == pytest.approx(abs(one["predicted"] - one["actual"]) / one["actual"])
        assert one["relative_error"] < 0.02 and one["low"] < one["predicted"] < one["high"]
        assert one["extrapolation"] >= 2 and one["inside"] == (one["low"] <= one["actual"] <= one["high"])


def test_held_out_runs_of_a_law_of_the_best_are_the_best_too(tmp_path, capsys):
    rows = [{"n_params": n, "lr": lr, "loss": 3 + abs(np.log(lr / 0.1 * n / 1e6))} for n in (1e6, 2e6, 4e6, 8e6)
            for lr in (1e-2, 2.5e-2, 5e-2, 1e-1, 0.2)]  # fmt: skip
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    typed = ["--law", "optimal_lr", "--hold-out", "n_params>6e6", "--bootstrap", "0", "--json"]
    assert main(["fit", str(path), *typed]) == 0
    record = json.loads(capsys.readouterr().out)
    assert [one["actual"] for one in record["predictions"]] == [1e-2]
    assert any(text.startswith("held out: optimal_lr is about the best lr: 1 of 5") for text in record["warnings"])
    assert any("1 of 1 best lr are the smallest" in text for text in record["warnings"])


def test_compute_without_gaps_is_named_where_too_few_budgets_are_left(tmp_path, capsys):
    rows = [{"n_params": n, "flops": 1e15 * (1 + i / 100), "loss": 3 + i % 2} for i, n in enumerate((1e6, 2e6, 4e6))]
    rows += [{"n_params": 1e6 + i, "flops": 1e16 * 1.05**i, "loss": 3.0} for i in range(30)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["frontier", str(path), "--method", "isoflop"]) == 1
    assert "flops varies without a gap (30 from 1e+16 to 4.12e+16): there are no budgets" in capsys.readouterr().err


def test_rows_that_were_left_out_are_named_where_too_few_are_left(tmp_path, capsys):
    rows = [{"name": f"r{i}", "status": "failed" if i else "finished", "n_params": 1e6, "loss": 3.0} for i in range(3)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["fit", str(path), "--law", "kaplan_n"]) == 1
    said = capsys.readouterr().err
    assert "there are 1 rows to fit" in said and "2 runs are not finished and are left out: r1 (failed)" in said


@pytest.fixture
def kept(runs, tmp_path, capsys):
    path = tmp_path / "fit.json"
    main(fit(runs, "--out", str(path)))
    capsys.readouterr()
    return path


def test_predict_says_the_loss_of_a_new_run_with_its_interval(kept, capsys):
    assert main(["predict", str(kept), "--n-params", "1e9", "--n-tokens", "2e10", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    truth = float(LAWS["over_training"].predict(PLANTED["over_training"], {"n_params": 1e9, "n_tokens": 2e10}))
    assert found["low"] < truth < found["high"] and found["predicted_loss"] == pytest.approx(truth, rel=0.02)
    assert found["extrapolation"] == pytest.approx(6.25)
    assert main(["predict", str(kept), "--n-params", "1e10", "--at", "tokens_per_param=20"]) == 0
    assert "488 times beyond what was fitted" in capsys.readouterr().out


def test_allocate_says_size_tokens_and_what_smaller_costs(kept, capsys):
    assert main(["allocate", str(kept), "--flops", "1e19", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found[0]["times_compute"] == 1 and found[0]["flops"] == pytest.approx(1e19)
    assert main(["allocate", str(kept), "--flops", "1e19"]) == 0
    assert "times_compute" in capsys.readouterr().out
    assert found[0]["extrapolation"] > 1
    assert found[0]["n_params_low"] < found[0]["n_params"] < found[0]["n_params_high"]
    assert all(one["low"] < one["loss"] < one["high"] for one in found if one["n_tokens"])
    assert main(["allocate", str(kept), "--flops", "1e23"]) == 0
    printed = capsys.readouterr().out
    assert "of the best size)" in printed and "95 % of the resamples, each with its own best size" in printed
    assert "tokens per parameter, " in printed and "times more than was fitted" in printed
    assert main(["allocate", str(kept), "--flops", "10E", "--json"]) == 2
    assert "'10E' is not a number; write 7e9 or 7B" in capsys.readouterr().err


def test_inference_moves_the_best_size_down(kept, capsys):
    """Sardana et al. 2023: with T tokens served, the least total cost for the loss lies at a smaller model."""

    def found(*typed):
        assert main(["allocate", str(kept), "--flops", "1e19", "--json", *typed]) == 0
        return json.loads(capsys.readouterr().out)

    (best,) = [one for one in found("--inference-tokens", "100B") if "the least total" in one["note"]]
    (few,) = [one for one in found("--inference-tokens", "1") if "the least total" in one["note"]]
    assert few["share_of_optimal_n"] > 0.9 > best["share_of_optimal_n"]
    assert best["total_flops"] == pytest.approx(best["flops"] + 2 * best["n_params"] * 1e11)
    records = found("--inference-tokens", "100B")
    assert best["total_flops"] == min(one["total_flops"] for one in records if one["total_flops"])
    assert all("total_flops" not in one for one in found())
    record = json.loads(kept.read_text())
    record["largest"]["tokens_per_param"] = 1e-6  # every plan lies far beyond it
    kept.write_text(json.dumps(record))
    capsys.readouterr()
    assert all(one["n_tokens"] is None and one["total_flops"] is None for one in found("--inference-tokens", "1B"))


def test_downstream_chains_the_two_laws(runs, capsys):
    typed = ["downstream", str(runs), "--map", "error=top1", "--hold-out", "n_params>1e8", *FAST, "--json"]
    assert main(typed) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["downstream"]["params"] == pytest.approx(PLANTED["loss_to_error"], rel=0.05)
    assert len(found["predictions"]) == 4
    for one in found["predictions"]:
        assert one["relative_error"] < 0.03 and one["low"] <= one["predicted"] <= one["high"]
    assert main([*typed[:-1], "--where-error", "tokens_per_param<100"]) == 0
    assert "12 rows" in capsys.readouterr().out


def test_a_kept_chain_is_asked_about_a_new_run(runs, tmp_path, capsys):
    kept = tmp_path / "chain.json"
    typed = ["downstream", str(runs), "--map", "error=top1", "--hold-out", "n_params>1e8", *FAST, "--out", str(kept)]
    assert main(typed) == 0
    held = json.loads(kept.read_text())["predictions"][0]
    capsys.readouterr()
    asked = ["predict", str(kept), "--n-params", str(held["n_params"]), "--n-tokens", str(held["n_tokens"])]
    assert main([*asked, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == {key: held[key] for key in found} and {"predicted_loss", "predicted", "low", "high"} <= set(found)
    assert main(asked) == 0
    assert "N counts n_params" in capsys.readouterr().out
    assert main(["allocate", str(kept), "--flops", "1e19"]) == 0  # of its law of the loss
    assert main(["predict", str(runs), "--n-params", "1", "--n-tokens", "1"]) == 1
    assert "give a file written by `analyze fit --out`" in capsys.readouterr().err


def test_laws_are_listed(capsys):
    assert main(["law", "list"]) == 0
    printed = capsys.readouterr().out
    assert all(f"{name}: {law.formula}" in printed and law.source in printed for name, law in LAWS.items())
    assert main(["law", "list", "--json"]) == 0
    assert [one["law"] for one in json.loads(capsys.readouterr().out)] == list(LAWS)


def test_frontier_and_ladder(runs, tmp_path, capsys):
    rows = ["n_params,flops,loss"]
    chinchilla = LAWS["chinchilla"]
    for c in (1e18, 1e19, 1e20, 1e21):
        for n in np.geomspace(1e7, 1e10, 9) * (c / 1e19) ** 0.5:
            rows.append(
                f"{n},{c},{float(chinchilla.predict(PLANTED['chinchilla'], {'n_params': n, 'n_tokens': c / 6 / n}))}"
            )
    path = tmp_path / "grid.csv"
    path.write_text("\n".join(rows))
    assert main(["frontier", str(path), "--method", "isoflop", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["params"]["p"] == pytest.approx(0.28 / 0.62, abs=0.03) and len(found["optima_by_budget"]) == 4
    assert main(["frontier", str(path), "--method", "isoflop", "--where", "flops<2e19"]) == 0
    assert "N = N0 (C/C0)^p" in capsys.readouterr().out
    assert main(["frontier", str(path), "--method", "isoflop"]) == 0
    assert "resamples of the runs of each budget" in capsys.readouterr().out
    assert main(["frontier", str(runs), "--method", "envelope"]) == 1  # the largest size is the best wherever it is
    assert "envelope: 0 budgets have a best size inside the trained range" in capsys.readouterr().err
    assert main(["ladder", str(runs), "--rungs", "2", "--hold-out", "flops<1e17", "--json"]) == 0
    part = json.loads(capsys.readouterr().out)
    assert 0 < part["n_rows"] == sum(one["flops"] >= 1e17 for one in part["frontier"]) < len(part["frontier"])
    assert all(one["fitted"] == (one["flops"] >= 1e17) for one in part["frontier"])
    assert main(["ladder", str(runs), "--rungs", "3", "--where", "tokens_per_param<30", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert sum(one["rung"] for one in found["frontier"]) == 3 and found["n_runs"] == 5


def test_rows_of_several_data_sets_are_warned_of(runs, capsys):
    lines = runs.read_text().splitlines()
    runs.write_text("\n".join([f"{lines[0]},dataset", *(f"{line},{i % 2}x" for i, line in enumerate(lines[1:]))]))
    assert main(fit(runs)) == 0
    assert "warning: the rows have 2 values of dataset" in capsys.readouterr().out


@pytest.mark.parametrize(
    "typed, said",
    [
        (["fit", "{}", "--law", "chinchila"], "--law must be one of over_training, chinchilla"),
        (["fit", "{}", "--law", "chinchilla", "--fix", "E"], "--fix E: write --fix NAME=NUMBER"),
        (["fit", "{}", "--law", "chinchilla", "--fix", "Q=1"], "no parameter 'Q'"),
        (["fit", "{}", "--law", "chinchilla", "--starts", "0"], "--starts must be at least 1"),
        (
            ["fit", "{}", "--law", "chinchilla", "--hold-out", "n_params>1e20"],
            "no row matches n_params>1e20; n_params is",
        ),
        (["fit", "{}", "--law", "chinchilla", "--where", "n_params<0"], "no row matches"),
        (["fit", "{}", "--law", "data_constrained"], "unique_tokens is no such column"),
        (["fit", "nowhere.csv", "--law", "chinchilla"], "nowhere.csv does not exist"),
        (["predict", "{}", "--n-params", "1e9"], "give a file written by `analyze fit --out`"),
        (["downstream", "{}", "--law", "loss_to_error"], "downstream chains"),
        (["frontier", "{}", "--method", "isoflop", "--where", "n_params<2e7"], "a budget with three sizes"),
        (["fit", "{}", "--law", "chinchilla", "--fix", "E=1", "--fix", "E=2"], "--fix E=2: E is given twice"),
        (["fit", "{}", "--law", "chinchilla", "--seed", "-1"], "--seed must be at least 0"),
        (["fit", "{}", "--law", "chinchilla", "--bootstrap", "1"], "--bootstrap must be 0 or at least 20"),
        (["ladder", "{}", "--rungs", "99"], "--rungs must be between 1 and"),
        (["fit", "{}", "--law", "chinchilla", "--out", "{}"], "is also an input and would be overwritten"),
        (["frontier", "{}", "--method", "isoflop", "--out", "{}"], "is also an input and would be overwritten"),
        (
            ["downstream", "{}", "--map", "error=top1", "--where-loss", "n_params>1e12"],
            "--where-loss 'n_params>1e12': no",
        ),
        (["downstream", "{}", "--map", "error=n_params"], "it must be a share of 1, not a percentage"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(runs, capsys, typed, said):
    assert main([text.format(runs) for text in typed]) in (1, 2)
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error and len(error.strip().splitlines()) <= 2


@pytest.mark.parametrize(
    "damage",
    [
        lambda record: record["draws"][0].pop("E"),
        lambda record: record.update(largest={"n_params": None}),
        lambda record: record.update(largest=None),
        lambda record: record.update(params={}),
    ],
)
def test_a_kept_fit_that_is_damaged_is_named(kept, capsys, damage):
    record = json.loads(kept.read_text())
    damage(record)
    kept.write_text(json.dumps(record))
    for typed in (["predict", str(kept), "--n-params", "1e9", "--n-tokens", "1e10"], ["report", str(kept)]):
        assert main(typed) == 1
        assert "written by `analyze fit --out`" in capsys.readouterr().err


def test_a_page_about_laws_takes_no_option_of_runs_and_replaces_none_of_them(kept, capsys):
    assert main(["report", str(kept), "--where", "loss<3"]) == 2
    assert "--where applies to a page about runs" in capsys.readouterr().err
    assert main(["report", str(kept), "--out", str(kept)]) == 2 and json.loads(kept.read_text())
    assert main(["report", str(kept.parent), "--out", str(kept)]) == 2


def test_held_out_runs_of_a_chain_need_no_loss(runs, capsys):
    lines = runs.read_text().splitlines()
    cells = [line.split(",") for line in lines]
    runs.write_text("\n".join(",".join([*c[:3], "" if c[1].startswith("16000") else c[3], c[4]]) for c in cells))
    typed = ["downstream", str(runs), "--map", "error=top1", "--hold-out", "n_params>1e8", *FAST, "--json"]
    assert main(typed) == 0
    assert [one["predicted_loss"] > 1 for one in json.loads(capsys.readouterr().out)["predictions"]] == [True] * 4


def test_predict_names_the_input_it_lacks(kept, capsys):
    assert main(["predict", str(kept), "--n-params", "1e9"]) == 2
    assert "over_training needs n_params, n_tokens; give --at n_tokens=VALUE" in capsys.readouterr().err
    two = ["predict", str(kept), "--n-params", "1e9", "--n-tokens", "1e10"]
    for more, said in [
        (["--at", "n_tokens=5"], "n_tokens is given twice"),
        (["--at", "flops=1e20"], "over_training takes n_params, n_tokens; leave out flops"),
        (["--at", "depth=3"], "leave out depth"),
        (["--n-params", "-5"], "n_params must be a number greater than zero; got -5"),
        (["--n-tokens", "nan"], "'nan' is not a number; write 7e9 or 7B"),
    ]:
        assert main([*two, *more]) == 2
        assert said in capsys.readouterr().err
    assert main(["predict", str(kept), "--at", "flops=6e18", "--at", "n_params=1e8", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["n_tokens"] == pytest.approx(1e10)
    assert main(["allocate", str(kept), "--flops", "-1"]) == 2
    assert "--flops must be a number greater than zero" in capsys.readouterr().err


def test_the_best_rate_of_each_size_is_fitted_not_every_rate(tmp_path, capsys):
    """On one grid of rates a law through all rows has no slope, whatever the best rates do."""
    rows = [f"{n},{lr},{2 + (np.log(lr) - np.log(1e-2 * (n / 1e6) ** -0.5)) ** 2}"
            for n in (1e6, 4e6, 1.6e7) for lr in 1e-2 * 2.0 ** np.arange(-4, 3)]  # fmt: skip
    path = tmp_path / "rates.csv"
    path.write_text("\n".join(["n_params,lr,loss", *rows]))
    assert main(["fit", str(path), "--law", "optimal_lr", "--starts", "4", "--bootstrap", "0", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["params"]["p"] == pytest.approx(-0.5) and found["n_rows"] == 3
    assert any("3 of 3 lr are vertices of quadratics" in text for text in found["warnings"])


def test_a_page_and_figures_of_a_fit(runs, tmp_path, capsys):
    kept = tmp_path / "fit.json"
    assert main(fit(runs, "--hold-out", "n_params>1e8", "--out", str(kept), "--figures", str(tmp_path / "fig"))) == 0
    assert (tmp_path / "fig.png").read_bytes()[:4] == b"\x89PNG" and "fig.svg" in capsys.readouterr().out
    assert main(["report", str(kept)]) == 0
    page = (tmp_path / "fit.html").read_text()
    for said in (
        LAWS["over_training"].formula,
        "Held-out runs",
        "Smaller models of the same loss",
        "At 6.14e+18 FLOPs, the largest compute of the fitted runs",  # the held-out size would have been 2.46e+19
        "<th>extrapolation</th>",
        "Held out: n_params",
        "<svg",
    ):
        assert said in page, said
    assert page.count("<tr>") > 30 and "http" not in page.replace("http://www.w3.org", "")
    assert main(["fit", str(runs), "--law", "kaplan_n", *FAST, "--out", str(kept)]) == 0  # one input, no allocation
    assert main(["report", str(kept)]) == 0
    assert "Smaller models" not in (tmp_path / "fit.html").read_text()


KEPT = {
    "frontier": (["frontier", "--method", "isoflop"], ["The best size of each budget, by isoflop", "Budgets"]),
    "ladder": (["ladder", "--rungs", "2", "--hold-out", "flops<1e17"], ["The ladder", "20 runs", "Held out: flops"]),
    "downstream": (["downstream", "--map", "error=top1", *FAST, "--hold-out", "n_params>1e8",
                    "--where-error", "loss<9"],
                   ["For the law of the error only: loss&lt;9", "95 % over 20 resamples of the rows",
                    "From over_training to downstream error", "Parameters of loss_to_error", "predicted_loss",
                    "actual error"]),
}  # fmt: skip


@pytest.mark.parametrize("kind", KEPT)
def test_what_is_kept_is_drawn_and_has_a_page(runs, tmp_path, kind):
    typed, said = KEPT[kind]
    if kind == "frontier":  # the runs that the others are of lie on no budgets
        chinchilla = LAWS["chinchilla"]
        at = [{"n_params": n * c**0.5 / 1e10, "n_tokens": c**0.5 * 1e10 / 6 / n} for c in (1e18, 1e19, 1e20)
              for n in np.geomspace(1e8, 4e10, 6)]  # fmt: skip
        lines = [f"{x['n_params']},{x['n_tokens']},{float(chinchilla.predict(PLANTED['chinchilla'], x))}" for x in at]
        runs.write_text("\n".join(["n_params,n_tokens,loss", *lines]))
    kept, figures = tmp_path / f"{kind}.json", tmp_path / "fig"
    assert (
        main(
            [typed[0], str(runs), *typed[1:], "--out", f"{figures}.png", "--out", f"{figures}.svg", "--out", str(kept)]
        )
        == 0
    )
    assert figures.with_suffix(".png").exists() and "<svg" in figures.with_suffix(".svg").read_text()
    assert main(["report", str(kept)]) == 0
    page = kept.with_suffix(".html").read_text()
    for text in (*said, f"Rows: {runs}", "<svg", "starts reached it"):
        assert text in page, text


def test_a_sweeps_page_has_the_laws_that_are_kept_beside_its_rows(runs, tmp_path, capsys):
    sweep, laws = tmp_path / "overtraining", tmp_path / "laws"
    (sweep / "analysis").mkdir(parents=True)
    rows = [dict(zip(("run_id", "n_params", "n_tokens", "val_loss", "top1"), line.split(","), strict=True))
            for line in runs.read_text().splitlines()[1:]]  # fmt: skip
    rows = [{**row, **{key: float(row[key]) for key in ("n_params", "n_tokens", "val_loss")}} for row in rows]
    (sweep / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for place in (sweep / "over_training.json", sweep / "analysis" / "kaplan.json", laws / "only.json"):
        law = "kaplan_n" if place.stem == "kaplan" else "over_training"
        assert main(["fit", str(runs), "--law", law, *FAST, "--out", str(place)]) == 0
    (sweep / "analysis" / "lr_sensitivity.json").write_text('{"rows": []}')
    assert main(["report", str(sweep)]) == 0
    page = (sweep / "report.html").read_text()
    assert "The law over_training (over_training.json)" in page and "The law kaplan_n (kaplan.json)" in page
    assert "no experiment of this name" not in page and "20 finished" in page
    ids = re.findall(r' id="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    capsys.readouterr()
    (laws / "spoilt.json").write_text('{"law": "over_training", "params": {}}')
    (laws / "short.json").write_text((laws / "only.json").read_text()[:99])
    assert main(["report", str(laws)]) == 0  # a folder of nothing but laws
    page, warned = (laws / "report.html").read_text(), capsys.readouterr().err
    assert "The law over_training (only.json)" in page
    for said in ("spoilt.json was not written by `analyze fit --out`", f"{laws / 'short.json'} cannot be read as JSON"):
        assert said in html.unescape(page) and said in warned
