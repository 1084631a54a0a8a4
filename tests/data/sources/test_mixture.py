"""A mixture is prepared as its sources are, each in its own folder, and its own folder only names them."""

import os
import shutil

import numpy as np
import pytest

from scaling_testbed.config.compose import compose_many
from scaling_testbed.config.run import run_id
from scaling_testbed.data.preparing import inputs as files_of
from scaling_testbed.data.preparing.preparation import prepare
from scaling_testbed.data.shards import open_prepared
from scaling_testbed.data.summary import describe
from scaling_testbed.data.tokenizers import load_tokenizer
from scaling_testbed.errors import ConfigError, UserError
from scaling_testbed.files import sha256_of_input
from scaling_testbed.sweeps.plan import planned_train_tokens
from scaling_testbed.sweeps.unusual import unusual

NOISE = (
    "data.sources={a:{name:markov,n_tokens:3000,n_validation_tokens:900},b:{name:noise,vocab_size:32,n_tokens:2000}}"
)
TWO = "data.sources={a:{name:sympy},b:{name:noise}}"


def mixture(*words):
    (run,) = compose_many([["data=mixture", *words]])
    return run


@pytest.fixture
def made(tmp_path):
    """Returns a function from words to the opened data of a mixture."""

    def make(*words):
        run = mixture(*words)
        return open_prepared(prepare(run.data, run.tokenizer, data_dir=tmp_path / "data", quiet=True))

    return make


@pytest.fixture
def texts(tmp_path):
    """Writes texts for two sources; returns the word that names them."""

    def write(name, word):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(f'{{"text": "{word} number {i}"}}\n' for i in range(300)))
        return f"{name}:{{name:text_files,files:{path},validation_fraction:0.1}}"

    return f"data.sources={{{write('prose', 'word')},{write('code', 'symbol')}}}"


def test_a_mixture_has_the_tokens_of_its_sources_and_copies_none(made, tmp_path):
    data = made(NOISE)
    assert not list(data.folder.glob("*.bin"))
    sources = data.sources()
    assert list(sources) == ["a", "b"]
    for split, n_tokens in (("train", 5000), ("validation", 200_900)):
        parts = [getattr(source, split) for source in sources.values()]
        whole = np.concatenate([part.read(0, part.n_tokens) for part in parts])
        assert len(whole) == n_tokens and np.array_equal(getattr(data, split).read(0, n_tokens), whole)
    alone = [open_prepared(source.folder).fingerprint for source in sources.values()]
    assert alone == [source.fingerprint for source in sources.values()]
    assert "source b         2,000 tokens of train, 200,000 tokens of validation, noise-" in describe(data)
    (tmp_path / "data").rename(tmp_path / "moved")
    assert open_prepared(tmp_path / "moved" / data.folder.name).fingerprint == data.fingerprint


def test_weights_change_the_run_and_not_the_data_and_names_change_both(made):
    words = (
        [],
        ["data.weights={a:1,b:2}"],
        ["data.weight_changes=[{step:9,weights:{a:1,b:2}}]"],
        ["data.temperature=2"],
    )
    ids = [run_id(mixture(NOISE, *more)) for more in words]
    assert len(set(ids)) == 4
    assert len({made(NOISE, *more).fingerprint for more in words}) == 1
    renamed = NOISE.replace("a:{name:markov", "aa:{name:markov")  # the tokens stay in their order
    assert made(renamed).fingerprint != made(NOISE).fingerprint and run_id(mixture(renamed)) not in ids
    other_order = "data.sources={" + ",".join(reversed(NOISE[14:-1].replace("},b", "}|b").split("|"))) + "}"
    assert run_id(mixture(other_order)) == ids[0] and made(other_order).fingerprint == made(NOISE).fingerprint


def test_weights_by_size_follow_the_temperature():
    for temperature, expected in ((1, 4.0), (2, 2.0), (1e9, 1.0)):
        ((step, weights),) = mixture(NOISE, f"data.temperature={temperature}").data.weights_by_step(
            {"a": 400, "b": 100}
        )
        assert step == 0 and weights["a"] / weights["b"] == pytest.approx(expected)


def test_the_settings_of_a_source_are_those_of_its_choice():
    run = mixture("data.sources={web:{name:c4,max_tokens:1000}}")
    (plain,) = compose_many([["data=c4", "data.max_tokens=1000"]])
    assert run.data.parts() == {"web": plain.data}


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "data.sources must name a source"),
        (["data.sources={a:3}"], "data.sources.a must be {name: CHOICE, KEY: VALUE}"),
        (["data.sources={a:{name:sympi}}"], "data.sources.a: data has no choice 'sympi'; did you mean sympy?"),
        (["data.sources={a:{name:sympy,packges:[]}}"], "no key data.sources.a.packges; did you mean packages?"),
        (["data.sources={a:{name:noise,seed:x}}"], "data.sources.a.seed: value 'x'"),
        (["data.sources={a:{name:noise,seed:-1}}"], "data.sources.a.seed must be at least 0, got -1"),
        (["data.sources={a:{name:noise,skip_steps:[1,2]}}"], "data.sources.a.skip_steps cannot be"),
        (["data.sources={a:{name:mixture,sources:{b:{name:noise}}}}"], "data.sources.a"),
        (["data.sources={a.b:{name:noise}}"], "the name 'a.b' must have only letters"),
        (["data.sources={train:{name:noise}}"], "train is the name of a split"),
        ([TWO, "data.weights={a:1,c:1}"], "data.weights.c is no source; data.sources has a, b"),
        ([TWO, "data.weights={a:1}"], "data.weights has no b"),
        ([TWO, "data.weights={a:1,b:-1}"], "data.weights.b must be a number that is not negative, got -1"),
        ([TWO, "data.weights={a:0,b:0}"], "data.weights must have a positive weight"),
        ([TWO, "data.weights={a:1,b:inf}"], "data.weights.b must be a number"),
        ([TWO, "data.weights={a:1,b:1}", "data.temperature=2"], "data.temperature=2.0 cannot be with weights"),
        ([TWO, "data.temperature=0"], "data.temperature must be positive"),
        (
            [TWO, "data.weight_changes=[{step:0,weights:{a:1,b:1}}]"],
            "weight_changes[0].step must be a whole number above 0",
        ),
        ([TWO, "data.weight_changes=[{step:5,weight:{a:1,b:1}}]"], "weight_changes[0] must be {step: STEP, weights:"),
        ([TWO, "data.weight_changes=[{step:5,weights:{a:1}}]"], "weight_changes[0].weights has no b"),
    ],
)
def test_a_wrong_mixture_is_refused_by_name(words, says):
    with pytest.raises(ConfigError) as refused:
        mixture(*words)
    assert says in str(refused.value) and "\n" not in str(refused.value)


def test_sources_of_other_tokenizers_or_of_the_same_tokens_are_refused(made, texts):
    with pytest.raises(
        ConfigError, match=r"data\.sources\.b has another tokenizer than data\.sources\.a: its vocab_size"
    ):
        made(NOISE.replace("vocab_size:32", "vocab_size:33"))
    with pytest.raises(ConfigError, match=r"data\.sources\.a and data\.sources\.b are the same corpus"):
        made("data.sources={a:{name:noise,n_tokens:99},b:{name:noise,n_tokens:99}}")
    with pytest.raises(ConfigError, match="tokenizer=bpe is trained on each source by itself"):
        made(texts, "tokenizer=bpe")


def test_a_mixture_has_the_tokenizer_of_its_sources(made, texts, tmp_path):
    (bpe,) = compose_many([["data=text_files", f"data.files={tmp_path / 'code.jsonl'}", "tokenizer=bpe"]])
    trained = prepare(bpe.data, bpe.tokenizer, data_dir=tmp_path / "data", quiet=True)
    data = made(texts, "tokenizer=pretrained", f"tokenizer.path={trained / 'tokenizer.json'}")
    prose = data.sources()["prose"].validation
    assert load_tokenizer(data.folder).decode(prose.read(0, prose.n_tokens)).startswith("word number")
    assert data.tokenizer_fingerprint == data.sources()["code"].tokenizer_fingerprint is not None


def test_files_of_the_sources_decide_the_data_and_are_hashed_once(made, texts, tmp_path, monkeypatch):
    hashed = []
    monkeypatch.setattr(files_of, "sha256_of_input", lambda path: hashed.append(path) or sha256_of_input(path))
    data = made(texts)
    assert sorted(hashed) == [str(tmp_path / "code.jsonl"), str(tmp_path / "prose.jsonl")]
    assert data.manifest["inputs"]["files"] == 2 and data.validation.n_bytes == sum(
        source.validation.n_bytes for source in data.sources().values()
    )
    os.utime(tmp_path / "code.jsonl", (1, 1))
    assert made(texts).folder == data.folder  # the same bytes
    with open(tmp_path / "code.jsonl", "a") as file:
        file.write('{"text": "one more"}\n')
    assert made(texts).folder != data.folder


def test_a_source_whose_folder_is_gone_or_changed_is_named(made, texts, tmp_path):
    data = made(texts)
    code = data.sources()["code"].folder
    shard = code / "train-00000.bin"
    shard.write_bytes(shard.read_bytes()[:-2] + b"\1\1")
    with pytest.raises(UserError, match=f"{code.name}/train-00000.bin: sha256 differs"):
        made(texts)
    shutil.rmtree(code)
    assert made(texts).fingerprint == data.fingerprint  # prepared again
    os.utime(tmp_path / "code.jsonl", (1, 1))
    shutil.rmtree(code)
    with pytest.raises(UserError, match=f"the folder {code.name} of its source code is gone; delete {data.folder}"):
        made(texts)


def test_a_plan_warns_of_the_epochs_of_each_source(made, tmp_path):
    made(NOISE)
    words = [NOISE, "data.weights={a:1,b:4}", f"data_dir={tmp_path / 'data'}", "batch.sequences=8"]
    run = mixture(*words, "batch.sequence_length=16", "budget.steps=100")
    assert planned_train_tokens(run) == {"a": 3000, "b": 2000}
    model = run.model.resolved(32)
    counts = type("Counts", (), {"n_params": 1, "n_params_non_embedding": 1})
    found = {k: v for k, v in unusual(run, model, counts, 100, planned_train_tokens(run)).items() if "epochs" in k}
    assert list(found) == ["epochs b"] and "train split of data.sources.b 5.1 times" in found["epochs b"]


def test_a_plan_says_that_epochs_are_those_of_the_first_weights_and_where_no_others_come(made):
    words = [NOISE, "data.weights={a:1,b:4}", "batch.sequences=8", "batch.sequence_length=16"]
    counts = type("Counts", (), {"n_params": 1, "n_params_non_embedding": 1})
    for every, said in ((99, False), (100, True)):
        run = mixture(*words, f"data.online.every_steps={every}")
        found = unusual(run, run.model.resolved(32), counts, 100, {"a": 3000, "b": 2000})
        assert found["epochs b"].startswith("with its first weights the run reads")
        assert ("no change of weights" in found) == said
