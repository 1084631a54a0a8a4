"""What a run tells a person at its start and when it is typed again."""

from scaling_testbed.sweeps.dry_run import describe_run
from scaling_testbed.training.run import train

ROUNDED = "budget.tokens=500 is 3.91 steps of 128 tokens; rounded to 4 steps, 512 tokens"
IN_TOKENS = ("budget.steps=null", "budget.tokens=500")


def test_a_run_says_what_was_rounded_away_once_and_so_does_a_dry_run(tiny, capsys):
    run, _ = tiny(*IN_TOKENS)
    assert train(run)["n_tokens"] == 512
    assert capsys.readouterr().out.count(ROUNDED) == 1
    assert describe_run(run, 16).count(ROUNDED) == 1
    exact, _ = tiny("budget.steps=2")
    train(exact)
    assert "rounded" not in capsys.readouterr().out + describe_run(exact, 16)


def test_a_finished_run_that_is_typed_again_says_so(tiny, capsys):
    run, folder = tiny("budget.steps=2")
    row = train(run)
    assert "before" not in capsys.readouterr().out
    assert train(run) == row
    said = f"run {folder} has finished before and is not trained again; to repeat it, delete its folder\n"
    assert capsys.readouterr().out == said
    assert train(run, quiet=True) == row
    assert capsys.readouterr().out == ""
