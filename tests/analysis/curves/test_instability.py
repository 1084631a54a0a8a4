"""Planted laws are recovered and extrapolated; what is not known is not told."""

import json
import math

import numpy as np
import pytest

from scaling_testbed import analyze
from scaling_testbed.analysis.curves.instability import Quantity, analyse, fit_log_log
from scaling_testbed.analysis.figures.panels import instability_panels
from scaling_testbed.analysis.rows.study import load
from scaling_testbed.errors import ConfigError, UserError
from tests.analysis.conftest import make_row

LOGIT = Quantity()
SIZES = np.array([2.4e6, 9.4e6, 1.9e7, 4.2e7, 8.5e7, 3e8])


def planted(n, lr=1e-2):
    x = math.log10(n) - 7
    return 10 ** (1.5 + math.log10(lr / 1e-2) + 0.6 * x + 0.15 * x * x)


def rows_of(sizes, value=planted, lrs=(1e-2,), field="diagnostics_at_step", name=LOGIT.name, **settings):
    rows = []
    for n in sizes:
        for lr in lrs:
            row = make_row(lr, 3.0, run_id=f"N{n:g} lr{lr:g}", **settings)
            rows.append(
                {**row, "n_params_non_embedding": n, "model.d_model": n, field: {"step": 9, name: value(n, lr)}}
            )
    return rows


def csv_study(path, lines):
    path.write_text("n_params,lr,value,diverged\n" + "".join(",".join(map(str, line)) + "\n" for line in lines))
    return load(path)


def test_a_planted_quadratic_is_recovered_and_extrapolated():
    fit = fit_log_log(SIZES, [planted(n) for n in SIZES])
    middle, low, high = fit.predict(4.8e9)
    assert middle == pytest.approx(planted(4.8e9), rel=1e-6) and low == pytest.approx(high, rel=1e-6)
    assert fit.note is None and len(fit.coefficients) == 3


def test_three_sizes_make_a_line_that_says_so_and_two_no_fit():
    fit = fit_log_log(SIZES[:3], [planted(n) for n in SIZES[:3]])
    assert len(fit.coefficients) == 2 and "three sizes" in fit.note and fit.degrees_of_freedom == 1
    low, high = fit.predict(3e8)[1:]
    assert high / low > 1.5  # a curve fitted by a line: the interval owns up to it
    assert fit_log_log(SIZES[:2], [1.0, 2.0]) is None


@pytest.mark.parametrize("n_params", [2e7, 1.2e9])  # between the sizes the noise of the new one is most of it
def test_the_interval_holds_a_new_measurement_as_often_as_it_says(n_params):
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(400):
        noisy = [planted(n) * math.exp(0.3 * rng.normal()) for n in SIZES]
        _, low, high = fit_log_log(SIZES, noisy).predict(n_params)
        inside += low <= planted(n_params) * math.exp(0.3 * rng.normal()) <= high
    assert 0.92 <= inside / 400 <= 0.98


def test_the_held_out_size_does_not_enter_its_own_prediction(study):
    series, predictions = analyse(study(rows_of(SIZES)), [], LOGIT, hold_out_largest=True)
    other = rows_of(SIZES, lambda n, lr: planted(n) * (50 if n == SIZES[-1] else 1))
    _, wrong = analyse(study(other, name="other"), [], LOGIT, hold_out_largest=True)
    assert predictions[0].predicted == pytest.approx(planted(SIZES[-1])) == pytest.approx(wrong[0].predicted)
    assert predictions[0].measured == pytest.approx(planted(SIZES[-1])) and not wrong[0].inside
    assert series[0].held_out == [SIZES[-1]]
    with pytest.raises(ConfigError, match="one size"):
        analyse(study(rows_of(SIZES[:1]), name="one"), [], LOGIT, hold_out_largest=True)


def test_a_held_out_run_that_diverged_before_the_step_keeps_its_prediction(study):
    rows = rows_of(SIZES)
    rows[-1]["diagnostics_at_step"] = None
    series, (one,) = analyse(study(rows), [], LOGIT, hold_out_largest=True)
    assert one.predicted == pytest.approx(planted(SIZES[-1])) and one.measured is None and one.inside is None
    assert one.record()["fitted_sizes"] == 5 and series[0].held_out == [SIZES[-1]]
    assert instability_panels(series, [one], LOGIT)[0].lines


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"val_loss": "abc"}, "N2.4e+06 lr0.01: val_loss must be a number, got abc"),
        ({"val_loss_initial": "six"}, "val_loss_initial must be a number, got six"),
        ({"diagnostics_at_step": "text"}, "diagnostics_at_step must hold numbers by name, got text"),
        ({"diagnostics_at_step": [1, 2]}, "diagnostics_at_step must hold numbers by name"),
    ],
)
def test_a_cell_that_cannot_be_read_is_named(study, tmp_path, capsys, changes, says):
    rows = rows_of(SIZES)
    place = study([{**rows[0], **changes}, *rows[1:]]).path
    assert analyze.main(["instability", str(place), "--out", str(tmp_path / "out" / "table.csv")]) == 1
    assert says in capsys.readouterr().err


def test_a_table_without_a_value_is_told_the_column(tmp_path):
    (tmp_path / "rows.csv").write_text("n_params,lr,score\n1e6,0.1,5\n")
    with pytest.raises(UserError, match="a table of your own has it in a column named value"):
        analyse(load(tmp_path / "rows.csv"), [], LOGIT)


def test_verdicts_above_and_below_a_threshold(tmp_path):
    noise = [1.1, 0.9, 1.05, 0.95, 1.1, 0.9]
    lines = [
        (n, lr, planted(n, lr) * f, "false") for lr in (1e-3, 1e-2, 1e-1) for n, f in zip(SIZES, noise, strict=True)
    ]
    table = csv_study(tmp_path / "t.csv", lines + [(4.8e9, lr, "", "") for lr in (1e-3, 1e-2, 1e-1)])
    middle = planted(4.8e9)
    _, above = analyse(table, [], Quantity(threshold=middle))
    assert [one.verdict for one in above] == ["does not cross", "cannot tell", "crosses"]
    _, below = analyse(table, [], Quantity(threshold=middle, above=False))
    assert [one.verdict for one in below] == ["crosses", "cannot tell", "does not cross"]
    assert [one.n_params for one in above] == [4.8e9] * 3


def test_what_is_planned_and_has_no_row_is_predicted(study, tmp_path):
    config = {"model.qk_norm": "none", "optimizer.lr": 1e-2, "seed": 0, "n_params_non_embedding": 394000}
    planned = {"run_id": "planned", "config": config, "varied": {"model": "nano_l"}}
    folder = tmp_path / "predict_logits"
    folder.mkdir()
    (folder / "plan.jsonl").write_text(json.dumps(planned) + "\n")
    sizes = [1e3, 4e3, 1.6e4, 6.4e4]
    found = study(rows_of(sizes, model__qk_norm="none"), name="predict_logits")
    (one,) = analyse(found, ["model.qk_norm"], LOGIT)[1]
    assert "planned" in one.run and one.measured is None
    assert one.n_params > 1e5 and one.predicted == pytest.approx(planted(one.n_params), rel=1e-6)


def test_the_fit_is_to_all_seeds_and_its_degrees_of_freedom_are_told(study):
    rows = rows_of(SIZES)
    twins = [{**row, "run_id": row["run_id"] + "b", "seed": 1} for row in rows_of(SIZES, lambda n, lr: 4 * planted(n))]
    (series,) = analyse(study(rows + twins), [], LOGIT)[0]
    assert series.values == pytest.approx([2 * planted(n) for n in SIZES])
    assert series.fit.degrees_of_freedom == 9  # twelve runs less three coefficients
    assert series.by_seed[0] == pytest.approx({0: planted(SIZES[0]), 1: 4 * planted(SIZES[0])})


def test_where_sizes_miss_the_curve_by_more_than_seeds_differ_the_fit_is_to_the_sizes(study):
    """Many seeds would otherwise make the interval of a wrong curve as narrow as one likes."""

    def bent(n, lr):
        return planted(n) * (3 if n == SIZES[2] else 1)

    rows = [
        {**row, "run_id": f"{row['run_id']} {seed}", "seed": seed} for seed in range(5) for row in rows_of(SIZES, bent)
    ]
    for row in rows:
        row["diagnostics_at_step"]["attention_logit_max/0"] *= 1 + 0.01 * row["seed"]
    (series,) = analyse(study(rows), [], LOGIT)[0]
    assert series.fit.degrees_of_freedom == 3 and "misses the sizes by more than their seeds differ" in series.fit.note


def test_runs_without_a_value_are_named_and_an_unknown_quantity_lists_what_there_is(study):
    rows = rows_of(SIZES)
    rows[0]["diagnostics_at_step"] = None
    (series,) = analyse(study(rows), [], LOGIT)[0]
    assert series.unmeasured == [f"run {rows[0]['run_id']}"] and len(series.values) == 5
    with pytest.raises(UserError, match="log_z_mean.*attention_logit_max/0"):
        analyse(study(rows), [], Quantity(name="log_z_mean"))


def test_the_command_writes_predictions_and_figure(tmp_path, capsys):
    csv_study(
        tmp_path / "table.csv", [*((n, 1e-2, planted(n), planted(n) > 300) for n in SIZES), (4.8e9, 1e-2, "", "")]
    )
    assert analyze.main(["instability", str(tmp_path / "table.csv"), "--hold-out-largest"]) == 0
    said = capsys.readouterr().out
    assert "held out" in said and "quadratic in log N: lr=0.01" in said
    out = tmp_path / "table_analysis"
    about = json.loads((out / "instability.json").read_text())
    assert len(about["rows"]) == 2 and len(about["measured"]) == 6 and about["threshold"] == 1e4
    assert "largest attention logit, block 0" in (out / "instability.svg").read_text()
    assert (out / "instability.png").exists()


def test_gradients_against_eps_read_the_mean_of_the_last_steps(study, tmp_path, capsys):
    name = "grad_rms/blocks.0.mlp.mlp_in.weight"
    rows = rows_of(SIZES, lambda n, lr: 1e-3 / n, field="diagnostics_last_mean", name=name)
    study(rows, name="gradrms_scaling")
    assert analyze.main(["instability", str(tmp_path / "gradrms_scaling"), "--eps", "1e-8", "--hold-out-largest"]) == 0
    assert "unstable below 1e-08" in capsys.readouterr().out
    (record,) = json.loads((tmp_path / "gradrms_scaling/analysis/instability.json").read_text())["rows"]
    assert record["measured"] == pytest.approx(1e-3 / 3e8) and record["verdict"] == "crosses"


def test_the_largest_of_each_condition_is_held_out(study):
    """With the gains of its qk-norm one condition is a little larger than the other."""
    rows = [{**row, "n_params_non_embedding": row["n_params_non_embedding"] + gains}
            for name, gains in (("none", 0), ("layernorm", 64)) for row in rows_of(SIZES, model__qk_norm=name)
            for row in [{**row, "run_id": row["run_id"] + name}]]  # fmt: skip
    series, made = analyse(study(rows), ["model.qk_norm"], LOGIT, hold_out_largest=True)
    assert [one.held_out for one in series] == [[SIZES[-1] + 64], [SIZES[-1]]]
    assert sorted(one.n_params for one in made) == [SIZES[-1], SIZES[-1] + 64]


def test_what_the_sweep_is_about_is_asked_where_nothing_else_is(study, tmp_path, capsys):
    key = "grad_rms/blocks.0.attention.k.weight"
    study(rows_of(SIZES, field="diagnostics_last_mean", name=key), name="gradrms_kernel_cpu", sweep="gradrms_kernel")
    assert analyze.main(["instability", str(tmp_path / "gradrms_kernel_cpu"), "--hold-out-largest"]) == 0
    assert f"{key}, mean of the last steps; unstable below 1e-08" in capsys.readouterr().out
    assert analyze.main(["instability", str(tmp_path / "gradrms_kernel_cpu"), "--eps", "1e-7"]) == 0
    assert f"{key}, mean of the last steps; unstable below 1e-07" in capsys.readouterr().out


def test_diverged_is_true_or_false(tmp_path):
    path = tmp_path / "rows.csv"
    with pytest.raises(UserError, match="diverged must be true or false, got 'perhaps'"):
        analyse(csv_study(path, [(n, 0.1, 5.0, "perhaps") for n in (1e6, 2e6, 4e6)]), [], LOGIT)
    series, _ = analyse(
        csv_study(path, [(1e6, 0.1, 5.0, "false"), (2e6, 0.1, 5.0, 1), (3e6, 0.1, 5.0, "No")]), [], LOGIT
    )
    assert series[0].diverged == [False, True, False]


def test_an_interval_of_many_decades_leaves_the_points_to_be_seen(study):
    def value(n, lr):
        return math.exp(0.3 * math.log(n) * (1.5 if n == SIZES[2] else 1))

    made = analyse(study(rows_of(SIZES[:5], value)), [], LOGIT, hold_out_largest=True)
    low, high = instability_panels(*made, LOGIT)[0].y_range
    values = [y for y in made[0][0].values] + [made[1][0].predicted, LOGIT.threshold]
    assert made[1][0].high / made[1][0].low > 1e4
    assert low < min(values) and high > max(values) and high / low < 1e3 * max(values) / min(values)
