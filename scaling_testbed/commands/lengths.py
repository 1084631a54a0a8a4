"""The loss by length and position, as `evaluate --lengths` shows it."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from scaling_testbed.commands import output
from scaling_testbed.errors import ConfigError
from scaling_testbed.row_files import ENDINGS

if TYPE_CHECKING:
    from scaling_testbed.config.run import RunConfig

TRAIN = "train"  # of --window: as many positions as in training
Lengths = Annotated[
    str | None,
    typer.Option("--lengths", metavar="N,N", help="the lengths of the windows that the model reads, in tokens"),
]
Windows = Annotated[
    str | None,
    typer.Option(
        "--window", metavar="N,N",
        help=f"also with an attention that sees the last N positions only; {TRAIN}: as many as a sequence of training",
    ),
]  # fmt: skip
ValidationTokens = Annotated[
    int, typer.Option("--tokens", metavar="N", show_default=True, help="maximum number of validation tokens")
]
DEFAULT_TOKENS = 131072
LengthTokens = Annotated[
    int | None,
    typer.Option("--tokens", metavar="N", help=f"maximum number of validation tokens (default: {DEFAULT_TOKENS})"),
]


def show_lengths(
    run_dir: Path,
    run: "RunConfig",
    lengths: str,
    windows: str | None,
    tokens: int | None,
    step: int | None,
    average: bool,
    as_json: bool,
    out: Sequence[Path],
) -> None:
    """Print the table of `evaluation.lengths.by_length`, and write it."""
    asked = whole_numbers("--lengths", lengths)
    arms = [
        run.batch.sequence_length if word == TRAIN else number
        for word in (windows.split(",") if windows else [])
        for number in ([0] if word == TRAIN else whole_numbers("--window", word))
    ]
    tokens = DEFAULT_TOKENS if tokens is None else tokens
    if tokens < 1:
        raise ConfigError(f"--tokens must be greater than zero; got {tokens}")
    output.check(out, ENDINGS)
    from scaling_testbed.evaluation.lengths import DEFINITION, by_length
    from scaling_testbed.evaluation.scoring import place_of

    found = by_length(run, run_dir, asked, windows=arms, tokens=tokens, step=step, average=average)
    document = {**found.document(), "precision": place_of(run)[1], "notes": found.remarks()}
    written = output.write(out, found.rows, document=document)
    if as_json:
        output.print_json(document)
        return
    from scaling_testbed import tables

    print(
        f"step {found.step:,} of {run_dir}, in {document['precision']}; trained on sequences of "
        f"{found.train_length:,} tokens"
    )
    tables.show([{**row, "attention_window": row["attention_window"] or "none"} for row in found.rows])
    print(DEFINITION)
    for text in found.remarks():
        print(text)
    output.say_written(written)


def whole_numbers(option: str, typed: str) -> list[int]:
    """The numbers of a list N,N. Raises ConfigError, which names the option, if one is not a whole number."""
    try:
        return [int(word) for word in typed.split(",")]
    except ValueError:
        raise ConfigError(f"{option} must be whole numbers, such as 64,128; got {typed!r}") from None
