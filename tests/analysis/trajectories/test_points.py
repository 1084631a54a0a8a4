"""The points of training curves: what each row holds, what is left out, and what cannot be read."""

import json

import numpy as np
import pytest

from scaling_testbed.analysis.trajectories.points import curves_of, points_of
from scaling_testbed.errors import ConfigError, UserError
from tests.analysis.trajectories.worlds import BATCH, run, world


def power(step, rates):
    return 2 + 10 * step**-0.5


def test_a_point_holds_the_run_and_what_it_was_after_so_many_steps(study):
    """Step s of a run has s batches of tokens, the rate of update s, and 6 N D as its compute."""
    rows, traces = world([run("a", 1000, 400, power), run("b", 2000, 400, power, schedule="cosine")])
    curves, _ = curves_of(study(rows, traces=traces))
    assert [curve.run for curve in curves] == ["a", "b"] and list(curves[0].steps) == list(range(20, 401, 20))
    point = curves[1].point(9)
    assert (point["step"], point["n_tokens"], point["flops"]) == (200, 200 * BATCH, 6 * 2000 * 200 * BATCH)
    assert point["loss"] == point["val_loss"] == power(200, None) and point["tokens_per_param"] == 200 * BATCH / 2000
    half = 1e-5 + (1e-2 - 1e-5) * 0.5 * (1 + np.cos(np.pi * 180 / 380))  # 180 steps of 380 after the warm-up
    assert point["lr"] == pytest.approx(half) and point["lr_share"] == pytest.approx(half / 1e-2)
    assert point["optimizer.lr"] == 1e-2 and point["run"] == "b" and point["label"] == "b step 200"
    assert len(curves[1].rates) == 400 and curves[1].rates[9] == pytest.approx(1e-2 / 2) and curves[1].warmup == 20


def test_a_warm_up_in_tokens_is_as_long_as_its_steps(study):
    rows, traces = world([run("a", 1000, 400, power), run("b", 1000, 400, power)])
    rows[1] |= {"schedule.warmup": 0.5, "schedule.warmup_tokens": 20.0 * BATCH}
    one, other = curves_of(study(rows, traces=traces))[0]
    assert one.warmup == other.warmup == 20 and one.rates.tolist() == other.rates.tolist()


def test_only_ends_of_shorter_runs_are_points_of_laws(study):
    runs = [run("a", 1000, 400, power, warmup=50), run("b", 2000, 400, power, schedule="cosine")]
    rows, said = points_of(curves_of(study(*world(runs)[:1], traces=world(runs)[1]))[0])
    assert [row["step"] for row in rows if row["run"] == "a"] == list(range(100, 401, 20))
    assert [row["step"] for row in rows if row["run"] == "b"] == [400]  # a cosine decays after its warm-up
    assert any(text.startswith("6 points before twice the warm-up, or 60 steps, are left out") for text in said)
    assert any(text.startswith("17 points after the rate has begun to decay") for text in said)
    rows, said = points_of(curves_of(study(*world(runs)[:1], traces=world(runs)[1]))[0], first_step=300)
    assert [row["step"] for row in rows] == [*range(300, 401, 20), 400]


def test_losses_that_are_not_finite_and_runs_that_diverged_are_counted(study):
    runs = [run("a", 1000, 400, power), run("b", 2000, 400, power), run("c", 2000, 400, power)]
    rows, traces = world(runs)
    traces["a"][5]["val_loss"] = None  # how a line holds a loss that is not finite
    rows[1]["status"] = "diverged"
    del traces["c"]
    curves, said = curves_of(study(rows, traces=traces))
    assert [(one.run, len(one.steps)) for one in curves] == [("a", 19)]
    for part in ("1 diverged runs are left out", "1 runs have no curve", "1 evaluations have no finite loss"):
        assert any(part in text for text in said), (part, said)


TABLE = "name,step,lr,loss\n" + "".join(
    f"{name},{step},{lr},{5 - step / 100}\n" for name in "ab" for step, lr in ((10, 1e-3), (20, 2e-3), (40, 1e-3))
)


def table(tmp_path, text, *, name="curves.csv"):
    path = tmp_path / name
    path.write_text(text)
    return path


def test_a_table_of_steps_is_read_with_its_rates_between_the_points(tmp_path):
    curves, said = curves_of(table(tmp_path, TABLE), warmup_steps=5)
    assert [one.run for one in curves] == ["a", "b"] and list(curves[0].steps) == [10, 20, 40]
    rates = curves[0].rates
    assert len(rates) == 40 and rates[14] == pytest.approx(1.5e-3) and rates[29] == pytest.approx(1.5e-3)
    np.testing.assert_allclose(rates[:6], [2e-4, 4e-4, 6e-4, 8e-4, 1e-3, 1e-3])
    assert not any("--warmup-steps" in text for text in said)
    steps = table(tmp_path, TABLE.replace("step", "Iter").replace("name", "arm"), name="other.csv")
    curves, said = curves_of(steps, mapping=["step=Iter"])
    assert [one.run for one in curves] == ["a", "b"] and "the column arm tells the runs apart" in said
    constant = table(tmp_path, "step,lr,loss\n10,1e-3,3\n20,1e-3,2\n", name="constant.csv")
    (curve,), said = curves_of(constant)
    assert curve.warmup == 0 and any("step 10) is taken as 0.001; type a linear warm-up" in text for text in said)


def test_tokens_of_a_table_grow_with_its_steps(tmp_path):
    text = "step,lr,loss,n_params,n_tokens\n10,1,3,100,{}\n20,1,2,100,{}\n"
    for at, total in ((1000, 2000), (2000, 2000)):  # tokens of each step, or the total of the run in each row
        (curve,), _ = curves_of(table(tmp_path, text.format(at, total)))
        assert [curve.point(place)["n_tokens"] for place in (0, 1)] == [1000, 2000]
        assert curve.point(0)["flops"] == 6 * 100 * 1000
    with pytest.raises(UserError, match="n_tokens does not grow in proportion to the steps"):
        curves_of(table(tmp_path, text.format(1500, 2000)))


def test_the_batch_of_a_table_follows_from_its_tokens(tmp_path):
    (curve,), _ = curves_of(table(tmp_path, "step,lr,loss,n_tokens\n10,1,3,10240\n20,1,2,20480\n"))
    assert curve.row["batch_tokens"] == 1024


@pytest.mark.parametrize(
    ("text", "mapping", "said"),
    [
        ("name,lr,loss\na,1,3\nb,1,2\n", [], "has no column step; use --map step=COLUMN"),
        ("step,loss\n10,3\n20,2\n", [], "has no column lr; use --map lr=COLUMN"),
        ("step,lr,loss\n10,1,3\n20,1,2\n10,1,3.1\n", [], "no column tells the runs apart; name one with --map run="),
        ("step,lr,loss,g\n10,1,3,1\n20,1,2,1\n20,1,3.1,1\n", ["run=g"], "1: step 20 is there twice"),
        ("step,lr,loss,g\n20,1,3,1\n10,1,2,1\n", ["run=g"], "1: step 10 follows step 20"),
        (
            "step,lr,loss,g,h\n10,1,3,a,u\n10,1,2,b,v\n20,1,2,a,v\n20,1,2,b,u\n",
            [],
            "g and h divide the rows into different runs; choose with --map run=COLUMN",
        ),
        ("step,lr,loss\n10,1,3\n20.5,1,2\n", [], "step must be a whole number of updates; got 20.5"),
        ("step,lr,loss\n10,0,3\n20,0,2\n", [], "lr is 0 at every step"),
        ("step,lr,loss\n1e9,1,3\n2e9,1,2\n", [], "step 2e+09 is no number of updates; are these tokens?"),
        (
            "step,lr,loss,n_tokens,batch_tokens\n10,1,3,10240,1\n20,1,2,20480,1\n",
            [],
            "20 steps of 1 tokens are not its 20480 tokens; is the batch in sequences?",
        ),
    ],
)
def test_a_table_that_is_no_training_curve_is_refused(tmp_path, text, mapping, said):
    with pytest.raises(UserError, match=said.replace("+", r"\+")) as raised:
        curves_of(table(tmp_path, text), mapping=mapping)
    assert "\n" not in str(raised.value)


def test_a_study_without_curves_is_refused(study, tmp_path):
    rows, traces = world([run("a", 1000, 400, power)])
    with pytest.raises(UserError, match="holds no training curve: no run has a metrics.jsonl"):
        curves_of(study(rows, name="without"))
    with pytest.raises(ConfigError, match="--map loss=train_loss_last: curves of runs have the step, lr and val_loss"):
        curves_of(
            study([row | {"train_loss_last": 1} for row in rows], traces=traces), mapping=["loss=train_loss_last"]
        )
    with pytest.raises(UserError, match="a: step 400 is there twice"):
        curves_of(study(rows, name="twice", traces={"a": [*traces["a"], traces["a"][-1]]}))
    with pytest.raises(UserError, match="there is no schedule 'mine'"):
        curves_of(study([rows[0] | {"schedule.name": "mine"}], name="mine", traces=traces))
    with pytest.raises(UserError, match="no point of the curves can be used; 20 points before step 500"):
        points_of(curves_of(study(rows, traces=traces))[0], first_step=500)
    assert json.dumps(rows)  # the world is made of plain values, as files hold them
