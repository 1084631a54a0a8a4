"""S by hand, what withholds it, its interval over seeds, and the command."""

import gzip
import json
import math
import sys

import numpy as np
import pytest

from scaling_testbed import analyze
from scaling_testbed.analysis.curves.grouping import grouping_keys
from scaling_testbed.analysis.curves.lr_sensitivity import analyse, by_seed, rates_note, sensitivity
from scaling_testbed.analysis.figures.panels import sensitivity_panels
from scaling_testbed.analysis.rows.study import load
from scaling_testbed.errors import ConfigError, UserError
from tests.analysis.conftest import INITIAL, LRS, grid, make_row

BY_HAND = [3.2, 3.0, 2.9, 2.95, 7.0, math.nan, math.inf]


def curve(losses, lrs=LRS, **settings):
    return [make_row(lr, loss, **settings) for lr, loss in zip(lrs, losses, strict=True)]


def test_s_of_a_curve_by_hand():
    assert sensitivity(BY_HAND, INITIAL) == pytest.approx(2.93)
    assert sensitivity([INITIAL + 5, math.nan, INITIAL], INITIAL) == 0  # never trained: blind, as the paper says
    assert sensitivity([2.0, 30.0], 4.0) == pytest.approx(1.0)


def test_s_of_rows_is_that_of_the_curve_where_null_stands_for_not_finite(study):
    rows = curve([3.2, 3.0, 2.9, 2.95, 7.0, None, None])
    (found,) = analyse(study(rows), [])
    assert found.s == pytest.approx(2.93)
    assert (found.best_lr, found.best_loss, found.first_diverging_lr, found.n_lrs) == (3e-3, 2.9, 0.1, 7)


def test_a_diverged_run_counts_as_its_initial_loss_whatever_its_last_weights_score(study):
    rows = curve(BY_HAND[:5] + [3.0, 3.0])
    rows[5]["status"] = rows[6]["status"] = "diverged"
    (found,) = analyse(study(rows), [])
    assert found.s == pytest.approx(2.93) and found.first_diverging_lr == 0.1


def test_rates_outside_the_range_are_left_out(study):
    rows = curve([9.0, *BY_HAND, 9.0], lrs=(1e-4, *LRS, 1.0))
    (found,) = analyse(study(rows), [])
    assert found.s == pytest.approx(2.93) and found.n_lrs == 7
    (wide,) = analyse(study(rows), [], lr_range=(1e-4, 1.0))
    assert wide.n_lrs == 9 and wide.s > 2.93


def test_coupled_decay_is_scored_with_the_better_of_two_ranges(study):
    losses = [3.0, 2.9, 3.0, 3.1, 3.2, 3.3, 3.4, 9.0]
    coupled = curve(losses, lrs=(1e-4, *LRS), optimizer__decay="coupled")
    independent = curve(losses, lrs=(1e-4, *LRS), optimizer__decay="independent")
    both = analyse(study(coupled + independent), ["optimizer.decay"])
    found = {one.curve.condition["optimizer.decay"]: one for one in both}
    assert found["independent"].s == pytest.approx(np.mean(losses[1:]) - 2.9)
    assert found["coupled"].s == pytest.approx(np.mean(losses[:-1]) - 2.9)
    assert found["coupled"].lr_range == pytest.approx((1e-4, 1e-1))
    assert found["coupled"].range_rule == "coupled decay: smaller of two ranges" and not found["independent"].range_rule
    (short,) = analyse(study(coupled[1:]), ["optimizer.decay"])
    assert short.s == pytest.approx(np.mean(losses[1:]) - 2.9) and "not measured whole" in short.range_rule
    (low,) = analyse(study(coupled[:-1]), ["optimizer.decay"])  # S over fewer rates is another S, be it smaller or not
    assert low.s == pytest.approx(np.mean(losses[:-1]) - 2.9) and low.lr_range == pytest.approx((1e-4, 1e-1))
    assert low.range_rule == "coupled decay, but 0.0003 to 0.3 was not measured whole"
    dense = [*coupled, {**coupled[0], "run_id": "one more", "optimizer.lr": 2e-4, "val_loss": 10.8}]
    (more,) = analyse(study(dense), ["optimizer.decay"])  # both are whole, and the smaller S is not that of more rates
    assert more.lr_range == (3e-4, 3e-1) and more.range_rule == "coupled decay: smaller of two ranges"


FINITE = BY_HAND[:5] + [3.0, 3.0]
S_FINITE = np.mean(FINITE) - 2.9
MUON = {"optimizer__name": "muon"}
OTHER_MEANINGS = [
    (MUON, "(Muon)"),
    ({"optimizer__name": "sgd", "optimizer__momentum": 0.9}, "momentum=0.9 (SGD)"),
    ({"optimizer__scale_lr_by_param_rms": True}, "RMS"),
    ({"model__linear": "sigma_reparam"}, "sigma-reparam"),
    ({"optimizer__name": "newest"}, "unknown: there is no optimizer newest here"),
    ({"optimizer__name": "adamw", "optimizer__eps": "tiny"}, "unknown: its optimizer.* columns are none of adamw"),
    ({"rate_means": "a tenth of what it was"}, "a tenth of what it was"),
]


@pytest.mark.fault(
    "A17", "What a new optimizer or normaliser says of itself decides its memory, its S and its padding."
)
@pytest.mark.parametrize(("settings", "meaning"), OTHER_MEANINGS)
def test_s_is_withheld_beside_adamws_where_the_learning_rate_means_something_else(study, settings, meaning):
    """Also where rows of earlier versions do not say it themselves, and their options tell."""
    conditions = curve(FINITE, logging__group="adamw") + curve(FINITE, logging__group="other", **settings)
    found = {one.curve.label: one for one in analyse(study(conditions), ["logging.group"])}
    assert found["group=adamw"].s == pytest.approx(S_FINITE) and found["group=adamw"].withheld is None
    other = found["group=other"]
    assert (other.s, other.low, other.high) == (None, None, None)
    assert "another quantity than AdamW's" in other.withheld and meaning in other.withheld
    assert len(other.losses) == 7 and other.best_loss == 2.9  # the curve is shown all the same


@pytest.mark.parametrize(("settings", "meaning"), OTHER_MEANINGS)
def test_s_of_curves_of_one_other_meaning_is_given_with_a_note_that_names_it(study, settings, meaning):
    rows = curve(FINITE, **settings)
    found = analyse(study(rows + [row | {"model.d_model": 64} for row in rows]), [])
    assert [one.s for one in found] == pytest.approx([S_FINITE] * 2)
    assert f"One unit of learning rate is {found[0].rate_means}" in rates_note(found, (3e-4, 3e-1))
    assert meaning in found[0].rate_means == found[0].record()["rate_means"]


def test_what_means_the_same_as_for_adamw_is_compared_and_not_remarked(study):
    names = ("adamw", "stable_adamw", "adam_atan2", None)
    rows = [row for name in names for row in curve(FINITE, optimizer__name=name)]
    found = analyse(study(rows), ["optimizer.name"])
    assert [one.s for one in found] == pytest.approx([S_FINITE] * 4)
    assert "One unit" not in rates_note(found, (3e-4, 3e-1)) and found[0].record()["rate_means"] is None


def test_s_of_no_curve_is_given_where_none_means_what_adamw_does_and_they_differ(study):
    sgd = {"optimizer__name": "sgd"}
    rows = curve(FINITE, **sgd, optimizer__momentum=0.9) + curve(FINITE, **sgd, optimizer__momentum=0.5)
    found = analyse(study(rows), ["optimizer.momentum"])
    assert [one.s for one in found] == [None, None]
    assert all("than that of the other curves (one per step" in one.withheld for one in found)


def test_a_curve_whose_rows_do_not_agree_has_no_s_and_every_reason_is_said(study):
    rows = curve(FINITE[:4], LRS[:4]) + curve(FINITE[4:], LRS[4:], **MUON)
    (found,) = analyse(study(rows), [])
    assert found.s is None and found.withheld == "its rows mean different things by the learning rate"
    (short,) = analyse(study(rows), [], lr_range=(9e-3, 2e-2))
    assert "learning rate; fewer than two learning rates in 0.009 to 0.02" in short.withheld


@pytest.mark.parametrize(
    ("rates", "said"),
    [
        ((1e-3, 1e-2), "its 2 rates in 0.0003 to 0.3 leave out 0.0003 and 0.3; --lr-range 0.001,0.01 gives S"),
        ((3e-4, 1e-3, 1e-2, 1e-1), "its 4 rates in 0.0003 to 0.3 leave out 0.3; --lr-range 0.0003,0.1 gives S"),
        ((1e-3, 1e-2, 1e-1, 3e-1, 1.0), "leave out 0.0003; --lr-range 0.001,1 gives S"),
        ((3e-4, 3e-1), "no rate was run between 0.0003 and 0.3"),
        ((3e-4, 1e-3, 2e-2, 3e-1), "no rate was run between 0.001 and 0.02"),
        ((3.16e-4, 3.16e-3, 3e-2, 2.9e-1), None),  # the ends to 6 %, a decade between the rates
    ],
)
def test_s_is_withheld_unless_the_rates_cover_the_range(study, rates, said):
    (found,) = analyse(study(curve([3.0 + lr for lr in rates], rates)), [])
    assert (found.s is None) == (said is not None) and (said is None or said in found.withheld)
    assert len(found.losses) == len(rates)  # the curve is shown all the same
    if said and "--lr-range" in said:
        typed = found.withheld.split("--lr-range ")[1].split(" ")[0]
        (asked,) = analyse(
            study(curve([3.0 + lr for lr in rates], rates)), [], lr_range=tuple(map(float, typed.split(",")))
        )
        assert asked.s == pytest.approx(np.mean(rates) - rates[0]) and asked.withheld is None


def test_perplexities_make_no_s(study):
    with pytest.raises(UserError, match="val_loss_initial is 50257, a perplexity"):
        analyse(study(curve([20.0] * 7, initial=50257.0)), [])
    ours = [{**row, "schema_version": 1} for row in curve([20.0] * 7, initial=200.0)]
    assert analyse(study(ours), [])[0].s == 0


@pytest.mark.fault("A16", "S is withheld where no run learned, and negative losses are refused.")
def test_losses_that_never_fall_below_the_first_make_no_s(study):
    (found,) = analyse(study(curve([20.0] * 7, initial=5.5)), [])  # a perplexity beside nats
    assert found.s is None and "no run ended below its loss at initialisation" in found.withheld
    assert analyse(study(curve([20.0] * 6 + [3.0], initial=5.5)), [])[0].s == pytest.approx(2.5 * 6 / 7)
    with pytest.raises(UserError, match="the loss is -3; losses must be in nats, above zero"):
        analyse(study(curve([-3.0] * 7)), [])


def test_curves_over_different_rates_are_said_to_be(study, tmp_path):
    rows = curve([3.0] * 7, logging__group="a") + curve([3.0] * 4, (3e-4, 3e-3, 3e-2, 3e-1), logging__group="b")
    plan = [{"run_id": row["run_id"], "config": {"optimizer.lr": row["optimizer.lr"]}} for row in rows]
    (tmp_path / "qknorm_lr").mkdir()
    (tmp_path / "qknorm_lr" / "plan.jsonl").write_text("".join(json.dumps(line) + "\n" for line in plan))
    found = analyse(study(rows), ["logging.group"])
    assert [one.n_lrs for one in found] == [7, 4] and "The curves have different rates" in rates_note(
        found, (3e-4, 0.3)
    )
    assert "different rates" not in rates_note(found[:1], (3e-4, 0.3))


def test_a_hole_in_the_grid_is_named_and_s_withheld(study):
    rows = grid(lambda *_: 3.0, [{"model__qk_norm": "none"}, {"model__qk_norm": "layernorm"}], widths=[32])
    found = analyse(study(rows[:-1]), ["model.qk_norm"])
    assert [one.s is None for one in found] == [True, False]
    assert "lr=0.3" in found[0].withheld and "qk_norm=layernorm" in found[0].withheld


def test_a_planned_run_without_a_final_row_is_named_and_s_withheld(study, tmp_path):
    rates = ("1e-3", "1e-2", "1e-1")
    settings = {"n_params_non_embedding": 24736, "model.d_model": 32, "model.n_layers": 2, "model.qk_norm": "none"}
    plan = [
        {"run_id": f"run{i}", "config": {"optimizer.lr": float(lr), **settings}, "varied": {"optimizer.lr": lr}}
        for i, lr in enumerate(rates)
    ]
    rows = [{**make_row(float(lr), 3.0, run_id=f"run{i}"), **settings} for i, lr in enumerate(rates)]
    rows[1]["status"] = "failed"
    (tmp_path / "qknorm_lr").mkdir()
    (tmp_path / "qknorm_lr" / "plan.jsonl").write_text("".join(json.dumps(line) + "\n" for line in plan))
    (found,) = analyse(study(rows), ["model.qk_norm"])
    assert found.s is None and "run1 (optimizer.lr=1e-2; failed)" in found.withheld
    (whole,) = analyse(study([{**row, "status": "finished"} for row in rows]), ["model.qk_norm"], lr_range=(1e-3, 0.1))
    assert whole.s == 0


def test_two_rows_for_one_place_that_differ_are_an_error_naming_both(study):
    rows = [make_row(1e-2, 3.0, run_id="first"), make_row(1e-2, 3.5, run_id="second", loss__z_loss=0.0)]
    rows[0]["loss.z_loss"] = 1e-4
    with pytest.raises(UserError, match=r"first.*second.*loss\.z_loss"):
        analyse(study(rows), ["model.d_model"])
    rows[1]["val_loss"] = 3.0
    analyse(study(rows), ["model.d_model"])


def test_two_rows_that_differ_in_their_losses_alone_are_told_to_be_one_too_many(tmp_path):
    (tmp_path / "rows.csv").write_text("lr,n_params,val_loss,val_loss_initial\n1e-2,9,3,9\n1e-2,9,4,9\n")
    with pytest.raises(UserError, match="row 1 .*and row 2 .*differ; remove one"):
        analyse(load(tmp_path / "rows.csv"), [])


def test_s_of_the_seeds_has_the_best_rate_of_their_mean_and_its_bias_taken_off():
    losses_SL = np.array([[1.0, 2.0, 4.0], [1.5, 1.0, 4.0], [1.2, 2.0, 4.0]])
    found = by_seed(losses_SL, [3, 4, 5])
    plain = losses_SL.mean(axis=1) - losses_SL[:, 0]
    assert np.diff(list(found.values())) == pytest.approx(np.diff(plain)) and list(found) == [3, 4, 5]
    leave_one_out = [sensitivity(np.delete(losses_SL, seed, axis=0).mean(axis=0), INITIAL) for seed in range(3)]
    corrected = 3 * sensitivity(losses_SL.mean(axis=0), INITIAL) - 2 * np.mean(leave_one_out)
    assert np.mean(list(found.values())) == pytest.approx(corrected)


def test_the_interval_closes_when_seeds_agree_and_one_seed_has_none(study):
    losses_L = 3 + np.random.default_rng(0).uniform(size=7)
    rows = grid(lambda c, w, lr, seed: losses_L[LRS.index(lr)], [{}], widths=[32], seeds=range(5))
    (found,) = analyse(study(rows), [])
    assert (found.s, found.low, found.high) == pytest.approx([sensitivity(losses_L, INITIAL)] * 3)
    (one,) = analyse(study(rows[::5]), [])
    assert one.s == pytest.approx(found.s) and one.low is None and one.high is None


def test_without_scipy_s_has_no_interval_and_a_note_says_why(study, monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy", None)
    rows = grid(lambda c, w, lr, seed: 3.0 + lr + 0.1 * seed, [{}], widths=[32], seeds=range(3))
    found = analyse(study(rows), [])
    assert found[0].s is not None and found[0].low is None and found[0].critical.low is None
    assert "intervals over seeds need scipy: pip install -e '.[analysis]'" in rates_note(found, (3e-4, 3e-1))


@pytest.mark.parametrize(
    ("best", "note"),
    [
        (3e-4, "the best rate is the lowest of the grid"),
        (3e-1, "the best rate is the highest of the grid"),
        (3e-2, "of S is from rates below the best one"),
        (3e-3, None),
    ],
)
def test_a_note_says_where_s_comes_from(study, best, note):
    rows = grid(
        lambda c, w, lr, s: 3.0 + abs(np.log(lr / best)) * (2 if best == 3e-2 and lr < best else 1), [{}], widths=[32]
    )
    (found,) = analyse(study(rows), [])
    assert found.note == note or (note and found.note.endswith(note))


def test_a_declared_rate_that_was_not_run_withholds_s(study):
    rows = grid(lambda *_: 3.0, [{}], widths=[32])
    (found,) = analyse(study(rows), [], rates=[*LRS, 5e-2])
    assert found.s is None and found.withheld == "of its declared rates 0.05 was not run"
    (outside,) = analyse(study(rows), [], rates=[*LRS, 1.0])
    assert outside.s == 0


def test_the_ranges_of_coupled_decay_meet_rates_that_are_not_thirds_of_each_other(study):
    """A grid of 1e-3, 3e-3, ... has 3e-4 for a third of 1e-3."""
    rates = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)
    rows = grid(lambda c, w, lr, s: 3 + abs(np.log10(lr / 1e-2)), [{"optimizer__decay": "coupled"}], [32], rates)
    (found,) = analyse(study(rows), [], lr_range=(1e-3, 1.0))
    assert found.lr_range == pytest.approx((3e-4, 3e-1)) and found.n_lrs == 7


def test_conditions_are_the_keys_that_vary_without_those_that_follow(study):
    conditions = [{"budget__steps": steps, "schedule__warmup": steps / 20} for steps in (100, 200)]
    rows = grid(lambda *_: 3.0, conditions, batch__sequences=lambda c, w, lr, s: w, logging__project=lambda *at: at[2])
    assert grouping_keys(study(rows)) == ["budget.steps"]
    assert grouping_keys(study(rows), preferred=["schedule.warmup"]) == ["schedule.warmup"]
    with pytest.raises(ConfigError, match="no.such.key"):
        grouping_keys(study(rows), ["no.such.key"])


def test_the_place_of_a_teacher_is_no_condition_and_its_run_is(study):
    moved = lambda condition, width, lr, seed: f"copy-{seed}/{condition['objective__teacher_run']}"  # noqa: E731
    teachers = [{"objective__teacher_run": name} for name in ("a" * 12, "b" * 12)]
    rows = grid(lambda *_: 3.0, teachers, seeds=(0, 1), objective__teacher=moved)
    assert grouping_keys(study(rows)) == ["objective.teacher_run"]


def test_rows_of_before_a_key_was_added_belong_to_the_curve_of_its_default(study, tmp_path):
    def chosen(c, w, lr, seed):
        return {} if seed else {"averaging.name": "none", "optimizer.clip_impl": "separate", "data.skip_steps": []}

    rows = grid(lambda *_: 3.0, [{}], seeds=(0, 1), schema_version=1, optimizer__name="adamw", data__name="markov")
    rows = [row | chosen(None, None, None, row["seed"]) for row in rows]
    found = study(rows)
    assert grouping_keys(found) == [] and {len(one.curve.seeds) for one in analyse(found, [])} == {2}
    for row in rows:
        place = tmp_path / "runs" / row["run_id"]
        place.mkdir(parents=True)
        (place / "result.json").write_text(json.dumps(row))
    assert grouping_keys(load(tmp_path / "runs")) == []
    rows[0] |= {"averaging.name": "ema"}
    assert grouping_keys(study(rows)) == ["averaging.name"]


def test_the_model_where_scans_over_width_and_depth_meet_is_on_both(study):
    shapes = [(32, 2), (64, 2), (128, 2), (64, 4), (64, 8), (128, 8)]
    rows = [make_row(lr, 3.0, d_model=d, n_layers=n) for d, n in shapes for lr in (1e-3, 1e-2)]
    found = analyse(study(rows), ["scan"])
    places = [(one.curve.condition["scan"], *one.curve.shape) for one in found]
    assert sorted(places) == [
        *[("depth", 64, 2), ("depth", 64, 4), ("depth", 64, 8), ("joint", 128, 8)],
        *[("width", 32, 2), ("width", 64, 2), ("width", 128, 2)],
    ]


def test_the_command_writes_table_json_and_figure(study, tmp_path, capsys):
    conditions = [{"model__qk_norm": name} for name in ("none", "layernorm")]
    rows = grid(lambda c, w, lr, s: 3 + (lr if c["model__qk_norm"] == "none" else 0), conditions)
    study(rows, name="qknorm_lr_cpu", sweep="qknorm_lr")
    assert analyze.main(["lr_sensitivity", str(tmp_path / "qknorm_lr_cpu")]) == 0
    said = capsys.readouterr().out
    assert "minus the best" in said and "in [0.0003, 0.3] that enter S: 7" in said
    out = tmp_path / "qknorm_lr_cpu" / "analysis"
    records = json.loads((out / "lr_sensitivity.json").read_text())["rows"]
    assert len(records) == 6 and records[-1]["S"] == pytest.approx(np.mean(LRS) - LRS[0])
    assert (out / "lr_sensitivity.csv").read_text().count("\n") == 7
    assert (out / "lr_sensitivity.png").read_bytes()[:4] == b"\x89PNG"
    assert "sensitivity S (nats/token)" in (out / "lr_sensitivity.svg").read_text()
    again = tmp_path / "again"
    assert analyze.main(["lr_sensitivity", str(tmp_path / "qknorm_lr_cpu"), "--out", str(again)]) == 0
    assert (again / "lr_sensitivity.svg").read_text() == (out / "lr_sensitivity.svg").read_text()


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (["lr_sensitivity", "nowhere"], 1, "nowhere does not exist"),
        (["lr_sensitivity", "{}", "--lr-range", "1,0.1"], 2, "--lr-range"),
        (["lr_sensitivity", "{}", "--group", "model.qk_nrom"], 2, "model.qk_nrom"),
        (["lr_sensitivity", "{}", "--where", "seed=7"], 2, "seed=7"),
        (["instability", "{}"], 1, "attention_logit_max/0"),
        (["instability", "{}", "--eps", "1e-8", "--threshold", "3"], 2, "not both"),
        (["no_such_command", "{}"], 2, "no_such_command"),
    ],
)
def test_a_mistake_is_one_line_and_a_status(study, tmp_path, capsys, arguments, status, says):
    study(grid(lambda *_: 3.0, [{}]))
    assert analyze.main([each.format(tmp_path / "qknorm_lr") for each in arguments]) == status
    assert says in capsys.readouterr().err


def test_rows_are_read_from_a_compressed_file_too_and_a_torn_one_is_named(study, tmp_path):
    rows = grid(lambda c, width, lr, seed: 3.0 + abs(math.log10(lr) + 2), [{"model.qk_norm": "none"}], widths=(32,))
    found = analyse(study(rows), ["model.qk_norm"])[0].s
    plain = tmp_path / "qknorm_lr" / "results.jsonl"
    packed = plain.with_suffix(".jsonl.gz")
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    plain.unlink()
    for place in (packed, packed.parent):
        assert analyse(load(place), ["model.qk_norm"])[0].s == found
    packed.write_bytes(packed.read_bytes()[:-20])
    with pytest.raises(UserError, match="cannot read .*results.jsonl.gz"):
        load(packed.parent)


def test_a_plan_beside_a_file_of_rows_says_what_is_missing(study, tmp_path):
    """The file alone would make a grid of what is there, from which a whole rate can be missing unseen."""
    study(grid(lambda c, width, lr, seed: 3.0 + lr, [{}], widths=(32,), lrs=LRS[:-1]))
    place = tmp_path / "qknorm_lr"
    planned = {"run_id": "gone", "config": {"optimizer.lr": 0.3}, "varied": {"optimizer.lr": "3e-1"}}
    (place / "plan.jsonl").write_text(json.dumps(planned) + "\n")
    for path in (place, place / "results.jsonl"):
        found = load(path)
        assert found.planned and [row["run_id"] for row in found.missing] == ["gone"]


def test_a_plan_of_an_earlier_version_is_one_line_that_says_what_to_type(study, tmp_path):
    place = study(grid(lambda *_: 3.0, [{}], widths=(32,))).path
    done = {"run_id": load(place).rows[0]["run_id"], "overrides": ["optimizer.lr=3e-4"]}
    (place / "plan.jsonl").write_text(json.dumps(done) + "\n")
    assert load(place).missing == []  # a line of a run with a row is not needed
    (place / "plan.jsonl").write_text(json.dumps({"run_id": "gone", "overrides": ["optimizer.lr=3e-1"]}) + "\n")
    with pytest.raises(UserError, match=r"plan.jsonl: the planned run gone has no row, .*`sweep run`"):
        load(place)


def test_two_sizes_of_one_shape_in_a_condition_are_refused(study):
    rows = grid(lambda *_: 3.0, [{"model__qk_norm": "none"}, {"model__qk_norm": "layernorm"}], widths=(32,))
    rows = [
        {**row, "n_params_non_embedding": 24_800 if row["model.qk_norm"] == "layernorm" else 24_736} for row in rows
    ]
    assert len(analyse(study(rows), ["model.qk_norm"])) == 2
    with pytest.raises(UserError, match="they differ in model.qk_norm: use --group"):
        analyse(study(rows), ["data.name"])


def test_two_types_of_the_residual_stream_are_two_curves_if_they_are_grouped_and_else_refused(study):
    rows = [row for dtype in ("fp32", "bf16") for row in curve(BY_HAND, compute__residual_dtype=dtype)]
    for number, row in enumerate(rows):
        row |= {"val_loss": row["val_loss"] + 0.01 * number, "wall_seconds": 3.0 + number}
    assert len(analyse(study(rows), ["compute.residual_dtype"])) == 2
    with pytest.raises(UserError, match="they differ in compute.residual_dtype: use --group"):
        analyse(study(rows), [])


def test_ends_of_the_range_that_were_not_measured_are_said(study):
    said = rates_note(analyse(study(curve(BY_HAND)[:-1]), []), (3e-4, 3e-1))
    assert "6 (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1); not measured: 0.3." in said
    assert "not measured" not in rates_note(analyse(study(curve(BY_HAND), name="whole"), []), (3e-4, 3e-1))


def test_a_setting_named_by_the_sweep_stands_for_all_that_follow_it(study):
    named = {"none": {}, "clip": {"optimizer__qk_clip": 100}, "peri": {"model__residual": "peri"}}
    conditions = [{"model__residual": "pre", "logging__group": name, **more} for name, more in named.items()]
    found = study(grid(lambda *_: 3.0, conditions), name="mitigations")
    assert grouping_keys(found, None, ["logging.group"]) == ["logging.group"]
    assert set(grouping_keys(found)) == {"model.residual", "optimizer.qk_clip"}


def test_rows_of_two_sets_of_data_make_no_s(study):
    rows = grid(lambda *_: 3.0, [{}], widths=(32,), data_fingerprint=lambda c, w, lr, s: "b" if lr > 0.05 else 7)
    found = analyse(study(rows), [])[0]
    assert found.s is None and "2 sets of data (7, b)" in found.withheld


def test_rows_of_two_versions_of_a_plug_in_make_no_s(study):
    def plugins(changed):
        return lambda c, w, lr, s: {"mine.py": "b" * 64 if lr > 0.05 and changed else "a" * 64, f"{lr}.py": "c" * 64}

    found, same = (
        analyse(study(grid(lambda *_: 3.0, [{}], widths=(32,), plugins=plugins(changed))), [])[0]
        for changed in (True, False)
    )
    assert found.s is None and "2 versions of the plug-in mine.py (aaaaaaaaaaaa, bbbbbbbbbbbb)" in found.withheld
    assert same.s is not None


def test_the_line_of_s_breaks_where_it_is_withheld(study):
    rows = grid(lambda c, width, lr, seed: 3.0 + lr, [{}])
    found = analyse(study([row for row in rows if (row["model.d_model"], row["optimizer.lr"]) != (64, 0.3)]), [])
    assert [one.s is None for one in found] == [False, True, False]
    line = sensitivity_panels(found)[1].lines[0]
    assert [math.isnan(y) for y in line.y] == [False, True, False]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("3e-4,100,3.0,9,x,1", "seed must be a whole number"),
        ("0,100,3.0,9,0,1", "optimizer.lr must be a number, greater than zero"),
        (",100,3.0,9,0,1", "optimizer.lr must be a number"),
        ("1e-3,,3.0,9,0,1", "n_params_non_embedding must be a number"),
        ("1e-3,-5,3.0,9,0,1", "n_params_non_embedding must be a number, zero or more"),
    ],
)
@pytest.mark.parametrize("command", ["lr_sensitivity", "report"])
def test_a_cell_that_cannot_be_read_is_named_and_never_left_out(tmp_path, capsys, line, says, command):
    path = tmp_path / "rows.csv"
    path.write_text(f"lr,n_params,val_loss,val_loss_initial,seed,other\n1e-2,100,3.0,9,0,1\n{line}\n")
    status = analyze.main([command, str(path)])
    said = capsys.readouterr()
    page = (tmp_path / "rows_report.html").read_text() if command == "report" and status == 0 else ""
    assert says in said.err + page and "Traceback" not in said.err


def test_a_table_from_a_spreadsheet_and_one_that_is_none(tmp_path, capsys):
    path = tmp_path / "rows.csv"
    path.write_bytes("lr,n_params,val_loss,val_loss_initial\n1e-2,9,3,9\n1e-1,9,4,9\n".encode("utf-8-sig"))
    assert analyse(load(path), [], lr_range=(1e-2, 1e-1))[0].s == pytest.approx(0.5)
    path.write_text("lr,n_params,n_params,val_loss,val_loss_initial\n1e-2,9,10,3,9\n")
    assert analyze.main(["lr_sensitivity", str(path)]) == 1
    assert "rows.csv has more than one column n_params" in capsys.readouterr().err
    path.write_bytes(bytes(range(256)))
    assert analyze.main(["lr_sensitivity", str(path)]) == 1
    assert f"cannot read {path}" in capsys.readouterr().err
    (tmp_path / "sweep.json").write_text("[]")
    assert analyze.main(["report", str(tmp_path)]) == 1
    assert "sweep.json cannot be read (list in place of dict)" in capsys.readouterr().err


def test_brackets_and_dollars_in_values_are_text(study, tmp_path, capsys):
    study(grid(lambda *_: 3.0, [{"data__files": name} for name in ("[/src]*.py", "$x^{$", "[a-z]")], widths=(32,)))
    assert analyze.main(["lr_sensitivity", str(tmp_path / "qknorm_lr")]) == 0
    printed = capsys.readouterr().out
    assert "[/src]*.py" in printed and "[a-z]" in printed and "$x^{$" in printed
    assert analyze.main(["report", str(tmp_path / "qknorm_lr")]) == 0


def test_the_note_names_both_ranges_of_coupled_decay(study):
    rates = (1e-4, *LRS)
    found = analyse(
        study(grid(lambda c, w, lr, s: 3 + abs(math.log10(lr) + 4), [{"optimizer__decay": "coupled"}], lrs=rates)), []
    )
    assert found[0].lr_range == pytest.approx((1e-4, 1e-1))
    said = rates_note(found, (3e-4, 3e-1))
    assert "[0.0003, 0.3] or [0.0001, 0.1]" in said and "left out" not in said
