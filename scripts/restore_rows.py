#!/usr/bin/env python3
"""Put the rows of an unfinished study back as finished runs, so that the same sweep goes on from them.

usage: scripts/restore_rows.py studies/unfinished/NAME.jsonl[.gz] [RUNS_DIR]

Each row becomes RUNS_DIR/name/run_id/result.json, unless there is one. studies/unfinished/NAME.sweep.json, if it is
there, becomes RUNS_DIR/name/sweep.json, unless there is one: it says when the claims were declared. Curves and
checkpoints are not in a row, so what is made of them, such as traces, is missing for these runs.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from scaling_testbed.analysis.rows.tables import json_lines
from scaling_testbed.errors import UserError
from scaling_testbed.files import read_json, write_json


def restore(rows: Path, runs_dir: Path) -> tuple[int, int]:
    """The number of rows that were put back, and of those whose run was there. Raises UserError for a line that is no
    row of a run."""
    made = there = 0
    for number, row in enumerate(json_lines(rows), 1):
        if not all(isinstance(row.get(key), str) for key in ("name", "run_id", "status")):
            raise UserError(f"{rows}:{number} is no row of a run")
        place = runs_dir / row["name"] / row["run_id"] / "result.json"
        if place.exists():
            there += 1
            continue
        place.parent.mkdir(parents=True, exist_ok=True)
        write_json(place, row)
        made += 1
        kept, about = rows.with_name(rows.name.split(".")[0] + ".sweep.json"), runs_dir / row["name"] / "sweep.json"
        if kept.exists() and not about.exists():
            write_json(about, read_json(kept))
    return made, there


def main(arguments: Sequence[str]) -> int:
    if not 1 <= len(arguments) <= 2:
        print(__doc__.split("\n\n")[1], file=sys.stderr)
        return 2
    runs_dir = Path(arguments[1] if len(arguments) == 2 else "runs")
    try:
        made, there = restore(Path(arguments[0]), runs_dir)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{made} runs put into {runs_dir}/, {there} were there; `sweep run` goes on from them")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
