"""What a figure shows, as data: lines, panels and small multiples. drawing.py draws them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

MOST_LINES = 6  # in one pair of axes, of a panel that may be shown as small multiples
MOST_BANDS = 3  # the same, of curves with intervals over the same sizes
ROOM = 2.0  # intervals may add this share of the data's span to the axis, on each side
EDGE = 0.05  # between the data and the ends of an axis


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
    """One pair of axes, or small multiples of it.

    levels: horizontal lines (y, label). y_range: the visible range, None for that of the data. color_name: the name of
    the quantity on the colour scale, e.g. "N" or "lr"; its values are the lines' n_params. color_range: the ends of
    this scale, None for those of the panel; panels of one range have one colour for each value. caption: what is shown,
    in sentences. left_out: why points are not shown. split: whether a panel with more than MOST_LINES lines, or with
    more than MOST_BANDS intervals and no colour scale, becomes small multiples: one for each value on the colour scale,
    or, with as many conditions, one for each condition.
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
    color_range: tuple[float, float] | None = None
    caption: str = ""
    left_out: Sequence[str] = ()
    split: bool = False


@dataclass(frozen=True)
class Part:
    """One of the small multiples of a panel. behind: lines of the other parts, for comparison."""

    title: str
    lines: Sequence[Line]
    behind: Sequence[Line] = ()


def sizes(panel: Panel) -> list[float]:
    """The values on the colour scale; empty if all styles have one value, because colours then show the styles."""
    found = merged(sorted({line.n_params for line in panel.lines if line.n_params is not None}))
    return found if len(found) > 1 or len({line.style for line in panel.lines}) == 1 else []


def split_by(panel: Panel) -> str:
    """What the small multiples of a panel differ in: "size" (the colour scale), "label", or "" if it is not split."""
    labels = {line.label for line in panel.lines if line.label}
    many = len({(line.label, line.n_params) for line in panel.lines}) > MOST_LINES
    bands = len({line.label for line in panel.lines if line.band and line.n_params is None})
    if not panel.split or not (many or bands > MOST_BANDS):
        return ""
    return "size" if len(labels) <= MOST_LINES and len(sizes(panel)) > 1 else "label"


def parts(panel: Panel) -> list[Part]:
    """The small multiples of a panel; itself if it is not split."""
    by = split_by(panel)
    if by == "size":
        ends = [*sizes(panel)[1:], math.inf]
        name = panel.color_name
        return [
            Part(f"{name} = {compact(low)}", [line for line in panel.lines if low <= (line.n_params or 0) < end])
            for low, end in zip(sizes(panel), ends, strict=True)
        ]
    if by == "label":
        labels = dict.fromkeys(line.label for line in panel.lines)
        return [
            Part(
                label,
                [line for line in panel.lines if line.label == label],
                [line for line in panel.lines if line.label != label and line.joined],
            )
            for label in labels
        ]
    return [Part(panel.title, panel.lines)]


def described(panel: Panel) -> str:
    """The caption, with what grey lines mean where there are any."""
    grey = any(part.behind for part in parts(panel))
    return " ".join(filter(None, [panel.caption, "Grey: the curves of the other panels." * grey]))


def x_limits(panel: Panel) -> tuple[float, float]:
    """The ends of the x axis."""
    values = [x for line in panel.lines for x in (*line.x, *(end for bar in line.x_bars for end in bar))]
    return _widened(_finite(values, panel.x_log), (), panel.x_log)


def y_limits(panel: Panel) -> tuple[float, float]:
    """The ends of the y axis: those of the points, and of intervals as far as these do not dwarf the points."""
    if panel.y_range:
        return panel.y_range
    values = _finite([y for line in panel.lines for y in line.y] + [y for y, _ in panel.levels], panel.y_log)
    bands = [end for line in panel.lines if line.band for side in line.band for end in side]
    # An end at or below zero lies below any logarithmic axis.
    return _widened(values, [1e-300 if panel.y_log and end <= 0 else end for end in bands], panel.y_log)


def too_wide(line: Line, limits: tuple[float, float]) -> list[bool]:
    """For each point, whether its interval is wider than the axis."""
    low, high = line.band or ((), ())
    return [a <= limits[0] and b >= limits[1] for a, b in zip(low, high, strict=True)]


def notes(panel: Panel) -> list[str]:
    """What is not visible in the drawing: intervals wider than its axis, and the panel's own reasons."""
    limits = y_limits(panel)
    wide = [line for line in panel.lines if any(too_wide(line, limits))]
    sized = [f"{panel.color_name} = {compact(line.n_params)}" if line.n_params is not None else "" for line in wide]
    named = dict.fromkeys(", ".join(filter(None, (line.label, n))) for line, n in zip(wide, sized, strict=True))
    said = [f"Interval wider than the axes, and not drawn: {'; '.join(named)}."] if wide else []
    return [*said, *panel.left_out]


def _finite(values: Sequence[float], log: bool) -> list[float]:
    return [value for value in values if math.isfinite(value) and (value > 0 or not log)]


def _widened(values: Sequence[float], bands: Sequence[float], log: bool) -> tuple[float, float]:
    if not values:
        return (0.1, 1.0) if log else (0.0, 1.0)
    on, off = (math.log, math.exp) if log else (float, float)
    low, high = on(min(values)), on(max(values))
    span = high - low or (1.0 if log else abs(low) or 1.0)
    ends = [on(end) for end in bands if not math.isnan(end)]
    inner = min([low, *ends]), max([high, *ends])
    low, high = max(inner[0], low - ROOM * span), min(inner[1], high + ROOM * span)
    edge = EDGE * ((high - low) or span)
    return off(low - edge), off(high + edge)


def compact(value: float, flops: bool = False) -> str:
    """A short text of a number: 98.6k or 2.4M for parameters, 1e11 for FLOPs, 3e-4 for a learning rate."""
    if value >= 1e12 or 0 < value < 1 or flops:
        digits, _, power = f"{value:.2e}".partition("e")
        return f"{float(digits):g}e{int(power)}"
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= 0.9995 * unit:  # rounds to 1.00 unit with three digits
            return f"{value / unit:.3g}{name}"
    return f"{value:g}"


def merged(values: Sequence[float], factor: float = 1.05) -> list[float]:
    """The sorted values without those within a factor of the previous one, e.g. a size with and without gains."""
    kept: list[float] = []
    for value in values:
        if not kept or value > factor * kept[-1]:
            kept.append(value)
    return kept


def thinned(values: Sequence[float], most: int = 8) -> list[float]:
    """At most `most` of the values, including both ends."""
    if len(values) <= most:
        return list(values)
    return [values[round(i * (len(values) - 1) / (most - 1))] for i in range(most)]
