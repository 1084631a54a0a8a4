"""A single HTML file without scripts and without anything from the network, readable on a phone.

What is filled into the templates is escaped, unless it is the HTML of another template or of a drawing: only `render`
and `figures` say so of a text.
"""

import functools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from scaling_testbed import tables
from scaling_testbed.analysis.figures.drawing import Panel, inline_svg
from scaling_testbed.files import write_text

HERE = Path(__file__).parent

Section = tuple[str, Markup]  # heading as plain text, content as HTML, empty where there is nothing to say


def render(template: str, **values: Any) -> Markup:
    """The HTML of templates/NAME.html.j2. Raises jinja2.UndefinedError for a value that the template lacks."""
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
    """Write a page of sections; title and intro are plain text. Raises UserError where it cannot be written."""
    tables.prepare(path.parent)
    style = Markup((HERE / "page.css").read_text())
    page = render("page", title=title, style=style, intro=paragraphs(intro), sections=list(sections))
    write_text(path, page + "\n")


def paragraphs(lines: Iterable[str]) -> Markup:
    """Plain text, a paragraph a line."""
    return render("paragraphs", lines=lines)


def figures(panels: Sequence[Panel], names: str = "f") -> Markup:
    """Panels as drawings inside the page. `names` begins their ids, which a page may hold once."""
    drawings = [Markup(inline_svg(panel, f"{names}{index}")) for index, panel in enumerate(panels)]
    return render("figures", drawings=drawings)


def table(records: Sequence[dict]) -> Markup:
    """Records with their filled columns; nothing without any."""
    if not records:
        return Markup()
    columns = tables.filled(records)
    rows = [[tables.cell(record.get(column)) for column in columns] for record in records]
    return render("table", columns=columns, rows=rows)
