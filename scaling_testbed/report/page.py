"""A single HTML file without scripts and without anything from the network, readable on a phone."""

import html
from collections.abc import Iterable, Sequence
from pathlib import Path

from scaling_testbed import tables
from scaling_testbed.analysis.figures.drawing import Panel, inline_svg
from scaling_testbed.files import write_text

STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; margin: 0 auto; padding: 1rem;
  max-width: 70rem; overflow-wrap: break-word; }
h1 { font-size: 1.5rem; line-height: 1.2; margin: .5rem 0; }
h3 { font-size: 1rem; margin: 1.25rem 0 .25rem; }
h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; border-bottom: 1px solid #ddd; }
.box { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .25rem .75rem .25rem 0; border-bottom: 1px solid #eee; vertical-align: top;
  white-space: nowrap; }
th { font-weight: 600; }
td.long { min-width: 16rem; white-space: normal; }
.figures { display: flex; flex-wrap: wrap; gap: 1rem; }
figure { margin: 0; flex: 1 1 24rem; max-width: 33rem; }
figure svg { width: 100%; height: auto; }
ul.claims { list-style: none; padding: 0; }
ul.claims li { border-left: 4px solid #999; padding: .25rem .75rem; margin: .75rem 0; }
ul.claims li.agrees { border-color: #009e73; }
ul.claims li.disagrees { border-color: #d55e00; }
.verdict { font-weight: 600; } .number { font-size: .85rem; color: #444; margin: 0; }
summary { cursor: pointer; }
"""


def write(path: Path, title: str, intro: Iterable[str], sections: Iterable[tuple[str, str]]) -> None:
    """Write a page of (heading, HTML) sections; title and intro are plain text. Raises UserError where it cannot be
    written."""
    body = "".join(f"<section><h2>{heading}</h2>{content}</section>" for heading, content in sections if content)
    title = html.escape(title)
    tables.prepare(path.parent)
    write_text(
        path,
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{STYLE}</style></head><body><h1>{title}</h1>{paragraphs(intro)}{body}</body></html>\n",
    )


def paragraphs(lines: Iterable[str]) -> str:
    """Plain text, a paragraph a line."""
    return "".join(f"<p>{html.escape(line)}</p>" for line in lines)


def figures(panels: Sequence[Panel], names: str = "f") -> str:
    """Panels as drawings inside the page. `names` begins their ids, which a page may hold once."""
    drawn = "".join(f"<figure>{inline_svg(panel, f'{names}{index}')}</figure>" for index, panel in enumerate(panels))
    return f'<div class="figures">{drawn}</div>'


def table(records: Sequence[dict]) -> str:
    """Records with their filled columns; nothing without any."""
    if not records:
        return ""
    keys = tables.filled(records)
    head = "".join(f"<th>{html.escape(key)}</th>" for key in keys)
    lines = "".join("<tr>" + "".join(map(_cell, (record.get(key) for key in keys))) + "</tr>" for record in records)
    return f'<div class="box"><table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table></div>'


def _cell(value: object) -> str:
    shown = html.escape(tables.cell(value))
    return f'<td class="long">{shown}</td>' if len(shown) > 40 else f"<td>{shown}</td>"
