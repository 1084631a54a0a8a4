"""Best sizes and ladders, from worlds whose best sizes are known."""

import numpy as np
import pytest

from scaling_testbed.analysis.laws import best_runs, frontier
from scaling_testbed.analysis.laws.allocation import allocate
from scaling_testbed.analysis.laws.best_runs import frontier_rows
from scaling_testbed.analysis.laws.fitted import Fit
from scaling_testbed.analysis.laws.forms import LAWS
from scaling_testbed.analysis.laws.study import Rows
from scaling_testbed.errors import ConfigError, UserError
from tests.analysis.laws.planted import CHINCHILLA, PLANTED

A, B, ALPHA, BETA = (CHINCHILLA[key] for key in ("A", "B", "alpha", "beta"))


def best_size(flops):
    """Hoffmann et al. 2022, eq. 4."""
    g = (ALPHA * A / (BETA * B)) ** (1 / (ALPHA + BETA))
    return g * (flops / 6) ** (BETA / (ALPHA + BETA))


def rows_at(pairs):
    return [
        {"n_params": n, "n_tokens": c / 6 / n, "flops": c,
         "loss": float(LAWS["chinchilla"].predict(CHINCHILLA, {"n_params": n, "n_tokens": c / 6 / n}))}
        for n, c in pairs
    ]  # fmt: skip


def test_isoflop_parabolas_find_the_best_sizes():
    budgets = (1e18, 1e19, 1e20)
    rows = rows_at(
        [(best_size(c) * factor, c * (1 + 0.01 * factor)) for c in budgets for factor in (0.5, 0.7, 1, 1.4, 2)]
    )
    found = frontier.isoflop(rows)
    assert [one.flops for one in found] == pytest.approx(budgets, rel=0.02) and all(not one.note for one in found)
    for one in found:
        assert one.n_params == pytest.approx(best_size(one.flops), rel=0.03)  # the valley is not quite a parabola
        assert one.check == pytest.approx(best_size(one.flops), rel=0.03)
        assert one.loss == pytest.approx(rows_at([(best_size(one.flops), one.flops)])[0]["loss"], rel=1e-3)
        assert one.n_sizes == 5


def test_an_exact_parabola_is_found_where_its_sizes_lie_to_one_side():
    sizes = (1e7, 1.5e7, 2.5e7, 6e7, 9e7)
    rows = [{"n_params": n, "flops": 1e19, "loss": 3 + 0.1 * np.log(n / 2e7) ** 2} for n in sizes]
    (found,) = frontier.isoflop(rows)
    assert (found.n_params, found.loss, found.curvature) == pytest.approx((2e7, 3, 0.1))


def test_a_run_gone_wrong_bends_the_parabola_only_near_its_vertex_and_never_the_check():
    sizes = np.geomspace(1e7, 1e9, 17)
    rows = [{"n_params": n, "flops": 1e19, "loss": 3 + 0.1 * np.log(n / 5e7) ** 2} for n in sizes]
    (right,) = frontier.isoflop(rows)
    (far,) = frontier.isoflop([*rows[:-1], {**rows[-1], "loss": 9.0}])
    (near,) = frontier.isoflop([*rows[:9], {**rows[9], "loss": rows[9]["loss"] + 0.3}, *rows[10:]])
    assert far.n_params == pytest.approx(right.n_params) and near.n_params < 0.8 * right.n_params
    assert far.check == right.check == near.check
    assert frontier.disagreeing([right, far]) == []
    (said,) = frontier.disagreeing([right, near])
    assert said.startswith(
        "at 1 budgets the vertex of the parabola differs by more than 15% from the minimum of a curve"
    )
    assert f"most at 1e+19 FLOPs: {near.n_params:.4g} and {near.check:.4g}" in said


@pytest.mark.parametrize("span", [4, 32])
def test_a_vertex_is_near_the_best_size_of_a_law_that_is_no_parabola(span):
    best = best_size(1e19)
    rows = [{"n_params": n, "flops": 1e19, "n_tokens": 1e19 / 6 / n} for n in best * np.geomspace(1 / span, span, 9)]
    rows = [row | {"loss": float(LAWS["chinchilla"].predict(CHINCHILLA, row))} for row in rows]
    (found,) = frontier.isoflop(rows)
    assert found.n_params == pytest.approx(best, rel=0.03)
    assert found.fitted[0] >= best / 6 and found.fitted[1] <= best * 6


def test_intervals_over_runs_hold_the_planted_exponent(monkeypatch):
    """20 grids with noise: 95 % intervals of the exponent and of the level should miss about 2 of 40."""
    monkeypatch.setattr(best_runs, "RESAMPLES", 60)
    inside = 0
    for seed in range(20):
        rng, rows = np.random.default_rng(seed), []
        for c in np.geomspace(1e18, 1e20, 4):
            for n in 1e8 * (c / 1e19) ** 0.5 * np.geomspace(1 / 4, 4, 7):
                loss = 3 - 0.1 * np.log(c / 1e19) + 0.06 * np.log(n / (1e8 * (c / 1e19) ** 0.5)) ** 2
                rows.append({"n_params": n, "flops": c, "n_tokens": c / 6 / n, "loss": loss + rng.normal(0, 0.01)})
        found = frontier_rows(Rows(rows=rows), "isoflop").fit
        level = 1e8 * (found.params["C0"] / 1e19) ** 0.5
        inside += found.ci95["p"][0] <= 0.5 <= found.ci95["p"][1]
        inside += found.ci95["N0"][0] <= level <= found.ci95["N0"][1]
    assert inside / 40 >= 0.85


def test_a_budget_is_a_chain_of_rows_a_tenth_apart():
    rows = [{"flops": c} for c in (2.0, 1.09, 1.0, 1.18, 2.1)]
    budgets = frontier.by_budget(rows)
    assert [[row["flops"] for row in budget] for budget in budgets] == [[1.0, 1.09, 1.18], [2.0, 2.1]]
    assert frontier.middle(budgets[1]) == pytest.approx(4.2**0.5)


def test_a_budget_of_counted_operations_spans_a_quarter_and_more():
    rows = [{"flops": c * 1.063**i, "n_params": 10 + i} for c in (1e11, 1e12) for i in range(5)]  # 1.28 in all
    assert [len(budget) for budget in frontier.by_budget(rows)] == [5, 5]
    assert frontier.loose([row["flops"] for row in rows], "flops") == []


def test_compute_that_varies_without_a_gap_makes_no_budget():
    flops = [1e18 * 1.05**i for i in range(30)]
    rows = [{"flops": c, "n_params": best_size(c) * 2 ** (i % 5 - 2), "loss": 3.0} for i, c in enumerate(flops)]
    assert [len(budget) for budget in frontier.by_budget(rows)] == [1] * 30
    with pytest.raises(UserError, match="in FLOPs and all runs by a factor 1.4"):
        frontier.isoflop(rows)


def test_a_parabola_that_cannot_be_trusted_says_so():
    beyond = frontier.isoflop(rows_at([(best_size(1e19) * factor, 1e19) for factor in (0.1, 0.2, 0.3)]))[0]
    assert beyond.note == "the vertex lies outside the sizes" and beyond.check is None
    hill = [{"n_params": n, "flops": 1e19, "loss": loss} for n, loss in ((1e7, 3.0), (2e7, 3.5), (4e7, 3.2))]
    assert "no valley" in frontier.isoflop(hill)[0].note and frontier.isoflop(hill)[0].n_params == pytest.approx(1e7)
    with pytest.raises(UserError, match="a budget with three sizes"):
        frontier.isoflop(hill[:2])


def test_the_mean_over_seeds_stands_for_a_size():
    rows = [{"n_params": n, "flops": 1e19, "loss": loss + shift} for n, loss in ((1e7, 3.0), (2e7, 2.9), (4e7, 3.0))
            for shift in (-0.05, 0.05)]  # fmt: skip
    assert frontier.isoflop(rows)[0].n_params == pytest.approx(2e7, rel=1e-6)


def test_the_best_sizes_see_the_tokens_of_the_rows_about_them():
    """FLOPs may be counted so that they are not 6ND, here twice that."""
    rows = [{**row, "flops": 2 * row["flops"]} for row in rows_at([(best_size(1e19) * s, 1e19) for s in (0.4, 1, 2.5)])]
    (found,) = frontier.isoflop(rows)
    assert found.n_tokens == pytest.approx(1e19 / 6 / found.n_params)
    assert found.record()["tokens_per_param"] == found.n_tokens / found.n_params
    sizes = np.geomspace(1e7, 1e9, 5)
    rows = rows_at([(n, 6 * n * d) for n in sizes for d in np.geomspace(n, 1000 * n, 25)])
    for one in frontier.envelope([{**row, "flops": 2 * row["flops"]} for row in rows]):
        assert one.n_tokens == pytest.approx(one.flops / 12 / one.n_params, rel=1e-6)


def test_an_envelope_does_not_trust_the_ends_of_what_was_trained():
    """At budgets that the largest size wins a larger one might: taken for the best it would bend the law."""
    sizes = np.geomspace(1e6, 1e8, 9)
    found = frontier.envelope(rows_at([(n, 6 * n * n * m) for n in sizes for m in np.geomspace(0.01, 1e5, 40)]))
    ends = {"largest": sizes[-1], "smallest": sizes[0]}
    noted = [one for one in found if one.note]
    assert any("largest" in one.note for one in noted) and any("smallest" in one.note for one in found)
    for name, size in ends.items():
        assert all(one.n_params == size for one in noted if name in one.note and 1e15 < one.flops < 1e20)
    trusted = [one for one in found if not one.note]
    slope = np.polyfit(np.log([one.flops for one in trusted]), np.log([one.n_params for one in trusted]), 1)[0]
    assert slope == pytest.approx(BETA / (ALPHA + BETA), abs=0.05)


def test_the_envelope_finds_the_best_sizes_between_those_trained():
    sizes = np.geomspace(1e7, 1e9, 9)
    found = frontier.envelope(rows_at([(n, 6 * n * d) for n in sizes for d in np.geomspace(n, 1000 * n, 25)]))
    inner = [one for one in found if 1e17 < one.flops < 1e20]
    assert len(inner) > 20 and all(one.n_sizes > 1 for one in found)
    for one in inner:  # sizes are a factor of 1.8 apart
        assert 0.5 < one.n_params / best_size(one.flops) < 2
        (truth,) = rows_at([(one.n_params, one.flops)])
        assert one.loss == pytest.approx(truth["loss"], rel=1e-3)


def test_an_envelope_needs_competitors():
    with pytest.raises(UserError, match="two sizes with runs of at least two lengths"):
        frontier.envelope(rows_at([(1e7, 1e17), (1e7, 1e18), (1e8, 1e18)]))


def grid():
    """Best of each size: 1, 2, 4, 8; size 3 is beaten by 2, and no cheaper one beats the others."""
    rows = [(1, 10, 5.0), (1, 10, 5.5), (2, 40, 4.0), (3, 90, 4.2), (4, 160, 3.5), (8, 640, 3.0), (8, 600, 3.1)]
    return [{"n_params": n, "flops": float(c), "loss": loss} for n, c, loss in rows]


def test_the_pareto_frontier():
    assert [(row["n_params"], row["loss"]) for row in frontier.pareto(grid())] == [
        (1, 5.0),
        (2, 4.0),
        (4, 3.5),
        (8, 3.0),
    ]


def test_rungs_track_the_fit_and_span_the_frontier():
    front = [{"flops": c, "loss": 3.0} for c in (1.0, 1.1, 10.0, 11.0, 95.0, 100.0)]
    off = np.array([1.02, 1.00, 1.01, 1.00, 1.00, 1.03])
    assert frontier.rungs(front, 3.0 * off, 3) == [1, 3, 4]
    assert frontier.rungs(front, 3.0 * off, 6) == [0, 1, 2, 3, 4, 5]
    # A configuration belongs to the target that it is nearest to, however well another would like it.
    uneven = [{"flops": c, "loss": 3.0} for c in (1.0, 12.0, 35.0, 100.0)]
    assert frontier.rungs(uneven, [3.0, 3.1, 2.99, 3.0], 3) == [0, 1, 3]
    gap = [front[0], front[1], front[4], front[5]]
    assert len(set(frontier.rungs(gap, [3.0] * 4, 3))) == 3  # where nothing is near the middle, the nearest
    with pytest.raises(ConfigError, match="between 1 and the 6"):
        frontier.rungs(front, 3.0 * off, 7)


def fitted(law, params):
    return Fit(
        law=law, params=params, ci95=None, objective={"name": "lsq", "value": 0.0}, n_rows=9, starts={}, warnings=[]
    )


@pytest.mark.parametrize("flops", [1e18, 1e21, 1e24])
def test_allocation_is_hoffmanns(flops):
    made = allocate(fitted("chinchilla", CHINCHILLA), flops)
    assert made[0].n_params == pytest.approx(best_size(flops), rel=1e-3)
    assert made[0].n_params * made[0].n_tokens * 6 == pytest.approx(flops)


def test_smaller_models_reach_the_same_loss_with_more_compute_or_not_at_all():
    fit = fitted("over_training", PLANTED["over_training"])
    made = allocate(fit, 1e21)
    costs = [one.compute for one in made if one.compute]
    assert costs == sorted(costs) and costs[0] == 1.0 and costs[2] > 1.05
    for one in made:
        if one.n_tokens:
            assert float(fit.predict({"n_params": one.n_params, "n_tokens": one.n_tokens})) == pytest.approx(
                made[0].loss
            )
            assert one.compute == pytest.approx(6 * one.n_params * one.n_tokens / 1e21)
        record = one.record()
        assert record["flops"] is None or record["flops"] == 6 * one.n_params * one.n_tokens
    tiny = allocate(fit, 1e21, shares=(1.0, 1e-3))[1]
    floor = float(fit.predict({"n_params": tiny.n_params, "n_tokens": 1e30}))
    assert tiny.n_tokens is None and floor > made[0].loss


def test_a_small_model_may_need_a_million_times_the_tokens():
    law = CHINCHILLA | {"alpha": 0.01, "beta": 0.3, "B": 4e4}
    made = allocate(fitted("chinchilla", law), 1e21, shares=(1.0, 0.03965))
    assert 1e5 < made[1].n_tokens / made[0].n_tokens < 1e8


class TwoValleys(Fit):
    """Deep and narrow at 1e8 parameters, shallow and wide at 1e10."""

    def predict(self, inputs):
        n = np.log(inputs["n_params"])
        return 4 - 2 * np.exp(-((n - np.log(1e8)) ** 2)) - np.exp(-(((n - np.log(1e10)) / 6) ** 2))


def test_the_deepest_of_several_valleys_is_the_best():
    fit = fitted("chinchilla", CHINCHILLA)
    made = allocate(TwoValleys(**vars(fit)), 1e21, shares=(1.0,))
    assert made[0].n_params == pytest.approx(1e8, rel=0.2)


def test_allocation_needs_size_and_tokens_and_a_valley():
    with pytest.raises(ConfigError, match="allocate needs a law of n_params and n_tokens"):
        allocate(fitted("kaplan_n", PLANTED["kaplan_n"]), 1e20)
    with pytest.raises(ConfigError, match="no minimum in N"):
        allocate(fitted("chinchilla", CHINCHILLA | {"A": 0.0}), 1e20)
