"""Learning-rate sensitivity (Wortsman et al. 2023, arXiv 2309.14322, section 2.2).

Let l(eta) be the final validation loss of the run with peak rate eta, and l0 the loss at initialisation. Then

    S = mean over the rates of [ min(l(eta), l0) - l* ],    l* = min over the rates of min(l(eta), l0)

over the rates of the grid within a range, by default 3e-4 to 3e-1. S is withheld unless the grid covers the range: both
ends were measured, neighbouring rates differ by at most a factor of ten, and every declared rate was run. It is also
withheld where rates were drawn: they are no grid, and a mean over them has other weights. A loss that
is not finite counts as l0. A run that was stopped as diverged also counts as l0, whatever the loss of its last weights;
the paper does not define this case. S compares two settings only if "learning rate" means the same in both (Appendix B
of the paper); see rate_meaning.py.

The minimum l* over noisy means is too low, so S is too large; the jackknife removes most of that. The interval is
Student's t over seeds, each with the rate that is best in the mean over seeds.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from scaling_testbed.analysis.curves.critical_rate import EXCESS, CriticalRate, critical_rate
from scaling_testbed.analysis.curves.grouping import Curve, curves
from scaling_testbed.analysis.curves.intervals import has_scipy, interval, jackknife
from scaling_testbed.analysis.curves.rate_meaning import curve_meaning, incomparable
from scaling_testbed.analysis.rows.conditions import same
from scaling_testbed.analysis.rows.study import LR, SIZE, Row, Study, name_of, number, several_origins
from scaling_testbed.errors import ConfigError, UserError
from scaling_testbed.learning.optimizers import AS_ADAMW

DEFAULT_RANGE = (3e-4, 3e-1)
WIDEST_GAP = 10  # the largest ratio of neighbouring rates in S; the paper's is 3.3
SAME_RATE = 0.12  # relative: a grid of half decades has 3.16e-4 for 3e-4, and 3e-4 for a third of 1e-3
SHIFT = 1 / 3  # the optimum of coupled decay is lower: the second range of the default is 1e-4 to 1e-1
MOST_NATS_AT_START = 100  # of rows of other projects: a perplexity starts at the size of the vocabulary
DRAWN = "optimizer.lr was drawn, and S needs a grid of rates; name= gives drawn runs a folder of their own"
DEFINITION = (
    "S = mean over the learning rates of min(final validation loss, loss at initialisation) minus the best of them, "
    "in nats per token; a run that diverged or ended in a loss that is not finite counts as the loss at initialisation."
)
BEST_LOSS = (
    "The best loss is the mean over seeds at the best rate, as measured. The lowest of several noisy means is somewhat "
    "too low; S, and the verdicts on best losses, are corrected for that."
)


@dataclass(frozen=True)
class Sensitivity:
    """S of one condition and size, in nats per token.

    s: None if it is withheld; `withheld` then holds the reason. by_seed: the S of each seed, whose mean is s; its
    lowest loss is that at the best rate of all seeds. low, high: 95 % interval over seeds, None with one seed or
    without scipy. best_lr, best_loss: the minimum of the mean over seeds, as measured; see BEST_LOSS.
    first_diverging_lr: the lowest rate with a diverged seed. critical: the critical rate; None where S is withheld.
    losses: (rate, mean over seeds of the capped loss, whether a seed diverged) for all rates of the study. rate_means:
    the meaning of one unit of the learning rate; None if the rows differ in it.
    """

    curve: Curve
    s: float | None
    low: float | None
    high: float | None
    best_lr: float | None
    best_loss: float | None
    first_diverging_lr: float | None
    n_lrs: int
    lr_range: tuple[float, float]
    range_rule: str
    withheld: str | None
    losses: list[tuple[float, float, bool]]
    critical: CriticalRate | None = None
    by_seed: Mapping[int, float] = field(default_factory=dict)
    rate_means: str | None = None

    def record(self) -> dict[str, object]:
        """The sensitivity as one flat row for tables, CSV and JSON. rate_means is None if it is that of AdamW."""
        return {
            **self.curve.condition,
            "n_params": self.curve.n_params,
            "S": self.s,
            "S_low": self.low,
            "S_high": self.high,
            "n_lrs": self.n_lrs,
            "n_seeds": len(self.curve.seeds),
            "lr_low": self.lr_range[0],
            "lr_high": self.lr_range[1],
            "range_rule": self.range_rule,
            "best_lr": self.best_lr,
            "best_loss": self.best_loss,
            "first_diverging_lr": self.first_diverging_lr,
            **(self.critical.record() if self.critical else {}),
            "note": self.note,
            "withheld": self.withheld,
            "rate_means": None if self.rate_means == AS_ADAMW else self.rate_means,
        }

    @property
    def share_below(self) -> float:
        """The share of S from rates below the best one."""
        if self.s is None or self.best_lr is None or self.best_loss is None:
            return 0.0
        inside = [(lr, loss - self.best_loss) for lr, loss, _ in self.losses if _inside(lr, self.lr_range)]
        whole = sum(excess for _, excess in inside)
        return sum(excess for lr, excess in inside if lr < self.best_lr) / whole if whole else 0.0

    @property
    def note(self) -> str | None:
        """A warning about rates that S depends on: the best one is at an end, or most of S is below the best one."""
        if self.s is None or self.best_lr is None:
            return None
        if said := at_an_end(self.best_lr, self.curve.lrs):
            return said
        return f"{self.share_below:.0%} of S is from rates below the best one" if self.share_below > 0.5 else None


def at_an_end(best_lr: float, lrs: Sequence[float]) -> str | None:
    """A warning that the best rate is at an end of the grid, None if it is not."""
    if best_lr not in (lrs[0], lrs[-1]):
        return None
    return f"the best rate is the {'lowest' if best_lr == lrs[0] else 'highest'} of the grid"


def capped(losses, initial) -> np.ndarray:
    """min(loss, loss at initialisation), as an array; a loss that is not finite becomes the loss at initialisation."""
    losses, initial = np.broadcast_arrays(np.asarray(losses, float), np.asarray(initial, float))
    return np.where(np.isfinite(losses), np.minimum(losses, initial), initial)


def sensitivity(losses, initial) -> float:
    """S of the final losses [n_lrs], all rates weighted equally. `initial` is a number or [n_lrs]. All are in nats."""
    values = capped(losses, initial)
    return float(values.mean() - values.min())


def by_seed(values_SL: np.ndarray, seeds: Sequence[int]) -> dict[int, float]:
    """The S of each seed, for capped losses [seeds, rates]: the mean over rates, less the loss at the best rate.

    The best rate is that of the mean over seeds, so that the mean of these numbers is the S of the mean loss. All are
    shifted by one number, by which the jackknife corrects that S.
    """
    best = int(values_SL.mean(axis=0).argmin())
    own_S = values_SL.mean(axis=1) - values_SL[:, best]
    shift = jackknife(lambda mean_L: float(mean_L.mean() - mean_L.min()), values_SL) - own_S.mean()
    return dict(zip(seeds, (own_S + shift).tolist(), strict=True))


def best_by_seed(values_SL: np.ndarray, seeds: Sequence[int]) -> dict[int, float]:
    """The loss of each seed at the best rate, for capped losses [seeds, rates].

    The best rate is that of the mean over seeds. All are shifted by one number, by which the jackknife corrects the
    minimum of the mean.
    """
    own_S = values_SL[:, int(values_SL.mean(axis=0).argmin())]
    shift = jackknife(lambda mean_L: float(mean_L.min()), values_SL) - own_S.mean()
    return dict(zip(seeds, (own_S + shift).tolist(), strict=True))


def final_loss(row: Row) -> float:
    """The final validation loss in nats; nan if the run diverged or its loss was not finite (null in the row).

    Raises UserError for a loss of zero or less.
    """
    return math.nan if row.get("status") == "diverged" else checked_loss(row, number(row, "val_loss"))


def checked_loss(row: Row, loss: float) -> float:
    """A loss of a row, as it is. Raises UserError if it is zero or less: no cross-entropy, so not a loss in nats."""
    if loss <= 0:
        raise UserError(f"{name_of(row)}: the loss is {loss:g}; losses must be in nats, above zero")
    return loss


def capped_loss(row: Row) -> float:
    """The final loss as it counts in S: at most the loss at initialisation, which also stands for a diverged run."""
    return float(capped(final_loss(row), number(row, "val_loss_initial")))


def diverged(row: Row) -> bool:
    """Whether a run diverged by its status, or because its final loss is not below its initial loss."""
    loss = final_loss(row)
    return not math.isfinite(loss) or loss >= number(row, "val_loss_initial")


def check_range(lr_range: Sequence[float]) -> tuple[float, float]:
    """The range of learning rates for S. Raises ConfigError if it is not a valid range."""
    numbers = isinstance(lr_range, Sequence) and all(isinstance(end, (int, float)) for end in lr_range)
    if not numbers or len(lr_range) != 2 or not 0 < lr_range[0] < lr_range[1] < math.inf:
        typed = ",".join(f"{end:g}" for end in lr_range) if numbers else repr(lr_range)
        raise ConfigError(f"--lr-range must be LOW,HIGH with 0 < LOW < HIGH; got {typed}")
    return lr_range[0], lr_range[1]


def analyse(
    study: Study,
    group: Sequence[str],
    size: str = SIZE,
    lr_range: tuple[float, float] = DEFAULT_RANGE,
    excess: float = EXCESS,
    rates: Sequence[float] = (),
) -> list[Sensitivity]:
    """S and the critical rate for every condition and size of a study.

    excess: that of the critical rate, in nats. rates: those that were declared; S of a curve is withheld if one of them
    lies in the range and was not run. Raises UserError if a row lacks a column that S needs.
    """
    for row in study.rows:
        if not math.isfinite(number(row, "val_loss_initial")):
            raise UserError(f"{name_of(row)} has no val_loss_initial; S needs it to cap the loss")
        if row.get("schema_version") is None and number(row, "val_loss_initial") > MOST_NATS_AT_START:
            value = number(row, "val_loss_initial")
            raise UserError(f"{name_of(row)}: val_loss_initial is {value:g}, a perplexity? S needs losses in nats")
    every = curves(study, group, size)
    measured = sorted({lr for curve in every for lr in curve.lrs})
    shifted_range = _shifted(lr_range, measured)
    inside = {_place(curve): curve for curve in curves(study, group, size, lr_range)}
    shifted = {_place(curve): curve for curve in curves(study, group, size, shifted_range)}
    meanings = [curve_meaning(whole) for whole in every]
    found = []
    for whole, meaning, reason in zip(every, meanings, incomparable(meanings), strict=True):
        reason = DRAWN if LR in study.drawn else reason
        best = _one(inside.get(_place(whole)), whole, lr_range, excess, rates)
        if same(whole.settings.get("optimizer.decay"), "coupled"):
            other = _one(shifted.get(_place(whole)), whole, shifted_range, excess, rates)
            best = _better_range(best, other, whole)
        found.append(_compared(best, meaning, reason))
    return found


def _compared(found: Sensitivity, meaning: str | None, reason: str | None) -> Sensitivity:
    """The sensitivity with the meaning of its learning rate; S is withheld if there is a `reason`."""
    if reason is None:
        return replace(found, rate_means=meaning)
    said = "; ".join(text for text in (reason, found.withheld) if text)
    return replace(_withheld_s(found, said), rate_means=meaning)


def _withheld_s(found: Sensitivity, reason: str | None) -> Sensitivity:
    return replace(found, s=None, low=None, high=None, critical=None, by_seed={}, withheld=reason)


def _place(curve: Curve) -> tuple:
    return (*curve.condition.items(), curve.shape, curve.n_params)


def _shifted(lr_range: tuple[float, float], measured: Sequence[float]) -> tuple[float, float]:
    """The second range of coupled decay; an end that is close to a measured rate is that rate."""
    low, high = (next((lr for lr in measured if _same_rate(lr, SHIFT * end)), SHIFT * end) for end in lr_range)
    return low, high


def _one(
    curve: Curve | None, whole: Curve, lr_range: tuple[float, float], excess: float, rates: Sequence[float]
) -> Sensitivity:
    reason = _withheld(curve, whole, lr_range, rates)
    points = [(lr, *_point(whole.rows(lr))) for lr in whole.lrs if whole.rows(lr)]
    finite = [point for point in points if curve and point[0] in curve.lrs]
    best_lr, best_loss, _ = min(finite, key=lambda point: point[1], default=(None, None, None))
    first = next((lr for lr, _, bad in points if bad), None)
    n_lrs = len(curve.lrs) if curve else 0
    found = Sensitivity(whole, None, None, None, best_lr, best_loss, first, n_lrs, lr_range, "", reason, points)
    return _measured(found, curve, excess) if curve and not reason else found


def _measured(found: Sensitivity, curve: Curve, excess: float) -> Sensitivity:
    """The sensitivity with S, its interval and the critical rate of a whole grid."""
    losses_SL = [[final_loss(curve.runs[lr, seed]) for lr in curve.lrs] for seed in curve.seeds]
    initial_SL = [[number(curve.runs[lr, seed], "val_loss_initial") for lr in curve.lrs] for seed in curve.seeds]
    values_SL = capped(losses_SL, initial_SL)
    own = by_seed(values_SL, curve.seeds)
    low = high = None
    if known := len(curve.seeds) > 1 and has_scipy():
        ends = interval(list(own.values()))
        low, high = ends.low, ends.high
    critical = critical_rate(curve.lrs, values_SL, curve.seeds, excess, known)
    return replace(found, s=float(np.mean(list(own.values()))), low=low, high=high, critical=critical, by_seed=own)


def _point(rows: Sequence[Row]) -> tuple[float, bool]:
    values = capped([final_loss(row) for row in rows], [number(row, "val_loss_initial") for row in rows])
    return float(values.mean()), any(diverged(row) for row in rows)


def _withheld(curve: Curve | None, whole: Curve, lr_range: tuple[float, float], rates: Sequence[float]) -> str | None:
    """The reason why S of the curve's rates in a range is not given. whole: the curve over all its rates."""
    others = f"--lr-range {whole.lrs[0]:g},{whole.lrs[-1]:g} gives S over the rates of the grid"
    if curve is None or len(curve.lrs) < 2:
        mend = f"; {others}" if len(whole.lrs) > 1 else ""
        return f"fewer than two learning rates in {lr_range[0]:g} to {lr_range[1]:g}{mend}"
    if several := several_origins(curve.runs.values()):
        return f"its rows {several}"
    if curve.missing:
        more = f" and {len(curve.missing) - 3} more" if len(curve.missing) > 3 else ""
        return f"{len(curve.missing)} missing: {'; '.join(curve.missing[:3])}{more}"
    if holes := [(lr, seed) for lr in curve.lrs for seed in curve.seeds if (lr, seed) not in curve.runs]:
        return "missing: " + "; ".join(f"lr={lr:g} seed={seed}" for lr, seed in holes)
    declared = [lr for lr in rates if _inside(lr, lr_range)]
    if absent := [lr for lr in declared if not any(math.isclose(lr, own, rel_tol=1e-6) for own in curve.lrs)]:
        return f"of its declared rates {', '.join(f'{lr:g}' for lr in absent)} was not run"
    if ends := _unmeasured(curve.lrs, lr_range):
        measured = f"its {len(curve.lrs)} rates in {lr_range[0]:g} to {lr_range[1]:g} leave out"
        return f"{measured} {' and '.join(f'{end:g}' for end in ends)}; {others}"
    if all(map(diverged, curve.runs.values())):
        return "no run ended below its loss at initialisation: S would be zero"
    gaps = [(low, high) for low, high in itertools.pairwise(curve.lrs) if high > 1.01 * WIDEST_GAP * low]
    return f"no rate was run between {gaps[0][0]:g} and {gaps[0][1]:g}" if gaps else None


def _better_range(main: Sensitivity, other: Sensitivity, whole: Curve) -> Sensitivity:
    """The smaller S of two ranges, as in the paper for coupled decay (Figure 6).

    If the ends of only one range were measured, that range is used. If the ends of neither were measured, the shifted
    range is considered only if it holds at least as many rates. Where both ranges are about equally good, the smaller
    of two noisy numbers is too low. That is small beside the interval, which still holds the truth
    (tests/analysis/curves/test_calibration.py), and it speaks for coupled decay, against the paper's claim.
    """
    main_whole, other_whole = (not _unmeasured(whole.lrs, one.lr_range) for one in (main, other))
    if main_whole > other_whole or (other.n_lrs < main.n_lrs and not other_whole):
        return replace(main, range_rule=_not_whole(other.lr_range))
    if other_whole > main_whole:
        return replace(other, range_rule=_not_whole(main.lr_range))
    rule = "coupled decay: smaller of two ranges"
    if main.s is None or other.s is None:
        return replace(_withheld_s(main, main.withheld or other.withheld), range_rule=rule)
    return replace(other if other.s < main.s else main, range_rule=rule)


def _inside(lr: float, lr_range: tuple[float, float]) -> bool:
    return lr_range[0] * (1 - 1e-9) <= lr <= lr_range[1] * (1 + 1e-9)


def _same_rate(one: float, other: float) -> bool:
    return math.isclose(one, other, rel_tol=SAME_RATE)


def _unmeasured(lrs: Sequence[float], lr_range: tuple) -> list[float]:
    """The ends of a range that are not among the rates."""
    return [end for end in lr_range if not any(_same_rate(lr, end) for lr in lrs)]


def _not_whole(lr_range: tuple) -> str:
    return f"coupled decay, but {lr_range[0]:g} to {lr_range[1]:g} was not measured whole"


def rates_note(found: Sequence[Sensitivity], lr_range: tuple[float, float]) -> str:
    """A note on the rates of S.

    It tells the number of rates in S, the measured rates outside the range, the ends of the range that were not
    measured, and the meaning of the rate if it differs from AdamW's.
    """
    every = sorted({lr for one in found for lr in one.curve.lrs})
    ranges = {lr_range, *(one.lr_range for one in found)}  # the range of coupled decay may differ
    inside = [lr for lr in every if any(_inside(lr, ends) for ends in ranges)]
    outside = [lr for lr in every if lr not in inside]
    shown = ", ".join(f"{lr:g}" for lr in inside) or "none"
    left_out = f"; outside, and left out: {', '.join(f'{lr:g}' for lr in outside)}" if outside else ""
    ends = _unmeasured(every, lr_range)
    left_out += f"; not measured: {' and '.join(f'{end:g}' for end in ends)}" if ends else ""
    said = " or ".join(f"[{low:g}, {high:g}]" for low, high in sorted(ranges, reverse=True))
    meanings = {one.rate_means for one in found}
    told = len(meanings) == 1 and not meanings & {None, AS_ADAMW}
    other = f" One unit of learning rate is {meanings.pop()}." if told else ""
    grids = {tuple(lr for lr in one.curve.lrs if lr in inside) for one in found if one.s is not None}
    no_scipy = any(len(one.curve.seeds) > 1 and one.s is not None and one.low is None for one in found)
    left_out += "; intervals over seeds need scipy: pip install -e '.[analysis]'" if no_scipy else ""
    differ = (
        " The curves have different rates: S is comparable where their number is the same." if len(grids) > 1 else ""
    )
    return f"Learning rates in {said} that enter S: {len(inside)} ({shown}){left_out}.{other}{differ}"
