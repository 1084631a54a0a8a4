"""Rows of any origin get the columns that laws ask for."""

import csv
import json
import math

import pandas
import pytest

from scaling_testbed.analysis.laws import columns
from scaling_testbed.analysis.laws.forms import LAWS
from scaling_testbed.analysis.rows import published
from scaling_testbed.analysis.rows.conditions import parse
from scaling_testbed.errors import ConfigError, UserError

THEIRS = [
    {"Model Size": 1e8, "Training FLOP": 6e18, "loss": 3.1},
    {"Model Size": 2e8, "Training FLOP": 6e19, "loss": 2.8},
]


def write(path, rows):
    if path.suffix == ".csv":
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".parquet":
        pandas.DataFrame(rows).to_parquet(path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("kind", ["csv", "jsonl", "json", "parquet"])
def test_any_table_is_read_with_a_mapping_and_tokens_follow_from_compute(tmp_path, kind):
    path = write(tmp_path / f"theirs.{kind}", THEIRS)
    rows, said = columns.read(path, None, ["n_params=Model Size", "flops=Training FLOP"], "n_params")
    assert [row["n_tokens"] for row in rows] == pytest.approx([1e10, 5e10])  # C / 6N
    assert [row["tokens_per_param"] for row in rows] == pytest.approx([100, 250])
    inputs, observed = columns.values(rows, LAWS["chinchilla"])
    assert inputs == {"n_params": [1e8, 2e8], "n_tokens": pytest.approx([1e10, 5e10])} and observed == [3.1, 2.8]
    assert not said


def test_a_table_s_small_numbers_keep_their_digits(tmp_path):
    path = write(tmp_path / "small.parquet", [{"loss": 3.0, "flops": 1.2345e-20, "gone": float("nan"), "list": [1, 2]}])
    ((row,), _) = columns.read(path, None, [], "n_params")
    assert (row["flops"], row["gone"], row["list"]) == (1.2345e-20, None, [1, 2])


def test_a_folder_may_hold_its_rows_in_parquet_alone_and_a_name_end_in_capitals(tmp_path):
    write(tmp_path / "results.parquet", THEIRS)
    (tmp_path / "ROWS.CSV").write_bytes(write(tmp_path / "rows.csv", THEIRS).read_bytes())
    for path in (tmp_path, tmp_path / "ROWS.CSV"):
        assert [row["loss"] for row in columns.read(path, None, [], "n_params")[0]] == [3.1, 2.8]


def test_a_row_without_a_name_is_called_by_its_place(tmp_path):
    path = write(tmp_path / "rows.jsonl", [*THEIRS, {"n_params": 3e8, "loss": 2.5}, {"name": "mine", "loss": 2.5}])
    rows, _ = columns.read(path, None, [], "n_params")
    assert [columns.name_of(row) for row in rows] == ["row 1", "row 2", "row 3 N=3e+08", "mine"]
    with pytest.raises(
        UserError, match="flops is no such column, and flops must .*; use --map flops=COLUMN; the columns are"
    ):
        columns.check([{"loss": 3.0}], "flops", ["flops"])
    with pytest.raises(UserError, match="row 3 N=3e\\+08: flops is no such column"):
        columns.check(rows[:3], "flops", ["flops"])


def test_a_row_without_a_name_is_called_by_its_first_cells_of_text(tmp_path):
    cells = {"size": "7B", "note": "a" * 25, "mult": "2xC", "data": "web", "status": "finished", "n_params": 7e9}
    (row,), _ = columns.read(write(tmp_path / "rows.jsonl", [{**cells, "loss": 2.5}]), None, [], "n_params")
    assert columns.name_of(row) == "row 1 size=7B mult=2xC N=7e+09"


def test_a_pickle_is_not_opened(tmp_path):
    path = tmp_path / "frame.pkl"
    pandas.DataFrame(THEIRS).to_pickle(path)
    with pytest.raises(UserError, match="rows are read from .csv, .tsv, .*; save it as CSV or Parquet"):
        columns.read(path, None, [], "n_params")


def test_what_follows_from_our_own_rows():
    row = {"val_loss": 2.5, "n_params": 1000, "n_params_non_embedding": 400, "n_tokens": 64_000, "epochs": 4.0,
           "batch.sequences": 8, "batch.sequence_length": 16, "optimizer.lr": 0.01, "flops": 7e8}  # fmt: skip
    found = columns.derived(row)
    assert found["loss"] == 2.5 and found["lr"] == 0.01 and found["flops"] == 7e8
    assert found["tokens_per_param"] == 64 and found["n_params_average"] == 1000
    assert found["batch_tokens"] == 128 and found["steps"] == 500 and found["unique_tokens"] == 16_000
    other = columns.derived(row, "n_params_non_embedding")
    assert other["n_params"] == 400 and other["tokens_per_param"] == 160
    assert columns.derived({**row, "epochs": 0.5})["unique_tokens"] == 64_000


def test_flops_of_our_own_rows_are_those_of_laws_unless_a_mapping_names_others(tmp_path):
    """Counted operations differ from 6ND from size to size, and an isoFLOP budget would fall apart."""
    row = {"run_id": "a", "val_loss": 2.5, "n_params": 1000, "n_params_non_embedding": 400, "n_tokens": 10_000,
           "flops": 7e8, "flops_6nd": 6e7, "epochs": "four", "batch.sequences": "8"}  # fmt: skip
    path = write(tmp_path / "rows.jsonl", [row])
    for size, mapping, flops in [("n_params", [], 6e7), ("n_params_non_embedding", [], 2.4e7),
                                 ("n_params", ["flops=flops"], 7e8)]:  # fmt: skip
        (found,), _ = columns.read(path, None, mapping, size)
        assert found["flops"] == flops and found["n_tokens"] == 10_000


def test_one_count_of_parameters_does_not_pass_for_another(tmp_path):
    rows = [{"n_params": 1000, "n_tokens": 10_000, "loss": 2.0}]
    path = write(tmp_path / "rows.csv", rows)
    with pytest.raises(ConfigError, match="--size n_params_non_embedding: no row has this count"):
        columns.read(path, None, [], "n_params_non_embedding")
    path = write(tmp_path / "two.csv", [{**rows[0], "body": 400}, {**rows[0], "body": None}])
    found, _ = columns.read(path, None, ["n_params_non_embedding=body"], "n_params_non_embedding")
    assert [row["n_params"] for row in found] == [400, None]


def test_a_law_about_the_best_runs_gets_the_best_of_each_size_over_seeds():
    losses = {(10, 0.1): (3.0, 2.0), (10, 0.2): (2.4, 2.4), (20, 0.1): (2.2,), (20, 0.2): (2.3,)}
    rows = [{"n_params": n, "lr": lr, "loss": loss} for (n, lr), found in losses.items() for loss in found]
    kept, said = columns.best_of_each(rows, LAWS["optimal_lr"])
    assert [(row["n_params"], row["lr"]) for row in kept] == [(10, 0.2), (20, 0.1)]
    words = "2 of 6 rows have the lowest loss for their n_params, and only these are used"
    assert said[0] == f"optimal_lr is about the best lr: {words}"
    assert columns.best_of_each(kept, LAWS["optimal_lr"]) == (kept, [])
    with pytest.raises(UserError, match="loss is no such column"):
        columns.best_of_each([{"n_params": 10, "lr": lr} for lr in (0.1, 0.2)], LAWS["optimal_lr"])


def test_a_best_rate_at_the_end_of_the_grid_is_said_to_be_one():
    rows = [{"n_params": n, "lr": lr, "loss": 1 + abs(lr - best)} for n, best in ((10, 0.2), (20, 9.0), (40, 0.1))
            for lr in (0.1, 0.2, 0.3)]  # fmt: skip
    kept, said = columns.best_of_each(rows, LAWS["optimal_lr"])
    assert [row["lr"] for row in kept] == [0.2, 0.3, 0.1]
    assert said[1].startswith("2 of 3 best lr are the smallest or the largest that was tried")
    assert len(columns.best_of_each(rows[:3], LAWS["optimal_lr"])[1]) == 1


def test_compute_that_makes_no_budgets_is_said_to_make_none():
    rows = [{"flops": 1e18 * 1.05**i, "n_params": 10, "loss": 3.0} for i in range(20)]
    _, said = columns.best_of_each([*rows, rows[0]], LAWS["optimal_n"])
    assert "flops varies without a gap (21 from 1e+18 to 2.53e+18)" in said[1]


def test_budgets_that_whole_steps_have_rounded_are_one():
    rows = [{"flops": c * (1 + 0.01 * k), "n_params": n, "loss": 1 + abs(n - best)}
            for c, best in ((1e18, 2e7), (2e18, 3e7))
            for k, n in enumerate((1e7, 2e7, 3e7, 4e7))]  # fmt: skip
    kept, said = columns.best_of_each(rows, LAWS["optimal_n"])
    assert [row["n_params"] for row in kept] == [2e7, 3e7] and "2 of 8 rows" in said[0]


def test_what_a_table_cannot_say_by_map_is_refused():
    with pytest.raises(ConfigError, match="--map tokens=D: no law uses the column tokens; choose from .*n_tokens"):
        columns._pairs(["tokens=D"])
    assert columns._pairs(["batch.sequences=b", "val_loss=l", "optimizer.lr=r", "n_params_non_embedding=n"])


def test_rows_that_are_there_twice_are_said_to_be(tmp_path):
    _, said = columns.read(write(tmp_path / "rows.csv", [*THEIRS, THEIRS[0]]), None, [], "n_params")
    assert said == ["1 of 3 rows repeat another one in every column"]


def test_a_line_with_more_cells_than_columns_is_named_and_not_cut(tmp_path):
    (tmp_path / "rows.csv").write_text("n_params,loss\n10,3.5\n20,3,4\n")
    with pytest.raises(UserError, match=r"rows.csv:3 has more cells than the header has columns"):
        columns.read(tmp_path / "rows.csv", None, [], "n_params")
    (tmp_path / "rows.csv").write_text("n_params,loss\n10,3.5,\n20,NA, \n")  # ends of lines, and nothing in a cell
    rows, _ = columns.read(tmp_path / "rows.csv", None, [], "n_params")
    assert [(row["n_params"], row["loss"]) for row in rows] == [(10, 3.5), (20, None)]


def test_others_words_for_a_finished_run_are_understood_and_any_other_leaves_it_out(tmp_path):
    words = ["COMPLETED", "FAILED", None, "done", "running"]
    rows = [{"name": f"r{i}", "status": word, "n_params": 10, "loss": 3.0 + i} for i, word in enumerate(words)]
    found, said = columns.read(write(tmp_path / "rows.jsonl", rows), None, [], "n_params")
    assert [row["name"] for row in found] == ["r0", "r2", "r3"]
    assert said == ["2 runs are not finished and are left out: r1 (FAILED); r4 (running)"]


@pytest.mark.parametrize("word", ["diverged", "DIVERGED", "Diverged"])
def test_a_diverged_run_is_one_in_any_spelling(tmp_path, word):
    rows = [{"name": "r0", "status": word, "n_params": 10, "loss": 9.0}, {"name": "r1", "n_params": 10, "loss": 3.0}]
    found, said = columns.read(write(tmp_path / "rows.jsonl", rows), None, [], "n_params")
    assert [row["name"] for row in found] == ["r1"] and said == ["1 diverged runs are left out"]


@pytest.mark.parametrize("kind", ["csv", "parquet", "jsonl"])
@pytest.mark.parametrize("status", ["preempted", "failed"])
def test_a_run_that_did_not_end_is_left_out_whatever_loss_is_asked_for(tmp_path, kind, status):
    rows = [{"name": "r0", "status": status, "n_params": 10, "val_loss": None, "val_loss_best": 3.0},
            {"name": "r1", "status": "finished", "n_params": 10, "val_loss": 2.0, "val_loss_best": 2.0}]  # fmt: skip
    found, said = columns.read(write(tmp_path / f"rows.{kind}", rows), None, ["loss=val_loss_best"], "n_params")
    assert [row["name"] for row in found] == ["r1"] and said == [
        f"1 runs are not finished and are left out: r0 ({status})"
    ]


def test_a_row_with_the_loss_that_was_asked_for_needs_no_other(tmp_path):
    rows = [{"n_params": 10, "train_loss": 3.0, "val_loss": None}, {"n_params": 20, "train_loss": None, "val_loss": 3}]
    found, said = columns.read(write(tmp_path / "rows.csv", rows), None, ["loss=train_loss"], "n_params")
    assert [row["loss"] for row in found] == [None, 3.0] and not said
    found, said = columns.read(write(tmp_path / "rows.csv", rows), None, [], "n_params")
    assert [row["loss"] for row in found] == [3] and "1 runs are not finished" in said[0]


def test_flops_tokens_and_errors_follow_from_each_other():
    assert columns.derived({"n_params": 10, "n_tokens": 200})["flops"] == 12_000
    assert columns.derived({"n_params": 10, "tokens_per_param": 20})["n_tokens"] == 200
    assert columns.derived({"n_params": 10, "n_tokens": 200, "tokens_per_param": 7})["tokens_per_param"] == 20
    assert columns.derived({"accuracy": 0.3})["error"] == pytest.approx(0.7)
    assert columns.derived({"error": 0.3})["accuracy"] == pytest.approx(0.7)


def test_runs_that_diverged_or_are_missing_are_left_out_and_named(tmp_path):
    rows = [{"run_id": f"r{i}", "status": s, "n_params": 10, "n_tokens": 9, "val_loss": 3.0, "optimizer.lr": 1.0}
            for i, s in enumerate(["finished", "diverged", "failed"])]  # fmt: skip
    found, said = columns.read(write(tmp_path / "rows.jsonl", rows), None, [], "n_params")
    assert [row["run_id"] for row in found] == ["r0"]
    assert any("1 diverged runs" in text for text in said) and any("r2 (failed)" in text for text in said)


@pytest.mark.parametrize(
    "typed, fits",
    [
        ("n>=2", [2, 3]),
        ("n>2", [3]),
        ("n<=1", [1]),
        ("n<2", [1]),
        ("n=2", [2]),
        ("n==2.0", [2]),
        ("n!=2", [1, 3]),
        ("n > 1 and n < 3", [2]),
        ("n=1 or n=3", [1, 3]),
        ("n>1 AND n!=3 Or n=1", [1, 2]),
        ("kind=nuts And bolts or n=2", [2]),  # words of a value
        ("n=1 and kind=b or n=3 and kind=a", [3]),
        ("kind=a", [1, 2, 3]),
        ("absent<5", []),
        ("n<3 and kind=b or n=3", [3]),
        ("kind=b and kind<5", []),  # the first part keeps the second from a text
    ],
)
def test_conditions(typed, fits):
    rows = [{"n": n, "kind": "a"} for n in (1, 2, 3)]
    assert [row["n"] for row in rows if parse("--where", typed)(row)] == fits


@pytest.mark.parametrize("typed", ["n", "n<many", "", "n<3 and", "=3"])
def test_what_is_no_condition_is_said(typed):
    with pytest.raises(ConfigError, match="--where"):
        parse("--where", typed)


def test_a_text_is_not_left_out_without_a_word_where_an_order_needs_a_number():
    rows = [{"n": 1e9}, {"n": None}, {"n": "1.3B"}, {"n": "large"}]
    with pytest.raises(ConfigError, match="--hold-out 'n>1e9': a row has 'large' as its n"):
        columns.select(rows, [], ["n>1e9"])
    assert columns.select(rows[:3], [], ["n>1e9"]) == (rows[:2], [rows[2]])


@pytest.mark.parametrize("typed", ["n!=6.9X", "n=6.9X"])
def test_a_number_that_is_compared_with_a_word_is_said_and_does_not_differ_from_it(typed):
    rows = [{"n": 1, "m": None}, {"n": 2, "m": "many"}]
    with pytest.raises(ConfigError, match="n holds numbers, but '6.9X' is not a number"):
        columns.select(rows, [typed], [])
    assert columns.select(rows, ["n!=null", "m!=many"], [])[0] == rows[:1]
    mixed = [{"n": 1, "m": 1}, {"n": 2, "m": "many"}, {"n": 3, "m": 2}]
    assert columns.select(mixed, ["n!=2", "m!=many"], ["m=many or n=3"])[0] == mixed[:1]  # in whatever order


def test_a_condition_on_dates_compares_them_as_they_are_written(tmp_path):
    table = [{"n": 1, "day": pandas.Timestamp("2024-01-01")}, {"n": 2, "day": pandas.Timestamp("2025-01-01")}]
    rows, _ = columns.read(write(tmp_path / "rows.parquet", table), None, [], "n_params")
    assert [row["n"] for row in rows if parse("--where", 'day!="2024-01-01 00:00:00"')(row)] == [2]


def test_hold_outs_are_any_and_filters_all():
    rows = [{"n": n, "m": m} for n in (1, 2, 3) for m in (1, 2)]
    kept, held = columns.select(rows, ["n<3", "m=1"], [])
    assert [(row["n"], row["m"]) for row in kept] == [(1, 1), (2, 1)] and not held
    kept, held = columns.select(rows, [], ["n=3", "m=2"])
    assert [(row["n"], row["m"]) for row in kept] == [(1, 1), (2, 1)] and len(held) == 4


@pytest.mark.parametrize(
    "where, hold_out, said",
    [
        (["n>9"], [], "no row matches"),
        ([], ["n>9"], "--hold-out 'n>9': no row matches n>9; n is 1"),
        ([], ["n=1 and n=1 and m=2"], "nothing would be held out"),
        ([], ["n>0"], "every row is held out"),
    ],
)
def test_selections_that_leave_nothing_are_said(where, hold_out, said):
    with pytest.raises((UserError, ConfigError), match=said):
        columns.select([{"n": 1, "m": 1}, {"n": 2, "m": 2}], where, hold_out)


@pytest.mark.parametrize("value", [None, float("nan"), 0, -1.0, "many"])
def test_a_value_that_no_law_can_use_is_named(value):
    rows = [{"run_id": "abc", "n_params": 10, "n_tokens": value, "loss": 3.0}]
    with pytest.raises(UserError, match="run abc: n_tokens is .*--map n_tokens=COLUMN"):
        columns.values(rows, LAWS["chinchilla"])


def test_a_mapping_of_a_column_that_is_not_there_names_those_that_are(tmp_path):
    path = write(tmp_path / "theirs.csv", THEIRS)
    with pytest.raises(ConfigError, match="no row has the column 'Size'; the columns are Model Size, loss"):
        columns.read(path, None, ["n_params=Size"], "n_params")
    with pytest.raises(ConfigError, match="their column"):
        columns.read(path, None, ["n_params"], "n_params")
    with pytest.raises(ConfigError, match="--map loss=Model Size: loss is already mapped to 'loss'"):
        columns.read(path, None, ["loss=loss", "loss=Model Size"], "n_params")


TASKS = {"easy": 0.25, "hard": 0.5}


@pytest.fixture
def testbed(tmp_path):
    """The published layout in small: three sizes, one of them that which decides the subset; two tasks."""
    folder = tmp_path / "exp_data"
    for part in ("models", "evals"):
        (folder / part).mkdir(parents=True)
    lines = [
        "Eval Task,Task Category,Random baseline",
        *(f"{task},x,{100 * chance:g}" for task, chance in TASKS.items()),
    ]
    (folder / "eval_metadata.csv").write_text("\n".join(lines) + "\n")
    for n, easy, hard in ((10_569_312, 0.3, 0.5), (153_677_376, 0.36, 0.59), (6_889_410_560, 0.8, 0.7)):
        name = f"rpj-{n}-1.0"
        hyper = {"params": n, "params_no_embed": n // 2, "tokens": 20 * n, "lr": 3e-4, "wd": 0.33, "warmup": 5000}
        results = [{"loss": loss, "val_data": [f"training/eval_data/{place}/1.tar"]}
                   for loss, place in ((3.0, "c4_val"), (2.5, "val_tok_mult/openlm"))]  # fmt: skip
        model = {"name": name, "dataset_name": "rpj", "hyperparameters": {**hyper, "chinchilla_multiplier": 1.0},
                 "open_lm_args": ["--lr", "0.003"], "results": results}  # fmt: skip
        (folder / "models" / f"{name}.json").write_text(json.dumps(model))
        icl = {"eval_metrics": {"icl": {"easy": easy, "hard": hard}}}
        (folder / "evals" / f"evaluation_{name}_heavy.json").write_text(json.dumps(icl))
    names = {
        "d=96_l=8_h=4-8-0.003-0.033-8-211386240-100-3e-05": 5.15,
        "d=96_l=4_h=4-8-0.003-0.033-8-202523520-100-3e-05": 5.3,
    }
    (folder / "grid.json").write_text(json.dumps(names))
    return tmp_path


def test_the_published_testbed_is_read_as_it_lies(testbed):
    rows, _ = columns.read(testbed, "mlfoundations-scaling", ["error=error_1"], "n_params")
    large = next(row for row in rows if row["n_params"] == 6_889_410_560)
    assert large["lr"] == 3e-4 and large["weight_decay"] == 0.33  # its arguments are another run's
    assert large["loss"] == 3.0 and large["loss_openlm"] == 2.5 and large["dataset"] == "redpajama"
    assert large["tokens_per_param"] == 20 and large["n_params_no_input_embedding"] == 6_889_410_560 // 2
    assert large["error_2"] == pytest.approx(0.25)
    # 0.36 is more than a tenth above 0.25, and 0.59 less than a tenth above 0.5: the subset is one task
    assert large["error_1"] == pytest.approx(0.2) and large["error/hard"] == pytest.approx(0.3)
    assert large["error"] == pytest.approx(0.2)


def test_the_published_grid_is_read_from_its_names(testbed):
    rows, _ = columns.read(testbed / "exp_data", "mlfoundations-scaling-grid", [], "n_params")
    assert rows[0]["n_params"] == 10_569_312 and rows[0]["d_model"] == 96 and rows[0]["lr"] == 0.003
    assert rows[0]["warmup_steps"] == 100 and rows[0]["cooldown_lr"] == 3e-5 and rows[0]["loss"] == 5.15


def test_what_is_no_copy_of_the_testbed_is_said(tmp_path, testbed):
    with pytest.raises(UserError, match="not a copy of mlfoundations/scaling"):
        published.models(tmp_path / "elsewhere")
    next((testbed / "exp_data" / "models").glob("*.json")).write_text("{}")
    with pytest.raises(UserError, match="as published"):
        published.models(testbed)


def test_a_mapping_may_multiply(tmp_path):
    path = write(tmp_path / "theirs.csv", [{"Params (M)": 100, "Tokens (B)": 2, "loss": 3.1, "a*2": 7}])
    mapping = ["n_params=Params (M)*1e6", "n_tokens=Tokens (B)*1e9", "seed=a*2"]
    ((row,), said) = columns.read(path, None, mapping, "n_params")
    assert (row["n_params"], row["n_tokens"], row["flops"], row["seed"], said) == (1e8, 2e9, 1.2e18, 7, [])
    for factor in ("many", "nan", ""):
        with pytest.raises(ConfigError, match="no row has the column"):
            columns.read(path, None, [f"n_params=Params (M)*{factor}"], "n_params")


@pytest.mark.parametrize(
    ("typed", "value"),
    [
        ("a*1e6", 2e6), ("a/1e6", 2e-6), ("a*-1", -2.0), ("10**a", 100.0), ("2**a", 4.0), ("exp(a)", math.exp(2)),
        ("log(a)", math.log(2)), ("ln(a)", math.log(2)), ("a * 1,000", 2000.0), ("10**b c", 1000.0), ("text", 7e7),
    ],
)  # fmt: skip
def test_a_mapping_may_compute(tmp_path, typed, value):
    path = write(tmp_path / "theirs.jsonl", [{"a": 2, "b c": 3, "text": "70M"}])
    ((row,), _) = columns.read(path, None, [f"loss={typed}"], "n_params")
    assert row["loss"] == pytest.approx(value)


@pytest.mark.parametrize(("typed", "bad"), [("log(a)", 0), ("exp(a)", 1e6), ("10**a", 1e6), ("log(a)", -3)])
def test_what_a_mapping_cannot_compute_is_named(tmp_path, typed, bad):
    path = write(tmp_path / "theirs.jsonl", [{"a": bad}])
    with pytest.raises(UserError, match="row 1: .* cannot be computed, because a is"):
        columns.read(path, None, [f"loss={typed}"], "n_params")


def test_a_training_loss_beside_a_validation_loss_is_said_to_be_taken(tmp_path):
    rows = [{"n_params": 1e6, "loss": 3.0, "val_loss": 3.1}]
    said = "loss is the column loss, and val_loss has other values: --map loss=val_loss takes that one"
    assert columns.read(write(tmp_path / "a.jsonl", rows), None, [], "n_params")[1] == [said]
    assert columns.read(write(tmp_path / "a.jsonl", rows), None, ["loss=val_loss"], "n_params")[1] == []
    same = [{**rows[0], "val_loss": 3.0}]
    assert columns.read(write(tmp_path / "a.jsonl", same), None, [], "n_params")[1] == []


def test_rows_whose_result_is_no_number_are_left_out_with_their_count():
    rows = [{"name": f"r{i}", "loss": loss} for i, loss in enumerate([3.0, None, math.nan, math.inf, 2.0])]
    kept, said = columns.without_output(rows, LAWS["chinchilla"])
    assert [row["name"] for row in kept] == ["r0", "r4"]
    assert said == ["3 rows have no finite loss and are left out: r1 (None); r2 (nan); r3 (inf)"]
    assert columns.without_output(rows[1:3], LAWS["chinchilla"])[0] == rows[1:3]  # then the message of `check` is right


def test_the_error_of_this_testbeds_rows_is_that_of_its_tasks_and_a_single_task_can_be_named(tmp_path):
    """Their column `error` is the text of a failure."""
    own = {"schema_version": 1, "status": "finished", "error": None, "val_loss": 3.0, "task_error": 0.5}
    made = [own | {"run_id": str(n), "n_params": n, "n_tokens": 20 * n, "error/bracket": 0.25} for n in (1000, 2000)]
    bad = {**made[0], "run_id": "bad", "status": "diverged", "error": "loss is nan at step 3", "task_error": None}
    path = write(tmp_path / "rows.jsonl", [*made, bad])
    rows, said = columns.read(path, None, [], "n_params")
    assert [(row["error"], row["accuracy"]) for row in rows] == [(0.5, 0.5)] * 2 and "1 diverged runs" in said[0]
    rows, _ = columns.read(path, None, ["error=error/bracket"], "n_params")
    assert [(row["error"], row["accuracy"]) for row in rows] == [(0.25, 0.75)] * 2
