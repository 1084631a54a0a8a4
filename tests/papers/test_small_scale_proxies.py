"""Each claim of each experiment agrees in a world where the paper is right, disagrees in one where it is wrong, and
does not tell where the data cannot."""

import itertools
import math
import re
from dataclasses import replace

import pytest

from scaling_testbed.analysis.rows.study import load, where
from scaling_testbed.config.compose import CONFIG_DIR, compose
from scaling_testbed.papers import paper
from scaling_testbed.papers.combinators import Each, compare, opposite_at_ends, pairs, positive
from scaling_testbed.papers.effects import AGREES, CANNOT_TELL, DISAGREES
from scaling_testbed.papers.lines import FALLS, RISES, along, more_at_largest
from scaling_testbed.papers.measures import BEST_LOSS, BEST_LR, CRITICAL_LR, LOSS, Evidence, Measure, Place, S, Value
from scaling_testbed.papers.small_scale_proxies import PAPER
from scaling_testbed.report.sweep import write_report, write_traces
from scaling_testbed.runs.row import SCHEMA_VERSION
from scaling_testbed.sweeps.grid import load_sweep
from tests.analysis.conftest import LRS, MARGINS, grid, make_row
from tests.papers import worlds

DECLARED = {"lr_range": [3e-4, 3e-1], "margins": MARGINS}
OF_THE_PAPER = [one.name for one in PAPER.experiments if one.name != "mitigations"]


def judged(name, found):
    """{claim: (verdict, numbers)} of an experiment, asked of a study."""
    experiment = PAPER.experiment(name)
    made = paper.judged(experiment, Evidence(found, experiment.group))
    return {claim.text: (verdict.word, verdict.words) for claim, verdict in made}


@pytest.fixture
def verdicts(study):
    """Returns a function from a sweep's name, rows and traces to {claim: (verdict, number)}."""

    def judge(name, rows, traces=None, declared=DECLARED):
        return judged(name, study(rows, name=name, traces=traces, declared=declared))

    return judge


@pytest.mark.parametrize("name", OF_THE_PAPER)
@pytest.mark.parametrize(("right", "verdict"), [(True, AGREES), (False, DISAGREES)])
def test_the_verdict_is_the_one_that_was_planted(verdicts, name, right, verdict):
    rows, traces = worlds.seeded(*getattr(worlds, name)(right))
    said = verdicts(name, rows, traces)
    assert said and {text: told for text, told in said.items() if told[0] != verdict} == {}
    assert all(any(char.isdigit() for char in words) for _, words in said.values())


@pytest.mark.parametrize("name", OF_THE_PAPER)
def test_one_seed_tells_its_effect_and_no_verdict(verdicts, name):
    rows, traces = getattr(worlds, name)(True)
    said = verdicts(name, rows, traces)
    assert {word for word, _ in said.values()} <= {CANNOT_TELL}
    told = "One seed, so there is no interval. The effect is "
    assert any(words.startswith(told) for _, words in said.values()) or name == "predict_logits"


@pytest.mark.parametrize("name", OF_THE_PAPER)
def test_a_study_that_declared_nothing_has_effects_and_no_verdict(verdicts, name):
    rows, traces = worlds.seeded(*getattr(worlds, name)(True))
    said = verdicts(name, rows, traces, declared=None)
    assert {word for word, _ in said.values()} == {CANNOT_TELL}
    reason = "nothing was declared before the runs (docs/grids.md"
    assert all(words.lower().startswith(reason) for _, words in said.values())


@pytest.mark.parametrize("name", OF_THE_PAPER)
def test_a_run_without_a_result_keeps_a_claim_from_being_told(verdicts, name):
    rows, traces = worlds.seeded(*getattr(worlds, name)(True))
    # the first in the range of S; one of the largest size; one of those that the claim is about
    at = 4 * {"indep_wd_lr": 1, "mup_full": 20, "pointwise_attn": 50}.get(name, 0)
    rows[at] = {**rows[at], "status": "failed"}
    said = verdicts(name, rows, traces)
    told = [got for got, _ in said.values()]
    assert CANNOT_TELL in told and DISAGREES not in told
    assert any("failed" in number for got, number in said.values() if got == CANNOT_TELL)


def test_every_sweep_of_the_reference_has_claims_with_their_figure():
    assert len(OF_THE_PAPER) == 28
    for name in OF_THE_PAPER:
        experiment = PAPER.experiment(name)
        assert experiment.claims and experiment.figure.startswith("Figure") and experiment.question.endswith("?")


@pytest.mark.parametrize("name", OF_THE_PAPER)
def test_a_table_of_ones_own_lacks_columns_and_has_verdicts_of_a_chosen_experiment_all_the_same(tmp_path, name):
    lines = [f"{lr},{n},{3 + lr},5.5" for n in (1000, 4000) for lr in (0.01, 0.1, 0.3)]
    (tmp_path / "own.csv").write_text("\n".join(["lr,n_params,val_loss,val_loss_initial", *lines]))
    found = replace(load(tmp_path / "own.csv"), paper=PAPER.name, experiment=name)
    verdicts = judged(name, found).values()
    assert verdicts and all(text for _, text in verdicts)
    assert write_report(found, tmp_path / "page.html") and write_traces(found, tmp_path / "metrics") == []


def test_rows_that_do_not_say_their_eps_cannot_tell(verdicts):
    rows = [row for row in worlds.adam_eps(True)[0] if row.pop("optimizer.eps") == 1e-8]
    assert "optimizer.eps must be a number, got no such column" in str(verdicts("adam_eps", rows).values())


@pytest.mark.parametrize(("gradient", "verdict"), [(0.9e-7, AGREES), (1.1e-7, DISAGREES)])
def test_a_gradient_has_come_down_to_eps_where_it_is_within_ten_times(verdicts, gradient, verdict):
    row = make_row(0.3, 3.0, diagnostics_last_mean={f"grad_rms/{worlds.MLP}": gradient})
    said = verdicts("gradrms_scaling", worlds.seeded([row], {})[0], declared={"margins": {"recorded": 1.05}})
    (claim,) = [text for text in said if "comes down to AdamW's eps" in text]
    assert said[claim][0] == verdict


S_CLAIM = "qk-layernorm lowers learning-rate sensitivity."
CRITICAL_CLAIM = "Without it the critical rate falls as N grows (in the paper: the lowest rate that diverges)."
HARM_CLAIM = "Runs whose score passes 1e4 are harmed, and others are not (here: nine of ten)."
FORETOLD_CLAIM = "A quadratic fit to the smaller sizes foretells the largest (here: within a factor of 3)."


def test_the_trend_of_one_size_cannot_be_told(verdicts):
    rows, _ = worlds.seeded(*worlds.qknorm_lr(True))
    said = verdicts("qknorm_lr", [row for row in rows if row["model.d_model"] == 32])
    word, words = said[CRITICAL_CLAIM]
    assert word == CANNOT_TELL and words == "These runs do not give the fall of critical rate per tenfold N"
    assert said[S_CLAIM][0] == AGREES


@pytest.mark.parametrize(("spread", "verdict"), [(0.02, AGREES), (2.0, CANNOT_TELL)])
def test_an_effect_below_the_spread_between_seeds_cannot_tell(verdicts, spread, verdict):
    def loss(condition, width, lr, seed):
        steep = 0.2 * (1 + spread * (seed - 1) / 2) if condition == worlds.WITHOUT else 0.1
        return worlds.bowl(lr, depth=steep)

    rows = grid(loss, [worlds.WITH, worlds.WITHOUT], seeds=(0, 1, 2))
    assert verdicts("qknorm_lr", rows)[S_CLAIM][0] == verdict


def test_seeds_are_paired_over_conditions(verdicts):
    """What a seed adds in both conditions is no part of the effect."""

    def loss(condition, width, lr, seed):
        return worlds.bowl(lr, depth=(0.1 if condition == worlds.WITH else 0.2) + 0.3 * seed)

    rows = grid(loss, [worlds.WITH, worlds.WITHOUT], seeds=(0, 1, 2))
    assert verdicts("qknorm_lr", rows)[S_CLAIM][0] == AGREES


def test_sizes_are_pooled_and_each_is_told(verdicts):
    def loss(condition, width, lr, seed):
        steeper = (condition == worlds.WITHOUT) == (width > 32)
        return worlds.bowl(lr, depth=(0.5 if steeper else 0.1) + 0.001 * seed)

    said = verdicts("qknorm_lr", grid(loss, [worlds.WITH, worlds.WITHOUT], seeds=(0, 1, 2)))[S_CLAIM]
    assert re.search(r"^The effect is \+0\.165 .*N=24\.6k: .* \(-0\.49\d\); 98\.3k: .* \(\+0\.49\d\)", said[1]), said


def test_equal_runs_are_left_out_and_said(verdicts):
    """As muParam's at its base width, or a norm per head with one head: the same by construction."""

    def loss(condition, width, lr, seed):
        differs = condition["model__qk_norm_axis"] == "full" and width > 32
        return worlds.bowl(lr) + 0.01 * seed + (0.05 + 0.001 * seed if differs else 0)

    rows = grid(loss, worlds.both("model__qk_norm_axis", "head", "full"), seeds=(0, 1, 2))
    (got, words) = verdicts("qknorm_axis", rows)["Per head is slightly better at the best rate."]
    assert (
        got == AGREES
        and words.startswith("The effect is +0.051 nats (95 % interval from ")
        and "N=24.6k: 3.0100 with axis of the qk-norm head and 3.0100 with full: the same by constr" in words
    )


def test_a_claim_that_nothing_changes_needs_an_interval_within_the_margin(verdicts):
    """Noise does not make things equal."""

    def world(noise):
        def loss(condition, width, lr, seed):
            return worlds.bowl(lr, depth=0.1 + noise * ((7 * seed + condition["budget__steps"]) % 5 - 2))

        rows = grid(loss, [{"budget__steps": steps} for steps in (50, 101, 203)], seeds=(0, 1, 2))
        return next(iter(verdicts("steps", rows).values()))

    assert world(0.001)[0] == AGREES
    assert world(0.1)[0] == CANNOT_TELL


def test_a_margin_that_was_not_declared_is_named(verdicts):
    rows, _ = worlds.seeded(*worlds.qknorm_lr(True))
    said = verdicts("qknorm_lr", rows, declared={**DECLARED, "margins": {"loss": 0.02}})
    assert said[S_CLAIM][0] == CANNOT_TELL and "No margin of S was declared (docs/grids.md" in said[S_CLAIM][1]


def test_a_declared_rate_that_was_not_run_withholds_s(verdicts):
    rows, _ = worlds.seeded(*worlds.qknorm_lr(True))
    rows = [row for row in rows if row["optimizer.lr"] != 1e-2]
    got, words = verdicts("qknorm_lr", rows, declared={**DECLARED, "rates": list(LRS)})[S_CLAIM]
    assert got == CANNOT_TELL and "of its declared rates 0.01 was not run" in words


def test_a_range_that_was_not_declared_gives_no_verdict(study):
    rows, _ = worlds.seeded(*worlds.qknorm_lr(True))
    found = study(rows, declared=DECLARED)
    experiment = PAPER.experiment("qknorm_lr")
    made = paper.judged(experiment, Evidence(found, experiment.group, (1e-3, 1e-1)))
    assert {verdict.word for _, verdict in made} == {CANNOT_TELL}
    assert all("--lr-range is not the declared range" in verdict.words for _, verdict in made)


@pytest.mark.parametrize(
    ("seeds", "conditions", "says"),
    [
        ([0, 1, 2], [], "its seeds are 0, 1, 2, 3, and 0, 1, 2 were declared"),
        ([0, 1, 2, 3], ["seed!=2"], "--where seed!=2 leaves out runs of what was declared"),
        ([0, 1, 2, 3], ["model.d_model>32"], "--where model.d_model>32 leaves out runs of what was declared"),
        ([0, 1, 2, 3], ["model.d_model>1"], None),
        ([0.0, 1.0, 2.0, 3.0], [], None),
    ],
)
def test_no_verdict_stands_on_other_seeds_or_on_a_part_that_was_chosen_later(study, seeds, conditions, says):
    rows = worlds.seeded(*worlds.qknorm_axis(True))[0]
    found = study(rows, name="qknorm_axis", declared={**DECLARED, "seeds": seeds})
    ((word, words),) = judged("qknorm_axis", where(found, conditions)).values()
    said = words.lower().startswith(f"{says}. the effect is +0.0".lower())
    assert (word, said) == ((CANNOT_TELL, True) if says else (AGREES, False)), words


@pytest.mark.parametrize(
    ("own", "other", "says"),
    [
        ({"data_fingerprint": "a"}, {"data_fingerprint": "b"}, "come from 2 sets of data (a, b). The effect"),
        ({"precision": "fp32"}, {"precision": "bf16"}, "were made with 2 precisions (bf16, fp32). The effect"),
        ({"plugins": {"mine": "a"}}, {"plugins": {"mine": "b"}}, "were made with 2 versions of the plug-in mine"),
        ({"evaluation_data": {"c4": 1}}, {"evaluation_data": {"c4": 2}}, "were evaluated on 2 sets of data named c4"),
        ({"evaluation_data": {"c4": 1}}, {"evaluation_data": {"books": 2}}, None),
    ],
)
def test_conditions_with_other_data_or_precision_are_not_compared(verdicts, own, other, says):
    rows = [
        {**row, "schema_version": SCHEMA_VERSION, **(own if row["model.qk_norm_axis"] == "head" else other)}
        for row in worlds.seeded(*worlds.qknorm_axis(True))[0]
    ]
    ((word, words),) = verdicts("qknorm_axis", rows).values()
    assert (word, "The compared rows" in words) == ((CANNOT_TELL, True) if says else (AGREES, False))
    assert says is None or f"The compared rows {says}" in words


def test_a_claim_may_be_about_the_precision_or_compare_rows_of_each(verdicts):
    rows = worlds.seeded(*worlds.zloss_drift(True))[0]
    more = {"schema_version": SCHEMA_VERSION}
    rows = [{**row, **more, "precision": row["compute.precision"], "data_fingerprint": "a"} for row in rows]
    assert {word for word, _ in verdicts("zloss_drift", rows).values()} == {AGREES}


def test_no_verdict_stands_on_fewer_rates_than_were_declared(verdicts):
    rows = [row for row in worlds.seeded(*worlds.qknorm_axis(True))[0] if row["optimizer.lr"] not in (1e-3, 0.3)]
    ((got, words),) = verdicts("qknorm_axis", rows, declared={**DECLARED, "rates": list(LRS)}).values()
    assert got == CANNOT_TELL and words.startswith("No run has 0.001, 0.3 of the declared learning rates. The effect")


def test_an_effect_that_is_not_finite_is_named(verdicts):
    rows = worlds.seeded(*worlds.qknorm_axis(True))[0]
    ((got, words),) = verdicts("qknorm_axis", [{**row, "val_loss_initial": None} for row in rows]).values()
    assert got == CANNOT_TELL and "The effect of seed 0 is not finite" in words


def test_a_fit_that_misses_cannot_foretell(verdicts):
    rows = worlds.seeded(*worlds.predict_logits(True))[0]
    for row in rows:
        row["diagnostics_at_step"]["attention_logit_max/0"] *= 30 if row["model.d_model"] == 256 else 1
    assert verdicts("predict_logits", rows)[FORETOLD_CLAIM][0] == DISAGREES


def test_a_planned_size_beyond_those_measured_does_not_keep_them_from_being_told(verdicts):
    rows = worlds.seeded(*worlds.predict_logits(True))[0]
    larger = {**rows[-1], "run_id": "larger", "model.d_model": 512, "n_params_non_embedding": 6e6, "status": "failed"}
    assert {got for got, _ in verdicts("predict_logits", [*rows, larger]).values()} == {AGREES}


def test_runs_stopped_before_the_end_of_their_schedule_cannot_tell_whether_they_are_harmed(verdicts):
    rows = worlds.seeded(*worlds.predict_logits(False))[0]
    assert verdicts("predict_logits", rows)[HARM_CLAIM][0] == DISAGREES
    for row in rows:
        row.update({"schedule.steps": 1000, "steps_planned": 20})
    got, number = verdicts("predict_logits", rows)[HARM_CLAIM]
    assert got == CANNOT_TELL and "stopped before the end" in number


def test_few_rates_past_the_threshold_that_are_not_harmed_refute_the_claim(verdicts):
    """More than nine of ten of all are as it says, because most rates lie below the threshold."""
    rows = worlds.seeded(*worlds.predict_logits(True))[0]
    for row in rows:
        past = row["model.d_model"] >= 64 and row["optimizer.lr"] == 0.3
        row["diagnostics_at_step"] = {"attention_logit_max/0": 2e4 if past else 1e3}
        row |= {"status": "finished", "val_loss": 3.0 + 1e-3 * row["seed"]}
    got, words = verdicts("predict_logits", rows)[HARM_CLAIM]
    assert got == DISAGREES and words == (
        "0 of 3 [0%, 71%] sizes and rates past 10000 are harmed, 39 of 39 [91%, 100%] others are not"
    )


def test_rows_that_lack_what_a_claim_needs_cannot_tell(verdicts):
    rows = [{**make_row(lr, 3.0, model__qk_norm="none"), "val_loss_initial": None} for lr in (1e-3, 1e-2)]
    got, number = verdicts("qknorm_lr", rows)[S_CLAIM]
    assert got == CANNOT_TELL and "val_loss_initial" in number


@pytest.mark.parametrize(("sizes", "verdict"), [("small", AGREES), ("large", DISAGREES)])
def test_a_critical_rate_above_the_grid_bounds_the_trend(verdicts, sizes, verdict):
    """It is known to lie above the highest rate, and its trend is at least, or at most, the one with that rate."""

    def loss(condition, width, lr, seed):
        hurt = (width > 32) if sizes == "small" else (width < 128)
        return 3.0 + 0.001 * seed + abs(math.log(lr / 1e-3)) * 1e-3 + (hurt and lr >= 0.03) * (1 + 0.01 * seed)

    got, words = verdicts("qknorm_lr", grid(loss, [worlds.WITH, worlds.WITHOUT], seeds=(0, 1, 2)))[CRITICAL_CLAIM]
    assert got == verdict and words.startswith(
        f"The effect is {'at least' if sizes == 'small' else 'at most'} a factor of "
    ), words
    assert "open" in words and "above 0.3" in words


def test_critical_rates_above_the_grid_on_both_sides_cannot_tell(verdicts):
    rows = worlds.seeded(grid(lambda c, w, lr, s: worlds.bowl(lr, depth=0.01), [worlds.WITH, worlds.WITHOUT]), {})[0]
    got, words = verdicts("qknorm_lr", rows)["It raises the critical rate."]
    assert got == CANNOT_TELL and "not known on both sides" in words


def test_each_condition_is_judged_by_itself(verdicts):
    """1/d_head better at every size of one condition and worse at every size of the other: true of neither."""

    def loss(condition, width, lr, seed):
        better = condition["model__qk_norm"] == "none"
        return 3.0 - (0.05 if (condition["model__attention_scale"] == "inverse") == better else 0.0)

    conditions = [{"model__qk_norm": norm, "model__attention_scale": scale} for norm in ("none", "layernorm")
                  for scale in ("inverse", "inverse_sqrt")]  # fmt: skip
    rows = grid(loss, conditions)
    gains = {"none": 0, "layernorm": 64}  # so that all models without are smaller than all with, at each width
    rows = [
        {**row, "n_params_non_embedding": row["n_params_non_embedding"] + gains[row["model.qk_norm"]]} for row in rows
    ]
    said = verdicts("attn_scale", rows)
    got = [one for text, one in said.items() if "smallest" in text or "slightly" in text]
    assert got and all(verdict != AGREES for verdict, _ in got), said


JOINT_CLAIM = "Scaling width and depth together is best at the largest size."
POWER_LAW_CLAIM = "A power law through its smaller sizes extrapolates best."


def test_what_is_best_beats_each_alternative_and_not_their_mean(verdicts):
    rows = [{**row, "val_loss": row["val_loss"] - 0.4 * (row["model.d_model"] == 256)}
            for row in worlds.shape_scaling(True)[0]]  # fmt: skip
    got, words = verdicts("shape_scaling", worlds.seeded(rows, {})[0])[JOINT_CLAIM]
    assert got == DISAGREES and "The effect is -0.10" in words and "The effect is +0.29" in words


def test_an_alternative_with_too_few_sizes_for_a_law_is_a_gap(verdicts):
    rows = worlds.seeded(*worlds.shape_scaling(True))[0]
    rows = [row for row in rows if (row["model.d_model"], row["model.n_layers"]) != (64, 4)]
    got, words = verdicts("shape_scaling", rows)[POWER_LAW_CLAIM]
    assert got == CANNOT_TELL and words.startswith(
        "Missing or withheld: error at the largest size of a power law of best loss with scan over depth beside joint"
    )


def test_an_alternative_that_was_not_run_is_a_gap(study):
    rows = worlds.seeded(grid(lambda c, w, lr, s: 3.0 + 0.1 * (c == worlds.WITHOUT), [worlds.WITH, worlds.WITHOUT]), {})
    evidence = Evidence(study(rows[0], declared=DECLARED))
    judges = [compare(LOSS, "model.qk_norm", kind(("layernorm", "rmsnorm")), "none") for kind in (tuple, Each)]
    some, each = (judge(evidence) for judge in judges)
    assert some.word == AGREES and each.word == CANNOT_TELL
    assert each.words.startswith("Missing or withheld: loss with qk-norm rmsnorm beside none")


def test_ends_where_two_are_the_same_by_construction_cannot_tell(verdicts):
    rows = worlds.seeded(*worlds.attn_scale(True))[0]
    own = {(row["model.qk_norm"], row["optimizer.lr"], row["seed"]): row["val_loss"] for row in rows
           if (row["model.d_model"], row["model.attention_scale"]) == (32, "inverse")}  # fmt: skip
    rows = [{**row, "val_loss": own[row["model.qk_norm"], row["optimizer.lr"], row["seed"]]}
            if row["model.d_model"] == 32 else row for row in rows]  # fmt: skip
    got, words = next(told for text, told in verdicts("attn_scale", rows).items() if "slightly" in text)
    assert got == CANNOT_TELL and "the same by construction" in words


@pytest.mark.parametrize(("at_64", "reason"), [(None, "x of all runs at N=98.3k"), (0.0, "the same by")])
def test_a_size_that_gives_no_effect_keeps_a_claim_about_each_from_being_told(study, at_64, reason):
    def of(evidence, place):
        value = at_64 if place.curve.n_params > 5e4 else 1.0
        return None if value is None else Value({seed: value * (1 + 0.01 * seed) for seed in place.curve.seeds}, "v")

    rows = worlds.seeded(grid(lambda *_: 3.0, [worlds.WITHOUT], widths=(32, 64), lrs=[0.1]), {})[0]
    verdict = positive(Measure("x", of, "S"), every=True)(Evidence(study(rows, declared=DECLARED), ["model.qk_norm"]))
    assert verdict.word == CANNOT_TELL and reason in verdict.words, verdict.words


def test_errors_of_two_conditions_are_compared_without_the_sign_of_their_means(study):
    def of(evidence, place):
        mean = -0.1 if place.curve.fits({"model.qk_norm": "layernorm"}) else 0.3
        return Value({seed: mean + 0.01 * seed for seed in place.curve.seeds}, "v")

    rows = worlds.seeded(grid(lambda *_: 3.0, [worlds.WITH, worlds.WITHOUT], widths=[32], lrs=[0.1]), {})[0]
    judge = compare(Measure("error", of, "S", errors=True), "model.qk_norm", "layernorm", "none")
    verdict = judge(Evidence(study(rows, declared=DECLARED)))
    assert verdict.word == AGREES and verdict.effect == pytest.approx(0.315 - 0.085)


def kappas(gap=0.0):
    """Kappas at two widths; the loss of the wider models is lower by 0.8 nats. gap: of both at kappa = 100."""
    rows = [{**row, "val_loss": row["val_loss"] + gap * (row["model.kappa"] == 100)} for row in worlds.kappa(True)[0]]
    wide = [{**row, "run_id": f"{row['run_id']} wide", "model.d_model": 64, "val_loss": row["val_loss"] - 0.8,
             "n_params_non_embedding": 4 * row["n_params_non_embedding"]} for row in rows]  # fmt: skip
    return worlds.seeded([*rows, *wide], {})[0]


def test_losses_are_compared_with_those_of_models_of_their_width(verdicts):
    said = verdicts("kappa", kappas())
    assert {got for got, _ in said.values()} == {AGREES}
    near, _, beyond = (words for _, words in said.values())
    assert "N=24.6k, kappa=100: 3.0" in near and "N=98.3k, kappa=100: 2.2" in near
    assert "; 98.3k, kappa=10000: 5.2" in beyond and "beside 3.7" in beyond
    assert next(iter(verdicts("kappa", kappas(gap=0.3)).values()))[0] == DISAGREES


def test_a_width_without_a_model_to_compare_with_is_a_gap(verdicts):
    rows = [row for row in kappas() if (row["model.d_model"], row["model.n_layers"]) != (64, 0)]
    _, _, (got, words) = verdicts("kappa", rows).values()
    assert got == CANNOT_TELL and words.startswith(
        "Missing or withheld: N=98.3k, kappa=10000: 0 conditions without layers have its width, and one is compared"
    )


def test_s_in_a_claim_is_the_s_of_the_table(study):
    def loss(condition, width, lr, seed):
        return worlds.bowl(lr, depth=0.2 + (0.9 if seed == 2 else 0.0))

    rows = grid(loss, [{"schedule__warmup": value} for value in (0.005, 0.25)], seeds=(0, 1, 2))
    found = study(rows, name="warmup_lr", declared=DECLARED)
    table = {f"{one.s:.3f}" for one in Evidence(found, PAPER.experiment("warmup_lr").group).sensitivities}
    words = judged("warmup_lr", found)["Sensitivity falls with the length of the warm-up."][1]
    told = set(re.findall(r"(\d\.\d+) at (?:warm-up )?0\.", words))
    assert told and told <= table


def test_missing_runs_keep_a_claim_about_every_run_from_being_told(verdicts):
    rows, _ = worlds.seeded(*worlds.predict_logits(True))
    assert verdicts("predict_logits", rows)[HARM_CLAIM][0] == AGREES
    rows[0] = {**rows[0], "status": "failed"}
    assert verdicts("predict_logits", rows)[HARM_CLAIM][0] == CANNOT_TELL


def test_a_best_rate_at_an_end_of_the_grid_is_not_known(verdicts):
    best = dict(zip((0.0, 1e-5, 1e-4), (0.0003, 0.001, 0.03), strict=True))
    rows = grid(
        lambda c, w, lr, s: worlds.bowl(lr, best[c["optimizer__weight_decay"]]),
        [{"optimizer__weight_decay": value} for value in best],
    )
    got, words = next(iter(verdicts("wd_value", worlds.seeded(rows, {})[0]).values()))
    assert got == CANNOT_TELL and "best rate at N=24.6k: at an end of the grid, 0.0003" in words


def test_the_best_rate_lies_between_the_rates_of_the_grid(study):
    """At the vertex of the parabola through the lowest loss and its neighbours."""
    rows = grid(lambda c, w, lr, s: worlds.bowl(lr, 2e-2), [{}], widths=[32])
    evidence = Evidence(study(rows, name="own"))
    value = BEST_LR.of(evidence, Place(evidence.curves[0]))
    assert math.exp(value.by_seed[0]) == pytest.approx(2e-2)


def test_a_model_where_scans_meet_is_not_compared_with_itself(study):
    rows = grid(lambda *_: 3.0, [{}], widths=(32, 64, 128)) + grid(lambda *_: 3.0, [{}], widths=(64,), n_layers=4)
    found = Evidence(study(rows, name="width_depth_lr"), ["scan"])
    assert not list(pairs(found.curves, {"scan": "depth"}, {"scan": "width"}))


@pytest.mark.parametrize("scale", ["cpu", "gpu_hour"])
@pytest.mark.parametrize("name", ["shape_scaling", "width_depth_lr", "width_depth_noqk"])
def test_the_grids_of_shortened_scales_can_tell_what_their_claims_ask(verdicts, name, scale):
    """In a world where the paper is right; too few or unequal sizes would leave a claim open."""
    axes = load_sweep(name, scale).axes
    rows = []
    for model, lr in itertools.product(axes["model"], map(float, axes["optimizer.lr"])):
        width, depth = (int(re.search(rf"^{key}: (\d+)", (CONFIG_DIR / "model" / f"{model}.yaml").read_text(), re.M)[1])
                        for key in ("d_model", "n_layers"))  # fmt: skip
        n = 12 * depth * width**2
        scans = {"cpu": (64 if name == "shape_scaling" else 16, 2), "gpu_hour": (512, 6)}[scale]
        joint = width != scans[0] and depth != scans[1]
        spread = 0.3 * n**0.1 * (depth / scans[1]) ** 0.2
        loss = 40 * n**-0.2 * (0.9 if joint else 1.0) * (0.99 if depth > scans[1] else 1.0)
        loss += spread * abs(math.log10(lr) + 2)
        rows.append(make_row(lr, loss, d_model=width, n_layers=depth, model__qk_norm="none"))
    rates = sorted(map(float, axes["optimizer.lr"]))
    said = verdicts(name, worlds.seeded(rows, {})[0], declared={"lr_range": [rates[0], rates[-1]], "margins": MARGINS})
    assert CANNOT_TELL not in [got for got, _ in said.values()], said


@pytest.mark.parametrize("scale", ["paper", "gpu_hour", "cpu"])
def test_every_model_of_output_norm_has_the_block_that_is_asked_for(scale):
    models = load_sweep("output_norm", scale).axes["model"]
    block = int(PAPER.experiment("output_norm").quantities[0].name.partition("/")[2])
    assert all(compose([f"model={name}"]).model.n_layers > block for name in models)


def test_a_place_where_all_runs_diverged_has_no_difference_and_is_not_left_out(study):
    def loss(condition, width, lr, seed):
        return (
            None if lr == 0.3 else 3.0 + 0.1 * (condition == worlds.WITHOUT) + 1e-3 * seed * (condition == worlds.WITH)
        )

    rows = grid(loss, [worlds.WITH, worlds.WITHOUT], widths=[32], lrs=(0.1, 0.3), seeds=(0, 1, 2))
    verdict = compare(LOSS, "model.qk_norm", "layernorm", "none")(Evidence(study(rows, declared=DECLARED)))
    assert verdict.word == AGREES and verdict.effect == pytest.approx((0.1 - 1e-3) / 2)


def test_curves_that_diverged_everywhere_are_not_the_same_by_construction(verdicts):
    rows = worlds.seeded(grid(lambda *_: None, [worlds.WITH, worlds.WITHOUT]), {})[0]
    assert "by construction" not in verdicts("qknorm_lr", rows)["Up to the best rate both curves coincide."][1]


def test_a_model_without_layers_is_on_no_line_along_n(study):
    rows, _ = worlds.seeded(grid(lambda c, w, lr, s: worlds.bowl(lr) - 0.1 * math.log10(w), [{}]), {})
    bigram, _ = worlds.seeded(grid(lambda c, w, lr, s: 9.0, [{}], widths=[32], n_layers=0), {})
    found, both = (
        along(BEST_LOSS, "N", FALLS)(Evidence(study(one, declared=DECLARED))) for one in (rows, rows + bigram)
    )
    assert found.word == both.word == AGREES and found.effect == both.effect == pytest.approx(0.05, abs=0.005)


def test_a_measure_that_is_withheld_at_both_ends_cannot_tell(study):
    rows = grid(lambda *_: 3.0, worlds.both("model__attention_scale", "inverse", "inverse_sqrt"), lrs=[0.01])
    judge = opposite_at_ends(S, "model.attention_scale", "inverse", "inverse_sqrt")
    verdict = judge(Evidence(study(rows, name="own", declared=DECLARED)))
    assert verdict.word == CANNOT_TELL and "fewer than two learning rates" in verdict.words


def test_a_difference_of_trends_needs_two_sizes(study):
    rows = grid(
        lambda c, w, lr, s: worlds.bowl(lr), [{"schedule__warmup": steps} for steps in (500, 1000)], widths=[32]
    )
    judge = more_at_largest(CRITICAL_LR, "schedule.warmup", RISES)
    found = judge(Evidence(study(rows, name="own", declared=DECLARED)))
    assert found.word == CANNOT_TELL and found.words.startswith(
        "These runs do not give the rise of critical rate along"
    )


@pytest.mark.parametrize(
    ("best", "note"),
    [
        (3e-4, "The best rate is the lowest of the grid"),
        (3e-1, "The best rate is the highest of the grid"),
        (1e-1, "More than half of S is from rates below the best one"),
        (3e-3, None),
    ],
)
def test_a_verdict_on_s_or_on_the_best_loss_counts_the_curves_whose_rates_it_hangs_on(verdicts, best, note):
    """Those of one of two warm-ups; the other has its best rate in the lower half."""

    def loss(condition, width, lr, seed):
        return worlds.bowl(lr, best if condition["schedule__warmup"] > 500 else 3e-3, depth=0.2) + 0.001 * seed

    said = verdicts("warmup_lr", grid(loss, [{"schedule__warmup": steps} for steps in (500, 1000)], seeds=(0, 1, 2)))
    of_s = said["Sensitivity falls with the length of the warm-up."][1]
    of_loss = said["The loss at the best rate falls with it too."][1]
    remark = f"{note} in 3 of 6 curves"
    assert (" curves" in of_s, remark in of_s) == ((False, False) if note is None else (True, True))
    of_the_grid = note is not None and note.endswith("of the grid")
    assert (" curves" in of_loss, remark in of_loss) == (of_the_grid, of_the_grid)


def without(rows, places, seeds=(0, 1, 2, 3)):
    """The rows, without what they recorded at some places (width, rate) with some seeds."""
    return [
        {**row, "diagnostics_at_step": {}, "status": "diverged"}
        if (row["model.d_model"], row["optimizer.lr"]) in places and row["seed"] in seeds
        else row
        for row in rows
    ]


def test_a_place_whose_runs_have_no_value_keeps_a_claim_from_being_told_and_is_named(verdicts):
    rows = worlds.seeded(*worlds.predict_logits(True))[0]
    said = verdicts("predict_logits", without(rows, [(64, 0.3)]))
    assert {word for word, _ in said.values()} == {CANNOT_TELL}
    assert all("largest attention logit of block 0 at N=98.3k at lr=0.3" in words for _, words in said.values())
    rises = "At a given rate the largest score of block 0 grows with N."
    word, words = verdicts("predict_logits", without(rows, [(64, 0.3)], seeds=(2,)))[rises]
    assert word == AGREES and "; 3 seeds; " in words and "Seed 2 is left out" in words


def test_a_row_without_a_gradient_or_an_update_is_named(verdicts):
    rows = worlds.seeded(*worlds.adam_eps(True))[0]
    rows[0] = {**rows[0], "diagnostics_last_mean": {}}
    word, words = verdicts("adam_eps", rows)["Updates are smaller where the gradient's RMS is below eps."]
    assert word == CANNOT_TELL and "gradient RMS of the MLP input matrix of block 0 and update" in words
    assert "update RMS of the MLP input matrix of block 0 of run 128x2 lr=0.01" in words


def test_a_place_whose_records_have_no_such_number_is_left_out_with_a_remark(verdicts):
    """Where logits hardly drift, half of the drift has no step. Without any record the claim cannot be told."""
    rows, traces = worlds.zloss_trace(True)
    more, steady = worlds.zloss_trace(True)
    for row in more:
        other = f"{row['run_id']} wider"
        steady[other] = [step | {"output_logit_mean": 0.0} for step in steady.pop(row["run_id"])]
        row |= {"run_id": other, "model.d_model": 64, "n_params_non_embedding": 98304}
    late = "It comes late in training."
    word, words = verdicts("zloss_trace", *worlds.seeded(rows + more, traces))[late]
    assert word == CANNOT_TELL and "lateness of drift of mean output logit at N=98.3k at lr=0.1" in words
    word, words = verdicts("zloss_trace", *worlds.seeded(rows + more, traces | steady))[late]
    assert word == AGREES and "N=98.3k at lr=0.1: not defined: no common seed" in words


def places_in(words):
    """The parts of a verdict that are about one place each, without the effect before them."""
    return words.partition("). ")[2].split("; ")


def test_the_critical_rate_stands_beside_s_and_is_not_judged(verdicts):
    """That of two conditions, and those of a line; above the highest rate where no rate passes."""

    def loss(condition, width, lr, seed):
        harm = 1.0 if condition == worlds.WITHOUT and lr >= 0.1 else 0.0
        return 3.0 + 0.001 * seed + harm * (width / 32) + abs(math.log(lr / 1e-2)) * 1e-3

    said = verdicts("qknorm_lr", grid(loss, [worlds.WITH, worlds.WITHOUT], seeds=(0, 1, 2)))
    first, *_ = places_in(said[S_CLAIM][1])
    passes = r"0\.0[3-9]\d*"
    assert re.search(rf" with layernorm and .* with none \(critical rate >0\.3 and {passes}\) \(\+0\.\d+\)$",
                     first.replace("qk-norm ", "")), first  # fmt: skip
    (line,) = places_in(said["Without it sensitivity grows with N."][1])
    assert re.search(rf"at N=393k \(critical rate {passes}, {passes} and {passes}\)", line), line
    assert "critical rate" not in said["Up to the best rate both curves coincide."][1]


def test_a_size_has_one_name_where_only_some_conditions_have_the_gains_of_a_norm(verdicts):
    rows = worlds.seeded(*worlds.qknorm_lr(True))[0]
    gains = [300 * (row["model.qk_norm"] == "layernorm") for row in rows]
    rows = [{**row, "n_params_non_embedding": row["n_params_non_embedding"] + more}
            for row, more in zip(rows, gains, strict=True)]  # fmt: skip
    named = [set(re.findall(r"24\.\d+k", words)) for _, words in verdicts("qknorm_lr", rows).values()]
    assert [names for names in named if names] and all(names <= {"24.6k"} for names in named), named


def test_sizes_that_differ_by_more_than_gains_keep_their_names(study):
    def rows(more, key):
        made = grid(lambda c, w, lr, s: worlds.bowl(lr), [{"model__mlp": key}], widths=[32])
        return [{**row, "n_params_non_embedding": row["n_params_non_embedding"] + more} for row in made]

    evidence = Evidence(study([*rows(0, "gelu"), *rows(8000, "swiglu")]), ["model.mlp"])
    assert [str(Place(curve)) for curve in evidence.curves] == ["N=24.6k", "N=32.6k"]


@pytest.mark.parametrize("name", OF_THE_PAPER)
def test_each_place_of_a_claim_has_a_name_of_its_own_in_words(verdicts, name):
    rows, traces = worlds.seeded(*getattr(worlds, name)(True))
    for claim, (_, words) in verdicts(name, rows, traces).items():
        names = [place.partition(": ")[0].removeprefix("N=") for place in places_in(words) if ": " in place]
        assert len(set(names)) == len(names), (claim, words)
    told = [*(words for _, words in verdicts(name, rows, traces).values())]
    told += [claim.estimand for claim in PAPER.experiment(name).claims]
    assert not [one for one in told if re.search(r"[a-z]_[a-z]\w*[/.]|\w+\.\w+_\w+|[a-z]/\d|\w=null", one)], told


def test_effects_have_their_unit_and_a_prediction_the_factor_of_its_error(verdicts):
    said = verdicts("qknorm_lr", worlds.seeded(*worlds.qknorm_lr(True))[0])
    assert re.match(r"The effect is \+0\.\d+ nats per tenfold N \(95", said["Without it sensitivity grows with N."][1])
    assert re.match(r"The effect is a factor of [\d.]+ per tenfold N \(95", said[CRITICAL_CLAIM][1])
    assert re.match(r"The effect is \+[\d.]+ nats \(95", said[S_CLAIM][1])
    foretold = verdicts("predict_logits", worlds.seeded(*worlds.predict_logits(True))[0])[FORETOLD_CLAIM][1]
    found = re.match(r"The error is a factor of ([\d.]+) \(95 % interval from ([\d.]+) to ([\d.]+); 4 seeds; limit 3\)",
                     foretold)  # fmt: skip
    assert found and 1 < float(found[2]) <= float(found[1]) <= float(found[3]) < 3, foretold


def test_a_distance_from_a_limit_tells_the_quantity_and_the_limit(verdicts):
    text = "With z-loss log Z stays near zero (here: log^2 Z below 100)."
    rows = worlds.seeded(*worlds.zloss_drift(True), sd=0.0)[0]
    words = verdicts("zloss_drift", rows)[text][1]
    assert "N=6.14k at lr=0.1, weight decay 0, precision bf16: 4 (x25); " in words, words
    claim = next(one for one in PAPER.experiment("zloss_drift").claims if one.text == text)
    assert claim.estimand == "limit of 100 over the mean square of log Z, mean over sizes and rates"
