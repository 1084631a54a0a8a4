"""Without a terminal a run prints a line every so many steps, and one for each evaluation."""

from scaling_testbed.progress import RunProgress


def test_plain_lines_come_at_their_steps_and_at_evaluations(capsys):
    progress = RunProgress(steps=100, done=0, line_every=20)
    for step in range(0, 101, 10):
        evaluated = {"val_loss": 3.0} if step in (0, 50, 100) else {}
        progress.update({"step": step, "train_loss": 2.5, "lr": 1e-3, "tokens_per_second": 1234.5} | evaluated)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("/")[0].split()[-1] for line in lines] == ["0", "20", "40", "50", "60", "80", "100"]
    assert "loss 2.5000" in lines[1] and "lr 1.00e-03" in lines[1] and "tokens/s 1,23" in lines[1]
    assert lines[1].endswith(" left") and "val_loss 3.0000" in lines[3]


def test_quiet_says_nothing(capsys):
    progress = RunProgress(steps=10, done=0, line_every=1, quiet=True)
    progress.update({"step": 5, "val_loss": 1.0})
    progress.say("text")
    assert capsys.readouterr().out == ""
