"""Figures of scaling laws: fitted and held-out runs beside the values of the law."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from scaling_testbed.analysis.figures.panel import Line, Panel, compact
from scaling_testbed.analysis.figures.words import word
from scaling_testbed.analysis.laws.allocation import allocate
from scaling_testbed.analysis.laws.fitted import LEVEL, Fit
from scaling_testbed.analysis.laws.forms import LAWS
from scaling_testbed.analysis.laws.selection import Selection, quantile
from scaling_testbed.errors import ConfigError

Records = Sequence[Mapping[str, Any]]
CURVE_POINTS = 60
BAND_POINTS = 20  # of a curve with an interval, which costs a quantile for each
MOST_BANDS = 3  # in one pair of axes
CONTOURS = 7
WIDE = 30.0  # an input whose largest value is so many times its smallest has a logarithmic axis
ERROR = "predicted / actual - 1, %"
SYMBOLS = {"n_params": "N", "n_tokens": "D", "tokens_per_param": "D/N"}


def fit_panels(fit: Fit, fitted: Records, held_out: Records) -> list[Panel]:
    """The panels of a fit: actual against predicted values, the law itself if it can be drawn, and the errors against
    each input.

    A law of size and tokens is drawn as the loss against compute at each multiplier, and as contours of equal loss
    with the best sizes. A law of one input is drawn as the output against the input. Records have the law's inputs,
    `actual` and `predicted`.
    """
    panels = [_predicted_against_actual(LAWS[fit.law].output, fitted, held_out)]
    inputs: Sequence[str] = LAWS[fit.law].inputs
    if set(inputs) == {"n_params", "n_tokens"}:
        panels += [_loss_against_compute(fit, fitted, held_out), _equal_losses(fit, fitted, held_out)]
        inputs = (*inputs, "tokens_per_param")
    elif len(inputs) == 1:
        panels.append(_output_against_input(fit, inputs[0], fitted, held_out))
    return [*panels, *(_errors(key, fitted, held_out) for key in inputs)]


def _predicted_against_actual(output: str, fitted: Records, held_out: Records) -> Panel:
    ends = [value for record in (*fitted, *held_out) for value in (record["actual"], record["predicted"])]
    diagonal = [min(ends), max(ends)]
    lines = [Line(x=diagonal, y=diagonal, label="equal", markers=False, color=5)]
    for index, (name, records) in enumerate((("fitted", fitted), ("held out", held_out))):
        if records:
            x, y = [record["predicted"] for record in records], [record["actual"] for record in records]
            known = bool(index) and all(record["low"] is not None for record in records)
            bars = [(record["low"], record["high"]) for record in records] if known else []
            name += ", with 95 % intervals" * known
            lines.append(Line(x=x, y=y, label=name, style=index, joined=False, hollow=bool(index), x_bars=bars))
    x_label, y_label = f"predicted {output}", f"actual {output}"
    caption = "Each point is a run; on the line both values are equal. A hollow point was held out of the fit."
    return Panel(
        lines=lines, x_log=False, x_label=x_label, y_label=y_label, title="Predicted and actual", caption=caption
    )


def _loss_against_compute(fit: Fit, fitted: Records, held_out: Records) -> Panel:
    """The loss against compute, with one colour and curve for each multiplier (tokens per parameter, two digits). The
    curve of a multiplier with held-out runs goes from the smallest fitted size to the largest of these runs."""
    lines = []
    ratios = sorted({_multiplier(record) for record in (*fitted, *held_out)})
    asked = {_multiplier(record) for record in held_out} or set(ratios)
    banded = asked if fit.draws and len(asked) <= MOST_BANDS else set()
    for ratio in ratios:
        for index, records in enumerate((fitted, held_out)):
            own = [record for record in records if _multiplier(record) == ratio]
            if own:
                label = ("fitted", "held out")[index]
                x = [6 * record["n_params"] * record["n_tokens"] for record in own]
                y = [record["actual"] for record in own]
                lines.append(Line(x=x, y=y, n_params=ratio, label=label, style=index, joined=False, hollow=bool(index)))
        beside = [record for record in held_out if _multiplier(record) == ratio]
        sizes = [record["n_params"] for record in (*(fitted if beside else ()), *beside)]
        sizes += [record["n_params"] for record in fitted if _multiplier(record) == ratio]
        n = np.geomspace(min(sizes), max(sizes), BAND_POINTS if ratio in banded else CURVE_POINTS)
        y = list(map(float, fit.predict({"n_params": n, "n_tokens": ratio * n})))
        band = _band(fit, [{"n_params": float(one), "n_tokens": ratio * float(one)} for one in n], ratio in banded)
        lines.append(Line(x=list(6 * ratio * n**2), y=y, n_params=ratio, markers=False, band=band))
    shaded = " Shaded: the 95 % prediction interval, if this law is true." if banded else ""
    return Panel(
        lines=lines,
        x_label="C = 6ND, FLOPs",
        y_label=LAWS[fit.law].output,
        color_name="D/N",
        title="Against compute",
        caption="Points: runs; a hollow one was held out of the fit. Curves: the law at each number of tokens per "
        f"parameter, D/N.{shaded}",
    )


def _equal_losses(fit: Fit, fitted: Records, held_out: Records) -> Panel:
    """Contours of equal loss over N and D, the best N and D of each compute by the law, and the runs.

    The contours are at the losses of the law for the best sizes, at computes from the least of the runs to the largest.
    """
    runs = [*fitted, *held_out]
    n, d = ([record[key] for record in runs] for key in ("n_params", "n_tokens"))
    least, most = (end(6 * one * two for one, two in zip(n, d, strict=True)) for end in (min, max))
    lines = []
    sizes = np.geomspace(min(n) / 1.5, max(n) * 1.5, CURVE_POINTS)
    tokens = np.geomspace(min(d) / 1.5, max(d) * 1.5, 20 * CURVE_POINTS)
    try:
        best = [
            allocate(fit, float(flops), [1.0])[0] for flops in np.geomspace(least, max(most, 1.1 * least), CONTOURS)
        ]
    except ConfigError:  # the law has no best size within the searched range
        best = []
    losses = fit.predict({"n_params": sizes[:, None], "n_tokens": tokens[None, :]})
    levels = [one.loss for one in best] or list(np.linspace(losses.max(), losses.min(), CONTOURS + 2)[1:-1])
    for level in levels:
        crossed = [float(np.interp(level, row[::-1], tokens[::-1], math.nan, math.nan)) for row in losses]
        points = [(size, one) for size, one in zip(sizes, crossed, strict=True) if math.isfinite(one)]
        if len(points) > 1:
            curve = Line(x=[x for x, _ in points], y=[y for _, y in points], n_params=_digits(level, 3), markers=False)
            lines.append(curve)
    shown = [one for one in best if sizes[0] <= one.n_params <= sizes[-1]]
    if shown:
        x, y = [one.n_params for one in shown], [one.n_tokens or math.nan for one in shown]
        lines.append(Line(x=x, y=y, label="best N and D", style=1, color=5, markers=False))
    for index, (name, records) in enumerate((("fitted", fitted), ("held out", held_out)), 2):
        if records:
            x, y = ([record[key] for record in records] for key in ("n_params", "n_tokens"))
            lines.append(Line(x=x, y=y, label=name, style=index, color=5, joined=False, hollow=index == 3))
    return Panel(
        lines=lines,
        x_label="N, parameters",
        y_label="D, tokens",
        y_log=True,
        color_name=LAWS[fit.law].output,
        title="Equal loss",
        caption="Curves: sizes and tokens of equal loss by the law. Dashed: the best N and D for each compute. Points: "
        "runs; a hollow one was held out of the fit.",
    )


def _errors(key: str, fitted: Records, held_out: Records) -> Panel:
    """The relative error of each run, predicted/actual - 1 in percent, against one input of the law."""
    lines = []
    for index, (name, records) in enumerate((("fitted", fitted), ("held out", held_out))):
        known = [record for record in records if record["actual"]]
        if known:
            x = [_of_input(key, record) for record in known]
            y = [100 * (record["predicted"] / record["actual"] - 1) for record in known]
            lines.append(Line(x=x, y=y, label=name, style=index, joined=False, hollow=bool(index)))
    values = [one for line in lines for one in line.x]
    return Panel(
        lines=lines,
        x_label=word(key),
        y_label=ERROR,
        x_log=not values or max(values) / min(values) > WIDE or key in SYMBOLS,
        levels=[(0.0, "")],
        title=f"Errors against {SYMBOLS.get(key, word(key))}",
        caption=f"The error of each run against {word(key)}. A trend shows what the law does not describe.",
    )


def _of_input(key: str, record: Mapping[str, Any]) -> float:
    return _digits(record["n_tokens"] / record["n_params"], 3) if key == "tokens_per_param" else record[key]


def _band(fit: Fit, inputs: Sequence[Mapping[str, float]], wanted: bool = True) -> Any:
    """The ends of the 95 % prediction intervals at several points; None if there are none."""
    ends = [fit.interval(one) for one in inputs] if wanted and fit.draws else []
    return tuple(zip(*ends, strict=True)) if ends and all(ends) else None


def _multiplier(record: Mapping[str, Any]) -> float:
    return _digits(record["n_tokens"] / record["n_params"], 2)


def _digits(value: float, count: int) -> float:
    return float(f"{value:.{count}g}")


def _output_against_input(fit: Fit, key: str, fitted: Records, held_out: Records) -> Panel:
    values = [record[key] for record in (*fitted, *held_out)]
    log = max(values) / min(values) > WIDE
    x = (np.geomspace if log else np.linspace)(min(values), max(values), CURVE_POINTS)
    middle = list(map(float, fit.predict({key: x})))
    band = _band(fit, [{key: float(value)} for value in x])
    lines = [Line(x=list(x), y=middle, label="the law", markers=False, band=band)]
    for index, (name, records) in enumerate((("fitted", fitted), ("held out", held_out)), 1):
        if records:
            own, y = [record[key] for record in records], [record["actual"] for record in records]
            lines.append(Line(x=own, y=y, label=name, style=index, joined=False, hollow=index == 2))
    shaded = " Shaded: its 95 % prediction interval." if band else ""
    return Panel(
        lines=lines,
        x_label=word(key),
        y_label=LAWS[fit.law].output,
        x_log=log,
        y_log=log and min(middle) > 0,
        title="The law",
        caption=f"Line: the law. Points: runs; a hollow one was held out of the fit.{shaded}",
    )


def downstream_panels(error: Fit, fitted: Records, held_out: Records) -> list[Panel]:
    """The error against the loss with the law of the error, and the held-out runs.

    The error of a held-out run is predicted from its size and tokens.
    """
    output, key = LAWS[error.law].output, LAWS[error.law].inputs[0]
    panels = [_output_against_input(error, key, fitted, [])]
    return [*panels, _predicted_against_actual(output, [], held_out)] if held_out else panels


def laws_panels(compared: Selection, held_out: Records) -> list[Panel]:
    """The errors of compared laws on dearer runs against the distance of these, and the held-out runs if there are
    some. Empty if there are neither."""
    panels = [_predicted_against_actual("loss", [], held_out)] if held_out else []
    if not len(compared.errors):
        return panels
    most = 100 * math.expm1(quantile(np.abs(compared.errors)))
    ends = [(most, f"{LEVEL:.0%} of the errors"), (0.0, ""), (-most, "")]
    points = Line(x=list(compared.reach), y=list(100 * np.expm1(compared.errors)), label="dearer runs", joined=False)
    return [
        Panel(
            lines=[points],
            x_log=False,
            x_label="compute of the run / largest fitted",
            y_label=ERROR,
            levels=ends,
            title="Errors of dearer runs",
            caption="The kept laws were fitted to the cheaper runs only, several times, and predicted dearer ones. The "
            "outer lines hold 95 % of these errors: half the width of an interval, at this distance.",
        ),
        *panels,
    ]


def frontier_panels(runs: Records, optima: Records, fit: Fit, method: str) -> list[Panel]:
    """The measured losses, and the best size against compute with its law.

    The losses are shown against N at each budget (isoflop), or against compute for each size (envelope). Records have
    n_params, flops and loss.
    """
    measured = _loss_at_budgets(runs, optima) if method == "isoflop" else _loss_of_sizes(runs, optima)
    budgets = [one["flops"] for one in optima]
    flops = np.geomspace(min(budgets), max(budgets), CURVE_POINTS)
    law = Line(x=list(flops), y=list(map(float, fit.predict({"flops": flops}))), label=_spelled(fit), markers=False)
    points = Line(x=budgets, y=[one["n_params"] for one in optima], label="best size", style=1, joined=False)
    return [
        measured,
        Panel(
            lines=[law, points],
            x_label="C, FLOPs",
            y_label="best N",
            y_log=True,
            title="The best size",
            caption="The size of the lowest loss at each compute, and the power law that is fitted to it.",
        ),
    ]


def _loss_at_budgets(runs: Records, optima: Records) -> Panel:
    """The loss against N, with a colour for each budget and its parabola if it has one."""
    lines = []
    for budget in sorted({run["budget"] for run in runs}):
        own = [run for run in runs if run["budget"] == budget]
        x, y = [run["n_params"] for run in own], [run["loss"] for run in own]
        lines.append(Line(x=x, y=y, n_params=budget, label="run", joined=False))
        lines += [_parabola(one) for one in optima if one["flops"] == budget and one["curvature"]]
    x, y = [one["n_params"] for one in optima], [one["loss"] for one in optima]
    lines.append(Line(x=x, y=y, label="best size", style=1, color=5, joined=False))
    caption = "Points: runs, in the colour of their budget. Curves: a parabola in ln N for each budget, and its vertex."
    return Panel(
        lines=lines,
        x_label="N, parameters",
        y_label="loss",
        color_name="C",
        title="Loss at each budget",
        caption=caption,
    )


def _parabola(optimum: Mapping[str, Any]) -> Line:
    """The parabola of a budget, over the sizes that it is fitted to and up to its vertex."""
    best, low, high = optimum["n_params"], optimum["fitted_from"], optimum["fitted_to"]
    x = np.geomspace(min(best, low), max(best, high), CURVE_POINTS)
    y = optimum["loss"] + optimum["curvature"] * np.log(x / best) ** 2
    return Line(x=list(x), y=list(map(float, y)), n_params=optimum["flops"], markers=False)


def _loss_of_sizes(runs: Records, optima: Records) -> Panel:
    """The loss against compute, with a colour for each size, and a curve for each size or, of points of training
    curves, for each run."""
    lines = []
    curves: dict[tuple, list[tuple]] = {}
    for run in runs:
        curves.setdefault((run["n_params"], str(run.get("run", ""))), []).append((run["flops"], run["loss"]))
    for (n_params, _), own in sorted(curves.items()):
        flops, losses = zip(*sorted(own), strict=True)
        lines.append(Line(x=flops, y=losses, n_params=n_params))
    x, y = [one["flops"] for one in optima], [one["loss"] for one in optima]
    lines.append(Line(x=x, y=y, label="best size", style=1, color=5, markers=False))
    return Panel(
        lines=lines,
        x_label="C, FLOPs",
        y_label="loss",
        color_name="N",
        title="Loss of each size",
        caption=f"One line for each {'run' if 'run' in runs[0] else 'size'}, and the envelope of all sizes.",
    )


def _spelled(fit: Fit) -> str:
    return f"N = {fit.params['N0']:.3g} (C / {fit.params['C0']:.3g})^{fit.params['p']:.3g}"


def ladder_panels(records: Records, fit: Fit) -> list[Panel]:
    """The frontier of a grid search, its law, and the picked configurations."""
    flops = np.geomspace(min(r["flops"] for r in records), max(r["flops"] for r in records), CURVE_POINTS)
    lines = [Line(x=list(flops), y=list(map(float, fit.predict({"flops": flops}))), label="the law", markers=False)]
    groups = {
        "frontier": [r for r in records if r["fitted"] and not r["rung"]],
        "left out of the fit": [r for r in records if not r["fitted"]],
        "picked": [r for r in records if r["rung"]],
    }
    for index, (name, own) in enumerate(groups.items(), 1):
        if own:
            label = f"{name}: {', '.join(compact(r['n_params']) for r in own)}" if name == "picked" else name
            x, y, hollow = [r["flops"] for r in own], [r["loss"] for r in own], name == "left out of the fit"
            lines.append(Line(x=x, y=y, label=label, style=index, joined=False, hollow=hollow))
    caption = "Configurations that no cheaper one beats, and their law. A hollow point was left out of its fit."
    return [
        Panel(lines=lines, x_label="C, FLOPs", y_label="loss", title="The frontier of the grid search", caption=caption)
    ]
