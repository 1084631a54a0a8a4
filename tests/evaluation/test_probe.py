"""Probes find what is planted in features, and read the states and classes that they say."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from scaling_testbed import analyze
from scaling_testbed.data.tokenizers import load_tokenizer
from scaling_testbed.diagnostics.states import States, layers_of
from scaling_testbed.errors import ConfigError, UserError
from scaling_testbed.evaluation import probe as module
from scaling_testbed.evaluation.classifiers import balanced_accuracy, logistic, naive_bayes
from scaling_testbed.evaluation.loading import load_model
from scaling_testbed.evaluation.probe import Reader, probe
from tests.evaluation.test_scoring import text_run  # noqa: F401


def planted(n, rng, shared=0.0):
    """Three classes with means in three of six features. shared: noise that two features have in common."""
    class_N = np.arange(n) % 3
    x_ND = rng.normal(size=(n, 6))
    x_ND[np.arange(n), class_N] += 3.0
    noise_N = shared * rng.normal(size=n)
    x_ND[:, 0] += noise_N
    x_ND[:, 5] += noise_N
    return x_ND, class_N


def test_naive_bayes_is_the_largest_likelihood_of_gaussians_with_one_variance():
    rng = np.random.default_rng(0)
    (x_ND, class_N), (other_ND, _) = planted(60, rng), planted(30, rng)
    means = [x_ND[class_N == c].mean(0) for c in range(3)]
    within = np.concatenate([x_ND[class_N == c] - means[c] for c in range(3)])
    variance_D = (within**2).sum(0) / (60 - 3)
    exact = np.stack([-((other_ND - mean) ** 2 / (2 * variance_D)).sum(1) for mean in means], axis=1)
    scores = naive_bayes(x_ND, class_N, 3)(other_ND)
    shift = exact - scores  # what is the same for every class
    assert np.allclose(shift, shift[:, :1], atol=1e-9)
    x_ND[:, 4] = 7.0  # no variance
    assert np.isfinite(naive_bayes(x_ND, class_N, 3)(other_ND)).all()


def test_logistic_regression_uses_what_naive_bayes_cannot_and_its_gradient_is_zero(monkeypatch):
    rng = np.random.default_rng(0)
    (x_ND, class_N), (other_ND, other_N) = planted(900, rng, shared=6.0), planted(900, rng, shared=6.0)
    bayes = balanced_accuracy(naive_bayes(x_ND, class_N, 3)(other_ND), other_N)
    found = balanced_accuracy(logistic(x_ND, class_N, 3, rng)(other_ND), other_N)
    assert found > bayes + 0.02 and found > 0.95  # feature 5 cancels the noise of feature 0
    monkeypatch.setattr("scaling_testbed.evaluation.classifiers.PENALTIES", (0.3,))
    scores = logistic(x_ND, class_N, 3, rng)
    z_ND = (x_ND - x_ND.mean(0)) / x_ND.std(0)
    at = np.linalg.lstsq(np.c_[z_ND, np.ones(900)], scores(x_ND), rcond=None)[0]  # weights and biases
    p_NC = torch.from_numpy(scores(x_ND)).softmax(-1).numpy()
    gradient = z_ND.T @ (p_NC - np.eye(3)[class_N]) / 900 + 0.3 * at[:-1]
    assert np.abs(gradient).max() < 1e-4


def test_accuracy_is_the_mean_over_classes():
    scores = np.eye(3)[[0, 0, 0, 1, 1, 2]]
    assert balanced_accuracy(scores, np.array([0, 0, 0, 0, 1, 2])) == pytest.approx((0.75 + 1 + 1) / 3)


def test_states_are_those_of_the_model(text_run):  # noqa: F811
    run, folder = text_run()
    _, model, _ = load_model(run, folder, step=None, device=torch.device("cpu"))
    assert layers_of(2) == ["embedding", "0", "1", "final"]
    tokens = torch.arange(8)[None]
    with torch.no_grad(), States(model, layers_of(len(model.blocks))) as states:
        hidden = model(tokens)
    assert torch.equal(states.found["final"], hidden)
    assert torch.equal(states.found["embedding"], model.embedding(tokens))
    states.found.clear()
    model(tokens)
    assert not states.found  # the hooks are gone


def test_classes_and_states_are_of_the_same_positions(text_run):  # noqa: F811
    """The embedding of a token tells its own class surely; an even window gives labels."""
    run, folder = text_run()
    _, model, data = load_model(run, folder, step=None, device=torch.device("cpu"))
    read = Reader(run, model, data, ["embedding"], torch.device("cpu"), "fp32")
    for task, shift in (("next_class", 1), ("past_class:0", 0), ("past_class:2", -2)):
        states, labels, drawn = read._of_tokens(task, 320)
        stream = data.validation.read(0, data.validation.n_tokens).astype(np.int64)
        there, expected, ids, even = (len(stream) - 1) // 32, [], [], []
        n = min(10, there)
        for number in range(n):
            first = number * there // n * 32
            for t in range(max(0, -shift), 32):
                if stream[first + t + shift] != 256:
                    expected.append(module._kind(chr(stream[first + t + shift])))
                    ids.append(stream[first + t])
                    even.append(number % 2 == 0)
        assert labels.tolist() == expected and drawn.tolist() == even
        own = model.embedding(torch.tensor(ids)).detach().numpy()
        assert np.array_equal(states["embedding"], own)
    _, rows = probe(run, folder, ["past_class:0"], labels=[2], layers=["embedding"], tokens=640)
    assert rows[0]["logistic"] > 0.6 and rows[0]["classes"] == 2  # letters and spaces


def test_the_door_probes_texts_of_a_file_by_layer_and_labels(text_run, capsys, tmp_path):  # noqa: F811
    run, folder = text_run("budget.steps=30")
    file = tmp_path / "texts.jsonl"
    lines = [{"text": f"the {word} {n}", "label": word[-1]} for n in range(30) for word in ("cat", "dog")]
    file.write_text("".join(json.dumps(line) + "\n" for line in [*lines, {"text": "x", "label": "rare"}]))
    words = [str(folder), "--task", str(file), "--labels", "4,10,99", "--layer", "0,final"]
    assert analyze.main(["probe", *words, "--out", str(tmp_path / "p.csv")]) == 0
    said = capsys.readouterr().out
    assert "naive_bayes_se" in said and "too few labels: g has" in said and "balanced accuracy" in said
    assert analyze.main(["probe", *words, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["layer"], row["labels"]) for row in rows] == [(x, n) for x in ("0", "final") for n in (4, 10, 99)]
    assert all(row["classes"] == 2 and row["chance"] == 0.5 and row["step"] == 30 for row in rows)
    assert "naive_bayes" not in rows[2] and 0 <= rows[0]["logistic"] <= 1 and rows[0]["logistic_se"] is not None
    states, labels, _ = Reader(run, *load_model(run, folder, step=None, device=torch.device("cpu"))[1:],
                               ["final"], torch.device("cpu"), "fp32")._of_file(file)  # fmt: skip
    _, model, data = load_model(run, folder, step=None, device=torch.device("cpu"))
    first = int(np.random.default_rng(0).permutation(61)[0])
    text = [*lines, {"text": "x", "label": "rare"}][first]
    ids = [256, *load_tokenizer(data.folder).encode_batch([text["text"].encode()])[0]]
    assert labels[0] == text["label"]
    np.testing.assert_allclose(states["final"][0], model(torch.tensor([ids]))[0, -1].detach(), atol=1e-5)


def test_what_cannot_be_probed_is_named(text_run, tiny, tmp_path):  # noqa: F811
    run, folder = text_run("budget.steps=1")
    for task in ("previous", "past_class:", "past_class:-1", "texts.csv"):
        with pytest.raises(ConfigError, match="--task must be next_class, past_class:K"):
            probe(run, folder, [task], labels=[4])
    with pytest.raises(ConfigError, match="--layer must be all or of embedding, 0, .*; got '99'"):
        probe(run, folder, ["next_class"], labels=[4], layers=["99"])
    with pytest.raises(ConfigError, match="--labels must be whole numbers above one; got 1"):
        probe(run, folder, ["next_class"], labels=[4, 1])
    masked = dataclasses.replace(run, batch=dataclasses.replace(run.batch, document_masking=True))
    with pytest.raises(ConfigError, match="next_class: the run has batch.document_masking=true"):
        probe(masked, folder, ["next_class"], labels=[4])
    with pytest.raises(ConfigError, match="a window of training has 32 tokens"):
        probe(run, folder, ["past_class:32"], labels=[4])
    file = tmp_path / "bad.jsonl"
    file.write_text('{"text": "a", "label": "x"}\n{"text": "a"}\n')
    with pytest.raises(UserError, match=r"bad.jsonl:2: must be"):
        probe(run, folder, [str(file)], labels=[4])
    with pytest.raises(UserError, match="cannot read none.jsonl: No such file"):
        probe(run, folder, ["none.jsonl"], labels=[4])
