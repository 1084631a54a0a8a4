"""A law fitted to the runs of a study: which rows count, the fit, each run beside its prediction, and the warnings."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from scaling_testbed.analysis.laws import columns
from scaling_testbed.analysis.laws.checks import far, mixed_data, mixed_settings
from scaling_testbed.analysis.laws.downstream import Chain
from scaling_testbed.analysis.laws.fitted import Fit
from scaling_testbed.analysis.laws.fitting import fit
from scaling_testbed.analysis.laws.forms import LAWS, Law
from scaling_testbed.analysis.laws.prediction import beside_chained, beside_fitted, beside_held_out
from scaling_testbed.analysis.rows.given import AT_HAND, Given, study_of
from scaling_testbed.analysis.rows.study import Row
from scaling_testbed.errors import ConfigError, UserError

Record = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Fitting:
    """How a law is fitted. objective: None for the law's own. starts: how many. bootstrap: resamples of the runs, 0 for
    no intervals, else 20 at least. seed: of starts and resamples. size: what N counts."""

    objective: str | None = None
    starts: int = 64
    bootstrap: int = 200
    seed: int = 0
    size: str = "n_params"

    def __post_init__(self):
        for option, least in (("starts", 1), ("bootstrap", 0), ("seed", 0)):
            if getattr(self, option) < least:
                raise ConfigError(f"--{option} must be at least {least}; got {getattr(self, option)}")
        if 0 < self.bootstrap < 20:
            raise ConfigError(f"--bootstrap must be 0 or at least 20, for an interval; got {self.bootstrap}")

    def fit(
        self, law: Law, rows: Sequence[Row], objective: str | None, fixed: Mapping[str, float] | None = None
    ) -> Fit:
        """`law` fitted to rows with its columns. Raises what `columns.values` and `fitting.fit` raise."""
        inputs, observed = columns.values(rows, law)
        return fit(
            law,
            inputs,
            observed,
            objective=objective,
            fixed=fixed,
            starts=self.starts,
            bootstrap=self.bootstrap,
            seed=self.seed,
            size=self.size,
        )


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Rows with the columns of laws. origin: where they lie, for the record. said: what is to be said of those that
    were left out."""

    rows: Sequence[Row]
    origin: str = AT_HAND
    said: Sequence[str] = ()


def law_rows(given: Given, *, source: str | None = None, mapping: Sequence[str] = (), size: str = "n_params") -> Rows:
    """Rows in any form, with the columns of laws. source: `given` is the path of a copy of this published testbed.
    mapping, size: as in columns.read. Raises what that raises."""
    if source is not None:
        found, said = columns.read(given, source, mapping, size)
        return Rows(rows=found, said=said, origin=str(given))
    study = study_of(given)
    found, said = columns.of_study(study, mapping, size)
    return Rows(rows=found, said=said, origin=str(study.path))


@dataclass(frozen=True, kw_only=True)
class FitReport:
    """A fitted law with what it is judged by. fitted, predictions: each run that was fitted, and each that was held
    out, beside the law's value. warnings: of the fit and of the rows."""

    fit: Fit
    fitted: list[Record]
    predictions: list[Record]
    warnings: list[str]
    origin: str
    where: list[str] = field(default_factory=list)
    hold_out: list[str] = field(default_factory=list)

    @property
    def law(self) -> Law:
        return LAWS[self.fit.law]

    def record(self) -> Record:
        """What is kept in a file: the fit with all its fields, and the rest beside them."""
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
        }


@dataclass(frozen=True, kw_only=True)
class ChainReport:
    """A law of the loss and a law of the error that were chained; predictions: each held-out run from its size and
    tokens alone. only: the conditions that chose the rows of one law, under where_loss and where_error."""

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
    """The law of that name. Raises ConfigError with those there are."""
    if name not in LAWS:
        raise ConfigError(f"{option} must be one of {', '.join(LAWS)}; got {name!r}")
    return LAWS[name]


def fit_rows(
    given: Rows,
    law: Law,
    *,
    where: Sequence[str] = (),
    hold_out: Sequence[str] = (),
    fixed: Mapping[str, float] | None = None,
    fitting: Fitting | None = None,
) -> FitReport:
    """Fit `law` to the rows that fit every condition of `where` and none of `hold_out`; those held out are predicted.

    A law about the best runs takes the run of least loss at each of its inputs, of the held-out rows too. fixed:
    parameters that are not fitted. Raises UserError and ConfigError, with what was left out where too few rows are."""
    fitting = fitting or Fitting()
    kept, held = columns.select(given.rows, where, hold_out)
    said = list(given.said)
    if law.of_best:
        kept, reduced = columns.best_of_each(kept, law)
        held, left_out = columns.best_of_each(held, law) if held else (held, [])
        said += [*reduced, *(f"held out: {text}" for text in left_out)]
        if any("diverged" in text for text in said):
            said.append(f"a best {law.output} may be one at which other seeds diverged")
    try:
        found = fitting.fit(law, kept, fitting.objective, fixed)
    except UserError as error:
        raise type(error)("; ".join([str(error), *said])) from None
    predictions = [beside_held_out(found, row) for row in held]
    mixed = [] if law.of_best else mixed_settings(kept, law)
    return FitReport(
        fit=found,
        fitted=[beside_fitted(found, row) for row in kept],
        predictions=predictions,
        warnings=[*found.warnings, *said, *mixed_data(kept), *mixed, *far(predictions)],
        origin=given.origin,
        where=list(where),
        hold_out=list(hold_out),
    )


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
    """Fit the loss as a law of size and tokens and the downstream error as a law of the loss, and predict the error of
    each held-out run from its size and tokens alone (Gadre et al. 2024, arXiv 2403.08540, section 4).

    where_loss, where_error: conditions on the rows of one law only. The objective is that of the law of the loss.
    Raises ConfigError for two laws that make no chain, UserError where rows lack what they need."""
    if error_law.inputs != ("loss",) or law.output != "loss":
        raise ConfigError(
            f"downstream chains a law of the loss with one of what follows; got {law.name}, {error_law.name}"
        )
    fitting = fitting or Fitting()
    kept, held = columns.select(given.rows, where, hold_out)
    first, _ = columns.select(kept, where_loss, [], "--where-loss")
    second, _ = columns.select(kept, where_error, [], "--where-error")
    chain = Chain(fitting.fit(law, first, fitting.objective), fitting.fit(error_law, second, None))
    predictions = [beside_chained(chain, row) for row in held]
    return ChainReport(
        chain=chain,
        fitted_loss=[beside_fitted(chain.loss, row) for row in first],
        fitted_downstream=[beside_fitted(chain.downstream, row) for row in second],
        predictions=predictions,
        warnings=[*given.said, *mixed_data([*first, *second]), *far(predictions)],
        origin=given.origin,
        where=list(where),
        hold_out=list(hold_out),
        only={"where_loss": list(where_loss), "where_error": list(where_error)},
    )
