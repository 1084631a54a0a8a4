"""Diagnostics in a run: on or off changes no weight, resumed or spread over processes no number."""

import math
import os
import signal

import pytest
import torch

from scaling_testbed.diagnostics.config import DiagnosticsConfig
from scaling_testbed.diagnostics.names import DIAGNOSTICS
from scaling_testbed.diagnostics.summary import Summary, names_in
from scaling_testbed.errors import ConfigError
from scaling_testbed.learning import loss_model
from scaling_testbed.runs.metrics import STEP_METRICS
from scaling_testbed.training import step as updates
from scaling_testbed.training.run import train
from tests.training.conftest import TIMING, data_dir, metrics, tiny, trained  # noqa: F401
from tests.training.test_run import assert_same_weights

ON = ("diagnostics=basic", "diagnostics.every_steps=3", "diagnostics.at_step=5", "diagnostics.last_steps=4")


def lines(folder):
    return {line["step"]: names_in(line) for line in metrics(folder) if names_in(line)}


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        (
            "batch.micro_batch_sequences=2",
            "model.qk_norm=none",
            "compute.precision=bf16",
            "compute.residual_dtype=bf16",
        ),
        ("model.attention_softcap=20", "parallelism.activation_checkpointing=1", "optimizer=stable_adamw"),
        (
            "model.linear=sigma_reparam",
            "optimizer=muon",
            "optimizer.skip_spikes_sigmas=0.5",
            "optimizer.skip_spikes_window=4",
        ),
        ("model.qk_norm=none", "optimizer=adam_atan2", "optimizer.qk_clip=1", "model.attention_normaliser=relu2"),
    ],
)
def test_switching_them_on_changes_no_bit(trained, overrides):  # noqa: F811
    row, plain = trained(*overrides, runs="off")
    measured, probed = trained(*overrides, *ON, runs="on")
    assert row["run_id"] == measured["run_id"]
    assert row["skipped_steps"] == measured["skipped_steps"] != 0  # None where none is looked for
    assert_same_weights(plain, probed)
    known = [{key: value for key, value in line.items() if key not in names_in(line)} for line in metrics(probed)]
    assert known == metrics(plain)
    assert row["diagnostics_at_step"] is row["diagnostics_last_mean"] is row["max_attention_logit"] is None
    assert measured["diagnostics_at_step"]["step"] == 5 and measured["max_attention_logit"] > 0


def test_the_row_keeps_the_named_step_and_the_means_of_the_last(trained):  # noqa: F811
    row, folder = trained(*ON)
    found = lines(folder)
    assert list(found) == [1, 3, 5, 6, 9, 12]
    clipping = {line["step"]: {key: line[key] for key in ("grad_norm", "clip_coefficient")}
                for line in metrics(folder)[1:]}  # fmt: skip
    assert row["diagnostics_at_step"] == {"step": 5, **found[5], **clipping[5]}
    assert 0 < row["diagnostics_last_mean"]["clip_coefficient"] <= 1
    assert row["diagnostics_last_mean"]["steps"] == [9, 12] and row["diagnostics_last_mean"]["measured"] == 2
    for name in ("residual_rms/1", "grad_rms/blocks.0.mlp.mlp_in.weight", "log_z_mean"):
        assert row["diagnostics_last_mean"][name] == pytest.approx((found[9][name] + found[12][name]) / 2)
    assert row["max_attention_logit"] == max(line["attention_logit_max"] for line in found.values())


def test_a_run_that_was_stopped_keeps_what_it_measured_before(trained, monkeypatch):  # noqa: F811
    whole, _ = trained(*ON, runs="whole")
    real, calls = updates.set_lr, [0]

    def stopping(*arguments):
        calls[0] += 1
        if calls[0] == 7:
            os.kill(os.getpid(), signal.SIGTERM)
        real(*arguments)

    monkeypatch.setattr(updates, "set_lr", stopping)
    assert trained(*ON)[0]["status"] == "preempted"
    row, _ = trained(*ON)
    for key in ("diagnostics_at_step", "diagnostics_last_mean", "max_attention_logit"):
        assert row[key] == whole[key]


def test_sequences_limit_the_extra_pass(trained):  # noqa: F811
    every, _ = trained(*ON, "diagnostics.sequences=null", runs="all")
    one, _ = trained(*ON, "diagnostics.sequences=1", runs="one")
    split, _ = trained(*ON, "diagnostics.sequences=null", "batch.micro_batch_sequences=2", runs="split")
    seven, _ = trained(*ON, "diagnostics.sequences=7", runs="seven")
    uneven, _ = trained(*ON, "diagnostics.sequences=7", "batch.micro_batch_sequences=2", runs="uneven")  # 2, 2, 2, 1
    assert one["diagnostics_at_step"]["attention_logit_max"] < every["diagnostics_at_step"]["attention_logit_max"]
    for whole, parts in ((every, split), (seven, uneven)):
        for name, value in whole["diagnostics_at_step"].items():
            assert parts["diagnostics_at_step"][name] == pytest.approx(value, rel=1e-4, abs=1e-5), name


def test_a_step_past_the_end_is_said(tiny, capsys):  # noqa: F811
    run, _ = tiny("diagnostics.at_step=2000")
    assert train(run)["diagnostics_at_step"] is None
    assert "diagnostics.at_step=2000 is after the last step" in capsys.readouterr().out


def test_the_update_that_diverged_is_measured(trained, monkeypatch):  # noqa: F811
    """What broke the run is in its records: the row would look calm without."""
    real, calls = loss_model.loss_terms, [0]

    def broken(*arguments, **options):
        terms = real(*arguments, **options)
        calls[0] += torch.is_grad_enabled()  # not in evaluations and in what is measured
        return terms._replace(ce=terms.ce * math.nan) if torch.is_grad_enabled() and calls[0] == 5 else terms

    monkeypatch.setattr(loss_model, "loss_terms", broken)
    row, folder = trained(*ON)  # step 5 is measured
    assert row["status"] == "diverged" and row["diverged_at_step"] == 5
    last = metrics(folder)[-1]
    assert last["step"] == 5 and "val_loss" not in last and last["attention_logit_max"] > 0
    assert row["diagnostics_at_step"] == {"step": 5, **names_in(last)}
    assert row["max_attention_logit"] == max(line["attention_logit_max"] for line in lines(folder).values())


def test_what_is_not_finite_is_left_out_of_a_mean_and_kept_out_of_the_largest():
    config = DiagnosticsConfig(every_steps=1, last_steps=3, at_step=9)
    rows = [{"step": n, "attention_logit_max": value} for n, value in enumerate((1.0, None, 4.0, math.inf, 2.0), 1)]
    found = Summary.of_records(config, rows).diagnostics(5)
    assert found["max_attention_logit"] == 4.0 and found["diagnostics_at_step"] is None
    assert found["diagnostics_last_mean"] == {"steps": [3, 5], "measured": 3, "attention_logit_max": 3.0}


@pytest.mark.parametrize("field", ["every_steps=-1", "at_step=0", "last_steps=0", "sequences=0"])
def test_wrong_values_are_refused(tiny, field):  # noqa: F811
    with pytest.raises(ConfigError, match=field.split("=")[0]):
        tiny(f"diagnostics.{field}")


def test_every_metric_of_a_run_is_in_the_reference_and_the_reference_names_no_other(trained):  # noqa: F811
    more = ("diagnostics.per_head=true", "optimizer.skip_spikes_sigmas=0.5", "optimizer.skip_spikes_window=4")
    _, folder = trained(*ON, *more, "averaging=ema", "evaluation.ce_scaled=true")
    tensors = {name.partition("/")[2] for line in metrics(folder) for name in line if name.startswith("param_rms/")}
    found = set()
    for name in {name for line in metrics(folder) for name in line}:
        quantity, _, where = name.partition("/")
        letters = "/".join("BH"[: len(where.split("/"))]) if where else ""
        found.add("/".join(filter(None, (quantity, "TENSOR" if where in tensors else letters))))
    # This corpus has no tokenizer and is no mixture, and the objective is the cross-entropy; see test_tasks.py,
    # test_online.py and test_objectives.py in tests/training, and evaluation/test_target_groups.py.
    of_others = {"error_by_task", "weights_by_source", "train_objective", "accuracy_by_group"}
    assert found | set(TIMING) | of_others == {metric.name for metric in (*STEP_METRICS, *DIAGNOSTICS)}
