"""Pages as single HTML files, without scripts and network resources, readable on a phone.

Values in templates are escaped, unless they are the HTML of another template or a drawing: only `render`, `link` and
`_drawings` mark texts as HTML.
"""

import functools
import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

from markupsafe import Markup

from scaling_testbed import tables
from scaling_testbed.analysis.figures.drawing import inline_svgs
from scaling_testbed.analysis.figures.panel import Panel, described, notes
from scaling_testbed.analysis.figures.words import word
from scaling_testbed.files import write_text

HERE = Path(__file__).parent
SOURCES = "Commands and files"  # the heading of what `made` returns

Section = tuple[str, Markup]  # heading as plain text, content as HTML; a section with empty content is not shown


def render(template: str, **values: Any) -> Markup:
    """The HTML of templates/NAME.html.j2. Raises jinja2.UndefinedError if a value of the template is missing."""
    return Markup(_templates().get_template(f"{template}.html.j2").render(values))


@functools.cache
def _templates():
    import jinja2

    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def write(path: Path, title: str, intro: Iterable[str], sections: Iterable[Section]) -> None:
    """Write a page of sections; title and intro are plain text. Raises UserError if it cannot be written."""
    tables.prepare(path.parent)
    style = Markup((HERE / "page.css").read_text())
    page = render("page", title=title, style=style, intro=paragraphs(intro), sections=list(sections))
    write_text(path, page + "\n")


def paragraphs(lines: Iterable[str]) -> Markup:
    """Lines of plain text, each as a paragraph."""
    return render("paragraphs", lines=lines)


def figures(panels: Sequence[Panel], names: str = "f") -> Markup:
    """Panels as drawings inside the page, each with its title, its caption and what it does not show.

    names: the prefix of their ids, which must be unique on a page.
    """
    shown = [
        (panel.title or panel.y_label, described(panel), notes(panel), _drawings(panel, f"{names}{index}"))
        for index, panel in enumerate(panels)
    ]
    return render("figures", figures=shown)


def _drawings(panel: Panel, name: str) -> list[Markup]:
    return list(map(Markup, inline_svgs(replace(panel, title=""), name)))  # the caption holds the title


def table(records: Sequence[dict], shared: bool = False) -> Markup:
    """The table of records, with its columns in words and without empty ones; empty without records.

    A value that is HTML, such as a link, stays so. shared: whether a line above the table says the values that are the
    same in all of several rows, in place of their columns.
    """
    if not records:
        return Markup()
    columns = tables.filled(records)
    if shared and len(records) > 1:
        same = [one for one in columns if all(record.get(one) == records[0].get(one) for record in records)]
        columns = [one for one in columns if one not in same]
        said = "; ".join(f"{word(one)}: {tables.cell(records[0][one])}" for one in same)
        return paragraphs([f"In all rows: {said}."] if same else []) + _table(records, columns)
    return _table(records, columns)


def _table(records: Sequence[dict], columns: Sequence[str]) -> Markup:
    rows = [[_cell(record.get(column)) for column in columns] for record in records]
    return render("table", columns=[(word(column), column) for column in columns], rows=rows)


def _cell(value: object) -> str:
    return value if isinstance(value, Markup) else tables.cell(value)


def made(command: str, facts: Sequence[tuple[str, str, bool]]) -> Markup:
    """How and when a page was made: its date, the command that makes it again, if one does, and more facts.

    facts: (name, text or link, whether the text is a command).
    """
    own = [("Made on", datetime.now(UTC).date().isoformat(), False)]
    return render("facts", facts=[*own, *([("This page", command, True)] if command else []), *facts])


def link(text: str, target: Path, page: Path) -> Markup:
    """A link from a page to a file or folder, relative to the page's folder."""
    to = quote(Path(os.path.relpath(target.resolve(), page.resolve().parent)).as_posix())
    return Markup(render("link", text=text, to=to).strip())
