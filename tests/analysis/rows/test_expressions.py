"""Columns by arithmetic over columns: values, ranks, and what is refused."""

import numpy as np
import pytest

from scaling_testbed.analysis.rows.expressions import draw, ordered, rank, with_columns
from scaling_testbed.errors import ConfigError

ROWS = [{"a": 1.0, "b": 4, "s": "x"}, {"a": 3.0, "b": 1, "s": "y"}, {"a": 2.0, "b": 1, "s": "z"}]


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("a-b", [-3, 2, 1]),
        ("-(a + 2*b)/2 ** 2", [-2.25, -1.25, -1.0]),
        ("rank(a)", [0, 1, 0.5]),
        ("rank(b)", [1, 0.25, 0.25]),
        ("min(a, b, 2)", [1, 1, 1]),
        ("max(a, b)", [4, 3, 2]),
        ("log(exp(a)) + sqrt(b) - abs(0-a)", [2, 1, 1]),
        ("ordered(b, a)", [1, 0, 0]),
        ("7", [7, 7, 7]),
    ],
)
def test_an_expression_is_evaluated_for_each_row(text, values):
    found = with_columns("--column", [f"c = {text}"], ROWS)
    assert [row["c"] for row in found] == pytest.approx(values)
    assert all("c" not in row for row in ROWS) and found[0]["s"] == "x"


def test_a_later_column_uses_an_earlier_one():
    found = with_columns("--column", ["gap=b-a", "late=rank(gap)"], ROWS)
    assert [row["late"] for row in found] == [1, 0, 0.5]


def test_ordered_is_the_share_of_pairs_in_the_right_order():
    losses = [[3.0, 1.0], [2.5, 1.0], [2.0, 2.0]]
    assert ordered(*map(np.array, losses)).tolist() == pytest.approx([1, (0.5 + 0 + 0) / 3])
    assert rank([5.0]).tolist() == [0]


def test_draws_are_uniform_and_always_the_same():
    found = draw(np.arange(20_000))
    assert np.histogram(found, 10, (0, 1))[0] == pytest.approx([2000] * 10, abs=200)
    assert (
        abs(np.corrcoef(found[1:], found[:-1])[0, 1]) < 0.03 and abs(np.corrcoef(found, np.arange(20_000))[0, 1]) < 0.03
    )
    assert draw([7.0]) == found[7] and draw([-0.0]) == found[0]


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("c", "write NAME=EXPRESSION"),
        ("1c=a", "write NAME=EXPRESSION"),
        ("a=b", "there is a column a already"),
        ("c=(a", "cannot read the expression"),
        ("c=d", "no row has a column 'd'; the columns are"),
        ("c=s", "row 1 has no number as its s"),
        ("c=ranks(a)", "there is no function ranks; there are rank, ordered"),
        ("c=rank(a, b)", "rank takes one value; got 2"),
        ("c=ordered(a)", "ordered takes 2 values or more; got 1"),
        ("c=1/(a-2)", "the value of row 3 is not finite"),
        ("c=a if b else a", "is no arithmetic over columns"),
        ("c=a.real", "is no arithmetic over columns"),
        ("c=" + "a+" * 2000 + "a", "cannot read the expression"),
    ],
)
def test_what_is_no_expression_is_named(word, said):
    with pytest.raises(ConfigError) as error:
        with_columns("--column", [word], ROWS)
    assert said in str(error.value) and str(error.value).startswith("--column ")
