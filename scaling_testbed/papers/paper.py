"""A paper as data: its experiments, which sweep makes the runs of each, and what it claims of them.

A whole paper of one's own, as a plug-in holds it:

    from scaling_testbed.papers.combinators import compare
    from scaling_testbed.papers.measures import BEST_LOSS
    from scaling_testbed.papers.paper import PAPERS, Claim, Experiment, Paper

    claims = [Claim("Peri-norm has the lower best loss.", compare(BEST_LOSS, "model.residual", "peri", "pre"))]
    residuals = Experiment(name="residuals", question="Which is best?", group=["model.residual"], claims=claims)
    paper = Paper(name="mine", authors="A 2026", title="On residuals", arxiv="2601.00001", experiments=[residuals])
    PAPERS.add(paper.name, paper, module=__name__)

A sweep file then says `paper: mine` and `experiment: residuals`, and `analyze report` judges its runs. Judges are made
in combinators.py and lines.py of what measures.py and predictions.py measure; any function from the evidence is one.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from scaling_testbed.analysis.curves.instability import Quantity
from scaling_testbed.analysis.rows.study import Study
from scaling_testbed.errors import ConfigError, UserError
from scaling_testbed.registry import Registry, resolve

if TYPE_CHECKING:
    from scaling_testbed.papers.measures import Evidence

AGREES, DISAGREES, CANNOT_TELL = "agrees", "disagrees", "cannot tell"

Verdict = tuple[str, str]  # one of these words, and the number behind it
Judge = Callable[["Evidence"], Verdict]

PAPERS: Registry["Paper | str"] = Registry("paper")  # name -> Paper, or "module:attribute" of one
PAPERS.add("small_scale_proxies", "scaling_testbed.papers.small_scale_proxies:PAPER", module=__name__)
PAPERS.add("over_training", "scaling_testbed.papers.over_training:PAPER", module=__name__)


@dataclass(frozen=True)
class Claim:
    """What the paper says, in our words, how a study is asked for it, and where the paper says it (where it is not the
    figure of the experiment)."""

    text: str
    judge: Judge
    source: str = ""

    def verdict(self, evidence: "Evidence") -> Verdict:
        """agrees | disagrees | cannot tell, and the number behind it; rows that cannot be read for it cannot tell."""
        try:
            return self.judge(evidence)
        except UserError as error:
            return CANNOT_TELL, str(error)

    def __str__(self) -> str:
        return f"{self.text} [{self.source}]" if self.source else self.text


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """One experiment of a paper.

    sweeps: those that make its runs; one of its own name where none is given. group: the keys that tell its conditions
    apart, first ones first. quantities: fitted against N. traces: recorded quantities to draw over time. against: a key
    that the final loss is drawn against.
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
    """authors: as one cites them, with the year. settings: what its runs have in common, by the keys of a row, for a
    page to say what was changed."""

    name: str
    authors: str
    title: str
    arxiv: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    experiments: Sequence[Experiment]

    def experiment(self, name: str) -> Experiment:
        """Raises ConfigError naming the choices."""
        for one in self.experiments:
            if one.name == name:
                return one
        names = ", ".join(one.name for one in self.experiments)
        raise ConfigError(f"experiment must be one of {names}; paper {self.name} has no {name!r}")

    def __str__(self) -> str:
        return f"{self.authors}, {self.title} (arXiv {self.arxiv})"


NO_EXPERIMENT = Experiment(name="none")


def paper_named(name: str) -> Paper:
    """A registered paper. Raises ConfigError naming the choices."""
    if name not in PAPERS:
        known = ", ".join(PAPERS)
        raise ConfigError(f"paper must be one of {known}, or of a plug-in that is loaded; got {name!r}")
    paper: Paper = resolve(PAPERS[name])
    return paper


def experiment_of(study: Study) -> tuple[Paper | None, Experiment]:
    """The paper and experiment that a study's sweep.json names; where it names none, as before there were such keys,
    the one that lists its sweep, else (None, NO_EXPERIMENT). Raises ConfigError for a name that is not registered."""
    if study.paper is not None:
        try:
            paper = paper_named(study.paper)
            return paper, NO_EXPERIMENT if study.experiment is None else paper.experiment(study.experiment)
        except ConfigError as error:
            hint = "" if study.paper in PAPERS else "; to load it, type --plugins NAME, its module or .py file"
            raise ConfigError(f"{study.path}, by its sweep.json: {error}{hint}") from None
    listed = [(paper, one) for paper, one in _everything() if study.sweep in one.sweeps]
    return listed[0] if listed else (None, NO_EXPERIMENT)


def chosen(typed: str) -> tuple[Paper, Experiment]:
    """The experiment typed as NAME, or as PAPER/NAME. Raises ConfigError naming the choices where it is none or two."""
    found = [(paper, one) for paper, one in _everything() if typed in (one.name, f"{paper.name}/{one.name}")]
    found = found or [(paper, one) for paper, one in _everything() if typed in one.sweeps]
    if len(found) == 1:
        return found[0]
    names = ", ".join(f"{paper.name}/{one.name}" for paper, one in found or _everything())
    raise ConfigError(f"--experiment must be one of {names}; got {typed!r}")


def _everything() -> list[tuple[Paper, Experiment]]:
    return [(paper, one) for paper in map(paper_named, PAPERS) for one in paper.experiments]
