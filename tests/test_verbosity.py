"""How much a command prints: -q leaves warnings, errors and the result, and -v adds details."""

import io
import logging

import pytest

from scaling_testbed import progress
from scaling_testbed.commands.doors import without_verbosity
from scaling_testbed.prepare import main as prepare
from scaling_testbed.progress import DETAIL, RESULT, VERBOSITY, Progress, for_workers, say, verbosity
from scaling_testbed.train import main as train
from tests.sweeps.conftest import data_dir, door  # noqa: F401

TINY = [
    *("data=markov", "data.n_tokens=20000", "data.n_validation_tokens=4000", "batch.sequences=8", "model=bigram"),
    *(
        "batch.sequence_length=16",
        "budget.steps=4",
        "evaluation.tokens=1024",
        "compute.threads=1",
        "compute.device=cpu",
    ),
]


def spoken(level):
    with verbosity(level):
        say("detail", level=DETAIL)
        say("line")
        say("warning", errors=True)
        say("result", level=RESULT)


@pytest.mark.parametrize(
    ("level", "out"), [("quiet", ["result"]), ("normal", ["line", "result"]), ("verbose", ["detail", "line", "result"])]
)
def test_a_level_prints_what_is_at_least_as_important(capsys, level, out):
    spoken(level)
    printed = capsys.readouterr()
    assert printed.out.splitlines() == out and printed.err == "warning\n"


def test_without_a_flag_the_variable_counts_and_a_level_ends_with_its_command(capsys, monkeypatch):
    monkeypatch.setenv(VERBOSITY, "quiet")
    spoken(None)
    assert capsys.readouterr().out == "result\n"
    spoken("normal")
    assert capsys.readouterr().out == "line\nresult\n"
    monkeypatch.setenv(VERBOSITY, "loud")
    with verbosity("quiet"):  # as who calls `main` from Python may set it
        spoken(None)
    assert capsys.readouterr().out == "result\n"
    assert logging.getLogger("scaling_testbed").level == logging.INFO


@pytest.mark.parametrize("level", ["quiet", "normal", "verbose"])
def test_workers_inherit_the_level(level):
    with verbosity(level):
        assert for_workers() == {VERBOSITY: level}


def test_flags_are_found_among_the_words():
    assert without_verbosity(["-q", "model=a"]) == (["model=a"], "quiet")
    assert without_verbosity(["model=a", "--verbose", "-m"]) == (["model=a", "-m"], "verbose")
    assert without_verbosity(["model=-v"]) == (["model=-v"], None)


@pytest.mark.parametrize("main", [train, prepare])
def test_less_and_more_together_are_one_line(main, capsys):
    assert main(["-q", "model=a", "-v"]) == 2
    assert capsys.readouterr().err == "error: give -q or -v, not both\n"


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_quiet_command_shows_no_bar_and_its_warnings(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(progress.sys, "stdout", terminal)
    with verbosity("quiet"):
        shown = Progress()
        shown.start(10)
        assert not shown.has_bar
        shown.say("a line")
        shown.say("a warning", progress.WARNING)
        shown.close()
    assert terminal.getvalue() == "a warning\n"


def test_a_detail_is_not_shown_beside_a_bar(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(progress.sys, "stdout", terminal)
    shown = Progress()
    shown.start(10)
    shown.say("a line")
    shown.say("a detail", DETAIL)
    shown.close()
    assert "a line" in terminal.getvalue() and "a detail" not in terminal.getvalue()


def test_a_run_says_as_much_as_it_is_asked_for(tmp_path, data_dir, capsys):  # noqa: F811
    def printed(name, *flags):
        places = [
            f"runs_dir={tmp_path}",
            f"data_dir={data_dir}",
            f"name={name}",
            "logging.line_every_steps=1",
            "logging.every_steps=1",
        ]
        assert train([*TINY, *places, *flags]) == 0
        return capsys.readouterr().out

    normal, quiet, verbose = printed("normal"), printed("quiet", "-q"), printed("verbose", "-v")
    assert "step 2/4" in normal and "step 2/4" in verbose and "step" not in quiet.split("val")[0]
    assert len(quiet.splitlines()) == len(train_result(tmp_path / "quiet").splitlines())
    assert "memory of a process by the estimate" in verbose and "CPU threads" in verbose
    assert "the corpus was prepared before, in" in verbose and "the corpus was prepared" not in normal
    assert "the estimate" not in normal


def train_result(folder):
    import json

    from scaling_testbed.runs.row import describe_row

    (path,) = folder.glob("*/result.json")
    return describe_row(json.loads(path.read_text()), path.parent)


def test_a_preparation_that_is_quiet_describes_the_corpus_alone(tmp_path, capsys):
    words = ["data=markov", "data.n_tokens=20000", "data.n_validation_tokens=4000", f"data_dir={tmp_path}"]
    assert prepare([*words, "-q"]) == 0
    first = capsys.readouterr()
    assert prepare([*words, "-v"]) == 0
    again = capsys.readouterr()
    assert first.err == "" and "the corpus was prepared before, in" in again.out
    assert again.out.endswith(first.out)


def test_a_sweep_and_its_workers_are_quiet(door, tmp_path):  # noqa: F811
    status, out, err = door("run", "-q", "model=bigram", "optimizer.lr=1e-3,1e-2")
    assert (status, err) == (0, "") and "1/2" not in out and "val" in out and "2 finished" in out
    logs = [path.read_text() for path in (tmp_path / "runs").rglob("log.txt")]
    assert len(logs) == 2 and not any("step 0/4" in log for log in logs)
    status, out, _ = door("run", "-v", "model=nano_s", "optimizer.lr=1e-3")
    assert status == 0 and "starts model=nano_s" in out or "starts" in out
    assert any(
        "memory of a process by the estimate" in path.read_text() for path in (tmp_path / "runs").rglob("log.txt")
    )


def test_both_flags_are_refused(door):  # noqa: F811
    assert "give -q or -v, not both" in door("run", "-q", "-v")[2]
    assert "--quiet applies to this machine only" in door("retry", "-q", "--launcher", "slurm")[2]
