"""A sweep file says which runs there are; what is typed after it narrows or changes them."""

import json
from pathlib import Path

import pytest

from scaling_testbed import sweep
from scaling_testbed.commands.sweep import asked
from scaling_testbed.errors import ConfigError
from scaling_testbed.sweeps.grid import load_sweep, narrowed
from scaling_testbed.sweeps.plan import plan

FILE = """
overrides: [budget.steps=5]
axes:
  optimizer.lr: [1e-3, 0.01]
  loss.z_loss: [0, null]
together:
  - {model: [nano_s, nano_m], batch.sequences: [8, 16]}
exclude:
  - {model: nano_m, optimizer.lr: [0.001]}
seeds: [0, 1]
"""


@pytest.fixture
def load(tmp_path):
    def load_text(text):
        (tmp_path / "grid.yaml").write_text(text)
        return load_sweep(str(tmp_path / "grid.yaml"))

    return load_text


def values(sweep, *keys):
    return list(dict.fromkeys(tuple(point[key] for key in keys) for point in sweep.points()))


def test_axes_cross_rows_move_together_and_exclusions_leave_out(load):
    points = load(FILE).points()
    assert len(points) == 2 * (2 * 2 * 2) - 1 * 2 * 2
    assert {(p["model"], p["batch.sequences"]) for p in points} == {("nano_s", "8"), ("nano_m", "16")}
    # Excluded by value, not by spelling.
    assert not [p for p in points if p["model"] == "nano_m" and p["optimizer.lr"] == "1e-3"]
    assert {p["seed"] for p in points} == {"0", "1"}
    assert {p["loss.z_loss"] for p in points} == {"0", "null"}


def test_a_typed_value_replaces_an_axis_and_a_typed_list_makes_one(load):
    sweep = load(FILE)
    assert values(narrowed(sweep, ["optimizer.lr=0.1"]), "optimizer.lr") == [("0.1",)]
    assert values(narrowed(sweep, ["optimizer.lr=0.1,0.2"]), "optimizer.lr") == [("0.1",), ("0.2",)]
    assert values(narrowed(sweep, ["loss.softcap=1,2"]), "loss.softcap") == [("1",), ("2",)]
    assert values(narrowed(sweep, ["seed=7,8,9"]), "seed") == [("7",), ("8",), ("9",)]
    assert narrowed(sweep, ["loss.impl=chunked"]).overrides == ["budget.steps=5", "loss.impl=chunked"]


def test_an_override_of_a_scale_is_the_value_of_rows_without_the_key(load):
    """It does not replace the values of the rows that have the key."""
    file = "{overrides: [model=nano_s], axes: {optimizer.lr: [1e-3]}}"
    rows = "together: [[{model.kappa: null, model: bigram}, {model.kappa: 1}]]"
    sweep = load(rows + "\nscales: {small: " + file + "}")
    assert [point.get("model") for point in sweep.points()] == ["bigram", None]
    assert sweep.overrides == ["model=nano_s"]
    picked = narrowed(sweep, ["model.kappa=1"])
    assert picked.points() == [{"optimizer.lr": "1e-3", "model.kappa": "1", "seed": "0"}]


def test_the_leading_key_picks_rows_and_the_others_can_be_set_for_all(load):
    sweep = load(FILE)
    assert values(narrowed(sweep, ["model=nano_m"]), "model", "batch.sequences") == [("nano_m", "16")]
    changed = narrowed(sweep, ["batch.sequences=4"])
    assert "batch.sequences" not in changed.points()[0] and "batch.sequences=4" in changed.overrides
    with pytest.raises(
        ConfigError, match="moves together with batch.sequences; it must be one of nano_s, nano_m, got x"
    ):
        narrowed(sweep, ["model=x"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("axis: {a: [1]}", "there is no key axis"),
        ("axes: {a: 1}", "axes.a must be a list"),
        ("description: [a]", "description must be a text; got ['a']"),
        ("paper: {a: 1}", "paper must be a text; got {'a': '1'}"),
        ("scales: {big: {experiment: [3]}}", "scales.big: experiment must be a text; got ['3']"),
        ("base: [a]", "base must be a text; got ['a']"),
        ("axes: [a]", "axes must be a mapping"),
        ("- a", "a sweep file is a mapping"),
        ("together: [{a: [1, 2], b: [1]}]", "a has 2, b has 1"),
        ("axes: {a: [1]}\ntogether: [{a: [1], b: [1]}]", "a is given twice"),
        ("axes: {a: [1]}\nexclude: [{b: 1}]", "exclude names b"),
        ("seeds: ['0,1']", "seeds.seed: 0,1 stands for several values"),
        ("axes: {a: [1]}\nexclude: [{a: [1, 2]}]", "exclude names a=2, which no run has; a has 1"),
        ("overrides: [a]", "key=value; got 'a'"),
        ("axes: {a: [1", "cannot be read as YAML"),
        ("together: [{}]", "together holds an entry without keys"),
        ("analysis: lr_sensitivty", "analysis must be one of lr_sensitivity, instability, decide"),
        ("axes: {a: [1]}\naxes: {b: [1]}", "axes is given twice"),
        ("axes: {a: [1], a: [2]}", "a is given twice"),
        ("scales: [a]", "scales must be a mapping"),
        ("scales: {big: {axis: {a: [1]}}}", "scales.big: there is no key axis"),
        ("scales: {big: {scales: {}}}", "scales.big: there is no key scales"),
        ("base: nothing", "there is no base 'nothing'; it is one of small_scale_proxies"),
        ("together: [[{a: 1, b: 2}, {b: 3}]]", "needs the leading key a; got {'b': '3'}"),
        ("together: [[]]", "or lists of rows; got []"),
    ],
)
def test_what_is_wrong_in_a_file_is_said_in_one_line_naming_it(load, text, message):
    with pytest.raises(ConfigError) as error:
        load(text)
    assert message in str(error.value) and "grid.yaml" in str(error.value) and "\n" not in str(error.value)


def test_a_typed_word_takes_a_key_away_as_in_a_run(load, tmp_path):
    load("overrides: [data=noise, budget.steps=1, +evaluation.sets.a=b]\nseeds: [0, 1]")
    found = [asked([f"sweep={tmp_path / 'grid.yaml'}", *words]) for words in ([], ["~evaluation.sets.a"])]
    sets = [[config for config in plan(one.sweep)[0][1].config if "sets" in config] for one in found]
    assert sets == [["evaluation.sets.a"], ["evaluation.sets"]]


def test_a_grid_that_nobody_could_plan_is_refused_at_once(load):
    sweep = narrowed(load("axes: {optimizer.lr: [1]}"), ["seed=range(1000)", "optimizer.lr=range(1,201)"])
    with pytest.raises(ConfigError, match="sweep grid has 200,000 combinations; a sweep has at most 100,000"):
        plan(sweep)


def test_a_word_that_no_process_can_be_given_is_refused(load):
    with pytest.raises(ConfigError, match="data.files has 200,011 bytes, .* name files by a folder or a glob"):
        plan(load(f"overrides: [data=text_files, data.files={'x' * 200_000}]"))


def test_an_unknown_sweep_is_answered_with_those_there_are():
    with pytest.raises(ConfigError, match="nano_lr"):
        load_sweep("nothing")


@pytest.mark.fault("A10", "A value of a sweep file is the one that is typed, not what YAML 1.1 reads.")
def test_a_value_is_what_is_typed(load, record_property):
    typed = ["null", "true", "off", "0.0010", "1e-3", "0100", "1:30", "1_0", "[1,null]"]
    sweep = load(f"axes: {{a: [{', '.join(typed)}]}}\nseeds: [010]")
    assert (sweep.axes["a"], sweep.seeds) == (typed, ["010"])
    merged = load("scales: {one: &one {seeds: [3], axes: {a: [1]}}, two: {<<: *one, seeds: [4]}}")
    assert merged.seeds == ["3"]
    record_property("seen", f"budget.steps: [0100] is {typed[5]} and not 64")


SCALED = """
description: Question.
overrides: [budget.steps=100, schedule.warmup=0.05, data=c4]
axes: {loss.z_loss: [0, 1e-4], optimizer.lr: [1e-3, 1e-2]}
together:
  - {batch.sequences: [8, 16], budget.tokens: [100, 200]}
exclude: [{loss.z_loss: 0, optimizer.lr: 1e-3}]
scales:
  large:
  small:
    description: Shortened.
    overrides: [budget.steps=5, data=markov]
    axes: {model: [nano_s], optimizer.lr: [1]}
    together: [{batch.sequences: [2], budget.tokens: [50]}]
    seeds: [0, 1]
"""


def load_scaled(tmp_path, scale=None, text=SCALED):
    (tmp_path / "grid.yaml").write_text(text)
    return load_sweep(str(tmp_path / "grid.yaml"), scale)


def test_the_first_scale_is_the_default_and_bears_the_sweeps_own_name(tmp_path):
    assert load_scaled(tmp_path) == load_scaled(tmp_path, "large")
    found = [(s.name, s.scale, s.folder) for s in map(lambda x: load_scaled(tmp_path, x), ("large", "small"))]
    assert found == [("grid", "large", "grid"), ("grid", "small", "grid_small")]
    plain = load_scaled(tmp_path, text="axes: {a: [1]}")
    assert (plain.name, plain.scale, plain.folder) == ("grid", None, "grid")


def test_a_scale_replaces_axes_rows_and_seeds_and_adds_overrides(tmp_path):
    large, small = load_scaled(tmp_path), load_scaled(tmp_path, "small")
    assert large.overrides == ["budget.steps=100", "schedule.warmup=0.05", "data=c4"] and len(large.points()) == 6
    assert small.overrides == ["schedule.warmup=0.05", "budget.steps=5", "data=markov"]
    assert list(small.axes.items()) == [("model", ["nano_s"]), ("loss.z_loss", ["0", "1e-4"]), ("optimizer.lr", ["1"])]
    assert small.together == [{"batch.sequences": ["2"], "budget.tokens": ["50"]}]
    assert small.seeds == ["0", "1"] and small.exclude == large.exclude
    assert (large.description, small.description) == ("Question.", "Question. Shortened.")


def test_a_wrong_scale_is_answered_with_those_there_are(tmp_path):
    with pytest.raises(ConfigError, match="grid.yaml: there is no scale 'medium'; it has large, small"):
        load_scaled(tmp_path, "medium")
    with pytest.raises(ConfigError, match="grid.yaml: there is no scale 'small'; it has none"):
        load_scaled(tmp_path, "small", "axes: {a: [1]}")


def test_a_file_wins_over_its_base_and_its_bases_scale(tmp_path):
    (tmp_path / "sweep" / "base").mkdir(parents=True)
    (tmp_path / "sweep" / "base" / "common.yaml").write_text("""
axes: {optimizer.lr: [1e-3, 1e-2]}
scales:
  large: {description: Long., overrides: [budget.steps=100], axes: {model: [proxy_2m, proxy_9m]}}
  small: {overrides: [budget.steps=5], axes: {model: [nano_s, nano_m]}}
""")
    text = """
base: common
configs: .
description: Question.
axes: {loss.z_loss: [0, 1]}
scales:
  small: {overrides: [optimizer.lr=1, budget.steps=7], axes: {model: [nano_l]}}
"""
    large, small = load_scaled(tmp_path, "large", text), load_scaled(tmp_path, "small", text)
    assert load_scaled(tmp_path, None, text) == large and large.description == "Question. Long."
    assert values(large, "model") == [("proxy_2m",), ("proxy_9m",)] and large.overrides == ["budget.steps=100"]
    assert values(large, "loss.z_loss") == [("0",), ("1",)] and len(large.points()) == 8
    # An override takes the place of a lower axis.
    assert small.overrides == ["optimizer.lr=1", "budget.steps=7"] and list(small.axes) == ["loss.z_loss", "model"]
    assert values(small, "model") == [("nano_l",)]


def test_rows_may_name_different_keys(load):
    sweep = load("""
axes: {optimizer.lr: [1, 2]}
together: [[{logging.group: plain}, {logging.group: peri, model.residual: peri}]]
exclude: [{model.residual: peri, optimizer.lr: 2}]
""")
    assert sweep.points() == [
        {"logging.group": "plain", "optimizer.lr": "1", "seed": "0"},
        {"logging.group": "plain", "optimizer.lr": "2", "seed": "0"},
        {"logging.group": "peri", "model.residual": "peri", "optimizer.lr": "1", "seed": "0"},
    ]
    assert len(narrowed(sweep, ["logging.group=peri"]).points()) == 1


def test_a_file_may_be_called_anything(tmp_path, capfd):
    path = tmp_path / 'Räster "eins".yaml'
    path.write_text("overrides: [data=markov, budget.steps=4]\naxes: {optimizer.lr: [1e-3, 1e-2]}\n")
    assert sweep.main(["plan", f"sweep={path}", f"runs_dir={tmp_path / 'runs'}", "--json"]) == 0
    folders = {Path(run["folder"]).parent for run in json.loads(capfd.readouterr().out)}
    assert folders == {tmp_path / "runs" / 'Räster "eins"'}
