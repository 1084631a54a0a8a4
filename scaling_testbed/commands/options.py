"""The options and arguments that several verbs have, each with one meaning and one help."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from scaling_testbed.config.budget import CONVENTIONS


def _one_of(names):
    """Shell completion of a fixed choice."""
    return lambda: list(names)


def _laws() -> list[str]:
    from scaling_testbed.analysis.laws.forms import LAWS

    return list(LAWS)


SweepDir = Annotated[
    Path, typer.Argument(metavar="SWEEP_DIR", help="runs/NAME, or a .jsonl, .json, .csv or .parquet file of rows")
]
Rows = Annotated[Path, typer.Argument(metavar="ROWS", help="runs/NAME, or a .jsonl, .json, .csv or .parquet file")]
RunDir = Annotated[Path, typer.Argument(metavar="RUN_DIR", help="runs/NAME/RUN_ID")]
Step = Annotated[int | None, typer.Option("--step", metavar="N", help="of the checkpoint (default: the newest)")]

Where = Annotated[
    Sequence[str],
    typer.Option("--where", metavar="CONDITION", help='only these rows: KEY=VALUE, "flops<5e20"; repeatable, all hold'),
]
HoldOut = Annotated[
    Sequence[str],
    typer.Option("--hold-out", metavar="CONDITION", help="left out of the fit, and predicted; repeatable, any holds"),
]
Size = Annotated[
    str,
    typer.Option(
        "--size", metavar="NAME", autocompletion=_one_of(CONVENTIONS), show_default=True,
        help=f"what N counts: {', '.join(CONVENTIONS)}",
    ),
]  # fmt: skip
Json = Annotated[bool, typer.Option("--json", help="one JSON document on stdout, and nothing else")]
Law = Annotated[
    str, typer.Option("--law", metavar="NAME", autocompletion=_laws, show_default=True, help="see `analyze law list`")
]
ErrorLaw = Annotated[
    str,
    typer.Option(
        "--error-law", metavar="NAME", autocompletion=_laws, show_default=True, help="of what follows from the loss"
    ),
]
Source = Annotated[
    str | None, typer.Option("--source", metavar="NAME", help="what is read is a copy of this published testbed")
]
Map = Annotated[
    Sequence[str], typer.Option("--map", metavar="OURS=THEIRS", help='a column, "n_params=Params (M)*1e6"; repeatable')
]
Objective = Annotated[
    str | None,
    typer.Option(
        "--objective", metavar="NAME", autocompletion=_one_of(("huber_log", "lsq", "lsq_log")),
        help="huber_log, lsq or lsq_log, of the law of the loss (default: the law's own)",
    ),
]  # fmt: skip
Starts = Annotated[int, typer.Option("--starts", metavar="N", help="of the fit", show_default=True)]
Bootstrap = Annotated[int, typer.Option("--bootstrap", metavar="N", help="resamples of the runs", show_default=True)]
Seed = Annotated[int, typer.Option("--seed", metavar="N", help="of starts and resamples", show_default=True)]
Group = Annotated[
    Sequence[str],
    typer.Option(
        "--group", metavar="KEY",
        help="a key that tells conditions apart; repeatable (default: all that vary; `scan`: width or depth)",
    ),
]  # fmt: skip


def out(help_: str) -> Any:
    """--out FILE, repeatable; `help_`: what each ending holds, and what is written without it."""
    return typer.Option("--out", metavar="FILE", help=f"{help_}; repeatable")


OutTable = Annotated[Sequence[Path], out("keep the table, by the file's ending: .csv, .json, .jsonl or .parquet")]
