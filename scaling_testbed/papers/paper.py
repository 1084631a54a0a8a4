"""A paper as data: its experiments, the sweeps that make their runs, and the claims about them.

A plug-in can define a complete paper:

    from scaling_testbed.papers.combinators import compare
    from scaling_testbed.papers.measures import BEST_LOSS
    from scaling_testbed.papers.paper import PAPERS, Claim, Experiment, Paper

    claims = [Claim("Peri-norm has the lower best loss.", compare(BEST_LOSS, "model.residual", "peri", "pre"))]
    residuals = Experiment(name="residuals", question="Which is best?", group=["model.residual"], claims=claims)
    paper = Paper(name="mine", authors="A 2026", title="On residuals", arxiv="2601.00001", experiments=[residuals])
    PAPERS.add(paper.name, paper, module=__name__)

A sweep file then has `paper: mine`, `experiment: residuals` and `declared: {margins: {loss: 0.02}}`, and
`analyze report` judges its runs. A judge is any function from the evidence to a verdict. combinators.py, lines.py and
law_claims.py make judges from the measures of measures.py and predictions.py; effects.py tells how they judge. A
declaration records each claim with how it is judged, see described.py.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from scaling_testbed.analysis.curves.instability import Quantity
from scaling_testbed.analysis.rows.study import Study, claims_of
from scaling_testbed.errors import ConfigError, UserError
from scaling_testbed.papers.declaration import CLAIM, JUDGED, NOT_DECLARED, compared
from scaling_testbed.papers.described import described
from scaling_testbed.papers.effects import CANNOT_TELL, Verdict, corrected, joined
from scaling_testbed.papers.measures import Evidence
from scaling_testbed.registry import Registry, resolve

Judge = Callable[[Evidence], Verdict]

PAPERS: Registry["Paper | str"] = Registry("paper")  # name -> Paper, or "module:attribute" of one
PAPERS.add("small_scale_proxies", "scaling_testbed.papers.small_scale_proxies:PAPER", module=__name__)
PAPERS.add("over_training", "scaling_testbed.papers.over_training:PAPER", module=__name__)
PAPERS.add("loss_trajectory", "scaling_testbed.papers.loss_trajectory:PAPER", module=__name__)
PAPERS.add("fixed_durations", "scaling_testbed.papers.fixed_durations:PAPER", module=__name__)
PAPERS.add("resuming", "scaling_testbed.papers.resuming:PAPER", module=__name__)
PAPERS.add("sparse_pretraining", "scaling_testbed.papers.sparse_pretraining:PAPER", module=__name__)
PAPERS.add("growing", "scaling_testbed.papers.growing:PAPER", module=__name__)
PAPERS.add("implicit_bias", "scaling_testbed.papers.implicit_bias:PAPER", module=__name__)
PAPERS.add("document_selection", "scaling_testbed.papers.document_selection:PAPER", module=__name__)
PAPERS.add("distillation", "scaling_testbed.papers.distillation:PAPER", module=__name__)
PAPERS.add("gpicl", "scaling_testbed.papers.gpicl:PAPER", module=__name__)
PAPERS.add("skill_it", "scaling_testbed.papers.skill_it:PAPER", module=__name__)
PAPERS.add("unlearning", "scaling_testbed.papers.unlearning:PAPER", module=__name__)
PAPERS.add("secret_sharer", "scaling_testbed.papers.secret_sharer:PAPER", module=__name__)


@dataclass(frozen=True)
class Claim:
    """A claim of a paper.

    text: a paraphrase of the claim. judge: decides whether a study agrees with it. source: its place in the paper, if
    this is not the figure of the experiment.
    """

    text: str
    judge: Judge
    source: str = ""

    def verdict(self, evidence: Evidence) -> Verdict:
        """The verdict with the remarks of the evidence, not corrected for the number of claims. A UserError of the
        judge, and rows that cannot be compared, give "cannot tell"."""
        try:
            found = self.judge(evidence)
        except UserError as error:
            found = Verdict(word=CANNOT_TELL, words=str(error))
        if evidence.incomparable:
            found = replace(found, word=CANNOT_TELL, words=joined(evidence.incomparable, found.words), p=None)
        remarks = [one[:1].upper() + one[1:] for one in evidence.remarks]
        return replace(found, words=joined(found.words, *remarks)) if remarks else found

    @property
    def estimand(self) -> str:
        """What is judged, in words; empty if the judge does not say it."""
        return getattr(self.judge, "estimand", "")

    def __str__(self) -> str:
        return f"{self.text} [{self.source}]" if self.source else self.text


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """One experiment of a paper.

    sweeps: the sweeps that make its runs; by default the one of its own name. group: the keys that distinguish its
    conditions, in this order. quantities: fitted against N. traces: recorded quantities to draw against the step.
    against: a key to draw the final loss against.
    """

    name: str
    sweeps: Sequence[str] = ()
    figure: str = ""
    question: str = "How does the final loss depend on the learning rate?"
    group: Sequence[str] = ()
    quantities: Sequence[Quantity] = ()
    traces: Sequence[str] = ()
    against: str | None = None
    claims: Sequence[Claim] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "sweeps", tuple(self.sweeps) or (self.name,))


@dataclass(frozen=True, kw_only=True)
class Paper:
    """A paper and its experiments.

    authors: as in a citation, with the year. settings: common settings of its runs, by the keys of a row; a page lists
    the differences of a study from them.
    """

    name: str
    authors: str
    title: str
    arxiv: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    experiments: Sequence[Experiment]

    def experiment(self, name: str) -> Experiment:
        """The experiment of that name. Raises ConfigError, which lists the names, if there is none."""
        for one in self.experiments:
            if one.name == name:
                return one
        names = ", ".join(one.name for one in self.experiments)
        raise ConfigError(f"experiment must be one of {names}; paper {self.name} has no {name!r}")

    def __str__(self) -> str:
        return f"{self.authors}, {self.title} (arXiv {self.arxiv})"


def judged(experiment: Experiment, evidence: Evidence) -> list[tuple[Claim, Verdict]]:
    """Each claim of an experiment with the verdict of a study, corrected for the number of claims (Holm 1979): of those
    that were declared, if the study recorded them. Another claim has no verdict, nor has one that is judged otherwise.
    """
    reasons, gone = _beside_declared(experiment, evidence)
    made = [_withheld(one.verdict(evidence), reason) for one, reason in zip(experiment.claims, reasons, strict=True)]
    declared = [reason != NOT_DECLARED for reason in reasons]
    counted = iter(corrected([one for one, counts in zip(made, declared, strict=True) if counts], len(gone)))
    found = [next(counted) if counts else one for one, counts in zip(made, declared, strict=True)]
    return list(zip(experiment.claims, found, strict=True))


def _withheld(verdict: Verdict, reason: str | None) -> Verdict:
    """The verdict; with a reason why it cannot be given, its effect without a word."""
    if reason is None:
        return verdict
    return replace(verdict, word=CANNOT_TELL, words=joined(reason, verdict.words), p=None)


def not_judged(experiment: Experiment, evidence: Evidence) -> list[str]:
    """The declared claims of an experiment that it does not have any more."""
    return _beside_declared(experiment, evidence)[1]


def _beside_declared(experiment: Experiment, evidence: Evidence) -> tuple[Sequence[str | None], list[str]]:
    """The claims beside those that the study declares, as `compared` gives them. Nothing is compared where it recorded
    none, or declares another experiment: then no claim has a verdict."""
    declared = evidence.declaration
    if declared.claims is None or claims_of(vars(evidence.study)) != declared.experiment:
        return [None] * len(experiment.claims), []
    return compared(declared.claims, records_of(experiment))


def records_of(experiment: Experiment) -> list[dict[str, str]]:
    """The claims of an experiment as a declaration records them."""
    return [{CLAIM: one.text, JUDGED: described(one.judge)} for one in experiment.claims]


NO_EXPERIMENT = Experiment(name="none")


def paper_named(name: str) -> Paper:
    """A registered paper. Raises ConfigError, which lists the names, if there is none."""
    if name not in PAPERS:
        known = ", ".join(PAPERS)
        raise ConfigError(f"paper must be one of {known}, or one of a loaded plug-in; got {name!r}")
    paper: Paper = resolve(PAPERS[name])
    return paper


def experiment_of(study: Study) -> tuple[Paper | None, Experiment]:
    """The paper and experiment that a study's sweep.json names.

    If it names none, as in earlier versions, the experiment that lists its sweep; otherwise (None, NO_EXPERIMENT).
    Raises ConfigError if a name is not registered.
    """
    try:
        return experiment_named(study.paper, study.experiment, study.sweep)
    except ConfigError as error:
        hint = "" if study.paper in (None, *PAPERS) else "; to load its plug-in, type --plugins MODULE_OR_FILE"
        raise ConfigError(f"sweep.json of {study.path}: {error}{hint}") from None


def experiment_named(paper: str | None, experiment: str | None, sweep: str | None) -> tuple[Paper | None, Experiment]:
    """As `experiment_of`, by the names in a sweep.json."""
    if paper is not None:
        found = paper_named(paper)
        return found, NO_EXPERIMENT if experiment is None else found.experiment(experiment)
    listed = [(one, its) for one, its in _everything() if sweep in its.sweeps]
    return listed[0] if listed else (None, NO_EXPERIMENT)


def chosen(typed: str) -> tuple[Paper, Experiment]:
    """The experiment typed as NAME or PAPER/NAME.

    Raises ConfigError, which lists the choices, if no experiment or several have that name.
    """
    found = [(paper, one) for paper, one in _everything() if typed in (one.name, f"{paper.name}/{one.name}")]
    found = found or [(paper, one) for paper, one in _everything() if typed in one.sweeps]
    if len(found) == 1:
        return found[0]
    names = ", ".join(f"{paper.name}/{one.name}" for paper, one in found or _everything())
    raise ConfigError(f"--experiment must be one of {names}; got {typed!r}")


def _everything() -> list[tuple[Paper, Experiment]]:
    return [(paper, one) for paper in map(paper_named, PAPERS) for one in paper.experiments]
