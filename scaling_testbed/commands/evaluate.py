"""The command that measures a finished run: evaluate."""

from scaling_testbed.commands.lengths import Lengths, ValidationTokens, Windows, show_lengths
from scaling_testbed.commands.options import Average, Json, OutTable, RunDir, Step


def evaluate(
    run_dir: RunDir,
    lengths: Lengths,
    window: Windows = None,
    tokens: ValidationTokens = 131072,
    step: Step = None,
    average: Average = False,
    as_json: Json = False,
    out: OutTable = (),
) -> None:
    """The loss of a checkpoint on windows of several lengths, shorter and longer than in training, by position.

    Windows of each length are cut from the same validation tokens. --window train gives a fair rival to any way of
    reading longer texts: the same weights, with an attention that sees only as many positions as in training."""
    from scaling_testbed.config.compose import recorded_run

    show_lengths(run_dir, recorded_run(run_dir), lengths, window, tokens, step, average, as_json, out)
