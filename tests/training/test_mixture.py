"""A run on a mixture is as exact as a run on one source, and its row says what each source gave."""

import pytest

from scaling_testbed.config.compose import compose_many
from scaling_testbed.config.run import run_folder_path
from scaling_testbed.errors import ConfigError, UserError
from scaling_testbed.training import run as trainer
from scaling_testbed.training.run import train
from tests.training.conftest import TINY, StopAt, metrics
from tests.training.test_run import assert_same_bits

A = "a:{name:markov,n_tokens:20000,n_validation_tokens:4000}"
B = "b:{name:noise,vocab_size:32,n_tokens:3000,n_validation_tokens:4000}"
WEIGHTS = ["data.weights={a:.7,b:.3}", "data.weight_changes=[{step:6,weights:{a:0,b:1}}]"]
LOSSES = ("train_loss", "grad_norm", "val_loss")


@pytest.fixture
def mixed(tmp_path, data_dir):
    """Returns a function that trains a tiny run on a mixture and returns (row, run folder)."""

    def run_it(*words, sources=(A, B), runs="runs"):
        places = [f"runs_dir={tmp_path / runs}", f"data_dir={data_dir}"]
        data = ["data=mixture", f"data.sources={{{','.join(sources)}}}"]
        (run,) = compose_many([[*TINY[3:], *data, *places, *words]])
        return train(run, quiet=True), run_folder_path(run)

    return run_it


def test_a_stopped_run_on_a_mixture_ends_in_the_same_bits(mixed):
    row, whole = mixed(*WEIGHTS, runs="whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "Interrupts", lambda: StopAt(50))
        assert mixed(*WEIGHTS)[0]["status"] == "preempted"
    again, folder = mixed(*WEIGHTS)
    assert again["restarts"] == 1
    assert_same_bits(whole, folder)
    assert row["tokens_by_source"] == {"a": 34 * 16, "b": 62 * 16} and row["n_tokens"] == 96 * 16
    assert row["epochs_by_source"] == {"a": 34 / 1249, "b": 62 / 187} and row["epochs"] == 96 / (1249 + 187)
    assert list(row["val_loss_by_set"]) == ["validation", "a", "b"]
    assert row["val_loss"] == row["val_loss_by_set"]["validation"]


def test_a_mixture_of_one_source_trains_as_the_source_alone(mixed, trained):
    row, folder = trained(*TINY[:3])
    lines, alone = metrics(mixed(sources=[A])[1]), metrics(folder)
    assert [[line.get(key) for key in LOSSES] for line in lines] == [
        [line.get(key) for key in LOSSES] for line in alone
    ]
    assert row["tokens_by_source"] is None


def test_a_run_goes_on_with_other_weights_where_its_parent_stood(mixed):
    """With the parent's weights first, each source goes on after its last window."""
    _, whole = mixed(*WEIGHTS, "checkpoint.keep_steps=[6]", runs="whole")
    _, parent = mixed(WEIGHTS[0], "checkpoint.keep_steps=[6]")
    row, child = mixed(*WEIGHTS, f"start.run={parent}", "start.step=6", runs="child")
    assert row["tokens_by_source"] == {"a": 0, "b": 48 * 16}
    losses = [[line["train_loss"] for line in metrics(folder) if line["step"] > 6] for folder in (whole, child)]
    assert losses[0] == losses[1] and len(losses[0]) == 6


def test_the_main_validation_loss_is_over_all_validation_tokens_whatever_the_weights(mixed):
    for weights in ("{a:1,b:0}", "{a:1,b:4}"):
        row, _ = mixed("evaluation.tokens=1e6", "budget.steps=2", f"data.weights={weights}")
        losses = row["val_loss_by_set"]
        # 249 windows of each source, and the one in which a ends and b begins.
        assert 499 * row["val_loss"] == pytest.approx(249 * (losses["a"] + losses["b"]) + 3.6, abs=0.4)


def test_without_weights_sources_give_rows_in_proportion_to_their_tokens(mixed):
    row, _ = mixed("budget.steps=3")
    assert row["tokens_by_source"] == {"a": 21 * 16, "b": 3 * 16}  # 20,000 and 3,000 tokens, 24 rows


def test_a_source_that_cannot_fill_its_rows_and_a_doubled_name_are_refused(mixed):
    with pytest.raises(UserError, match="noise-.*give 3 sequences of 16, too few for one training batch of 4"):
        mixed("data.weights={a:1,b:1}", sources=(A, B.replace("n_tokens:3000", "n_tokens:63")))
    with pytest.raises(ConfigError, match=r"evaluation\.sets\.a: this is the name of the run's own set"):
        mixed("+evaluation.sets.a=anything")


def test_a_finished_run_is_served_only_while_each_source_is_the_same(mixed, tmp_path):
    def write(name, word):
        path = tmp_path / f"{name}.txt"
        path.write_text("".join(f"{word} number {i} of a text\n" for i in range(600)))
        return f"{name}:{{name:text_files,files:{path},cut_bytes:1024}}"

    sources = [write("x", "one"), write("y", "two")]
    words = ["model=bigram", "budget.steps=2"]
    row, _ = mixed(*words, sources=sources)
    assert mixed(*words, sources=sources)[0] == row and row["val_bpb"] > 0
    write("y", "another")
    with pytest.raises(UserError, match=r"was trained on other data: .*/y.txt has"):
        mixed(*words, sources=sources)
