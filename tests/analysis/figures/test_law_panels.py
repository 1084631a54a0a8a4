"""What the figures of laws show."""

import dataclasses

import numpy as np
import pytest

from scaling_testbed.analysis.figures import law_panels
from scaling_testbed.analysis.laws import frontier
from scaling_testbed.analysis.laws.fitted import Fit


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
