"""Figures for papers and pages. Only this module imports matplotlib.

A colour scale shows the size, a line style with a marker shows the condition, and a cross in the colour of its curve
shows a diverged run.
"""

import io
import math
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scaling_testbed.errors import UserError
from scaling_testbed.files import write_bytes

DASHES = ("-", "--", ":", "-.", (0, (5, 1)), (0, (1, 1)))
MARKERS = "os^DvPX*<>ph"
# Okabe and Ito's colours without the pale ones, for lines without a size; colour-blind readers can distinguish them.
PLAIN = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#000000")
LONGEST_LABEL = 40
PANEL_INCHES = (4.2, 4.2)
LEGEND_INCHES, LEGEND_LINE_INCHES = 0.46, 0.16  # from the axes to the first line of the legend, and between its lines
IN_A_ROW = 4  # panels
SETTINGS: dict[Any, Any] = {
    "font.size": 9,
    "font.family": "sans-serif",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.frameon": False,
    "legend.fontsize": 7.5,
    "lines.linewidth": 1.4,
    "lines.markersize": 4.5,
    "svg.fonttype": "none",
    "svg.hashsalt": "scaling-testbed",  # the same rows give the same file
}


@dataclass(frozen=True, kw_only=True)
class Line:
    """Points (x, y), joined by a line if `joined` is true.

    n_params: the value on the colour scale. style: the index of the line style; the legend shows `label` beside it.
    crosses: for each point, whether its run diverged. band: lower and upper y. x_bars: for each point, the smallest and
    largest x.
    """

    x: Sequence[float]
    y: Sequence[float]
    label: str = ""
    n_params: float | None = None
    style: int = 0
    color: int | None = None
    crosses: Sequence[bool] = ()
    band: tuple[Sequence[float], Sequence[float]] | None = None
    x_bars: Sequence[tuple[float, float]] = ()
    joined: bool = True
    markers: bool = True
    hollow: bool = False


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One pair of axes.

    levels: horizontal lines (y, label). y_range: the visible range, None for all. color_name: the name of the quantity
    on the colour scale, e.g. "N" or "lr"; its values are the lines' n_params.
    """

    lines: Sequence[Line]
    x_label: str
    y_label: str
    title: str = ""
    x_log: bool = True
    y_log: bool = False
    levels: Sequence[tuple[float, str]] = field(default_factory=list)
    y_range: tuple[float, float] | None = None
    color_name: str = "N"


def save(panels: Sequence[Panel], files: Sequence[Path]) -> list[Path]:
    """Write the panels, four in a row, to each file: .png (200 dots per inch) or .svg. Returns the paths. Raises
    UserError if one cannot be written; what was there stays."""
    figure, context = _draw(panels)
    with context:
        for path in files:
            kind, content = path.suffix.removeprefix("."), io.BytesIO()
            figure.savefig(content, format=kind, dpi=200, metadata={"Date": None} if kind == "svg" else None)
            write_bytes(path, content.getvalue())
    return list(files)


def inline_svg(panel: Panel, name: str) -> str:
    """One panel as an <svg> element for a page. name: a prefix that makes its ids unique on the page."""
    figure, context = _draw([panel])
    buffer = io.StringIO()
    with context:
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    svg = buffer.getvalue()
    svg = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{name}-", svg[svg.index("<svg") :])
    return re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)


def compact(value: float, flops: bool = False) -> str:
    """A short text of a number: 98.6k or 2.4M for parameters, 1e11 for FLOPs, 3e-4 for a learning rate."""
    if value >= 1e12 or 0 < value < 1 or flops:
        digits, _, power = f"{value:.2e}".partition("e")
        return f"{float(digits):g}e{int(power)}"
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= 0.9995 * unit:  # rounds to 1.00 unit with three digits
            return f"{value / unit:.3g}{name}"
    return f"{value:g}"


def _draw(panels: Sequence[Panel]):
    """A figure of the panels, and the context of settings in which it must be saved."""
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("figures need matplotlib: pip install -e '.[analysis]'") from None
    with rc_context(SETTINGS):
        rows = -(-len(panels) // IN_A_ROW)
        columns = -(-len(panels) // rows)
        height = PANEL_INCHES[1] + LEGEND_LINE_INCHES * max(0, *(_legend_lines(panel) - 3 for panel in panels))
        figure = Figure(figsize=(PANEL_INCHES[0] * columns, height * rows), layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False).flatten()
        for panel, axes in zip(panels, grid, strict=False):
            _draw_panel(panel, axes)
        for axes in grid[len(panels) :]:
            axes.remove()
    return figure, rc_context(SETTINGS)


def _draw_panel(panel: Panel, axes) -> None:
    sizes = _sizes(panel)
    scale = _color_scale([line.n_params for line in panel.lines if line.n_params is not None])
    for line in panel.lines:
        sized = sizes and line.n_params is not None
        _draw_line(line, axes, scale(line.n_params) if sized else PLAIN[_color(line) % len(PLAIN)])
    for value, name in panel.levels:
        axes.axhline(value, color="0.35", linewidth=0.9, linestyle=(0, (2, 2)))
        axes.annotate(
            _plain(name), (0.01, value), xycoords=("axes fraction", "data"), va="bottom", fontsize=7, color="0.25"
        )
    axes.set_xscale("log" if panel.x_log else "linear")
    axes.set_yscale("log" if panel.y_log else "linear")
    if panel.y_range:
        axes.set_ylim(*panel.y_range)
    axes.set(xlabel=_plain(panel.x_label), ylabel=_plain(panel.y_label))
    axes.set_title(_plain(panel.title), fontsize=9, loc="left")
    _ticks(panel, axes)
    axes.grid(True, which="major", linewidth=0.4, color="0.9")
    axes.set_axisbelow(True)
    _legends(panel, axes, scale)


def _draw_line(line: Line, axes, color) -> None:
    axes.plot(line.x, line.y, color=color, **_look(line))
    if line.band is not None:
        axes.fill_between(line.x, *line.band, color=color, alpha=0.15, linewidth=0)
    for y, (low, high) in zip(line.y, line.x_bars, strict=False):
        axes.plot([low, high], [y, y], color=color, linewidth=0.9, alpha=0.6)
    bad = [(x, y) for x, y, cross in zip(line.x, line.y, line.crosses, strict=False) if cross]
    if bad:
        axes.plot(*zip(*bad, strict=True), linestyle="none", marker="x", markersize=8, color=color, markeredgewidth=1.6)


def _look(line: Line) -> dict:
    """The arguments of a line style, for the plot and the legend: 70 styles differ with markers, 5 without."""
    marker = MARKERS[(line.style + line.style // len(MARKERS)) % len(MARKERS)] if line.markers else ""
    look = {"marker": marker, "linestyle": DASHES[line.style % len(DASHES)] if line.joined else "none"}
    return look | ({"markerfacecolor": "white"} if line.hollow else {})


def _plain(text: str) -> str:
    """The text with dollar signs escaped, so that they start no formula, and a long label split into lines."""
    lines = [""]
    for part in text.replace("$", r"\$").split(", "):
        fits = not lines[-1] or len(lines[-1]) + len(part) <= LONGEST_LABEL
        lines = [*lines[:-1], f"{lines[-1]}, {part}" if lines[-1] else part] if fits else [*lines, part]
    return ",\n".join(lines)


def _color(line: Line) -> int:
    return line.style if line.color is None else line.color


def _color_scale(values: Sequence[float]):
    """A function from the number of parameters to a colour: viridis over the logarithm, without its pale end."""
    from matplotlib import colormaps

    low, high = (math.log(end) if end else 0.0 for end in (min(values, default=1), max(values, default=1)))
    return lambda n: colormaps["viridis"](0.88 * (math.log(n) - low) / (high - low) if high > low else 0.4)


def _ticks(panel: Panel, axes) -> None:
    """Set the ticks: the measured x values if there are few, otherwise decades, with subdivisions on a short axis."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter

    measured = [line for line in panel.lines if line.markers]
    values = _merged(sorted({x for line in measured for x in line.x}))
    if panel.x_log and 0 < len(values) <= 8:
        axes.xaxis.set_major_locator(FixedLocator(values))
        axes.xaxis.set_minor_locator(FixedLocator([]))
    if panel.x_log:
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: compact(x, "FLOPs" in panel.x_label)))
        axes.xaxis.set_minor_formatter(NullFormatter())
    if panel.y_log:
        low, high = axes.get_ylim()
        if high / low < 100:
            axes.yaxis.set_major_locator(
                LogLocator(subs=(1, 2, 3, 5) if high / low > 3 else (1, 1.5, 2, 3, 4, 5, 6, 8))
            )
            axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
            axes.yaxis.set_minor_formatter(NullFormatter())


def _legends(panel: Panel, axes, scale) -> None:
    """Draw the legends below the axes: conditions by line style, the meaning of a cross, then sizes by colour."""
    from matplotlib.lines import Line2D
    from matplotlib.transforms import ScaledTranslation

    def below(inches):  # in inches, because the height of the axes depends on the legend
        return axes.transAxes + ScaledTranslation(0, -inches, axes.figure.dpi_scale_trans)

    sizes = _sizes(panel)
    named = {line.label: line for line in panel.lines if line.label}
    handles = []
    for name, line in named.items():
        color = "0.3" if sizes else PLAIN[_color(line) % len(PLAIN)]
        handles.append(Line2D([], [], color=color, label=_plain(name), **_look(line)))
    if any(any(line.crosses) for line in panel.lines):
        handles.append(Line2D([], [], color="0.3", marker="x", linestyle="none", label="diverged"))
    shown = [Line2D([], [], color=scale(n), label=f"{panel.color_name}={compact(n, panel.color_name == 'C')}")
             for n in thinned(sizes)]  # fmt: skip
    columns = _columns(named)
    place = {"loc": "upper left", "borderaxespad": 0.0, "handlelength": 2.6, "columnspacing": 1.2}
    place, inches = {**place, "bbox_to_anchor": (0.0, 0.0)}, LEGEND_INCHES
    if handles:
        first = axes.legend(handles=handles, bbox_transform=below(inches), ncols=columns, **place)
        if shown:
            axes.add_artist(first)  # otherwise the second legend would replace it
        inches += LEGEND_LINE_INCHES * (_legend_lines(panel) - -(-len(shown) // 4)) + 0.03
    if shown:
        axes.legend(handles=shown, bbox_transform=below(inches), ncols=4, **{**place, "handlelength": 1.2})


def _columns(names: Collection[str]) -> int:
    """The number of columns of a legend below one panel."""
    return 1 if max(map(len, names), default=0) > 24 else 2


def _legend_lines(panel: Panel) -> int:
    """The number of lines of text below the axes."""
    names = list(dict.fromkeys(line.label for line in panel.lines if line.label))
    names += ["diverged"] if any(any(line.crosses) for line in panel.lines) else []
    lines = sum(_plain(name).count("\n") + 1 for name in names)
    return -(-lines // _columns(names)) + -(-len(thinned(_sizes(panel))) // 4)


def _sizes(panel: Panel) -> list[float]:
    """The sizes on the colour scale; empty if all styles have one size, because colours then show the styles."""
    sizes = _merged(sorted({line.n_params for line in panel.lines if line.n_params is not None}))
    return sizes if len(sizes) > 1 or len({line.style for line in panel.lines}) == 1 else []


def _merged(values: Sequence[float]) -> list[float]:
    """The sorted values without those within five percent of the previous one, e.g. a size with and without gains."""
    kept: list[float] = []
    for value in values:
        if not kept or value > 1.05 * kept[-1]:
            kept.append(value)
    return kept


def thinned(sizes: Sequence[float], most: int = 8) -> list[float]:
    """At most `most` of the sizes, including both ends."""
    if len(sizes) <= most:
        return list(sizes)
    return [sizes[round(i * (len(sizes) - 1) / (most - 1))] for i in range(most)]
