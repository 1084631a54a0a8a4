"""Write the page of a path: the rows of a sweep, one saved law, or a folder of saved laws."""

import dataclasses
import shlex
from collections.abc import Sequence
from pathlib import Path

from scaling_testbed import tables
from scaling_testbed.analysis.figures.drawing import check_width
from scaling_testbed.analysis.rows import published
from scaling_testbed.analysis.rows.study import is_study, load, where
from scaling_testbed.errors import ConfigError
from scaling_testbed.papers.paper import chosen
from scaling_testbed.plugins import loaded_plugins
from scaling_testbed.report.law import is_law, laws_of, write_law_report
from scaling_testbed.report.sweep import write_laws, write_report, write_traces
from scaling_testbed.row_files import FIGURES, PAGE, beside


def write(
    given: Path,
    out: Path | None = None,
    *,
    conditions: Sequence[str] = (),
    experiment: str | None = None,
    source: str | None = None,
    figures: Sequence[Path] = (),
    traces: Path | None = None,
    lr_range: tuple[float, float] | None = None,
    width: str | None = None,
) -> list[str]:
    """Write the page to `out`, by default into the sweep's folder or beside the file. Without `out`, only the figures
    are written if there are any.

    Returns lines to print: each claim of the paper with its verdict and numbers, and the written files. These arguments
    apply to runs only. conditions: the page uses the runs that match all of them. experiment: [PAPER/]NAME, whose
    claims are judged, by default that of the sweep. source: the published testbed of which `given` is a copy; it needs
    `out`. figures: files for the page's figures (.png, .svg, .pdf). width: of these files, a single or double column of
    a paper. traces: a folder for the traces that the experiment uses. lr_range: of the learning-rate sensitivity S.
    Raises ConfigError or UserError.
    """
    _check(out, figures, width)
    of_runs: dict[str, object] = {
        "where": conditions,
        "experiment": experiment,
        "out FILE.png, FILE.svg or FILE.pdf": figures,
        "width": width,
        "traces": traces,
        "lr-range": lr_range,
        "source": source,
    }
    command = _command(given, out, conditions, experiment, source, figures, traces, lr_range, width)
    if is_law(given):
        _check_of_laws(of_runs, out, [given])
        page = out or given.with_suffix(".html")
        write_law_report(given, page, command)
        return [f"wrote {page}"]
    if given.is_dir() and not is_study(given) and (kept := laws_of(given)):
        _check_of_laws(of_runs, out, kept)
        page = out or given / "report.html"
        write_laws(given, page, command)
        return [f"wrote {page}"]
    if source and not out:
        raise ConfigError("--source needs --out FILE.html: the copy of a published testbed is never changed")
    study = where(published.study(source, given) if source else load(given), conditions)
    if experiment:
        paper, found = chosen(experiment)
        study = dataclasses.replace(study, name=found.name, paper=paper.name, experiment=found.name, description="")
    default = beside(given, f"{study.experiment if experiment else 'report'}.html")
    said = write_report(study, out or (None if figures else default), figures, lr_range, width, command)
    if traces:
        written = write_traces(study, traces)
        said.append(f"wrote {len(written)} traces to {traces}" if written else "the experiment uses no trace")
    return said


def _check(out: Path | None, figures: Sequence[Path], width: str | None) -> None:
    check_width(width)
    if width is not None and not figures:
        raise ConfigError("--width applies to figures; give --out FILE.pdf too")
    for path, endings in [*([(out, PAGE)] if out else []), *((path, FIGURES) for path in figures)]:
        if path.suffix not in endings:
            raise ConfigError(f"{path}: the file must end in {' or '.join(endings)}")


def _check_of_laws(of_runs: dict[str, object], out: Path | None, kept: Sequence[Path]) -> None:
    for option, value in of_runs.items():
        if value:
            raise ConfigError(f"--{option} applies to a page about runs; this page is about saved laws")
    tables.check_out(out, kept)


def _command(
    given: Path,
    out: Path | None,
    conditions: Sequence[str],
    experiment: str | None,
    source: str | None,
    figures: Sequence[Path],
    traces: Path | None,
    lr_range: tuple[float, float] | None,
    width: str | None,
) -> str:
    """The command that writes the same page."""
    options: list[tuple[str, object]] = [("--plugins", one.typed) for one in loaded_plugins()]
    options += [("--where", one) for one in conditions]
    options += [("--experiment", experiment), ("--source", source), ("--traces", traces)]
    options += [("--lr-range", f"{lr_range[0]:g},{lr_range[1]:g}" if lr_range else None)]
    options += [("--out", one) for one in (out, *figures)]
    options += [("--width", width)]
    words = [word for option, value in options if value is not None for word in (option, str(value))]
    return f"python -m scaling_testbed.analyze report {shlex.join([str(given), *words])}"
