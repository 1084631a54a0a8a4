"""What a stranger adds to a run, one entry each: a module, the files of configs/ that choose it, and what to type.

They are the recipes of docs/extending.md, as they stand there. One more is one more entry; every way of starting a run
then uses it together with the others.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DOCUMENT = Path(__file__).resolve().parent.parent.parent / "docs" / "extending.md"
# File -> its text, of every block of code that begins with the name of a file.
RECIPES = {name: text for name, text in re.findall(r"```\w+\n# (\S+)\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)}


@dataclass(frozen=True)
class Stranger:
    """code: of my_NAME.py. configs: files by their path in the folder of configs=. proof: of the row and the run's
    folder, whether the run was made of it."""

    name: str
    code: str
    configs: dict[str, str]
    overrides: list[str]
    proof: Callable[[dict[str, Any], Path], bool]


def recipe(name: str, *configs: str, overrides: list[str], proof: Callable[[dict[str, Any], Path], bool]) -> Stranger:
    """The recipe of docs/extending.md whose file is my_NAME.py, with its files under confs/."""
    files = {config: RECIPES[f"confs/{config}"] for config in configs}
    return Stranger(name, RECIPES[f"my_{name}.py"], files, overrides, proof)


OPTIMIZER = recipe(
    "optimizer",
    "optimizer/nadam.yaml",
    overrides=["optimizer=nadam"],
    proof=lambda row, folder: row["optimizer.name"] == "nadam" and "AdamW" in row["rate_means"],
)
NORM = recipe("norm", overrides=["model.norm=l1"], proof=lambda row, folder: row["model.norm"] == "l1")
INTERVENTION = recipe(
    "intervention",
    overrides=["+interventions.embedding_gradient.factor=0.5"],
    proof=lambda row, folder: row["embedding_gradient_factor"] == 0.5,
)
SOURCE = recipe(
    "source",
    "data/numbers.yaml",
    overrides=["data=numbers"],
    proof=lambda row, folder: (row["data.last"], row["data.validation_fraction"]) == (500, 0.3),
)
SCHEDULE = recipe(
    "schedule",
    "schedule/stairs.yaml",
    overrides=["schedule=stairs"],
    proof=lambda row, folder: rates(folder)[:2] == [row["optimizer.lr"] * row["schedule.factor"] ** n for n in (1, 2)],
)
OBJECTIVE = recipe(
    "comp_sum",
    "objective/gce.yaml",
    overrides=["objective=gce"],
    proof=lambda row, folder: (
        row["objective.tau"] == 1.3
        and row["ce_scaled"] > 0
        and all(0 < line["train_objective"] < line["train_loss"] for line in lines(folder, "train_loss"))
    ),
)
AVERAGING = recipe(
    "averaging",
    "averaging/recent.yaml",
    overrides=["averaging=recent"],
    proof=lambda row, folder: row["averaging.power"] == 7 and 0 < abs(row["val_loss_average"] - row["val_loss"]) < 1,
)
TOKENIZER = recipe(
    "tokenizer",
    "tokenizer/hex.yaml",
    overrides=["tokenizer=hex"],
    proof=lambda row, folder: 2 < row["unigram_entropy_nats"] < 2.8,  # of 17 ids; of bytes it would be above 3
)
PARAMETRIZATION = recipe(
    "parametrization",
    "parametrization/scaled_head.yaml",
    overrides=["parametrization=scaled_head"],
    proof=lambda row, folder: (row["parametrization.name"], row["parametrization.base_width"]) == ("scaled_head", 16),
)


def lines(folder: Path, field: str) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl that have the field."""
    found = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line for line in found if field in line]


def rates(folder: Path) -> list[float]:
    """The learning rate of each update."""
    return [line["lr"] for line in lines(folder, "lr")]


STRANGERS = [OPTIMIZER, NORM, PARAMETRIZATION, INTERVENTION, SOURCE, TOKENIZER, SCHEDULE, AVERAGING, OBJECTIVE]
