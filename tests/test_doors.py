"""The command line: exit statuses, one-line errors, and what a door prints."""

import errno
import os
import shlex
import subprocess
import sys

import pytest

from scaling_testbed import __main__ as entry
from scaling_testbed import prepare
from scaling_testbed.analyze import main as analyze
from scaling_testbed.commands.doors import errors_reported
from scaling_testbed.config.search import CONFIG_DIR
from scaling_testbed.config.words import quoted
from scaling_testbed.files import MissingFile
from scaling_testbed.kernels import support
from scaling_testbed.train import main as train_main

SMALL = ["data=markov", "data.n_tokens=20000", "data.n_validation_tokens=4000", "model=nano_s", "budget.steps=2"]


@pytest.fixture
def places(tmp_path):
    return [f"runs_dir={tmp_path}/runs", f"data_dir={tmp_path}/data"]


def test_a_run_prints_its_row_and_ends_with_0_and_again_the_same(places, capsys):
    assert train_main([*SMALL, *places]) == 0
    first = capsys.readouterr().out
    assert "status           finished" in first and "entropy rate" in first and "result.json" in first
    assert train_main([*SMALL, *places]) == 0
    said, row = capsys.readouterr().out.split("\n", 1)
    assert "has finished before and is not trained again" in said and row == first[first.index("status ") :]


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (["optimizer.lrr=1"], 2),
        (["model=no_such_model"], 2),
        (["budget.tokens=10", "budget.steps=10"], 2),
        (["data=text_files", "data.files=nothing/*.txt"], None),
        (["data=text_files"], 2),
        (["--cfg", "job", "optimizer.lrr=1"], None),
        (["compute.device=cpu", "loss.impl=triton"], 2),
        (["compute.device=cpu", "model.attention_impl=triton", "model.d_head=32"], 2),
        (["compute.device=cpu", "model.qk_norm_impl=triton"], 2),
    ],
)
def test_a_mistake_is_one_or_two_lines_on_stderr_and_a_status(places, capsys, arguments, status, monkeypatch, tmp_path):
    monkeypatch.setattr(support, "INTERPRETED", False)
    try:
        found = train_main([*arguments, *places])
    except SystemExit as exit_:  # Hydra's own
        found = exit_.code
    assert found != 0 and (status is None or found == status)
    message = capsys.readouterr().err
    assert "Traceback" not in message
    assert status is None or len(message.strip().splitlines()) <= 2
    assert not (tmp_path / "data").exists()  # refused before any work


def test_a_reader_that_has_seen_enough_is_no_error(places, python):
    command = [python, "-m", "scaling_testbed.train", "--dry-run", *SMALL, *places]
    done = subprocess.run(f"{shlex.join(command)} | true", shell=True, capture_output=True, text=True)
    assert done.stderr == ""
    training = [*command[:3], *command[4:], "budget.steps=10"]
    done = subprocess.Popen(training, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    done.stdout.close()
    assert done.stderr.read() == "" and done.wait() == 0  # a run goes on to its end without its reader


def test_a_data_dir_that_cannot_be_made_is_named(places, capsys):
    assert train_main([*SMALL, places[0], "data_dir=/proc/foo"]) != 0
    assert capsys.readouterr().err.startswith("error: data_dir=/proc/foo: cannot be made")


def test_a_value_that_needs_quotes_of_its_own_is_told_so(places, capsys):
    assert train_main([*SMALL, "name=Läufe"]) == 2
    assert """write key=value, and put a value with spaces""" in capsys.readouterr().err
    assert quoted("a/b-1.5_c") == "a/b-1.5_c" and quoted('ä "b"') == '"ä \\"b\\""'


@pytest.mark.parametrize(
    ("model", "n_params"), [("proxy_5b", "4,834,147,328"), ("openlm_7b", "6,889,672,704"), ("nano_s", "26,848")]
)
def test_a_dry_run_tells_the_cost_and_leaves_nothing(places, capsys, tmp_path, model, n_params):
    extra = ["data=markov"] if model == "nano_s" else []
    assert train_main(["--dry-run", f"model={model}", "parallelism=fsdp", "batch.sequences=64", *extra, *places]) == 0
    out = capsys.readouterr().out
    assert f"parameters       {n_params} " in out and "training FLOPs" in out
    rows = [line.split() for line in out.splitlines() if line.startswith("fsdp")]
    assert [row[1] for row in rows] == ["1", "8", "64"]
    totals = [float(row[8]) for row in rows]
    assert totals[0] > totals[1] > totals[2] or model == "nano_s"
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_says_which_vocabulary_it_assumes_and_refuses_mistakes(places, capsys):
    assert train_main(["--dry-run", "tokenizer=pretrained", "tokenizer.path=none/at/all", *places]) == 0
    assert "50,432 is assumed" in capsys.readouterr().out
    assert train_main(["--dry-run", "optimizer.lrr=1"]) == 2


def test_help_lists_the_choices(capsys):
    assert train_main(["--help"]) == 0
    text = capsys.readouterr().out
    assert "model=" in text and "proxy_9m" in text and "schema" not in text
    assert "sweep=" not in text and "launcher=" not in text  # no groups of a run


def test_prepare_prints_what_is_there(places, capsys):
    assert prepare.main(["data=markov", "data.n_tokens=5000", "data.n_validation_tokens=1000", *places]) == 0
    assert "5,000 tokens" in capsys.readouterr().out


def test_the_console_command_names_its_doors_and_refuses_others(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["scaling-testbed"])
    assert entry.main() == 0
    assert "prepare" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["scaling-testbed", "trian"])
    assert entry.main() == 2
    monkeypatch.setattr(sys, "argv", ["scaling-testbed", "train", "--help"])
    assert entry.main() == 0


def test_hydras_own_options_print_the_configuration_from_any_folder(tmp_path, python):
    command = [python, "-m", "scaling_testbed.train", "--cfg", "job", "seed=7"]
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    environment = os.environ | {"PYTHONPATH": root}
    shown = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert "seed: 7" in shown.stdout and "optimizer:" in shown.stdout
    assert list(tmp_path.iterdir()) == []


def test_multirun_runs_each_and_is_refused_under_torchrun(places, tmp_path, capsys, monkeypatch):
    sweep = ["--multirun", "seed=1,2", *SMALL, *places]
    assert train_main(sweep) == 0
    assert len(list(tmp_path.glob("runs/default/*/result.json"))) == 2
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    assert train_main(sweep) == 2
    assert "--multirun" in capsys.readouterr().err


def test_help_explains_every_group_and_the_keys_of_a_launcher(capsys):
    for group in {path.parent.name for path in CONFIG_DIR.glob("*/*.yaml")} - {"sweep"}:
        assert train_main(["--help", group]) == 0 and group in capsys.readouterr().out, group
    assert train_main(["--help", "launcher.time"]) == 0
    assert "The time limit of a task" in capsys.readouterr().out
    assert train_main(["--help", "optimiser"]) == 2


@pytest.mark.fault("35", "Where memory lacks for a library or a process, one line says so.")
@pytest.mark.parametrize(
    "error, said",
    [
        (ImportError("libtorch_cpu.so: failed to map segment from shared object"), "there is too little memory here"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "there is too little memory here"),
        (OSError(errno.ENOSPC, "No space left on device"), "the output cannot be written: the disk is full"),
        (MissingFile("law.json does not exist"), "law.json does not exist"),  # an OSError too
    ],
)
def test_errors_of_the_system_are_one_line(capsys, record_property, error, said):
    with errors_reported() as found:
        raise error
    assert (found.status, capsys.readouterr().err) == (1, f"error: {said}\n")
    record_property("seen", said)


def test_only_a_run_leaves_its_errors_to_rank_0(capsys, monkeypatch):
    """Whoever types a command in the pod of rank 1 is told what is wrong with it."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert train_main(["nosuch=1"]) == 2 and capsys.readouterr().err == ""
    assert analyze(["lr_sensitivities"]) == 2 and "did you mean lr_sensitivity?" in capsys.readouterr().err
