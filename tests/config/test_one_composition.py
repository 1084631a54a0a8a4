"""One law for words in Hydra's grammar: every way to compose them gives the same run, or all of them refuse it.

The ways are `compose`, `compose_many`, the plan of a sweep, and the words that a worker or a task of Slurm receives.
Hypothesis makes the words. `make test` tries some of them, always the same, and `-m slow` tries many."""

import contextlib
import itertools
import shlex

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from scaling_testbed.config.compose import compose, compose_many
from scaling_testbed.config.run import run_id
from scaling_testbed.config.words import key_of, override_values
from scaling_testbed.errors import ConfigError
from scaling_testbed.sweeps.grid import load_sweep, narrowed
from scaling_testbed.sweeps.plan import plan

pytestmark = pytest.mark.usefixtures("hydra_composes_all_words")

RATES = ["1e-3", "0.001", "3e-3", "5.0e-03", "'1e-3'", '"2e-3"', " 4e-3", "float(1)", "${optimizer.beta1}", "null", "x"]
GROUPS = [
    "model=bigram",
    "model=nano_xs",
    "model=[nano_xs,nano_s]",
    "optimizer=adamw",
    "optimizer=muon",
    "optimizer=sgd",
]
GROUPS += ["schedule=wsd", "experiment=over_training_cpu", "~experiment", "data=noise", "data=markov", "model=no_such"]
VALUES = [f"{sign}optimizer.lr={rate}" for sign in ("", "++", "+") for rate in RATES]
VALUES += [
    "seed=3",
    "++seed=4",
    "seed=0x1",
    "budget.steps=5",
    "budget={steps: 7}",
    "budget.steps=null",
    "budget.steps=7.5",
]
VALUES += ["optimizer={lr: 2e-2}", "++optimizer={lr: 3e-2, beta2: 0.9}", "optimizer={}", "model={d_model: 32}"]
VALUES += [
    "optimizer.weight_decay=${optimizer.lr}",
    "name=a b",
    "name='${model.name}'",
    "runs_dir=/x",
    "data_dir='a b'",
]
VALUES += [
    "+optimizer.lr_multipliers.embedding=2",
    "++optimizer.lr_multipliers.embedding=3",
    "optimizer.lr_multipliers={}",
]
VALUES += [
    "~optimizer.lr_multipliers.embedding",
    "+evaluation.sets.a=b",
    "~evaluation.sets.a",
    "evaluation.sets={c: d}",
]
VALUES += ["checkpoint.keep_steps=[1,2]", "checkpoint.keep_steps=[]", "checkpoint.at_end=False", "checkpoint.at_end=no"]
VALUES += ["loss.z_loss=0", "loss.z_loss=0.0", "model.n_layers=2", "model.n_layers=int(2)", "model.qk_norm=none"]
REFUSED = ["~schedule", "~budget", "~optimizer.lr", "optimizer.lr=1,2", "nonsense=1", "+nonsense=1", "=1", "hydra.x=1"]
REFUSED += ["name=${oc.env:HOME}", r"name=\${oc.env:HOME}", "model=1", "++model=bigram", "model@a=bigram", "name='a\\"]
SWEPT = ["optimizer.lr=1e-3,3e-3", "++optimizer.lr=2e-3,4e-3", "seed=1,2", "seed=range(3)", "model=glob(nano_x*)"]
SWEPT += [
    "model=bigram,nano_xs",
    "optimizer.beta2=0.9,0.95",
    "++optimizer.beta2=0.9,0.95",
    "loss.z_loss=choice(0,1e-4)",
]
SWEPT += [
    "optimizer={beta2: 0.9},{beta2: 0.8}",
    "+evaluation.sets.a=b,c",
    "budget.steps=sort(9,3)",
    "optimizer.lr=shuffle(1,2)",
]

RATE = [word for word in VALUES if "optimizer.lr=" in word or "optimizer={" in word or "eight_decay=$" in word]
anything = st.lists(st.sampled_from(GROUPS * 2 + VALUES * 2 + REFUSED), max_size=6)
one_key = st.lists(st.sampled_from([*RATE, *GROUPS[3:6]]), min_size=2, max_size=4)  # order matters most here
one_run = st.one_of(one_key, anything)
of_sweep = st.lists(st.sampled_from(SWEPT * 3 + GROUPS + VALUES + REFUSED), min_size=1, max_size=4)
few = settings(max_examples=4, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
many = settings(few, max_examples=1500, derandomize=False)


def outcome(way, words):
    """The run_id, name and record of what `way` composes; None where it refuses in one or two lines."""
    try:
        run = way(words)
    except ConfigError as error:
        assert 1 <= len(str(error).splitlines()) <= 2, error
        return None
    return run_id(run), run.name, run.overrides


def first_of_many(words):
    """The run by compose_many, beside others that it composes from the same base."""
    others = [[*words, "seed=11"], words, ["optimizer.lr=0.5", *words]]
    with contextlib.suppress(ConfigError):
        compose_many(others)
    return compose_many([words])[0]


def beside_others(words):
    """The run by compose_many, as the last of several."""
    *_, run = compose_many([["seed=1"], words[:1], words[:-1], words] if composable(words) else [words])
    return run


def composable(words):
    return all(outcome(compose, part) is not None for part in (words[:1], words[:-1]))


def law_of_one_run(words):
    expected = outcome(compose, words)
    assert outcome(first_of_many, words) == expected
    assert outcome(beside_others, words) == expected
    if expected is not None:  # through the shell of a task, and again as the record of the run says
        assert outcome(compose, shlex.split(shlex.join(words))) == expected
        assert outcome(compose, expected[2]) == expected


@given(one_run)
@example(["optimizer.lr=0.003", "++optimizer.lr=5e-3"])
@example(["++optimizer={lr: 3e-2}", "optimizer.lr=0.003", "++optimizer.lr=5e-3", "optimizer=sgd"])
@few
def test_a_run_is_the_same_however_it_is_composed(words):
    law_of_one_run(words)


@pytest.mark.slow
@given(one_run)
@many
def test_many_runs_are_the_same_however_they_are_composed(words):
    law_of_one_run(words)


FILE = """
overrides: [data=noise, data.n_tokens=4096, budget.steps=5, optimizer.beta2=0.99, +optimizer.lr_multipliers.head=2]
axes: {optimizer.lr: [1e-3, 1e-2], model: [bigram, nano_s]}
"""
FIXED = [
    "data=noise",
    "data.n_tokens=4096",
    "budget.steps=5",
    "optimizer.beta2=0.99",
    "+optimizer.lr_multipliers.head=2",
]
AXES = {"optimizer.lr": ["1e-3", "1e-2"], "model": ["bigram", "nano_s"]}


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    path = tmp_path_factory.mktemp("sweep") / "grid.yaml"
    path.write_text(FILE)
    return load_sweep(str(path))


def by_definition(typed):
    """The runs of FILE with the typed words behind its own, the last one of each key: Hydra alone decides the rest."""
    columns = {key: [f"{key}={value}" for value in values] for key, values in AXES.items()}
    behind = []
    for text in typed:
        key, values = override_values(text)
        sign = text[: len(text) - len(text.lstrip("+~"))]
        if "{" not in text:  # a mapping is merged into what is there, and replaces nothing
            columns.pop(key, None)
            behind = [[one for one in column if key_of(one) != key or "{" in one] for column in behind]
        behind.append([f"{sign}{key}={value}" if "=" in text else text for value in values])
    found = set()
    for point in itertools.product(*columns.values(), *filter(None, behind)):
        found.add(run_id(compose([*FIXED, *point])))
    return found


def law_of_a_sweep(sweep, typed):
    try:
        runs, _ = plan(narrowed(sweep, typed))
    except ConfigError as error:
        assert 1 <= len(str(error).splitlines()) <= 2, error
        return
    assert {run.run_id for run in runs} == by_definition(typed)
    for run in runs:
        received = shlex.split(shlex.join(run.overrides))  # by the worker, and by a task of Slurm
        assert run_id(compose(received)) == run.run_id


@given(of_sweep)
@example(["++optimizer.lr=2e-3,4e-3"])
@example(["model={d_model: 32}"])
@example(["optimizer={beta2: 0.9}", "++optimizer.beta2=0.9,0.95"])
@settings(few, max_examples=3)
def test_a_plan_is_what_its_workers_compose_and_drops_no_typed_word(sweep, typed):
    law_of_a_sweep(sweep, typed)


@pytest.mark.slow
@given(of_sweep)
@settings(many, max_examples=400)
def test_many_plans_are_what_their_workers_compose_and_drop_no_typed_word(sweep, typed):
    law_of_a_sweep(sweep, typed)
