"""Margins over a ladder of models, of files as `score --out` writes them."""

import json

import pytest

from scaling_testbed import analyze
from scaling_testbed.evaluation.comparison import margin


@pytest.fixture
def files(tmp_path):
    """Returns a function from a name and log-likelihoods of (right, wrong, wrong) to a file of `score --out`."""

    def make(name, values):
        path = tmp_path / f"{name}.jsonl"
        lines = [
            {"task": "t", "line": line, "gold": 0, "predicted": 0, "predicted_per_byte": 0, "n_bytes": [1, 1, 1],
             "log_likelihoods": list(three)} for line, three in enumerate(values, 1)
        ]  # fmt: skip
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return path

    return make


@pytest.fixture
def ladder(files):
    small = files("small", [(-1, -2, -3), (-3, -2, -9), (-5, -4, -4), (-1, -1, -2)])
    middle = files("middle", [(-1, -3, -4), (-4, -2, -9), (-5, -4, -4), (-1, -2, -2)])
    large0 = files("large0", [(-1, -5, -6), (-6, -2, -9), (-2, -4, -4), (-1, -2, -2)])
    large1 = files("large1", [(-1, -7, -6), (-8, -2, -9), (-6, -4, -4), (-1, -2, -2)])
    return [*("--model", f"small={small}", "--model", f"middle={middle}"), "--model", f"large={large0},{large1}"]


def test_a_margin_is_to_the_likeliest_other_choice():
    assert margin([-1.0, -4.0, -3.0], 0) == 2.0 and margin([-1.0, -4.0, -3.0], 1) == -3.0


def test_each_document_has_its_margins_and_the_table_counts_them(ladder, capsys, tmp_path):
    assert analyze.main(["margins", *ladder, "--out", str(tmp_path / "m.jsonl")]) == 0
    said = capsys.readouterr().out
    assert "wrong_and_falls" in said and "of the documents that all models get wrong, the first 1:" in said
    rows = [json.loads(line) for line in (tmp_path / "m.jsonl").read_text().splitlines()]
    assert [row["margin.large"] for row in rows] == [4.5, -5.0, 0.0, 1.0]
    assert [row["wrong"] for row in rows] == [False, True, False, False]  # the third is right for one seed of large
    assert [row["falls"] for row in rows] == [False, True, False, False]
    assert [row["rises"] for row in rows] == [True, False, False, False]
    assert analyze.main(["margins", *ladder, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["documents"] == rows
    assert found["tasks"] == [
        {"task": "t", "documents": 4, "rises": 1, "falls": 1, "wrong": 1, "wrong_and_falls": 1, "by_chance": 1 / 6}
    ]


def test_two_models_are_compared_on_margins_paired(ladder, capsys):
    assert analyze.main(["compare", *ladder, "--measure", "margin", "--against", "small", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["a"], row["b"]) for row in rows] == [("middle", "small"), ("large", "small")]
    assert rows[0]["difference"] == pytest.approx((2 - 2 - 1 + 1) / 4 - (1 - 1 - 1 + 0) / 4)
    assert rows[0]["low"] <= rows[0]["difference"] <= rows[0]["high"]


def test_one_model_has_no_ladder(ladder, capsys):
    assert analyze.main(["margins", *ladder[:2]]) == 2
    assert "--model: margins need two models or more, the weakest first; got 1" in capsys.readouterr().err
