"""The rows of a study, what was planned beside them, and the traces of its runs.

A study is a sweep's folder (run folders with result.json), a folder with results.jsonl, .jsonl.gz or .parquet and
metrics/<run_id>.jsonl or .jsonl.gz, or a file of rows, .jsonl, .jsonl.gz, .json, .csv or .parquet. A run that was
planned and has no final row is kept by name: nothing stands in for it.
"""

import csv
import gzip
import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from scaling_testbed.analysis.rows.conditions import parse as parse_condition
from scaling_testbed.analysis.rows.conditions import text
from scaling_testbed.errors import ConfigError, UserError
from scaling_testbed.runs.folder import read_metrics
from scaling_testbed.runs.row import FINAL

Row = dict[str, Any]

SCALES = ("paper", "gpu_hour", "cpu")
LR, SIZE = "optimizer.lr", "n_params_non_embedding"
NOTHING = ("", "na", "n/a", "null", "-")  # in a cell
OTHERS_FINISHED = ("completed", "complete", "success", "succeeded", "done", "ok")
ALIASES = {"lr": LR, "n_params": SIZE}  # columns of a hand-made table


@dataclass(frozen=True, kw_only=True)
class Study:
    """rows: one for each run that is finished or diverged. missing: for each planned run without one, its configuration
    and parameter counts, `status` (missing | failed | preempted) and `label`. planned: whether there is a plan, which
    says what should be there. scale: None where not recorded."""

    name: str
    path: Path
    rows: list[Row]
    missing: list[Row] = field(default_factory=list)
    planned: bool = False
    scale: str | None = None
    description: str = ""

    def trace(self, row: Row) -> list[Row]:
        """The recorded steps of a row's run; empty where there is no such file."""
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
    """Read a study. Raises UserError where there is nothing to read, or a file is no table of rows."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path} does not exist; give a sweep's folder (runs/NAME), or a file of rows")
    folder = path if path.is_dir() else path.parent if path.name.startswith("results.") else None
    about = _about(folder) if folder else {}
    found = _folder_rows(path) if path.is_dir() else _file_rows(path)
    finals = [row for row in found if row.get("status", "finished") in FINAL]
    plan = folder / "plan.jsonl" if folder and (folder / "plan.jsonl").exists() else None
    missing = _missing(plan, found) if plan else _unfinished(found)
    if not finals and not missing:
        raise UserError(f"{path} holds no row yet; `sweep status` shows how far its runs are")
    return Study(
        name=sweep_name(about.get("sweep") or (folder.name if folder else path.stem)),
        path=path,
        planned=plan is not None,
        rows=sorted(finals, key=lambda row: str(row.get("run_id"))),
        missing=missing,
        scale=about.get("scale"),
        description=about.get("description") or "",
    )


def where(study: Study, conditions: Iterable[str]) -> Study:
    """The part of a study that fits every condition. Raises ConfigError where none does, or for what is none."""
    rows, missing = study.rows, study.missing
    for typed in conditions:
        fits = parse_condition("--where", typed, [*study.rows, *study.missing])  # those that another left out too
        rows, missing = list(filter(fits, rows)), list(filter(fits, missing))
        if not rows and not missing:
            raise ConfigError(f"--where {typed}: no run of {study.path} fits")
    return Study(**{**vars(study), "rows": rows, "missing": missing})


def sweep_name(name: str) -> str:
    """The sweep without its scale: qknorm_lr for qknorm_lr_cpu."""
    return next((name.removesuffix(f"_{scale}") for scale in SCALES if name.endswith(f"_{scale}")), name)


def number(row: Row, key: str) -> float:
    """A number of a row, nan where it is null (as records write what is not finite). Raises UserError without one."""
    value = row.get(key, "absent")
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise UserError(
            f"{name_of(row)}: {key} must be a number, got {value if value != 'absent' else 'no such column'}"
        )
    return float(value)


def name_of(row: Row) -> str:
    """The run for a person."""
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
    about = _read_json(file) if file.exists() else {}
    if not isinstance(about, dict):
        raise UserError(f"{file} must be one JSON object that says which sweep this is")
    return about


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from None


def _result(file: Path) -> Row:
    row = _read_json(file)
    if not isinstance(row, dict):
        raise UserError(f"{file} holds no row, which is one JSON object")
    return row


def is_study(path: Path) -> bool:
    """Whether a folder is a sweep's: with rows, or a plan of them."""
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
    kind = path.suffix.lower()
    if kind == ".csv":
        rows = [{key: _cell(value) for key, value in line.items() if key} for line in _csv_lines(path)]
    elif kind == ".parquet":
        rows = _parquet_rows(path)
    elif kind == ".json":
        rows = _records(path)
    elif path.name.endswith((".jsonl", ".jsonl.gz")):
        rows = [_json_line(path, number, line) for number, line in enumerate(_lines(path), 1) if line]
    else:
        raise UserError(f"{path}: rows are read from .jsonl, .json, .csv or .parquet")
    rows = list(map(_in_our_words, rows))
    if kind in (".csv", ".parquet"):
        rows = list(map(_planned_if_empty, rows))
    return [_with_full_names({**row, "row": row.get("row", place)}) for place, row in enumerate(rows, 1)]


def _csv_lines(path: Path) -> list[dict[str, str]]:
    try:
        reader = csv.DictReader(_lines(path))
        names = [name for name in reader.fieldnames or () if name]
        if double := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
            raise UserError(f"{path} has more than one column {', '.join(double)}; rename or delete one")
        lines = []
        for line in reader:
            if any(cell.strip() for cell in line.pop(None, ())):  # a decimal comma, say
                raise UserError(f"{path}:{reader.line_num} has more cells than the header has columns")
            lines.append(line)
        return lines
    except csv.Error as error:
        raise UserError(f"cannot read {path}: {error}") from None


def _parquet_rows(path: Path) -> list[Row]:
    """Rows of a Parquet table, nothing where it has no value: the format holds numbers and text, and no code."""
    import pandas

    try:
        table = pandas.read_parquet(path)
    except (OSError, ValueError, ImportError) as error:  # pyarrow's errors are ValueErrors
        raise UserError(f"cannot read {path}: {error}") from None
    rows = table.astype(object).where(table.notna(), None).to_dict(orient="records")
    return [{key: value.tolist() if hasattr(value, "tolist") else value for key, value in row.items()} for row in rows]


def _records(path: Path) -> list[Row]:
    """A JSON file with a list of rows, or with one under "rows" as our own tables are."""
    content = _read_json(path)
    rows = content.get("rows") if isinstance(content, dict) else content
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{path} holds no list of rows")
    return rows


def _lines(path: Path) -> list[str]:
    try:
        # Spreadsheets put a mark before the first column's name, which utf-8-sig takes off.
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8-sig") as file:
            return file.read().splitlines()
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from None


def _json_line(path: Path, number: int, line: str) -> Row:
    try:
        row = json.loads(line)
    except ValueError:
        row = None
    if not isinstance(row, dict):
        raise UserError(f"{path}:{number} is no row in JSON; mend or delete the line")
    return row


def _planned_if_empty(row: Row) -> Row:
    """A line of a table; where its result is an empty cell and no status says why, a run that is planned and has no row
    yet."""
    empty = any(key in row and row[key] is None for key in ("val_loss", "value"))
    return {**row, "status": "missing"} if empty and "status" not in row else row


def _in_our_words(row: Row) -> Row:
    """A row whose status, where it has one, is ours if others' tables mean the same by it."""
    if "status" not in row:
        return row
    if row["status"] is None:
        return {key: value for key, value in row.items() if key != "status"}
    said = str(row["status"]).lower()
    return {**row, "status": "finished" if said in OTHERS_FINISHED else said if said in FINAL else row["status"]}


def _cell(value: str | None) -> Any:
    """A cell of a CSV file: number, true or false, nothing, or text."""
    if value is None or value.strip().lower() in NOTHING:
        return None
    if value.strip().lower() in ("true", "false"):
        return value.strip().lower() == "true"
    try:
        return int(value)
    except ValueError:
        pass
    try:
        return float(value)
    except ValueError:
        return value.strip()


def _with_full_names(row: Row) -> Row:
    for short, full in ALIASES.items():
        if short in row and full not in row:
            row = {**row, full: row[short]}
    return row


def _unfinished(found: list[Row]) -> list[Row]:
    rows = [row for row in found if row.get("status", "finished") not in FINAL]
    return [{**row, "label": f"{name_of(row)} ({row['status']})"} for row in rows]


def _missing(plan: Path, found: list[Row]) -> list[Row]:
    """The planned runs without a final row, as rows without results."""
    state = {row.get("run_id"): row.get("status", "finished") for row in found}
    planned = [_json_line(plan, number, line) for number, line in enumerate(_lines(plan), 1) if line]
    due = [run for run in planned if state.get(run.get("run_id")) not in FINAL]
    return _composed(plan, due, state) if due else []


def _composed(plan: Path, due: list[Row], state: dict[str, str]) -> list[Row]:
    """Planned runs with their full configuration: a plan holds only what was typed."""
    from scaling_testbed.config.compose import compose_many
    from scaling_testbed.config.run import flatten
    from scaling_testbed.model.counting import count_params

    try:
        configs = compose_many([run["overrides"] for run in due], written_in=plan)
        counts = [count_params(c.model.resolved(run["vocab_size"])) for run, c in zip(due, configs, strict=True)]
    except (KeyError, ConfigError) as error:
        raise UserError(f"{plan}: a planned run without a row cannot be composed any more ({error})") from None
    rows = []
    for run, config, count in zip(due, configs, counts, strict=True):
        status = state.get(run["run_id"], "missing")
        varied = " ".join(f"{key}={value}" for key, value in run.get("varied", {}).items())
        named = {"run_id": run["run_id"], "status": status, "label": f"{run['run_id']} ({varied}; {status})"}
        rows.append({**flatten(config), **asdict(count), **named})
    return rows
