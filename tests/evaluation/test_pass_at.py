"""pass@N against its definition with exact fractions, and log P at a temperature against a loop over tokens."""

import json
from fractions import Fraction

import numpy as np
import pytest
import torch

from scaling_testbed import analyze
from scaling_testbed.data.tokenizers import load_tokenizer
from scaling_testbed.evaluation.loading import load_model
from scaling_testbed.evaluation.multiple_choice import read_tasks
from scaling_testbed.evaluation.pass_at import Likely, likelihoods_of_right, pass_at, summaries
from tests.evaluation.test_scoring import QUESTIONS, task_file, text_run  # noqa: F401


@pytest.mark.parametrize("p", [1e-300, 1e-12, 1e-3, 0.3, 0.5, 0.9, 1 - 1e-12])
@pytest.mark.parametrize("n", [1, 7, 64])
def test_pass_at_n_is_the_definition_for_the_smallest_and_largest_chances(p, n):
    exact = 1 - (1 - Fraction(p)) ** n
    assert pass_at([np.log(p) if p < 0.9 else np.log1p(p - 1)], n)[0] == pytest.approx(float(exact), rel=1e-12, abs=0)


def test_a_sure_and_an_impossible_text():
    assert pass_at([0.0, -2000.0], 5).tolist() == [1.0, 0.0]
    assert pass_at([-690.0], 10**6)[0] == pytest.approx(10**6 * np.exp(-690.0), rel=1e-12, abs=0)  # 1 - P would be 1


def test_summaries_are_means_over_documents_by_task_and_temperature():
    found = [Likely("a", line, t, np.log(p), 1, line == 2) for t, ps in ((1.0, (0.5, 0.1)), (2.0, (0.2, 0.2)))
             for line, p in enumerate(ps, 1)]  # fmt: skip
    first, second = summaries([*found, Likely("b", 1, 1.0, -1.0, 1, False)], [1, 2])[:2]
    assert first["pass@1"] == pytest.approx(0.3) and first["pass@2"] == pytest.approx((0.75 + 0.19) / 2)
    assert first["pass@1_se"] == pytest.approx(0.2) and first["truncated"] == 1
    assert (second["temperature"], second["documents"]) == (2.0, 2) and second["pass@1_se"] == 0
    assert summaries([Likely("b", 1, 1.0, -1.0, 1, False)], [1])[0]["pass@1_se"] is None


def by_hand(run, folder, context, text, temperature):
    _, model, data = load_model(run, folder, step=None, device=torch.device("cpu"))
    tokenizer = load_tokenizer(data.folder)
    before = list(context.rstrip().encode()) or [tokenizer.eos_id]
    right = (context[len(context.rstrip()) :] + text).encode()
    ids = torch.tensor([*before, *right])[-33:]
    with torch.no_grad():
        logits_TV = model.logits(ids[None, :-1])[0].double() / temperature
    log_p_T = logits_TV.log_softmax(-1).gather(1, ids[1:, None])[:, 0]
    return log_p_T[-len(right) :].sum().item()


@pytest.mark.parametrize("model", [[], ["model.final_softcap=2.0"]])
def test_the_door_shows_pass_at_n_and_keeps_log_p_of_each_document(text_run, task_file, capsys, tmp_path, model):  # noqa: F811
    run, folder = text_run(*model)
    kept, task = tmp_path / "p.jsonl", task_file()
    words = [str(folder), str(task), "--samples", "1,16", "--temperatures", "1,0.5"]
    assert analyze.main(["pass_at", *words, "--out", str(kept)]) == 0
    said = capsys.readouterr().out
    assert "pass@16" in said and "pass@16_se" in said and "begins with the right choice" in said
    records = [json.loads(line) for line in kept.read_text().splitlines()]
    assert [(one["line"], one["temperature"]) for one in records] == [(n, t) for t in (1, 0.5) for n in (1, 2, 3, 4)]
    for one in records:
        question = QUESTIONS[one["line"] - 1]
        exact = by_hand(run, folder, question["context"], question["choices"][question["gold"]], one["temperature"])
        assert one["log_p"] == pytest.approx(exact, abs=1e-4)
    assert analyze.main(["pass_at", *words, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["tasks"]
    _, likely = likelihoods_of_right(run, folder, read_tasks([task]), [1.0, 0.5])
    assert rows == summaries(likely, [1, 16]) and rows[0]["pass@1"] < rows[0]["pass@16"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--samples", "0"], "--samples must be different whole numbers above zero; got 0"),
        (["--samples", "2,2"], "--samples must be different"),
        (["--temperatures", "hot"], "--temperatures must be numbers, such as 1,1.5; got 'hot'"),
        (["--temperatures", "1,0"], "--temperatures must be positive numbers; got 0"),
        (["--temperatures", "1,1.0"], "--temperatures 1,1: a number is given twice"),
        (["--max-length", "0"], "--max-length must be"),
    ],
)
def test_a_wrong_option_is_one_line(text_run, task_file, capsys, words, said):  # noqa: F811
    run, folder = text_run("budget.steps=1")
    assert analyze.main(["pass_at", str(folder), str(task_file()), *words]) == 2
    assert said in capsys.readouterr().err
