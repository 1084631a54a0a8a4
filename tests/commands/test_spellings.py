"""What README taught once is still understood, with a line that says how it is written now."""

import pytest

from scaling_testbed.commands.spellings import today

OPTIONS = {"--workers", "--gpus", "--runs-per-gpu", "--group", "--eps", "--model", "--out", "--where"}


@pytest.mark.parametrize(
    ("old", "new", "notes"),
    [
        ("sweep=a workers=2 model=b", "sweep=a --workers 2 model=b", 1),
        ("gpus=0,1 runs_per_gpu=2", "--gpus 0,1 --runs-per-gpu 2", 2),
        ("launcher=slurm launcher.time=1", "--launcher slurm launcher.time=1", 0),  # refused: the verb has none
        ("data_workers=2", "data_workers=2", 0),
        ("p --group a.b c scan --where d=e", "p --group a.b --group c --group scan --where d=e", 1),
        ("--group a.b runs/demo", "--group a.b runs/demo", 0),
        ("--group a.b --group c", "--group a.b --group c", 0),
        ("p --eps --where a=b", "p --eps 1e-8 --where a=b", 1),
        ("p --eps", "p --eps 1e-8", 1),
        ("p --eps 1e-7", "p --eps 1e-7", 0),
        ("--model a x.jsonl y.jsonl --model b z.jsonl", "--model a=x.jsonl,y.jsonl --model b=z.jsonl", 2),
        ("--model a=x.jsonl --model b=z.jsonl", "--model a=x.jsonl --model b=z.jsonl", 0),
        ("--figures d/stem p", "--out d/stem.png --out d/stem.svg p", 1),
        ("--figures", "--figures", 0),
    ],
)
def test_an_old_spelling_is_read_as_the_new_one_and_named(old, new, notes, capsys):
    assert today(old.split(), OPTIONS) == new.split()
    said = capsys.readouterr().err.splitlines()
    assert len(said) == notes and all("this is the last version that accepts the old spelling" in line for line in said)


def test_the_name_of_a_file_that_is_there_is_no_key(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.csv").touch()
    assert today(["--group", "a.b", "rows.csv"], OPTIONS) == ["--group", "a.b", "rows.csv"]


def test_the_verbs_of_a_sweep_take_them(tmp_path, capsys):
    from scaling_testbed import sweep

    places = ["sweep=nano_lr", f"runs_dir={tmp_path}", f"data_dir={tmp_path}"]
    assert sweep.main(["run", "--dry-run", *places, "workers=2"]) == 0
    printed = capsys.readouterr()
    assert "16 to start" in printed.out and "note: workers=2 is now --workers 2" in printed.err
    assert sweep.main(["plan", *places, "launcher=slurm", "flops_per_second=1e12"]) == 0
    printed = capsys.readouterr()
    assert "GPU-hours at 1e+12 FLOP/s (stated)" in printed.out and len(printed.err.splitlines()) == 2
    assert sweep.main(["plan", *places, "workers=2"]) == 2
    assert capsys.readouterr().err == "error: plan: there is no option --workers; --help lists the options\n"
