"""The page about whatever a path holds: a sweep's rows, one kept law, or a folder of kept laws."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from scaling_testbed import tables
from scaling_testbed.analysis.rows import published
from scaling_testbed.analysis.rows.study import is_study, load, where
from scaling_testbed.errors import ConfigError
from scaling_testbed.papers.paper import chosen
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
) -> list[str]:
    """Write the page to `out`, by default into the sweep's folder or beside the file; returns what is to be said: each
    claim of the paper with its verdict and the number behind it, and the files that were written.

    Of runs only: conditions, those that fit all of them; experiment, [PAPER/]NAME, the one whose claims are judged, by
    default that of the sweep; source, the published testbed that `given` is a copy of, for which `out` must be named;
    figures, files for the page's figures (.png, .svg); traces, a folder for what the experiment looks at over the steps
    of each run. Raises ConfigError and UserError."""
    _check_endings(out, figures)
    of_runs: dict[str, object] = {
        "where": conditions,
        "experiment": experiment,
        "out FILE.png or FILE.svg": figures,
        "traces": traces,
        "source": source,
    }
    if is_law(given):
        _check_of_laws(of_runs, out, [given])
        page = out or given.with_suffix(".html")
        write_law_report(given, page)
        return [f"wrote {page}"]
    if given.is_dir() and not is_study(given) and (kept := laws_of(given)):
        _check_of_laws(of_runs, out, kept)
        page = out or given / "report.html"
        write_laws(given, page)
        return [f"wrote {page}"]
    if source and not out:
        raise ConfigError("--source needs --out FILE.html: nothing is written into a published testbed")
    study = where(published.study(source, given) if source else load(given), conditions)
    if experiment:
        paper, found = chosen(experiment)
        study = dataclasses.replace(study, name=found.name, paper=paper.name, experiment=found.name, description="")
    page = out or beside(given, f"{study.experiment if experiment else 'report'}.html")
    said = write_report(study, page, figures)
    if traces:
        written = write_traces(study, traces)
        said.append(f"wrote {len(written)} traces to {traces}" if written else "no trace is looked at")
    return said


def _check_endings(out: Path | None, figures: Sequence[Path]) -> None:
    for path, endings in [*([(out, PAGE)] if out else []), *((path, FIGURES) for path in figures)]:
        if path.suffix not in endings:
            raise ConfigError(f"{path}: the ending says the format and must be {' or '.join(endings)}")


def _check_of_laws(of_runs: dict[str, object], out: Path | None, kept: Sequence[Path]) -> None:
    for option, value in of_runs.items():
        if value:
            raise ConfigError(f"--{option} is for a page about runs; this one is about laws that were kept")
    tables.check_out(out, kept)
