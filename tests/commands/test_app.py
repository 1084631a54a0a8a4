"""The command line that typed functions make: help, suggestions, exit statuses, completion, one line for a mistake."""

import inspect
import os
import subprocess
import sys

import pytest
import typer

from scaling_testbed import __main__ as entry
from scaling_testbed import analyze, export, sweep
from scaling_testbed.commands import app
from scaling_testbed.errors import ConfigError, UserError
from tests.test_architecture import ROOT, modules_loaded_by

VERBS = {
    analyze: "lr_sensitivity instability decide report inspect curvature score compare "
    "pass_at margins probe exposure in_context score_documents select_documents prepare_targets "
    "fit laws predict allocate next downstream frontier ladder optima anneal critical_batch",
    sweep: "plan run submit retry status collect sync",
}
EACH = [(door, verb) for door, verbs in VERBS.items() for verb in verbs.split()]


def params(door, verb):
    """The parameters of a verb as typer has them, by option or argument."""
    command = typer.main.get_command(door.app)
    return {name: one for one in command.commands[verb].params for name in one.opts}


@pytest.mark.parametrize(("door", "verb"), EACH)
def test_each_verb_helps_in_plain_text_and_says_what_each_option_is(door, verb, capsys):
    assert door.main([verb, "--help"]) == door.main([verb, "-h"]) == 0
    out = capsys.readouterr().out
    assert "Usage:" in out and f" {verb} " in out and "─" not in out  # no boxes
    assert all(one.help for name, one in params(door, verb).items() if name != "--help")
    assert all(name in out for name in params(door, verb) if name.startswith("--"))


def test_an_option_means_the_same_wherever_it_is_taken():
    """By its help; --out says for each verb what the endings hold, and --dry-run what it does instead."""
    found = {}
    for door, verb in EACH:
        for name, one in params(door, verb).items():
            if name.startswith("--") and name not in ("--out", "--dry-run", "--launcher"):
                found.setdefault(name, set()).add((one.help, one.metavar))
    assert {name: meanings for name, meanings in found.items() if len(meanings) > 1} == {}
    assert {"--where", "--size", "--json", "--hold-out", "--step"} <= set(found)


@pytest.mark.parametrize(
    ("door", "arguments", "said"),
    [
        (analyze, ["fitt", "x"], "there is no command 'fitt'; did you mean fit?"),
        (analyze, ["xyzzy"], "there is no command 'xyzzy'; it is one of lr_sensitivity, instability"),
        (analyze, [], "give a command: one of lr_sensitivity, instability"),
        (analyze, ["law", "lst"], "there is no command 'lst'; did you mean list?"),
        (analyze, ["fit", "x", "--hold-otu", "y"], "fit: there is no option --hold-otu; did you mean --hold-out?"),
        (analyze, ["fit", "x", "--xyzzy"], "fit: there is no option --xyzzy; --help lists the options"),
        (analyze, ["allocate", "x"], "allocate: missing option '--flops'"),
        (analyze, ["fit", "x", "--law"], "option '--law' requires an argument"),
        (analyze, ["fit", "x", "--law", "chinchilla", "--starts", "many"], "fit: invalid value for '--starts'"),
        (analyze, ["fit", "x", "y", "--law", "chinchilla"], "fit: got unexpected extra argument"),
        (analyze, ["fit", "", "--law", "chinchilla"], "the argument after fit is blank; is a variable"),
        (export, ["x", " "], "the argument after x is blank"),
        (export, ["x"], "missing argument 'OUT_DIR'"),
        (sweep, ["pln"], "there is no command 'pln'; did you mean plan?"),
        (sweep, ["run", "--worker", "2"], "run: there is no option --worker; did you mean --workers?"),
        (entry, ["trian"], "there is no command 'trian'; did you mean train?"),
        (entry, ["export", "x", "y", "--plugins", "nope"], "plug-in nope: there is no module nope"),
        (entry, ["analyze", "fitt"], "there is no command 'fitt'; did you mean fit?"),
    ],
)
def test_a_mistake_is_one_line_with_what_to_type(door, arguments, said, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["scaling-testbed", *arguments])
    assert (door.main() if door is entry and arguments else door.main(arguments)) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ") and said in printed.err and len(printed.err.splitlines()) == 1
    assert printed.out == ""


@pytest.mark.parametrize(
    ("raised", "status"),
    [
        (None, 0),
        (75, 75),
        (UserError("a"), 1),
        (ConfigError("a"), 2),
        (KeyboardInterrupt(), 130),
        (BrokenPipeError(), 141),
    ],
)
def test_a_verb_ends_with_the_status_of_what_happened(raised, status, capfd):
    def verb() -> int | None:
        """A verb."""
        if isinstance(raised, BaseException):
            raise raised
        return raised

    def other() -> None:
        """Another."""

    saved = os.dup(1)  # a broken pipe takes stdout away
    try:
        assert app.run(app.application("Verbs.", [verb, other]), ["verb"], "name") == status
    finally:
        os.dup2(saved, 1)


def test_an_error_of_the_program_keeps_its_traceback():
    def verb() -> None:
        """A verb."""
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        app.run(app.application("One verb.", [verb]), [], "name")


def test_a_verb_is_a_plain_function_with_types(tmp_path, capsys):
    from scaling_testbed.commands.laws import list_

    list_(as_json=True, out=[tmp_path / "laws.csv"])
    assert capsys.readouterr().out.startswith("[") and (tmp_path / "laws.csv").read_text().startswith("law,formula")
    for door, verb in EACH:
        commands = {info.callback.__name__.rstrip("_"): info.callback for info in door.app.registered_commands}
        command = commands[verb]
        signature = inspect.signature(command)
        assert all(one.annotation is not one.empty for one in signature.parameters.values()), verb
        assert command.__doc__


def test_help_loads_nothing_that_takes_time():
    for arguments in (["--help"], ["fit", "--help"]):
        loaded = modules_loaded_by(f"from scaling_testbed.analyze import main\nassert main({arguments}) == 0")
        assert not loaded & {"torch", "numpy", "hydra", "pandas", "scipy", "matplotlib"}


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("ana", {"analyze"}),
        ("", {"train", "prepare", "sweep", "analyze", "evaluate", "lm_eval", "export", "sample"}),
        ("analyze fr", {"frontier"}),
        ("sweep st", {"status"}),
        ("analyze fit --hold", {"--hold-out"}),
        ("analyze fit rows.csv --law kaplan_n", {"kaplan_n", "kaplan_nd"}),
        ("analyze fit rows.csv --size n_params_no_", {"n_params_no_input_embedding", "n_params_no_qk_gains"}),
    ],
)
def test_a_shell_is_offered_what_fits(typed, offered, python):
    words = f"scaling-testbed {typed}"
    asked = {
        "_SCALING_TESTBED_COMPLETE": "complete_bash",
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split()) - 1),
    }
    if not typed:
        asked["COMP_CWORD"] = "1"
    command = [python, "-m", "scaling_testbed"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | asked, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "") and set(done.stdout.split()) == offered


def test_the_script_for_completion_is_printed_for_the_shell_that_asks():
    """Of a child of bash, which is how the shell is told."""
    command = f"{sys.executable} -m scaling_testbed --show-completion; true"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert "_SCALING_TESTBED_COMPLETE=complete_bash" in done.stdout and "complete " in done.stdout


def test_hydras_doors_take_all_that_is_typed_behind_them(monkeypatch):
    taken = []
    monkeypatch.setattr(entry.importlib, "import_module", lambda name: taken.append(name) or sys.modules[__name__])
    monkeypatch.setattr(sys.modules[__name__], "main", lambda words: taken.append(words) or 75, raising=False)
    typed = ["model=nano_s", "--cfg", "job", "-m", "--help", "--", "+a=b"]
    monkeypatch.setattr(sys, "argv", ["scaling-testbed", "train", *typed])
    assert entry.main() == 75
    assert taken == ["scaling_testbed.train", typed]
