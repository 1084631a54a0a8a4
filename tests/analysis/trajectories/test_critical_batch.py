"""The critical batch of planted curves, its interval, and what is withheld or refused."""

import json
import math

import numpy as np
import pytest

from scaling_testbed.analysis.curves.intervals import interval
from scaling_testbed.analysis.laws.best_runs import at_best_rates
from scaling_testbed.analysis.laws.forms import LAWS, critical_batch
from scaling_testbed.analysis.trajectories.critical_batch import critical_batches, hyperbola, monotone
from scaling_testbed.analyze import main
from scaling_testbed.errors import ConfigError, UserError
from tests.analysis.trajectories.worlds import BATCH, run

# As nano models have it: B_crit 1.9k tokens at 2.4 nats.
LAW = {"Nc": 3e4, "alpha_N": 0.265, "Sc": 66.0, "alpha_S": 0.467, "B_star": 1.1e5, "alpha_B": 0.215}
STEPS = {256: 3000, 768: 1300, 2048: 700, 6144: 450, 16384: 350}  # by batch
SIZES = (6000, 25000)


def planted(n, batch, lr, best_lr, seed, noise=0.0, slow=0.3, points=40):
    """A run whose loss after s steps is that of the law. At a rate off the best by a factor e it takes `slow` more."""
    steps, wrong = STEPS[batch], 1 + slow * abs(math.log(lr / best_lr))
    at = np.arange(1, steps + 1) / wrong
    losses = LAWS["batch"].predict(LAW, {"n_params": n, "steps": at, "batch_tokens": batch})
    losses = losses * np.exp(noise * np.random.default_rng([seed, n, batch, round(1e4 * lr)]).standard_normal(steps))
    name = f"{n} {batch} {lr:g} {seed}"
    row, records = run(
        name, n, steps, lambda s, _: losses[s - 1], lr=lr, warmup=10, every=max(5, steps // 60), seed=seed
    )
    return row | {"batch.sequences": batch * 2 // BATCH, "n_tokens": batch * steps}, records


def best_rate(batch):
    """The small batches train best at the lower rate, the large ones at the higher one."""
    return 3e-3 if batch < 2000 else 1e-2


def planted_world(seeds=(0,), sizes=SIZES, noise=0.0, lrs=(3e-3, 1e-2), slow=0.3, points=40):
    places = [(n, b, lr, s) for n in sizes for b in STEPS for lr in lrs for s in seeds]
    runs = [planted(n, b, lr, best_rate(b), s, noise, slow, points) for n, b, lr, s in places]
    return [row for row, _ in runs], {row["run_id"]: records for row, records in runs}


@pytest.fixture(scope="module")
def whole():
    return planted_world()


def test_the_planted_critical_batch_is_found_at_the_best_rate_of_each_batch(study, whole):
    found = critical_batches(study(*whole[:1], traces=whole[1]), levels=[2.2, 2.4, 2.6], first_step=20)
    for place in found.places:
        record, truth = place.record(), float(critical_batch(LAW, place.loss))
        assert record["critical_batch"] == pytest.approx(truth, rel=0.03), (place.n_params, place.loss)
        fewest = LAW["Sc"] * (place.loss - (LAW["Nc"] / place.n_params) ** LAW["alpha_N"]) ** (-1 / LAW["alpha_S"])
        assert record["s_min"] == pytest.approx(fewest, rel=0.03) and record["misfit"] < 0.03
        assert record["e_min"] == pytest.approx(record["s_min"] * record["critical_batch"])
        assert {batch: record[f"best_lr/{batch}"] for batch in STEPS} == pytest.approx({b: best_rate(b) for b in STEPS})
        assert record["steps/256"] == pytest.approx(fewest * (1 + truth / 256), rel=0.02)
    law = found.power_law()
    assert law["1/alpha_B"]["value"] == pytest.approx(1 / LAW["alpha_B"], rel=0.05) and law["B_star"]["low"] is None
    assert abs(found.ratio_of_sizes()[0]) < 0.03
    assert any("one seed, so there is no interval" in said for said in found.notes)
    assert any("best rate is the lowest or the highest that was tried at 30 of 30" in said for said in found.notes)
    one_rate = critical_batches(study(*whole[:1], traces=whole[1]), levels=[2.4], where=["optimizer.lr=0.01"])
    off = one_rate.places[0].record()["critical_batch"] / float(critical_batch(LAW, 2.4))
    assert off > 1.3 and any("one rate at each batch" in said for said in one_rate.notes)


def test_with_seeds_there_are_intervals_over_them(study):
    rows, traces = planted_world(seeds=(1, 2, 3), sizes=SIZES[:1], noise=0.003)
    found = critical_batches(study(rows, traces=traces))
    records = [one for one in found.records() if one["critical_batch"] is not None]
    assert len(records) >= 4 and all(one["n_seeds"] == 3 for one in records)
    assert all(one["low"] < one["critical_batch"] < one["high"] for one in records)
    truth = [float(critical_batch(LAW, one["loss"])) for one in records]
    assert sum(one["low"] < true < one["high"] for one, true in zip(records, truth, strict=True)) >= len(records) - 1
    law = found.power_law()["1/alpha_B"]
    assert law["low"] < 1 / LAW["alpha_B"] < law["high"] and law["high"] - law["low"] < 2


@pytest.mark.parametrize("gap", [0.0, 0.1])
def test_intervals_hold_the_truth_in_95_of_100_worlds_where_the_rate_is_chosen_too(gap):
    """Steps with 3 % noise at two rates; the worse one, which alternates over batches, takes `gap` more."""
    rng, batches, truth = np.random.default_rng(0), np.array(list(STEPS), float), math.log(2000)
    steps = np.log1p(2000 / batches) + gap * np.array([[0, 1, 0, 1, 0], [1, 0, 1, 0, 1]])
    inside = 0
    for _ in range(300):
        found = [hyperbola(batches, (steps + 0.03 * rng.standard_normal(steps.shape)).min(axis=0))[1] for _ in range(3)]
        ends = interval(found)
        inside += ends.low <= truth <= ends.high
    assert 0.92 <= inside / 300 <= 0.98


def test_the_hyperbola_is_that_of_least_squares():
    from scipy.optimize import least_squares

    rng, batches = np.random.default_rng(1), np.array([256.0, 1024.0, 4096.0, 16384.0])
    logs = np.log(90 * (1 + 1500 / batches)) + 0.1 * rng.standard_normal(4)
    theirs = least_squares(lambda x: logs - x[0] - np.log1p(np.exp(x[1]) / batches), [4.0, 7.0], xtol=1e-12)
    log_s, log_b, misfit = hyperbola(batches, logs)
    assert [log_s, log_b] == pytest.approx(list(theirs.x), abs=1e-5)
    assert misfit == pytest.approx(np.max(np.abs(np.expm1(theirs.fun))), rel=1e-3)


def test_a_curve_without_rises_is_the_nearest_one():
    steps, losses = np.log([1.0, 2.0, 4.0, 8.0, 16.0]), np.array([5.0, 3.0, 4.0, 2.0, 2.0])
    at, found = monotone(steps, losses)
    assert list(found) == [5.0, 3.5, 2.0] and at == pytest.approx(np.log([1.0, 8**0.5, 128**0.5]))


def test_what_the_curves_do_not_give_is_withheld_with_the_reason(study, whole):
    def why(rows, levels):
        given = study(rows, name=f"s{len(rows)}", traces=whole[1])
        return [place.record() for place in critical_batches(given, levels=levels).places]

    rows = [row for row in whole[0] if row["n_params"] == SIZES[0]]
    low, high = why(rows, [1.5, 9.0])[::-1]
    assert low["critical_batch"] is None and "with a batch of 256 it is not reached (lowest 2." in low["note"]
    assert "with a batch of 16384 the first point is lower already" in high["note"] and high["s_min"] is None
    two = why([row for row in rows if row["batch.sequences"] in (4, 256)], [2.4])
    assert two[0]["note"] == "2 batches, and 3 are needed"
    other = [*rows[1:], rows[0] | {"seed": 7}]
    assert why(other, [2.4])[0]["note"].startswith("seed 7 was not run with a batch of 768")
    # The best rate of the largest batch has passed 2.2 by its first point; the other one has not.
    large = [row for row in whole[0] if row["n_params"] == SIZES[1]]
    assert "batch of 16384 the first point is lower already" in why([*large, rows[0]], [2.2])[1]["note"]
    steps = np.log([100.0, 200.0, 400.0])  # a larger batch takes more steps
    assert math.isnan(hyperbola(np.array([256.0, 1024.0, 4096.0]), steps)[1])


def test_runs_that_cannot_be_used_are_refused_by_name(study, whole):
    rows = [row for row in whole[0] if row["n_params"] == SIZES[0]]
    cosine = [row | {"schedule.name": "cosine"} if row is rows[3] else row for row in rows]
    with pytest.raises(UserError, match=r"6000 768 0.01 0: its rate decays \(schedule cosine\)") as raised:
        critical_batches(study(cosine, name="cosine", traces=whole[1]))
    assert "train with schedule=constant, or leave such runs out with --where" in str(raised.value)
    twice = [*rows, rows[3] | {"run_id": "other", "model.qk_norm": "none"}]
    traces = whole[1] | {"other": whole[1][rows[3]["run_id"]]}
    with pytest.raises(UserError, match="have one size, batch, rate and seed: they differ in model.qk_norm; choose"):
        critical_batches(study(twice, name="twice", traces=traces))
    with pytest.raises(ConfigError, match="--levels must be losses greater than zero; got -1"):
        critical_batches(study(rows, name="level", traces=whole[1]), levels=[-1])
    bare = [{"run": "a", "step": step, "lr": 0.01, "loss": 3.0, "n_params": 6000} for step in (100, 200)]
    with pytest.raises(UserError, match="a: batch_tokens is not known; use --map batch_tokens=COLUMN, the batch in"):
        critical_batches(bare)


def test_the_command_shows_the_table_and_keeps_it_with_its_figures(study, whole, tmp_path, capsys):
    path = study([row for row in whole[0] if row["n_params"] == SIZES[0]], traces=whole[1]).path
    kept, figure = tmp_path / "b.json", tmp_path / "b.png"
    assert main(["critical_batch", str(path), "--levels", "2.2,2.4", "--out", str(kept), "--out", str(figure)]) == 0
    printed = capsys.readouterr().out
    assert "critical_batch" in printed and "steps/16384" in printed and "B_crit = B_star / L^(1/alpha_B)" in printed
    assert "best_lr/" not in printed and figure.stat().st_size > 10_000
    document = json.loads(kept.read_text())
    assert [one["loss"] for one in document["rows"]] == [2.4, 2.2] and "best_lr/256" in document["rows"][0]
    assert main(["critical_batch", str(path), "--levels", "2.2,2.4", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == document
    assert main(["critical_batch", str(path), "--levels", "two"]) == 2
    assert "--levels must be losses, such as 2.2,2.5; got 'two'" in capsys.readouterr().err


def test_the_law_of_whole_curves_predicts_a_batch_that_was_held_out(study, whole, capsys):
    path = study(*whole[:1], traces=whole[1]).path
    words = ["fit", str(path), "--law", "batch", "--curves", "--first-step", "20", "--starts", "4", "--bootstrap", "0"]
    words += ["--objective", "lsq_log", "--hold-out", "batch.sequences=32", "--json"]
    assert main([*words, "--best-lr"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["params"] == pytest.approx(LAW, rel=0.01) and found["n_runs"] == 8
    assert [one["run"] for one in found["held_out_runs"]] == ["25000 2048 0.01 0", "6000 2048 0.01 0"]
    for one in found["held_out_runs"]:
        own = [point for point in found["predictions"] if point["run"].startswith(one["run"])]
        errors = [point["predicted"] / point["actual"] - 1 for point in own]
        assert (one["points"], one["steps"]) == (len(own), STEPS[2048]) and len(own) > 20
        assert one["mean_error"] == pytest.approx(np.mean(np.abs(errors))) and one["mean_error"] < 0.002
        assert (one["largest_error"], one["final_error"]) == (max(map(abs, errors)), errors[-1])
    assert any(said.startswith("10 of 20 runs are at the best rate of their size") for said in found["warnings"])
    assert main(words) == 0
    assert json.loads(capsys.readouterr().out)["params"]["Sc"] > 1.1 * LAW["Sc"]  # steps at all rates


def test_the_best_rate_is_that_of_the_mean_over_seeds_for_each_size_batch_and_length():
    at = {"n_params": 1e6, "n_tokens": 1e8, "batch_tokens": 1e4}
    losses = [(0.1, 2.0), (0.1, 4.0), (0.2, 2.5), (0.2, 2.6), (0.3, 2.9), (0.3, 2.9)]
    rows = [{**at, "lr": lr, "loss": loss} for lr, loss in losses]
    rows += [{**at, "lr": lr, "loss": loss, "n_tokens": 2e8} for lr, loss in ((0.1, 2.7), (0.2, 2.8))]
    kept, said = at_best_rates(rows)
    assert [(row["lr"], row["n_tokens"]) for row in kept] == [(0.2, 1e8), (0.2, 1e8), (0.1, 2e8)]
    assert said == ["3 of 8 runs are at the best rate of their size, batch and tokens; only these count",
                    "1 of 2 best rates are the lowest or the highest that was tried"]  # fmt: skip
    assert at_best_rates(kept) == (kept, [])
