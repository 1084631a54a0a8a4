"""Weights that follow from the losses are as exact as all else: stopped, continued, spread, or begun from a parent."""

import json
import os
import shutil
import subprocess

import pytest

from scaling_testbed.config.compose import compose_many
from scaling_testbed.config.run import run_folder_path
from scaling_testbed.data.interleaving import Interleaving
from scaling_testbed.data.manifest import window_entropy_nats
from scaling_testbed.data.online import OnlineRule
from scaling_testbed.data.shards import open_prepared
from scaling_testbed.errors import ConfigError, UserError
from scaling_testbed.training import run as trainer
from scaling_testbed.training.mixing import Mixing
from scaling_testbed.training.run import train
from tests.training.conftest import TINY, StopAt, load_latest, metrics
from tests.training.test_run import assert_same_bits

SOURCES = "data.sources={a:{name:markov,n_tokens:20000,n_validation_tokens:4000},"
SOURCES += "b:{name:noise,vocab_size:32,n_tokens:20000,n_validation_tokens:4000}}"
ONLINE = "data.online={every_steps:3,eta:3,window:2,floor:.05}"
WORDS = [*TINY[3:], "data=mixture", SOURCES, "data.weights={a:.5,b:.5}", "checkpoint.every_steps=2"]


@pytest.fixture
def mixed(tmp_path, data_dir):
    """Returns a function that trains a tiny run with online weights and returns (row, run folder)."""

    def run_it(*words, runs="runs", online=ONLINE):
        (run,) = compose_many(
            [[*WORDS, *([online] if online else []), f"runs_dir={tmp_path / runs}", f"data_dir={data_dir}", *words]]
        )
        return train(run, quiet=True), run_folder_path(run)

    return run_it


def path_of(folder):
    """Step -> the weights from this step on."""
    return {line["step"]: line["weights_by_source"] for line in metrics(folder) if "weights_by_source" in line}


def test_the_weights_are_those_of_the_rule_and_the_rows_those_of_the_weights(mixed, data_dir):
    row, folder = mixed("budget.steps=13")
    found = path_of(folder)
    assert list(found) == [0, 3, 5, 6, 9, 10, 12, 13]  # each third and each fifth step
    assert found[0] == {"a": 0.5, "b": 0.5} and found[5] == found[3] != found[6] and found[13] == found[12]
    losses = {line["step"]: line["val_loss_by_set"] for line in metrics(folder) if "val_loss_by_set" in line}
    sources = open_prepared(data_dir / row["data_folder"]).sources()
    over = {name: window_entropy_nats(source.manifest, 16) for name, source in sources.items()}
    rule = OnlineRule(every_steps=3, eta=3, window=2, floor=0.05)
    for step in (3, 6, 9, 12):
        rounds = [losses[at] for at in range(3, step + 1, 3)]
        assert found[step] == rule.weights({name: losses[0][name] for name in "ab"}, rounds, over)
    assert row["weights_by_source"] == found[12]
    static = Interleaving([(step, found[step]) for step in (0, 3, 6, 9, 12)], 8)
    assert row["tokens_by_source"] == {name: 16 * rows for name, rows in static.counts(13 * 8).items()}
    assert sum(row["tokens_by_source"].values()) == row["n_tokens"]


@pytest.mark.parametrize("polls", [9, 14, 20, 26, 40])
def test_a_stopped_run_ends_in_the_same_bits(mixed, polls):
    """The stops lie between two changes, in the evaluation of one, and right after one."""
    row, whole = mixed(runs="whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "Interrupts", lambda: StopAt(polls))
        assert mixed()[0]["status"] == "preempted"
    again, folder = mixed()
    assert again["restarts"] == 1 and len(set(map(str, path_of(whole).values()))) == 4
    assert_same_bits(whole, folder)
    for key in ("tokens_by_source", "epochs_by_source", "weights_by_source"):
        assert again[key] == row[key]


def test_an_evaluation_that_is_made_again_counts_once_and_none_at_the_end():
    """A stop after the losses were seen, as while tasks are scored, lets the next start evaluate the same step."""
    batches = type("Batches", (), {"change": lambda self, *change: changes.append(change)})()
    rule, changes = OnlineRule(every_steps=2, score="raw"), []
    mixing = Mixing(rule, batches, {"a": 1, "b": 3}, {})
    assert mixing.observe(0, {"a": 2.0, "b": 2.0, "validation": 2.0}, 8) == {
        "weights_by_source": {"a": 0.25, "b": 0.75}
    }
    for step in (0, 1, 2, 2, 3, 4, 8):
        mixing.observe(step, {"a": 2.0, "b": 1.0}, 8)
    assert [step for step, _ in changes] == [2, 4] and changes[-1][1] == mixing.weights
    again = Mixing(rule, batches, {"a": 1, "b": 3}, {})
    again.restore(mixing.state())
    again.observe(4, {"a": 2.0, "b": 1.0}, 8)
    assert changes[2:] == changes[:2] and again.weights == mixing.weights


@pytest.mark.parametrize("step", [4, 6])
def test_a_killed_run_goes_on_from_its_checkpoint_in_the_same_bits(mixed, step, tmp_path):
    """From a checkpoint between two changes, and from that of a step at which the weights change."""
    _, whole = mixed("checkpoint.keep_steps=[4,6]", runs="whole")
    folder = tmp_path / "runs" / "default" / whole.name
    shutil.copytree(whole, folder)
    (folder / "result.json").unlink()
    for path in (folder / "checkpoints").iterdir():
        if path.name > f"step-{step:08d}":
            shutil.rmtree(path)
    state = load_latest(folder / "checkpoints").state["mixing"]
    assert [change["step"] for change in state["changes"]] == [3, 6][: step // 3]
    again, resumed = mixed("checkpoint.keep_steps=[4,6]")
    assert resumed == folder and again["restarts"] == 1
    assert_same_bits(whole, folder)


def test_a_run_that_begins_from_another_goes_on_with_its_weights(mixed):
    """Also from a step at which the weights change, and as the same run, from a parent that ends there."""
    _, whole = mixed("checkpoint.keep_steps=[8]", runs="whole")
    _, parent = mixed("budget.steps=9", "schedule.steps=12", "checkpoint.keep_steps=[8]")
    assert list(path_of(parent))[-1] == 9 and path_of(parent)[9] == path_of(parent)[6]
    for words in (["start.step=8"], ["start.step=9"], ["start.step=9", "start.same_run=true"]):
        _, child = mixed(f"start.run={parent}", *words, runs=f"child{len(words)}{words[0][-1]}")
        first = int(words[0].partition("=")[2])
        assert path_of(child).pop(first) == path_of(whole)[first - first % 3]
        assert [path_of(child)[step] for step in (9, 10, 12)] == [path_of(whole)[step] for step in (9, 10, 12)]
        losses = [[line["train_loss"] for line in metrics(f) if line["step"] > first] for f in (whole, child)]
        assert losses[0] == losses[1] and losses[0]
    row, child = mixed(f"start.run={parent}", "start.step=8", ONLINE.replace("eta:3", "eta:1"), runs="other")
    assert path_of(child)[8] == {"a": 0.5, "b": 0.5} != path_of(child)[9]  # with another rule it begins anew
    with pytest.raises(ConfigError, match=r"evaluation\.tokens was .* and data\.online follows the losses on them"):
        mixed(f"start.run={parent}", "start.step=8", "start.same_run=true", "evaluation.tokens=512", runs="tokens")


def test_two_processes_choose_the_weights_of_one(mixed, tmp_path, data_dir, python):
    row, folder = mixed()
    spread = [*WORDS, ONLINE, f"runs_dir={tmp_path / 'two'}", f"data_dir={data_dir}", "parallelism=ddp"]
    launched = [python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHON_EXEC": python}
    command = [*launched, "-m", "scaling_testbed.train", *spread]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr
    other = tmp_path / "two" / "default" / folder.name
    found = json.loads((other / "result.json").read_text())
    assert found["world_size"] == 2 and found["tokens_by_source"] == row["tokens_by_source"]
    assert path_of(other) == {step: pytest.approx(weights, abs=2e-6) for step, weights in path_of(folder).items()}
    assert found["val_loss"] == pytest.approx(row["val_loss"], rel=1e-6)


def test_an_excess_counts_from_the_losses_of_a_reference_run(mixed, tmp_path):
    reference, parent = mixed(runs="reference", online=None)
    words = f"data.online={{every_steps:3,eta:3,over:{{a:'{parent}',b:1.5}}}}"
    _, folder = mixed(online=words)
    known = load_latest(folder / "checkpoints").state["mixing"]["over"]
    assert known == {"a": reference["val_loss_by_set"]["a"], "b": 1.5}
    for more, says in (
        (["batch.sequence_length=8"], "has losses on sequences of 16 tokens, and this run has batch.sequence_length=8"),
        ([SOURCES.replace("a:{name:markov,", "a:{name:markov,seed:1,")], "was trained on other data than this mixture"),
        ([f"data.online.over.a={tmp_path}"], "is no folder of a finished run"),
    ):
        with pytest.raises(ConfigError, match=says):
            mixed(*more, runs="refused", online=words)


def test_a_run_is_not_continued_over_another_loss_of_its_reference(mixed):
    reference, parent = mixed(runs="reference", online=None)
    words = f"data.online={{every_steps:3,over:{{a:'{parent}'}}}}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "Interrupts", lambda: StopAt(30))
        assert mixed(online=words)[0]["status"] == "preempted"
    reference["val_loss_by_set"]["a"] += 0.1
    (parent / "result.json").write_text(json.dumps(reference))
    with pytest.raises(UserError, match=r"data\.online\.over: the loss for a was .* and is .* now"):
        mixed(online=words)


def test_a_source_that_cannot_fill_its_largest_share_is_refused_at_the_start(mixed):
    short = SOURCES.replace("vocab_size:32,n_tokens:20000", "vocab_size:32,n_tokens:100")  # 6 sequences
    assert mixed(short, "budget.steps=1", online=None)[0]["status"] == "finished"
    with pytest.raises(UserError, match="give 6 sequences of 16, too few for one training batch of 8"):
        mixed(short)
