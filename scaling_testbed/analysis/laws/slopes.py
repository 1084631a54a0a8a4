"""Derivatives of a law in its parameters, carried along with its values (forward-mode differentiation).

A law is written with numpy. If its parameters are `Sloped`, so is its output: each operation applies the chain rule, so
the derivatives are exact up to rounding (Griewank and Walther 2008, Evaluating Derivatives, chapter 3). An array holds
only the derivatives in the parameters that it depends on.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from scaling_testbed.errors import UserError


class Sloped(np.lib.mixins.NDArrayOperatorsMixin):
    """An array and its derivatives: by the name of a parameter, arrays that broadcast with it."""

    def __init__(self, value: np.ndarray, slopes: Mapping[str, np.ndarray]):
        self.value = value
        self.slopes = dict(slopes)

    @property
    def real(self) -> np.ndarray:
        """The array as a constant, for steps whose derivative is not wanted."""
        return self.value

    def __array_ufunc__(self, ufunc, method, *given, **options):
        """Apply a numpy function of one or two arrays. Raises UserError if its derivative is not known here."""
        values = [one.value if isinstance(one, Sloped) else one for one in given]
        if method == "__call__" and ufunc in COMPARISONS:
            return ufunc(*values, **options)
        if method != "__call__" or ufunc not in PARTIALS or options:
            raise _unknown(ufunc.__name__)
        found = ufunc(*values)
        slopes: dict[str, np.ndarray] = {}
        for one, partial in zip(given, PARTIALS[ufunc], strict=True):
            if isinstance(one, Sloped):
                outer = partial(found, *values)
                for name, slope in one.slopes.items():
                    slopes[name] = slopes[name] + outer * slope if name in slopes else outer * slope
        return Sloped(found, slopes)

    def __array_function__(self, function, types, given, options):
        if function is np.where and len(given) == 3:
            return _where(*given)
        if function is np.real:
            return self.value
        if function is np.expand_dims and given[1:] == (-1,) and not options:
            return Sloped(self.value[..., None], {name: np.asarray(one)[..., None] for name, one in self._whole()})
        if function is np.sum and not given[1:] and options == {"axis": -1}:
            return Sloped(np.sum(self.value, axis=-1), {name: np.sum(one, axis=-1) for name, one in self._whole()})
        raise _unknown(function.__name__)

    def _whole(self) -> list[tuple[str, np.ndarray]]:
        """The derivatives, each of the shape of the array."""
        return [(name, np.broadcast_to(slope, np.shape(self.value))) for name, slope in self.slopes.items()]


def _where(condition: Any, one: Any, other: Any) -> Sloped:
    slopes = [side.slopes if isinstance(side, Sloped) else {} for side in (one, other)]
    values = [side.value if isinstance(side, Sloped) else side for side in (one, other)]
    names = dict.fromkeys([*slopes[0], *slopes[1]])
    chosen = {name: np.where(condition, slopes[0].get(name, 0.0), slopes[1].get(name, 0.0)) for name in names}
    return Sloped(np.where(condition, *values), chosen)


def _unknown(name: str) -> UserError:
    functions = sorted(ufunc.__name__ for ufunc in PARTIALS if ufunc not in OPERATORS)
    known = ", ".join(["where", *functions, "expand_dims(x, -1)", "sum(x, axis=-1)"])
    return UserError(f"a law cannot use numpy.{name}; it can use + - * / ** and comparisons, and numpy's {known}")


# Each function's derivative in each of its arguments, from its value and its arguments.
PARTIALS: dict[np.ufunc, tuple[Callable[..., Any], ...]] = {
    np.add: (lambda v, x, y: 1.0, lambda v, x, y: 1.0),
    np.subtract: (lambda v, x, y: 1.0, lambda v, x, y: -1.0),
    np.multiply: (lambda v, x, y: y, lambda v, x, y: x),
    np.divide: (lambda v, x, y: 1 / y, lambda v, x, y: -v / y),
    np.power: (lambda v, x, y: y * x ** (y - 1), lambda v, x, y: v * np.log(np.where(x == 0, 1.0, x))),
    np.negative: (lambda v, x: -1.0,),
    np.positive: (lambda v, x: 1.0,),
    np.exp: (lambda v, x: v,),
    np.expm1: (lambda v, x: v + 1,),
    np.log: (lambda v, x: 1 / x,),
    np.log10: (lambda v, x: 1 / (x * np.log(10.0)),),
    np.log2: (lambda v, x: 1 / (x * np.log(2.0)),),
    np.log1p: (lambda v, x: 1 / (1 + x),),
    np.logaddexp: (lambda v, x, y: np.exp(x - v), lambda v, x, y: np.exp(y - v)),
    np.sqrt: (lambda v, x: 0.5 / v,),
    np.square: (lambda v, x: 2 * x,),
    np.reciprocal: (lambda v, x: -v * v,),
    np.tanh: (lambda v, x: 1 - v * v,),
    np.arctan: (lambda v, x: 1 / (1 + x * x),),
    np.sin: (lambda v, x: np.cos(x),),
    np.cos: (lambda v, x: -np.sin(x),),
    np.absolute: (lambda v, x: np.sign(x),),
    np.minimum: (lambda v, x, y: np.where(x <= y, 1.0, 0.0), lambda v, x, y: np.where(x <= y, 0.0, 1.0)),
    np.maximum: (lambda v, x, y: np.where(x >= y, 1.0, 0.0), lambda v, x, y: np.where(x >= y, 0.0, 1.0)),
}
OPERATORS = (np.add, np.subtract, np.multiply, np.divide, np.power, np.negative, np.positive)
COMPARISONS = (
    *(np.less, np.less_equal, np.greater, np.greater_equal, np.equal, np.not_equal),
    *(np.isfinite, np.isnan, np.isinf, np.sign),
)
