"""Coverage of 95 % intervals on public tables: the dearest quarter of the runs is predicted from the others.

usage: python scripts/laws_calibration.py DATA [--out studies/laws_calibration/coverage.csv]

DATA holds copies of the tables: mlfoundations-scaling/ (github.com/mlfoundations/scaling), datablations182.csv
(huggingface/datablations), gemstones_hot220.csv (mcleish7/gemstone-scaling-laws), olmo_ladder_c4.csv
(allenai/OLMo-ladder). The runs of studies/archive/overtraining are one more table. The names, the columns and the rows
that are taken are in TABLES.
"""

import argparse
import csv
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from scaling_testbed.analysis.laws.selection import candidates
from scaling_testbed.analysis.laws.study import Fitting, Rows, compare_rows, fit_rows, law_named, law_rows, laws_named

STUDY = Path(__file__).resolve().parents[1] / "studies"
SHARE = 0.75  # of the runs, by compute, is fitted
NEAR = 5.0
MOST = 0.9  # of a table's held-out runs must lie inside the narrowest interval of one that knows the errors
FITTING = Fitting(starts=32, bootstrap=200)
LOSSES = {"loss": "C4", "loss_openlm": "OpenLM's sets", "loss_paloma_redpajama": "RedPajama of Paloma"}
# Table -> path in DATA, --source, --map, --where
Table = tuple[str, str | None, Sequence[str], Sequence[str]]
TABLES: dict[str, Table] = {
    f"Gadre et al., trained on {data}, loss on {name}": (
        "mlfoundations-scaling", "mlfoundations-scaling", [f"loss={loss}"] * (loss != "loss"),
        [f"dataset={data}", "tokens_per_param>=19.9"],
    )
    for data in ("c4", "redpajama", "refinedweb") for loss, name in LOSSES.items()
}  # fmt: skip
TABLES |= {
    f"Gadre et al., trained on {data}, from 5 tokens per parameter on": (
        "mlfoundations-scaling", "mlfoundations-scaling", [], [f"dataset={data}"],
    )
    for data in ("c4", "redpajama", "refinedweb")
}  # fmt: skip
TABLES |= {
    "Muennighoff et al., no token twice": ("datablations182.csv", None, [], ["epochs<=1.001"]),
    "Gemstones": ("gemstones_hot220.csv", None, [], []),
    "OLMo ladder": ("olmo_ladder_c4.csv", None, ["loss=c4_loss"], ["mult!=0.5xC"]),
    "archive/overtraining": (str(STUDY / "archive" / "overtraining"), None, [], []),
}


def read(data: Path, table: Table) -> tuple[Rows, list[str]]:
    """The rows of a table, and the conditions on them."""
    path, source, mapping, where = table
    given = law_rows(data / path, source=source, mapping=mapping)
    rows = [row | {"epochs": row["n_tokens"] / float(row["U"])} if "U" in row else row for row in given.rows]
    return Rows(rows=rows, mapping=mapping, said=given.said, origin=given.origin), list(where)


def coverage(name: str, data: Path) -> Iterator[dict[str, Any]]:
    """One record for the compared laws together, and one for each law with the interval of its bootstrap. The latter
    also has the half-width that would hold MOST of the near runs if they were in the fit."""
    given, where = read(data, TABLES[name])
    whole = {
        law: fit_rows(given, law_named(law), where=where, fitting=Fitting(starts=32, bootstrap=0)).fitted
        for law in candidates()
    }
    compute = sorted(flops(one) for one in next(iter(whole.values())))
    cut = compute[math.ceil(SHARE * len(compute)) - 1]
    held = [f"flops>{cut!r}"]
    rows = [row | {"flops": 6 * row["n_params"] * row["n_tokens"]} for row in given.rows if row.get("n_tokens")]
    given = Rows(rows=rows, mapping=given.mapping, said=given.said, origin=given.origin)
    found = compare_rows(given, laws_named(None), where=where, hold_out=held, fitting=FITTING)
    kept = " ".join(law for law, one in found.selection.laws.items() if one.share)
    about = {"table": name, "runs": len(compute)}
    yield (
        about
        | {"law": "compared", "kept": kept, "errors": len(found.selection.errors)}
        | summed(found.predictions, cut)
        | {"needed_if_fitted_near": ""}
    )
    for law in candidates():
        alone = fit_rows(given, law_named(law), where=where, hold_out=held, fitting=FITTING)
        known = needed([one for one in whole[law] if cut < flops(one) <= NEAR * cut])
        yield (
            about
            | {"law": law, "kept": "", "errors": 0}
            | summed(alone.predictions, cut)
            | {"needed_if_fitted_near": known}
        )


def flops(run: Mapping[str, Any]) -> float:
    return 6 * run["n_params"] * run["n_tokens"]


def needed(predictions: Sequence[Mapping[str, Any]]) -> str:
    """The least half-width, in logarithms and the same for each run, that holds MOST of the runs."""
    errors = sorted(abs(math.log(one["predicted"] / one["actual"])) for one in predictions)
    return f"{errors[math.ceil(MOST * len(errors)) - 1]:.4f}"


def summed(predictions: Sequence[Mapping[str, Any]], fitted: float) -> dict[str, Any]:
    """How many held-out runs there are, how many lie inside, half the width of the intervals, the mean error, and the
    half-width that would hold MOST of them; for the runs of at most NEAR times the largest fitted compute too."""
    near = [one for one in predictions if flops(one) <= NEAR * fitted]
    return _summed(predictions) | {f"{key}_near": value for key, value in _summed(near).items()}


def _summed(predictions: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    halves = [0.5 * math.log(one["high"] / one["low"]) for one in predictions if one["low"]]
    return {
        "held_out": len(predictions),
        "inside": sum(bool(one["inside"]) for one in predictions),
        "median_half_width": f"{statistics.median(halves):.4f}" if halves else "",
        "mean_error": f"{statistics.fmean(one['relative_error'] for one in predictions):.4f}" if predictions else "",
        "needed_half_width": needed(predictions) if predictions else "",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, default=STUDY / "laws_calibration" / "coverage.csv")
    options = parser.parse_args()
    records = []
    for name in TABLES:
        records += coverage(name, options.data)
        print("; ".join(f"{one['law']} {one['inside']}/{one['held_out']}" for one in records[-5:]), name, flush=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with options.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(records[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(records)
    for law in ("compared", *candidates()):
        own = [one for one in records if one["law"] == law]
        for which in ("", "_near"):
            inside, held = (sum(one[f"{key}{which}"] for one in own) for key in ("inside", "held_out"))
            half = statistics.median(float(one[f"median_half_width{which}"]) for one in own)
            error = statistics.fmean(float(one[f"mean_error{which}"]) for one in own)
            least = statistics.median(float(one[f"needed_half_width{which}"]) for one in own)
            said = f"{inside} of {held}; over tables: half-width {half:.2%}, error {error:.2%}"
            print(f"{law}{which}: {said}, half-width that holds {MOST:.0%} of each table {least:.2%}")
    alone = [one for one in records if one["law"] != "compared"]
    for key, said in (
        ("needed_half_width_near", "the law that needs the least in each table"),
        ("needed_if_fitted_near", "the same, with the held-out runs in the fit"),
    ):
        least = statistics.median(min(float(one[key]) for one in alone if one["table"] == name) for name in TABLES)
        print(f"{said}: half-width that holds {MOST:.0%} of each table within {NEAR:g} times {least:.2%}")


if __name__ == "__main__":
    main()
