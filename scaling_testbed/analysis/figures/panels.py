"""The panels of each analysis, made from its results; drawing.py draws them."""

import math
from collections.abc import Sequence

from scaling_testbed.analysis.curves.decisions import LAW, RANKING, Decision, Decisions
from scaling_testbed.analysis.curves.grouping import Curve
from scaling_testbed.analysis.curves.grouping import label as condition_label
from scaling_testbed.analysis.curves.instability import Fit, Prediction, Quantity, Series
from scaling_testbed.analysis.curves.lr_sensitivity import Sensitivity
from scaling_testbed.analysis.figures.drawing import Line, Panel, compact, thinned
from scaling_testbed.analysis.rows.study import Study, number
from scaling_testbed.errors import UserError

N_LABEL, LR_LABEL, LOSS_LABEL = (
    "N, non-embedding parameters",
    "peak learning rate",
    "final validation loss (nats/token)",
)


def sensitivity_panels(found: Sequence[Sensitivity]) -> list[Panel]:
    """Final loss against learning rate for each size, S against N (both as the paper's Figure 1), and the critical rate
    against N, where one is known."""
    order = _order([one.curve.label for one in found])
    curves = [
        Line(
            x=[lr for lr, _, _ in one.losses],
            y=[loss for _, loss, _ in one.losses],
            label=one.curve.label,
            n_params=one.curve.n_params,
            style=order[one.curve.label],
            crosses=[bad for _, _, bad in one.losses],
        )
        for one in found
    ]
    known = [one for one in found if one.s is not None]
    lines = [_s_line([one for one in found if one.curve.label == name], order[name]) for name in order]
    panels = [
        Panel(lines=curves, x_label=LR_LABEL, y_label=LOSS_LABEL, title="A diverged run counts as its initial loss")
    ]
    if known:
        log = all(one.s is not None and one.s > 0 for one in known)
        title = "S: mean excess over the best rate"
        lines = [line for line in lines if not all(map(math.isnan, line.y))]
        panels.append(
            Panel(lines=lines, x_label=N_LABEL, y_label="LR sensitivity S (nats/token)", y_log=log, title=title)
        )
    if any(one.critical and one.critical.rate for one in found):
        title = "Critical rate; a hollow mark: above the highest rate"
        lines = [line for name in order for line in _critical_lines(found, name, order[name])]
        panels.append(Panel(lines=lines, x_label=N_LABEL, y_label="critical learning rate", y_log=True, title=title))
    return panels


def _critical_lines(found: Sequence[Sensitivity], label: str, style: int) -> list[Line]:
    """The critical rates of one condition against N, with their intervals, and the censored ones."""
    own = [one for one in found if one.curve.label == label and one.critical]
    own = sorted(own, key=lambda one: one.curve.n_params)
    known = [(one.curve.n_params, one.critical) for one in own if one.critical and one.critical.rate]
    above = [(one.curve.n_params, one.critical.top) for one in own if one.critical and one.critical.rate is None]
    lines = []
    if known:
        band = None
        if all(critical.low is not None for _, critical in known):
            low = [critical.low or critical.rate or math.nan for _, critical in known]
            band = low, [critical.high or critical.top for _, critical in known]
        rates = [critical.rate or math.nan for _, critical in known]
        lines.append(Line(x=[n for n, _ in known], y=rates, label=label, style=style, band=band))
    if above:
        x, y = [n for n, _ in above], [top for _, top in above]
        lines.append(Line(x=x, y=y, label=label, style=style, joined=False, hollow=True))
    return lines


def _s_line(found: Sequence[Sensitivity], style: int) -> Line:
    """The line of S against N of one condition, interrupted where S is withheld."""
    found = sorted(found, key=lambda one: one.curve.n_params)
    known = [one for one in found if one.s is not None]
    band = None
    if known and all(one.low is not None and one.low > 0 for one in known):
        low, high = (
            [math.nan if end is None else end for end in ends]
            for ends in ([one.low for one in found], [one.high for one in found])
        )
        band = low, high
    y = [math.nan if one.s is None else one.s for one in found]
    return Line(x=[one.curve.n_params for one in found], y=y, label=found[0].curve.label, style=style, band=band)


def instability_panels(series: Sequence[Series], predictions: Sequence[Prediction], quantity: Quantity) -> list[Panel]:
    """The quantity against N, one colour for each rate (Figure 9): points, fit, interval and predicted sizes."""
    lines = []
    beyond = [one.n_params for one in predictions]
    styles = _order([condition_label(one.condition) for one in series])
    several = len(styles) > 1
    for one in series:
        name = condition_label(one.condition)
        common = {"n_params": one.lr, "style": styles[name]}
        kept = [i for i, n in enumerate(one.n_params) if n not in one.held_out]
        lines.append(_points(one, kept, {**common, "label": name if several else "measured"}))
        held = [i for i in range(len(one.n_params)) if i not in kept]
        if held:
            lines.append(_points(one, held, {**common, "style": 5, "label": "held out"}))
        if one.fit:
            own = [n for n in beyond if n > max(one.n_params, default=0) or n in one.held_out]
            lines.append(_fit_line(one, one.fit, max([*one.n_params, *own]), common))
    # An interval may span twenty decades, and the points would then coincide.
    shown = [*(y for one in series for y in one.values), *(one.predicted for one in predictions if one.predicted)]
    shown.append(quantity.threshold)
    above = "above" if quantity.above else "below"
    level = (quantity.threshold, f"threshold {quantity.threshold:g} ({above}: unstable)")
    panel = Panel(
        lines=[line for line in lines if len(line.x)],
        x_label=N_LABEL,
        y_label=quantity.label,
        y_log=True,
        levels=[level],
        y_range=(min(shown) / 10, max(shown) * 10),
        color_name="lr",
        title="Fit in log N with its 95 % prediction interval",
    )
    return [panel]


def _points(series: Series, places: Sequence[int], look: dict) -> Line:
    return Line(
        x=[series.n_params[i] for i in places],
        y=[series.values[i] for i in places],
        crosses=[bool(series.diverged[i]) for i in places],
        joined=False,
        **look,
    )


def _fit_line(series: Series, fit: Fit, end: float, look: dict) -> Line:
    start = min(series.n_params)
    x = [start * (end / start) ** (i / 60) for i in range(61)]
    middle, low, high = zip(*(fit.predict(n) for n in x), strict=True)
    return Line(x=x, y=middle, band=(low, high) if end > max(series.n_params) or series.held_out else None,
                markers=False, **look)  # fmt: skip


def decision_panels(found: Decisions) -> list[Panel]:
    """Decision accuracy against the compute of the small runs: a panel for each protocol, a line for each method.

    Raises UserError if there is no point to draw.
    """
    panels = []
    for protocol, lr in dict.fromkeys((one.protocol, one.lr) for one in found.decisions):
        own = [one for one in found.decisions if (one.protocol, one.lr) == (protocol, lr)]
        lines = [_decision_line(own, method, style) for style, method in enumerate((RANKING, LAW))]
        panels.append(
            Panel(
                lines=[line for line in lines if line.x],
                x_label="compute of the small runs (% of the target's)",
                y_label=f"pairs of {found.setting} in the order of N={compact(found.target)}",
                title=protocol if lr is None else f"{protocol}, lr={lr:g}",
                levels=[(0.5, "chance")],
                y_range=(-0.03, 1.03),
            )
        )
    if not any(panel.lines for panel in panels):
        why = "no pair counts" if all(one.accuracy is None for one in found.decisions) else "the rows tell no FLOPs"
        raise UserError(f"there is no figure to draw, because {why}; leave out --out for the table")
    return panels


def _decision_line(found: Sequence[Decision], method: str, style: int) -> Line:
    """The line of a method, with its intervals where all are known."""
    own = [one for one in found if one.method == method and one.compute_share and one.accuracy is not None]
    band = None
    if all(one.low is not None and one.high is not None for one in own):
        band = [one.low or 0.0 for one in own], [one.high or 0.0 for one in own]
    percents = [float(f"{100 * (one.compute_share or math.nan):.3g}") for one in own]  # short, because they are ticks
    return Line(
        x=percents, y=[one.accuracy or 0.0 for one in own], label=f"{method} of the small runs", style=style, band=band
    )


def against_key(curves: Sequence[Curve], key: str, measure, y_label: str, **look) -> Panel:
    """`measure` of a row against a key of the condition, with one line for each size at each rate.

    measure: row -> number or None. Rows whose key is null are left out. Seeds are averaged. The best model without
    layers is a horizontal line.
    """
    lines = []
    shapes = dict.fromkeys(curve.shape for curve in curves if curve.settings.get("model.n_layers") != 0)
    own = {s: [c for c in curves if c.shape == s and c.settings.get(key) is not None] for s in shapes}
    order = _order([f"lr={lr:g}" for lr in sorted({lr for found in own.values() for c in found for lr in c.lrs})])
    for found in own.values():
        for lr in sorted({lr for curve in found for lr in curve.lrs}):
            points = [(number(c.settings, key), _mean(measure, c, lr)) for c in found]
            points = sorted((x, y) for x, y in points if y is not None and x > 0)
            if points:
                x, y = zip(*points, strict=True)
                name = f"lr={lr:g}"
                lines.append(Line(x=x, y=y, label=name, n_params=found[0].n_params, style=order[name]))
    return Panel(lines=lines, x_label=key, y_label=y_label, levels=_bigram_levels(curves, measure), **look)


def _bigram_levels(curves: Sequence[Curve], measure) -> list[tuple[float, str]]:
    """The best value of the models without layers, as a level. Keys of attention do not apply to them."""
    bigrams = [curve for curve in curves if curve.settings.get("model.n_layers") == 0]
    values = [value for c in bigrams for lr in c.lrs if (value := _mean(measure, c, lr)) is not None]
    return [(min(values), "model without layers")] if values else []


def against_lr(curves: Sequence[Curve], measure, y_label: str, **look) -> Panel:
    """`measure` of a row against the learning rate, with one line for each condition and size."""
    order = _order([curve.label for curve in curves])
    lines = []
    for curve in curves:
        points = [(lr, value) for lr in curve.lrs if (value := _mean(measure, curve, lr)) is not None]
        if points:
            x, y = zip(*points, strict=True)
            lines.append(Line(x=x, y=y, label=curve.label, n_params=curve.n_params, style=order[curve.label]))
    return Panel(lines=lines, x_label=LR_LABEL, y_label=y_label, **look)


def trace_panels(study: Study, curves: Sequence[Curve], name: str, y_log: bool) -> list[Panel]:
    """A recorded quantity against the step: a panel for each of at most three rates, including the lowest and highest.

    A panel has a line for each run of the first seed. The list is empty if no trace has the quantity.
    """
    order = _order([curve.label for curve in curves])
    panels = []
    for lr in thinned(sorted({lr for curve in curves for lr in curve.lrs}), most=3):
        lines = []
        for curve in (curve for curve in curves if curve.rows(lr)):
            steps = [step for step in study.trace(curve.rows(lr)[0]) if step.get(name) is not None]
            points = [(step["step"], step[name]) for step in steps if step[name] > 0 or not y_log]
            if points:
                x, y = zip(*points, strict=True)
                style, n_params = order[curve.label], curve.n_params
                lines.append(Line(x=x, y=y, n_params=n_params, label=curve.label, style=style, markers=False))
        if lines:
            title = f"lr={lr:g}" + (", first seed" if any(len(curve.rows(lr)) > 1 for curve in curves) else "")
            panels.append(Panel(lines=lines, x_label="step", y_label=name, title=title, x_log=False, y_log=y_log))
    return panels


def _mean(measure, curve: Curve, lr: float) -> float | None:
    values = [value for row in curve.rows(lr) if (value := measure(row)) is not None]
    return sum(values) / len(values) if values else None


def _order(labels: Sequence[str]) -> dict[str, int]:
    return {name: index for index, name in enumerate(dict.fromkeys(labels))}
