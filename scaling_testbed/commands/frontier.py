"""The commands of `analyze` about the best runs for their compute: frontier and ladder."""

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from scaling_testbed import tables
from scaling_testbed.analysis.figures.law_panels import frontier_panels, ladder_panels
from scaling_testbed.analysis.laws import columns, frontier
from scaling_testbed.analysis.laws.fitting import LSQ, fit
from scaling_testbed.analysis.laws.forms import LAWS
from scaling_testbed.analysis.rows.study import Row, name_of
from scaling_testbed.commands.laws import add_row_options, answer, mixed_data, read_rows, show_fit
from scaling_testbed.errors import UserError

METHODS = {"isoflop": frontier.isoflop, "envelope": frontier.envelope}
NEEDED = ("n_params", "flops", "loss")


def add_commands(commands) -> None:
    """Add the commands to argparse's subparsers."""
    help_ = "the best size of each budget"
    parser = commands.add_parser("frontier", help=help_, description=do_frontier.__doc__, allow_abbrev=False)
    parser.set_defaults(command=do_frontier)
    _add_options(parser, hold_out=False)
    parser.add_argument("--method", choices=METHODS, required=True, help="approach 2, or approach 1")
    help_ = "the configurations of a grid search to scale up"
    parser = commands.add_parser("ladder", help=help_, description=do_ladder.__doc__, allow_abbrev=False)
    parser.set_defaults(command=do_ladder)
    _add_options(parser, hold_out=True)
    parser.add_argument("--rungs", type=int, default=4, help="how many (default: %(default)s)")


def _add_options(parser: argparse.ArgumentParser, hold_out: bool) -> None:
    add_row_options(parser, hold_out)
    parser.add_argument("--json", action="store_true", help="as JSON, and nothing else")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="keep it")
    parser.add_argument("--figures", type=Path, metavar="STEM", help="figures, as STEM.png and STEM.svg")


def do_frontier(arguments: argparse.Namespace) -> int:
    """The size of least loss for each budget of compute, and the power law N = c C^p through them: by the vertex of a
    parabola in ln N at each budget (isoflop), or by the envelope of the sizes' curves (envelope)."""
    rows, said = _rows(arguments)
    if arguments.method == "isoflop":
        said = [*said, *frontier.loose([row["flops"] for row in rows], "flops")]
    optima = METHODS[arguments.method](rows)
    # Neighbours on an envelope come from the same runs: resampling them would promise too much.
    resamples = 200 if arguments.method == "isoflop" else 0
    trusted = [one for one in optima if not one.note]
    if len(trusted) < 2:
        few = f"{arguments.method}: {len(trusted)} budgets have a best size inside what was trained; two are needed"
        raise UserError("; ".join([few, *said]))
    law = LAWS["optimal_n"]
    inputs, observed = {"flops": [one.flops for one in trusted]}, [one.n_params for one in trusted]
    found = fit(law, inputs, observed, starts=8, bootstrap=resamples, size=arguments.size)
    records = [one.record() for one in optima]
    left_out = len(optima) - len(trusted)
    noted = [f"{left_out} of {len(optima)} budgets are left out of the law: see their notes"] if left_out else []
    warnings = [*found.warnings, *noted, *said]
    budgets = frontier.by_budget(rows) if arguments.method == "isoflop" else [rows]
    runs = [{**{key: row[key] for key in NEEDED}, "budget": frontier.middle(budget)} for budget in budgets
            for row in budget]  # fmt: skip
    record = {**asdict(found), "method": arguments.method, "rows": str(arguments.rows), "where": arguments.where,
              "warnings": warnings, "optima_by_budget": records, "runs": runs}  # fmt: skip

    def show() -> None:
        tables.show(records)
        show_fit(found, law, [], warnings, resampled="budgets")

    return answer(arguments, record, show, lambda: frontier_panels(runs, records, found, arguments.method))


def do_ladder(arguments: argparse.Namespace) -> int:
    """From a grid search the configurations to scale up: the best run of each size, of these the Pareto frontier in
    compute, a law L = E + (C0/C)^alpha through it, and on each part of it the configuration that tracks the law best.
    --hold-out leaves runs of the frontier out of the fit."""
    rows, said = _rows(arguments)
    front = frontier.pareto(rows)
    kept, _ = columns.select(front, [], arguments.hold_out)
    law = LAWS["compute"]
    inputs, observed = columns.values(kept, law)
    found = fit(law, inputs, observed, objective=LSQ, bootstrap=0, size=arguments.size)
    predicted = [float(found.predict({"flops": row["flops"]})) for row in kept]
    picked = {id(kept[place]) for place in frontier.rungs(kept, predicted, arguments.rungs)}
    records = [_rung(row, found, id(row) in picked, any(row is one for one in kept)) for row in front]
    warnings = [*found.warnings, *said]
    record = {**asdict(found), "rows": str(arguments.rows), "where": arguments.where, "hold_out": arguments.hold_out,
              "warnings": warnings, "n_runs": len(rows), "frontier": records}  # fmt: skip

    def show() -> None:
        tables.show(records)
        show_fit(found, law, [], warnings)

    return answer(arguments, record, show, lambda: ladder_panels(records, found))


def _rung(row: Row, found, picked: bool, fitted: bool) -> dict[str, object]:
    predicted = float(found.predict({"flops": row["flops"]}))
    shown = {"run": name_of(row).removeprefix("run "), **{key: row[key] for key in NEEDED}}
    return {**shown, "law": predicted, "fitted": fitted, "rung": picked}


def _rows(arguments: argparse.Namespace) -> tuple[Sequence[Row], list[str]]:
    rows, said = read_rows(arguments)
    rows, _ = columns.select(rows, arguments.where, [])
    for key in NEEDED:
        columns.check(rows, key, NEEDED)
    given = [row for row in rows if row.get("n_tokens") is not None]
    columns.check(given, "n_tokens", (*NEEDED, "n_tokens"))
    return rows, [*said, *mixed_data(rows)]
