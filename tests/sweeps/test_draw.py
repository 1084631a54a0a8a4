"""Drawn keys: every machine draws the same, more samples keep the earlier ones, and no verdict is about them."""

import json
import math

import numpy as np
import pytest
from scipy.stats import qmc

from scaling_testbed.analysis.rows.study import load
from scaling_testbed.errors import ConfigError, UserError
from scaling_testbed.sweeps import draw
from scaling_testbed.sweeps.draw import DIRECTIONS, Draw
from scaling_testbed.sweeps.grid import load_sweep, narrowed
from scaling_testbed.sweeps.plan import plan, remember, sweep_folder
from scaling_testbed.sweeps.view import detectable_effects

FILE = """
overrides: [data=noise, model=nano_s, budget.steps=1]
axes: {loss.z_loss: [0, 1e-4]}
draw:
  samples: 4
  axes:
    optimizer.lr: {log_uniform: [1e-4, 1e-1]}
    batch.sequences: {choice: [16, 32]}
    schedule.warmup: {int_log_uniform: [1, 1000]}
seeds: [0, 1]
"""


@pytest.fixture
def swept(tmp_path):
    """Returns a function from the text of a sweep file, and what is typed after it, to the sweep."""

    def made(text, *words):
        (tmp_path / "search.yaml").write_text(text)
        return narrowed(load_sweep(str(tmp_path / "search.yaml")), [f"runs_dir={tmp_path}/runs", *words])

    return made


def drawn(samples, axes, **more):
    return Draw(**draw.laid_over({}, draw.checked({"samples": str(samples), "axes": axes, **more}))).points()


def test_the_sequence_is_that_of_joe_and_kuo_with_a_digital_shift():
    dimensions = len(DIRECTIONS) + 1
    words = np.array(draw._sobol(256, dimensions, seed=5))
    published = qmc.Sobol(dimensions, scramble=False, bits=draw.BITS).random(256) * 2**draw.BITS
    assert ((words ^ words[0]) == published.astype(int)).all()
    assert sorted(words[:64, 3] >> (draw.BITS - 6)) == list(range(64))  # one in each of 64 equal intervals


@pytest.mark.parametrize("method", ["sobol", "random"])
def test_every_machine_draws_these_samples(method):
    axes = {"optimizer.lr": {"log_uniform": ["1e-4", "1e-1"]}, "batch.sequences": {"choice": ["16", "32"]}}
    found = [tuple(point.values()) for point in drawn(3, axes, method=method, seed="7")]
    known = {
        "sobol": [("16", "0.0005737"), ("32", "0.01814"), ("32", "0.000102")],
        "random": [("16", "0.001899"), ("32", "0.001625"), ("16", "0.0007936")],
    }
    assert found == known[method]


@pytest.mark.parametrize("method", ["sobol", "random"])
def test_more_samples_leave_the_runs_that_there_were(swept, method):
    words = [f"draw.method={method}", "seed=0", "loss.z_loss=0"]
    few, many = ([run.run_id for run in plan(swept(FILE, *words, f"draw.samples={n}"))[0]] for n in (2, 5))
    assert many[:2] == few and len(set(many)) == 5
    other = [run.run_id for run in plan(swept(FILE, *words, "draw.samples=2", "draw.seed=1"))[0]]
    assert not set(other) & set(few)


def test_the_order_of_the_keys_in_the_file_changes_nothing():
    axes = {"optimizer.lr": {"uniform": ["0", "1"]}, "batch.sequences": {"int_uniform": ["1", "9"]}}
    assert drawn(3, axes) == drawn(3, dict(reversed(axes.items())))


def test_samples_are_crossed_with_axes_and_seeds(swept):
    points = swept(FILE).points()
    samples = list(dict.fromkeys(tuple(point[key] for key in sorted(swept(FILE).draw.axes)) for point in points))
    others = {(point["loss.z_loss"], point["seed"]) for point in points}
    assert len(points) == 4 * 2 * 2 and len(samples) == 4 and len(others) == 4
    assert [point["seed"] for point in points[:4]] == ["0", "1", "0", "1"]


@pytest.mark.parametrize("method", ["sobol", "random"])
@pytest.mark.parametrize("kind", ["uniform", "log_uniform", "int_uniform", "int_log_uniform"])
def test_values_follow_their_distribution_between_the_ends_in_few_digits(kind, method):
    low, high = ("3", "40") if kind.startswith("int") else ("0.90001", "0.99999")
    texts = [point["x"] for point in drawn(512, {"x": {kind: [low, high]}}, method=method)]
    values = np.array(list(map(float, texts)))
    assert values.min() >= float(low) and values.max() <= float(high)
    assert all(len(text) <= 6 or text in (low, high) for text in texts)
    if kind.startswith("int"):
        assert {text for text in texts} == {str(number) for number in range(3, 41)}
    ends = float(low), float(high) + kind.startswith("int")
    middle = math.sqrt(ends[0] * ends[1]) if "log" in kind else sum(ends) / 2
    assert np.mean(values + 0.5 * kind.startswith("int") < middle) == pytest.approx(0.5, abs=0.06)


def test_a_rounded_value_stays_between_the_ends():
    assert {point["x"] for point in drawn(64, {"x": {"uniform": ["0.99981", "0.99994"]}})} == {"0.99981", "0.9999"}
    assert drawn(1, {"x": {"log_uniform": ["0.99996", "0.99998"]}}) == [{"x": "0.99998"}]


def test_choices_are_drawn_equally_often_and_keep_their_spelling():
    texts = [point["x"] for point in drawn(300, {"x": {"choice": ["1e-3", None, "[1,2]"]}})]
    assert {text: round(texts.count(text), -1) for text in set(texts)} == {"1e-3": 100, "null": 100, "[1,2]": 100}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{samples: 2, axes: {a: {log_uniform: [0, 1]}}}", "a: log_uniform takes numbers above zero; got [0, 1]"),
        ("{samples: 2, axes: {a: {uniform: [1, 1]}}}", "takes two numbers [LOW, HIGH] with LOW < HIGH; got [1, 1]"),
        ("{samples: 2, axes: {a: {uniform: [1, .inf]}}}", "draw.axes.a: uniform takes two numbers"),
        ("{samples: 2, axes: {a: {uniform: [1, x]}}}", "draw.axes.a: uniform takes two numbers"),
        ("{samples: 2, axes: {a: {uniform: [1, nan]}}}", "draw.axes.a: uniform takes two numbers"),
        ("{samples: 2, axes: {a: {log_uniform: [1e-999999, 1e9]}}}", "draw.axes.a: log_uniform takes two numbers"),
        ("{samples: 2, axes: {a: {int_uniform: [1, 2.5]}}}", "a: int_uniform takes whole numbers; got [1, 2.5]"),
        ("{samples: 2, axes: {a: {choice: []}}}", "draw.axes.a: choice takes a list of values; got []"),
        ("{samples: 2, axes: {a: {choice: ['1,2']}}}", "draw.axes.a: 1,2 stands for several values"),
        ("{samples: 2, axes: {a: {normal: [0, 1]}}}", "draw.axes.a must be one of uniform, log_uniform, int_uniform"),
        ("{samples: 2, axes: {a: [1, 2]}}", "draw.axes.a must be one of uniform"),
        ("{samples: 2, axes: {seed: {choice: [1]}}}", "draw.axes.seed: a seed is not drawn; write seeds: [0, 1]"),
        ("{samples: 0, axes: {a: {choice: [1]}}}", "draw.samples must be a whole number from 1 to 4294967294; got 0"),
        ("{seed: -1, axes: {a: {choice: [1]}}}", "seed must be a whole number from 0 to 4294967294; got -1"),
        ("{samples: 2, method: halton, axes: {a: {choice: [1]}}}", "method must be one of sobol, random; got 'halton'"),
        ("{samples: 2}", "draw has no axes"),
        ("{axes: {a: {choice: [1]}}}", "draw has no samples, the number of points of a; write samples: 20"),
        ("{n: 2}", "draw has no key n; it has samples, seed, method, axes"),
        ("[a]", "draw must be a mapping"),
        ("{samples: 2, axes: [a]}", "draw.axes must be a mapping of keys"),
        ("{samples: 2, axes: {a: {choice: [1]}}}\naxes: {a: [1]}", "a is given twice among axes, together, draw"),
        ("{samples: 2, axes: {a: {choice: [1]}}}\noverrides: [a=1]", "a is given twice"),
        ("{samples: 2, axes: {a: {choice: [1]}}}\nrules: {a: 1}", "a is given twice"),
        ("{samples: 2, axes: {a: {choice: [1]}}}\nexclude: [{a: 1}]", "exclude names a, which no axis varies"),
        (f"{{samples: 2, axes: {{{', '.join(f'{x}: {{choice: [1]}}' for x in 'abcdefghijk')}}}}}", "takes at most 10"),
    ],
)  # fmt: skip
def test_what_is_wrong_in_a_draw_is_said_in_one_line(swept, text, message):
    with pytest.raises(ConfigError) as error:
        swept(f"draw: {text}")
    assert message in str(error.value) and "search.yaml" in str(error.value) and "\n" not in str(error.value)


def test_a_typed_draw_takes_the_place_of_an_axis_and_a_typed_value_that_of_a_drawn_key(swept):
    axis = "draw.axes.loss.z_loss={uniform: [0, 1]}"
    found = swept(FILE, axis, "draw.samples=2", "draw.seed=3")
    assert not found.axes and len(found.points()) == 2 * 2 and found.draw.seed == 3
    assert list(found.draw.axes)[-1] == "loss.z_loss"
    fixed = swept(FILE, "optimizer.lr=1e-3", "batch.sequences=8,16")
    assert list(fixed.draw.axes) == ["schedule.warmup"] and fixed.axes["batch.sequences"] == ["8", "16"]
    assert {point["optimizer.lr"] for point in fixed.points()} == {"1e-3"}
    left_out = swept(FILE, *(f"draw.axes.{key}=null" for key in swept(FILE).draw.axes))
    assert left_out.draw is None and len(left_out.points()) == 2 * 2
    plain = swept("overrides: [optimizer.lr=1]", "draw.samples=3", "draw.axes.optimizer.lr={log_uniform:[1e-3,1]}")
    assert len(plain.points()) == 3 and "optimizer.lr=1" not in plain.overrides


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("draw.samples=x", "draw.samples must be a whole number from 1 to 4294967294; got x"),
        ("draw.samples", "write draw.samples=20"),
        ("draw.axes.optimizer.lr={log_uniform: [1", "cannot be read as YAML"),
        ("draw.axes.optimizer.lr={log_uniform: [1, 0]}", "draw.axes.optimizer.lr: log_uniform takes two numbers"),
        ("draw.axes={}", "type draw.axes.KEY={KIND: [...]} for each key"),
        ("draw.samples=200000", "has 800,000 combinations; a sweep has at most 100,000"),
    ],
)
def test_a_typed_draw_that_cannot_be_is_refused_in_one_line(swept, word, message):
    with pytest.raises(ConfigError) as error:
        swept(FILE, word).points()
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_scale_changes_a_draw_key_by_key(swept, tmp_path):
    swept(
        FILE
        + """
scales:
  large: {draw: {samples: 8, axes: {optimizer.lr: {uniform: [1, 2]}, batch.sequences: null}}}
  grid: {axes: {optimizer.lr: [1]}, overrides: [batch.sequences=2, schedule.warmup=3]}
  other: {draw: {axes: {loss.z_loss: {choice: [1]}}}}
"""
    )
    large, grid, other = (load_sweep(str(tmp_path / "search.yaml"), scale) for scale in ("large", "grid", "other"))
    assert large.draw.samples == 8 and sorted(large.draw.axes) == ["optimizer.lr", "schedule.warmup"]
    assert large.draw.axes["optimizer.lr"].kind == "uniform"
    assert grid.draw is None and list(grid.axes) == ["optimizer.lr", "loss.z_loss"]
    assert other.draw.samples == 4 and not other.axes and len(other.draw.axes) == 4


def test_the_folder_keeps_all_draws_and_declares_no_drawn_rates(swept):
    text = FILE + "declared: {margins: {S: 0.05}, seed_sd: {S: 0.03}}"
    grid = [f"draw.axes.{key}=null" for key in swept(text).draw.axes]
    for words in (["draw.samples=1"], ["draw.samples=2"], ["draw.seed=1", "draw.samples=1"], grid):
        sweep = swept(text, *words)
        runs, _ = plan(sweep)
        remember(runs, sweep)
    with pytest.raises(UserError, match="holds a declared grid, .* type name= for another folder"):
        remember(runs, swept(text))
    place = sweep_folder(runs) / "sweep.json"
    about = json.loads(place.read_text())
    assert [(one["samples"], one["seed"]) for one in about["draws"]] == [(2, 0), (1, 1)]
    assert about["draws"][0]["axes"]["batch.sequences"] == {"choice": ["16", "32"]}
    assert len(about["declared"]["rates"]) == 1  # of the grid
    assert load(sweep_folder(runs)).drawn == ("optimizer.lr", "batch.sequences", "schedule.warmup")
    assert detectable_effects(swept(text), runs)[0].startswith("no claim can be judged")
    place.write_text(json.dumps(about | {"draws": [{"axes": 3}]}))
    with pytest.raises(UserError, match="draws must be a list of draws; restore the file"):
        load(sweep_folder(runs))


def test_another_sweep_that_draws_in_a_folder_is_noted_there(swept, tmp_path):
    (tmp_path / "grid.yaml").write_text("overrides: [data=noise, model=nano_s, budget.steps=1, name=shared]")
    first = narrowed(load_sweep(str(tmp_path / "grid.yaml")), [f"runs_dir={tmp_path}/runs"])
    for sweep in (first, swept(FILE, "name=shared", "draw.samples=1"), first):
        remember(plan(sweep)[0], sweep)
    found = load(tmp_path / "runs" / "shared")
    assert found.sweep == "grid" and "optimizer.lr" in found.drawn
