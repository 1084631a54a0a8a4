"""Rules give each run of a sweep values that follow from its size and length, and nothing but arithmetic."""

import dataclasses
import json
import math

import pytest

from scaling_testbed import sweep
from scaling_testbed.config.compose import compose_many
from scaling_testbed.config.run import run_id
from scaling_testbed.errors import ConfigError
from scaling_testbed.sweeps import rules
from scaling_testbed.sweeps.grid import load_sweep, narrowed
from scaling_testbed.sweeps.plan import plan, remember

LADDER = """
overrides: [data=markov, budget.tokens_per_param=20, batch.sequence_length=64, batch.sequences=4]
axes: {model: [nano_xs, nano_s]}
rules:
  optimizer.lr: 0.0047*(n_params/108e6)**(-1/3)
  schedule.warmup: max(1, round(n_params/batch_tokens))
scales:
  same: {}
  other: {rules: {optimizer.lr: 1e-3, schedule.warmup: null}}
"""


@pytest.fixture
def load(tmp_path):
    def load_text(text, scale=None):
        (tmp_path / "ladder.yaml").write_text(text)
        return load_sweep(str(tmp_path / "ladder.yaml"), scale)

    return load_text


def value(text, key="optimizer.lr", **names):
    """The value of an expression, as a run gets it, with every other name 1."""
    every = dict.fromkeys(rules.NAMES, 1.0) | names
    return rules._spelled(key, text, every, RUN)


@dataclasses.dataclass
class _Batch:
    sequences: int = 1


@dataclasses.dataclass
class _Run:
    batch: _Batch


RUN = _Run(_Batch())


@pytest.mark.parametrize(
    ("text", "names", "expected"),
    [
        ("0.0047*(n_params/108e6)**(-1/3)", {"n_params": 864e6}, "0.00235"),
        ("-(-2) + +3*min(n_tokens, 4, 9) - 6/steps", {"n_tokens": 5, "steps": 3}, "12"),
        ("sqrt(16) + log(1) + max(1, 2)", {}, "6"),
        ("1/3", {}, "0.333333"),
        ("20*n_params", {"n_params": 131584}, "2.63168e+06"),
        ("8*round(n_params/8)", {"n_params": 20}, "24"),  # halves upwards, where Python's round gives 16
    ],
)
def test_a_value_is_the_arithmetic_to_six_digits(text, names, expected):
    assert value(text, **names) == expected


def test_a_key_of_whole_numbers_gets_the_nearest_one():
    assert [value(text, "batch.sequences") for text in ("2.5", "7.49", "1234567.8", "0.1*3*5")] == [
        *("3", "7", "1234568", "2"),  # 0.1*3*5 is 1.5000000000000002, and 1.5 with another order
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("__import__('os').system('x')", "is no arithmetic"),
        ("n_params.real", "is no arithmetic"),
        ("[1][0]", "is no arithmetic"),
        ("True", "is no arithmetic"),
        ("1 if n_params else 2", "is no arithmetic"),
        ("n_params // 2", "is no arithmetic"),
        ("exec(1)", "there is no function exec; there are min, max, sqrt, log, round"),
        ("min", "there is no name min; there are n_params"),
        ("max(1)", "max takes two values or more"),
        ("n_parms", "there is no name n_parms; there are n_params"),
        ("1 +", "cannot read '1 +'"),
        ("(" * 400, "cannot read"),
        ("1+" * 400 + "1", "an expression of at most 500 characters"),
    ],
)
def test_what_is_no_arithmetic_is_refused_by_name(text, said):
    with pytest.raises(ConfigError, match=r"^rules.optimizer.lr") as refused:
        rules.checked({"optimizer.lr": text})
    assert said in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("text", ["1/(n_params-1)", "(0-2)**0.5", "9.0**9**9**9", "log(0)", "1e308*10"])
def test_a_rule_without_a_finite_value_is_refused_at_once(text):
    with pytest.raises(ConfigError, match=r"rules.optimizer.lr: .* has no finite value"):
        value(text)


def test_a_planned_run_has_the_values_of_its_rules_and_is_the_run_of_these_values(load):
    runs, _ = plan(load(LADDER))
    for run in runs:
        lr = 0.0047 * (run.n_params / 108e6) ** (-1 / 3)
        assert run.config["optimizer.lr"] == float(f"{lr:.6g}")
        assert run.config["schedule.warmup"] == math.floor(run.n_params / 256 + 0.5)
    typed = ["model=nano_s", "data=markov", "budget.tokens_per_param=20", "batch.sequence_length=64"]
    own = [f"{key}={runs[1].config[key]}" for key in ("optimizer.lr", "schedule.warmup")]
    (same,) = compose_many([[*typed, "batch.sequences=4", *own]])
    assert run_id(same) == runs[1].run_id


def test_rules_are_evaluated_in_the_order_in_which_they_need_each_other(load):
    """The warm-up is written first, and its steps are those of the batch that another rule gives."""
    sweep_ = narrowed(load(LADDER.replace(", batch.sequences=4", "")), ["rules.batch.sequences=2*round(n_tokens/5e4)"])
    for run in plan(sweep_)[0]:
        batch = 2 * math.floor(20 * run.n_params / 5e4 + 0.5)
        assert run.config["batch.sequences"] == batch
        assert run.config["schedule.warmup"] == math.floor(run.n_params / (64 * batch) + 0.5)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["rules.batch.sequences=steps"], "steps, which depends on batch.sequences itself"),
        (["rules.model.d_ff=64", "rules.model.d_model=n_params"], "n_params, which depends on model.d_model"),
        (
            ["budget.tokens_per_param=null", "budget.steps=9", "rules.batch.sequences=n_tokens"],
            "n_tokens, which depends on batch.sequences itself",
        ),
    ],
)
def test_rules_that_need_each_other_are_refused_by_name(load, words, said):
    with pytest.raises(ConfigError, match=r"rules.[\w.]+ needs ") as refused:
        plan(narrowed(load(LADDER.replace(", batch.sequences=4", "")), words))
    assert said in str(refused.value)


@pytest.mark.parametrize(
    ("change", "words", "said"),
    [
        (
            ("axes: {", "axes: {optimizer.lr: [1e-3], "),
            [],
            "optimizer.lr is given twice, by rules.optimizer.lr and by optim",
        ),
        (
            ("overrides: [", "overrides: [optimizer.lr=1, "),
            [],
            "given twice, by optimizer.lr=1 and by the values of rules",
        ),
        (("rules:", "rules:\n  seed: 1"), [], "seed is given twice, by seeds and by rules.seed"),
        (("rules:", "rules: 3\nx:"), [], "there is no key x"),
        (("", ""), ["optimizer.lr=1e-3"], "given twice, by optimizer.lr=1e-3"),
        (("", ""), ["rules.optimizer.lr"], "write rules.KEY=EXPRESSION"),
    ],
)
def test_a_rule_of_a_key_that_is_set_elsewhere_is_refused(load, change, words, said):
    with pytest.raises(ConfigError) as refused:
        narrowed(load(LADDER.replace(*change, 1)), words)
    assert said in str(refused.value)


def test_a_later_layer_and_a_typed_word_replace_a_rule_and_null_leaves_it_out(load):
    assert load(LADDER, "other").rules == {"optimizer.lr": "1e-3"}
    own = load(LADDER)
    assert narrowed(own, ["rules.optimizer.lr=2*3"]).rules["optimizer.lr"] == "2*3"
    left = narrowed(own, ["rules.optimizer.lr=null", "optimizer.lr=1e-3,2e-3"])
    assert "optimizer.lr" not in left.rules and left.axes["optimizer.lr"] == ["0.001", "0.002"]


def test_the_plan_shows_the_values_and_sweep_json_keeps_the_rules(load, tmp_path, capsys):
    own = load(LADDER)
    words = [f"sweep={tmp_path / 'ladder.yaml'}", f"runs_dir={tmp_path / 'runs'}"]
    assert sweep.main(["plan", "--all", *words]) == 0
    printed = capsys.readouterr().out
    runs, _ = plan(narrowed(own, words[1:]))
    assert "optimizer.lr = 0.0047*(n_params/108e6)**(-1/3)" in printed
    assert all(f"{run.config['optimizer.lr']:.6g}" in printed for run in runs)
    remember(runs, own)
    assert json.loads((tmp_path / "runs" / "ladder" / "sweep.json").read_text())["rules"] == own.rules
