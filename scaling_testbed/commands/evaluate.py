"""The command that measures a finished run: evaluate."""

from scaling_testbed.commands.harness import FewShot, Include, Limit, TaskNames, show_tasks
from scaling_testbed.commands.lengths import Lengths, LengthTokens, Windows, show_lengths
from scaling_testbed.commands.options import Average, Json, MaxLength, OutTable, RunDir, Step
from scaling_testbed.errors import ConfigError


def evaluate(
    run_dir: RunDir,
    tasks: TaskNames = None,
    include: Include = None,
    fewshot: FewShot = None,
    limit: Limit = None,
    max_length: MaxLength = None,
    lengths: Lengths = None,
    window: Windows = None,
    tokens: LengthTokens = None,
    step: Step = None,
    average: Average = False,
    as_json: Json = False,
    out: OutTable = (),
) -> None:
    """Evaluate a checkpoint: by tasks of lm-evaluation-harness, or by the loss on windows of several lengths.

    --tasks needs no export. Any task of lm_eval can be named, if its data can be read here, and the multiple-choice
    tasks of `analyze score`, whose log-likelihoods are those of `analyze score`. A context that is too long loses its
    beginning.

    --lengths cuts windows of each length from the same validation tokens, shorter and longer than in training, and
    tells the loss by position too. --window train gives a fair rival to any way of reading longer texts: the same
    weights, with an attention that sees only as many positions as in training."""
    of_tasks = {"--include": include, "--fewshot": fewshot, "--limit": limit, "--max-length": max_length}
    of_lengths = {"--window": window, "--tokens": tokens}
    if (tasks is None) == (lengths is None):
        raise ConfigError("give --tasks NAME,NAME or --lengths N,N, and not both")
    needed, others = ("--lengths", of_lengths) if lengths is None else ("--tasks", of_tasks)
    if typed := [option for option, value in others.items() if value is not None]:
        raise ConfigError(f"{typed[0]} belongs to {needed}")
    if tasks is not None:
        show_tasks(run_dir, tasks, include, fewshot, limit, step, average, max_length, as_json, out)
        return
    from scaling_testbed.config.compose import recorded_run

    show_lengths(run_dir, recorded_run(run_dir), str(lengths), window, tokens, step, average, as_json, out)
