"""Derivatives that are carried along equal those of finite differences, and a function without one is refused."""

import numpy as np
import pytest

from scaling_testbed.analysis.laws.fitting import fit
from scaling_testbed.analysis.laws.forms import HUBER, LAWS, Law, Param
from scaling_testbed.analysis.laws.slopes import COMPARISONS, PARTIALS, Sloped
from scaling_testbed.errors import UserError

X, Y = np.array([0.3, 0.7, 1.9]), np.array([1.4, 0.6, 2.2])


@pytest.mark.parametrize("ufunc", PARTIALS)
def test_each_function_has_its_derivative_in_each_argument(ufunc):
    given = (X, Y)[: ufunc.nin]
    for place in range(ufunc.nin):
        sloped = [Sloped(one, {"p": np.full(3, 2.0)}) if index == place else one for index, one in enumerate(given)]
        up, down = ([one + h * (index == place) for index, one in enumerate(given)] for h in (1e-6, -1e-6))
        found = ufunc(*sloped)
        np.testing.assert_array_equal(found.value, ufunc(*given))
        np.testing.assert_allclose(found.slopes["p"], 2 * (ufunc(*up) - ufunc(*down)) / 2e-6, rtol=1e-8, atol=1e-9)


def test_the_chain_rule_adds_over_paths_and_keeps_parameters_apart():
    a, b = Sloped(X, {"a": np.ones(3)}), Sloped(Y, {"b": np.ones(3)})
    found = np.where(X > 0.5, 3 * a**2 + a / b - 1, np.exp(b))
    at = X > 0.5
    np.testing.assert_allclose(found.slopes["a"], np.where(at, 6 * X + 1 / Y, 0))
    np.testing.assert_allclose(found.slopes["b"], np.where(at, -X / Y**2, np.exp(Y)))
    assert found.real is found.value and np.real(a) is X
    for compare in COMPARISONS:
        given = (a, b)[: compare.nin]
        np.testing.assert_array_equal(compare(*given), compare(*(one.value for one in given)))


def test_a_power_of_zero_has_no_slope_in_its_exponent():
    assert (np.zeros(2) ** Sloped(np.ones(2), {"p": np.ones(2)})).slopes["p"].tolist() == [0, 0]


@pytest.mark.parametrize(
    ("function", "name"), [(lambda p, x: np.sinh(p["a"]) * x["loss"], "sinh"), (lambda p, x: np.sum(p["a"]), "sum")]
)
def test_a_law_with_a_function_of_unknown_derivative_is_refused(function, name):
    law = Law("odd", "", "", ("loss",), "error", (Param("a", (0.1, 1.0)),), function, HUBER)
    with pytest.raises(UserError, match=rf"a law cannot use numpy.{name}; it can use .* where, absolute, .*expm1"):
        fit(law, {"loss": [1.0, 2.0]}, [1.0, 2.0])
    assert "odd" not in LAWS
