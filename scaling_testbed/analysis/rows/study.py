"""The rows of a study, its planned runs, and the traces of its runs.

A study has one of three forms: the folder of a sweep (run folders with result.json); a folder with results.jsonl,
.jsonl.gz or .parquet and metrics/<run_id>.jsonl or .jsonl.gz; or a file of rows (see tables.py). A planned run without
a final row is kept by name, without any substitute for its result.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any

from scaling_testbed.analysis.rows.conditions import parse as parse_condition
from scaling_testbed.analysis.rows.conditions import text
from scaling_testbed.analysis.rows.names import Row, in_our_columns, nearest_first, number_in, plain_name, with_states
from scaling_testbed.analysis.rows.tables import is_flat, json_lines, read_table
from scaling_testbed.config.run import with_later_keys
from scaling_testbed.errors import ConfigError, UserError
from scaling_testbed.files import read_json
from scaling_testbed.progress import say
from scaling_testbed.runs.folder import read_metrics
from scaling_testbed.runs.row import FINAL, SCHEMA_VERSION

LR, SIZE = "optimizer.lr", "n_params_non_embedding"
ABOUT = ("sweep", "scale", "paper", "experiment", "analysis", "description")  # keys of sweep.json
SWEEP_ADVICE = "type the `sweep run` command of this sweep again to write it anew"
PLAN_ADVICE = "type the `sweep run` command of this sweep again to rewrite the plan"
MOST_WORDS, LONGEST_WORD = 2, 24  # cells of text that name a row: how many, and their characters
ALIASES = {"lr": LR, "n_params": SIZE}  # columns of a hand-made table


@dataclass(frozen=True, kw_only=True)
class Study:
    """The rows of a sweep or of a file.

    rows: one for each finished or diverged run. missing: for each planned run without a row, its configuration and
    parameter counts, `status` (missing | failed | preempted | hopeless) and `label`. planned: whether a plan lists the
    expected runs. unplanned: the run ids of rows that the plan does not list. sweep, scale, paper, experiment,
    analysis: from sweep.json, None if absent. declared: what it declares about how the study is judged, see
    papers/declaration.py. drawn: the keys whose values were drawn, from sweep.json; they are no grid. left_out: the
    conditions of `where` that took runs away. name: the sweep, or the name of the folder or file; used for titles only.
    """

    name: str
    path: Path
    rows: list[Row]
    missing: list[Row] = field(default_factory=list)
    planned: bool = False
    unplanned: frozenset[str] = frozenset()
    sweep: str | None = None
    scale: str | None = None
    paper: str | None = None
    experiment: str | None = None
    analysis: str | None = None
    declared: Any = None
    drawn: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
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
    is_folder = path.is_dir() and path.suffix != ".parquet"  # Spark writes a folder of that name
    folder = path if is_folder else path.parent if path.name.startswith("results.") else None
    about = _about(folder) if folder else {}
    found = _each_run_once(_folder_rows(path) if is_folder else _file_rows(path), path)
    finals = [row for row in found if row.get("status", "finished") in FINAL]
    plan = folder / "plan.jsonl" if folder and (folder / "plan.jsonl").exists() else None
    missing, ids = _of_plan(plan, found) if plan else (unfinished(found), set())
    if not finals and not missing:
        raise UserError(f"{path} holds no row yet; `sweep status` shows the progress of its runs")
    return Study(
        name=about.get("sweep") or (folder.resolve().name if folder else path.stem),
        path=path,
        planned=plan is not None,
        unplanned=frozenset({str(row.get("run_id")) for row in finals} - ids if plan else ()),
        rows=sorted(finals, key=lambda row: str(row.get("run_id"))),
        missing=missing,
        **{key: about.get(key) for key in ABOUT if key != "description"},
        declared=declared_in(about),
        drawn=tuple(dict.fromkeys(key for one in draws_in(about, folder) for key in one["axes"])),
        left_out=(),
        description=about.get("description") or "",
    )


def where(study: Study, conditions: Iterable[str]) -> Study:
    """The runs of a study that match every condition.

    Raises ConfigError if no run matches, or if a text is not a condition.
    """
    rows, missing, left_out = study.rows, study.missing, study.left_out
    for typed in conditions:
        fits = parse_condition("--where", typed, [*study.rows, *study.missing])  # including runs that others excluded
        others = [*rows, *missing]
        rows, missing = list(filter(fits, rows)), list(filter(fits, missing))
        if not rows and not missing:
            parse_condition("--where", typed, others)  # raises, and names the values that other conditions left
            raise ConfigError(f"--where {typed}: no run of {study.path} matches")
        left_out += (typed,) if len(rows) + len(missing) < len(others) else ()
    return Study(**{**vars(study), "rows": rows, "missing": missing, "left_out": left_out})


def several_origins(rows: Iterable[Row]) -> str | None:
    """A text about rows whose losses cannot be compared, None if there is none: they come from several sets of data,
    were evaluated on different data of one name, or have several sources."""
    rows = list(rows)
    data = {str(row["data_fingerprint"]) for row in rows if row.get("data_fingerprint")}
    if len(data) > 1:
        return f"come from {len(data)} sets of data ({', '.join(sorted(data))})"
    evaluated: dict[str, set[str]] = {}
    for row in rows:
        for name, its in sets.items() if isinstance(sets := row.get("evaluation_data"), dict) else ():
            evaluated.setdefault(name, set()).add(text(its))
    if found := next((name for name, several in evaluated.items() if len(several) > 1), None):
        return f"were evaluated on {len(evaluated[found])} sets of data named {found}"
    several = several_sources(rows)
    return several and f"were made with {several}"


def several_sources(rows: Iterable[Row]) -> str | None:
    """A text about the first plug-in with several versions among the rows, or about several precisions, with that of
    the residual stream if it is bf16; None if there is none.

    Rows of a flat table hold no versions, so they are ignored.
    """
    hashes: dict[str, set[str]] = {}
    precisions = set()
    for row in rows:
        for name, sha256 in plugins.items() if isinstance(plugins := row.get("plugins"), dict) else ():
            hashes.setdefault(name, set()).add(str(sha256)[:12])
        if row.get("schema_version") is not None and row.get("precision") is not None:
            narrow = " with a bf16 residual stream" if row.get("compute.residual_dtype") == "bf16" else ""
            precisions.add(f"{row['precision']}{narrow}")
    if found := next((name for name, several in hashes.items() if len(several) > 1), None):
        return f"{len(hashes[found])} versions of the plug-in {found} ({', '.join(sorted(hashes[found]))})"
    return f"{len(precisions)} precisions ({', '.join(sorted(precisions))})" if len(precisions) > 1 else None


def number(row: Row, key: str) -> float:
    """A number of a row; nan if it is null, which stands for a number that is not finite. Raises UserError if it is
    not a number."""
    value = row.get(key, "absent")
    if value is None:
        return math.nan
    if isinstance(value, str) or (found := number_in(value)) is None:
        absent = f"no such column; the columns are {nearest_first(key, (name for name in row if name != 'row'))}"
        raise UserError(f"{name_of(row)}: {key} must be a number, got {absent if value == 'absent' else value}")
    return float(found)


def name_of(row: Row) -> str:
    """The name of a row's run for messages."""
    for key in ("label", "name" if not row.get("run_id") else "label"):
        if row.get(key):
            return str(row[key])
    if row.get("run_id"):
        return f"run {row['run_id']}"
    place = [f"row {row['row']}"] if row.get("row") is not None else []
    said = [f"{key}={value}" for key, value in row.items() if _tells_apart(key, value)][:MOST_WORDS]
    known = [f"{name}={text(row[key])}" for name, key in (("lr", LR), ("N", SIZE)) if key in row]
    return " ".join([*place, *said, *known]) or "a row without a name"


def _tells_apart(key: str, value: object) -> bool:
    """Whether a cell may name its row to a reader, such as model=7B."""
    return isinstance(value, str) and 0 < len(value) <= LONGEST_WORD and key != "status"


def check_version(content: Row, where: str | Path) -> None:
    """Raise UserError, which names `where`, if a later version of this project wrote `content`.

    Rows of other projects have no schema_version. Neither have sweep.json, plan.jsonl and kept laws of this version.
    """
    said = content.get("schema_version")
    version = number_in(said)
    if said is None or version == SCHEMA_VERSION:
        return
    if version is not None and version > SCHEMA_VERSION:
        later = f"schema_version {version:g}, and this version reads up to {SCHEMA_VERSION}"
        raise UserError(f"{where} was written by a later version of this project ({later}); update the project")
    raise UserError(f"{where} has schema_version {text(said)}, which no version wrote; it is damaged")


def claims_of(about: Row) -> str | None:
    """PAPER/NAME of the experiment that a sweep.json, or a study, names; None if it names none."""
    names = [about.get(key) for key in ("paper", "experiment")]
    return "/".join(map(str, names)) if all(names) else None


def declared_in(about: Row) -> Any:
    """What a sweep.json declares, with the experiment that is meant. Earlier versions named it beside, not inside."""
    declared = about.get("declared")
    if not isinstance(declared, dict) or claims_of(about) is None:
        return declared
    return {**declared, "experiment": declared.get("experiment") or claims_of(about)}


def draws_in(about: Row, where: Path | None) -> list[dict[str, Any]]:
    """The draws that a sweep.json holds. Raises UserError, which names `where`, if they cannot be read."""
    draws = about.get("draws") or []
    whole = isinstance(draws, list) and all(
        isinstance(one, dict) and isinstance(one.get("axes"), dict) and type(one.get("samples")) is int for one in draws
    )
    if not whole:
        raise UserError(f"sweep.json of {where}: draws must be a list of draws; restore the file")
    return draws


def _about(path: Path) -> dict[str, Any]:
    file = path / "sweep.json"
    about = read_json(file, advice=SWEEP_ADVICE) if file.exists() else {}
    check_version(about, file)
    for key in ABOUT:
        if not isinstance(about.get(key), (str, NoneType)):
            raise UserError(f"{file}: {key} must be a text or null; got {text(about[key])}; {SWEEP_ADVICE}")
    return about


def _result(file: Path) -> Row:
    """The row of a run of this project."""
    advice = "move it away, and the same command trains the run again"
    row = read_json(file, advice=advice)
    check_version(row, file)
    for key in ("run_id", "status"):
        if not isinstance(row.get(key), str):
            raise UserError(f"{file} holds no row of a run: {key} is {text(row.get(key))}; {advice}")
    return row


def collected(folder: Path) -> Path | None:
    """The file in which a folder keeps its rows, or None."""
    places = (folder / f"results.{end}" for end in ("jsonl", "jsonl.gz", "parquet"))
    return next((path for path in places if path.exists()), None)


def is_study(path: Path) -> bool:
    """Whether a folder is that of a sweep, with rows or with a plan."""
    return collected(path) is not None or (path / "plan.jsonl").exists() or any(path.glob("*/result.json"))


def _folder_rows(folder: Path) -> list[Row]:
    files = sorted(folder.glob("*/result.json"))
    if files:
        return [with_later_keys(_result(file)) for file in files]
    kept = collected(folder)
    if kept is None and not (folder / "plan.jsonl").exists():
        raise UserError(f"{folder} has neither run folders nor results.jsonl; give a sweep's folder (runs/NAME)")
    return _file_rows(kept) if kept else []


def _file_rows(path: Path) -> list[Row]:
    rows = read_table(path)
    _check_is_of_runs(rows[0] if rows else {}, path)
    return in_our_words(rows, is_flat(path), path)


def _check_is_of_runs(first: Row, path: Path) -> None:
    """Raise UserError if a file is the curve of a run, as TensorBoard and charts of Weights & Biases export it."""
    names = {plain_name(name) for name in first}
    of_chart = "step" in names and len(names) > 1 and all(" - " in name for name in first if plain_name(name) != "step")
    if names == {"wall_time", "step", "value"} or of_chart:
        raise UserError(
            f"{path} holds curves over steps ({nearest_first('step', first, 4)}), but a table of runs has one row for "
            "each run; export the table of runs"
        )


def _each_run_once(rows: list[Row], path: Path) -> list[Row]:
    """The rows, one for each run of this project: a copy of a run's folder, or of a line, would count twice.

    A final row stands for those of earlier states of its run. Raises UserError if two final rows of a run differ.
    Tables of other projects may have several rows for a run.
    """
    kept: dict[object, Row] = {}
    for number, row in enumerate(rows):
        is_ours = row.get("schema_version") is not None and isinstance(row.get("run_id"), str)
        key = row["run_id"] if is_ours else number
        first = kept.setdefault(key, row)
        if row.get("status") not in FINAL or first is row:
            continue
        if first.get("status") in FINAL:
            for name in ("status", "val_loss", "steps", "data_fingerprint"):
                if first.get(name) != row.get(name):
                    said = f"with {name} {text(first.get(name))} and {text(row.get(name))}"
                    raise UserError(f"{path} has run {key} twice, {said}; move the copy away")
        else:
            kept[key] = row
    if copies := len(rows) - len(kept):
        say(f"warning: {path} has {copies} more rows of the same runs; each run counts once", errors=True)
    return list(kept.values())


def in_our_words(records: Iterable[Row], is_flat: bool, origin: str | Path) -> list[Row]:
    """Records of any origin with this testbed's names of columns and statuses, and `row` numbered from 1.

    is_flat: whether they are lines of a table, where an empty cell can mean that the result is not there yet. origin:
    for messages. Raises UserError, which names the origin, if a row is of a later version or cannot be understood.
    """
    rows = list(records)
    for place, row in enumerate(rows, 1):
        check_version(row, f"{origin}: row {place}")
    theirs = [row for row in rows if row.get("schema_version") is None]
    try:
        translated = iter(in_our_columns(theirs))
        ours = [next(translated) if row.get("schema_version") is None else with_later_keys(row) for row in rows]
        rows = with_states(ours)
    except UserError as error:
        raise UserError(f"{origin}: {error}") from None
    rows = list(map(_planned_if_empty, rows)) if is_flat else rows
    return [_with_full_names({**row, "row": row.get("row", place)}) for place, row in enumerate(rows, 1)]


def _planned_if_empty(row: Row) -> Row:
    """A line of a table; it becomes a planned run without a row if its result is empty and it has no status."""
    empty = any(key in row and row[key] is None for key in ("val_loss", "value"))
    return {**row, "status": "missing"} if empty and "status" not in row else row


def _with_full_names(row: Row) -> Row:
    for short, full in ALIASES.items():
        if short in row and full not in row:
            row = {**row, full: row[short]}
    return row


def about_hopeless(rows: Iterable[Row]) -> list[str]:
    """A line about the rows whose status is hopeless; empty without such a row."""
    number = sum(row.get("status") == "hopeless" for row in rows)
    if not number:
        return []
    were = "1 run was" if number == 1 else f"{number} runs were"
    return [
        f"{were} stopped as hopeless, by the predicted final loss, and {'has' if number == 1 else 'have'} no final "
        "loss; a mean over the other seeds of the same setting is too low"
    ]


def unfinished(found: list[Row]) -> list[Row]:
    """The rows without a result, each with its status in the label."""
    rows = [row for row in found if row.get("status", "finished") not in FINAL]
    return [{**row, "label": f"{name_of(row)} ({row['status']})"} for row in rows]


def _of_plan(plan: Path, found: list[Row]) -> tuple[list[Row], set[str]]:
    """The planned runs without a final row, as rows without results, and the ids of all planned runs.

    Each row holds the configuration from the plan. Raises UserError if an earlier version wrote the plan without
    configurations.
    """
    state = {str(row.get("run_id")): row.get("status", "finished") for row in found}
    rows, ids = [], set()
    for line, run in enumerate(json_lines(plan), 1):
        check_version(run, f"{plan}:{line}")
        run_id, config, varied = (run.get(key) for key in ("run_id", "config", "varied"))
        if not isinstance(run_id, str):
            raise UserError(f"{plan}:{line} has no run_id; {PLAN_ADVICE}")
        ids.add(run_id)
        if state.get(run_id) in FINAL or run.get("is_part"):  # a part of a trunk is no result
            continue
        if not config:
            raise UserError(
                f"{plan}: the planned run {run_id} has no row, and an earlier version wrote its line without a "
                f"configuration; {PLAN_ADVICE}"
            )
        if not isinstance(config, dict) or not isinstance(varied, (dict, NoneType)):
            raise UserError(f"{plan}:{line} holds no planned run; {PLAN_ADVICE}")
        status = state.get(run_id, "missing")
        chosen = " ".join(f"{key}={value}" for key, value in (varied or {}).items())
        rows.append(
            {**with_later_keys(config), "run_id": run_id, "status": status, "label": f"{run_id} ({chosen}; {status})"}
        )
    return rows, ids
