"""A sweep file says which runs there are; what is typed after it narrows or changes them."""

import pytest

from scaling_testbed.errors import ConfigError
from scaling_testbed.sweeps.grid import load_sweep, narrowed, spelled

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


def test_the_leading_key_picks_rows_and_the_others_can_be_set_for_all(load):
    sweep = load(FILE)
    assert values(narrowed(sweep, ["model=nano_m"]), "model", "batch.sequences") == [("nano_m", "16")]
    changed = narrowed(sweep, ["batch.sequences=4"])
    assert "batch.sequences" not in changed.points()[0] and "batch.sequences=4" in changed.overrides
    with pytest.raises(ConfigError, match=r"moves together with batch.sequences; it is one of nano_s, nano_m, got x"):
        narrowed(sweep, ["model=x"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("axis: {a: [1]}", "there is no key axis"),
        ("axes: {a: 1}", "axes.a must be a list"),
        ("axes: [a]", "axes must be a mapping"),
        ("- a", "a sweep file is a mapping"),
        ("together: [{a: [1, 2], b: [1]}]", "a has 2, b has 1"),
        ("axes: {a: [1]}\ntogether: [{a: [1], b: [1]}]", "a is given twice"),
        ("axes: {a: [1]}\nexclude: [{b: 1}]", "exclude names b"),
        ("overrides: [a]", "key=value; got 'a'"),
        ("axes: {a: [1", "cannot be read as YAML"),
    ],
)
def test_what_is_wrong_in_a_file_is_said_in_one_line_naming_it(load, text, message):
    with pytest.raises(ConfigError) as error:
        load(text)
    assert message in str(error.value) and "grid.yaml" in str(error.value) and "\n" not in str(error.value)


def test_an_unknown_sweep_is_answered_with_those_there_are():
    with pytest.raises(ConfigError, match="nano_lr"):
        load_sweep("nothing")


def test_yaml_values_are_spelled_as_typed():
    assert [spelled(v) for v in (None, True, 0.001, "1e-3", [1, None], {"a": False})] == [
        *("null", "true", "0.001", "1e-3", "[1,null]", "{a:false}")
    ]
