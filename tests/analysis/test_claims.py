"""Each claim of each experiment agrees in a world where the paper is right, disagrees in one where it is wrong, and
does not tell where the data cannot."""

import pytest

from scaling_testbed.analysis.claims import SWEEPS, experiment_of, judged
from scaling_testbed.analysis.evidence import AGREES, CANNOT_TELL, DISAGREES, Evidence
from tests.analysis import worlds
from tests.analysis.conftest import grid, make_row

OF_THE_PAPER = [name for name in SWEEPS if name != "nano_lr"]


@pytest.fixture
def verdicts(study):
    """Returns a function from a sweep's name, rows and traces to {claim: (verdict, number)}."""

    def judge(name, rows, traces=None):
        found = study(rows, name=name, traces=traces)
        return {claim.text: said for claim, said in judged(name, Evidence(found, experiment_of(name).group))}

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
    at = {"indep_wd_lr": 1, "mup_full": 20}.get(name, 0)  # the first in the range of S; one of the largest size
    rows[at] = {**rows[at], "status": "failed"}
    said = verdicts(name, rows, traces)
    told = [got for got, _ in said.values()]
    assert CANNOT_TELL in told and DISAGREES not in told
    assert any("failed" in number for got, number in said.values() if got == CANNOT_TELL)


def test_every_sweep_of_the_reference_has_claims_with_their_figure():
    assert len(OF_THE_PAPER) == 27
    for name in OF_THE_PAPER:
        experiment = experiment_of(name)
        assert experiment.claims and experiment.figure.startswith("Figure") and experiment.question.endswith("?")
    assert experiment_of("no_such_sweep").claims == ()


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
