"""One page about a fitted law, from the file that `analyze fit --out` keeps."""

import json
from pathlib import Path
from typing import Any

from scaling_testbed.analysis import page
from scaling_testbed.analysis.allocation import allocate
from scaling_testbed.analysis.fitting import Fit, from_record
from scaling_testbed.analysis.law_panels import fit_panels
from scaling_testbed.analysis.laws import LAWS
from scaling_testbed.errors import ConfigError, UserError


def read(path: Path) -> tuple[Fit, dict[str, Any]]:
    """A kept fit, and all that stands in its file. Raises UserError for what is none."""
    try:
        record = json.loads(path.read_text())
        return from_record(record), record
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no fit that `analyze fit --out` has written ({error})") from None


def is_fit(path: Path) -> bool:
    """Whether a path is a kept fit, and not a table of rows."""
    if path.suffix != ".json" or not path.is_file():
        return False
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and "law" in content and "params" in content


def write_law_report(path: Path, out: Path) -> None:
    """Write the page of the fit in `path`: formula, warnings, parameters, figures, held-out runs beside their
    predictions, and what smaller models cost. Raises UserError where it cannot be read or written."""
    fit, record = read(path)
    law = LAWS[fit.law]
    fitted, held_out = record.get("fitted", []), record.get("predictions", [])
    starts = f"{fit.starts['reached_best']} of {fit.starts['tried']} starts reached it"
    objective = f"{fit.objective['name']} {fit.objective['value']:.6g} over {fit.n_rows} rows; {starts}."
    chosen = [f"{name}: {'; '.join(record[key])}" for name, key in (("Only", "where"), ("Held out", "hold_out"))
              if record.get(key)]  # fmt: skip
    sections = [
        ("Warnings", page.paragraphs(fit.warnings)),
        ("Parameters", page.paragraphs([objective]) + page.table(fit.table())),
        ("Figures", page.figures(fit_panels(fit, fitted, held_out)) if fitted else ""),
        ("Held-out runs", page.table(held_out)),
        ("Smaller models of the same loss", _allocation(fit, fitted)),
        ("Fitted runs", page.table(fitted)),
    ]
    intro = [law.formula, law.source, f"N is {fit.size}. Rows: {record.get('rows')}.", *chosen]
    page.write(out, f"The law {fit.law}", intro, sections)


def _allocation(fit: Fit, fitted: list[dict[str, Any]]) -> str:
    """At the largest compute that was fitted."""
    if not fitted or not {"n_params", "n_tokens"} <= set(fitted[0]):
        return ""
    flops = max(6 * one["n_params"] * one["n_tokens"] for one in fitted)
    try:
        records = [one.record() for one in allocate(fit, flops)]
    except ConfigError:  # no law of a loss, or one without a valley
        return ""
    return page.paragraphs([f"At {flops:.3g} FLOPs, the most that was fitted."]) + page.table(records)
