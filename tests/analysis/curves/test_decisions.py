"""Decisions from small runs: their accuracy, its interval, and what cannot be decided."""

import json
import math

import numpy as np
import pytest
from scipy import stats

from scaling_testbed import analyze, api
from scaling_testbed.analysis.curves.decisions import FLOOR, LINE, Ranking, agreement, extrapolated
from scaling_testbed.analysis.curves.intervals import honest_difference, noise_of
from scaling_testbed.analysis.curves.lr_sensitivity import best_by_seed
from scaling_testbed.analysis.figures.panels import decision_panels
from scaling_testbed.errors import ConfigError, UserError
from tests.analysis.conftest import grid

LRS = (1e-3, 1e-2, 1e-1)
SEEDS = (0, 1, 2)
# Tuned, "a" is the best at each size; the best rate of "a" is high, so that "b" is better than it at low rates.
BEST_LR, GAP = {"a": 1e-1, "b": 1e-2, "c": 1e-2}, {"a": 0.0, "b": 0.1, "c": 0.2}
# A crossing: "c" falls faster with N, and is the best at width 128.
FALLS = {"a": 0.20, "b": 0.20, "c": 0.33}


def flat(condition, width, lr, seed):
    mlp = condition["model__mlp"]
    noise = 0.001 * ((7 * seed + 3 * ord(mlp) + width) % 5 - 2)
    return 3.0 - 0.1 * math.log(width) + GAP[mlp] + 0.2 * abs(math.log10(lr / BEST_LR[mlp])) + noise


def crossing(condition, width, lr, seed):
    mlp = condition["model__mlp"]
    n = 24.0 * width**2
    noise = 0.0005 * ((7 * seed + 3 * ord(mlp) + width) % 5 - 2)
    return 1.0 + {"a": 4.0, "b": 4.5, "c": 18.8}[mlp] * n ** -FALLS[mlp] + 0.01 * (lr != 1e-2) + noise


def rows(loss=flat, mlps="abc", widths=(16, 32, 64), lrs=LRS, seeds=SEEDS, **more):
    conditions = [{"model__mlp": mlp} for mlp in mlps]
    return grid(loss, conditions, widths, lrs, seeds, flops=lambda _, width, lr, seed: width**2, **more)


def by_way(found, n_params, protocol, lr=None, method="ranking"):
    (one,) = [
        one
        for one in found.decisions
        if (one.n_params, one.protocol, one.lr, one.method) == (n_params, protocol, lr, method)
    ]
    return one


def test_a_ranking_flips_with_one_rate_for_all_and_holds_where_each_is_tuned(study):
    found = api.decide(study(rows()), "model.mlp")
    assert found.values == ["a", "b", "c"] and found.target == 24 * 64**2 and found.seeds == [0, 1, 2]
    tuned, small = by_way(found, 24 * 16**2, "tuned"), by_way(found, 24 * 16**2, "small rate", 1e-3)
    assert (tuned.accuracy, tuned.low, tuned.high, tuned.pairs, tuned.unresolved, tuned.ties) == (1, 1, 1, 3, 0, 0)
    # At 1e-3 "a" has lost 0.4, "b" and "c" 0.2: "b" is the best, and "a" and "c" are equal apart from noise.
    assert small.accuracy in (1 / 3, 2 / 3) and (small.low, small.high) == pytest.approx((1 / 3, 2 / 3))
    assert by_way(found, 24 * 32**2, "one rate", 1e-1).accuracy == 1
    assert tuned.compute_share == pytest.approx((16 / 64) ** 2) and small.compute_share == pytest.approx(1 / 16 / 3)
    assert 0 < tuned.noise_to_signal < small.noise_to_signal < 0.05
    assert found.remarks[0] == (
        "target N=98,304, tuned, the best first: a, b, c; its 3 seeds resolve 3 of 3 pairs, noise to signal 0.02"
    )
    small_rate = "small rate: 0.001, the lowest that all values have; the best rates of the smallest size are between"
    assert any(line.startswith(small_rate) for line in found.remarks)


def test_a_law_tells_a_crossing_that_a_ranking_misses(study):
    found = api.decide(study(rows(crossing, widths=(16, 24, 32, 48, 128))), "model.mlp")
    n = 24 * 48**2
    assert by_way(found, n, "tuned").accuracy == pytest.approx(1 / 3)
    law = by_way(found, n, "tuned", method="law")
    assert (law.form, law.accuracy) == (FLOOR, 1)
    assert law.compute_share == pytest.approx(sum((width / 128) ** 2 for width in (16, 24, 32, 48)))
    assert by_way(found, 24 * 32**2, "tuned", method="law").form == LINE
    assert [one.n_params for one in found.decisions if one.method == "law"][0] == 24 * 32**2
    assert any(line.startswith(f"law: {LINE} with three sizes; {FLOOR}") for line in found.remarks)


def test_a_law_finds_the_planted_loss():
    sizes = [1e4, 2e4, 5e4, 1e5]
    assert extrapolated(sizes, [1.5 + 40 * n**-0.4 for n in sizes], 1e6) == pytest.approx(1.5 + 40 * 1e6**-0.4, 1e-4)
    assert extrapolated(sizes[:3], [7 * n**-0.1 for n in sizes[:3]], 1e6) == pytest.approx(7 * 1e6**-0.1)
    with pytest.raises(ValueError, match="needs 3 sizes"):
        extrapolated(sizes[:2], [2, 1], 1e6)


def test_a_tuned_loss_is_that_of_each_seed_at_the_best_rate_of_their_mean():
    losses_SL = np.array([[2.0, 1.0], [1.3, 1.4], [2.0, 1.2]])
    assert best_by_seed(losses_SL, (4, 5, 6)) == pytest.approx({4: 1.0, 5: 1.4, 6: 1.2})
    close_SL = np.array([[1.0, 1.2], [1.2, 1.0], [1.1, 1.1]])  # the minimum of the mean is too low by chance
    assert np.mean(list(best_by_seed(close_SL, range(3)).values())) == pytest.approx(
        3 * 1.1 - 2 * (1.05 + 1.05 + 1.1) / 3
    )


def test_pairs_are_told_apart_by_tukeys_difference_with_seeds_as_blocks():
    rng = np.random.default_rng(0)
    common_S = 5 * rng.standard_normal(4)
    values_VS = np.array([[0.0], [0.3], [2.0]]) + 0.1 * rng.standard_normal((3, 4)) + common_S
    residual = values_VS - values_VS.mean(1, keepdims=True) - values_VS.mean(0) + values_VS.mean()
    assert noise_of(values_VS) == pytest.approx(math.sqrt((residual**2).sum() / 6))
    told = honest_difference(values_VS)
    least = stats.studentized_range.ppf(0.95, 3, 6) * noise_of(values_VS) / 2
    assert told.min() == pytest.approx(least) and told.max() < 2 * least
    pair = values_VS[:2]
    of_t = stats.t.ppf(0.975, 3) * (pair[0] - pair[1]).std(ddof=1) / 2
    assert honest_difference(pair)[0, 1] == pytest.approx(of_t, rel=1e-4)


@pytest.mark.parametrize(("n_values", "n_seeds"), [(3, 3), (10, 3), (6, 5)])
@pytest.mark.parametrize("noise", ["one 5 times", "one 10 times", "half 10 times"])
def test_of_equal_values_of_uneven_noise_a_pair_is_told_apart_in_one_of_twenty_studies(n_values, n_seeds, noise):
    rng, studies = np.random.default_rng([n_values, n_seeds]), 300
    noisy = n_values // 2 if noise.startswith("half") else 1
    sd_V = np.where(np.arange(n_values) < noisy, 5 if "5" in noise else 10, 1)
    told = [Ranking.of(sd_V[:, None] * rng.standard_normal((n_values, n_seeds))).told_VV for _ in range(studies)]
    assert np.mean([own_VV.any() for own_VV in told]) <= 0.08  # 0.05, and the noise of 300 studies


def test_of_six_values_of_even_noise_that_differ_three_seeds_resolve_some_pairs_and_ten_most():
    rng = np.random.default_rng(0)

    def share(n_seeds):
        told = [
            Ranking.of(0.02 * rng.standard_normal((6, 1)) + 0.012 * rng.standard_normal((6, n_seeds))).told_VV
            for _ in range(200)
        ]
        return np.mean(told) * 6 / 5

    assert share(3) > 0.09 and share(5) > 0.28 and share(10) > 0.45


@pytest.mark.parametrize("loss", [0.0, -3.0])
def test_a_loss_that_is_not_above_zero_is_refused(study, loss):
    """Else its law is NaN, and every comparison with it is wrong."""
    made = rows()
    made[4]["val_loss"] = loss
    with pytest.raises(UserError, match=f"the loss is {loss:g}; losses must be in nats, above zero"):
        api.decide(study(made), "model.mlp")


def test_pairs_that_the_target_does_not_resolve_and_ties_are_counted_apart():
    seeds = np.array([-0.01, 0.0, 0.01])
    target = Ranking.of(np.array([0.0 + seeds, 1.0 - seeds, 1.001 + seeds, 2.0 - seeds]))
    small = Ranking.of(np.array([0.5 + seeds, 0.5 + seeds, 3.0 - seeds, 1.0 + 100 * seeds]))
    found = agreement(small, target)
    assert found["unresolved"] == 1 and found["ties"] == 1 and found["pairs"] == 4
    # Right: 0 before 2, 0 before 3, 1 before 3. Wrong: 2 before 3. The small runs resolve none that involves 3.
    assert (found["accuracy"], found["low"], found["high"]) == (0.75, 0.25, 1.0)


LN = np.log((1e-3, 3e-3, 1e-2, 3e-2))


def planted(rng, n_values, n_seeds, kept, uneven):
    """True losses [2 sizes, values, rates] of a study, and its runs, as [2 sizes, values, rates, seeds].

    The effects of the values at the two sizes correlate by `kept`. The noise of the noisiest value is `uneven` times
    that of the quietest; a third of the variance is common to the rates of a value and seed.
    """
    effect_KV = 0.02 * rng.standard_normal((2, n_values))
    effect_KV[0] = kept * effect_KV[1] + math.sqrt(1 - kept**2) * effect_KV[0]
    best_KV = math.log(1e-2) + 0.5 * rng.standard_normal((2, n_values))
    true_KVL = effect_KV[..., None] + 0.02 * (LN - best_KV[..., None]) ** 2
    sd_V = 0.012 * rng.permutation(np.geomspace(1, uneven, n_values))
    own, common = rng.standard_normal((2, n_values, len(LN), n_seeds)), rng.standard_normal((2, n_values, 1, n_seeds))
    return true_KVL, true_KVL[..., None] + sd_V[:, None, None] * (math.sqrt(2 / 3) * own + math.sqrt(1 / 3) * common)


def tuned(losses_VLS):
    seeds = range(losses_VLS.shape[2])
    return Ranking.of(np.array([list(best_by_seed(own_LS.T, seeds).values()) for own_LS in losses_VLS]))


@pytest.mark.parametrize("n_seeds", [3, 5, 10])
@pytest.mark.parametrize(("n_values", "kept", "uneven"), [(3, 1.0, 1), (6, 0.7, 3), (6, 0.0, 1), (6, 0.0, 10)])
def test_the_interval_holds_the_accuracy_of_runs_without_noise(n_values, kept, uneven, n_seeds):
    """In at least 95 % of studies; it is cautious, because it corrects for the number of pairs."""
    rng = np.random.default_rng([n_values, n_seeds])
    held, widths, upper = [], [], np.triu_indices(n_values, 1)
    for _ in range(100):
        true_KVL, losses_KVLS = planted(rng, n_values, n_seeds, kept, uneven)
        small, target = map(tuned, losses_KVLS)
        found = agreement(small, target)
        if not found["pairs"]:
            held.append(found["accuracy"] is None and found["low"] is None)
            continue
        predicted, true = (np.sign(best_V[:, None] - best_V)[upper] for best_V in true_KVL.min(axis=2))
        truth = float((predicted == true)[target.told_VV[upper]].mean())
        held.append(found["low"] - 1e-9 <= truth <= found["high"] + 1e-9)
        widths.append(found["high"] - found["low"])
        assert found["low"] - 1e-9 <= found["accuracy"] <= found["high"] + 1e-9
    assert np.mean(held) >= 0.95
    if kept == 1:
        assert np.mean(widths) < {3: 0.7, 5: 0.4, 10: 0.3}[n_seeds]  # it says something


def test_the_interval_of_a_law_holds_the_accuracy_of_the_law_without_noise():
    rng, n_values, sizes, target = np.random.default_rng(1), 4, [6e3, 2.4e4, 9.6e4, 3.8e5], 1.5e6
    held, widths, upper = [], [], np.triu_indices(n_values, 1)
    for _ in range(40):
        floor_V, alpha_V = 1 + 0.03 * rng.standard_normal(n_values), 0.25 + 0.01 * rng.standard_normal(n_values)
        true_KV = np.array([floor_V + 8 * n**-alpha_V for n in (*sizes, target)])
        losses_KVS = true_KV[..., None] + 0.005 * rng.standard_normal((5, n_values, 3))
        law_VS = [
            [extrapolated(sizes, loss_K, target) for loss_K in own_KS.T] for own_KS in losses_KVS[:-1].swapaxes(0, 1)
        ]
        measured = Ranking.of(losses_KVS[-1])
        found = agreement(Ranking.of(np.array(law_VS)), measured)
        if found["pairs"]:  # without noise the law is exact here
            assert found["low"] <= found["accuracy"] <= found["high"]
            true_V = true_KV[-1]
            truth = float(
                (np.sign(true_V[:, None] - true_V) == measured.sign_VV)[upper][measured.told_VV[upper]].mean()
            )
            held.append(found["low"] - 1e-9 <= truth <= found["high"] + 1e-9)
            widths.append(found["high"] - found["low"])
    assert np.mean(held) >= 0.95 and len(held) > 30 and np.mean(widths) < 0.5


def test_one_seed_gives_an_accuracy_without_an_interval_and_says_so(study):
    found = api.decide(study(rows(seeds=(4,))), "model.mlp")
    one = by_way(found, 24 * 16**2, "tuned")
    assert (one.accuracy, one.low, one.high, one.pairs, one.unresolved) == (1, None, None, 3, None)
    assert one.noise_to_signal is None
    assert found.remarks[1] == "one seed: no intervals, and all 3 pairs count, also those that differ by noise alone"


def test_values_whose_learning_rate_means_something_else_are_compared_tuned_only(study):
    means = {"a": "another unit", "b": "about one per step and weight (AdamW)", "c": "another unit"}
    made = study(rows(rate_means=lambda condition, *_: means[condition["model__mlp"]]))
    found = api.decide(made, "model.mlp")
    assert {one.protocol for one in found.decisions} == {"tuned"}
    assert any(
        line.startswith("tuned only: the learning rate means different things (a, c: another unit; b: about")
        for line in found.remarks
    )
    with pytest.raises(ConfigError, match="--lr 0.01 is no rate of all values at all small sizes: the learning rate"):
        api.decide(made, "model.mlp", lr=1e-2)
    assert {one.protocol for one in api.decide(made, "model.mlp", where="model.mlp!=b").decisions} == {
        *("tuned", "small rate", "one rate")
    }


def test_the_rates_can_be_chosen(study):
    found = api.decide(study(rows()), "model.mlp", lr=1e-1, small_lr=1e-2)
    assert list(dict.fromkeys((one.protocol, one.lr) for one in found.decisions)) == [
        *(("tuned", None), ("small rate", 1e-2), ("one rate", 1e-1))
    ]
    with pytest.raises(ConfigError, match=r"--small-lr 0.2 is no rate .*: these are: 0.001, 0.01, 0.1"):
        api.decide(study(rows()), "model.mlp", small_lr=0.2)


def test_a_value_with_a_missing_run_is_left_out_and_named(study):
    found = api.decide(study(rows()[:-1]), "model.mlp")
    assert found.values == ["a", "b"] and by_way(found, 24 * 16**2, "tuned").pairs == 1
    assert "c is left out, because runs are missing: lr=0.1 seed=2" in found.remarks


def test_without_a_pair_that_the_target_resolves_there_is_no_accuracy_and_no_figure(study):
    found = api.decide(
        study(
            rows(
                lambda condition, width, lr, seed: 2.0 + 0.1 * seed + 1e-3 * ord(condition["model__mlp"]) * (seed == 1)
            )
        ),
        "model.mlp",
    )
    assert all((one.accuracy, one.low, one.pairs, one.unresolved) == (None, None, 0, 3) for one in found.decisions)
    with pytest.raises(UserError, match="no figure to draw, because no pair counts"):
        decision_panels(found)


def test_seeds_and_sizes_that_a_value_lacks_are_not_used_and_said(study):
    made = rows() + rows(mlps="ab", widths=(128,)) + rows(mlps="c", seeds=(3,))
    found = api.decide(study([row | {"data_fingerprint": "f00"} for row in made]), "model.mlp")
    assert (found.target, found.seeds) == (24 * 64**2, [0, 1, 2])
    assert "not used, because some value or size lacks them: seeds 3" in found.remarks
    assert "not used, because some value lacks them: sizes N=393,216" in found.remarks
    unknown = "the rows do not tell on which data their losses are; they must be the same for all values"
    assert unknown not in found.remarks and unknown in api.decide(study(made), "model.mlp").remarks


def test_several_keys_are_one_setting(study):
    made = [{**row, "optimizer.name": "muon" if row["model.mlp"] == "c" else "adamw"} for row in rows()]
    for row in made:  # a fourth value: "a" with muon
        row["model.mlp"] = "a" if row["optimizer.name"] == "muon" else row["model.mlp"]
    with pytest.raises(ConfigError, match="differ in optimizer.name beside --setting model.mlp: choose by --where opt"):
        api.decide(study(made), "model.mlp")
    found = api.decide(study(made), ["model.mlp", "optimizer.name"])
    assert found.values == ["mlp=a, optimizer.name=adamw", "mlp=a, optimizer.name=muon", "mlp=b, optimizer.name=adamw"]


def test_losses_on_different_data_are_compared_on_a_common_validation_set(study):
    def of_set(condition, width, lr, seed):
        return {"own": 1.0, "common": 1.0 + flat(condition, width, lr, seed)}

    made = rows(
        lambda *_: 2.0,
        data_fingerprint=lambda condition, *_: condition["model__mlp"],
        val_loss_by_set=of_set,
        evaluation_data={"common": "f00"},
    )
    with pytest.raises(UserError, match="on 3 sets of data, .* give --validation-set NAME, .* all runs have common"):
        api.decide(study(made), "model.mlp")
    assert by_way(api.decide(study(made), "model.mlp", validation_set="common"), 6144, "tuned").accuracy == 1
    with pytest.raises(ConfigError, match="--validation-set other: .* has common"):
        api.decide(study(made), "model.mlp", validation_set="other")
    made[0] = {**made[0], "evaluation_data": {"common": "f11"}}
    with pytest.raises(UserError, match="--validation-set common: the set is of different data"):
        api.decide(study(made), "model.mlp", validation_set="common")


def test_a_run_that_diverged_has_the_loss_at_initialisation(study):
    made = rows()
    for row in made:
        if row["model.mlp"] == "a" and row["optimizer.lr"] == 1e-2:
            row |= {"status": "diverged", "val_loss": None}
    assert by_way(api.decide(study(made), "model.mlp"), 6144, "one rate", 1e-2).accuracy == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("made", "more", "status", "said"),
    [
        ({}, ["--setting", "model.mpl"], 2, "--setting model.mpl: no row has this key; the keys are model.mlp"),
        ({"mlps": "a"}, [], 1, "has one value of it, a"),
        ({"widths": (16,)}, [], 1, "a decision needs a size below the target, and the values have one size, N=6144"),
        ({}, ["--target-size", "500"], 2, "--target-size 500: the sizes that all values have are N=6144, 24576, 98304"),
        ({}, ["--target-size", "6144"], 1, "the values have one size, N=6144 up to the target"),
        ({}, ["--out", "x.html"], 2, "--out x.html: the file must end in one of"),
    ],
)
def test_what_cannot_be_decided_is_refused_in_one_line(study, capsys, made, more, status, said):
    place = str(study(rows(**made)).path)
    setting = [] if "--setting" in more else ["--setting", "model.mlp"]
    assert analyze.main(["decide", place, *setting, *more]) == status
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_the_command_prints_and_keeps_the_table(study, tmp_path, capsys):
    place = str(study(rows(crossing, widths=(16, 24, 32, 64, 128))).path)
    words = ["decide", place, "--setting", "model.mlp", "--target-size", "98000"]
    file = tmp_path / "made" / "d.csv"
    assert analyze.main([*words, "--out", str(file)]) == 0
    printed = capsys.readouterr().out
    assert "target N=98,304, tuned, the best first: a" in printed and "compute_share" in printed
    assert file.read_text().startswith("n_params,compute_share,protocol,lr,method,form,accuracy,low,high,pairs")
    assert analyze.main([*words, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["target"] == 98304 and len(document["rows"]) == 4 * 3 + 4


def test_a_figure_shows_accuracy_against_compute_for_each_protocol(study):
    panels = decision_panels(api.decide(study(rows(crossing, widths=(16, 24, 32, 48, 128))), "model.mlp"))
    assert [panel.title for panel in panels] == [
        "Tuned",
        "Small rate, 0.001",
        "One rate, 0.01",
        "One rate, 0.1",
    ]
    ranking, law = panels[0].lines
    assert ranking.x == [1.56, 3.52, 6.25, 14.1] and len(law.x) == 2
    assert ranking.y[-1] == pytest.approx(1 / 3) and law.y[-1] == 1 and law.band is not None
