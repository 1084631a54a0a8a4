"""The commands about scaling laws: fit, predict, allocate, downstream, and the list of laws."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from scaling_testbed.commands import output
from scaling_testbed.commands.options import (
    Bootstrap,
    Curves,
    Delta,
    ErrorLaw,
    FirstStep,
    HoldOut,
    Json,
    Law,
    Map,
    Objective,
    OutTable,
    Rows,
    Seed,
    Size,
    Source,
    Starts,
    WarmupSteps,
    Where,
    number,
    out,
)
from scaling_testbed.row_files import ENDINGS

KEPT = (*ENDINGS, *output.PAGE, *output.FIGURES)
OutLaw = Annotated[
    Sequence[Path],
    out(
        "save the result in the format of the ending: all of it, for predict, allocate and report (.json), a page "
        "(.html), the runs beside the values of the law (.csv, .jsonl, .parquet), figures (.png, .svg, .pdf)"
    ),
]
FitFile = Annotated[
    Path, typer.Argument(metavar="FIT.json", help="written by `analyze fit --out`, `laws --out` or `downstream --out`")
]
BestLr = Annotated[
    bool,
    typer.Option("--best-lr", help="use only the runs at the best learning rate of their size, batch and tokens"),
]
Fix = Annotated[Sequence[str], typer.Option("--fix", metavar="PARAM=VALUE", help="a fixed parameter; repeatable")]
By = Annotated[
    str | None,
    typer.Option("--by", metavar="COLUMN", help="fit the groups of runs with equal values of this column together"),
]
Of = Annotated[str | None, typer.Option("--of", metavar="VALUE", help="the group, if the law was fitted with --by")]
At = Annotated[
    Sequence[str],
    typer.Option("--at", metavar="KEY=VALUE", help="any input of the law, or tokens_per_param or flops; repeatable"),
]
NParams = Annotated[
    float | None,
    typer.Option(
        "--n-params", metavar="N", parser=number, help="number of parameters, as the fit counts them: 7e9, 7B"
    ),
]
Laws = Annotated[
    str | None, typer.Option("--laws", metavar="A,B,C", help="laws to compare (default: all of size and tokens)")
]
NTokens = Annotated[
    float | None, typer.Option("--n-tokens", metavar="D", parser=number, help="number of training tokens: 2e12, 2T")
]
Flops = Annotated[float, typer.Option("--flops", metavar="C", parser=number, help="compute budget, 6 N D")]
UniqueTokens = Annotated[
    float | None,
    typer.Option(
        "--unique-tokens", metavar="U", parser=number, help="tokens that there are, for a law of repeated tokens"
    ),
]
InferenceTokens = Annotated[
    float | None,
    typer.Option(
        "--inference-tokens", metavar="T", parser=number, help="tokens that the model will process after training"
    ),
]
Steps = Annotated[
    float | None,
    typer.Option(
        "--steps",
        metavar="S",
        parser=number,
        help="steps, under a law of size, steps and batch (default: those of the critical batch)",
    ),
]
WhereLoss = Annotated[
    Sequence[str],
    typer.Option(
        "--where-loss",
        metavar="CONDITION",
        help="use only these rows for the law of the loss; repeatable, all must hold",
    ),
]
WhereError = Annotated[
    Sequence[str],
    typer.Option(
        "--where-error",
        metavar="CONDITION",
        help="use only these rows for the law of the error; repeatable, all must hold",
    ),
]


def fit(
    rows: Rows,
    law: Law = None,
    where: Where = (),
    hold_out: HoldOut = (),
    by: By = None,
    size: Size = "n_params",
    fix: Fix = (),
    objective: Objective = None,
    delta: Delta = 1e-3,
    starts: Starts = 64,
    bootstrap: Bootstrap = 2000,
    seed: Seed = 0,
    source: Source = None,
    map_: Map = (),
    curves: Curves = False,
    first_step: FirstStep = None,
    warmup_steps: WarmupSteps = None,
    best_lr: BestLr = False,
    as_json: Json = False,
    out: OutLaw = (),
) -> None:
    """Fit a scaling law to runs: the one that predicts best, if none is named.

    The fit tries many starts. Shows parameters with 95 % bootstrap intervals over runs, warnings, and each held-out run
    beside its prediction. With --by, groups of runs are fitted together, and it says which parameters they may
    share. With --curves the rows are the evaluations in mid-run that are ends of shorter runs."""
    from scaling_testbed.analysis.figures.law_panels import fit_panels
    from scaling_testbed.analysis.laws.study import Fitting, compare_rows, fit_rows, law_named, laws_named
    from scaling_testbed.errors import ConfigError

    fixed, named = _numbers("--fix", fix), None if law is None else law_named(law)
    if curves and by is not None:
        raise ConfigError("--by and --curves do not go together; choose one group with --where")
    given = law_rows(
        rows, source, map_, size, out, curves=curves, first_step=first_step, warmup_steps=warmup_steps, best_lr=best_lr
    )
    fitting = Fitting(objective=objective, delta=delta, starts=starts, bootstrap=bootstrap, seed=seed, size=size)
    if by is not None:
        _fit_groups(given, named, by, where, hold_out, fixed, fitting, as_json, out)
        return
    selection = None
    if named is None:
        selection = compare_rows(given, laws_named(None), where=where, hold_out=hold_out, fitting=fitting).selection
    chosen = named or law_named(selection.best if selection else "")
    found = fit_rows(given, chosen, where=where, hold_out=hold_out, fixed=fixed, fitting=fitting)
    beside = [
        *({**one, "held_out": False} for one in found.fitted),
        *({**one, "held_out": True} for one in found.predictions),
    ]

    def show() -> None:
        if selection:
            show_selection(selection)
            print()
        shown = found.held_out_runs or found.predictions
        show_fit(found.fit, shown, found.warnings, "runs" if curves else "rows")
        if found.held_out_runs:
            error = sum(one["relative_error"] for one in found.predictions) / len(found.predictions)
            print(f"mean relative error of all {len(found.predictions)} held-out points: {error:.2%}")
        if found.predictions and found.fit.draws:
            print("low and high of a prediction take the law for true; those of `analyze laws` do not")

    def draw():
        return fit_panels(found.fit, found.fitted, found.predictions)

    answer(found.record(), beside, out, as_json, show, draw)


def _fit_groups(given, law, by, where, hold_out, fixed, fitting, as_json: bool, out: Sequence[Path]) -> None:
    """Fit groups of runs together, and show the ways of sharing, the parameters, and the held-out runs."""
    from scaling_testbed import tables
    from scaling_testbed.analysis.laws.groups import fit_groups
    from scaling_testbed.errors import ConfigError

    if law is None:
        raise ConfigError("--by also needs --law, the law of the groups")
    output.check(out, ENDINGS)
    found = fit_groups(given, law, by, where=where, hold_out=hold_out, fixed=fixed, fitting=fitting)
    beside = [
        *({**one, "held_out": False} for one in found.fitted),
        *({**one, "held_out": True} for one in found.predictions),
    ]
    written = output.write(out, beside, document=found.record())
    if as_json:
        output.print_json(found.record())
        return
    print(f"{law.formula}    [{law.source}]")
    tables.show(found.sharing)
    print(f"{found.reason}; shared: {', '.join(found.shared) or 'none'}")
    tables.show(found.table())
    one = next(iter(found.fits.values()))
    for text in [one.summary(), *one.about_intervals(f"rows of each {by}")]:
        print(text)
    show_predictions(found.predictions, found.warnings)
    output.say_written(written)


def laws(
    rows: Rows,
    laws: Laws = None,
    where: Where = (),
    hold_out: HoldOut = (),
    n_params: NParams = None,
    n_tokens: NTokens = None,
    size: Size = "n_params",
    objective: Objective = None,
    delta: Delta = 1e-3,
    starts: Starts = 64,
    bootstrap: Bootstrap = 2000,
    seed: Seed = 0,
    source: Source = None,
    map_: Map = (),
    curves: Curves = False,
    first_step: FirstStep = None,
    warmup_steps: WarmupSteps = None,
    as_json: Json = False,
    out: OutLaw = (),
) -> None:
    """Compare laws of size and tokens by how well they predict.

    Fits each law to all runs, to runs without one size, and to the cheaper runs, and shows its errors on the runs left
    out. Predicts held-out runs, and the run of --n-params and --n-tokens, with intervals from these errors.
    With --curves the rows are the evaluations in mid-run that are ends of shorter runs, and whole runs are left out."""
    from scaling_testbed import tables
    from scaling_testbed.analysis.figures.law_panels import laws_panels
    from scaling_testbed.analysis.laws.checks import doubts
    from scaling_testbed.analysis.laws.study import Fitting, compare_rows, laws_named
    from scaling_testbed.errors import ConfigError, UserError

    if (n_params is None) != (n_tokens is None):
        raise ConfigError("a prediction needs --n-params and --n-tokens")
    if n_params is not None and not (0 < n_params < math.inf and 0 < (n_tokens or 0) < math.inf):
        raise ConfigError("--n-params and --n-tokens must be greater than zero")
    chosen = laws_named(laws)
    given = law_rows(rows, source, map_, size, out, curves=curves, first_step=first_step, warmup_steps=warmup_steps)
    fitting = Fitting(objective=objective, delta=delta, starts=starts, bootstrap=bootstrap, seed=seed, size=size)
    found = compare_rows(given, chosen, where=where, hold_out=hold_out, fitting=fitting)
    asked = [] if n_params is None else [found.selection.predict({"n_params": n_params, "n_tokens": n_tokens or 0.0})]
    distant = doubts(asked)
    record = found.record() | ({"asked": asked[0], "warnings": [*found.warnings, *distant]} if asked else {})

    def show() -> None:
        show_selection(found.selection)
        show_predictions(found.held_out_runs or found.predictions, found.warnings)
        if asked:
            tables.show(asked)
        show_predictions([], distant)

    def draw():
        if panels := laws_panels(found.selection, found.predictions):
            return panels
        raise UserError("there is no figure: no run is held out, and there are too few to predict dearer ones")

    answer(record, found.selection.records(), out, as_json, show, draw)


def downstream(
    rows: Rows,
    law: Law = "over_training",
    error_law: ErrorLaw = "loss_to_error",
    where: Where = (),
    where_loss: WhereLoss = (),
    where_error: WhereError = (),
    hold_out: HoldOut = (),
    size: Size = "n_params",
    objective: Objective = None,
    delta: Delta = 1e-3,
    starts: Starts = 64,
    bootstrap: Bootstrap = 2000,
    seed: Seed = 0,
    source: Source = None,
    map_: Map = (),
    as_json: Json = False,
    out: OutLaw = (),
) -> None:
    """A law of the loss and a law of the error, chained.

    Fits the loss as a law of size and tokens, and the downstream error as a law of the loss. Predicts the error of each
    held-out run from its size and tokens alone. The column of the error is `error`; name another one with --map
    error=error_17."""
    from scaling_testbed.analysis.figures.law_panels import downstream_panels
    from scaling_testbed.analysis.laws.study import Fitting, chain_rows, law_named

    laws = law_named(law or ""), law_named(error_law, "--error-law")
    given = law_rows(rows, source, map_, size, out)
    fitting = Fitting(objective=objective, delta=delta, starts=starts, bootstrap=bootstrap, seed=seed, size=size)
    found = chain_rows(
        given, *laws, where=where, hold_out=hold_out, fitting=fitting, where_loss=where_loss, where_error=where_error
    )
    chain = found.chain

    def show() -> None:
        for part in (chain.loss, chain.downstream):
            show_fit(part, [], [f"{part.law}: {text}" for text in part.warnings])
        show_predictions(found.predictions, found.warnings)

    def draw():
        return downstream_panels(chain.downstream, found.fitted_downstream, found.predictions)

    answer(found.record(), found.predictions, out, as_json, show, draw)


def predict(
    fit: FitFile,
    of: Of = None,
    n_params: NParams = None,
    n_tokens: NTokens = None,
    at: At = (),
    as_json: Json = False,
    out: OutTable = (),
) -> None:
    """Predict one run with a fitted law.

    Shows a 95 % prediction interval. Two chained laws predict the loss and the downstream error. Laws that `analyze
    laws` compared predict together, with an interval from their errors."""
    from scaling_testbed import api, tables
    from scaling_testbed.analysis.laws.checks import doubts
    from scaling_testbed.analysis.laws.downstream import Chain
    from scaling_testbed.analysis.laws.prediction import loss_law, predict
    from scaling_testbed.analysis.laws.selection import Selection
    from scaling_testbed.errors import ConfigError

    output.check(out, ENDINGS, [fit])
    kept, row = api.kept_law(fit, of), _numbers("--at", at)
    for key, value in (("n_params", n_params), ("n_tokens", n_tokens)):
        if value is not None and key in row:
            raise ConfigError(f"--at {key}={row[key]:g}: {key} is given twice")
        row |= {} if value is None else {key: value}
    record = predict(kept, row)
    written = output.write(out, [record], document=record)
    if as_json:
        output.print_json(record)
        return
    tables.show([record])
    if "n_params" in record:
        print(f"N counts {loss_law(kept).size}")
    if isinstance(kept, Selection):
        shares = ", ".join(f"{name} {one.share:.0%}" for name, one in kept.laws.items() if one.share)
        print(f"the prediction is of {shares}; intervals are {kept.calibrated}")
    parts = (kept.loss, kept.downstream) if isinstance(kept, Chain) else () if isinstance(kept, Selection) else (kept,)
    for part in parts:
        if not part.draws:
            free = f"{part.n_rows} rows for {len(part.params) - len(part.fixed)} parameters, or --bootstrap 0"
            print(f"no interval: the fit of {part.law} has no resamples ({free})")
    show_predictions([], doubts([record]))
    output.say_written(written)


def allocate(
    fit: FitFile,
    flops: Flops,
    of: Of = None,
    inference_tokens: InferenceTokens = None,
    unique_tokens: UniqueTokens = None,
    steps: Steps = None,
    as_json: Json = False,
    out: OutTable = (),
) -> None:
    """The best size for a budget, and the cost of smaller models.

    Shows the N and D of the lowest loss for a budget of compute, and smaller models of the same loss with the tokens
    and the compute that they need. With --inference-tokens also the size at which training and inference together cost
    the least. Of a law of size, steps and batch: size, batch and steps, and the same loss with other batches."""
    from scaling_testbed import api, tables
    from scaling_testbed.analysis.laws.checks import doubts
    from scaling_testbed.analysis.laws.prediction import loss_law
    from scaling_testbed.analysis.laws.selection import Selection

    output.check(out, ENDINGS, [fit])
    kept = api.kept_law(fit, of)
    records = api.allocate(
        kept, flops=flops, inference_tokens=inference_tokens, unique_tokens=unique_tokens, steps=steps
    )
    written = output.write(out, records)
    if as_json:
        output.print_json(records)
        return
    law, best = loss_law(kept), records[0]
    tables.show([{key: value for key, value in one.items() if not key.endswith(("_low", "_high"))} for one in records])
    if "batch_tokens" in best:
        for key, words in (("n_params", "size"), ("steps", "number of steps"), ("batch_tokens", "batch in tokens")):
            low, high = best[f"{key}_low"], best[f"{key}_high"]
            if low is not None and low < high:
                print(f"the best {words} is {best[key]:.4g}, {low:.4g} to {high:.4g} in 95 % of the resamples")
    elif best["n_params_low"] is not None:
        print("95 % of the resamples, each with its own best size and loss:")
        tables.show([_between(one) for one in records])
    if isinstance(kept, Selection):
        print(f"by {law.law} alone, the law with the largest share")
    if "batch_tokens" in best:
        print(f"N counts {law.size}; C = 6 N D, D = B S; low and high: 95 % for the loss of one run")
        if steps is None:
            print("the first row has the critical batch of its loss; the others have the same size and loss")
    else:
        print(f"N counts {law.size}; C = 6 N D; low and high: 95 % for the loss of one run")
    column, words = ("share_of_optimal_n", "best size") if "batch_tokens" not in best else (
        "times_critical_batch", "critical batch")  # fmt: skip
    named = [{"extrapolation": one["extrapolation"], "run": f"{one[column]:.3g} of the {words}"}
             for one in records if one["n_tokens"]]  # fmt: skip
    show_predictions([], doubts(named))
    output.say_written(written)


def _between(record: dict[str, Any]) -> dict[str, Any]:
    """The intervals of a plan as text."""
    found = {"share_of_optimal_n": record["share_of_optimal_n"]}
    for name in (key.removesuffix("_low") for key in record if key.endswith("_low")):
        low, high = record[f"{name}_low"], record[f"{name}_high"]
        found[name] = "" if low is None else f"{low:.4g} to {'any' if high is None else format(high, '.4g')}"
    return found


def list_(as_json: Json = False, out: OutTable = ()) -> None:
    """The laws that can be fitted: formula, inputs, output, source."""
    from scaling_testbed.analysis.laws.forms import LAWS

    output.check(out, ENDINGS)
    records = [
        {"law": law.name, "formula": law.formula, "inputs": " ".join(law.inputs), "output": law.output,
         "objective": law.objective, "params": " ".join(param.name for param in law.params), "source": law.source}
        for law in LAWS.values()
    ]  # fmt: skip
    written = output.write(out, records)
    if as_json:
        output.print_json(records)
        return
    for record in records:
        print(f"{record['law']}: {record['formula']}")
        print(f"    from {record['inputs']} to {record['output']}, by {record['objective']}; {record['source']}")
    output.say_written(written)


def law_rows(
    rows: Path,
    source: str | None,
    mapping: Sequence[str],
    size: str,
    out: Sequence[Path],
    *,
    curves: bool = False,
    first_step: int | None = None,
    warmup_steps: int | None = None,
    decayed: bool = False,
    best_lr: bool = False,
):
    """The rows of a command, with the columns of laws: runs, or with `curves` their evaluations. decayed: also those
    after the rate has begun to decay. best_lr: only those that at_best_rates keeps. Checks the files of --out first."""
    from scaling_testbed.analysis.laws import study
    from scaling_testbed.analysis.laws.best_runs import at_best_rates
    from scaling_testbed.analysis.trajectories.points import law_points
    from scaling_testbed.errors import ConfigError

    output.check(out, KEPT, [rows])
    if curves:
        if source is not None:
            raise ConfigError("--curves: a published testbed has no training curves; leave --source out")
        return law_points(
            rows,
            mapping=mapping,
            size=size,
            first_step=first_step,
            warmup_steps=warmup_steps,
            decayed=decayed,
            best_lr=best_lr,
        )
    for option, value in (("--first-step", first_step), ("--warmup-steps", warmup_steps)):
        if value is not None:
            raise ConfigError(f"{option} needs --curves")
    found = study.law_rows(rows, source=source, mapping=mapping, size=size)
    if not best_lr:
        return found
    chosen, why = at_best_rates(found.rows)
    return replace(found, rows=chosen, said=[*found.said, *why])


def answer(
    record: dict[str, Any],
    table: Sequence[dict],
    out: Sequence[Path],
    as_json: bool,
    show: Callable[[], None],
    draw: Callable[[], Sequence],
) -> None:
    """Write the files of --out (record, page, table, figures), then print the record (--json) or show the result."""

    def page(path: Path) -> None:
        from scaling_testbed.report.law import write_law_page

        write_law_page(record, path)

    written = output.write(out, table, document=record, draw=draw, page=page)
    if as_json:
        output.print_json(record)
        return
    show()
    output.say_written(written)


def show_selection(selection) -> None:
    """Print the laws side by side, the reason for the choice, and what the intervals are calibrated on."""
    from scaling_testbed import tables

    tables.show(selection.records())
    print(selection.reason)
    print(f"intervals are {selection.calibrated}")


def show_fit(found, predictions: Sequence[dict], warnings: Sequence[str], resampled: str = "rows") -> None:
    """Print formula, parameters with intervals, objective, predictions and warnings. resampled: what was resampled."""
    from scaling_testbed import tables
    from scaling_testbed.analysis.laws.forms import LAWS

    law = LAWS[found.law]
    print(f"{law.formula}    [{law.source}]")
    tables.show(found.table())
    print(found.summary())
    for text in found.about_intervals(resampled):
        print(text)
    show_predictions(predictions, warnings)


def show_predictions(predictions: Sequence[dict], warnings: Sequence[str]) -> None:
    """Print held-out runs beside their predictions, and warnings."""
    if predictions:
        from scaling_testbed import tables

        tables.show(predictions)
    for text in warnings:
        print(f"warning: {text}")


def _numbers(option: str, typed: Sequence[str]) -> dict[str, float]:
    from scaling_testbed.errors import ConfigError

    found = {}
    for text in typed:
        key, equals, value = text.partition("=")
        if key in found:
            raise ConfigError(f"{option} {text}: {key} is given twice")
        try:
            found[key] = number(value)
        except typer.BadParameter:
            equals = ""
        if not (key and equals and math.isfinite(found.get(key, math.nan))):
            raise ConfigError(f"{option} {text}: write {option} NAME=NUMBER")
    return found
