"""One renderer of tables: it cuts no column at the left of a narrow terminal, and takes no value for markup."""

import pytest
from rich.console import Console

from scaling_testbed import tables


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


def test_brackets_in_a_value_are_text(capsys):
    assert printed(tables.table(["[b]key[/b]"], [["[red]value[/red]"]]), 80) == ["[b]key[/b]      ", "[red]value[/red]"]
    tables.show([{"name": "[/src]*.py", "n": 12345, "empty": None}])
    assert [line.split() for line in capsys.readouterr().out.splitlines()] == [["name", "n"], ["[/src]*.py", "12,345"]]
