"""`analyze compare` finds planted differences between models, and refuses what cannot be compared."""

import json
from pathlib import Path

import numpy as np
import pytest

from scaling_testbed import analyze
from scaling_testbed.evaluation.comparison import compare, read_models
from scaling_testbed.evaluation.statistics import paired_difference


def document(task: str, line: int, *, right: bool, right_per_byte: bool | None = None, loss: float = 1.0) -> dict:
    """A line that `score` keeps."""
    per_byte = right if right_per_byte is None else right_per_byte
    return {"task": task, "line": line, "gold": 1, "predicted": int(right), "predicted_per_byte": int(per_byte),
            "log_likelihoods": [-2.0, -loss], "n_bytes": [3, 4]}  # fmt: skip


@pytest.fixture
def kept(tmp_path):
    """Writes a file of `score`, the documents in reverse."""

    def write(name: str, documents: list[dict]) -> str:
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(one) + "\n" for one in reversed(documents)))
        return str(path)

    return write


def seeds(kept, name: str, rate: float, n: int = 3, tasks=(("t", 200),)) -> list[str]:
    """Files of a model that is right at `rate`, on documents that are as hard for every model."""
    hard = np.random.default_rng(0).random(sum(size for _, size in tasks))
    places = [(task, line) for task, size in tasks for line in range(1, size + 1)]
    return [
        kept(f"{name}{seed}", [document(task, line, right=hard[i] < rate + 0.02 * (seed - 1), loss=3 - 2 * rate)
                               for i, (task, line) in enumerate(places)])
        for seed in range(n)
    ]  # fmt: skip


def door(*models, more=()) -> int:
    named = [f"{name}={','.join(files)}" for name, *files in models]
    return analyze.main(["compare", *(word for model in named for word in ("--model", model)), *more])


def test_a_better_model_is_found_and_an_equal_one_is_not(kept, capsys):
    models = [("good", *seeds(kept, "g", 0.7)), ("twin", *seeds(kept, "t", 0.7)), ("bad", *seeds(kept, "b", 0.5))]
    assert door(*models, more=["--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["a"], row["b"]) for row in rows] == [("good", "twin"), ("good", "bad"), ("twin", "bad")]
    equal, better, _ = rows
    assert equal["difference"] == 0 and equal["low"] < 0 < equal["high"] and equal["p_holm"] > 0.5
    assert better["difference"] == pytest.approx(better["mean_a"] - better["mean_b"])
    assert better["high"] < -0.1 and better["p_holm"] < 0.01 and better["p_holm"] > better["p_value"]
    assert better["documents"] == 200 and better["seeds_a"] == better["seeds_b"] == 3
    assert door(*models, more=["--json", "--against", "good"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["a"], row["b"]) for row in rows] == [("twin", "good"), ("bad", "good")]
    assert rows[1]["difference"] == -better["difference"]


def test_the_measures_look_at_their_own_columns(kept, capsys):
    a = kept("a", [document("t", line, right=True, right_per_byte=line > 1, loss=0.5) for line in range(1, 5)])
    b = kept("b", [document("t", line, right=line > 2, right_per_byte=False, loss=0.75) for line in range(1, 5)])
    for measure, means in {"error": (0, 0.5), "error_per_byte": (0.25, 1), "gold_loss": (0.5, 0.75)}.items():
        assert door(("a", a), ("b", b), more=["--json", "--measure", measure]) == 0
        (row,) = json.loads(capsys.readouterr().out)
        assert (row["mean_a"], row["mean_b"]) == means
    assert door(("a", a), ("b", b)) == 0
    assert "one seed of a, b: the interval does not cover other seeds" in capsys.readouterr().out


def test_tasks_count_alike_in_the_mean(kept):
    """The large task is all right, the small one all wrong: half of the tasks' mean, a tenth of the documents."""
    tasks = [*(("large", line, True) for line in range(90)), *(("small", line, False) for line in range(10))]
    a = kept("a", [document(task, line, right=right) for task, line, right in tasks])
    b = kept("b", [document(task, line, right=True) for task, line, _ in tasks])
    models, task_D = read_models({"a": [Path(a)], "b": [Path(b)]}, "error")
    large, small, mean = compare(models, task_D)
    assert [row["task"] for row in (large, small, mean)] == ["large", "small", "mean"]
    assert (large["difference"], small["difference"], mean["difference"]) == (0, 1, 0.5)
    assert mean["low"] == pytest.approx(0.5) == mean["high"]  # tasks are given: nothing is left to vary


def test_documents_are_resampled_within_their_task():
    """Whatever is drawn, each task keeps its weight; without tasks a draw can have more of one."""
    a, task = np.repeat([[1.0, 0.0]], 50, axis=1), np.repeat(["x", "y"], 50)
    apart, together = paired_difference(a, 0 * a, task, resamples=200), paired_difference(a, 0 * a, resamples=200)
    assert apart.low == pytest.approx(0.5) == apart.high and together.low < 0.45


def test_a_document_counts_once_in_a_file(kept, capsys):
    """Three seeds' files joined to one would pass for three times the documents."""
    one = [document("t", line, right=True) for line in (1, 2)]
    assert door(("a", kept("a", one + one)), ("b", kept("b", one))) == 1
    assert "a.jsonl holds t line" in capsys.readouterr().err
    for broken in ({"task": None}, {"line": "1"}):
        assert door(("a", kept("a", [one[0], {**one[1], **broken}])), ("b", kept("b", one))) == 1
        assert "was not written by `analyze score --out`" in capsys.readouterr().err


def test_what_cannot_be_compared_is_named(kept, tmp_path, capsys):
    good = kept("good", [document("t", line, right=True) for line in (1, 2)])
    fewer = kept("fewer", [document("t", 1, right=True)])
    other = kept("other", [document("t", 1, right=True), document("u", 2, right=True)])
    gold = kept("gold", [{**document("t", line, right=True), "gold": 0} for line in (1, 2)])
    nan = kept("nan", [{**document("t", 1, right=True), "log_likelihoods": [float("nan")] * 2}])
    short = kept("short", [{"task": "t", "line": 1}])
    text = kept("text", ["words"])
    empty = kept("empty", [])
    assert door(("a", good, kept("copy", [document("t", line, right=True) for line in (1, 2)])), ("b", gold)) == 1
    assert f"copy.jsonl is a copy of {good}; give one file for each seed" in capsys.readouterr().err
    for path, message in [
        (fewer, "fewer.jsonl and {good} have different documents: 1 in the first, 2 in the second"),
        (other, "other.jsonl and {good} have different documents: u line 2 in the first, t line 2 in the second"),
        (gold, "gold.jsonl and {good} have different documents: t line 1 in the first, t line 1 in the second"),
        *((bad, "{bad} was not written by `analyze score --out`") for bad in (nan, short, text)),
        (empty, "empty.jsonl holds no document"),
        (str(tmp_path / "none"), "none: No such file or directory"),
        (str(tmp_path), "cannot read"),
    ]:
        assert door(("a", good), ("b", path)) == 1
        error = capsys.readouterr().err
        assert message.format(good=good, bad=path) in error and "Traceback" not in error
    for models, more, message in [
        ([("a", good)], [], "a comparison needs two models; got a"),
        ([("a", good), ("a", good)], [], "--model a is given twice"),
        ([("a", good), ("b",)], [], "--model b=: write --model NAME=FILE"),
        ([("a", good), ("b", good)], ["--against", "c"], "--against must be one of a, b; got 'c'"),
    ]:
        assert door(*models, more=more) == 2
        assert message in capsys.readouterr().err
