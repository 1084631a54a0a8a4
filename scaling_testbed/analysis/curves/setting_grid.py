"""The runs of a study by the values of one setting, whole and comparable: what decisions.py decides from."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from scaling_testbed.analysis.curves.grouping import Curve, curves, grouping_keys
from scaling_testbed.analysis.curves.lr_sensitivity import best_by_seed, capped, checked_loss, final_loss
from scaling_testbed.analysis.rows.names import nearest_first
from scaling_testbed.analysis.rows.study import SIZE, Row, Study, name_of, number
from scaling_testbed.errors import ConfigError, UserError

SAME_SIZE = 0.02  # relative: a size as it is typed, and N of its models, which differs a little between values


@dataclass(frozen=True, kw_only=True)
class SettingGrid:
    """The curves of each value of a setting at each size, ascending up to the target, without a missing run.

    curves: [sizes][values]. sizes: the lowest N of each. seeds: those that all curves have. validation_set: whose loss
    is compared; None: the run's own. remarks: about runs that are left out.
    """

    values: list[str]
    sizes: list[float]
    seeds: list[int]
    curves: list[list[Curve]]
    validation_set: str | None
    remarks: list[str]

    def losses(self, size: int, lr: float | None) -> np.ndarray:
        """The losses [values, seeds] at a size and rate; if it is None, at the best rate of each value, less the bias
        of that choice."""
        return np.array([self._of_curve(curve, lr) for curve in self.curves[size]])

    def _of_curve(self, curve: Curve, lr: float | None) -> list[float]:
        lrs = curve.lrs if lr is None else [_own(lr, curve)]
        losses_SL = np.array([[self._loss(curve.runs[rate, seed]) for rate in lrs] for seed in self.seeds])
        return list(best_by_seed(losses_SL, self.seeds).values())

    def best_lr(self, curve: Curve) -> float:
        """The rate of a curve with the lowest mean loss over seeds."""
        return min(curve.lrs, key=lambda lr: np.mean([self._loss(curve.runs[lr, seed]) for seed in self.seeds]))

    def common_rates(self) -> list[float]:
        """The rates that all curves below the target have."""
        first, *others = [curve for found in self.curves[:-1] for curve in found]
        return [lr for lr in first.lrs if all(equal_rate(lr, curve.lrs) for curve in others)]

    def flops(self, sizes: Iterable[int], lr: float | None) -> float | None:
        """The training FLOPs of the runs at some sizes, at one rate or at all; None if a row does not tell them."""
        total = 0.0
        for curve in (curve for size in sizes for curve in self.curves[size]):
            for rate in curve.lrs if lr is None else [_own(lr, curve)]:
                for seed in self.seeds:
                    count = _flops(curve.runs[rate, seed])
                    if count is None:
                        return None
                    total += count
        return total

    def _loss(self, row: Row) -> float:
        """The final loss in nats.

        At most that at initialisation, which also stands for the loss of a run that diverged. It is the one on the
        run's own validation set, because before training all sets are alike to a model.
        """
        loss = final_loss(row)
        if self.validation_set is not None and math.isfinite(loss):
            loss = checked_loss(row, number(row["val_loss_by_set"], self.validation_set))
        if row.get("val_loss_initial") is None and math.isfinite(loss):
            return loss  # of a table of another project
        initial = number(row, "val_loss_initial")
        if not math.isfinite(initial):
            raise UserError(f"{name_of(row)} diverged and has no val_loss_initial, which stands for its loss")
        return float(capped(loss, initial))


def equal_rate(lr: float, lrs: Iterable[float]) -> float | None:
    """The one of some rates that equals a rate, apart from rounding; None if there is none."""
    return next((own for own in lrs if math.isclose(own, lr, rel_tol=1e-6)), None)


def _own(lr: float, curve: Curve) -> float:
    found = equal_rate(lr, curve.lrs)
    assert found is not None, "the rate is one of common_rates"
    return found


def _flops(row: Row) -> float | None:
    """The training FLOPs of a row, else 6 N D; None if neither is known."""
    if row.get("flops") is not None:
        return number(row, "flops")
    if row.get("n_params") is None or row.get("n_tokens") is None:
        return None
    return 6 * number(row, "n_params") * number(row, "n_tokens")


def setting_grid(
    study: Study, setting: Sequence[str], target_size: float | None, validation_set: str | None, size: str = SIZE
) -> SettingGrid:
    """The grid of a setting, given by its keys, up to a target size.

    Raises ConfigError for a key, size or set that no row has, and UserError if there are no two values, no smaller
    size, or if the losses of the values cannot be compared.
    """
    _check_keys(study, setting)
    by_value: dict[str, dict[tuple, Curve]] = {}
    for curve in curves(study, setting, size):
        value = curve.condition[setting[0]] if len(setting) == 1 else curve.label
        by_value.setdefault(value, {})[curve.shape] = curve
    whole, remarks = _whole(by_value)
    name = ", ".join(setting)
    if len(whole) < 2:
        why = f"; {'; '.join(remarks)}" if remarks else ""
        raise UserError(f"--setting {name}: {study.path} has one value of it, {next(iter(whole), 'none')}{why}")
    chosen = [[_of_its_runs(found[shape]) for found in whole.values()] for shape in _shapes(study, whole, target_size)]
    everywhere = [set(curve.seeds) for found in chosen for curve in found]
    seeds = sorted(set.intersection(*everywhere))
    if not seeds:
        raise UserError(f"{study.path}: no seed was run for all values of {name} at all sizes")
    if unused := sorted(set.union(*everywhere) - set(seeds)):
        remarks.append(f"not used, because some value or size lacks them: seeds {', '.join(map(str, unused))}")
    if partial := _partial_sizes(whole):
        remarks.append(f"not used, because some value lacks them: sizes N={', '.join(f'{n:,.0f}' for n in partial)}")
    if validation_set is None and not all(_tells_data(curve) for found in chosen for curve in found):
        remarks.append("the rows do not tell on which data their losses are; they must be the same for all values")
    for found in chosen:
        _check_data(found, name, validation_set)
    return SettingGrid(
        values=list(whole),
        sizes=[min(curve.n_params for curve in found) for found in chosen],
        seeds=seeds,
        curves=chosen,
        validation_set=validation_set,
        remarks=remarks,
    )


def _check_keys(study: Study, setting: Sequence[str]) -> None:
    """Raise ConfigError if no row has a key, or if the rows differ in others beside."""
    rows = [*study.rows, *study.missing]
    for key in setting:
        if not any(key in row for row in rows):
            there = nearest_first(key, (name for row in rows for name in row))
            raise ConfigError(f"--setting {key}: no row has this key; the keys are {there}")
    others = [key for key in grouping_keys(study, preferred=setting) if key not in setting]
    if others:
        raise ConfigError(
            f"the rows differ in {', '.join(others)} beside --setting {' '.join(setting)}: choose by --where "
            f"{others[0]}=VALUE, or add --setting {others[0]}"
        )


def _whole(by_value: dict[str, dict[tuple, Curve]]) -> tuple[dict[str, dict[tuple, Curve]], list[str]]:
    """The values without a missing run, and remarks about the others."""
    whole, remarks = {}, []
    for value, found in by_value.items():
        gaps = [gap for curve in found.values() for gap in _gaps(curve)]
        if gaps:
            more = f" and {len(gaps) - 1} more" if len(gaps) > 1 else ""
            remarks.append(f"{value} is left out, because runs are missing: {gaps[0]}{more}")
        else:
            whole[value] = found
    return whole, remarks


def _gaps(curve: Curve) -> list[str]:
    """The planned runs of a curve without a row, and the seeds that lack one of its rates."""
    if curve.planned:
        return [name_of(row) for row in curve.planned.values()]
    own = _of_its_runs(curve)
    return [f"lr={lr:g} seed={seed}" for lr in own.lrs for seed in own.seeds if (lr, seed) not in curve.runs]


def _of_its_runs(curve: Curve) -> Curve:
    """The curve with the rates and seeds that it has itself; other values may have others."""
    lrs, seeds = sorted({lr for lr, _ in curve.runs}), sorted({seed for _, seed in curve.runs})
    return Curve(**{**vars(curve), "lrs": lrs, "seeds": seeds, "missing": []})


def _shapes(study: Study, whole: dict[str, dict[tuple, Curve]], target_size: float | None) -> list[tuple]:
    """The shapes that all values have, ascending in N up to the target."""
    common = set.intersection(*(set(found) for found in whole.values()))
    n_of = {shape: [found[shape].n_params for found in whole.values()] for shape in common}
    shapes = sorted(common, key=lambda shape: (min(n_of[shape]), shape))
    if target_size is not None:
        near = [s for s in shapes if any(math.isclose(n, target_size, rel_tol=SAME_SIZE) for n in n_of[s])]
        exact = [s for s in near if target_size in n_of[s]] or near
        if len(exact) != 1:
            known = ", ".join(f"{min(n_of[shape]):.0f}" for shape in shapes) or "none"
            raise ConfigError(f"--target-size {target_size:g}: the sizes that all values have are N={known}")
        shapes = shapes[: shapes.index(exact[0]) + 1]
    if len(shapes) < 2:
        known = f"one size, N={min(n_of[shapes[0]]):.0f}" if shapes else "no size in common"
        upto = "" if target_size is None else " up to the target"
        raise UserError(f"{study.path}: a decision needs a size below the target, and the values have {known}{upto}")
    if min(n_of[shapes[0]]) <= 0:
        raise UserError(f"{study.path}: a model without layers has N=0; choose others by --where model.n_layers>0")
    return shapes


def _partial_sizes(whole: dict[str, dict[tuple, Curve]]) -> list[float]:
    """The lowest N of each shape that some values have and others lack."""
    lowest: dict[tuple, float] = {}
    for found in whole.values():
        for shape, curve in found.items():
            lowest[shape] = min(curve.n_params, lowest.get(shape, math.inf))
    return sorted(n for shape, n in lowest.items() if not all(shape in found for found in whole.values()))


def _tells_data(curve: Curve) -> bool:
    return all(row.get("data_fingerprint") for row in curve.runs.values())


def _check_data(found: Sequence[Curve], name: str, validation_set: str | None) -> None:
    """Raise an error if the losses of the values at one size are those on different data."""
    rows = [row for curve in found for row in curve.runs.values()]
    if validation_set is None:
        data = {row["data_fingerprint"] for row in rows if row.get("data_fingerprint")}
        if len(data) > 1:
            sets = sorted(set.intersection(*(set(row.get("evaluation_data") or {}) for row in rows)))
            raise UserError(
                f"the values of {name} have validation losses on {len(data)} sets of data, which cannot be compared: "
                f"give --validation-set NAME, of evaluation.sets; all runs have {', '.join(sets) or 'none'}"
            )
        return
    for row in rows:
        if validation_set not in (row.get("evaluation_data") or {}):
            sets = sorted(row.get("evaluation_data") or {})
            raise ConfigError(f"--validation-set {validation_set}: {name_of(row)} has {', '.join(sets) or 'no sets'}")
    if len({row["evaluation_data"][validation_set] for row in rows}) > 1:
        raise UserError(f"--validation-set {validation_set}: the set is of different data in different runs")
