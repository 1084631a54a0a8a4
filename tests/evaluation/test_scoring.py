"""Scores of multiple-choice tasks are what a plain loop over the tokens finds."""

import json
import math
import shutil

import pytest
import torch

from scaling_testbed import analyze
from scaling_testbed.config.compose import compose_many
from scaling_testbed.config.run import run_folder_path
from scaling_testbed.data.tokenizers import load_tokenizer
from scaling_testbed.errors import UserError
from scaling_testbed.evaluation import scoring
from scaling_testbed.evaluation.loading import load_model
from scaling_testbed.evaluation.multiple_choice import Continuation, Document, read_tasks
from scaling_testbed.evaluation.scoring import Scored, score, summaries
from scaling_testbed.training.run import train

WORDS = "the cat sat on the mat and a dog ran to the red hat"
QUESTIONS = [
    {"context": "the cat sat on the", "choices": [" mat", " hatter", " zzzz"], "gold": 0},
    {"context": "", "choices": ["the", "a dog ran"], "gold": 1},
    {"context": "a dog ran to the red ", "choices": ["cat", "hat and the cat", "ä", "x"], "gold": 1},  # one is too long
    {"context": WORDS, "choices": ["?", " and"], "gold": 1},  # both are longer than training's sequences
]
MODELS = {
    "plain": [],
    "capped": ["model.final_softcap=2.0", "model.attention_window=4"],
    "relu2": ["model.attention_normaliser=relu2"],
    "padded": ["model.vocab_size=300", "model.tied_head=true"],
}


@pytest.fixture
def text_run(tmp_path):
    """Returns a function from overrides to (RunConfig, run folder) of a model trained on a rhyme."""
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(f"{name} {WORDS}\n" * 60)

    def make(*overrides):
        files = [f"data.files=['{tmp_path}/a.txt']", f"data.validation_files=['{tmp_path}/b.txt']"]
        places = [f"data_dir={tmp_path / 'data'}", f"runs_dir={tmp_path / 'runs'}"]
        small = ["model=nano_s", "batch.sequences=8", "batch.sequence_length=32", "budget.steps=8"]
        (run,) = compose_many([["data=text_files", *files, *places, *small, "optimizer.lr=1e-2", *overrides]])
        train(run, quiet=True)
        return run, run_folder_path(run)

    return make


@pytest.fixture
def task_file(tmp_path):
    """Returns a function from questions and a name to the file of the task."""

    def make(questions=QUESTIONS, name="rhyme"):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(question) + "\n" for question in questions))
        return path

    return make


def by_hand(run, folder, questions, length: int) -> list[list[float]]:
    """The definition, a byte at a time: each byte of a choice after at most `length` bytes before it in the text."""
    _, model, data = load_model(run, folder, step=None, device=torch.device("cpu"))
    assert load_tokenizer(data.folder).vocab_size == 257
    return [
        [_by_hand(model, question["context"], choice, length) for choice in question["choices"]]
        for question in questions
    ]


def _by_hand(model, context: str, choice: str, length: int) -> float:
    before = context.rstrip()
    scored = (context[len(before) :] + choice).encode()
    ids = (list(before.encode()) or [256]) + list(scored)
    ids = ids[max(0, len(ids) - length - 1) :]
    with torch.no_grad():
        logits_TV = model.logits(torch.tensor([ids[:-1]]))[0].double()
    places = range(len(ids) - len(scored), len(ids))
    return sum(torch.log_softmax(logits_TV[place - 1], dim=-1)[ids[place]].item() for place in places)


@pytest.mark.parametrize("model", MODELS)
def test_a_loop_over_tokens_finds_the_same_however_many_are_read_at_once(text_run, task_file, model, monkeypatch):
    run, folder = text_run(*MODELS[model])
    expected = by_hand(run, folder, QUESTIONS, 32)
    for at_once in (1, 64, 4096):
        monkeypatch.setattr(scoring, "BATCH_TOKENS", at_once)
        step, scored = score(run, folder, read_tasks([task_file()]))
        assert step == 8
        for one, values, question in zip(scored, expected, QUESTIONS, strict=True):
            assert one.log_likelihoods == pytest.approx(values, abs=1e-4)
            n_bytes = [len(choice.strip().encode()) for choice in question["choices"]]
            per_byte = [x / n for x, n in zip(values, n_bytes, strict=True)]
            assert one.predicted == values.index(max(values))
            assert one.predicted_per_byte == per_byte.index(max(per_byte))
        assert [one.truncated for one in scored] == [False, False, True, True]


def test_a_model_reads_more_than_in_training_where_it_is_told_to(text_run, task_file):
    run, folder = text_run()
    _, (*_, shorter) = score(run, folder, read_tasks([task_file()]))
    _, (*_, longer) = score(run, folder, read_tasks([task_file()]), max_length=100)
    assert longer.log_likelihoods == pytest.approx(by_hand(run, folder, QUESTIONS[-1:], 100)[0], abs=1e-4)
    assert longer.log_likelihoods != pytest.approx(shorter.log_likelihoods, abs=1e-3) and not longer.truncated


def test_the_export_gives_the_same_log_likelihoods_in_transformers(text_run, task_file, tmp_path):
    transformers = pytest.importorskip("transformers")
    from scaling_testbed.exporting.hugging_face import export

    bpe = ["tokenizer=bpe", "tokenizer.vocab_size=290"]
    run, folder = text_run("model.norm=rmsnorm", "model.mlp=swiglu", "model.qk_norm=rmsnorm", *bpe)
    export(run, folder, tmp_path / "out")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    _, scored = score(run, folder, read_tasks([task_file(QUESTIONS[:1])]))
    for choice, expected in zip(QUESTIONS[0]["choices"], scored[0].log_likelihoods, strict=True):
        context = tokenizer(QUESTIONS[0]["context"])["input_ids"]
        ids = tokenizer(QUESTIONS[0]["context"] + choice)["input_ids"]
        with torch.no_grad():
            log_p_TV = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        found = sum(log_p_TV[place - 1, ids[place]].item() for place in range(len(context), len(ids)))
        assert found == pytest.approx(expected, abs=1e-4)


def planted(task: str, n_choices: int, gold: int, values: list[float], choices=None) -> Scored:
    texts = tuple(choices or "abcdefg"[:n_choices])
    tokens = [Continuation(torch.zeros(2, dtype=torch.int64).numpy(), 1, False, False)] * n_choices
    return Scored(task, Document(1, "", texts, gold), values, tokens)


def test_errors_chance_and_standard_errors_have_their_closed_forms():
    scored = [
        planted("t", 2, 0, [-1.0, -2.0]),
        planted("t", 2, 1, [-1.0, -2.0]),
        planted("t", 4, 2, [-3.0, -3.0, -2.0, -9.0]),
        # The longer is less likely, but not per byte.
        planted("t", 2, 1, [-4.0, -5.0], [" ab", "abcdef"]),
        planted("other", 5, 0, [-1.0] * 5),  # the first of equals
    ]
    row, other, mean = summaries(scored)
    assert (row["error"], row["error_per_byte"], row["documents"]) == (0.5, 0.25, 4)
    assert row["chance_error"] == pytest.approx((3 * 0.5 + 0.75) / 4)
    assert row["error_se"] == pytest.approx(math.sqrt(0.5 * 0.5 / 3))  # p (1 - p) / (n - 1)
    assert row["error_per_byte_se"] == pytest.approx(math.sqrt(0.25 * 0.75 / 3))
    assert (other["error"], other["error_se"], other["chance_error"]) == (0.0, None, 0.8)
    assert (mean["task"], mean["documents"], mean["error"]) == ("mean", 5, 0.25) and mean["error_se"] is None
    *_, mean = summaries([*scored[:4], *(planted("u", 2, k % 2, [-1.0, -2.0]) for k in range(4))])
    assert mean["error_se"] == pytest.approx(math.sqrt(2 * 0.25 / 3) / 2)


def test_a_model_that_learned_a_rhyme_answers_it(text_run, task_file):
    run, folder = text_run("budget.steps=150")
    ends = [at for at in range(10, 40) if WORDS[at] != " "]
    questions = [{"context": WORDS[:at], "choices": ["~", WORDS[at], "Q"], "gold": 1} for at in ends]
    _, scored = score(run, folder, read_tasks([task_file(questions)]))
    (row,) = summaries(scored)
    assert row["error"] == 0.0 and row["chance_error"] == pytest.approx(2 / 3)


def test_the_door_prints_a_table_one_object_and_keeps_every_document(text_run, task_file, tmp_path, capsys):
    run, folder = text_run("checkpoint.keep_steps=[4]", "checkpoint.every_steps=4")
    capsys.readouterr()
    files = [str(task_file()), str(task_file(QUESTIONS[:2], "two"))]
    kept = tmp_path / "new" / "kept.jsonl"
    assert analyze.main(["score", str(folder), *files, "--out", str(kept)]) == 0
    said = capsys.readouterr().out
    assert "step 8" in said and "rhyme" in said and "mean" in said and "chance_error" in said and str(kept) in said
    records = [json.loads(line) for line in kept.read_text().splitlines()]
    assert [(record["task"], record["line"]) for record in records] == [
        *(("rhyme", line) for line in (1, 2, 3, 4)), *(("two", line) for line in (1, 2))
    ]  # fmt: skip
    assert records[2]["gold"] == 1 and len(records[2]["log_likelihoods"]) == 4
    assert records[2]["n_tokens"] == [4, 16, 3, 2] and records[2]["n_bytes"] == [3, 15, 2, 1]
    assert analyze.main(["score", str(folder), *files, "--json", "--step", "4"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (
        found["precision"] == "fp32"
        and found["step"] == 4
        and [row["task"] for row in found["tasks"]] == ["rhyme", "two", "mean"]
    )
    wrong = [{"context": "a", "choices": ["b"], "gold": 0}]
    for arguments, status, message in [
        ([str(folder), str(tmp_path / "none.jsonl")], 1, "none.jsonl: No such file"),
        ([str(folder), str(task_file(wrong, "wrong"))], 1, "wrong.jsonl:1: choices must be"),
        ([str(folder), *files, "--max-length", "0"], 2, "--max-length must be"),
        ([str(folder), *files, "--max-length", "8"], 1, "rhyme.jsonl:2: choices[1] has 9 tokens"),
        ([str(folder), *files, "--out", f"{files[0]}/x/y.jsonl"], 1, "cannot write"),
        ([str(folder), *files, "--out", files[1]], 2, "two.jsonl is also an input"),
        ([str(folder), str(task_file(QUESTIONS, "mean"))], 2, "mean is the name of the mean over tasks"),
        ([str(folder), *files, "--step", "5"], 1, "holds no step 5"),
        ([str(tmp_path), *files], 1, "is no run folder"),
        ([str(folder)], 2, "TASK.jsonl"),
    ]:
        assert analyze.main(["score", *arguments]) == status
        error = capsys.readouterr().err
        assert message in error and "Traceback" not in error


def test_a_checkpoint_is_scored_also_when_its_texts_are_gone(text_run, task_file, tmp_path):
    run, folder = text_run()
    before = score(run, folder, read_tasks([task_file()]))[1]
    (tmp_path / "a.txt").unlink()
    after = score(run, folder, read_tasks([task_file()]))[1]
    assert [one.record() for one in after] == [one.record() for one in before]
    for prepared in (tmp_path / "data").iterdir():
        shutil.rmtree(prepared) if prepared.is_dir() else prepared.unlink()
    with pytest.raises(UserError, match="no file matches"):
        score(run, folder, read_tasks([task_file()]))


def test_a_run_without_a_tokenizer_is_refused(tiny, task_file):
    run, folder = tiny()
    train(run, quiet=True)
    with pytest.raises(UserError, match="given as token ids; there is no tokenizer"):
        score(run, folder, read_tasks([task_file()]))


def test_log_likelihoods_that_are_no_numbers_are_refused(text_run, task_file, monkeypatch):
    run, folder = text_run()

    def broken(*arguments, **options):
        step, model, data = load_model(*arguments, **options)
        torch.nn.init.constant_(model.embedding.weight, float("nan"))
        return step, model, data

    monkeypatch.setattr(scoring, "load_model", broken)
    with pytest.raises(UserError, match="step 8 of .* not finite: has the run diverged"):
        score(run, folder, read_tasks([task_file()]))
