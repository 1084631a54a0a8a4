"""Rows from the runs that other authors published, in the layout of their repositories. No file is copied or unpickled.

mlfoundations-scaling: github.com/mlfoundations/scaling (Gadre et al. 2024, arXiv 2403.08540; MIT): 104 models with
eight validation losses and 46 downstream accuracies each, and the grid search of 435 runs behind their sizes.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from scaling_testbed.analysis.rows.names import Row
from scaling_testbed.analysis.rows.study import Study
from scaling_testbed.analysis.rows.tables import read_table
from scaling_testbed.errors import UserError
from scaling_testbed.files import read_json

DATASETS = {"c4_original": "c4", "rpj": "redpajama", "rw_original": "refinedweb"}
# Part of the path of a validation set -> column of its loss. The loss on C4 is the main loss of the paper.
LOSSES = {
    "c4_val": "loss",
    "openlm": "loss_openlm",
    "paloma_c4_en": "loss_paloma_c4",
    "programing_languages": "loss_paloma_100_languages",
    "falcon-refinedweb": "loss_paloma_refinedweb",
    "paloma_ptb": "loss_paloma_ptb",
    "paloma_redpajama": "loss_paloma_redpajama",
    "de-en": "loss_c4_german",
}
SMALLEST_OF_SUBSET = 153_677_376  # the 0.154B models, which decide the subset of tasks
ABOVE_CHANCE = 0.10


def models(path: Path) -> list[Row]:
    """The 104 models, one row each.

    loss: on C4's validation set. loss_*: on the other sets. error_46: mean top-1 error over all tasks. error_17: over
    the tasks where some 0.154B model exceeds chance by a tenth. error/TASK: of one task. Arguments in the 6.9B files
    that come from other runs are not read. Raises UserError if a file differs from the published layout.
    """
    folder = _data_folder(path)
    rows = [_model(file) for file in sorted((folder / "models").glob("*.json"))]
    if not rows:
        raise UserError(f"{folder / 'models'} holds no models (*.json)")
    for row in rows:
        file = folder / "evals" / f"evaluation_{row['run_id']}_heavy.json"
        if file.exists():
            row["errors"] = _read(file, _errors)
    subset = _above_chance(rows, folder / "eval_metadata.csv")
    return [_with_errors(row, subset) for row in rows]


def grid(path: Path) -> list[Row]:
    """The 435 runs of the grid search at 20 tokens per parameter, with the settings in their names.

    The repository does not state which validation loss it is.
    """
    file = _data_folder(path) / "grid.json"
    return _read(file, lambda content: [_grid_run(name, _number(loss)) for name, loss in content.items()])


SOURCES: dict[str, Callable[[Path], list[Row]]] = {
    "mlfoundations-scaling": models,
    "mlfoundations-scaling-grid": grid,
}

TESTBEDS = {"mlfoundations-scaling": ("over_training", "overtraining")}  # source -> paper and experiment


def study(source: str, path: Path) -> Study:
    """A published testbed as a study of its own paper."""
    paper, experiment = TESTBEDS[source]
    return Study(name=source, path=path, rows=SOURCES[source](path), paper=paper, experiment=experiment)


def _data_folder(path: Path) -> Path:
    folder = next((place for place in (path / "exp_data", path) if (place / "models").is_dir()), None)
    if folder is None:
        raise UserError(f"{path} is not a copy of mlfoundations/scaling: it has no exp_data/models")
    return folder


def _read(file: Path, take: Callable[[Any], Any]) -> Any:
    try:
        return take(read_json(file, expect=object))
    except (UserError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
        raise UserError(f"cannot read {file} as published: {error!r}") from None


def _model(file: Path) -> Row:
    row = _read(file, _model_row)
    if row["run_id"] != file.stem:
        raise UserError(f"cannot read {file} as published: it is about the run {row['run_id']!r}")
    return row


def _model_row(content: dict) -> Row:
    hyper = content["hyperparameters"]
    row = {
        "run_id": content["name"],
        "dataset": DATASETS.get(content["dataset_name"], content["dataset_name"]),
        "n_params": _number(hyper["params"]),
        "n_params_no_input_embedding": _number(hyper["params_no_embed"]),
        "n_tokens": _number(hyper["tokens"]),
        "tokens_per_param": 20 * _number(hyper["chinchilla_multiplier"]),
        "lr": _number(hyper["lr"]),
        "weight_decay": _number(hyper["wd"]),
        "warmup_steps": _number(hyper["warmup"]),
    }
    for result in content["results"]:
        name = result["val_data"][0].rpartition("eval_data/")[2]
        part = next((part for part in LOSSES if part in name), None)
        if part is None:
            raise ValueError(f"unknown validation set {name!r}")
        row[LOSSES[part]] = _number(result["loss"])
    return row


def _errors(content: dict) -> dict[str, float]:
    return {task: 1 - _number(value) for task, value in content["eval_metrics"]["icl"].items()}


def _number(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 1e300:
        raise ValueError(f"{value!r} is no number")
    return value


def _chance(file: Path) -> dict[str, float]:
    """The accuracy of a random answer, by task."""
    try:
        return {row["Eval Task"]: float(_number(row["Random baseline"])) / 100 for row in read_table(file)}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"cannot read {file} as published: {error!r}") from None


def _above_chance(rows: list[Row], file: Path) -> list[str]:
    chance = _chance(file)
    small = [row["errors"] for row in rows if row["n_params"] == SMALLEST_OF_SUBSET and "errors" in row]
    tasks = small[0] if small else {}
    if unknown := [task for task in tasks if task not in chance]:
        raise UserError(f"{file} has no row of the task {unknown[0]}, which files in {file.parent / 'evals'} have")
    return [task for task in tasks if any(1 - errors.get(task, 1.0) > chance[task] + ABOVE_CHANCE for errors in small)]


def _with_errors(row: Row, subset: list[str]) -> Row:
    errors = row.pop("errors", None)
    if not errors:
        return row
    means = {f"error_{len(tasks)}": sum(errors[task] for task in tasks) / len(tasks)
             for tasks in (list(errors), subset) if tasks and set(tasks) <= set(errors)}  # fmt: skip
    return {**row, **means, **{f"error/{task}": error for task, error in errors.items()}}


GRID_NAME = re.compile(
    r"d=(?P<d_model>\d+)_l=(?P<n_layers>\d+)_h=(?P<n_heads>\d+)-(?P<batch>\d+)-(?P<lr>[\d.e-]+?)-(?P<weight_decay>[\d.]+)-"
    r"\d+-(?P<n_tokens>\d+)-(?P<warmup_steps>\d+)-(?P<cooldown_lr>[\d.e-]+)"
)


def _grid_run(name: str, loss: float) -> Row:
    match = GRID_NAME.fullmatch(name)
    if not match:
        raise ValueError(f"the name {name!r} differs from the published layout")
    numbers = {key: float(value) if key in ("lr", "weight_decay", "cooldown_lr") else int(value)
               for key, value in match.groupdict().items()}  # fmt: skip
    return {"run_id": name, "n_params": numbers["n_tokens"] // 20, "tokens_per_param": 20.0, "loss": loss, **numbers}
