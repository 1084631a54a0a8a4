"""pass@N on the answers of the run's own data, against a loop over answers."""

import json

import numpy as np
import pytest
import torch

from scaling_testbed import analyze
from scaling_testbed.config.compose import compose_many, recorded_run
from scaling_testbed.config.run import run_folder_path
from scaling_testbed.data.shards import PreparedData, TokenStream
from scaling_testbed.evaluation import answers as module
from scaling_testbed.evaluation.answers import answers_of
from scaling_testbed.evaluation.loading import load_model
from scaling_testbed.training.run import train
from tests.training.conftest import TINY

SUMS = ("data=arithmetic", "data.n_problems=100", "data.n_validation_problems=40", "batch.sequence_length=9")


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    place = tmp_path_factory.mktemp("sums")

    def run_it(*overrides):
        (run,) = compose_many([[*TINY[3:], f"runs_dir={place}", f"data_dir={place / 'data'}", *overrides]])
        train(run, quiet=True)
        return run_folder_path(run)

    return run_it


def test_pass_at_of_arithmetic_is_that_of_a_loop_over_problems(taught, capsys, tmp_path):
    folder, kept = taught(*SUMS), tmp_path / "p.jsonl"
    assert analyze.main(["pass_at", str(folder), "--samples", "1,16", "--out", str(kept)]) == 0
    assert "pass@16_se" in capsys.readouterr().out
    records = [json.loads(line) for line in kept.read_text().splitlines()]
    assert [one["line"] for one in records] == list(range(1, 41)) and {one["n_tokens"] for one in records} == {3}
    _, model, data = load_model(recorded_run(folder), folder, step=None, device=torch.device("cpu"))
    for one in records[:5]:
        tokens = torch.from_numpy(data.validation.read(9 * (one["line"] - 1), 9).astype(np.int64))
        with torch.no_grad():
            log_p = model.logits(tokens[None])[0].log_softmax(-1)
        assert one["log_p"] == pytest.approx(sum(log_p[t, tokens[t + 1]].item() for t in (5, 6, 7)), abs=1e-4)


def test_answers_of_texts_begin_at_the_eos_before_their_document(taught, tmp_path, monkeypatch):
    pairs = [{"q": f"what is {n}? ", "text": f"it is {n}"} for n in range(60)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    words = ("data=text_files", f"data.files={tmp_path}/a.jsonl", "data.prompt_field=q", "data.validation_fraction=.2")
    folder = taught(*words, "batch.sequence_length=32", "batch.sequences=4")
    _, _, data = load_model(recorded_run(folder), folder, step=None, device=torch.device("cpu"))
    found = answers_of(data, 32, 32)
    assert len(found) == data.manifest["splits"]["validation"]["n_documents"]
    for _, one in found:
        text = bytes(one.ids[1:-1].astype(np.uint8)).decode()
        number = text.rpartition(" ")[2]
        assert text == f"what is {number}? it is {number}" and one.ids[0] == one.ids[-1] == 256
        assert one.n_scored == len(f"it is {number}") + 1 and not one.truncated
    short = answers_of(data, 32, 12)
    assert all(one.truncated and len(one.ids) == 13 for _, one in short)
    monkeypatch.setattr(module, "MOST", 4)
    assert [place for place, _ in answers_of(data, 32, 32)] == [1 + n * len(found) // 4 for n in range(4)]


def test_answers_that_a_window_cuts_are_left_out(tmp_path):
    tokens = np.arange(1, 32)
    counted = np.isin(tokens, [1, 2, 5, 6, 10, 11, 12, 15, 20, 21])
    stream = TokenStream("v", [tokens], masks=[counted])
    found = [one.ids.tolist() for _, one in answers_of(PreparedData(tmp_path, {}, stream, stream), 10, 10)]
    assert found == [[1, 2, 3, 4, 5, 6], [11, 12, 13, 14, 15]]  # 2, 11 and 21 are cut on the left or the right


def test_data_without_answers_are_refused_by_name(whole, capsys):
    _, folder = whole()
    assert analyze.main(["pass_at", str(folder)]) == 1
    assert "has no answers: each of its tokens is a target of the loss; name a file of a" in capsys.readouterr().err
