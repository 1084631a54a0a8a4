"""The commands of `python -m scaling_testbed.analyze`: what was typed, and what each does with it."""

import argparse
import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path

from scaling_testbed import tables
from scaling_testbed.analysis.curves import instability, lr_sensitivity
from scaling_testbed.analysis.curves.grouping import grouping_keys
from scaling_testbed.analysis.curves.instability import AT_STEP, LAST_MEAN, Quantity
from scaling_testbed.analysis.figures import drawing as figures
from scaling_testbed.analysis.figures.panels import instability_panels, sensitivity_panels
from scaling_testbed.analysis.rows import published
from scaling_testbed.analysis.rows.study import SIZE, Study, is_study, load, where
from scaling_testbed.commands import frontier as frontier_commands
from scaling_testbed.commands import laws as law_commands
from scaling_testbed.commands import tasks as task_commands
from scaling_testbed.config.budget import CONVENTIONS
from scaling_testbed.errors import ConfigError
from scaling_testbed.papers.paper import chosen, experiment_of
from scaling_testbed.report.law import is_law, laws_of, write_law_report
from scaling_testbed.report.sweep import write_laws, write_report, write_traces

FIRST_MLP = "grad_rms/blocks.0.mlp.mlp_in.weight"


def parse(argv: Sequence[str], doc: str) -> argparse.Namespace:
    """The arguments, with the function to call under `command`. Exits as argparse does when they are wrong."""
    parser = argparse.ArgumentParser(prog="scaling-testbed analyze", description=doc, allow_abbrev=False)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for add in (_add_lr_sensitivity, _add_instability, _add_report, _add_inspect):
        add(commands)
    task_commands.add_commands(commands)
    law_commands.add_commands(commands)
    frontier_commands.add_commands(commands)
    return parser.parse_args(argv)


def _command(commands, function, help_: str) -> argparse.ArgumentParser:
    name = function.__name__.removeprefix("do_")
    parser = commands.add_parser(name, help=help_, description=function.__doc__, allow_abbrev=False)
    parser.set_defaults(command=function)
    parser.add_argument("sweep_dir", metavar="SWEEP_DIR", help="runs/NAME, or a .jsonl or .csv file of rows")
    parser.add_argument("--where", action="append", default=[], metavar="KEY=VALUE", help="only these runs; repeatable")
    return parser


def _add_grouping(parser: argparse.ArgumentParser) -> None:
    keys = "keys that tell conditions apart (default: all that vary; `scan`: width or depth)"
    parser.add_argument("--group", nargs="+", metavar="KEY", help=keys)
    parser.add_argument("--size", choices=CONVENTIONS, default=SIZE, help="how N is counted (default: %(default)s)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where files go (default: SWEEP_DIR/analysis)")


def _add_lr_sensitivity(commands) -> None:
    parser = _command(commands, do_lr_sensitivity, "S for each size and condition, and its figure")
    _add_grouping(parser)
    parser.add_argument("--lr-range", default="3e-4,3e-1", metavar="LOW,HIGH", help="default: %(default)s")


def _add_instability(commands) -> None:
    parser = _command(commands, do_instability, "extrapolate a diagnostic to sizes not trained")
    _add_grouping(parser)
    quantity = "default: what the sweep is about; else attention_logit_max/0, with --eps the gradient of the first MLP"
    parser.add_argument("--quantity", help=quantity)
    parser.add_argument("--threshold", type=float, help="unstable above this value (default: 1e4)")
    eps = "instead of --threshold: unstable below this value, AdamW's eps, as a mean over the last steps"
    parser.add_argument("--eps", type=float, nargs="?", const=1e-8, metavar="1e-8", help=eps)
    held = "leave the largest size out of the fit, and show its prediction beside what was measured"
    parser.add_argument("--hold-out-largest", action="store_true", help=held)


def _add_report(commands) -> None:
    parser = _command(commands, do_report, "all of it as one page, with the paper's claims judged")
    parser.add_argument("--out", type=Path, metavar="FILE.html", help="default: SWEEP_DIR/report.html")
    experiment = "whose claims are judged (default: what the sweep's file names)"
    parser.add_argument("--experiment", metavar="[PAPER/]NAME", help=experiment)
    parser.add_argument("--source", choices=published.TESTBEDS, help="SWEEP_DIR is a copy of this published testbed")
    parser.add_argument("--figures", type=Path, metavar="STEM", help="also the figures, as STEM.png and STEM.svg")
    traces = "also what it looks at over the steps of each run, as DIR/RUN_ID.jsonl.gz"
    parser.add_argument("--traces", type=Path, metavar="DIR", help=traces)


def _add_inspect(commands) -> None:
    help_ = "the diagnostics of a saved checkpoint"
    parser = commands.add_parser("inspect", help=help_, description=do_inspect.__doc__, allow_abbrev=False)
    parser.set_defaults(command=do_inspect)
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="runs/NAME/RUN_ID")
    parser.add_argument("--step", type=int, help="of the checkpoint (default: the newest)")
    parser.add_argument("--sequences", type=int, default=32, help="of validation data, at most (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="every number, one object")


def do_lr_sensitivity(arguments: argparse.Namespace) -> int:
    """Learning-rate sensitivity S (arXiv 2309.14322, section 2.2): a table, lr_sensitivity.csv, .json, .png, .svg."""
    study, group, folder = _opened(arguments)
    lr_range = _range(arguments.lr_range)
    found = lr_sensitivity.analyse(study, group, arguments.size, lr_range)
    records = [one.record() for one in found]
    tables.show(records)
    print(lr_sensitivity.DEFINITION)
    print(lr_sensitivity.rates_note(found, lr_range))
    about = {"sweep": study.name, "definition": lr_sensitivity.DEFINITION, "size": arguments.size}
    paths = tables.write(records, folder, "lr_sensitivity", about)
    _say(paths + figures.save(sensitivity_panels(found), folder / "lr_sensitivity"))
    return 0


def do_instability(arguments: argparse.Namespace) -> int:
    """Fit log(quantity) by a quadratic in log N at each learning rate and extrapolate it, with a 95 % prediction
    interval, to what is planned and has no row (arXiv 2309.14322, Figures 9 and 11). A CSV of rows has the columns
    n_params, lr, value and, if you like, diverged; an empty value asks for its prediction."""
    study, group, folder = _opened(arguments)
    quantity = _quantity(arguments, experiment_of(study)[1].quantities)
    series, predictions = instability.analyse(study, group, quantity, arguments.hold_out_largest, arguments.size)
    records = [one.record() for one in predictions]
    if records:
        tables.show(records)
    else:
        print("no planned run without a row; --hold-out-largest tries the fit on the largest size")
    for text in instability.notes(series, quantity):
        print(text)
    about = {"sweep": study.name, "quantity": quantity.name, "field": quantity.field, "threshold": quantity.threshold}
    about["measured"] = instability.measured_records(series)
    paths = tables.write(records, folder, "instability", about)
    _say(paths + figures.save(instability_panels(series, predictions, quantity), folder / "instability"))
    return 0


def do_report(arguments: argparse.Namespace) -> int:
    """One self-contained HTML page: of a sweep its question, claims, figures, tables, grid, versions, and the laws that
    are kept in its folder or its analysis/; of one kept law (LAW.json), or a folder of them, all that it says."""
    given = Path(arguments.sweep_dir)
    if is_law(given):
        path = arguments.out or given.with_suffix(".html")
        _check_law_options(arguments, given)
        write_law_report(given, path)
        _say([path])
        return 0
    if given.is_dir() and not is_study(given) and laws_of(given):
        path = arguments.out or given / "report.html"
        _check_law_options(arguments, *laws_of(given))
        write_laws(given, path)
        _say([path])
        return 0
    if arguments.source and not arguments.out:
        raise ConfigError("--source needs --out FILE.html: nothing is written into a published testbed")
    study = published.study(arguments.source, given) if arguments.source else load(arguments.sweep_dir)
    study = where(study, arguments.where)
    if arguments.experiment:
        paper, experiment = chosen(arguments.experiment)
        names = {"name": experiment.name, "paper": paper.name, "experiment": experiment.name}
        study = dataclasses.replace(study, **names, description="")
    path = arguments.out or _default_folder(arguments, f"{study.experiment if arguments.experiment else 'report'}.html")
    for line in write_report(study, path, arguments.figures):
        print(line)
    if arguments.traces:
        written = write_traces(study, arguments.traces)
        print(f"wrote {len(written)} traces to {arguments.traces}" if written else "no trace is looked at")
    return 0


def _check_law_options(arguments: argparse.Namespace, *kept: Path) -> None:
    for option in ("where", "experiment", "figures", "traces", "source"):
        if getattr(arguments, option):
            raise ConfigError(f"--{option} is for a page about runs; this one is about laws that were kept")
    tables.check_out(arguments.out, kept)


def do_inspect(arguments: argparse.Namespace) -> int:
    """Attention scores, activations, logits, gradients and parameters of a checkpoint, from a forward and a backward
    pass over the run's validation data, and the last update of training."""
    from scaling_testbed.config.compose import recorded_run
    from scaling_testbed.evaluation.inspection import by_place, inspect

    if arguments.sequences < 1:
        raise ConfigError(f"--sequences must be greater than zero; got {arguments.sequences}")
    run = recorded_run(arguments.run_dir)
    step, found = inspect(run, arguments.run_dir, step=arguments.step, sequences=arguments.sequences)
    if arguments.json:
        finite = {name: value if math.isfinite(value) else None for name, value in found.items()}
        print(json.dumps({"step": step, **finite}))
        return 0
    print(f"step {step:,} of {arguments.run_dir}, {found.pop('sequences'):,} validation sequences")
    for records in by_place(found):
        tables.show(records)
    return 0


def _opened(arguments: argparse.Namespace) -> tuple[Study, list[str], Path]:
    study = where(load(arguments.sweep_dir), arguments.where)
    folder = arguments.out or _default_folder(arguments, "analysis")
    tables.prepare(folder)
    return study, grouping_keys(study, arguments.group, experiment_of(study)[1].group), folder


def _default_folder(arguments: argparse.Namespace, name: str) -> Path:
    path = Path(arguments.sweep_dir)
    return path / name if path.is_dir() else path.with_name(f"{path.stem}_{name}")


def _quantity(arguments: argparse.Namespace, known: Sequence[Quantity]) -> Quantity:
    """What was asked for; where nothing was, the first of those that the study's experiment is about."""
    if known and arguments.eps is arguments.threshold is arguments.quantity is None:
        return known[0]
    if arguments.eps is None:
        threshold = 1e4 if arguments.threshold is None else arguments.threshold
        name = arguments.quantity or "attention_logit_max/0"
        return Quantity(name=name, field=AT_STEP, threshold=_positive("--threshold", threshold))
    if arguments.threshold is not None:
        raise ConfigError("give --threshold or --eps, not both: above the one, below the other is unstable")
    gradients = [one.name for one in known if not one.above]
    name = arguments.quantity or next(iter(gradients), FIRST_MLP)
    return Quantity(name=name, field=LAST_MEAN, threshold=_positive("--eps", arguments.eps), above=False)


def _positive(option: str, value: float) -> float:
    if not 0 < value < math.inf:
        raise ConfigError(f"{option} must be a number greater than zero; got {value:g}")
    return value


def _range(text: str) -> tuple[float, float]:
    try:
        low, high = map(float, text.split(","))
    except ValueError:
        low = high = 0.0
    if not 0 < low < high:
        raise ConfigError(f"--lr-range must be LOW,HIGH with 0 < LOW < HIGH; got {text!r}")
    return low, high


def _say(paths: Sequence[Path]) -> None:
    print("wrote " + ", ".join(map(str, paths)))
