"""The commands of `analyze` about scaling laws: fit, predict, allocate, downstream, law."""

import argparse
import functools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from scaling_testbed import tables
from scaling_testbed.analysis.figures import drawing as figures
from scaling_testbed.analysis.figures.drawing import Panel
from scaling_testbed.analysis.figures.law_panels import downstream_panels, fit_panels
from scaling_testbed.analysis.laws import columns
from scaling_testbed.analysis.laws.allocation import allocation_records
from scaling_testbed.analysis.laws.downstream import Chain
from scaling_testbed.analysis.laws.fitted import Fit
from scaling_testbed.analysis.laws.fitting import OBJECTIVES, fit
from scaling_testbed.analysis.laws.forms import LAWS, Law
from scaling_testbed.analysis.rows import published
from scaling_testbed.analysis.rows.study import Row, name_of
from scaling_testbed.config.budget import CONVENTIONS
from scaling_testbed.errors import ConfigError, UserError
from scaling_testbed.files import write_text
from scaling_testbed.report import law as law_report


def add_commands(commands) -> None:
    """Add the commands to argparse's subparsers."""
    _add_fit(commands)
    _add_predict(commands)
    _add_allocate(commands)
    _add_downstream(commands)
    parser = commands.add_parser("law", help="the laws that can be fitted", description=do_law.__doc__)
    parser.set_defaults(command=do_law)
    parser.add_argument("what", choices=["list"])
    parser.add_argument("--json", action="store_true", help="as JSON")


def add_row_options(parser: argparse.ArgumentParser, hold_out: bool = True) -> None:
    """Where rows come from and which of them count."""
    parser.add_argument("rows", metavar="ROWS", help="runs/NAME, or a .jsonl, .json, .csv or .parquet file of runs")
    parser.add_argument("--source", choices=published.SOURCES, help="ROWS is a copy of this published testbed")
    parser.add_argument("--map", action="append", default=[], metavar="OURS=THEIRS", help="a column; repeatable")
    parser.add_argument("--where", action="append", default=[], metavar="COND", help='"flops<5e20"; all must hold')
    if hold_out:
        held = "left out of the fit, and predicted; any of several"
        parser.add_argument("--hold-out", action="append", default=[], metavar="COND", help=held)
    size = "what N counts (default: %(default)s)"
    parser.add_argument("--size", choices=CONVENTIONS, default="n_params", help=size)


def _add_fit(commands) -> None:
    help_ = "fit a scaling law to runs"
    parser = commands.add_parser("fit", help=help_, description=do_fit.__doc__, allow_abbrev=False)
    parser.set_defaults(command=do_fit)
    add_row_options(parser)
    parser.add_argument("--law", required=True, metavar="NAME", help="`analyze law list` has them")
    parser.add_argument("--fix", action="append", default=[], metavar="PARAM=VALUE", help="not fitted; repeatable")
    _add_fitting(parser)


def _add_fitting(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--objective", choices=OBJECTIVES, help="of the law of the loss (default: the law's own)")
    parser.add_argument("--starts", type=int, default=64, help="default: %(default)s")
    parser.add_argument("--bootstrap", type=int, default=200, help="resamples of the runs (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of starts and resamples (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="the fit as JSON, and nothing else")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="keep it, for predict and allocate")
    parser.add_argument("--figures", type=Path, metavar="STEM", help="figures, as STEM.png and STEM.svg")


def _add_predict(commands) -> None:
    help_ = "what a fitted law says of one more run"
    parser = commands.add_parser("predict", help=help_, description=do_predict.__doc__, allow_abbrev=False)
    parser.set_defaults(command=do_predict)
    parser.add_argument("fit", type=Path, metavar="FIT.json", help="written by analyze fit --out, or downstream --out")
    parser.add_argument("--n-params", type=float, metavar="N")
    parser.add_argument("--n-tokens", type=float, metavar="D")
    at = "another input of the law, or tokens_per_param, flops; repeatable"
    parser.add_argument("--at", action="append", default=[], metavar="KEY=VALUE", help=at)
    parser.add_argument("--json", action="store_true", help="one object, and nothing else")


def _add_allocate(commands) -> None:
    help_ = "the best size for a budget, and what a smaller model costs"
    parser = commands.add_parser("allocate", help=help_, description=do_allocate.__doc__, allow_abbrev=False)
    parser.set_defaults(command=do_allocate)
    parser.add_argument("fit", type=Path, metavar="FIT.json", help="written by analyze fit --out")
    parser.add_argument("--flops", type=float, required=True, metavar="C", help="6 N D")
    parser.add_argument("--json", action="store_true", help="a list, and nothing else")


def _add_downstream(commands) -> None:
    help_ = "a law of the loss and a law of the error, chained"
    parser = commands.add_parser("downstream", help=help_, description=do_downstream.__doc__, allow_abbrev=False)
    parser.set_defaults(command=do_downstream)
    add_row_options(parser)
    parser.add_argument("--law", default="over_training", metavar="NAME", help="of the loss (default: %(default)s)")
    chained = "of what follows from it: loss_to_error or sigmoid (default: %(default)s)"
    parser.add_argument("--error-law", default="loss_to_error", metavar="NAME", help=chained)
    for which in ("loss", "error"):
        only = f"only these rows for the law of the {which}; all must hold"
        parser.add_argument(f"--where-{which}", action="append", default=[], metavar="COND", help=only)
    _add_fitting(parser)


def do_fit(arguments: argparse.Namespace) -> int:
    """Fit a law to runs from many starts; parameters with bootstrap intervals over runs, warnings, and each held-out
    run beside its prediction."""
    law = _law("--law", arguments.law)
    rows, said = read_rows(arguments)
    kept, held = columns.select(rows, arguments.where, arguments.hold_out)
    if law.of_best:
        kept, reduced = columns.best_of_each(kept, law)
        held, left_out = columns.best_of_each(held, law) if held else (held, [])
        said = [*said, *reduced, *(f"held out: {text}" for text in left_out)]
        if any("diverged" in text for text in said):
            said.append(f"a best {law.output} may be one at which other seeds diverged")
    fixed = _numbers("--fix", arguments.fix)
    try:
        found = _fitted(law, kept, arguments, objective=arguments.objective, fixed=fixed)
    except UserError as error:
        raise UserError("; ".join([str(error), *said])) from None
    fitted = [_beside(found, law, row, new=False) for row in kept]
    predictions = [_beside(found, law, row, new=True) for row in held]
    mixed = [] if law.of_best else mixed_settings(kept, law)
    warnings = [*found.warnings, *said, *mixed_data(kept), *mixed, *far(predictions)]
    record = {
        **asdict(found),
        "warnings": warnings,
        "formula": law.formula,
        "source": law.source,
        "rows": str(arguments.rows),
        "where": arguments.where,
        "hold_out": arguments.hold_out,
        "fitted": fitted,
        "predictions": predictions,
    }
    draw = functools.partial(fit_panels, found, fitted, predictions)
    return answer(arguments, record, lambda: show_fit(found, law, predictions, warnings), draw)


def do_downstream(arguments: argparse.Namespace) -> int:
    """Fit the loss as a law of size and tokens and the downstream error as a law of the loss, and predict the error of
    each held-out run from its size and tokens alone. The column of the error is `error`: --map error=error_17."""
    laws = _law("--law", arguments.law), _law("--error-law", arguments.error_law)
    if laws[1].inputs != ("loss",) or laws[0].output != "loss":
        raise ConfigError(
            f"downstream chains a law of the loss with one of what follows; got {laws[0].name}, {laws[1].name}"
        )
    rows, said = read_rows(arguments)
    kept, held = columns.select(rows, arguments.where, arguments.hold_out)
    only = {f"where_{which}": getattr(arguments, f"where_{which}") for which in ("loss", "error")}
    parts = [columns.select(kept, typed, [], f"--{key.replace('_', '-')}")[0] for key, typed in only.items()]
    first = _fitted(laws[0], parts[0], arguments, objective=arguments.objective)
    chain = Chain(first, _fitted(laws[1], parts[1], arguments))
    predictions = [_chained(chain, laws, row) for row in held]
    shared = [*said, *mixed_data([*parts[0], *parts[1]]), *far(predictions)]
    fitted = {
        "fitted_loss": [_beside(chain.loss, laws[0], row, new=False) for row in parts[0]],
        "fitted_downstream": [_beside(chain.downstream, laws[1], row, new=False) for row in parts[1]],
    }
    record = {**asdict(chain), "rows": str(arguments.rows), "where": arguments.where, "hold_out": arguments.hold_out,
              **only, "warnings": shared, **fitted, "predictions": predictions}  # fmt: skip

    def show() -> None:
        for part, law in zip((chain.loss, chain.downstream), laws, strict=True):
            show_fit(part, law, [], [f"{law.name}: {text}" for text in part.warnings])
        show_predictions(predictions, shared)

    draw = functools.partial(downstream_panels, chain.downstream, fitted["fitted_downstream"], predictions)
    return answer(arguments, record, show, draw)


def read_rows(arguments: argparse.Namespace) -> tuple[list[Row], list[str]]:
    """What columns.read does, of what was typed. Raises ConfigError where --out is what is read."""
    tables.check_out(arguments.out, [Path(arguments.rows)])
    return columns.read(arguments.rows, arguments.source, arguments.map, arguments.size)


def _fitted(law: Law, rows: Sequence[Row], arguments: argparse.Namespace, **more) -> Fit:
    for option, least in (("starts", 1), ("bootstrap", 0), ("seed", 0)):
        if getattr(arguments, option) < least:
            raise ConfigError(f"--{option} must be at least {least}; got {getattr(arguments, option)}")
    if 0 < arguments.bootstrap < 20:
        raise ConfigError(f"--bootstrap must be 0 or at least 20, for an interval; got {arguments.bootstrap}")
    inputs, observed = columns.values(rows, law)
    options = {key: getattr(arguments, key) for key in ("starts", "bootstrap", "seed", "size")}
    return fit(law, inputs, observed, **options, **more)


def _chained(chain: Chain, laws: tuple[Law, Law], row: Row) -> dict[str, Any]:
    inputs = {key: columns.check([row], key, laws[0].inputs)[0] for key in laws[0].inputs}
    (actual,) = columns.check([row], laws[1].output, (laws[1].output,))
    made = chain.record(inputs)
    error = {"actual": actual, "relative_error": abs(made["predicted"] - actual) / actual}
    inside = None if made["low"] is None else made["low"] <= actual <= made["high"]
    return {"run": name_of(row).removeprefix("run "), **made, **error, "inside": inside}


def answer(
    arguments: argparse.Namespace,
    record: dict,
    show: Callable[[], None],
    draw: Callable[[], list[Panel]] | None = None,
) -> int:
    """Keep the record where --out says, and the figures where --figures does; print the record alone with --json, else
    show its tables."""
    written = [arguments.out] if arguments.out else []
    if arguments.out:
        tables.prepare(arguments.out.parent)
        write_text(arguments.out, json.dumps(record) + "\n")
    if draw and arguments.figures:
        tables.prepare(arguments.figures.parent)
        written += figures.save(draw(), arguments.figures)
    if arguments.json:
        print(json.dumps(record))
        return 0
    show()
    if written:
        print(f"wrote {', '.join(map(str, written))}")
    return 0


def do_predict(arguments: argparse.Namespace) -> int:
    """The output of a fitted law for one new run, with a 95 % prediction interval; of two chained laws the loss and
    what follows from it."""
    kept = law_report.read(arguments.fit)
    parts = (kept.loss, kept.downstream) if isinstance(kept, Chain) else (kept,)
    law = LAWS[parts[0].law]
    row: Row = _numbers("--at", arguments.at)
    for key in ("n_params", "n_tokens"):
        if (value := getattr(arguments, key)) is not None:
            if key in row:
                raise ConfigError(f"--at {key}={row[key]:g}: {key} is given already")
            row[key] = value
    inputs = _inputs(law, row)
    record = kept.record(inputs) if isinstance(kept, Chain) else prediction(kept, law, inputs)
    if arguments.json:
        print(json.dumps(record))
        return 0
    tables.show([record])
    if "n_params" in record:
        print(f"N counts {parts[0].size}")
    for part in parts:
        if not part.draws:
            free = f"{part.n_rows} rows for {len(part.params) - len(part.fixed)} parameters, or --bootstrap 0"
            print(f"no interval: the fit of {part.law} has no resamples ({free})")
    for text in far([record]):
        print(f"warning: {text}")
    return 0


def _inputs(law: Law, row: Row) -> dict[str, float]:
    """A law's inputs from what was typed. Raises ConfigError naming what is missing, of no use or no such number."""
    derived = columns.derived(row)
    missing = [key for key in law.inputs if derived.get(key) is None]
    if missing:
        raise ConfigError(f"{law.name} needs {', '.join(law.inputs)}; say --at {missing[0]}=VALUE")
    for key, value in row.items():
        if not 0 < value < math.inf:
            raise ConfigError(f"{key} must be a number greater than zero; got {value:g}")
    spare = {key for key in row if key not in law.inputs}
    enough = set(law.inputs) <= set(row) or {"flops", "tokens_per_param"} <= spare
    if spare - {"n_params", "n_tokens", "flops", "tokens_per_param"} or (spare and enough):
        raise ConfigError(f"{law.name} takes {', '.join(law.inputs)}; {', '.join(sorted(spare))} is more than it needs")
    return {key: derived[key] for key in law.inputs}


def do_allocate(arguments: argparse.Namespace) -> int:
    """N and D of least loss for a budget of compute, and at the same loss smaller models with the tokens and the
    compute that they take instead."""
    kept = law_report.read(arguments.fit)
    found = kept.loss if isinstance(kept, Chain) else kept
    if not 0 < arguments.flops < math.inf:
        raise ConfigError(f"--flops must be a number greater than zero; got {arguments.flops:g}")
    records = allocation_records(found, arguments.flops)
    if arguments.json:
        print(json.dumps(records))
        return 0
    tables.show(records)
    print(f"N counts {found.size}; C = 6 N D; a row without tokens: no number of them brings so small a model there")
    named = [{"extrapolation": one["extrapolation"], "run": f"{one['share_of_optimal_n']:g} of the best size"}
             for one in records if one["n_tokens"]]  # fmt: skip
    for text in far(named):
        print(f"warning: {text}")
    return 0


def do_law(arguments: argparse.Namespace) -> int:
    """The laws that can be fitted: formula, inputs, output, source."""
    records = [
        {"law": law.name, "formula": law.formula, "inputs": " ".join(law.inputs), "output": law.output,
         "objective": law.objective, "params": " ".join(param.name for param in law.params), "source": law.source}
        for law in LAWS.values()
    ]  # fmt: skip
    if arguments.json:
        print(json.dumps(records))
        return 0
    for record in records:
        print(f"{record['law']}: {record['formula']}")
        print(f"    from {record['inputs']} to {record['output']}, by {record['objective']}; {record['source']}")
    return 0


def _law(option: str, name: str) -> Law:
    if name not in LAWS:
        raise ConfigError(f"{option} must be one of {', '.join(LAWS)}; got {name!r}")
    return LAWS[name]


def _numbers(option: str, typed: Sequence[str]) -> dict[str, float]:
    found = {}
    for text in typed:
        key, equals, value = text.partition("=")
        if key in found:
            raise ConfigError(f"{option} {text}: {key} is given already")
        try:
            found[key] = float(value)
        except ValueError:
            equals = ""
        if not (key and equals and math.isfinite(found.get(key, math.nan))):
            raise ConfigError(f"{option} {text}: write {option} NAME=NUMBER")
    return found


def prediction(found: Fit, law: Law, inputs: dict[str, float], new: bool = True) -> dict[str, Any]:
    """One run as a flat row; a new one with its interval and how far out it lies."""
    value = float(found.predict(inputs))
    if not new:
        return {**inputs, f"predicted_{law.output}": value}
    low, high = found.interval(inputs) or (None, None)
    return {**inputs, f"predicted_{law.output}": value, "low": low, "high": high,
            "extrapolation": found.extrapolation(inputs)}  # fmt: skip


def _beside(found: Fit, law: Law, row: Row, new: bool) -> dict[str, Any]:
    """A run beside its prediction; for one that was not fitted also its interval."""
    inputs, observed = columns.values([row], law)
    made = prediction(found, law, {key: values[0] for key, values in inputs.items()}, new)
    predicted = made.pop(f"predicted_{law.output}")
    actual = observed[0]
    error = {"actual": actual, "predicted": predicted, "relative_error": abs(predicted - actual) / actual}
    if new:
        error["inside"] = None if made["low"] is None else made["low"] <= actual <= made["high"]
    return {"run": name_of(row).removeprefix("run "), **made, **error}


def mixed_data(rows: Sequence[Row]) -> list[str]:
    """A law describes one data set: a warning where the rows have several."""
    for key in ("data_fingerprint", "dataset"):
        found = {str(row[key]) for row in rows if row.get(key)}
        if len(found) > 1:
            return [f"the rows have {len(found)} values of {key}: a law describes one data set; use --where"]
    return []


def mixed_settings(rows: Sequence[Row], law: Law) -> list[str]:
    """A law sees nothing but its inputs: a warning where rows that have them alike differ in a setting of the run, and
    in the output by more than one percent."""
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in law.inputs), []).append(row)
    keys: dict[str, None] = {}
    most = 0.0
    for group in groups.values():
        settings = dict.fromkeys(key for row in group for key in row if "." in key or key == "lr")
        differ = [key for key in settings if len({repr(row.get(key)) for row in group}) > 1 and key not in law.inputs]
        outputs = [row[law.output] for row in group]
        if differ and max(outputs) > 1.01 * min(outputs):
            keys |= dict.fromkeys(key for key in differ if not (key == "lr" and "optimizer.lr" in differ))
            most = max(most, max(outputs) - min(outputs))
    if not keys:
        return []
    named = ", ".join(keys) if len(keys) < 4 else f"{', '.join(list(keys)[:3])} and others"
    alike = f"rows of the same {' and '.join(law.inputs)} differ in {named}"
    return [f"{alike}, and by up to {most:.3g} in {law.output}: the law is of all of them; choose with --where"]


def far(predictions: Sequence[dict]) -> list[str]:
    """How far beyond the fitted rows the farthest prediction lies, where that is far."""
    most = max(predictions, key=lambda one: one["extrapolation"], default=None)
    if most is None or most["extrapolation"] < 10:
        return []
    where = f" ({most['run']})" if most.get("run") else ""
    return [f"a prediction lies {most['extrapolation']:.3g} times beyond what was fitted{where}"]


def show_fit(
    found: Fit, law: Law, predictions: Sequence[dict], warnings: Sequence[str], resampled: str = "rows"
) -> None:
    """Formula, parameters with their intervals, objective, predictions, warnings. resampled: what was fitted."""
    print(f"{law.formula}    [{law.source}]")
    tables.show(found.table())
    print(found.summary())
    for text in found.about_intervals(resampled):
        print(text)
    show_predictions(predictions, warnings)


def show_predictions(predictions: Sequence[dict], warnings: Sequence[str]) -> None:
    """Held-out runs beside their predictions, and what a person should know."""
    if predictions:
        tables.show(predictions)
    for text in warnings:
        print(f"warning: {text}")
