"""The public API: `import scaling_testbed as st; st.train(...)`. `st.__all__` lists the functions.

Functions take overrides (in Hydra's grammar, as on the command line), paths of studies, or rows as mappings or as a
pandas DataFrame. They return dataclasses and plain rows. A list of overrides, conditions or keys that has one entry can
be given as a text. A function imports what it needs when it is called. An error of the user raises ConfigError (a wrong
key or value) or UserError (a wrong file, run or machine), with one line.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas

    from scaling_testbed.analysis.curves.calls import Call
    from scaling_testbed.analysis.curves.decisions import Decisions
    from scaling_testbed.analysis.curves.instability import Extrapolation
    from scaling_testbed.analysis.curves.lr_sensitivity import Sensitivity
    from scaling_testbed.analysis.laws.downstream import Chain
    from scaling_testbed.analysis.laws.fitted import Fit
    from scaling_testbed.analysis.laws.groups import GroupsReport
    from scaling_testbed.analysis.laws.next_runs import NextRuns
    from scaling_testbed.analysis.laws.selection import Selection
    from scaling_testbed.analysis.laws.study import ChainReport, FitReport, LawsReport, Rows
    from scaling_testbed.analysis.rows.given import Given
    from scaling_testbed.analysis.rows.study import Row
    from scaling_testbed.analysis.trajectories.critical_batch import CriticalBatches
    from scaling_testbed.config.run import RunConfig
    from scaling_testbed.data.tokenizers import ByteTokenizer, JsonTokenizer
    from scaling_testbed.model.transformer import Transformer
    from scaling_testbed.sweeps.grid import Sweep
    from scaling_testbed.sweeps.plan import PlannedRun

    Kept = (
        FitReport | LawsReport | GroupsReport | ChainReport | Fit | Selection | Chain | str | Path
    )  # a law, or where it is kept

Texts = Sequence[str] | str


def compose(overrides: Texts = ()) -> RunConfig:
    """Build the frozen configuration of a run from `overrides`. Raises ConfigError, which names the wrong key."""
    from scaling_testbed.config.compose import compose

    return compose(_texts(overrides))


def train(run: RunConfig | Texts, *, quiet: bool = True) -> Row:
    """Train a run and return its row, the content of result.json: losses in nats per token, parameters, tokens, FLOPs,
    the flat configuration. A run that was stopped continues, and the row of a finished run is returned at once, if its
    data and plug-ins are still the same.

    `status` in the row is finished, diverged, or preempted if a signal stopped the run; the same call continues it.
    quiet: print no progress. Raises UserError for an error that the user can correct."""
    from scaling_testbed.config.run import RunConfig
    from scaling_testbed.training.run import train

    return train(run if isinstance(run, RunConfig) else compose(run), quiet=quiet)


def plan(sweep: str | Path, overrides: Texts = (), *, scale: str | None = None, processes: int = 1) -> list[PlannedRun]:
    """List the runs of a sweep and what they cost. Trains nothing.

    sweep: a name in configs/sweep/, or the path of a .yaml file. overrides: apply to every run; `key=a,b` makes an
    axis; plugins= and configs= work as on the command line. scale: one of the scales of the file; None: its first.
    processes: of each run; they decide the memory on each GPU. Raises ConfigError."""
    from scaling_testbed.errors import check_positive

    check_positive("processes", processes)
    return _planned(_sweep(sweep, overrides, scale), processes)


def run_sweep(
    sweep: str | Path,
    overrides: Texts = (),
    *,
    scale: str | None = None,
    workers: int = 1,
    gpus: Sequence[str | int] | str = (),
    runs_per_gpu: int = 1,
    retry: bool = False,
    fresh: bool = False,
    stop_hopeless: float | None = None,
) -> list[Row]:
    """Run a sweep on this machine and return the rows of its runs. `workers` processes run at a time, or `runs_per_gpu`
    on each of `gpus` ([0, 1] or "0,1"). Finished runs are not run again, and killed runs continue. retry: run failed
    runs again. fresh: start a new Python interpreter for each run, and not a fork of one process that has imported
    PyTorch. stop_hopeless: stop each run whose predicted final loss, at the low end of its interval, is more than so
    many nats above the best finished run of its size, tokens and data; its row has the status hopeless and no val_loss.

    Raises ConfigError before anything is started. Raises UserError at the end if a run failed (it names each), or if a
    signal stopped the sweep. The rows of finished runs are then in the folder, and `load_rows` reads them."""
    from scaling_testbed.errors import UserError, check_not_negative
    from scaling_testbed.sweeps.local import Driver, slots
    from scaling_testbed.sweeps.plan import remember, sweep_folder
    from scaling_testbed.sweeps.status import rows

    chosen = _sweep(sweep, overrides, scale)
    runs = _planned(chosen)
    names = gpus.split(",") if isinstance(gpus, str) else map(str, gpus)
    places = slots(workers, list(filter(None, names)), runs_per_gpu)
    if stop_hopeless is not None:
        check_not_negative("stop_hopeless", stop_hopeless)
    remember(runs, chosen)
    driver = Driver(runs, places, retry=retry, warm=not fresh, stop_hopeless=stop_hopeless)
    status, folder = driver.drive(), sweep_folder(runs)
    if status:
        failed = "; ".join(f"{run_id}: {error}" for run_id, error in driver.failures.items())
        raise UserError(f"{folder}: {failed or 'stopped by a signal; the same call goes on'}")
    ids = {run.run_id for run in runs}
    return [row for row in rows(folder) if row.get("run_id") in ids]


def _sweep(name: str | Path, overrides: Texts, scale: str | None) -> Sweep:
    from scaling_testbed.config.compose import outside_of
    from scaling_testbed.sweeps.grid import load_sweep, narrowed

    plugins, configs, others = outside_of(_texts(overrides))
    return narrowed(load_sweep(str(name), scale, plugins=plugins, configs=configs), others)


def _texts(given: Texts) -> list[str]:
    """A list of texts, or one of a text alone, which is a sequence of letters too. Raises ConfigError for others."""
    from scaling_testbed.errors import ConfigError

    texts = [given] if isinstance(given, str) else list(given) if isinstance(given, Iterable) else [given]
    if bad := [one for one in texts if not isinstance(one, str)]:
        raise ConfigError(f"give texts such as KEY=VALUE; got {type(bad[0]).__name__} {bad[0]!r}")
    return texts


def _planned(sweep: Sweep, processes: int = 1) -> list[PlannedRun]:
    from scaling_testbed.sweeps.plan import plan

    runs, same = plan(sweep, processes)
    if same:
        warnings.warn(f"{same} combinations are the same run as an earlier one and count once", stacklevel=3)
    return runs


def load_rows(path: str | Path, where: Texts = (), *, frame: bool = False) -> list[Row] | pandas.DataFrame:
    """Read the rows of a sweep's folder or of a file (.jsonl, .json, .csv, .parquet): one for each run that is finished
    or diverged and meets every condition ("model.qk_norm=none", "flops<5e20"). frame: return a DataFrame with one
    column for each field. Warns of runs that were planned or started and have no result. Raises UserError and
    ConfigError."""
    from scaling_testbed.analysis.rows.given import study_of

    study = study_of(path, _texts(where))
    if study.missing:
        warnings.warn(f"{path}: {len(study.missing)} runs have no result and are left out", stacklevel=2)
    if not frame:
        return study.rows
    import pandas

    return pandas.DataFrame(study.rows)


@dataclass(frozen=True, kw_only=True)
class LoadedRun:
    """The origin of a loaded model: its run, the step of the checkpoint, and the folder of the run's data."""

    run: RunConfig
    step: int
    data_folder: Path

    @property
    def tokenizer(self) -> ByteTokenizer | JsonTokenizer:
        """The tokenizer of the run's data. Raises UserError if the data was given as token ids."""
        from scaling_testbed.data.tokenizers import load_tokenizer

        return load_tokenizer(self.data_folder)


def load_model(
    run_dir: str | Path,
    *,
    step: int | None = None,
    device: str = "cpu",
    plugins: Texts = (),
    average: bool = False,
) -> tuple[Transformer, LoadedRun]:
    """Load a saved model of runs/NAME/RUN_ID in evaluation mode, with its run and tokenizer. `model(tokens_BS)` gives
    the hidden states; times `model.head_weight_VD.T` they are the logits.

    step: of the checkpoint; None: the newest. plugins: plug-ins of the run that may be loaded, as after --plugins.
    average: the average of the weights in place of the last ones. Raises UserError if there is no such checkpoint, if
    it is damaged, or if the data has changed. Raises ConfigError for a device that is not available."""
    import torch

    from scaling_testbed.config.compose import recorded_run
    from scaling_testbed.errors import ConfigError, first_line
    from scaling_testbed.evaluation.loading import load_model
    from scaling_testbed.plugins import load_plugins

    try:
        place = torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:  # AssertionError: PyTorch was not built for it
        raise ConfigError(f"device={device!r} cannot be used here: {first_line(error)}") from None
    load_plugins(_texts(plugins))
    run = recorded_run(Path(run_dir))
    step, model, data = load_model(run, Path(run_dir), step=step, device=place, average=average)
    return model, LoadedRun(run=run, step=step, data_folder=data.folder)


def lr_sensitivity(
    rows: Given,
    *,
    where: Texts = (),
    group: Texts | None = None,
    size: str | None = None,
    lr_range: tuple[float, float] | None = None,
) -> list[Sensitivity]:
    """Compute the learning-rate sensitivity S of each size and condition (Wortsman et al. 2023, arXiv 2309.14322,
    section 2.2), in nats per token.

    group: the keys that tell conditions apart, by default all that vary. size: what N counts, by default the parameters
    outside embedding and head. lr_range: the rates that count, by default those that the sweep declares, else 3e-4 to
    3e-1. S is None if it is withheld; `withheld` is the reason. Raises UserError and ConfigError."""
    from scaling_testbed.analysis.curves.grouping import grouping_keys
    from scaling_testbed.analysis.curves.lr_sensitivity import analyse, check_range
    from scaling_testbed.analysis.rows.given import study_of
    from scaling_testbed.papers.declaration import of_study
    from scaling_testbed.papers.paper import experiment_of

    study = study_of(rows, _texts(where))
    keys = grouping_keys(study, None if group is None else _texts(group), experiment_of(study)[1].group)
    declared, _ = of_study(study)
    rates = declared.rates if lr_range is None else ()
    chosen = check_range(lr_range or declared.lr_range)
    return analyse(study, keys, _size(size), chosen, declared.critical_excess, rates)


def instability(
    rows: Given,
    *,
    quantity: str | None = None,
    threshold: float | None = None,
    eps: float | None = None,
    hold_out_largest: bool = False,
    where: Texts = (),
    group: Texts | None = None,
    size: str | None = None,
) -> Extrapolation:
    """Fit log(quantity) by a quadratic in log N at each learning rate, and extrapolate it with a 95 % prediction
    interval to planned runs without a row, or to the largest size, held out (Wortsman et al. 2023, section 3.3,
    Figures 9 and 11).

    quantity: a diagnostic, by default the one that the sweep is about, else attention_logit_max/0. threshold: a run is
    unstable above it. eps: a run is unstable below it, as a mean over the last steps. Raises UserError and
    ConfigError."""
    from scaling_testbed.analysis.curves.grouping import grouping_keys
    from scaling_testbed.analysis.curves.instability import Extrapolation, analyse, chosen_quantity
    from scaling_testbed.analysis.rows.given import study_of
    from scaling_testbed.papers.paper import experiment_of

    study = study_of(rows, _texts(where))
    _, experiment = experiment_of(study)
    chosen = chosen_quantity(experiment.quantities, quantity, threshold, eps)
    keys = grouping_keys(study, None if group is None else _texts(group), experiment.group)
    return Extrapolation(chosen, *analyse(study, keys, chosen, hold_out_largest, _size(size)))


def calls(
    rows: Given, model: str, *, quantity: str | None = None, where: Texts = (), group: Texts | None = None
) -> list[Call]:
    """Call at which learning rates a model that was not trained will be harmed, from the smaller sizes of a study.

    model: a choice of configs/model, e.g. "nano_l"; in each condition it has the settings of the study's models. A rate
    harms where the loss is at least the declared excess above the best. See analysis/curves/calls.py. Raises UserError
    and ConfigError."""
    from scaling_testbed.analysis.curves.calls import make_calls
    from scaling_testbed.analysis.curves.grouping import grouping_keys
    from scaling_testbed.analysis.curves.instability import chosen_quantity
    from scaling_testbed.analysis.rows.given import study_of
    from scaling_testbed.papers.declaration import of_study
    from scaling_testbed.papers.paper import experiment_of

    study = study_of(rows, _texts(where))
    _, experiment = experiment_of(study)
    chosen = chosen_quantity([one for one in experiment.quantities if one.above], quantity)
    keys = grouping_keys(study, None if group is None else _texts(group), experiment.group)
    declared, _ = of_study(study)
    size = _size_like(model)
    return make_calls(study, keys, chosen, model, size, declared.critical_excess, declared.lr_range)


def decide(
    rows: Given,
    setting: Texts,
    *,
    target_size: float | None = None,
    lr: float | None = None,
    small_lr: float | None = None,
    validation_set: str | None = None,
    where: Texts = (),
    size: str | None = None,
) -> Decisions:
    """Compute the decision accuracy of small runs: the share of pairs of values of a setting whose order at a large
    size they predict (Magnusson et al. 2025, arXiv 2504.11393), for each smaller size, with the rate tuned for each
    value, one rate for all, and one small rate for all.

    setting: the key whose values are compared, or several keys that vary together. target_size: N of the target, by
    default the largest. lr: the only rate of "one rate", by default each in turn. small_lr: by default the lowest of
    the grid. validation_set: compare the losses on this one of evaluation.sets. size: what N counts, by default the
    parameters outside embedding and head. See analysis/curves/decisions.py. Raises UserError and ConfigError."""
    from scaling_testbed.analysis.curves.decisions import decide
    from scaling_testbed.analysis.rows.given import study_of

    return decide(
        study_of(rows, _texts(where)),
        _texts(setting),
        target_size,
        lr=lr,
        small_lr=small_lr,
        validation_set=validation_set,
        size=_size(size),
    )


def critical_batch(
    rows: Given,
    *,
    levels: Sequence[float] | None = None,
    where: Texts = (),
    size: str = "n_params",
    columns: Mapping[str, str] | None = None,
    first_step: int | None = None,
) -> CriticalBatches:
    """Compute the critical batch of each size at each loss, from the training curves of runs with several batches at a
    constant rate (McCandlish et al. 2018, arXiv 1812.06162; Su et al. 2024, arXiv 2403.06563).

    levels: losses in nats per token, by default round ones. first_step: the first step of a curve that counts, by
    default twice the warm-up and at least 60. columns: maps a name of this project to a column of the table. size: what
    N counts. See analysis/trajectories/critical_batch.py. Raises UserError and ConfigError."""
    from scaling_testbed.analysis.trajectories.critical_batch import critical_batches

    return critical_batches(
        rows, levels=levels, where=_texts(where), mapping=_mapping(columns), size=size, first_step=first_step
    )


def _size_like(model: str) -> Callable[[Mapping[str, Any]], float]:
    """The non-embedding parameters of a model, with the qk-norm, MLP and vocabulary of a row."""
    from scaling_testbed.config.compose import compose
    from scaling_testbed.model.counting import count_params

    plain = compose([f"model={model}"]).model

    def size(row: Mapping[str, Any]) -> float:
        kept = ("qk_norm", "qk_norm_axis", "mlp", "norm", "residual", "linear", "kappa", "tied_head")
        own = {key: row[f"model.{key}"] for key in kept if f"model.{key}" in row}
        config = dataclasses.replace(plain, **own).resolved(int(row.get("model.vocab_size") or 256))
        return float(count_params(config).n_params_non_embedding)

    return size


def _size(size: str | None) -> str:
    from scaling_testbed.analysis.rows.study import SIZE
    from scaling_testbed.config.budget import CONVENTIONS
    from scaling_testbed.errors import check_choice

    check_choice("--size", size or SIZE, CONVENTIONS)
    return size or SIZE


def law_rows(
    rows: Given,
    *,
    source: str | None = None,
    columns: Mapping[str, str] | None = None,
    size: str = "n_params",
    curves: bool = False,
) -> Rows:
    """Rows with the columns that laws need. source: `rows` is the path of a copy of this published testbed. columns:
    maps a name of this project to a column of the table, {"n_params": "Params (M)*1e6"}. size: what N counts. curves:
    the rows are points of training curves. Raises UserError and ConfigError."""
    from scaling_testbed.analysis.laws import study
    from scaling_testbed.analysis.trajectories.points import law_points
    from scaling_testbed.errors import ConfigError

    if curves and source is not None:
        raise ConfigError("curves: a published testbed has no training curves; leave source out")
    if curves:
        return law_points(rows, mapping=_mapping(columns), size=size)
    return study.law_rows(rows, source=source, mapping=_mapping(columns), size=size)


def _mapping(columns: Mapping[str, str] | None) -> list[str]:
    """The columns as --map has them."""
    from scaling_testbed.errors import ConfigError

    if not isinstance(columns, (Mapping, NoneType)):
        raise ConfigError(f'columns must be a mapping such as {{"n_params": "Params (M)*1e6"}}; got {columns!r}')
    return [f"{ours}={theirs}" for ours, theirs in (columns or {}).items()]


def fit(
    rows: Given,
    law: str = "chinchilla",
    *,
    where: Texts = (),
    hold_out: Texts = (),
    fix: Mapping[str, float] | None = None,
    objective: str | None = None,
    delta: float = 1e-3,
    starts: int = 64,
    bootstrap: int = 2000,
    seed: int = 0,
    size: str = "n_params",
    source: str | None = None,
    columns: Mapping[str, str] | None = None,
    curves: bool = False,
) -> FitReport:
    """Fit a scaling law to runs, from many starts, with bootstrap intervals over runs. `analyze law list` names the
    laws.

    The result holds the fit, each fitted and each held-out run beside the value of the law, and the warnings. Its
    `record()` is what `analyze fit --out` keeps. hold_out: runs that meet any of these conditions are predicted, not
    fitted. fix: parameters with a given value. objective: huber_log, lsq or lsq_log; None: that of the law. delta:
    where Huber's function turns linear. starts: of the optimisation. bootstrap: resamples of the runs; 0: no intervals.
    source: `rows` is the path of a copy of this published testbed. columns: maps a name of this project to a column of
    the table. size: what N counts. curves: fit the evaluations in mid-run that are ends of shorter runs, too, each run
    with the same weight. Raises UserError and ConfigError."""
    from scaling_testbed.analysis.laws.study import Fitting, fit_rows, law_named

    fitting = Fitting(objective=objective, delta=delta, starts=starts, bootstrap=bootstrap, seed=seed, size=size)
    chosen, given = law_named(law), law_rows(rows, source=source, columns=columns, size=size, curves=curves)
    return fit_rows(given, chosen, where=_texts(where), hold_out=_texts(hold_out), fixed=fix, fitting=fitting)


def fit_groups(
    rows: Given,
    law: str,
    by: str,
    *,
    where: Texts = (),
    hold_out: Texts = (),
    fix: Mapping[str, float] | None = None,
    objective: str | None = None,
    delta: float = 1e-3,
    starts: int = 64,
    bootstrap: int = 2000,
    seed: int = 0,
    size: str = "n_params",
    source: str | None = None,
    columns: Mapping[str, str] | None = None,
) -> GroupsReport:
    """Fit a law to groups of runs together, with parameters that the groups share and parameters of their own.

    by: the column whose values are the groups, such as the data set. The other arguments are those of `fit`. The result
    holds the ways of sharing side by side, the one that is taken and why, and the fit of each group; `predict` and
    `allocate` take it with `of`, the value of the group. See analysis/laws/groups.py. Raises UserError and
    ConfigError."""
    from scaling_testbed.analysis.laws.groups import fit_groups
    from scaling_testbed.analysis.laws.study import Fitting, law_named

    fitting = Fitting(objective=objective, delta=delta, starts=starts, bootstrap=bootstrap, seed=seed, size=size)
    chosen, given = law_named(law), law_rows(rows, source=source, columns=columns, size=size)
    return fit_groups(given, chosen, by, where=_texts(where), hold_out=_texts(hold_out), fixed=fix, fitting=fitting)


def compare_laws(
    rows: Given,
    laws: Sequence[str] | None = None,
    *,
    where: Texts = (),
    hold_out: Texts = (),
    objective: str | None = None,
    delta: float = 1e-3,
    starts: int = 64,
    bootstrap: int = 2000,
    seed: int = 0,
    size: str = "n_params",
    source: str | None = None,
    columns: Mapping[str, str] | None = None,
    curves: bool = False,
) -> LawsReport:
    """Compare laws of size and tokens by how well they predict dearer runs from cheaper ones, and runs of sizes that
    were left out.

    laws: None for all. The arguments are those of `fit`. The result holds each law's fit, errors and share in the
    prediction, and each held-out run beside its prediction, with an interval from the errors. Its
    `selection.predict(inputs)` predicts one more run. Raises UserError and ConfigError."""
    from scaling_testbed.analysis.laws.study import Fitting, compare_rows, laws_named

    fitting = Fitting(objective=objective, delta=delta, starts=starts, bootstrap=bootstrap, seed=seed, size=size)
    chosen = laws_named(None if laws is None else ",".join(laws))
    given = law_rows(rows, source=source, columns=columns, size=size, curves=curves)
    return compare_rows(given, chosen, where=_texts(where), hold_out=_texts(hold_out), fitting=fitting)


def predict(
    fit: Kept,
    *,
    of: str | None = None,
    n_params: float | None = None,
    n_tokens: float | None = None,
    **inputs: float,
) -> dict[str, Any]:
    """Predict one new run by a fitted law, by two chained laws, or by laws that were compared: the value, its 95 %
    prediction interval, and how many times the run lies beyond the fitted runs. fit: also the path of what was kept.
    of: the group, where groups were fitted together.
    inputs: further inputs of the law, or tokens_per_param, flops. Raises ConfigError for an input that is missing or
    not used."""
    from scaling_testbed.analysis.laws.prediction import predict

    given = {"n_params": n_params, "n_tokens": n_tokens, **inputs}
    return predict(kept_law(fit, of), {key: value for key, value in given.items() if value is not None})


def allocate(
    fit: Kept,
    *,
    flops: float,
    of: str | None = None,
    inference_tokens: float | None = None,
    unique_tokens: float | None = None,
    steps: float | None = None,
) -> list[dict[str, Any]]:
    """Find N and D of least loss for a budget C = 6 N D, and smaller models of the same loss with the tokens and the
    compute that they need (Hoffmann et al. 2022, arXiv 2203.15556; Gadre et al. 2024, arXiv 2403.08540). The first
    record is the optimum. of: the group, where groups were fitted together. inference_tokens: tokens that the model
    will process after training; the records then have the FLOPs of both, and one more has the least. unique_tokens: how
    many different tokens there are, for the law data_constrained (Muennighoff et al. 2023, arXiv 2305.16264).

    Under a law of size, steps and batch: N, S and B of least loss for C = 6 N B S, where B is the critical batch of the
    loss (Su et al. 2024, arXiv 2403.06563) or, with `steps`, S is that number. Raises ConfigError for a law of other
    inputs."""
    from scaling_testbed.analysis.laws.allocation import allocation_records
    from scaling_testbed.analysis.laws.batch_allocation import batch_allocation_records, is_of_batches
    from scaling_testbed.analysis.laws.prediction import loss_law
    from scaling_testbed.errors import ConfigError

    law = loss_law(kept_law(fit, of))
    if not is_of_batches(law):
        if steps is not None:
            raise ConfigError(f"--steps needs a law of size, steps and batch, such as batch; this is {law.law}")
        return allocation_records(law, flops, inference_tokens, unique_tokens)
    for option, value in (("--inference-tokens", inference_tokens), ("--unique-tokens", unique_tokens)):
        if value is not None:
            raise ConfigError(f"{option} needs a law of n_params and n_tokens; this is {law.law}")
    return batch_allocation_records(law, flops, steps)


def next_runs(
    fit: Kept,
    target: tuple[float, float],
    flops: float,
    *,
    runs: int = 10,
    flops_per_run: float | None = None,
    models: Texts = (),
    sizes: Sequence[float] = (),
    tokens_per_param: Sequence[float] = (),
    overrides: Texts = (),
) -> NextRuns:
    """Choose the runs that narrow the prediction at a target most for their cost, under each law that has a share.

    target: N and D of the run to predict. Groups are refused, because a fit of several does not keep the rows of one.
    flops: 6 N D of the chosen runs together, at most. runs: at most so many.
    flops_per_run: 6 N D of one run at most. models: choices of configs/model, or patterns such as nano_*, whose sizes
    are tried; overrides: of every run, with which they are counted. sizes: N to try in place of models; neither: the
    fitted sizes and others up to four times the largest. tokens_per_param: values to try; none: from the least to the
    most that was fitted. See analysis/laws/next_runs.py. Raises UserError and ConfigError."""
    from scaling_testbed.analysis.laws.groups import GroupsReport
    from scaling_testbed.analysis.laws.next_runs import checked_target, laws_that_count, next_runs, places_of
    from scaling_testbed.errors import ConfigError
    from scaling_testbed.report.law import holds_groups
    from scaling_testbed.sweeps.chosen import models as models_named

    if isinstance(fit, GroupsReport) or (isinstance(fit, (str, Path)) and holds_groups(Path(fit))):
        where = fit if isinstance(fit, (str, Path)) else "a fit of groups"
        raise ConfigError(f"{where}: next takes no groups; fit one of them alone, with --where")
    kept, asked = laws_that_count(kept_law(fit)), checked_target(target)
    named, rows = _texts(models), [{"n_params": float(one)} for one in sizes]
    if named and rows:
        raise ConfigError("--models and --sizes both say which sizes are tried; give one of them")
    rows = models_named(named, _texts(overrides), kept[0][0].size) if named else rows
    places = places_of(kept, asked, rows, tokens_per_param, flops_per_run)
    return next_runs(kept, asked, places, flops, runs)


def kept_law(fit: Kept, of: str | None = None) -> Fit | Chain | Selection:
    """The law, the two chained laws, or the compared laws, of what fit, compare_laws or downstream return, of their
    reports, or of the path of a kept one. of: the group, where groups were fitted together. Raises UserError if the
    file holds no law, or for another type, and ConfigError for a group that there is not."""
    from scaling_testbed.analysis.laws.downstream import Chain
    from scaling_testbed.analysis.laws.fitted import Fit
    from scaling_testbed.analysis.laws.groups import GroupsReport
    from scaling_testbed.analysis.laws.selection import Selection
    from scaling_testbed.analysis.laws.study import ChainReport, FitReport, LawsReport
    from scaling_testbed.errors import ConfigError, UserError, check_choice
    from scaling_testbed.report import law

    if isinstance(fit, (str, Path)):
        return law.read(Path(fit), of)
    if isinstance(fit, GroupsReport):
        check_choice("of", of or "", fit.fits)
        return fit.fits[str(of)]
    if of is not None:
        raise ConfigError(f"of={of!r}: there are no groups; fit_groups makes them")
    kept = fit.fit if isinstance(fit, FitReport) else fit.chain if isinstance(fit, ChainReport) else fit
    kept = kept.selection if isinstance(kept, LawsReport) else kept
    if not isinstance(kept, (Fit, Chain, Selection)):
        raise UserError(f"a fit is what st.fit returns, or the path of a kept law; got {type(fit).__name__}")
    return kept


def report(
    path: str | Path,
    out: str | Path | None = None,
    *,
    where: Texts = (),
    experiment: str | None = None,
    source: str | None = None,
    figures: Sequence[str | Path] = (),
    traces: str | Path | None = None,
    lr_range: tuple[float, float] | None = None,
    width: str | None = None,
) -> list[str]:
    """Write one self-contained HTML page about a sweep or kept laws. Returns lines of text: each claim with its verdict
    and the number behind it, and the files that were written.

    out: the file of the page; by default report.html in the sweep's folder, or no page if there are figures. where:
    conditions on the rows. experiment: whose claims are judged. source: `path` is a copy of this published testbed.
    figures: files of the figures (.png, .svg, .pdf) that are written too. width: of these files, a "single" or
    "double" column of a paper. traces: a folder for recorded quantities over the steps of each run. lr_range: of S.
    Raises UserError and ConfigError."""
    from scaling_testbed.analysis.curves.lr_sensitivity import check_range
    from scaling_testbed.report.write import write

    return write(
        _path("path", path),
        None if out is None else _path("out", out),
        conditions=_texts(where),
        experiment=experiment,
        source=source,
        figures=[_path("figures", file) for file in ([figures] if isinstance(figures, str) else figures)],
        traces=None if traces is None else _path("traces", traces),
        lr_range=None if lr_range is None else check_range(lr_range),
        width=width,
    )


def _path(name: str, value: str | Path) -> Path:
    """A path. Raises UserError for another type, such as a DataFrame."""
    from scaling_testbed.errors import UserError

    if isinstance(value, (str, Path)):
        return Path(value)
    raise UserError(f"{name} must be the path of a file or folder; got {type(value).__name__}")
