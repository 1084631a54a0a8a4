"""The rows of a study, its planned runs, and the traces of its runs.

A study has one of three forms: the folder of a sweep (run folders with result.json); a folder with results.jsonl,
.jsonl.gz or .parquet and metrics/<run_id>.jsonl or .jsonl.gz; or a file of rows, .jsonl, .jsonl.gz, .json, .csv or
.parquet. A planned run without a final row is kept by name, without any substitute for its result.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any

from scaling_testbed.analysis.rows.conditions import parse as parse_condition
from scaling_testbed.analysis.rows.conditions import text
from scaling_testbed.analysis.rows.tables import Row, is_flat, json_lines, read_json, read_table
from scaling_testbed.errors import ConfigError, UserError
from scaling_testbed.runs.folder import read_metrics
from scaling_testbed.runs.row import FINAL

LR, SIZE = "optimizer.lr", "n_params_non_embedding"
OTHERS_FINISHED = ("completed", "complete", "success", "succeeded", "done", "ok")
ABOUT = ("sweep", "scale", "paper", "experiment", "description")  # keys of sweep.json
ALIASES = {"lr": LR, "n_params": SIZE}  # columns of a hand-made table


@dataclass(frozen=True, kw_only=True)
class Study:
    """The rows of a sweep or of a file.

    rows: one for each finished or diverged run. missing: for each planned run without a row, its configuration and
    parameter counts, `status` (missing | failed | preempted) and `label`. planned: whether a plan lists the expected
    runs. sweep, scale, paper, experiment: from sweep.json, None if absent. name: the sweep, or the name of the folder
    or file; used for titles only.
    """

    name: str
    path: Path
    rows: list[Row]
    missing: list[Row] = field(default_factory=list)
    planned: bool = False
    sweep: str | None = None
    scale: str | None = None
    paper: str | None = None
    experiment: str | None = None
    description: str = ""

    def trace(self, row: Row) -> list[Row]:
        """The recorded steps of a row's run; empty if there is no file of them."""
        if row.get("run_id") is None:
            return []
        run_id = str(row["run_id"])
        folder = self.path if self.path.is_dir() else self.path.parent
        places = [
            folder / run_id / "metrics.jsonl",
            *(folder / "metrics" / f"{run_id}.jsonl{end}" for end in ("", ".gz")),
        ]
        return next((read_metrics(place) for place in places if place.exists()), [])


def load(path: str | Path) -> Study:
    """Read a study. Raises UserError if there is nothing to read, or if a file is not a table of rows."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path} does not exist; give a sweep's folder (runs/NAME), or a file of rows")
    folder = path if path.is_dir() else path.parent if path.name.startswith("results.") else None
    about = _about(folder) if folder else {}
    found = _folder_rows(path) if path.is_dir() else _file_rows(path)
    finals = [row for row in found if row.get("status", "finished") in FINAL]
    plan = folder / "plan.jsonl" if folder and (folder / "plan.jsonl").exists() else None
    missing = _missing(plan, found) if plan else unfinished(found)
    if not finals and not missing:
        raise UserError(f"{path} holds no row yet; `sweep status` shows the progress of its runs")
    return Study(
        name=about.get("sweep") or (folder.resolve().name if folder else path.stem),
        path=path,
        planned=plan is not None,
        rows=sorted(finals, key=lambda row: str(row.get("run_id"))),
        missing=missing,
        **{key: about.get(key) for key in ABOUT if key != "description"},
        description=about.get("description") or "",
    )


def where(study: Study, conditions: Iterable[str]) -> Study:
    """The runs of a study that match every condition.

    Raises ConfigError if no run matches, or if a text is not a condition.
    """
    rows, missing = study.rows, study.missing
    for typed in conditions:
        fits = parse_condition("--where", typed, [*study.rows, *study.missing])  # including runs that others excluded
        rows, missing = list(filter(fits, rows)), list(filter(fits, missing))
        if not rows and not missing:
            raise ConfigError(f"--where {typed}: no run of {study.path} matches")
    return Study(**{**vars(study), "rows": rows, "missing": missing})


def several_sources(rows: Iterable[Row]) -> str | None:
    """A text about the first plug-in with several versions among the rows; None if there is none.

    Rows of a flat table hold no versions, so they are ignored.
    """
    hashes: dict[str, set[str]] = {}
    for row in rows:
        for name, sha256 in plugins.items() if isinstance(plugins := row.get("plugins"), dict) else ():
            hashes.setdefault(name, set()).add(str(sha256)[:12])
    found = next((name for name, several in hashes.items() if len(several) > 1), None)
    return found and f"{len(hashes[found])} versions of the plug-in {found} ({', '.join(sorted(hashes[found]))})"


def number(row: Row, key: str) -> float:
    """A number of a row; nan if it is null, which stands for a number that is not finite. Raises UserError if it is
    not a number."""
    value = row.get(key, "absent")
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise UserError(
            f"{name_of(row)}: {key} must be a number, got {value if value != 'absent' else 'no such column'}"
        )
    return float(value)


def name_of(row: Row) -> str:
    """The name of a row's run for messages."""
    for key in ("label", "name" if not row.get("run_id") else "label"):
        if row.get(key):
            return str(row[key])
    if row.get("run_id"):
        return f"run {row['run_id']}"
    place = [f"row {row['row']}"] if row.get("row") is not None else []
    known = [f"{name}={text(row[key])}" for name, key in (("lr", LR), ("N", SIZE)) if key in row]
    return " ".join([*place, *known]) or "a row without a name"


def _about(path: Path) -> dict[str, Any]:
    file = path / "sweep.json"
    about = read_json(file) if file.exists() else {}
    if not isinstance(about, dict):
        raise UserError(f"{file} must be one JSON object that names the sweep")
    for key in ABOUT:
        if not isinstance(about.get(key), (str, NoneType)):
            raise UserError(f"{file}: {key} must be a text or null; got {about[key]!r}")
    return about


def _result(file: Path) -> Row:
    row = read_json(file)
    if not isinstance(row, dict):
        raise UserError(f"{file} holds no row; a row is one JSON object")
    return row


def is_study(path: Path) -> bool:
    """Whether a folder is that of a sweep, with rows or with a plan."""
    return _collected(path) is not None or (path / "plan.jsonl").exists() or any(path.glob("*/result.json"))


def _collected(folder: Path) -> Path | None:
    places = (folder / f"results.{end}" for end in ("jsonl", "jsonl.gz", "parquet"))
    return next((path for path in places if path.exists()), None)


def _folder_rows(folder: Path) -> list[Row]:
    files = sorted(folder.glob("*/result.json"))
    if files:
        return [_result(file) for file in files]
    collected = _collected(folder)
    if collected is None and not (folder / "plan.jsonl").exists():
        raise UserError(f"{folder} has neither run folders nor results.jsonl; give a sweep's folder (runs/NAME)")
    return _file_rows(collected) if collected else []


def _file_rows(path: Path) -> list[Row]:
    return in_our_words(read_table(path), is_flat(path))


def in_our_words(records: Iterable[Row], is_flat: bool) -> list[Row]:
    """Records of any origin with this testbed's names of columns and statuses, and `row` numbered from 1.

    is_flat: whether they are lines of a table, where an empty cell can mean that the result is not there yet.
    """
    rows = map(_with_our_status, records)
    rows = map(_planned_if_empty, rows) if is_flat else rows
    return [_with_full_names({**row, "row": row.get("row", place)}) for place, row in enumerate(rows, 1)]


def _planned_if_empty(row: Row) -> Row:
    """A line of a table; it becomes a planned run without a row if its result is empty and it has no status."""
    empty = any(key in row and row[key] is None for key in ("val_loss", "value"))
    return {**row, "status": "missing"} if empty and "status" not in row else row


def _with_our_status(row: Row) -> Row:
    """The row with its status translated to this testbed's word, if there is one of the same meaning."""
    if "status" not in row:
        return row
    if row["status"] is None:
        return {key: value for key, value in row.items() if key != "status"}
    said = str(row["status"]).lower()
    return {**row, "status": "finished" if said in OTHERS_FINISHED else said if said in FINAL else row["status"]}


def _with_full_names(row: Row) -> Row:
    for short, full in ALIASES.items():
        if short in row and full not in row:
            row = {**row, full: row[short]}
    return row


def unfinished(found: list[Row]) -> list[Row]:
    """The rows without a result, each with its status in the label."""
    rows = [row for row in found if row.get("status", "finished") not in FINAL]
    return [{**row, "label": f"{name_of(row)} ({row['status']})"} for row in rows]


def _missing(plan: Path, found: list[Row]) -> list[Row]:
    """The planned runs without a final row, as rows without results.

    Each holds the configuration from the plan. Raises UserError if an earlier version wrote the plan without
    configurations.
    """
    state = {row.get("run_id"): row.get("status", "finished") for row in found}
    planned = json_lines(plan)
    rows = []
    for run in (run for run in planned if state.get(run.get("run_id")) not in FINAL):
        if not run.get("config"):
            raise UserError(
                f"{plan}: the planned run {run.get('run_id')} has no row, and an earlier version wrote its line "
                "without a configuration; type the `sweep run` command of this sweep again to rewrite the plan"
            )
        status = state.get(run["run_id"], "missing")
        varied = " ".join(f"{key}={value}" for key, value in run.get("varied", {}).items())
        named = {"run_id": run["run_id"], "status": status, "label": f"{run['run_id']} ({varied}; {status})"}
        rows.append({**run["config"], **named})
    return rows
