"""Exposure against a loop over tokens, and against what is known of ranks."""

import json
import math

import numpy as np
import pytest
import torch

from scaling_testbed import analyze
from scaling_testbed.data.sources.canaries import CanariesConfig
from scaling_testbed.evaluation.exposure import Exposed, exposures, summaries
from scaling_testbed.evaluation.loading import load_model

STRINGS = "{name: canaries, number: 6, repeats: [0, 300], prompt_bytes: 6, secret_letters: 3}"


@pytest.fixture(scope="module")
def knowing(tmp_path_factory):
    """A run that saw three of six strings often enough to know them, and (RunConfig, run folder)."""
    from scaling_testbed.config.compose import compose_many
    from scaling_testbed.config.run import run_folder_path
    from scaling_testbed.training.run import train

    folder = tmp_path_factory.mktemp("knowing")
    (folder / "a.txt").write_text("the cat sat on the mat\n" * 300)
    words = [
        *("data=mixture", f"data.sources={{text: {{name: text_files, files: {folder}/a.txt, cut_bytes: 1024, "
          f"validation_fraction: 0.3}}, known: {STRINGS}}}"),
        *("data.weights={text: 1, known: 7}", "batch.packing=documents", "batch.sequence_length=12"),
        *("model=nano_s", "batch.sequences=16", "budget.steps=60", "optimizer.lr=1e-2", "schedule.warmup=5"),
        *(f"data_dir={folder / 'data'}", f"runs_dir={folder / 'runs'}", "compute.threads=1"),
    ]  # fmt: skip
    (run,) = compose_many([words])
    train(run, quiet=True)
    return run, run_folder_path(run)


def loss_by_hand(model, prompt, secret):
    ids = torch.tensor([256, *prompt.encode(), *secret.encode()])  # EOS, and bytes
    with torch.no_grad():
        log_p_TV = model.logits(ids[None, :-1])[0].double().log_softmax(-1)
    return -log_p_TV.gather(1, ids[1:, None])[-len(secret) :, 0].mean().item()


def test_a_loss_is_that_of_the_secret_alone_and_the_rank_counts_the_others_below_it(knowing):
    run, folder = knowing
    step, found = exposures(run, folder, 40)
    _, model, _ = load_model(run, folder, step=None, device=torch.device("cpu"))
    canaries = CanariesConfig(number=6, repeats=[0, 300], prompt_bytes=6, secret_letters=3).canaries(40)
    assert step == 60 and [one.number for one in found] == list(range(6))
    for one, canary in zip(found, canaries, strict=True):
        own, *others = (loss_by_hand(model, canary.prompt, text) for text in (canary.secret, *canary.others))
        assert one.loss == pytest.approx(own, abs=2e-5)  # of fp32
        assert one.rank == 1 + sum(other <= own for other in others)
        assert one.exposure == pytest.approx(math.log2(41 / one.rank)) and one.others == 40 and not one.exact


def test_strings_that_were_planted_have_the_largest_exposure_and_others_a_small_one(knowing):
    never, often = summaries(exposures(*knowing, 200)[1])
    assert (never["repeats"], often["repeats"], never["strings"], often["strings"]) == (0, 300, 3, 3)
    assert often["exposure"] == pytest.approx(math.log2(201)) and often["at_most"] == 1 and often["loss"] < 1
    assert never["exposure"] < 6 and never["loss"] > 2


def test_the_exposure_of_a_random_place_is_1_44_in_the_mean():
    """As the page of the definition says: the mean of -log2 of a uniform number."""
    assert np.mean([math.log2(2000 / rank) for rank in range(1, 2001)]) == pytest.approx(1 / math.log(2), abs=0.01)


def test_summaries_are_means_by_source_and_repeats():
    def exposed(source, repeats, loss, rank):
        return Exposed(source, 0, repeats, "p", loss, 3, 7, rank, math.log2(8 / rank), False)

    found = [exposed("b", 4, 1.0, 1), exposed("b", 4, 3.0, 2), exposed("a", 1, 2.0, 8)]
    one, two = summaries(found)
    assert (one["source"], one["exposure"], one["loss_se"], one["at_most"]) == ("a", 0.0, None, 0.0)
    assert (two["loss"], two["loss_se"], two["exposure"], two["at_most"]) == (2.0, pytest.approx(1.0), 2.5, 0.5)


def test_the_door_shows_each_group_and_keeps_each_string(knowing, tmp_path, capsys):
    _, folder = knowing
    assert analyze.main(["exposure", str(folder), "--others", "20", "--out", str(tmp_path / "x.jsonl")]) == 0
    said = capsys.readouterr().out
    assert "repeats" in said and "exposure_se" in said and "1.44 in the mean" in said
    assert len((tmp_path / "x.jsonl").read_text().splitlines()) == 6
    assert analyze.main(["exposure", str(folder.parent), "--others", "20", "--json"]) == 0
    assert [row["repeats"] for row in json.loads(capsys.readouterr().out)] == [0, 300]


def test_what_has_no_exposure_is_said_in_one_line(knowing, tmp_path, capsys, monkeypatch):
    run, folder = knowing
    assert analyze.main(["exposure", str(folder), "--others", "0"]) == 2
    assert "--others must be greater than zero; got 0" in capsys.readouterr().err
    real = CanariesConfig.canaries
    monkeypatch.setattr(CanariesConfig, "canaries", lambda self, others: real(self, others)[::-1])
    assert analyze.main(["exposure", str(folder)]) == 1
    assert "the strings that known plants now are not those that were prepared" in capsys.readouterr().err
    monkeypatch.setattr(CanariesConfig, "canaries", lambda self, others: [])
    assert analyze.main(["exposure", str(folder)]) == 2
    assert "its data plant no strings; train with data=canaries" in capsys.readouterr().err
