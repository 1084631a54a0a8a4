"""One renderer of tables: it cuts no column at the left of a narrow terminal, and takes no value for markup."""

import pytest
from rich.console import Console

from scaling_testbed import tables
from scaling_testbed.errors import UserError
from scaling_testbed.progress import say


def printed(table, width):
    console = Console(width=width)
    with console.capture() as capture:
        console.print(table)
    return capture.get().splitlines()


COLUMNS, ROW = ["run_id", "left", "lr", "error"], ["abcdef123456", "1:02:03", "x" * 50, "y" * 50]


@pytest.mark.parametrize(
    ("width", "shown"),
    [
        (20, "abcdef123456  1:02:…"),
        (23, "abcdef123456  1:02:03  "),
        (40, f"abcdef123456  1:02:03  {'x' * 16}…"),
        (200, f"abcdef123456  1:02:03  {'x' * 50}  {'y' * 50}"),
    ],
)
def test_a_narrow_terminal_cuts_what_is_at_the_right(width, shown):
    head, row = printed(tables.LeftFirst(COLUMNS, [ROW]), width)
    assert row.rstrip() == shown.rstrip() and head.split() == COLUMNS[: len(shown.split())]


def test_a_table_is_whole_where_no_terminal_limits_it(capsys):
    assert "…" in printed(tables.table(COLUMNS, [ROW]), 60)[1]
    tables.show([dict(zip(COLUMNS, ROW, strict=True))])
    assert capsys.readouterr().out.splitlines()[1].split() == ROW
    names = [f"name_{number}" for number in range(200)]
    tables.show([dict.fromkeys(names, "a value of some words")])
    head, row = capsys.readouterr().out.splitlines()
    assert head.split() == names and row.count("a value of some words") == 200


NAMES = ["model", "model.qk_norm", *(f"optimizer.lr={rate}" for rate in ("1e-3", "1e-2", "1e-1"))]
ROWS = [[model, norm, "2.5511", "2.1799", "2.1654"] for model in ("nano_s", "nano_m") for norm in ("layernorm", "none")]


@pytest.mark.parametrize("width", [12, 20, 30, 40, 60, 80, 200])
@pytest.mark.parametrize(("names", "rows"), [(NAMES, ROWS), (COLUMNS, [ROW, ROW]), (["one"], [["x" * 100]])])
def test_a_terminal_of_any_width_shows_every_value_and_name_whole(names, rows, width):
    lines = printed(tables.Whole(names, rows), width)
    assert max(map(len, lines)) <= width and not any("…" in line for line in lines)
    packed = "".join("".join(line.split()) for line in lines)
    for text in {text for row in rows for text in row if len(text) <= width}:
        assert any(text in line.split() for line in lines)
    assert all(packed.count(letter) >= "".join(map("".join, rows)).count(letter) for letter in "xy25")


def test_a_name_that_is_too_wide_takes_several_lines_before_a_column_moves_below():
    lines = printed(tables.Whole(NAMES, ROWS), 60)
    assert [line.split() for line in lines[:3]] == [
        ["optimizer.", "optimizer.", "optimizer."],
        ["model", "model.qk_norm", "lr=1e-3", "lr=1e-2", "lr=1e-1"],
        ["nano_s", "layernorm", "2.5511", "2.1799", "2.1654"],
    ]


def test_what_has_no_room_stands_below_beside_what_tells_the_rows_apart():
    lines = [line.split() for line in printed(tables.Whole(NAMES, ROWS), 44)]
    below = lines[lines.index([]) + 1 :]
    assert below[-4:] == [[*row[:2], row[4]] for row in ROWS]


def test_text_that_may_take_several_lines_does(capsys):
    lines = printed(tables.Whole(["S", "withheld"], [["0.1", "a word " * 20]], wrapped=("withheld",)), 40)
    assert max(map(len, lines)) <= 40 and sum("word" in line for line in lines) > 3 and "" not in lines


def test_nothing_is_no_table(capsys):
    tables.show([])
    tables.show([{"empty": None}])
    assert capsys.readouterr().out == ""
    assert printed(tables.Whole(["a"], []), 20) == ["a"]


def test_brackets_in_a_value_are_text(capsys):
    assert printed(tables.table(["[b]key[/b]"], [["[red]value[/red]"]]), 80) == ["[b]key[/b]      ", "[red]value[/red]"]
    tables.show([{"name": "[/src]*.py", "n": 12345, "empty": None}])
    assert [line.split() for line in capsys.readouterr().out.splitlines()] == [["name", "n"], ["[/src]*.py", "12,345"]]


def test_nothing_that_is_shown_moves_the_cursor(capsys):
    """A log, or a row of someone else, can hold what a terminal obeys."""
    text = "red \x1b[31m\x07 größe"
    tables.show([{"error": text}])
    say(text)
    lines = capsys.readouterr().out.splitlines()
    assert [lines[1].rstrip(), lines[2], str(UserError(text))] == [r"red \x1b[31m\x07 größe"] * 3
