"""One word of Hydra's grammar: what it means, how a text becomes one, and what is refused."""

import random

import pytest

from scaling_testbed import api
from scaling_testbed.config.compose import compose
from scaling_testbed.config.words import (
    MOST_VALUES,
    in_quotes,
    key_of,
    override_values,
    paths_of,
    quoted,
    read,
    resolver_in,
    same_value,
    slot_of,
)
from scaling_testbed.errors import ConfigError

pytestmark = pytest.mark.usefixtures("hydra_composes_all_words")


def test_a_text_in_quotes_is_read_back_whatever_it_is():
    letters = random.Random(0)
    texts = ["".join(letters.choices("\\'\"a{$,b =:}[\n1", k=letters.randrange(9))) for _ in range(300)]
    for text in [*texts, "null", "1e-3", "1_000", "true", "007", "a\\b", "\\"]:
        assert read(f"key={quoted(text)}").value() == text == read(f"key={in_quotes(text)}").value()


@pytest.mark.parametrize(
    ("text", "resolver"),
    [
        ("${oc.env:X}", "oc.env"),
        ("${ oc.env : X }", "oc.env"),
        ("a${b}${oc.decode:1}", "oc.decode"),
        ("${a.${oc.env:X}}", "oc.env"),
        ("${${a}:X}", "${a}"),
        (r"\\${now:%Y}", "now"),
        (r"\${oc.env:X}", None),
        ("${a.b}", None),
        ("$a:b", None),
        ("${oc.env:X", None),
    ],
)
def test_a_resolver_is_found_wherever_it_stands(text, resolver):
    assert resolver_in(text) == resolver


def test_a_word_has_a_key_without_signs_and_values_as_typed():
    assert [key_of(word) for word in ("a.b=1", "+a.b=1", "++a.b=1", "~a.b", "~a.b=1")] == ["a.b"] * 5
    assert override_values("++optimizer.lr=1e-3, '2'") == ("optimizer.lr", ["0.001", "'2'"])
    assert override_values("a= x y ") == ("a", [" x y "])
    assert override_values("a=range(1,4)")[1] == ["1", "2", "3"] and override_values("a=sort(2,1)")[1] == ["1", "2"]
    assert override_values("model=glob([nano_x*],exclude=*l)") == ("model", ["nano_xs"])
    assert len(override_values(f"a=range({MOST_VALUES})")[1]) == MOST_VALUES
    for endless in ("inf", "nan", "1e9", f"{MOST_VALUES + 1}", "0,1,0", "5,1", "-inf,1"):
        with pytest.raises(ConfigError, match="stands for no value, or for more than 10,000"):
            override_values(f"a=range({endless})")


def test_a_word_sets_paths_and_a_mapping_does_not_replace_a_choice():
    assert paths_of("optimizer={lr: 1, lr_multipliers: {head: 2}}") == {"optimizer.lr", "optimizer.lr_multipliers.head"}
    assert paths_of("++a.b=1") == {"a.b"} and paths_of("a={}") == {"a"}
    assert slot_of("optimizer=sgd") == ("optimizer", False) != slot_of("optimizer={lr: 1}")
    assert slot_of("optimizer={lr: 1},{lr: 2}") == ("optimizer", True)


def test_spellings_of_one_value_are_the_same():
    for a, b in (("1e-3", "0.001"), ("true", "True"), ("x", "'x'"), ("null", "NULL"), ("[1, 2]", "[1.0,2]")):
        assert same_value(a, b)
    for a, b in (("1", "2"), ("true", "1"), ("null", "'null'"), ("[1]", "1"), ("a,b", "a")):
        assert not same_value(a, b)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (None, "overrides are a list of texts"),
        (7, "overrides are a list of texts"),
        ({"optimizer.lr": 1}, "overrides are a list of texts"),
        ([1], "an override is a text key=value; got 1"),
        ([["seed=1"]], "an override is a text key=value"),
        (["hydra.run.dir=x"], "hydra.run.dir is a key of Hydra and not of a run"),
        (["model=true"], "model=true: model takes the name of a choice"),
        (["experiment=null"], "experiment=null: a group cannot be null"),
        (["++model=nano_s"], "type model=nano_s, without a plus"),
        (["+model=nano_s"], "type model=NAME, without a plus"),
        (["+optimizer.lr=1"], "optimizer.lr exists already; type it without the plus"),
        (["~optimizer.lr"], "optimizer.lr cannot be taken away with ~; type optimizer.lr=VALUE"),
        (["~optimizer.lr_multipliers.head"], "there is no optimizer.lr_multipliers.head to take away"),
        (["~nonsense"], "there is no nonsense to take away"),
        (["~budget"], "a run needs budget: leave out ~budget"),
        (["overrides=[a]"], "overrides is the record of what was typed"),
        (["sweep=nano_lr"], "`sweep run sweep=NAME`"),
        (["name=${nope}"], "name=${nope}: interpolation key 'nope' not found"),
        (["optimizer.lr=${optimizer.eps}", "optimizer.eps=${optimizer.lr}"], "recursive interpolation"),
        (["model=${name}"], "model takes the name of a choice and no reference"),
        (["seed='???'"], "seed='???': seed has no value; type seed=VALUE"),
        (["model.d_model=???"], "model.d_model has no value; type model.d_model=VALUE"),
        (["name=1_0"], """name=1_0 is read as 10; for the text, type name="'1_0'\""""),
        (["tokenizer=pretrained", "tokenizer.revision=12e3456"], "is read as inf; for the text, type tokenizer.revi"),
        (["runs_dir=true"], "runs_dir=true is read as True"),
        (["+evaluation.sets.a=1e3"], "is read as 1000.0; for the text, type +evaluation.sets.a="),
        (["seed=tag(a,1,2)"], "tag() is not for a run: nothing reads a tag"),
        (["name=foo(1)"], "Unknown function 'foo'"),
        (["runs_dir="], "runs_dir must name a folder"),
        (["data_dir=' '"], "data_dir must name a folder"),
        (["name='a\nb'"], "name must be a plain folder name"),
        ([f"name={'a' * 300}"], "name must have at most 255 bytes"),
        (["model.n_layers=9223372036854775807"], "model.n_layers must lie between 0 and 100,000"),
        (["batch.sequences=9223372036854775807"], "batch.sequences must be at most"),
        (["+interventions={a: {1: 2}}"], "interventions.a has the key 1"),
    ],
)
def test_what_a_run_cannot_take_is_refused_in_one_line(overrides, said):
    with pytest.raises(ConfigError) as caught:
        compose(overrides)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_the_python_api_says_what_it_takes():
    for wrong in (None, 7, [None], {"seed": 1}):
        with pytest.raises(ConfigError, match="give texts such as KEY=VALUE|cannot read the override 'seed'"):
            api.compose(wrong)
    assert api.compose("seed=3").seed == 3
