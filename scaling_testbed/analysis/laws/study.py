"""A law fitted to the runs of a study: the rows used, the fit, each run beside its prediction, and the warnings."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from scaling_testbed.analysis.laws import columns, optima, selection
from scaling_testbed.analysis.laws.checks import (
    doubts,
    mixed_data,
    mixed_ends,
    mixed_settings,
    odd_exponents,
    unseen_settings,
)
from scaling_testbed.analysis.laws.downstream import Chain
from scaling_testbed.analysis.laws.fitted import Fit
from scaling_testbed.analysis.laws.fitting import DELTA, RESAMPLES, fit, problem_of
from scaling_testbed.analysis.laws.forms import LAWS, Law
from scaling_testbed.analysis.laws.prediction import (
    beside_chained,
    beside_fitted,
    beside_held_out,
    beside_selected,
    of_runs,
)
from scaling_testbed.analysis.rows.given import AT_HAND, Given, study_of
from scaling_testbed.analysis.rows.study import Row
from scaling_testbed.errors import ConfigError, UserError

Record = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Fitting:
    """Settings of a fit.

    objective: None for the law's own. delta: where Huber's function turns linear. starts: the number of starts.
    bootstrap: the number of resamples of the runs, 0 for no intervals, otherwise at least 20. seed: the seed of starts
    and resamples. size: the column that N counts.
    """

    objective: str | None = None
    delta: float = DELTA
    starts: int = 64
    bootstrap: int = RESAMPLES
    seed: int = 0
    size: str = "n_params"

    def __post_init__(self):
        for option, least in (("starts", 1), ("bootstrap", 0), ("seed", 0)):
            if not isinstance(getattr(self, option), int):
                raise ConfigError(f"--{option} must be a whole number; got {getattr(self, option)!r}")
            if getattr(self, option) < least:
                raise ConfigError(f"--{option} must be at least {least}; got {getattr(self, option)}")
        if not 0 < self.delta < math.inf:
            raise ConfigError(f"--delta must be a positive number; got {self.delta}")
        if 0 < self.bootstrap < 20:
            raise ConfigError(f"--bootstrap must be 0 or at least 20, for an interval; got {self.bootstrap}")

    def fit(
        self,
        law: Law,
        rows: Sequence[Row],
        objective: str | None,
        fixed: Mapping[str, float] | None = None,
        errors: Sequence[float] | None = None,
        run: str | None = None,
    ) -> Fit:
        """Fit `law` to rows that have its columns. errors: as in `fitting.fit`. run: as in Rows. Raises as
        `columns.values` and `fitting.fit` do."""
        inputs, observed = columns.values(rows, law)
        return fit(
            law,
            inputs,
            observed,
            objective=objective,
            delta=self.delta,
            fixed=fixed,
            starts=self.starts,
            bootstrap=self.bootstrap,
            seed=self.seed,
            size=self.size,
            errors=errors,
            runs=None if run is None else [row[run] for row in rows],
        )


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Rows with the columns of laws.

    origin: where the rows come from, for the record. said: notes on rows that were left out. mapping: as it was typed.
    run: the column that names the run of a row, if the rows are points of training curves; None: each row is a run.
    """

    rows: Sequence[Row]
    origin: str = AT_HAND
    said: Sequence[str] = ()
    mapping: Sequence[str] = ()
    run: str | None = None


@dataclass(frozen=True, kw_only=True)
class LawsReport:
    """Laws that were compared on the same runs.

    predictions: each held-out run beside its prediction. held_out_runs: of points of training curves, the errors of
    each held-out run.
    """

    selection: selection.Selection
    predictions: list[Record]
    warnings: list[str]
    origin: str
    where: list[str] = field(default_factory=list)
    hold_out: list[str] = field(default_factory=list)
    held_out_runs: list[Record] = field(default_factory=list)

    def record(self) -> Record:
        """The content of a saved file."""
        return {
            **self.selection.record(),
            "predictions": self.predictions,
            "warnings": self.warnings,
            "rows": self.origin,
            "where": self.where,
            "hold_out": self.hold_out,
            **({"held_out_runs": self.held_out_runs} if self.held_out_runs else {}),
        }


def law_rows(given: Given, *, source: str | None = None, mapping: Sequence[str] = (), size: str = "n_params") -> Rows:
    """Convert rows of any form to rows with the columns of laws.

    source: the name of a published testbed; `given` is then the path of a copy of it. mapping, size: as in
    columns.read. Raises as that function does.
    """
    if source is not None:
        found, said = columns.read(given, source, mapping, size)
        return Rows(rows=found, said=said, origin=str(given), mapping=mapping)
    study = study_of(given)
    found, said = columns.of_study(study, mapping, size)
    return Rows(rows=found, said=said, origin=str(study.path), mapping=mapping)


@dataclass(frozen=True, kw_only=True)
class FitReport:
    """A fitted law and the evidence for it.

    fitted: each fitted run beside the law's value. predictions: each held-out run beside the law's value. warnings:
    those about the fit and those about the rows. held_out_runs: of points of training curves, the errors of each
    held-out run.
    """

    fit: Fit
    fitted: list[Record]
    predictions: list[Record]
    warnings: list[str]
    origin: str
    where: list[str] = field(default_factory=list)
    hold_out: list[str] = field(default_factory=list)
    held_out_runs: list[Record] = field(default_factory=list)

    @property
    def law(self) -> Law:
        return LAWS[self.fit.law]

    def record(self) -> Record:
        """The content of a saved file: all fields of the fit, and those of the report."""
        return {
            **asdict(self.fit),
            "warnings": self.warnings,
            "formula": self.law.formula,
            "source": self.law.source,
            "rows": self.origin,
            "where": self.where,
            "hold_out": self.hold_out,
            "fitted": self.fitted,
            "predictions": self.predictions,
            **({"held_out_runs": self.held_out_runs} if self.held_out_runs else {}),
        }


@dataclass(frozen=True, kw_only=True)
class ChainReport:
    """A law of the loss chained with a law of the error.

    predictions: each held-out run, predicted from its size and tokens alone. only: the conditions on the rows of one
    law, under where_loss and where_error.
    """

    chain: Chain
    fitted_loss: list[Record]
    fitted_downstream: list[Record]
    predictions: list[Record]
    warnings: list[str]
    origin: str
    where: list[str]
    hold_out: list[str]
    only: dict[str, list[str]]

    def record(self) -> Record:
        """What is kept in a file."""
        typed = {"rows": self.origin, "where": self.where, "hold_out": self.hold_out, **self.only}
        fitted = {"fitted_loss": self.fitted_loss, "fitted_downstream": self.fitted_downstream}
        return {**asdict(self.chain), **typed, "warnings": self.warnings, **fitted, "predictions": self.predictions}


def law_named(name: str, option: str = "--law") -> Law:
    """The law of that name. Raises ConfigError, which lists the known laws, if there is none."""
    if not isinstance(name, str) or name not in LAWS:
        raise ConfigError(f"{option} must be one of {', '.join(LAWS)}; got {name!r}")
    return LAWS[name]


def laws_named(typed: str | None) -> list[Law]:
    """The laws of a comma-separated list; None: all laws of the loss in size and tokens."""
    return [law_named(name.strip(), "--laws") for name in (typed.split(",") if typed else selection.candidates())]


def compare_rows(
    given: Rows,
    laws: Sequence[Law],
    *,
    where: Sequence[str] = (),
    hold_out: Sequence[str] = (),
    fitting: Fitting | None = None,
) -> LawsReport:
    """Fit each of `laws` to the rows that match all of `where` and none of `hold_out`, compare them, and predict the
    held-out rows with an interval that does not take any law for true.

    Laws with more parameters than the rows allow are left out with a note. Points of training curves are compared run
    by run, and their AICc is withheld. Raises UserError or ConfigError; the laws must have the same output and be laws
    of size and tokens, and held-out points must be of other runs than the fitted ones.
    """
    fitting = fitting or Fitting()
    odd = [law.name for law in laws if law.name not in selection.candidates()]
    if odd or not laws:
        known = ", ".join(selection.candidates())
        raise ConfigError(
            f"--laws must be laws of the loss in size and tokens ({known}); got {', '.join(odd) or 'none'}"
        )
    kept, held = columns.select(given.rows, where, hold_out)
    said = [*given.said, *columns.check_sizes_and_losses([*kept, *held], (*laws[0].inputs, "loss"), given.mapping)]
    if given.run:
        _check_whole_runs(kept, held, given.run)
    kept, empty = columns.without_output(kept, laws[0])
    columns.values(kept, laws[0])  # raises once for all laws, which have the same columns
    fits, problems, missed = {}, {}, []
    for law in {law.name: law for law in laws}.values():
        try:
            fits[law.name] = fitting.fit(law, kept, fitting.objective, run=given.run)
        except UserError as error:
            missed.append(str(error))
            continue
        inputs, observed = columns.values(kept, law)
        runs = [row[given.run] for row in kept] if given.run else None
        problems[law.name] = problem_of(law, inputs, observed, fitting.objective, None, fitting.delta, runs)
    if not fits:
        raise UserError("; ".join([*missed, *said, *empty]))
    found = selection.compare(fits, problems, [6 * row["n_params"] * row["n_tokens"] for row in kept])
    best = fits[found.best]
    predictions = [beside_selected(found, row) for row in held]
    settings = mixed_settings(kept, laws[0]) or unseen_settings(kept, best, given.run)
    if given.run:
        settings += [*mixed_ends(kept, given.run), "AICc is withheld: the points of a run are not independent"]
    loose = [f"{name}: {text}" for name, one in found.laws.items() if one.share
             for text in one.fit.warnings if "not determined" in text]  # fmt: skip
    return LawsReport(
        selection=found,
        predictions=predictions,
        warnings=[*missed, *said, *empty, *loose, *mixed_data(kept), *settings, *doubts(predictions)],
        origin=given.origin,
        where=list(where),
        hold_out=list(hold_out),
        held_out_runs=of_runs(predictions, held, given.run, laws[0].inputs) if given.run else [],
    )


def _check_whole_runs(kept: Sequence[Row], held: Sequence[Row], run: str) -> None:
    """Raise ConfigError if points of one run are fitted and predicted: its errors would be too small."""
    if split := {row[run] for row in kept} & {row[run] for row in held}:
        raise ConfigError(
            f"--hold-out divides the curve of {min(split)}; hold out whole runs, such as --hold-out {run}={min(split)}"
        )


def fit_rows(
    given: Rows,
    law: Law,
    *,
    where: Sequence[str] = (),
    hold_out: Sequence[str] = (),
    fixed: Mapping[str, float] | None = None,
    fitting: Fitting | None = None,
) -> FitReport:
    """Fit `law` to the rows that match all of `where` and none of `hold_out`, and predict the held-out rows.

    A law about the best rate or batch is fitted to vertices of quadratics where they can be told (optima.py). Any other
    law about the best runs uses the run with the lowest loss at each value of its inputs. So do the held-out rows.
    Points of training curves have the weight of their run, and only laws of the loss can use them. fixed: parameters
    that are not fitted, with their values. Raises UserError or ConfigError; if there are too few rows, the message also
    names the rows that were left out.
    """
    fitting = fitting or Fitting()
    if fixed is not None and not (
        isinstance(fixed, Mapping) and all(isinstance(v, (int, float)) for v in fixed.values())
    ):
        raise ConfigError(f'fix must name parameters and their values, such as {{"E": 1.8}}; got {fixed!r}')
    if given.run and (law.output != "loss" or law.of_best):
        raise ConfigError(f"--curves: {law.name} is no law of the loss of a run; leave --curves out")
    kept, held = columns.select(given.rows, where, hold_out)
    said = [*given.said, *columns.check_sizes_and_losses([*kept, *held], (*law.inputs, law.output), given.mapping)]
    kept, empty = columns.without_output(kept, law)
    said += empty
    errors: list[float] | None = None
    if law.of_best:
        kept, errors, reduced = _best(kept, law)
        held, _, left_out = _best(held, law, 1) if held else (held, None, [])
        said += [*reduced, *(f"held out: {text}" for text in left_out)]
        if any("diverged" in text for text in said):
            said.append(f"other seeds may have diverged at a best {law.output}")
    try:
        found = fitting.fit(law, kept, fitting.objective, fixed, errors, given.run)
    except UserError as error:
        raise type(error)("; ".join([str(error), *said])) from None
    predictions = [beside_held_out(found, row) for row in held]
    mixed = [] if law.of_best else mixed_settings(kept, law) or unseen_settings(kept, found, given.run)
    mixed += mixed_ends(kept, given.run) if given.run else []
    return FitReport(
        fit=found,
        fitted=[beside_fitted(found, row) for row in kept],
        predictions=predictions,
        warnings=[*found.warnings, *odd_exponents(found), *said, *mixed_data(kept), *mixed, *doubts(predictions)],
        origin=given.origin,
        where=list(where),
        hold_out=list(hold_out),
        held_out_runs=of_runs(predictions, held, given.run, law.inputs) if given.run else [],
    )


def _best(rows: Sequence[Row], law: Law, least: int | None = None) -> tuple[list[Row], list[float] | None, list[str]]:
    """The best row at each value of a law's inputs, the errors of their outputs if they are known, and notes. The best
    is the vertex of a quadratic where there are enough of these, `least` as in optima.of_law."""
    vertices, errors, said = optima.of_law(rows, law, least)
    if vertices:
        return vertices, errors, said
    kept, notes = columns.best_of_each(rows, law)
    return kept, None, [*said, *notes]


def chain_rows(
    given: Rows,
    law: Law,
    error_law: Law,
    *,
    where: Sequence[str] = (),
    hold_out: Sequence[str] = (),
    where_loss: Sequence[str] = (),
    where_error: Sequence[str] = (),
    fitting: Fitting | None = None,
) -> ChainReport:
    """Fit a law of the loss and a law of the downstream error, and predict the error of each held-out run.

    The loss is a function of size and tokens, the error is a function of the loss. A prediction uses only the size and
    tokens of a run (Gadre et al. 2024, arXiv 2403.08540, section 4). where_loss, where_error: conditions on the rows of
    one law only. The objective of `fitting` applies to the law of the loss. Raises ConfigError if the two laws do not
    form a chain, and UserError if rows lack a column.
    """
    if error_law.inputs != ("loss",) or law.output != "loss":
        raise ConfigError(
            f"downstream chains a law of the loss with a law that takes the loss; got {law.name}, {error_law.name}"
        )
    fitting = fitting or Fitting()
    kept, held = columns.select(given.rows, where, hold_out)
    first, _ = columns.select(kept, where_loss, [], "--where-loss")
    second, _ = columns.select(kept, where_error, [], "--where-error")
    said = [*given.said, *columns.check_sizes_and_losses([*first, *held], (*law.inputs, law.output), given.mapping)]
    (first, no_loss), (second, no_error) = columns.without_output(first, law), columns.without_output(second, error_law)
    chain = Chain(fitting.fit(law, first, fitting.objective), fitting.fit(error_law, second, None))
    predictions = [beside_chained(chain, row) for row in held]
    return ChainReport(
        chain=chain,
        fitted_loss=[beside_fitted(chain.loss, row) for row in first],
        fitted_downstream=[beside_fitted(chain.downstream, row) for row in second],
        predictions=predictions,
        warnings=[*said, *no_loss, *no_error, *mixed_data([*first, *second]), *doubts(predictions)],
        origin=given.origin,
        where=list(where),
        hold_out=list(hold_out),
        only={"where_loss": list(where_loss), "where_error": list(where_error)},
    )
