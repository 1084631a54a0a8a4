"""The command that stores the targets of a teacher: prepare_targets."""

from pathlib import Path
from typing import Annotated

import typer

from scaling_testbed.commands import output
from scaling_testbed.commands.documents import CORPUS
from scaling_testbed.commands.options import Json, RunDir, Step
from scaling_testbed.errors import ConfigError, check_positive

TopK = Annotated[int, typer.Option("--top-k", metavar="K", help="number of likeliest tokens at each position")]
TeacherTemperature = Annotated[
    float, typer.Option("--temperature", metavar="X", show_default=True, help="divides the logits of the teacher")
]
OtherCorpus = Annotated[Path | None, CORPUS]
MaxGib = Annotated[
    float, typer.Option("--max-gib", metavar="X", show_default=True, help="refuse targets of more GiB than this")
]
TargetDir = Annotated[
    Path | None,
    typer.Option("--out", metavar="DIR", help="where the folder of the targets is made (default: beside the shards)"),
]


def prepare_targets(
    run_dir: RunDir,
    top_k: TopK,
    data: OtherCorpus = None,
    temperature: TeacherTemperature = 1.0,
    step: Step = None,
    max_gib: MaxGib = 4.0,
    out: TargetDir = None,
    as_json: Json = False,
) -> None:
    """Store the likeliest next tokens by a finished run at each position of its training sequences.

    The targets are for objective=distill (docs/distillation.md). Without --data they are of the run's own data. A pass
    that was stopped goes on by the same command, and targets that are there are found."""
    if top_k < 1:
        raise ConfigError(f"--top-k must be greater than zero; got {top_k}")
    check_positive("--temperature", temperature)
    check_positive("--max-gib", max_gib)
    from scaling_testbed.config.compose import recorded_run

    run = recorded_run(run_dir)
    from scaling_testbed.evaluation import teacher
    from scaling_testbed.processes.interrupts import Interrupts

    with Interrupts() as interrupts, interrupts.at_once():
        targets, was_there = teacher.prepare_targets(
            run,
            run_dir,
            top_k=top_k,
            temperature=temperature,
            step=step,
            corpus=data,
            out=out,
            max_bytes=int(max_gib * 2**30),
        )
    manifest = targets.manifest
    if as_json:
        output.print_json({"folder": str(targets.folder), "was_there": was_there, **manifest})
        return
    positions = manifest["n_sequences"] * manifest["sequence_length"]
    print(f"{targets.folder} {'was there' if was_there else 'is written'}, fingerprint {targets.fingerprint}")
    print(
        f"{top_k} tokens at each of {positions:,} positions by step {manifest['teacher']['step']:,} of {run_dir}, at "
        f"temperature {temperature:g}; the others have {manifest['mean_tail']:.2%} of the probability on average"
    )
