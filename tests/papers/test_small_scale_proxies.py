"""Each claim of each experiment agrees in a world where the paper is right, disagrees in one where it is wrong, and
does not tell where the data cannot."""

import itertools
import math
import re
from dataclasses import replace

import pytest

from scaling_testbed.analysis.rows.study import load
from scaling_testbed.config.compose import CONFIG_DIR, compose
from scaling_testbed.papers.combinators import opposite_at_ends, pairs, weigh
from scaling_testbed.papers.lines import more_at_largest, only_rises
from scaling_testbed.papers.measures import FIRST_DIVERGING_LR, Evidence, Part, S
from scaling_testbed.papers.paper import AGREES, CANNOT_TELL, DISAGREES
from scaling_testbed.papers.small_scale_proxies import PAPER
from scaling_testbed.report.sweep import write_report, write_traces
from scaling_testbed.sweeps.grid import load_sweep
from tests.analysis.conftest import grid, make_row
from tests.papers import worlds

OF_THE_PAPER = [one.name for one in PAPER.experiments if one.name != "mitigations"]


def judged(name, found):
    """{claim: (verdict, number)} of an experiment, asked of a study."""
    experiment = PAPER.experiment(name)
    evidence = Evidence(found, experiment.group)
    return {claim.text: claim.verdict(evidence) for claim in experiment.claims}


@pytest.fixture
def verdicts(study):
    """Returns a function from a sweep's name, rows and traces to {claim: (verdict, number)}."""

    def judge(name, rows, traces=None):
        return judged(name, study(rows, name=name, traces=traces))

    return judge


@pytest.mark.parametrize("name", OF_THE_PAPER)
@pytest.mark.parametrize(("paper", "verdict"), [(True, AGREES), (False, DISAGREES)])
def test_the_verdict_is_the_one_that_was_planted(verdicts, name, paper, verdict):
    rows, traces = getattr(worlds, name)(paper)
    said = verdicts(name, rows, traces)
    assert said and {text: got for text, (got, _) in said.items() if got != verdict} == {}
    assert all(any(char.isdigit() for char in number) for _, number in said.values() if "diverged" not in number)


@pytest.mark.parametrize("name", OF_THE_PAPER)
def test_a_run_without_a_result_keeps_a_claim_from_being_told(verdicts, name):
    rows, traces = getattr(worlds, name)(True)
    # the first in the range of S; one of the largest size; one of those that the claim is about
    at = {"indep_wd_lr": 1, "mup_full": 20, "pointwise_attn": 50}.get(name, 0)
    rows[at] = {**rows[at], "status": "failed"}
    said = verdicts(name, rows, traces)
    told = [got for got, _ in said.values()]
    assert CANNOT_TELL in told and DISAGREES not in told
    assert any("failed" in number for got, number in said.values() if got == CANNOT_TELL)


def test_every_sweep_of_the_reference_has_claims_with_their_figure():
    assert len(OF_THE_PAPER) == 27
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
    said = verdicts("gradrms_scaling", [row])
    (claim,) = [text for text in said if "comes down to AdamW's eps" in text]
    assert said[claim][0] == verdict


S_CLAIM = "qk-layernorm lowers learning-rate sensitivity at each size."


def test_one_size_cannot_tell(verdicts):
    rows, _ = worlds.qknorm_lr(True)
    got, number = verdicts("qknorm_lr", [row for row in rows if row["model.d_model"] == 32])[S_CLAIM]
    assert got == CANNOT_TELL and "only 1 of 2 sizes" in number


@pytest.mark.parametrize(("spread", "verdict"), [(0.02, AGREES), (2.0, CANNOT_TELL)])
def test_an_effect_below_the_spread_between_seeds_cannot_tell(verdicts, spread, verdict):
    def loss(condition, width, lr, seed):
        return worlds.bowl(lr, depth=(0.1 if condition == worlds.WITH else 0.2) * (1 + spread * (seed - 1) / 2))

    rows = grid(loss, [worlds.WITH, worlds.WITHOUT], seeds=(0, 1, 2))
    assert verdicts("qknorm_lr", rows)[S_CLAIM][0] == verdict


def test_sizes_that_contradict_each_other_cannot_tell(verdicts):
    def loss(condition, width, lr, seed):
        return worlds.bowl(lr, depth=0.1 if (condition == worlds.WITH) == (width > 32) else 0.5)

    rows = grid(loss, [worlds.WITH, worlds.WITHOUT])
    got, number = verdicts("qknorm_lr", rows)[S_CLAIM]
    assert got == CANNOT_TELL and "2 for it, 1 against" in number


def test_an_interval_too_wide_to_foretell_anything_cannot_tell(verdicts):
    rows = worlds.predict_logits(True)[0]
    for row in rows:
        row["diagnostics_at_step"]["attention_logit_max/0"] *= 30 if row["model.d_model"] in (32, 64) else 1
    assert (
        verdicts("predict_logits", rows)["A quadratic fit to the smaller sizes foretells the largest."][0]
        == CANNOT_TELL
    )


def test_a_planned_size_beyond_those_measured_does_not_keep_them_from_being_told(verdicts):
    rows = worlds.predict_logits(True)[0]
    larger = {**rows[-1], "run_id": "larger", "model.d_model": 512, "n_params_non_embedding": 6e6, "status": "failed"}
    assert {got for got, _ in verdicts("predict_logits", [*rows, larger]).values()} == {AGREES}


def test_runs_stopped_before_the_end_of_their_schedule_cannot_tell_whether_they_diverge(verdicts):
    rows = worlds.predict_logits(False)[0]
    claim = "Every run whose score passes 1e4 diverges."
    assert verdicts("predict_logits", rows)[claim][0] == DISAGREES
    for row in rows:
        row.update({"schedule.steps": 1000, "steps_planned": 20})
    got, number = verdicts("predict_logits", rows)[claim]
    assert got == CANNOT_TELL and "stopped before the end" in number


def test_rows_that_lack_what_a_claim_needs_cannot_tell(verdicts):
    rows = [{**make_row(lr, 3.0, model__qk_norm="none"), "val_loss_initial": None} for lr in (1e-3, 1e-2)]
    got, number = verdicts("qknorm_lr", rows)[S_CLAIM]
    assert got == CANNOT_TELL and "val_loss_initial" in number


def test_half_of_the_comparisons_must_count():
    parts = [Part("", 1.0, clear) for clear in (True, False, False)]
    assert weigh(parts)[0] == CANNOT_TELL and weigh(parts[:2])[0] == AGREES


def test_a_size_that_never_diverges_is_the_last_to(verdicts):
    """Not the first: its critical rate lies above all that were tried."""
    text = "Without it the lowest rate that diverges falls as N grows."

    def loss(condition, width, lr, seed):
        return math.inf if width > 32 and lr >= 0.3 else 3.0

    rows = grid(loss, [worlds.WITH, worlds.WITHOUT])
    assert verdicts("qknorm_lr", rows)[text][0] == AGREES


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


def test_s_in_a_claim_is_the_s_of_the_table(study):
    def loss(condition, width, lr, seed):
        return worlds.bowl(lr, depth=0.2 + (0.9 if seed == 2 else 0.0))

    rows = grid(loss, [{"schedule__warmup": value} for value in (0.005, 0.25)], seeds=(0, 1, 2))
    found = study(rows, name="warmup_lr")
    table = {f"{one.s:.3f}" for one in Evidence(found, PAPER.experiment("warmup_lr").group).sensitivities}
    said = [number for _, number in judged("warmup_lr", found).values() if ": S " in number]
    told = set(re.findall(r"(?:S |, )(\d\.\d+) \[", said[0]))
    assert told and told <= table


def test_missing_runs_keep_a_claim_about_every_run_from_being_told(verdicts):
    rows, _ = worlds.predict_logits(True)
    whole = verdicts("predict_logits", rows)
    text = next(text for text, (_, number) in whole.items() if "measured runs pass" in number)
    rows[0] = {**rows[0], "status": "failed"}
    assert whole[text][0] == AGREES and verdicts("predict_logits", rows)[text][0] == CANNOT_TELL


@pytest.mark.parametrize(("rates", "verdict"), [((0.001, 0.001, 0.03), AGREES), ((0.01, 0.001, 0.03), DISAGREES)])
def test_a_best_rate_that_falls_anywhere_does_not_move_up(verdicts, rates, verdict):
    best = dict(zip((0.0, 1e-5, 1e-4), rates, strict=True))

    def loss(condition, width, lr, seed):
        return 3 + abs(math.log(lr / best[condition["optimizer__weight_decay"]]))

    rows = grid(loss, [{"optimizer__weight_decay": value} for value in best])
    said = [one for one in verdicts("wd_value", rows).values() if "best lr at" in one[1]]
    assert said and said[0][0] == verdict
    rest = [one for one in rows if one["optimizer.weight_decay"] != 0]
    said = [one for one in verdicts("wd_value", rest).values() if "best lr at" in one[1]]
    assert f"1e-05: {rates[1]:g}, 0.0001: {rates[2]:g}" in said[0][1]


def test_a_model_where_scans_meet_is_not_compared_with_itself(study):
    rows = grid(lambda *_: 3.0, [{}], widths=(32, 64, 128)) + grid(lambda *_: 3.0, [{}], widths=(64,), n_layers=4)
    found = Evidence(study(rows, name="width_depth_lr"), ["scan"])
    assert not list(pairs(found.curves, "scan", "depth", "width"))


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
        scans = {"cpu": (64, 2), "gpu_hour": (512, 6)}[scale]
        joint = width != scans[0] and depth != scans[1]
        spread = 0.3 * n**0.1 * (depth / scans[1]) ** 0.2
        loss = 40 * n**-0.2 * (0.9 if joint else 1.0) * (0.99 if depth > scans[1] else 1.0)
        loss += spread * abs(math.log10(lr) + 2)
        rows.append(make_row(lr, loss, d_model=width, n_layers=depth, model__qk_norm="none"))
    said = verdicts(name, rows)
    assert all(got != CANNOT_TELL or "too close" in number for got, number in said.values()), said


@pytest.mark.parametrize("scale", ["paper", "gpu_hour", "cpu"])
def test_every_model_of_output_norm_has_the_block_that_is_asked_for(scale):
    models = load_sweep("output_norm", scale).axes["model"]
    block = int(PAPER.experiment("output_norm").quantities[0].name.partition("/")[2])
    assert all(compose([f"model={name}"]).model.n_layers > block for name in models)


def test_a_measure_that_is_withheld_at_both_ends_cannot_tell(study):
    rows = grid(lambda *_: 3.0, worlds.both("model__attention_scale", "inverse", "inverse_sqrt"), lrs=[0.01])
    judge = opposite_at_ends(S, "model.attention_scale", "inverse", "inverse_sqrt")
    verdict, words = judge(Evidence(study(rows, name="own")))
    assert verdict == CANNOT_TELL and "fewer than two learning rates" in words


def test_a_rule_that_finds_nothing_on_a_line_cannot_tell(study):
    rows = grid(lambda *_: 3.0, [{"schedule__warmup": steps} for steps in (500, 1000)])  # no run diverges
    judge = more_at_largest(FIRST_DIVERGING_LR, "schedule.warmup", only_rises)
    assert judge(Evidence(study(rows, name="own"))) == (CANNOT_TELL, "no sizes to judge by")
