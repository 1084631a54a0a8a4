"""Minimise a law's objective from many starts, or on many resamples of the rows, all at once.

The method is that of Levenberg and Marquardt with bounds: a variable that would leave its interval is held at the end.
Huber's function is not quadratic, and two matrices stand for its second derivative, both without the law's own. Only
rows with a residual under delta count in the true one, which may be singular. In the other, each row counts as in
iteratively reweighted least squares, min(1, delta/|r|), with which a full step cannot overshoot. The damping multiplies
the second, so that the method goes from reweighted squares to Newton's method as the damping falls.
"""

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from scaling_testbed.analysis.laws.fitting import Problem

MOST_STEPS = 400
LONGEST_STEP = 0.3  # of the starting ranges: longer first steps end at the bounds, in valleys without a way back
LESS, MORE = 0.25, 4.0  # factors of the damping after a step that lowers the objective, and after one that does not
LEAST_DAMPING, MOST_DAMPING = 1e-9, 1e12
CALM = 3  # so many steps in a row that change the objective by less than the tolerance end a descent
AT_ONCE = 2**22  # numbers in the slopes of the descents that are computed together, for the memory's sake


def minimise(
    problem: "Problem", starts: np.ndarray, counts: np.ndarray | None = None, tolerance: float = 1e-13
) -> tuple[np.ndarray, np.ndarray]:
    """The objective [B] and theta [B, n_free] that descents from `starts` [B, n_free] reach.

    counts: how often each descent counts each row [B, n_rows]; None: once. tolerance: the relative change of the
    objective under which a descent ends. The objective is inf where the law has no finite value or slope at the start.
    """
    size = max(1, AT_ONCE // (len(problem.observed) * starts.shape[1]))
    parts = [slice(begin, begin + size) for begin in range(0, len(starts), size)]
    found = [_descend(problem, starts[part], None if counts is None else counts[part], tolerance) for part in parts]
    return np.concatenate([values for values, _ in found]), np.concatenate([thetas for _, thetas in found])


def _descend(problem: "Problem", starts, counts, tolerance) -> tuple[np.ndarray, np.ndarray]:
    low, high = problem.bounds
    theta = np.clip(starts, low, high)
    if counts is None:
        counts = np.ones((len(theta), len(problem.observed)))
    residuals, slopes = problem.linearised(theta)
    value = _value(problem, residuals, slopes, counts)
    damping, calm = np.ones(len(theta)), np.zeros(len(theta), int)
    live = np.flatnonzero(np.isfinite(value))
    for _ in range(MOST_STEPS):
        if not len(live):
            break
        step, promised = _step(problem, theta[live], residuals[live], slopes[live], counts[live], damping[live])
        new = np.clip(theta[live] + step, low, high)
        there, slopes_there = problem.linearised(new)
        value_there = _value(problem, there, slopes_there, counts[live])
        fall = value[live] - value_there
        lower, still = fall > 0, tolerance * value[live]
        calm[live] = np.where((np.abs(fall) <= still) | (promised <= still), calm[live] + 1, 0)
        moved = live[lower]
        theta[moved], residuals[moved], slopes[moved] = new[lower], there[lower], slopes_there[lower]
        value[moved] = value_there[lower]
        damping[live] = np.maximum(damping[live] * np.where(lower, LESS, MORE), LEAST_DAMPING)
        live = live[(calm[live] < CALM) & (damping[live] < MOST_DAMPING)]
    return value, theta


def _value(problem: "Problem", residuals, slopes, counts) -> np.ndarray:
    whole = np.isfinite(residuals).all(axis=-1) & np.isfinite(slopes).all(axis=(-1, -2))
    return np.where(whole, problem.total(np.where(whole[:, None], residuals, 0.0), counts), np.inf)


def _step(problem: "Problem", theta, residuals, slopes, counts, damping) -> tuple[np.ndarray, np.ndarray]:
    """The steps [B, n_free], and the falls of the objective that its gradient promises for them."""
    (low, high), transposed = problem.bounds, slopes.transpose(0, 2, 1)
    pull, true, safe = (counts * one for one in problem.derivatives(residuals))
    gradient = (transposed @ pull[:, :, None])[:, :, 0]
    reweighted = (transposed * safe[:, None, :]) @ slopes
    diagonal = np.einsum("bii->bi", reweighted)
    diagonal = np.maximum(diagonal, 1e-12 * diagonal.max(axis=1, keepdims=True))
    diagonal = np.where(diagonal > 0, diagonal, 1.0)[:, :, None] * np.eye(theta.shape[1])
    by = damping[:, None, None]
    if true is safe or np.array_equal(true, safe):
        curvature = reweighted + by * diagonal
    else:
        curvature = (transposed * true[:, None, :]) @ slopes + by * (reweighted + 1e-3 * diagonal) + 1e-12 * diagonal
    held = ((theta <= low) & (gradient > 0)) | ((theta >= high) & (gradient < 0))
    gradient = np.where(held, 0.0, gradient)
    curvature = np.where(held[:, :, None] | held[:, None, :], 0.0, curvature) + held[:, :, None] * np.eye(len(low))
    scale = 1 / np.sqrt(np.einsum("bii->bi", curvature))
    scaled = curvature * scale[:, :, None] * scale[:, None, :] + 1e-14 * np.eye(len(low))
    step = -scale * np.linalg.solve(scaled, (scale * gradient)[:, :, None])[:, :, 0]
    length = np.max(np.abs(step) / problem.widths, axis=1, keepdims=True)
    step *= np.minimum(1.0, LONGEST_STEP / np.maximum(length, 1e-300))
    moved = np.clip(theta + step, low, high) - theta
    return step, -np.sum(gradient * moved, axis=1)
