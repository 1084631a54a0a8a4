"""Pages about the files that `analyze fit`, `laws`, `downstream`, `frontier` and `ladder` save with --out."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from scaling_testbed.analysis.figures.law_panels import (
    downstream_panels,
    fit_panels,
    frontier_panels,
    ladder_panels,
    laws_panels,
)
from scaling_testbed.analysis.laws.allocation import allocation_records
from scaling_testbed.analysis.laws.downstream import Chain, chain_from_record
from scaling_testbed.analysis.laws.fitted import Fit, from_record
from scaling_testbed.analysis.laws.forms import LAWS
from scaling_testbed.analysis.laws.groups import check_groups
from scaling_testbed.analysis.laws.selection import Selection, selection_from_record
from scaling_testbed.analysis.rows.study import check_version
from scaling_testbed.errors import ConfigError, UserError, check_choice
from scaling_testbed.files import read_json
from scaling_testbed.report import page

Record = dict[str, Any]
ADVICE = "give a file written by `analyze fit --out`"
FILTERS = (
    ("Only", "where"),
    ("For the law of the loss only", "where_loss"),
    ("For the law of the error only", "where_error"),
    ("Held out", "hold_out"),
)
Sections = list[page.Section]
Maker = Callable[[Record, str], tuple[str, list[str], Sections]]


READERS: Mapping[str | None, Callable[[Record], Fit | Chain | Selection]] = {
    "downstream": chain_from_record,
    "laws": selection_from_record,
}


def holds_groups(path: Path) -> bool:
    """Whether a file holds laws of groups that were fitted together. Raises UserError if it cannot be read."""
    return isinstance(_record(path).get("groups"), dict)


def read(path: Path, of: str | None = None) -> Fit | Chain | Selection:
    """A saved law, two chained laws, or compared laws. of: the value of --by whose law is read, if the file holds
    several groups. Raises UserError if the file holds none of them, and ConfigError for another group."""
    record = _record(path)
    if isinstance(groups := record.get("groups"), dict):
        check_choice("--of", of or "", groups)
        record = groups[of]
    elif of is not None:
        raise ConfigError(f"--of {of}: {path} holds no groups; `fit --by` makes them")
    try:
        return READERS.get(_kind(record), from_record)(record)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not a fit written by `analyze fit --out` ({error})") from None


def _record(path: Path) -> Record:
    """The content of a file that should hold a saved law. Raises UserError if it cannot be read."""
    record = read_json(path, advice=ADVICE)
    check_version(record, path)
    return record


def is_law(path: Path) -> bool:
    """Whether a path is a saved law, and not a table of rows.

    True also for a .json file that cannot be read: its page then shows the error.
    """
    if path.suffix != ".json" or not path.is_file():
        return False
    try:
        content = read_json(path, expect=object)
    except UserError:
        return True
    return isinstance(content, dict) and _kind(content) is not None


def laws_of(folder: Path) -> list[Path]:
    """The saved laws in the folder of a sweep or study, and in its analysis/."""
    return [path for place in (folder, folder / "analysis") for path in sorted(place.glob("*.json")) if is_law(path)]


def write_law_report(path: Path, out: Path, command: str = "") -> None:
    """Write the page of the law in `path`. command: the one that makes the page, shown there.

    Raises UserError if a file cannot be read or written.
    """
    title, intro, sections = _content(path)
    made = page.made(command, [("Law", page.link(path.name, path, out), False)])
    page.write(out, title, intro, [*sections, (page.SOURCES, made)])


def write_law_page(record: Record, out: Path) -> None:
    """Write the page of a law from the record of a FitReport, ChainReport, FrontierReport or LadderReport.

    Raises UserError if the page cannot be written.
    """
    page.write(out, *_content_of(json.loads(json.dumps(record)), "f"))


def section(path: Path, names: str) -> page.Section:
    """A saved law as one section of a larger page. names: the prefix that makes the ids of its figures unique."""
    title, intro, sections = _content(path, names)
    return f"{title} ({path.name})", page.paragraphs(intro) + page.render("subsections", sections=sections)


def _content(path: Path, names: str = "f") -> tuple[str, list[str], Sections]:
    """The title, the first lines and the sections of a page."""
    record = _record(path)
    try:
        return _content_of(record, names)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:  # e.g. a size of 0
        raise UserError(f"{path} was not written by `analyze fit --out` ({error!r})") from None


def _content_of(record: Record, names: str) -> tuple[str, list[str], Sections]:
    title, formulas, sections = MAKERS[_kind(record)](record, names)
    chosen = [f"{name}: {'; '.join(record[key])}" for name, key in FILTERS
              if record.get(key)]  # fmt: skip
    return title, [*formulas, f"Rows: {record.get('rows')}.", *chosen], sections


def _kind(record: Mapping[str, Any]) -> str | None:
    """The command that saved the record; None if no command did."""
    if isinstance(record.get("loss"), dict) and isinstance(record.get("downstream"), dict):
        return "downstream"
    if isinstance(record.get("groups"), dict) and "by" in record:
        return "groups"
    if isinstance(record.get("laws"), list) and isinstance(record.get("fits"), dict):
        return "laws"
    if "law" not in record or "params" not in record:
        return None
    return "frontier" if "optima_by_budget" in record else "ladder" if "frontier" in record else "fit"


def _fit(record: Record, names: str) -> tuple[str, list[str], Sections]:
    fit = from_record(record)
    fitted, held_out = record["fitted"], record["predictions"]
    return f"The law {fit.law}", _formula(fit), [
        ("Warnings", page.paragraphs(record["warnings"])),
        ("Parameters", _parameters(fit)),
        ("Figures", page.figures(fit_panels(fit, fitted, held_out), names)),
        ("Held-out runs", page.table(held_out)),
        ("Smaller models of the same loss", _allocation(fit, fitted)),
        ("Fitted runs", page.table(fitted)),
    ]  # fmt: skip


def _laws(record: Record, names: str) -> tuple[str, list[str], Sections]:
    found = selection_from_record(record)
    kept = [f"{one.fit.law}: {LAWS[one.fit.law].formula}" for one in found.laws.values() if one.share]
    return "Laws that were compared", kept, [
        ("Warnings", page.paragraphs(record["warnings"])),
        ("Laws", page.table(found.records()) + page.paragraphs([found.reason, f"Intervals are {found.calibrated}."])),
        ("Figures", page.figures(laws_panels(found, record["predictions"]), names)),
        ("Held-out runs", page.table(record["predictions"])),
        *((f"Parameters of {name}", _parameters(one.fit)) for name, one in found.laws.items() if one.share),
    ]  # fmt: skip


def _groups(record: Record, names: str) -> tuple[str, list[str], Sections]:
    check_groups(record)
    fits = {name: from_record(one) for name, one in record["groups"].items()}
    first = next(iter(fits.values()))
    return f"The law {first.law} of each {record['by']}", _formula(first), [
        ("Warnings", page.paragraphs(record["warnings"])),
        ("What the groups share", page.table(record["sharing"]) + page.paragraphs([record["reason"]])),
        *((f"Parameters of {name}", _parameters(one, "rows of each group")) for name, one in fits.items()),
        ("Held-out runs", page.table(record["predictions"])),
        ("Fitted runs", page.table(record["fitted"])),
    ]  # fmt: skip


def _downstream(record: Record, names: str) -> tuple[str, list[str], Sections]:
    chain = chain_from_record(record)
    loss, error = chain.loss, chain.downstream
    held_out = record["predictions"]
    warnings = [*(f"{fit.law}: {text}" for fit in (loss, error) for text in fit.warnings), *record["warnings"]]
    drawn = [*fit_panels(loss, record["fitted_loss"], []),
             *downstream_panels(error, record["fitted_downstream"], held_out)]  # fmt: skip
    return f"From {loss.law} to downstream error", [*_formula(loss), *_formula(error)], [
        ("Warnings", page.paragraphs(warnings)),
        (f"Parameters of {loss.law}", _parameters(loss)),
        (f"Parameters of {error.law}", _parameters(error)),
        ("Figures", page.figures(drawn, names)),
        ("Held-out runs", page.table(held_out)),
    ]  # fmt: skip


def _frontier(record: Record, names: str) -> tuple[str, list[str], Sections]:
    fit, optima, method = from_record(record), record["optima_by_budget"], record["method"]
    return f"The best size of each budget, by {method}", _formula(fit), [
        ("Warnings", page.paragraphs(record["warnings"])),
        ("Parameters", _parameters(fit, "runs of each budget")),
        ("Figures", page.figures(frontier_panels(record["runs"], optima, fit, method), names)),
        ("Budgets", page.table(optima)),
    ]  # fmt: skip


def _ladder(record: Record, names: str) -> tuple[str, list[str], Sections]:
    fit, frontier = from_record(record), record["frontier"]
    return "The ladder of configurations", [*_formula(fit), f"{record['n_runs']} runs."], [
        ("Warnings", page.paragraphs(record["warnings"])),
        ("Parameters", _parameters(fit)),
        ("Figures", page.figures(ladder_panels(frontier, fit), names)),
        ("The frontier", page.table(frontier)),
    ]  # fmt: skip


MAKERS: Mapping[str | None, Maker] = {
    "fit": _fit,
    "groups": _groups,
    "laws": _laws,
    "downstream": _downstream,
    "frontier": _frontier,
    "ladder": _ladder,
}


def _formula(fit: Fit) -> list[str]:
    return [LAWS[fit.law].formula, LAWS[fit.law].source]


def _parameters(fit: Fit, resampled: str = "rows") -> Markup:
    return page.paragraphs([fit.summary(), *fit.about_intervals(resampled)]) + page.table(fit.table())


def _allocation(fit: Fit, fitted: Sequence[Mapping[str, Any]]) -> Markup:
    """Models of equal loss at the largest compute of the fitted runs."""
    if not fitted or not {"n_params", "n_tokens"} <= set(fitted[0]):
        return Markup()
    flops = max(6 * one["n_params"] * one["n_tokens"] for one in fitted)
    try:
        records = allocation_records(fit, flops)
    except ConfigError:  # the law has another output than the loss, or no minimum
        return Markup()
    return page.paragraphs([f"At {flops:.3g} FLOPs, the largest compute of the fitted runs."]) + page.table(records)
