"""--out: the ending says the format, nothing that is read is lost, and --json is one document."""

import json

import pandas
import pytest

from scaling_testbed.analyze import main
from tests.analysis.conftest import grid


@pytest.fixture
def place(study, tmp_path):
    study(
        grid(lambda c, w, lr, s: 3.0 + lr, [{"model__qk_norm": "none"}], diagnostics_at_step=lambda *at: {"q": at[1]})
    )
    return tmp_path / "qknorm_lr"


def records(path):
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text().splitlines()]
    if path.suffix == ".json":
        return json.loads(path.read_text())["rows"]
    return (pandas.read_csv if path.suffix == ".csv" else pandas.read_parquet)(path).to_dict(orient="records")


def test_each_ending_holds_the_same_table_and_nothing_else_is_written(place, tmp_path, capsys):
    files = [tmp_path / "new" / f"s.{ending}" for ending in ("json", "jsonl", "csv", "parquet", "png", "svg")]
    typed = ["lr_sensitivity", str(place), *(word for file in files for word in ("--out", str(file)))]
    assert main(typed) == 0
    assert capsys.readouterr().out.endswith(f"wrote {', '.join(map(str, files))}\n")
    assert sorted((tmp_path / "new").iterdir()) == sorted(files) and not (place / "analysis").exists()
    assert files[4].read_bytes()[:4] == b"\x89PNG" and "<svg" in files[5].read_text()
    first, *others = ([(row["n_params"], row["S"]) for row in records(file)] for file in files[:4])
    assert len(first) == 3 and others == [first] * 3


def test_a_folder_after_out_takes_one_of_each_kind_and_says_how_it_is_written_now(place, tmp_path, capsys):
    assert main(["lr_sensitivity", str(place)]) == 0
    for folder in ("new", "v1.0/"):
        assert main(["lr_sensitivity", str(place), "--out", f"{tmp_path}/{folder}"]) == 0
        assert f"lr_sensitivity.csv --out {tmp_path}" in capsys.readouterr().err
        for file in (place / "analysis").iterdir():
            assert (tmp_path / folder / file.name).read_bytes() == file.read_bytes()
    assert len(list((tmp_path / "new").iterdir())) == 4


@pytest.mark.parametrize(
    ("verb", "known"),
    [
        ("lr_sensitivity", ".csv, .json, .jsonl, .parquet, .png, .svg, .pdf"),
        ("instability", ".csv, .json, .jsonl, .parquet, .png, .svg, .pdf"),
        ("report", ".html, .png, .svg, .pdf"),
        ("fit", ".csv, .json, .jsonl, .parquet, .html, .png, .svg, .pdf"),
        ("frontier", ".csv, .json, .jsonl, .parquet, .html, .png, .svg, .pdf"),
    ],
)
def test_an_unknown_ending_is_refused_with_those_there_are(place, tmp_path, capsys, verb, known):
    needed = {"fit": ["--law", "chinchilla"], "frontier": ["--method", "isoflop"]}.get(verb, [])
    assert main([verb, str(place), *needed, "--out", str(tmp_path / "a.gif")]) == 2
    said = capsys.readouterr().err
    assert f"a.gif: the file must end in one of {known}\n" in said and len(said.splitlines()) == 1


def test_json_is_one_document_and_nothing_else(place, capsys):
    for verb, more in {"lr_sensitivity": [], "instability": ["--quantity", "q", "--hold-out-largest"]}.items():
        assert main([verb, str(place), *more, "--json"]) == 0
        printed = capsys.readouterr()
        assert json.loads(printed.out) == json.loads((place / "analysis" / f"{verb}.json").read_text())
        assert printed.err == ""


def test_what_is_read_is_not_written_over(place, capsys):
    rows = place / "results.jsonl"
    before = rows.read_text()
    assert main(["lr_sensitivity", str(rows), "--out", str(rows)]) == 2
    assert "is also an input and would be overwritten" in capsys.readouterr().err and rows.read_text() == before


def test_a_law_is_kept_as_a_page_and_as_a_table_of_runs(tmp_path, capsys):
    lines = [f"{n},{20 * n},{2 + (1e6 / n) ** 0.3}" for n in (1e6, 2e6, 4e6, 8e6, 16e6)]
    (tmp_path / "runs.csv").write_text("\n".join(["n_params,n_tokens,loss", *lines]))
    files = [tmp_path / f"law.{ending}" for ending in ("html", "csv", "json")]
    out = [word for file in files for word in ("--out", str(file))]
    typed = ["--law", "kaplan_n", "--bootstrap", "0", "--starts", "4", "--hold-out", "n_params>8e6"]
    assert main(["fit", str(tmp_path / "runs.csv"), *typed, *out]) == 0
    assert main(["report", str(files[2]), "--out", str(tmp_path / "again.html")]) == 0
    again, _, made = (tmp_path / "again.html").read_text().partition("<section>\n<h2>Commands and files")
    assert files[0].read_text().startswith(again.rstrip()) and f"analyze report {files[2]}" in made
    table = pandas.read_csv(files[1])
    assert list(table["held_out"]) == [False] * 4 + [True] and list(table["actual"]) == pytest.approx(
        [2 + (1e6 / n) ** 0.3 for n in (1e6, 2e6, 4e6, 8e6, 16e6)]
    )
