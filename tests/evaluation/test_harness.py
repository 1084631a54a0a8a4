"""lm-evaluation-harness finds the log-likelihoods of `analyze score`, by the real package where it is installed."""

import importlib.util
import json
import math
import sys

import numpy as np
import pytest
import torch

from scaling_testbed import evaluate as door
from scaling_testbed import lm_eval as command_line
from scaling_testbed.data.tokenizers import load_tokenizer
from scaling_testbed.errors import ConfigError, UserError
from scaling_testbed.evaluation.loading import load_model
from scaling_testbed.evaluation.multiple_choice import pair_continuations, read_tasks
from scaling_testbed.evaluation.scoring import greedy_log_likelihoods, score, summaries
from scaling_testbed.learning.loss_model import LossModel
from tests.evaluation.test_scoring import QUESTIONS, WORDS, task_file, text_run  # noqa: F401

WHY = "lm_eval is not installed; pip install -e '.[harness]' into an environment of your own"
needs_lm_eval = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason=WHY)
PAIRS = [("the cat sat on the", " mat"), ("", "the"), ("a dog ran to the red ", "hat and"), (WORDS, " and"), ("x", "ä")]


# ---- without lm_eval


@pytest.mark.parametrize("more", [[], ["model.attention_normaliser=relu2"]], ids=["softmax", "relu2"])
def test_log_likelihoods_and_greedy_flags_are_those_of_a_loop_over_tokens(text_run, more):  # noqa: F811
    run, folder = text_run("budget.steps=40", *more)
    _, model, data = load_model(run, folder, step=None, device=torch.device("cpu"))
    made = pair_continuations(PAIRS, load_tokenizer(data.folder), max_length=32)
    found = greedy_log_likelihoods(LossModel(model, run.loss), made, device=torch.device("cpu"), precision="fp32")
    flags = set()
    for one, (value, greedy) in zip(made, found, strict=True):
        with torch.no_grad():
            log_p_TV = model.logits(torch.from_numpy(one.ids[:-1])[None])[0].double().log_softmax(-1)
        places = range(len(one.ids) - one.n_scored, len(one.ids))
        assert value == pytest.approx(sum(log_p_TV[at - 1, one.ids[at]].item() for at in places), abs=1e-4)
        assert greedy == all(int(log_p_TV[at - 1].argmax()) == one.ids[at] for at in places)
        flags.add(greedy)
    assert flags == {True, False}


def test_without_lm_eval_a_line_says_what_to_install(tmp_path, monkeypatch, capsys):
    for name in [name for name in sys.modules if name.partition(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "scaling_testbed.evaluation.harness", raising=False)
    monkeypatch.delattr("scaling_testbed.evaluation.harness", raising=False)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    for main, arguments in ((door.main, [str(tmp_path), "--tasks", "arc_easy"]), (command_line.main, ["--help"])):
        assert main(arguments) == 1
        error = capsys.readouterr().err
        assert error.startswith("error: lm_eval is not installed: pip install -e '.[harness]'")
        assert len(error.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--tasks", ","], "--tasks names no task"),
        (["--tasks", "a", "--limit", "0"], "--limit must be greater than zero"),
        (["--tasks", "a", "--fewshot", "-1"], "--fewshot must not be negative"),
        (["--tasks", "a", "--max-length", "0"], "--max-length must be greater than zero"),
        (["--tasks", "a", "--include", "nowhere"], "--include nowhere is no folder"),
        (["--tasks", "bracket,bracket"], "two tasks are named bracket"),
        ([], "give --tasks NAME,NAME or --lengths N,N, and not both"),
        (["--tasks", "bracket", "--lengths", "8"], "and not both"),
        (["--tasks", "bracket", "--window", "8"], "--window belongs to --lengths"),
        (["--lengths", "8", "--fewshot", "0"], "--fewshot belongs to --tasks"),
    ],
)
def test_a_wrong_argument_is_one_line(tmp_path, capsys, arguments, said):
    assert door.main([str(tmp_path), *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error and len(error.splitlines()) == 1


# ---- with it


@pytest.fixture
def lm(text_run):  # noqa: F811
    """Returns a function from settings of RunLM to a model that learned a rhyme, with its run and folder."""
    harness = pytest.importorskip("scaling_testbed.evaluation.harness", reason=WHY, exc_type=ImportError)
    run, folder = text_run("budget.steps=120")

    def make(**settings):
        return harness.RunLM(str(folder), device="cpu", **settings), run, folder

    return make


def requests(kind, *arguments):
    from lm_eval.api.instance import Instance

    return [Instance(request_type=kind, doc={}, arguments=one, idx=0) for one in arguments]


@needs_lm_eval
def test_the_harness_and_score_agree_on_every_document(lm, task_file, tmp_path, capsys):  # noqa: F811
    model, run, folder = lm()
    ends = [at for at in range(10, 40) if WORDS[at] != " "]
    rhyme = task_file([{"context": WORDS[:at], "choices": ["~", WORDS[at], "Q"], "gold": 1} for at in ends])
    mixed = task_file(QUESTIONS, "mixed")
    tasks = read_tasks([rhyme, mixed])
    _, scored = score(run, folder, tasks)
    capsys.readouterr()
    out = tmp_path / "found.json"
    assert door.main([str(folder), "--tasks", f"{rhyme},{mixed}", "--json", "--out", str(out)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["step"] == 120 and json.loads(out.read_text()) == found
    for row in summaries(scored)[:2]:
        assert found["results"][row["task"]]["acc,none"] == pytest.approx(1 - row["error"])
    assert found["n_samples"]["rhyme"]["effective"] == len(ends)
    from scaling_testbed.evaluation.harness import evaluate

    samples = evaluate(model, [], tasks)["samples"]
    for task in tasks:
        theirs = {one["doc_id"]: [float(pair[0]) for pair in one["filtered_resps"]] for one in samples[task.name]}
        ours = [one.log_likelihoods for one in scored if one.task == task.name]
        for number, values in enumerate(ours):
            assert theirs[number] == pytest.approx(values, abs=1e-4)
    assert door.main([str(folder), "--tasks", str(rhyme), "--limit", "3"]) == 0
    said = capsys.readouterr().out
    assert f"step 120 of {folder}, in fp32, by lm_eval" in said and "acc_norm" in said
    assert door.main([str(folder), "--tasks", "no_such_task"]) == 2
    assert "--tasks no_such_task: lm_eval has no such task" in capsys.readouterr().err


@needs_lm_eval
def test_a_task_of_the_harness_itself_runs_by_its_own_command_line(lm, tmp_path, capsys, monkeypatch):
    """Of a YAML file with local data; --model scaling_testbed makes the model of a folder."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    _, _, folder = lm()
    (tmp_path / "d.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in (WORDS, WORDS[:9])))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "lines.yaml").write_text(
        f"task: lines\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: '{tmp_path}/d.jsonl'}}}}\n"
        "test_split: test\noutput_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: text\n"
        "metric_list: [{metric: byte_perplexity, aggregation: weighted_perplexity, higher_is_better: false}]\n"
    )
    assert door.main([str(folder), "--tasks", "lines", "--include", str(tmp_path / "tasks"), "--json"]) == 0
    ours = json.loads(capsys.readouterr().out)["results"]["lines"]["byte_perplexity,none"]
    (tmp_path / "d.jsonl").rename(tmp_path / "moved.jsonl")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "other"))
    assert door.main([str(folder), "--tasks", "lines", "--include", str(tmp_path / "tasks")]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: lm_eval cannot read the data of lines: ") and "d.jsonl" in error
    (tmp_path / "moved.jsonl").rename(tmp_path / "d.jsonl")
    arguments = ["--model", "scaling_testbed", "--model_args", f"run_dir={folder}", "--tasks", "lines"]
    arguments += ["--include_path", str(tmp_path / "tasks"), "--output_path", str(tmp_path / "out.json")]
    assert command_line.main(arguments) == 0
    (path,) = tmp_path.glob("out*.json")
    theirs = json.loads(path.read_text())["results"]["lines"]["byte_perplexity,none"]
    assert theirs == pytest.approx(ours) and 1 < theirs < 3  # of 257 tokens; the model has learned the rhyme


@needs_lm_eval
@pytest.mark.parametrize("n_tokens", [0, 1, 31, 32, 33, 64, 100])
def test_a_whole_text_is_split_as_the_harness_splits_it(n_tokens):
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    from scaling_testbed.evaluation.harness import rolling

    tokens = np.arange(n_tokens)
    theirs = map(make_disjoint_window, get_rolling_token_windows(tokens.tolist(), 256, 32, 1))
    expected = [([*context, *scored], len(scored)) for context, scored in theirs]
    assert [(one.ids.tolist(), one.n_scored) for one in rolling(tokens, 256, 32)] == expected


@needs_lm_eval
def test_each_token_of_a_whole_text_is_scored_once(lm):
    model, run, folder = lm()
    texts = ["", "the", WORDS, WORDS * 3]
    found = model.loglikelihood_rolling(requests("loglikelihood_rolling", *((text,) for text in texts)))
    _, plain, _ = load_model(run, folder, step=None, device=torch.device("cpu"))
    for text, value in zip(texts, found, strict=True):
        ids, expected, begin = [256, *text.encode()], 0.0, 1
        while begin < len(ids):  # windows of 32, the last one with a full context
            end = min(begin + 32, len(ids))
            read = ids[max(0, end - 33) : end]
            with torch.no_grad():
                log_p_TV = plain.logits(torch.tensor([read[:-1]]))[0].double().log_softmax(-1)
            places = range(len(read) - (end - begin), len(read))
            expected += sum(log_p_TV[at - 1, read[at]].item() for at in places)
            begin = end
        assert value == pytest.approx(expected, abs=1e-3)
    assert found[0] == 0


@needs_lm_eval
def test_texts_end_where_the_task_says_and_odd_requests_are_refused(lm, text_run, monkeypatch):  # noqa: F811
    model, _, _ = lm()

    def write(context, **settings):
        return model.generate_until(requests("generate_until", (context, settings)))[0]

    known = "a the cat sat on the "
    rest = WORDS[WORDS.index("mat") :]
    assert write(known, max_gen_toks=12) == rest[:12] == write(known, max_gen_toks=12, do_sample=False, temperature=0.0)
    assert write(known, until=["zz", " and"], max_gen_toks=40) == "mat"
    assert write(known, until="\n", max_gen_toks=200) == rest
    drawn = {"do_sample": True, "temperature": 3.0, "max_gen_toks": 20}
    assert write(known, **drawn) == write(known, **drawn) != write(known, **drawn, seed=1)
    with pytest.raises(UserError, match="generation setting top_p is not supported; there are until"):
        write(known, top_p=0.9)
    with pytest.raises(UserError, match="generation settings {'max_gen_toks': 0}: --tokens must be a whole number"):
        write(known, max_gen_toks=0)
    for pair, said in ((("a", ""), "has 0 tokens"), (("a", "b" * 33), "has 33 tokens .* at most 32")):
        with pytest.raises(UserError, match=said):
            model.loglikelihood(requests("loglikelihood", pair))
    (value, _), (longer, _) = (lm(**how)[0].loglikelihood(requests("loglikelihood", ("a" * 60, " b")))[0] for how in (
        {}, {"max_length": 100}
    ))  # fmt: skip
    assert math.isfinite(value) and value != longer


@needs_lm_eval
def test_another_checkpoint_and_a_missing_one(lm, text_run):  # noqa: F811
    with pytest.raises(UserError, match="holds no step 3"):
        lm(step=3)


@needs_lm_eval
def test_a_task_that_lm_eval_lacks_is_one_line_of_its_own_command_too(monkeypatch):
    from scaling_testbed.evaluation import harness

    def cli():
        raise ValueError("Tasks not found: bracket. Try `lm-eval ls tasks`")

    monkeypatch.setattr(harness, "cli_evaluate", cli)
    with pytest.raises(ConfigError, match="Tasks not found: bracket.*evaluate RUN_DIR --tasks"):
        harness.command_line(["--tasks", "bracket"])


@needs_lm_eval
def test_a_wrong_word_of_model_args_is_named():
    from scaling_testbed.evaluation import harness

    with pytest.raises(
        UserError, match="model_args has no stpe; it has run_dir, step, average, max_length and plugins"
    ):
        harness.RunLM(run_dir="runs/x/y", stpe=100)
    with pytest.raises(UserError, match="model_args needs the run: run_dir="):
        harness.RunLM(step=100)
