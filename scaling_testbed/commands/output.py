"""The output of commands: one JSON document, tables on the terminal, and the files of --out."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scaling_testbed.errors import ConfigError
from scaling_testbed.row_files import ENDINGS, FIGURES, PAGE, one_per_line, write_rows

if TYPE_CHECKING:
    from scaling_testbed.analysis.figures.panel import Panel

Records = Sequence[Mapping[str, Any]]


def check(out: Sequence[Path], endings: Sequence[str], read: Sequence[Path] = ()) -> None:
    """Check the files of --out before any computation, and make their folders.

    Raises ConfigError if an ending is not allowed or a file is also read, and UserError if a folder cannot be made.
    """
    from scaling_testbed import tables

    for path in out:
        if path.suffix not in endings:
            known = ", ".join(endings)
            raise ConfigError(f"--out {path}: the file must end in one of {known}")
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
    width: str | None = None,
) -> list[Path]:
    """Write each file of `out`, in the format of its ending, and return the paths.

    Tables hold the records. A .json file holds `document`, if it is given. Figures show the panels that `draw` returns.
    `page` writes an HTML page. width: of the figures, see figures.drawing.WIDTHS. Raises UserError, which names the
    file, if it cannot be written.
    """
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
        drawing.save(draw(), figures, width)
    return list(out)


def print_json(value: Any) -> None:
    """Print one JSON document; a list has one entry per line."""
    print(one_per_line(value) if isinstance(value, list) else json.dumps(value))


def say_written(paths: Sequence[Path]) -> None:
    """Print the paths of the written files, if there are any."""
    if paths:
        print(f"wrote {', '.join(map(str, paths))}")
