"""The options and arguments that several commands share, each with one meaning and one help text."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from scaling_testbed.config.budget import CONVENTIONS
from scaling_testbed.errors import ConfigError


def _one_of(names):
    """The shell completion of a fixed set of names."""
    return lambda: list(names)


def _laws() -> list[str]:
    from scaling_testbed.analysis.laws.forms import LAWS

    return list(LAWS)


def number(typed: Any) -> float:
    """A number as a person writes it: 7e9, 70B, 1,000. Raises typer.BadParameter."""
    from scaling_testbed.analysis.rows.names import number_in

    found = number_in(typed)
    if found is None:
        raise typer.BadParameter(f"{typed!r} is not a number; write 7e9 or 7B")
    return float(found)


def losses_in(typed: str | None) -> list[float] | None:
    """The losses of --levels. Raises ConfigError if one is not a number above zero."""
    if typed is None:
        return None
    try:
        losses = [number(one) for one in typed.split(",")]
    except typer.BadParameter:
        losses = []
    if not losses or not all(0 < one < math.inf for one in losses):
        raise ConfigError(f"--levels must be losses, such as 2.2,2.5; got {typed!r}")
    return losses


SweepDir = Annotated[
    Path, typer.Argument(metavar="SWEEP_DIR", help="runs/NAME, or a .csv, .tsv, .parquet, .json or .jsonl file of rows")
]
Rows = Annotated[
    Path, typer.Argument(metavar="ROWS", help="runs/NAME, or a .csv, .tsv, .parquet, .json or .jsonl file")
]
RunDir = Annotated[Path, typer.Argument(metavar="RUN_DIR", help="runs/NAME/RUN_ID")]
Step = Annotated[int | None, typer.Option("--step", metavar="N", help="step of the checkpoint (default: the newest)")]
Average = Annotated[
    bool, typer.Option("--average", help="the average of the weights (averaging=...), not the last ones")
]
MaxLength = Annotated[
    int | None,
    typer.Option(
        "--max-length", metavar="N",
        help="maximum number of tokens that the model reads; long contexts lose their start (default: as in training)",
    ),
]  # fmt: skip

Where = Annotated[
    Sequence[str],
    typer.Option(
        "--where", metavar="CONDITION", help='use only these rows: KEY=VALUE, "flops<5e20"; repeatable, all must hold'
    ),
]
HoldOut = Annotated[
    Sequence[str],
    typer.Option(
        "--hold-out", metavar="CONDITION", help="rows to leave out of the fit and to predict; repeatable, any may hold"
    ),
]
Size = Annotated[
    str,
    typer.Option(
        "--size", metavar="NAME", autocompletion=_one_of(CONVENTIONS), show_default=True,
        help=f"what N counts: {', '.join(CONVENTIONS)}",
    ),
]  # fmt: skip
Levels = Annotated[
    str | None, typer.Option("--levels", metavar="L,L", help="losses at which to compare, in nats per token")
]
Json = Annotated[bool, typer.Option("--json", help="one JSON document on stdout, and nothing else")]
Law = Annotated[
    str | None,
    typer.Option("--law", metavar="NAME", autocompletion=_laws, show_default=True, help="see `analyze law list`"),
]
ErrorLaw = Annotated[
    str,
    typer.Option(
        "--error-law",
        metavar="NAME",
        autocompletion=_laws,
        show_default=True,
        help="law of the downstream error, a function of the loss",
    ),
]
Source = Annotated[
    str | None, typer.Option("--source", metavar="NAME", help="the published testbed of which ROWS is a copy")
]
Map = Annotated[
    Sequence[str],
    typer.Option(
        "--map",
        metavar="OURS=THEIRS",
        help='name of a column, e.g. "n_params=Params (M)*1e6", "n_tokens=10**log10_D", "loss=log(ppl)"; repeatable',
    ),
]
Objective = Annotated[
    str | None,
    typer.Option(
        "--objective", metavar="NAME", autocompletion=_one_of(("huber_log", "lsq", "lsq_log")),
        help="objective of the law of the loss: huber_log, lsq or lsq_log (default: the law's own)",
    ),
]  # fmt: skip
Delta = Annotated[
    float, typer.Option("--delta", metavar="X", help="where Huber's function turns linear", show_default=True)
]
Starts = Annotated[int, typer.Option("--starts", metavar="N", help="number of starts of the fit", show_default=True)]
Bootstrap = Annotated[
    int, typer.Option("--bootstrap", metavar="N", help="number of resamples of the runs", show_default=True)
]
Seed = Annotated[int, typer.Option("--seed", metavar="N", help="seed of starts and resamples", show_default=True)]
Curves = Annotated[
    bool,
    typer.Option(
        "--curves",
        help="use every evaluation of a run (metrics.jsonl, or a table with a column step), not only its end",
    ),
]
FirstStep = Annotated[
    int | None,
    typer.Option(
        "--first-step",
        metavar="N",
        help="the first step of a curve that counts (default: twice the warm-up, and at least 60)",
    ),
]
WarmupSteps = Annotated[
    int | None,
    typer.Option("--warmup-steps", metavar="N", help="length of the warm-up of the runs of a table with a column step"),
]
Group = Annotated[
    Sequence[str],
    typer.Option(
        "--group", metavar="KEY",
        help="a key that distinguishes conditions; repeatable (default: all that vary; `scan`: width or depth)",
    ),
]  # fmt: skip


LrRange = Annotated[
    str | None,
    typer.Option(
        "--lr-range",
        metavar="LOW,HIGH",
        help="the range of learning rates in S (default: the range that the sweep declares, else 3e-4,3e-1)",
    ),
]
Width = Annotated[
    str | None,
    typer.Option(
        "--width", metavar="COLUMNS", autocompletion=_one_of(("single", "double")),
        help="figures as wide as a paper's column: single (3.3 inches) or double (6.9 inches)",
    ),
]  # fmt: skip


def check_max_length(typed: int | None) -> None:
    """Raise ConfigError if --max-length is not greater than zero."""
    if typed is not None and typed < 1:
        raise ConfigError(f"--max-length must be greater than zero; got {typed}")


def ends(lr_range: str) -> tuple[float, float]:
    """The two learning rates of --lr-range LOW,HIGH. Raises ConfigError if the text is something else."""
    from scaling_testbed.analysis.curves.lr_sensitivity import check_range
    from scaling_testbed.errors import ConfigError

    try:
        return check_range(tuple(map(float, lr_range.split(","))))
    except ValueError:
        raise ConfigError(f"--lr-range must be LOW,HIGH with 0 < LOW < HIGH; got {lr_range!r}") from None


def out(help_: str) -> Any:
    """The option --out FILE, repeatable. help_: the content for each ending, and the default."""
    return typer.Option("--out", metavar="FILE", help=f"{help_}; repeatable")


Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="print only warnings, errors and the result")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="print more, such as which run starts where")]
OutTable = Annotated[Sequence[Path], out("save the table in the format of the ending: .csv, .json, .jsonl or .parquet")]
