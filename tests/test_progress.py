"""What a person sees of a run and of a preparation that go on."""

import ast
import io
from pathlib import Path

import pytest
from rich.console import Console

from scaling_testbed import progress
from scaling_testbed.progress import ByteProgress, Clock, RunProgress


def test_plain_lines_come_now_and_then_with_time_left_and_evaluations_always(capsys):
    shown = RunProgress(steps=100, done=0, line_every=20)
    for step in range(101):
        evaluated = {"val_loss": 3.0} if step in (0, 50, 100) else {}
        shown.update({"step": step, "train_loss": 2.5, "lr": 1e-3, "tokens_per_second": 1234.5} | evaluated)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("/")[0].split()[-1] for line in lines] == ["0", "20", "40", "50", "60", "80", "100"]
    assert "loss 2.5000" in lines[1] and "lr 1.00e-03" in lines[1] and "tokens/s 1,23" in lines[1]
    assert lines[1].endswith(" left") and "val_loss 3.0000" in lines[3]


def test_a_line_has_speed_and_memory_where_they_are_known(capsys):
    shown = RunProgress(steps=10, done=0, line_every=1)
    known = {"tokens_per_second": 1234.0, "ms_per_step": 103.75, "mfu": 0.4167, "peak_memory_bytes": 3 * 2**29}
    shown.update({"step": 10, "train_loss": 2.5} | known)
    shown.update({"step": 10, "train_loss": 2.5, "val_loss": 2.0} | dict.fromkeys(known))
    first, second = capsys.readouterr().out.splitlines()
    assert first == "step 10/10  loss 2.5000  tokens/s 1,234  ms/step 103.8  MFU 41.7%  1.50 GiB"
    assert second == "step 10/10  loss 2.5000  val_loss 2.0000"


def test_the_time_of_a_step_is_the_mean_since_it_was_last_asked_for(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    clock = Clock()

    def step(seconds):
        clock.begin_step()
        now[0] += seconds
        clock.end_step()

    step(9.0)  # it compiles
    assert clock.take_ms_per_step() is None
    step(0.25)
    now[0] += 5.0  # an evaluation
    step(0.75)
    assert clock.take_ms_per_step() == 500.0
    step(0.125)
    assert clock.take_ms_per_step() == 125.0 and clock.take_ms_per_step() is None


def test_quiet_says_nothing(capsys):
    shown = RunProgress(steps=10, done=0, line_every=1, quiet=True)
    shown.update({"step": 5, "val_loss": 1.0})
    shown.say("text")
    silent = ByteProgress("corpus", quiet=True)
    silent.start(100)
    silent.advance(50)
    assert capsys.readouterr() == ("", "")


def test_a_preparation_says_on_standard_error_how_far_it_is(capsys, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    shown = ByteProgress("corpus-bytes")
    shown.say("training the tokenizer")
    shown.start(50_000_000, done=10_000_000)
    for seconds in (5, 10, 15):  # the second is ten seconds after the start
        now[0] = 100.0 + seconds
        shown.advance(5_000_000)
    out, err = capsys.readouterr()
    assert out == "" and err.splitlines() == [
        "prepare corpus-bytes: training the tokenizer",
        "prepare corpus-bytes: 40% of 50 MB of text, 1.0 MB/s  0:30 left",
    ]


class Terminal(io.StringIO):
    """A stream that is a terminal."""

    def isatty(self):
        return True


@pytest.mark.parametrize("width", [40, 60, 120])
def test_the_time_left_comes_first_on_a_terminal_of_any_width(width):
    now = [0.0]
    console = Console(width=width, file=Terminal(), force_terminal=True, color_system=None)
    shown = progress.bar(console)
    shown.get_time = lambda: now[0]
    task = shown.add_task("", total=1000)
    text = "step  100/1000  loss 2.5000  lr 1.00e-03  tokens/s 1,234,567 [0.9,0.95]"
    for now[0] in (10.0, 20.0, 30.0):
        shown.update(task, advance=100, description=text)
    with console.capture() as capture:
        console.print(shown.get_renderable())
    (line,) = capture.get().splitlines()
    assert line.startswith("0:01:10 ") and "step  100/10" in line and len(line) <= width
    assert ("[0.9,0.95]" in line) == (width > 100)


def test_a_bar_on_a_terminal_has_lines_of_evaluations_beside_it(monkeypatch):
    stream = Terminal()
    monkeypatch.setattr(progress.sys, "stdout", stream)
    monkeypatch.setenv("TERM", "xterm")
    shown = RunProgress(steps=100, done=0, line_every=20)
    for step in range(0, 101, 10):
        shown.update({"step": step, "train_loss": 2.5} | ({"val_loss": 3.0} if step == 50 else {}))
    shown.say("[b]text[/b]")
    shown.close()
    shown.say("after")
    lines = stream.getvalue()
    assert lines.count("val_loss 3.0000") == 1 and "[b]text[/b]" in lines and lines.endswith("after\n")
    assert "step  40/100  loss 2.5000\n" not in lines


# What a run goes through. Commands may print: their output is their result, and a reader that is gone ends them.
ROOMS = (
    "model",
    "learning",
    "data",
    "diagnostics",
    "config",
    "processes",
    "runs",
    "training",
    "plugins.py",
    "files.py",
)


def test_a_run_prints_only_by_what_never_raises():
    package = Path(progress.__file__).parent
    files = [
        file
        for room in ROOMS
        for file in ([package / room] if room.endswith(".py") else (package / room).rglob("*.py"))
    ]
    assert len(files) > 60
    found = [
        f"{file.relative_to(package)}:{node.lineno}"
        for file in files
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert not found
