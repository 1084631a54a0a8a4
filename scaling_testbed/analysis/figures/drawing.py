"""Figures for papers and pages. Only this module imports matplotlib.

A colour scale shows the size, a line style with a marker shows the condition, and a cross in the colour of its curve
shows a diverged run.
"""

import io
import math
import re
import textwrap
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from scaling_testbed.analysis.figures.panel import (
    Line,
    Panel,
    Part,
    compact,
    merged,
    parts,
    sizes,
    split_by,
    thinned,
    too_wide,
    x_limits,
    y_limits,
)
from scaling_testbed.errors import UserError, check_choice
from scaling_testbed.files import write_bytes

DASHES = ("-", "--", ":", "-.", (0, (5, 1)), (0, (1, 1)))
MARKERS = "os^DvPX*<>ph"
# Okabe and Ito's colours without the pale ones, for lines without a size; colour-blind readers can distinguish them.
PLAIN = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#000000")
LONGEST_LABEL = 40
ASPECT, AXES_ASPECT = 0.85, 0.6  # the height of a panel, and about that of its axes, divided by the panel's width
EDGE = 0.03  # around a small multiple, in inches
WIDER = "interval wider than the axes"
SETTINGS: dict[Any, Any] = {
    "font.family": "sans-serif",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "scaling-testbed",  # the same rows give the same file
    "pdf.fonttype": 42,  # fonts are embedded as TrueType; publishers refuse the default, Type 3
}


@dataclass(frozen=True)
class Sheet:
    """The size of a figure. cell, small: the widths of a panel and of a small multiple, in inches. columns: the most
    panels in a row. font: in points. width: of the whole figure, in inches; None if it follows from its panels."""

    cell: float
    small: float
    columns: int
    font: float
    width: float | None = None

    @property
    def settings(self) -> dict[Any, Any]:
        small = self.font - 1
        lines = {"lines.linewidth": self.font / 6.5, "lines.markersize": self.font / 2}
        labels = {"xtick.labelsize": small, "ytick.labelsize": small, "legend.fontsize": small}
        return {**SETTINGS, "font.size": self.font, "axes.titlesize": self.font, **labels, **lines}

    @property
    def letter(self) -> float:
        """The mean width of a character in inches."""
        return 0.52 * self.font / 72


SCREEN = Sheet(cell=4.2, small=2.8, columns=3, font=9)
WIDTHS = {  # one and two columns of a paper
    "single": Sheet(cell=3.3, small=1.65, columns=1, font=7.5, width=3.3),
    "double": Sheet(cell=3.45, small=1.7, columns=3, font=7.5, width=6.9),
}


def check_width(width: str | None) -> None:
    """Raise ConfigError if a width is not one of WIDTHS."""
    if width is not None:
        check_choice("--width", width, WIDTHS)


def save(panels: Sequence[Panel], files: Sequence[Path], width: str | None = None) -> list[Path]:
    """Write the panels to each file: .png (200 dots per inch), .svg or .pdf. Returns the paths.

    width: one of WIDTHS, None for three large panels in a row. Raises UserError if a file cannot be written; what was
    there stays.
    """
    sheet = SCREEN if width is None else WIDTHS[width]
    no_date = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}
    with _style(sheet):
        figure = _draw(panels, sheet)
        for path in files:
            kind, content = path.suffix.removeprefix("."), io.BytesIO()
            figure.savefig(content, format=kind, dpi=200, metadata=no_date.get(kind))
            write_bytes(path, content.getvalue())
    return list(files)


def inline_svgs(panel: Panel, name: str) -> list[str]:
    """A panel as <svg> elements for a page: one, or one for each of its small multiples and one of their legend.

    name: a prefix that makes their ids unique on the page.
    """
    with _style(SCREEN):
        if not split_by(panel):
            return [_svg(_draw([panel], SCREEN), name)]
        drawn = _small_multiples(panel)
        drawn.append(_figure(SCREEN.cell, _legend_height(panel, SCREEN.cell, SCREEN)))
        _legend(panel, drawn[-1], SCREEN.cell, SCREEN, "upper left")
        return [_svg(figure, f"{name}-{index}") for index, figure in enumerate(drawn)]


def _small_multiples(panel: Panel) -> list[Any]:
    """A figure for each of the small multiples of a panel, with their axes at one place."""
    drawn = []
    for part in parts(panel):
        drawn.append(_figure(SCREEN.small, ASPECT * SCREEN.small, fitted=False))
        _draw_part(panel, part, drawn[-1].add_axes((0.25, 0.2, 0.7, 0.7)), SCREEN.small, SCREEN)
    _align(drawn, SCREEN.small, AXES_ASPECT * SCREEN.small)
    return drawn


def _align(figures: Sequence[Any], width: float, height: float) -> None:
    """Give the axes of small multiples one place, where no label of any of them is cut off.

    width: of a figure; height: of its axes, in inches.
    """
    for _ in range(2):  # the axes become narrower the first time, and may then have other ticks
        left, bottom, right, top = (max(gaps) for gaps in zip(*map(_gaps, figures), strict=True))
        whole = bottom + height + top
        for figure in figures:
            figure.set_size_inches(width, whole)
            figure.axes[0].set_position((left / width, bottom / whole, 1 - (left + right) / width, height / whole))


def _gaps(figure) -> list[float]:
    """The room that the labels of the only axes of a figure need beside them: left, bottom, right, top, in inches."""
    inner, outer = figure.axes[0].get_window_extent(), figure.axes[0].get_tightbbox()
    around = inner.x0 - outer.x0, inner.y0 - outer.y0, outer.x1 - inner.x1, outer.y1 - inner.y1
    return [max(0, gap) / figure.dpi + EDGE for gap in around]


def _svg(figure, name: str) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    svg = buffer.getvalue()
    svg = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{name}-", svg[svg.index("<svg") :])
    return re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)


def _style(sheet: Sheet):
    """The context of settings in which a figure must be drawn and saved."""
    try:
        from matplotlib import rc_context
    except ImportError:
        raise UserError("figures need matplotlib: pip install -e '.[analysis]'") from None
    return rc_context(sheet.settings)


def _figure(width: float, height: float, fitted: bool = True):
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained" if fitted else None)


def _draw(panels: Sequence[Panel], sheet: Sheet):
    """A figure of the panels. Rows are as wide as the figure; a row has panels, or small multiples of panels."""
    alone = sum(not split_by(panel) for panel in panels)
    columns = -(-alone // -(-alone // sheet.columns)) if alone else 1
    if alone < len(panels) or sheet.width:
        widest = sheet.columns * sheet.cell
        several = not sheet.width and any(split_by(one) and _most_in_row(one, widest, sheet) > 1 for one in panels)
        columns = sheet.columns if several else max(columns, min(2, sheet.columns))
    cell = sheet.width / columns if sheet.width else sheet.cell
    rows: list[tuple[int, list[Panel]]] = []  # for how many panels of its kind a row has room, and its panels
    for panel in panels:
        most = _most_in_row(panel, columns * cell, sheet) if split_by(panel) else columns
        fits = (
            rows and len(rows[-1][1]) < most == rows[-1][0] and bool(split_by(panel)) == bool(split_by(rows[-1][1][0]))
        )
        rows = [*rows[:-1], (most, [*rows[-1][1], panel])] if fits else [*rows, (most, [panel])]
    heights = [max(_height(panel, columns * cell / most, sheet) for panel in row) for most, row in rows]
    figure = _figure(columns * cell, sum(heights))
    places = figure.subfigures(len(rows), 1, height_ratios=heights, squeeze=False)[:, 0]
    for (most, row), place in zip(rows, places, strict=True):
        for panel, own in zip(row, place.subfigures(1, most, squeeze=False)[0], strict=False):
            _draw_panel(panel, own, columns * cell / most, sheet)
    return figure


def _most_in_row(panel: Panel, width: float, sheet: Sheet) -> int:
    """How many panels with as many small multiples as this one stand side by side."""
    return max(1, _small_columns(width, sheet) // len(parts(panel)))


def _height(panel: Panel, width: float, sheet: Sheet) -> float:
    if split_by(panel):
        columns = _small_columns(width, sheet)
        axes = -(-len(parts(panel)) // columns) * ASPECT * width / columns + 0.1 + 0.3 * bool(panel.title)
    else:
        axes = ASPECT * width
    return axes + _legend_height(panel, width, sheet)


def _small_columns(width: float, sheet: Sheet) -> int:
    return max(1, round(width / sheet.small))


def _draw_panel(panel: Panel, figure, width: float, sheet: Sheet) -> None:
    """Draw a panel, or its small multiples, with one legend."""
    found = parts(panel)
    columns = min(_small_columns(width, sheet), len(found)) if split_by(panel) else 1
    grid = figure.subplots(-(-len(found) // columns), columns, squeeze=False)
    for index, axes in enumerate(grid.flatten()):
        if index >= len(found):
            axes.remove()
            continue
        _draw_part(panel, found[index], axes, width / columns, sheet)
        if split_by(panel):  # the labels stand once; one below all of them would lie on the legend
            axes.set_ylabel("")
            axes.set_xlabel(axes.get_xlabel() if index == columns * (len(grid) - 1) else "", loc="left")
    if split_by(panel):
        high = len(grid) * AXES_ASPECT * width / columns
        figure.supylabel(_wrapped(panel.y_label, high, sheet), fontsize=sheet.font)
        if panel.title:
            figure.suptitle(_wrapped(panel.title, width, sheet), x=0.01, ha="left", fontsize=sheet.font)
    _legend(panel, figure, width, sheet, "outside lower left")


def _draw_part(panel: Panel, part: Part, axes, width: float, sheet: Sheet) -> None:
    color, limits = _colors(panel), y_limits(panel)
    for line in part.behind:
        axes.plot(line.x, line.y, color="0.88", linewidth=0.8, zorder=0)
    for line in part.lines:
        _draw_line(line, axes, color(line), limits)
    for value, name in panel.levels:
        axes.axhline(value, color="0.35", linewidth=0.9, linestyle=(0, (2, 2)))
        axes.annotate(
            _plain(name),
            (0.01, value),
            xycoords=("axes fraction", "data"),
            va="bottom",
            fontsize=sheet.font - 2,
            color="0.25",
        )
    if any(any(too_wide(line, limits)) for line in part.lines):
        axes.annotate(
            WIDER, (0.99, 0.99), xycoords="axes fraction", ha="right", va="top", fontsize=sheet.font - 2, color="0.25"
        )
    axes.set_xscale("log" if panel.x_log else "linear")
    axes.set_yscale("log" if panel.y_log else "linear")
    axes.set_xlim(*x_limits(panel))
    axes.set_ylim(*limits)
    axes.set(xlabel=_plain(panel.x_label), ylabel=_wrapped(panel.y_label, AXES_ASPECT * width, sheet))
    axes.set_title(_wrapped(part.title, width - 0.8, sheet), loc="left")
    _ticks(panel, axes, room=(width - 0.5) / sheet.letter)
    axes.grid(True, which="major", linewidth=0.4, color="0.9")
    axes.set_axisbelow(True)


def _colors(panel: Panel) -> Callable[[Line], Any]:
    """The colour of a line: that of its size, or that of its style where small multiples or one size need no scale."""
    scaled = sizes(panel) and split_by(panel) != "size"
    scale = _color_scale(panel.color_range or [line.n_params for line in panel.lines if line.n_params is not None])

    def color(line: Line):
        plain = 0 if split_by(panel) == "label" else _color(line)
        return scale(line.n_params) if scaled and line.n_params is not None else PLAIN[plain % len(PLAIN)]

    return color


def _draw_line(line: Line, axes, color, limits: tuple[float, float]) -> None:
    axes.plot(line.x, line.y, color=color, **_look(line))
    if line.band is not None:
        hidden = too_wide(line, limits)
        low, high = (
            [math.nan if wide else min(max(end, limits[0]), limits[1]) for end, wide in zip(ends, hidden, strict=True)]
            for ends in line.band
        )
        axes.fill_between(line.x, low, high, color=color, alpha=0.15, linewidth=0)
    for y, (low_x, high_x) in zip(line.y, line.x_bars, strict=False):
        axes.plot([low_x, high_x], [y, y], color=color, linewidth=0.9, alpha=0.6)
    bad = [(x, y) for x, y, cross in zip(line.x, line.y, line.crosses, strict=False) if cross]
    if bad:
        axes.plot(*zip(*bad, strict=True), linestyle="none", marker="x", markersize=8, color=color, markeredgewidth=1.6)


def _look(line: Line) -> dict:
    """The arguments of a line style, for the plot and the legend: 70 styles differ with markers, 5 without."""
    marker = MARKERS[(line.style + line.style // len(MARKERS)) % len(MARKERS)] if line.markers else ""
    look = {"marker": marker, "linestyle": DASHES[line.style % len(DASHES)] if line.joined else "none"}
    return look | ({"markerfacecolor": "white"} if line.hollow else {})


def _plain(text: str, longest: int = LONGEST_LABEL) -> str:
    """The text with dollar signs escaped, so that they start no formula, and a long label split at its commas."""
    lines = [""]
    for part in text.replace("$", r"\$").split(", "):
        fits = not lines[-1] or len(lines[-1]) + len(part) + len(", ,") <= longest
        lines = [*lines[:-1], f"{lines[-1]}, {part}" if lines[-1] else part] if fits else [*lines, part]
    return ",\n".join(lines)


def _wrapped(text: str, room: float, sheet: Sheet) -> str:
    """The text in lines that fit into so many inches."""
    longest = max(8, int(room / sheet.letter))
    return "\n".join(textwrap.fill(line, longest) for line in _plain(text, longest).split("\n"))


def _color(line: Line) -> int:
    return line.style if line.color is None else line.color


def _color_scale(values: Sequence[float]):
    """A function from the number of parameters to a colour: viridis over the logarithm, without its pale end."""
    from matplotlib import colormaps

    logs = [math.log(value) if value else 0.0 for value in values]
    low, high = min(logs, default=0.0), max(logs, default=0.0)
    return lambda n: colormaps["viridis"](
        0.88 * ((math.log(n) if n else 0.0) - low) / (high - low) if high > low else 0.4
    )


def _ticks(panel: Panel, axes, room: float) -> None:
    """Set the ticks: the measured x values if there are few, otherwise decades, with subdivisions on a short axis.

    room: for labels of the x axis, in characters.
    """
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    measured = [line for line in panel.lines if line.markers]
    values = merged(sorted({x for line in measured for x in line.x}))
    if panel.x_log and 0 < len(values) <= 8:
        low, high = axes.get_xlim()
        values = merged(values, (high / low) ** (1 / int(room / 5.5)))  # those whose labels would not overlap
        axes.xaxis.set_major_locator(FixedLocator(values))
        axes.xaxis.set_minor_locator(FixedLocator([]))
    if panel.x_log:
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: compact(x, "FLOPs" in panel.x_label)))
        axes.xaxis.set_minor_formatter(NullFormatter())
    else:
        axes.xaxis.set_major_locator(MaxNLocator(max(2, int(room / 9)), steps=(1, 2, 2.5, 5, 10)))
    if panel.y_log:
        low, high = axes.get_ylim()
        if high / low < 100:
            axes.yaxis.set_major_locator(
                LogLocator(subs=(1, 2, 3, 5) if high / low > 3 else (1, 1.5, 2, 3, 4, 5, 6, 8))
            )
            axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
            axes.yaxis.set_minor_formatter(NullFormatter())


def _handles(panel: Panel) -> list[tuple[str, dict[str, Any]]]:
    """The entries of a legend, with their looks: conditions by line style, the meaning of a cross, sizes by colour."""
    by, color = split_by(panel), _colors(panel)
    named: dict[str, Line] = {}
    for line in panel.lines:
        if line.label:
            named.setdefault(line.label, line)
    found = []
    for name, line in named.items() if by != "label" else ():
        shown = "0.3" if sizes(panel) and by != "size" else PLAIN[_color(line) % len(PLAIN)]
        found.append((_plain(name), {"color": shown, **_look(line)}))
    if any(any(line.crosses) for line in panel.lines):
        found.append(("diverged", {"color": "0.3", "marker": "x", "linestyle": "none"}))
    if by != "size":
        one = panel.lines[0] if panel.lines else None
        for index, n in enumerate(thinned(sizes(panel))):
            said = compact(n, panel.color_name == "C")
            assert one is not None, "a panel without lines has no sizes"
            said = said if index else f"{panel.color_name} = {said}"
            found.append((said, {"color": color(replace(one, n_params=n))}))
    if any(part.behind for part in parts(panel)):
        found.append(("the others", {"color": "0.88"}))
    return found


def _legend(panel: Panel, figure, width: float, sheet: Sheet, place: str) -> None:
    from matplotlib.lines import Line2D

    if entries := _handles(panel):
        handles = [Line2D([], [], label=label, **look) for label, look in entries]
        columns = _columns([label for label, _ in entries], width, sheet)
        figure.legend(handles=handles, loc=place, ncols=columns, handlelength=2.6, columnspacing=1.2)


def _columns(labels: Collection[str], width: float, sheet: Sheet) -> int:
    """The number of columns of a legend."""
    longest = max((len(part) for label in labels for part in label.split("\n")), default=0)
    handle = 4.6 * (sheet.font - 1) / 72
    return max(1, min(4, len(labels), int((width - 0.1) / (longest * sheet.letter + handle))))


def _legend_height(panel: Panel, width: float, sheet: Sheet) -> float:
    """The height of a legend in inches."""
    labels = [label for label, _ in _handles(panel)]
    lines = -(-sum(label.count("\n") + 1 for label in labels) // _columns(labels, width, sheet))
    return 0.1 + 1.55 * (sheet.font - 1) / 72 * lines
