"""A quadratic in one or two variables through noisy losses: its vertex, the interval of it, and its curvature.

Each seed has a level of its own, because runs of one seed have the same first weights and batches. An interval holds
the values at which the slope of the quadratic is not told from zero (Fieller 1954, Journal of the Royal Statistical
Society B 16:175), with Student's t. It is exact for losses that are a quadratic with normal noise, and open where the
curvature is not told from zero. tests/analysis/laws/test_optima.py measures how often intervals hold the truth.
"""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from scaling_testbed.analysis.laws.fitted import LEVEL
from scaling_testbed.errors import UserError

POINTS = (801, 161)  # of the search for an interval along each variable, with one and with two variables
EXACT = 1e-10  # relative: the noise of losses is at least this, so that exact losses have an interval too


@dataclass(frozen=True)
class Vertex:
    """One coordinate of the vertex of a quadratic in logarithms.

    low, high: the 95 % interval; both are None if it is open. error: the linearised standard error. rise: of the loss,
    for one unit of this variable away from the vertex; rise_error: its standard error.
    """

    at: float
    low: float | None
    high: float | None
    error: float
    rise: float
    rise_error: float


@dataclass(frozen=True)
class Quadratic:
    """loss = level of the seed + g u + u H u / 2, for u [K] with K of 1 or 2.

    theta: g, then H_ij for i <= j. covariance: of theta. freedom: the degrees of freedom of the noise. p_value: that
    the losses are a quadratic, by their means over seeds; 1 if there are no repetitions or no other settings.
    """

    theta: np.ndarray
    covariance: np.ndarray
    freedom: int
    p_value: float
    n_variables: int

    @property
    def hessian(self) -> np.ndarray:
        """H [K, K]."""
        h = self.theta[self.n_variables :]
        return np.array([[h[0]]]) if self.n_variables == 1 else np.array([[h[0], h[1]], [h[1], h[2]]])

    @property
    def is_convex(self) -> bool:
        return bool((np.linalg.eigvalsh(self.hessian) > 0).all())

    def vertex(self) -> np.ndarray:
        """The u [K] of the least loss of a convex quadratic."""
        return -np.linalg.solve(self.hessian, self.theta[: self.n_variables])

    def coordinates(self) -> list[Vertex]:
        """The coordinates of the vertex of a convex quadratic, with their intervals."""
        vertex_K, reach = self.vertex(), t_factor(self.freedom)
        inverse = np.linalg.inv(self.hessian)
        at_KP = _slope_terms(vertex_K[None])[0]
        error_K = np.sqrt(np.diag(inverse @ at_KP @ self.covariance @ at_KP.T @ inverse))
        told_K = self._not_told(vertex_K, error_K, reach)
        places = [self.n_variables, len(self.theta) - 1]  # of H_11 and H_22 in theta
        found = []
        for k in range(self.n_variables):
            (low, high), rise = told_K[k], float(self.theta[places[k]] / 2)
            rise_error = float(math.sqrt(self.covariance[places[k], places[k]]) / 2)
            found.append(Vertex(float(vertex_K[k]), low, high, float(error_K[k]), rise, rise_error))
        return found

    def _not_told(
        self, vertex_K: np.ndarray, error_K: np.ndarray, reach: float
    ) -> list[tuple[float, float] | tuple[None, None]]:
        """For each coordinate the ends of its values at which, with the best value of the other coordinate, the slope
        is not told from zero."""
        n = POINTS[self.n_variables - 1]
        sides = [v + 4 * reach * e * np.linspace(-1, 1, n) for v, e in zip(vertex_K, error_K, strict=True)]
        mesh = np.stack(np.meshgrid(*sides, indexing="ij"), axis=-1)
        terms = _slope_terms(mesh.reshape(-1, self.n_variables))
        slopes = terms @ self.theta
        spread = terms @ self.covariance @ terms.transpose(0, 2, 1)
        squares = np.einsum("mk,mk->m", slopes, np.linalg.solve(spread, slopes[:, :, None])[:, :, 0])
        squares = squares.reshape(mesh.shape[:-1])
        found: list[tuple[float, float] | tuple[None, None]] = []
        for k, side in enumerate(sides):
            least = squares.min(axis=tuple(set(range(self.n_variables)) - {k}))
            inside = np.flatnonzero(least <= reach**2)
            is_open = inside[0] == 0 or inside[-1] == n - 1 or len(inside) < inside[-1] - inside[0] + 1
            found.append((None, None) if is_open else (float(side[inside[0]]), float(side[inside[-1]])))
        return found


def _slope_terms(u_MK: np.ndarray) -> np.ndarray:
    """The matrices [M, K, P] that give the slope g + H u from theta."""
    n = u_MK.shape[1]
    terms = np.zeros((len(u_MK), n, n + n * (n + 1) // 2))
    terms[:, range(n), range(n)] = 1.0
    pairs = [(i, j) for i in range(n) for j in range(i, n)]
    for column, (i, j) in enumerate(pairs, n):
        terms[:, i, column] = u_MK[:, j]
        terms[:, j, column] = u_MK[:, i]
    return terms


def through(u_RK: np.ndarray, losses_R: Sequence[float], seeds: Sequence[Hashable]) -> Quadratic | None:
    """The quadratic of least squares through runs; None if they do not determine it, or leave nothing for the noise.

    u_RK: the variables of each run, measured from a place near the vertex. A seed has a level of its own only if every
    seed is at two settings or more.
    """
    y_R = np.asarray(losses_R, float)
    n = u_RK.shape[1]
    terms = [u_RK[:, i] for i in range(n)]
    terms += [u_RK[:, i] * u_RK[:, j] / (2 if i == j else 1) for i in range(n) for j in range(i, n)]
    setting_R = np.unique(u_RK, axis=0, return_inverse=True)[1].ravel()
    names = list(dict.fromkeys(seeds))
    seed_R = np.array([names.index(seed) for seed in seeds])
    if min(len(np.unique(setting_R[seed_R == seed])) for seed in range(len(names))) < 2:
        seed_R = np.zeros_like(seed_R)
    levels = np.eye(seed_R.max() + 1)[seed_R]
    design = np.column_stack([*terms, levels])
    rank = int(np.linalg.matrix_rank(design))
    freedom = len(y_R) - rank
    if rank < design.shape[1] or freedom < 1:
        return None
    inverse = np.linalg.inv(design.T @ design)
    theta = inverse @ design.T @ y_R
    left = float(np.sum((y_R - design @ theta) ** 2))
    variance = max(left / freedom, EXACT**2 * float(np.mean(y_R**2)))
    n_terms = len(terms)
    return Quadratic(
        theta=theta[:n_terms],
        covariance=inverse[:n_terms, :n_terms] * variance,
        freedom=freedom,
        p_value=_p_value(np.column_stack([np.eye(setting_R.max() + 1)[setting_R], levels]), y_R, left, freedom),
        n_variables=n,
    )


def _p_value(design: np.ndarray, y_R: np.ndarray, left: float, freedom: int) -> float:
    """The p-value of the F test of a quadratic against a mean for each setting: `left` and `freedom` are the squares
    and the degrees of freedom that the quadratic leaves."""
    fitted = design @ np.linalg.lstsq(design, y_R, rcond=None)[0]
    noise, spare = float(np.sum((y_R - fitted) ** 2)), len(y_R) - int(np.linalg.matrix_rank(design))
    if spare < 1 or freedom == spare:
        return 1.0
    ratio = max(left - noise, 0.0) / (freedom - spare) / max(noise / spare, 1e-300)
    return float(_special().fdtrc(freedom - spare, spare, ratio))


def t_factor(freedom: float) -> float:
    """The quantile of Student's t that bounds a two-sided 95 % interval. Raises UserError without scipy."""
    return float(_special().stdtrit(freedom, (1 + LEVEL) / 2))


def _special():
    try:
        from scipy import special
    except ImportError:
        raise UserError("intervals of optima need scipy: pip install -e '.[analysis]'") from None
    return special
