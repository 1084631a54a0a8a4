"""The panels of each analysis, made from its results; drawing.py draws them."""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from scaling_testbed.analysis.curves.critical_rate import EXCESS
from scaling_testbed.analysis.curves.decisions import LAW, RANKING, Decision, Decisions
from scaling_testbed.analysis.curves.grouping import Curve
from scaling_testbed.analysis.curves.grouping import label as condition_label
from scaling_testbed.analysis.curves.instability import AT_STEP, Fit, Prediction, Quantity, Series
from scaling_testbed.analysis.curves.lr_sensitivity import Sensitivity, capped_loss, diverged
from scaling_testbed.analysis.figures.panel import Line, Panel, compact, merged, thinned
from scaling_testbed.analysis.figures.words import condition, word
from scaling_testbed.analysis.rows.study import Row, Study, name_of, number
from scaling_testbed.analysis.trajectories.equal_loss import TRACE
from scaling_testbed.errors import UserError

N_LABEL, LR_LABEL, LOSS_LABEL = (
    "N, non-embedding parameters",
    "peak learning rate",
    "final validation loss (nats/token)",
)
INTERVAL = "95 % interval over seeds (Student's t)"
MOST_REASONS = 6  # why points are left out, of one figure


def sensitivity_panels(found: Sequence[Sensitivity]) -> list[Panel]:
    """Final loss against learning rate for each size, S against N (both as the paper's Figure 1), and the critical rate
    against N, where one is known."""
    curves = [one.curve for one in found]
    loss = against_lr(curves, capped_loss, LOSS_LABEL, title="Final loss", crossed=diverged)
    panels = [replace(loss, caption=f"{loss.caption} A run that diverged counts as its loss at initialisation.")]
    order = _order([one.curve.label for one in found])
    seeds = _seeds(curves)
    if known := [one for one in found if one.s is not None]:
        lines = [_s_line([one for one in found if one.curve.label == name], order[name]) for name in order]
        shaded = f" Shaded: {INTERVAL}." if any(line.band for line in lines) else ""
        s = Panel(
            lines=[line for line in lines if not all(map(math.isnan, line.y))],
            x_label=N_LABEL,
            y_label="sensitivity S (nats/token)",
            y_log=all(one.s is not None and one.s > 0 for one in known),
            title="Sensitivity to the learning rate",
            caption=f"S, the mean excess of the loss over that at the best rate, against N. {seeds}.{shaded}",
            left_out=_few([f"S of {_place(one.curve)}: {one.withheld}" for one in found if one.s is None]),
            split=True,
        )
        panels.append(s)
    if any(one.critical and one.critical.rate for one in found):
        lines = [line for name in order for line in _critical_lines(found, name, order[name])]
        shaded = f" Shaded: {INTERVAL}." if any(line.band for line in lines) else ""
        above = " A hollow mark: the critical rate lies above the highest rate of the grid, which is shown."
        critical = Panel(
            lines=lines,
            x_label=N_LABEL,
            y_label="critical learning rate",
            y_log=True,
            title="Critical rate",
            caption="The learning rate above the best one at which the loss passes its lowest value by the excess that "
            f"is declared, {EXCESS:g} nats by default. {seeds}.{shaded}{above * any(line.hollow for line in lines)}",
            left_out=_few([f"that of {_place(one.curve)}: {one.withheld}" for one in found if not one.critical]),
            split=True,
        )
        panels.append(critical)
    return panels


def _place(curve: Curve) -> str:
    return ", ".join(filter(None, [condition(curve.condition), f"N = {compact(curve.n_params)}"]))


def _colored(curves: Sequence[Curve]) -> tuple[str, Callable[[Curve], float]]:
    """What the colour of a curve tells: its name, and curve -> value. It is N, or the width of models of one depth
    where conditions of one width differ in N, so that these stand side by side."""
    widths: dict[object, list[float]] = {}
    for curve in curves:
        widths.setdefault(curve.shape[0], []).append(curve.n_params)
    one_depth = {len(curve.shape) for curve in curves} == {2} and len({curve.shape[1] for curve in curves}) == 1
    if one_depth and any(len(merged(sorted(found))) > 1 for found in widths.values()):
        return "width", lambda curve: float(curve.shape[0])
    return "N", lambda curve: curve.n_params


def _few(reasons: Sequence[str]) -> list[str]:
    """Reasons why points are left out, each once, and at most MOST_REASONS of them."""
    counts = Counter(reasons)  # in the order in which they were first found
    more = len(counts) - MOST_REASONS
    shown = [f"{one} ({n} times)" if n > 1 else one for one, n in counts.items()][:MOST_REASONS]
    return [*(f"Left out: {one}." for one in shown), *([f"And {more} more."] if more > 0 else [])]


def _seeds(curves: Sequence[Curve]) -> str:
    """How many seeds a point has."""
    counts = {len(curve.rows(lr)) for curve in curves for lr in curve.lrs if curve.rows(lr)} or {0}
    if counts == {1}:
        return "One seed"
    low, high = min(counts), max(counts)
    return f"Mean over {high} seeds" if low == high else f"Mean over {low} to {high} seeds"


def _critical_lines(found: Sequence[Sensitivity], label: str, style: int) -> list[Line]:
    """The critical rates of one condition against N, with their intervals, and the censored ones."""
    own = sorted(
        (one for one in found if one.curve.label == label and one.critical), key=lambda one: one.curve.n_params
    )
    known = [(one.curve.n_params, one.critical) for one in own if one.critical and one.critical.rate]
    above = [(one.curve.n_params, one.critical.top) for one in own if one.critical and one.critical.rate is None]
    name = condition(own[0].curve.condition) if own else ""
    lines = []
    if known:
        band = None
        if any(critical.low is not None for _, critical in known):
            low = [math.nan if critical.low is None else critical.low for _, critical in known]
            # An interval that is open above reaches the end of the axis.
            high = [math.nan if critical.low is None else critical.high or math.inf for _, critical in known]
            band = low, high
        rates = [critical.rate or math.nan for _, critical in known]
        lines.append(Line(x=[n for n, _ in known], y=rates, label=name, style=style, band=band))
    if above:
        x, y = [n for n, _ in above], [top for _, top in above]
        lines.append(Line(x=x, y=y, label=name, style=style, joined=False, hollow=True))
    return lines


def _s_line(found: Sequence[Sensitivity], style: int) -> Line:
    """The line of S against N of one condition, interrupted where S is withheld."""
    found = sorted(found, key=lambda one: one.curve.n_params)
    band = None
    if any(one.low is not None for one in found):
        low, high = (
            [math.nan if end is None else end for end in ends]
            for ends in ([one.low for one in found], [one.high for one in found])
        )
        band = low, high
    y = [math.nan if one.s is None else one.s for one in found]
    label = condition(found[0].curve.condition)
    return Line(x=[one.curve.n_params for one in found], y=y, label=label, style=style, band=band)


def instability_panels(series: Sequence[Series], predictions: Sequence[Prediction], quantity: Quantity) -> list[Panel]:
    """The quantity against N, one colour for each rate (Figure 9): points, fit, interval and predicted sizes."""
    lines = []
    beyond = [one.n_params for one in predictions]
    styles = _order([condition_label(one.condition) for one in series])
    several = len(styles) > 1
    for one in series:
        common = {"n_params": one.lr, "style": styles[condition_label(one.condition)]}
        kept = [i for i, n in enumerate(one.n_params) if n not in one.held_out]
        lines.append(_points(one, kept, {**common, "label": condition(one.condition) if several else "measured"}))
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
    level = (quantity.threshold, f"threshold {quantity.threshold:g}")
    seeds = max((len(own) for one in series for own in one.by_seed), default=0)
    counted = "one seed" if seeds == 1 else f"geometric mean over up to {seeds} seeds"
    fits = any(one.fit for one in series)
    panel = Panel(
        lines=[line for line in lines if len(line.x)],
        x_label=N_LABEL,
        y_label=quantity_word(quantity),
        y_log=True,
        levels=[level],
        y_range=(min(shown) / 10, max(shown) * 10),
        color_name="learning rate",
        title="Fit in log N" if fits else "Measured",
        caption=f"{_upper(quantity_word(quantity))} against N at each learning rate. Points: measured, {counted}."
        f" Dotted: the threshold; a run is called unstable {above} it."
        + " Lines: fit in log N. Shaded, where it predicts: 95 % prediction interval of one run." * fits
        + (" A cross: a seed diverged." if any(any(line.crosses) for line in lines) else ""),
        left_out=_few(
            [f"{name}, without a value" for one in series for name in one.unmeasured]
            + [f"fit at learning rate {one.lr:g}, fewer than three sizes" for one in series if not one.fit]
        ),
        split=True,
    )
    return [panel]


def quantity_word(quantity: Quantity) -> str:
    """A quantity in words, for an axis."""
    return word(quantity.name) + ("" if quantity.field == AT_STEP else ", mean of the last steps")


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
        shaded = " Shaded: an interval over seeds." if any(line.band for line in lines) else ""
        panels.append(
            Panel(
                lines=[line for line in lines if line.x],
                x_label="compute of the small runs (% of the target's)",
                y_label=f"pairs in the order of N = {compact(found.target)}",
                caption=f"Of all pairs by {' and '.join(map(word, found.setting.split(', ')))}, the share whose order "
                f"at N = {compact(found.target)} is the one that the small runs predict.{shaded}",
                title=_upper(protocol) if lr is None else f"{_upper(protocol)}, {lr:g}",
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
    rates = sorted({lr for found in own.values() for c in found for lr in c.lrs})
    order = _order([f"learning rate {lr:g}" for lr in rates])
    for found in own.values():
        for lr in sorted({lr for curve in found for lr in curve.lrs}):
            made = [(number(c.settings, key), _spread(measure, c, lr)) for c in found]
            points = sorted((x, spread) for x, spread in made if spread is not None and x > 0)
            if points:
                name = f"learning rate {lr:g}"
                lines.append(_line(points, label=name, n_params=found[0].n_params, style=order[name]))
    unset = dict.fromkeys(c.label for c in curves if c.shape in shapes and c.settings.get(key) is None)
    zero = dict.fromkeys(c.label for c in curves if c.settings.get(key) == 0)
    left_out = [f"{name}: {word(key)} is not set" for name in unset]
    left_out += [f"{name}: zero has no place on a logarithmic axis" for name in zero]
    return Panel(
        lines=lines,
        x_label=word(key),
        y_label=y_label,
        levels=_bigram_levels(curves, measure),
        caption=f"{_upper(y_label)} against {word(key)}. {_over_seeds(curves, lines)}",
        left_out=_few([*left_out, *_not_run(curves)]),
        split=True,
        **look,
    )


def _bigram_levels(curves: Sequence[Curve], measure) -> list[tuple[float, str]]:
    """The best value of the models without layers, as a level. Keys of attention do not apply to them."""
    bigrams = [curve for curve in curves if curve.settings.get("model.n_layers") == 0]
    values = [spread[0] for c in bigrams for lr in c.lrs if (spread := _spread(measure, c, lr)) is not None]
    return [(min(values), "model without layers")] if values else []


def against_lr(curves: Sequence[Curve], measure, y_label: str, crossed=None, **look) -> Panel:
    """`measure` of a row against the learning rate, with one line for each condition and size, and the range of the
    seeds as a band.

    crossed: row -> whether its point gets a cross, None for no crosses.
    """
    order = _order([curve.label for curve in curves])
    color_name, colored = _colored(curves)
    lines = []
    left_out = _not_run(curves)
    for curve in curves:
        points = [(lr, spread) for lr in curve.lrs if (spread := _spread(measure, curve, lr)) is not None]
        without = [lr for lr in curve.lrs if curve.rows(lr) and _spread(measure, curve, lr) is None]
        if without:
            rates = ", ".join(f"{lr:g}" for lr in without)
            left_out.append(f"{_place(curve)}: no value at rate {rates}")
        if points:
            crosses = [any(map(crossed, curve.rows(lr))) for lr, _ in points] if crossed else ()
            label = condition(curve.condition)
            lines.append(_line(points, label=label, n_params=colored(curve), style=order[curve.label], crosses=crosses))
    cross = " A cross: a seed diverged." if any(any(line.crosses) for line in lines) else ""
    return Panel(
        lines=lines,
        x_label=LR_LABEL,
        y_label=y_label,
        color_name=color_name,
        caption=f"{_upper(y_label)} against the peak learning rate. {_over_seeds(curves, lines)}{cross}",
        left_out=_few(left_out),
        split=True,
        **look,
    )


def _line(points: Sequence[tuple[float, tuple[float, float, float]]], **look) -> Line:
    """The line of points (x, (mean, lowest, highest)), with the range as its band if there are several seeds."""
    x, spreads = zip(*points, strict=True)
    mean, low, high = zip(*spreads, strict=True)
    return Line(x=x, y=mean, band=(low, high) if low != high else None, **look)


def _over_seeds(curves: Sequence[Curve], lines: Sequence[Line]) -> str:
    shaded = " Shaded: from the lowest to the highest seed." if any(line.band for line in lines) else ""
    return f"{_seeds(curves)}.{shaded}"


def _not_run(curves: Sequence[Curve]) -> list[str]:
    counts = [(curve, len(curve.missing)) for curve in curves if curve.missing]
    return [f"{_place(curve)}: {n} of {n + len(curve.runs)} runs, without a result" for curve, n in counts]


def _upper(text: str) -> str:
    return text[:1].upper() + text[1:]


def trace_panels(study: Study, curves: Sequence[Curve], name: str, y_log: bool) -> list[Panel]:
    """A recorded quantity against the step: a panel for each of at most three rates, including the lowest and highest.

    A panel has a line for each run of the first seed. The list is empty if no trace has the quantity.
    """
    order = _order([curve.label for curve in curves])
    color_name, colored = _colored(curves)
    panels = []
    for lr in thinned(sorted({lr for curve in curves for lr in curve.lrs}), most=3):
        lines, cut = [], []
        for curve in (curve for curve in curves if curve.rows(lr)):
            steps = [step for step in study.trace(curve.rows(lr)[0]) if step.get(name) is not None]
            points = [(step["step"], step[name]) for step in steps if step[name] > 0 or not y_log]
            label = condition(curve.condition)
            if len(points) < len(steps):
                cut.append(f"{len(steps) - len(points)} values of {_place(curve)}, which are not above zero")
            if points:
                x, y = zip(*points, strict=True)
                style, n_params = order[curve.label], colored(curve)
                lines.append(Line(x=x, y=y, n_params=n_params, label=label, style=style, markers=False))
            else:
                cut.append(f"{_place(curve)}, which recorded no {word(name)}")
        if lines:
            several = any(len(curve.rows(lr)) > 1 for curve in curves)
            panels.append(
                Panel(
                    lines=lines,
                    x_label="step",
                    y_label=word(name),
                    color_name=color_name,
                    title=f"learning rate {lr:g}" + (", first seed" if several else ""),
                    x_log=False,
                    y_log=y_log,
                    caption=f"{_upper(word(name))} against the step at a peak learning rate of {lr:g}, one run for "
                    + ("each line, of the first seed." if several else "each line."),
                    left_out=_few(cut),
                    split=True,
                )
            )
    return panels


def curvature_panel(curves: Sequence[Curve], checkpoints: Mapping[str, Sequence[Row]]) -> Panel:
    """The Fisher trace against the loss, a line for each run. checkpoints: run id -> its records."""
    order = _order([curve.label for curve in curves])
    color_name, colored = _colored(curves)
    lines, without = [], []
    for curve in curves:
        for row in curve.runs.values():
            points = [(one["loss"], one[TRACE]) for one in checkpoints.get(str(row["run_id"]), []) if one[TRACE]]
            if points:
                x, y = zip(*points, strict=True)
                label, style = condition(curve.condition), order[curve.label]
                lines.append(Line(x=x, y=y, n_params=colored(curve), label=label, style=style))
            else:
                without.append(f"{name_of(row)}, which has no checkpoint in the table")
    return Panel(
        lines=lines,
        x_label="loss",
        y_label="Fisher trace",
        color_name=color_name,
        title="Curvature along the runs",
        x_log=False,
        y_log=True,
        caption="The trace of the Fisher information of a token against the loss of the same tokens, at the "
        "checkpoints of each run. A run moves to the left.",
        left_out=_few(without),
    )


def _spread(measure, curve: Curve, lr: float) -> tuple[float, float, float] | None:
    """The mean, the lowest and the highest value over seeds; None if there is no value."""
    values = [value for row in curve.rows(lr) if (value := measure(row)) is not None]
    return (sum(values) / len(values), min(values), max(values)) if values else None


def _order(labels: Sequence[str]) -> dict[str, int]:
    return {name: index for index, name in enumerate(dict.fromkeys(labels))}
