"""What a verb answers with: one JSON document, tables for a person, and the files that --out names."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scaling_testbed.errors import ConfigError
from scaling_testbed.row_files import ENDINGS, FIGURES, PAGE, one_per_line, write_rows

if TYPE_CHECKING:
    from scaling_testbed.analysis.figures.drawing import Panel

Records = Sequence[Mapping[str, Any]]


def check(out: Sequence[Path], endings: Sequence[str], read: Sequence[Path] = ()) -> None:
    """Before anything is computed: refuse a file of another ending, or one that is read, and make the files' folders.
    Raises ConfigError, and UserError for a folder that cannot be made."""
    from scaling_testbed import tables

    for path in out:
        if path.suffix not in endings:
            known = ", ".join(endings)
            raise ConfigError(f"--out {path}: the ending says the format and must be one of {known}")
        tables.check_out(path, read)
    for path in out:
        tables.prepare(path.parent)


def write(
    out: Sequence[Path],
    records: Records,
    *,
    document: Any = None,
    indent: int | None = None,
    draw: Callable[[], Sequence[Panel]] | None = None,
    page: Callable[[Path], None] | None = None,
) -> list[Path]:
    """Write each file of `out`: records as a table; `document`, where there is one, as .json; what `draw` returns as
    figures; with `page` an HTML page. Raises UserError naming the file that cannot be written."""
    from scaling_testbed.files import write_text

    figures = [path for path in out if path.suffix in FIGURES]
    for path in out:
        if path.suffix in PAGE:
            assert page is not None, "`check` refuses a page of a verb that has none"
            page(path)
        elif path.suffix == ".json" and document is not None:
            write_text(path, json.dumps(document, indent=indent) + "\n")
        elif path.suffix in ENDINGS:
            write_rows(path, records)
    if figures:
        from scaling_testbed.analysis.figures import drawing

        assert draw is not None, "`check` refuses a figure of a verb that has none"
        drawing.save(draw(), figures)
    return list(out)


def print_json(value: Any) -> None:
    """One JSON document; a list with an entry on each line."""
    print(one_per_line(value) if isinstance(value, list) else json.dumps(value))


def say_written(paths: Sequence[Path]) -> None:
    """Where the files are, if there are any."""
    if paths:
        print(f"wrote {', '.join(map(str, paths))}")
