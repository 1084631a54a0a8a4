"""The commands about a grid over learning rates: lr_sensitivity, instability and decide."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from scaling_testbed.commands import output, spellings
from scaling_testbed.commands.options import Group, Json, LrRange, Rows, Size, SweepDir, Where, Width, ends, out
from scaling_testbed.errors import ConfigError
from scaling_testbed.row_files import ENDINGS, beside

ALL = (".csv", ".json", ".png", ".svg")  # the default formats
Out = Annotated[
    Sequence[str],
    out(
        "write only this file, in the format of its ending: table with its definition (.json), table (.csv, .jsonl, "
        ".parquet), figure (.png, .svg, .pdf); default: .csv, .json, .png and .svg in SWEEP_DIR/analysis/"
    ),
]
QuantityName = Annotated[
    str | None,
    typer.Option(
        "--quantity", metavar="NAME",
        help="default: that of the sweep's experiment, or attention_logit_max/0; with --eps, the first MLP's gradient",
    ),
]  # fmt: skip
Threshold = Annotated[
    float | None, typer.Option("--threshold", metavar="X", help="unstable above this value (default: 1e4)")
]
Eps = Annotated[
    float | None,
    typer.Option(
        "--eps", metavar="X",
        help="instead of --threshold: unstable if the mean of the last steps is below this value, e.g. AdamW's eps",
    ),
]  # fmt: skip
Predict = Annotated[
    str | None,
    typer.Option(
        "--predict",
        metavar="model=NAME",
        help="call at which rates a model that was not trained will be harmed, from the smaller sizes",
    ),
]
Check = Annotated[
    Path | None,
    typer.Option("--check", metavar="FILE", help="the calls that --predict saved, beside what SWEEP_DIR measured"),
]  # fmt: skip
HoldOutLargest = Annotated[
    bool,
    typer.Option(
        "--hold-out-largest",
        help="leave the largest size out of the fit, and show its prediction beside its measured value",
    ),
]
Setting = Annotated[
    Sequence[str],
    typer.Option(
        "--setting", metavar="KEY",
        help="the key whose values are compared, e.g. optimizer.name; repeatable, for keys that vary together",
    ),
]  # fmt: skip
TargetSize = Annotated[
    float | None,
    typer.Option("--target-size", metavar="N", help="N of the target, as the rows have it (default: the largest)"),
]
OneLr = Annotated[
    float | None, typer.Option("--lr", metavar="X", help='the rate of "one rate" (default: each of the grid in turn)')
]
SmallLr = Annotated[
    float | None,
    typer.Option("--small-lr", metavar="X", help='the rate of "small rate" (default: the lowest of the grid)'),
]
ValidationSet = Annotated[
    str | None,
    typer.Option(
        "--validation-set", metavar="NAME",
        help="compare the losses on this one of evaluation.sets (default: the run's own validation data)",
    ),
]  # fmt: skip
OutDecisions = Annotated[
    Sequence[Path],
    out("save the table (.csv, .jsonl, .parquet), all of it (.json), or the figure (.png, .svg)"),
]


def lr_sensitivity(
    sweep_dir: SweepDir,
    where: Where = (),
    group: Group = (),
    size: Size = "n_params_non_embedding",
    lr_range: LrRange = None,
    as_json: Json = False,
    out: Out = (),
    width: Width = None,
) -> None:
    """S, the sensitivity to the learning rate, and the critical rate, with their figure.

    S is computed for each size and condition. It is the mean over the learning rates of min(final loss, loss at
    initialisation), minus the lowest of these values (arXiv 2309.14322, section 2.2). The critical rate is where the
    loss passes its best by 0.25 nats, or by what the sweep declares. Intervals over seeds are at 95 %."""
    from scaling_testbed import api
    from scaling_testbed.analysis.curves.lr_sensitivity import BEST_LOSS, DEFINITION, rates_note
    from scaling_testbed.analysis.figures.drawing import check_width
    from scaling_testbed.analysis.figures.panels import sensitivity_panels
    from scaling_testbed.analysis.rows.given import study_of
    from scaling_testbed.papers.declaration import of_study

    check_width(width)
    study = study_of(sweep_dir, where)
    counted = ends(lr_range) if lr_range else of_study(study)[0].lr_range
    files = _files(out, sweep_dir, "lr_sensitivity", width)
    found = api.lr_sensitivity(study, group=group, size=size, lr_range=ends(lr_range) if lr_range else None)
    about = {"sweep": study.name, "definition": DEFINITION, "size": size}
    several = any(len(one.curve.seeds) > 1 for one in found)
    said = [DEFINITION, rates_note(found, counted), *([BEST_LOSS] if several else [])]
    _answer([one.record() for one in found], about, said, lambda: sensitivity_panels(found), files, as_json, width)


def instability(
    sweep_dir: SweepDir,
    where: Where = (),
    group: Group = (),
    size: Size = "n_params_non_embedding",
    quantity: QuantityName = None,
    threshold: Threshold = None,
    eps: Eps = None,
    hold_out_largest: HoldOutLargest = False,
    predict: Predict = None,
    check: Check = None,
    as_json: Json = False,
    out: Out = (),
    width: Width = None,
) -> None:
    """Extrapolate a diagnostic to sizes that were not trained.

    Fits log(quantity) by a quadratic in log N at each learning rate. Extrapolates the fit, with a 95 % prediction
    interval, to planned runs without a row (arXiv 2309.14322, Figures 9 and 11). A CSV of rows has the columns
    n_params, lr, value and, optionally, diverged; a row with an empty value is predicted."""
    from scaling_testbed import api
    from scaling_testbed.analysis.curves.instability import measured_records
    from scaling_testbed.analysis.figures.drawing import check_width
    from scaling_testbed.analysis.figures.panels import instability_panels
    from scaling_testbed.analysis.rows.given import study_of

    check_width(width)
    study = study_of(sweep_dir, where)
    if predict is not None or check is not None:
        if predict is not None and check is not None:
            raise ConfigError("give --predict or --check, not both: --check reads what --predict has saved")
        unused: dict[str, object] = {"--threshold": threshold, "--eps": eps, "--hold-out-largest": hold_out_largest}
        unused |= {"--quantity": quantity if check else None, "--size": size != "n_params_non_embedding"}
        for option in (option for option, value in unused.items() if value):
            raise ConfigError(f"{option} does not apply to --{'check' if check else 'predict'}")
        if width is not None:
            raise ConfigError("--width applies to figures; calls have none")
        _calls(study, predict, check, quantity, group, [Path(file) for file in out], as_json)
        return
    files = _files(out, sweep_dir, "instability", width)
    found = api.instability(
        study,
        quantity=quantity,
        threshold=threshold,
        eps=eps,
        hold_out_largest=hold_out_largest,
        group=group,
        size=size,
    )
    asked = found.quantity
    about = {"sweep": study.name, "quantity": asked.name, "field": asked.field, "threshold": asked.threshold}
    about["measured"] = measured_records(found.series)
    none = "no planned run without a row; --hold-out-largest tries the fit on the largest size"
    said = [*([] if found.predictions else [none]), *found.notes()]

    def draw():
        return instability_panels(found.series, found.predictions, asked)

    _answer(found.records(), about, said, draw, files, as_json, width)


def decide(
    rows: Rows,
    setting: Setting,
    target_size: TargetSize = None,
    lr: OneLr = None,
    small_lr: SmallLr = None,
    validation_set: ValidationSet = None,
    where: Where = (),
    size: Size = "n_params_non_embedding",
    as_json: Json = False,
    out: OutDecisions = (),
) -> None:
    """How often small runs choose between settings as large ones do.

    Of all pairs of values of a setting, the share whose order at the target size is that at a smaller size, or that of
    a law of the sizes up to it: the decision accuracy of arXiv 2504.11393, beside the compute of the small runs as a
    share of the target's. The rate is tuned for each value, or one for all, or a small one for all (arXiv 2512.24503).
    Intervals are at 95 %, over seeds."""
    from scaling_testbed import api
    from scaling_testbed.analysis.figures.panels import decision_panels

    output.check(out, (*ENDINGS, *output.FIGURES), [rows])
    found = api.decide(
        rows,
        setting,
        target_size=target_size,
        lr=lr,
        small_lr=small_lr,
        validation_set=validation_set,
        where=where,
        size=size,
    )
    about = {"setting": found.setting, "values": found.values, "seeds": found.seeds, "target": found.target}
    _answer(
        found.records(),
        {**about, "remarks": found.remarks},
        found.remarks,
        lambda: decision_panels(found),
        out,
        as_json,
    )


def _calls(
    study, predict: str | None, check: Path | None, quantity: str | None, group: Sequence[str], out: list[Path], as_json
) -> None:
    """The calls for a model that was not trained, or the calls of a file beside their outcomes."""
    from scaling_testbed import api
    from scaling_testbed.analysis.curves.calls import outcomes
    from scaling_testbed.analysis.rows.tables import read_table
    from scaling_testbed.papers.declaration import of_study

    output.check(out, ENDINGS, [study.path])
    if predict is not None:
        key, _, model = predict.partition("=")
        if key != "model" or not model:
            raise ConfigError(f"--predict must be model=NAME, a model of configs/model; got {predict!r}")
        made = api.calls(study, model, quantity=quantity, group=group or None)
        records: list[dict] = [one.record() for one in made]
        excess = of_study(study)[0].critical_excess
        said = [f"harmed: the loss is at least {excess:g} nats above the best of the size, in the mean over seeds"]
    else:
        assert check is not None
        found = outcomes(read_table(check), study, group, of_study(study)[0].critical_excess)
        records, said = found.records, found.notes()
    _answer(records, {"sweep": study.name}, said, None, out, as_json)


def _answer(
    records: list[dict],
    about: dict,
    said: Sequence[str],
    draw,
    files: Sequence[Path],
    as_json: bool,
    width: str | None = None,
) -> None:
    document = {**about, "rows": records}
    written = output.write(files, records, document=document, indent=1, draw=draw, width=width)
    if as_json:
        output.print_json(document)
        return
    from scaling_testbed import tables

    if records:
        tables.show(records)
    for line in said:
        print(line)
    output.say_written(written)


def _files(out: Sequence[str], sweep_dir: Path, name: str, width: str | None) -> list[Path]:
    """The files to write: those of --out, by default one of each kind in a folder.

    A folder after --out is the old spelling of one file of each kind in it.
    """
    if not out:
        found = _of_each_kind(beside(sweep_dir, "analysis"), name)
    else:
        found = []
        for text in out:
            path = Path(text)
            if text.endswith("/") or path.is_dir() or not path.suffix:
                files = _of_each_kind(path, name)
                spellings.said(f"--out {text}", " ".join(f"--out {file}" for file in files))
                found += files
            else:
                found.append(path)
    output.check(found, (*ENDINGS, *output.FIGURES), [sweep_dir])
    if width is not None and not any(path.suffix in output.FIGURES for path in found):
        raise ConfigError("--width applies to figures; give --out FILE.pdf too")
    return found


def _of_each_kind(folder: Path, name: str) -> list[Path]:
    return [folder / f"{name}{ending}" for ending in ALL]
