"""What the figures of laws show."""

import dataclasses

import numpy as np
import pytest

from scaling_testbed.analysis.figures import law_panels
from scaling_testbed.analysis.laws import frontier
from scaling_testbed.analysis.laws.fitted import Fit
from scaling_testbed.analysis.laws.selection import Compared, Selection


def fitted(law, params):
    return Fit(law=law, params=params, ci95=None, objective={"name": "lsq"}, n_rows=9, starts={}, warnings=[])


def test_each_budget_has_its_runs_and_the_parabola_through_them():
    """Budgets that two digits would not tell apart, and one whose runs' FLOPs two digits would part."""
    at = [(c * (1 + shift), n, 3 + 0.1 * np.log(n / best) ** 2) for c, best in ((1e18, 1e7), (1.2e18, 4e7))
          for n, shift in ((5e6, 0.0), (2e7, 0.02), (3e7, 0.06))]  # fmt: skip
    rows = [{"flops": c, "n_params": n, "loss": loss} for c, n, loss in at]
    budgets = frontier.by_budget(rows)
    runs = [{**row, "budget": frontier.middle(budget)} for budget in budgets for row in budget]
    optima = [one.record() for one in frontier.isoflop(rows)]
    panel, best = law_panels.frontier_panels(
        runs, optima, fitted("optimal_n", {"N0": 1.0, "C0": 1.0, "p": 0.5}), "isoflop"
    )
    points = [line for line in panel.lines if line.label == "run"]
    curves = [line for line in panel.lines if not line.markers]
    assert [len(line.x) for line in points] == [3, 3] and len(curves) == 2
    for line, curve, center in zip(points, curves, (1e7, 4e7), strict=True):
        assert line.n_params == curve.n_params
        assert np.interp(np.log(line.x), np.log(curve.x), curve.y) == pytest.approx(line.y, rel=1e-3)
        assert min(curve.y) == pytest.approx(3, abs=1e-3)
        assert curve.x[0] == pytest.approx(5e6) and curve.x[-1] == pytest.approx(max(center, 3e7))
    assert best.lines[1].y == pytest.approx([1e7, 4e7])


def test_a_law_whose_interval_ends_within_the_figure_is_drawn_without(monkeypatch):
    fit = fitted("kaplan_n", {"Nc": 10.0, "alpha_N": 1.0})
    monkeypatch.setattr(Fit, "interval", lambda _, inputs: (1.0, 2.0) if inputs["n_params"] < 5 else None)
    fit = dataclasses.replace(fit, draws=[fit.params])
    records = [{"n_params": n, "actual": 3.0, "predicted": 3.0} for n in (1.0, 9.0)]
    panel = next(panel for panel in law_panels.fit_panels(fit, records, []) if panel.title == "The law")
    assert panel.lines[0].band is None


def test_a_held_out_run_has_the_interval_of_its_prediction():
    record = {"n_params": 1e7, "n_tokens": 1e9, "actual": 3.1, "predicted": 3.0}
    held_out = [{**record, "low": 2.9, "high": 3.2}, {**record, "low": 2.8, "high": 3.3}]
    fit = fitted("chinchilla", {"E": 1.7, "A": 400.0, "alpha": 0.34, "B": 400.0, "beta": 0.28})
    *_, points = law_panels.fit_panels(fit, [record], held_out)[0].lines
    assert points.x_bars == [(2.9, 3.2), (2.8, 3.3)] and "95 % intervals" in points.label
    *_, points = law_panels.fit_panels(fit, [record], [{**record, "low": None, "high": None}])[0].lines
    assert points.x_bars == [] and points.label == "held out"


CHINCHILLA = fitted("chinchilla", {"E": 1.7, "A": 400.0, "alpha": 0.34, "B": 400.0, "beta": 0.28})
RUNS = [{"n_params": n, "n_tokens": 20 * n, "actual": 3.0, "predicted": 3.03, "low": None, "high": None}
        for n in (1e7, 3e7, 1e8)]  # fmt: skip


def panel_named(title, fit=CHINCHILLA, fitted=RUNS, held_out=()):
    return next(panel for panel in law_panels.fit_panels(fit, fitted, held_out) if panel.title == title)


def test_a_contour_has_one_loss_and_meets_the_best_sizes_where_n_and_d_are_best():
    panel = panel_named("Equal loss")
    contours = [line for line in panel.lines if not line.label]
    for line in contours:
        losses = CHINCHILLA.predict({"n_params": np.array(line.x), "n_tokens": np.array(line.y)})
        assert losses == pytest.approx([losses[0]] * len(losses), abs=1e-4)
        assert line.n_params == pytest.approx(losses[0], abs=5e-3)
    assert len(contours) >= 3
    (best,) = (line for line in panel.lines if line.label == "best N and D")
    share = 400 * 0.34 * np.array(best.x) ** -0.34
    assert share == pytest.approx(400 * 0.28 * np.array(best.y) ** -0.28, rel=1e-3)  # the optimum of Hoffmann et al.


def test_a_law_without_a_best_size_still_has_its_contours():
    flat = fitted("chinchilla", {"E": 1.7, "A": 0.0, "alpha": 0.34, "B": 400.0, "beta": 0.28})
    panel = panel_named("Equal loss", flat)
    assert [line.label for line in panel.lines if line.label] == ["fitted"]
    assert len(panel.lines) > 3


def test_errors_are_shown_against_each_input_in_percent():
    panels = law_panels.fit_panels(CHINCHILLA, RUNS[:2], RUNS[2:])
    errors = [panel for panel in panels if panel.title.startswith("Errors against")]
    assert [panel.title for panel in errors] == ["Errors against N", "Errors against D", "Errors against D/N"]
    assert [list(line.x) for line in errors[0].lines] == [[1e7, 3e7], [1e8]]
    assert list(errors[2].lines[0].x) == pytest.approx([20, 20])
    assert [one for panel in errors for line in panel.lines for one in line.y] == pytest.approx([1.0] * 9)


def test_the_curves_of_held_out_multipliers_have_the_interval_of_the_law():
    draws = [{**CHINCHILLA.params, "E": 1.7 + shift} for shift in np.linspace(-0.1, 0.1, 41)]
    fit = dataclasses.replace(CHINCHILLA, draws=draws, residuals=[0.0] * 9)
    held_out = [{**RUNS[2], "n_tokens": 100 * RUNS[2]["n_params"]}]
    curves = [line for line in panel_named("Against compute", fit, RUNS, held_out).lines if not line.markers]
    assert [line.band is None for line in curves] == [True, False]
    low, high = curves[1].band
    assert np.array(high) - np.array(low) == pytest.approx([0.19] * len(low), rel=0.01)
    many = [{**RUNS[0], "n_tokens": ratio * 1e7} for ratio in (20, 40, 80, 160)]
    lines = panel_named("Against compute", fit, many, []).lines
    assert all(line.band is None for line in lines)


def test_the_curve_of_a_held_out_multiplier_begins_at_the_smallest_fitted_size():
    held_out = [{**RUNS[0], "n_params": 1e9, "n_tokens": 5e11}]
    panel = panel_named("Against compute", CHINCHILLA, RUNS, held_out)
    (curve,) = (line for line in panel.lines if not line.markers and line.n_params == 500)
    assert [curve.x[0], curve.x[-1]] == pytest.approx([6 * 500 * 1e7**2, 6 * 500 * 1e9**2])


def test_the_errors_of_compared_laws_stand_at_their_distance_between_the_ends_of_an_interval():
    laws = {"chinchilla": Compared(CHINCHILLA, None, None, 0.01, 1.0)}
    found = Selection(laws, "", np.log([1.01, 0.98, 1.0]), np.array([1.5, 3.0, 5.0]))
    (panel,) = law_panels.laws_panels(found, [])
    assert list(panel.lines[0].x) == [1.5, 3.0, 5.0] and list(panel.lines[0].y) == pytest.approx([1, -2, 0])
    assert [y for y, _ in panel.levels] == pytest.approx([100 / 49, 0, -100 / 49])
    assert law_panels.laws_panels(Selection(laws, "", np.zeros(0), np.zeros(0)), []) == []
