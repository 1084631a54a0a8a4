"""One page about a sweep: a single HTML file without scripts and network resources."""

import gzip
import json
import math
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from markupsafe import Markup

from scaling_testbed import tables
from scaling_testbed.analysis.curves import instability, lr_sensitivity
from scaling_testbed.analysis.curves.decisions import decide
from scaling_testbed.analysis.curves.lr_sensitivity import capped_loss, final_loss, rates_note
from scaling_testbed.analysis.figures import panels
from scaling_testbed.analysis.figures.drawing import save
from scaling_testbed.analysis.figures.panel import Panel, compact
from scaling_testbed.analysis.figures.words import ARM, word
from scaling_testbed.analysis.rows.conditions import text
from scaling_testbed.analysis.rows.study import LR, SIZE, Row, Study, about_hopeless, collected, name_of, number
from scaling_testbed.analysis.trajectories.equal_loss import table_of
from scaling_testbed.errors import UserError
from scaling_testbed.files import write_bytes
from scaling_testbed.papers.declaration import recorded_in
from scaling_testbed.papers.effects import Verdict
from scaling_testbed.papers.measures import Evidence
from scaling_testbed.papers.paper import Claim, Experiment, Paper, experiment_of, judged, not_judged
from scaling_testbed.report import law as law_report
from scaling_testbed.report import page
from scaling_testbed.row_files import FIGURES

HOW_JUDGED = (
    "Each effect is computed for each seed, with the same seeds in all conditions, and is shown as its mean over seeds "
    "with a 95 % interval of Student's t. Words: agrees, the interval excludes zero on the claim's side and the mean "
    "is at least the margin; disagrees, it excludes zero on the other side; no difference, it lies within the margin; "
    "cannot tell, anything else. They hold after Holm's correction for the number of claims."
)
DECIDE = "decide"  # the analysis of a sweep whose arms are compared at small sizes and at a large one
OF_DECISIONS = "Do small runs choose between the arms as the largest ones do?"
NOT_DECLARED = (
    "The sweep declared no margins and no range of rates before its runs, so no claim is judged. The effects are shown."
)


HOW_COUNTED = (
    "A run counts its time of training and evaluation, times its processes. On GPUs a process has one GPU; on a CPU it "
    "has as many cores as it was given, with sweep run --workers N those of the machine divided by N."
)


def write_report(
    study: Study,
    path: Path | None,
    figures: Sequence[Path] = (),
    lr_range: tuple[float, float] | None = None,
    width: str | None = None,
    command: str = "",
) -> list[str]:
    """Write the page to `path`, None for no page, and its figures to the files `figures` (.png, .svg, .pdf).

    lr_range: of S, None for the default. width: of the figures in their files, see drawing.WIDTHS. command: the one
    that makes the page, shown there.

    Returns lines to print: each claim with its verdict, what was declared, and the paths of the files. Raises UserError
    if a file cannot be written.
    """
    paper, experiment = experiment_of(study)
    evidence = Evidence(study, experiment.group, lr_range)
    verdicts, gone = judged(experiment, evidence), not_judged(experiment, evidence)
    said = bool(verdicts or gone)
    shown = _by_arm(evidence)
    drawn, absent = _panels(experiment, shown)
    reasons = [*absent, *evidence.remarks] if drawn else absent
    if path is not None:
        laws = law_sections(study.path)
        sections = [
            ("Claims", _claims(paper, evidence, verdicts, gone) if said or not (laws or _decides(study)) else Markup()),
            ("Figures", page.figures(drawn) + page.paragraphs(reasons) if drawn or reasons else Markup()),
            *laws,
            ("Decisions from small runs", _decisions(shown)),
            ("Final losses", _final_losses(shown)),
            ("Learning-rate sensitivity", _sensitivity(shown)),
            ("Extrapolation in N", _extrapolation(experiment, shown)),
            ("The grid", _grid(study)),
            ("What was shortened", _shortened(study, paper)),
            ("Cost", _cost(study)),
            ("Versions, devices, seeds", _provenance(study)),
            (page.SOURCES, _sources(study, path, figures if drawn else (), command)),
            ("All runs", _runs(study, shown.group, path)),
        ]
        title = study.name + (f" at scale {study.scale}" if study.scale else "")
        page.write(path, title, _intro(study, paper, experiment), sections)
    written = [*([path] if path else []), *(save(drawn, figures, width) if figures and drawn else [])]
    declared = [f"judged by: {recorded_in(evidence.study)}"] if said and evidence.is_declared else []
    declared += [_not_judged(gone)] if gone else []
    wrote = f"wrote {', '.join(map(str, written))}" if written else f"no figure to draw: {'; '.join(reasons)}"
    return [*verdict_lines(verdicts), *declared, wrote]


def _not_judged(gone: Sequence[str]) -> str:
    return f"declared and not judged: {' '.join(gone)}"


def verdict_lines(verdicts: Sequence[tuple[Claim, Verdict]]) -> list[str]:
    """Two lines for each claim: the verdict with the claim, and below it the numbers."""
    return [f"{verdict.word:13}  {claim}\n               {verdict.words}" for claim, verdict in verdicts]


def write_laws(folder: Path, path: Path, command: str = "") -> None:
    """Write a page of the laws in a folder without rows. command: the one that makes the page, shown there."""
    made = page.made(command, [("Laws", page.link(folder.resolve().name, folder, path), False)])
    page.write(path, folder.resolve().name, [], [*law_sections(folder), (page.SOURCES, made)])


def law_sections(folder: Path) -> list[page.Section]:
    """A section for each law that is saved beside the rows; for a damaged file, a section with the error."""
    sections = []
    for index, path in enumerate(law_report.laws_of(folder)):
        try:
            sections.append(law_report.section(path, f"law{index}-"))
        except UserError as error:
            print(f"warning: {error}", file=sys.stderr)
            sections.append((path.name, page.paragraphs([str(error)])))
    return sections


def write_traces(study: Study, folder: Path) -> list[Path]:
    """Write the traces of the study's experiment as folder/<run_id>.jsonl.gz, for a study without its runs' folders.

    Returns the paths; none if the experiment uses no trace.
    """
    quantities = {name.partition("/")[0] for name in experiment_of(study)[1].traces}
    paths = []
    for row in study.rows if quantities else ():
        steps = study.trace(row)
        kept = [{key: value for key, value in step.items() if key == "step" or key.partition("/")[0] in quantities}
                for step in steps]  # fmt: skip
        lines = "".join(json.dumps(step) + "\n" for step in kept if len(step) > 1)
        if lines:
            tables.prepare(folder)
            paths.append(folder / f"{row['run_id']}.jsonl.gz")
            write_bytes(paths[-1], gzip.compress(lines.encode(), mtime=0))
    return paths


def _intro(study: Study, paper: Paper | None, experiment: Experiment) -> list[str]:
    source = "" if paper is None else f"{experiment.figure} of {paper}" if experiment.figure else str(paper)
    question = OF_DECISIONS if _decides(study) else experiment.question
    return [line for line in (question, source, study.description) if line]


def _decides(study: Study) -> bool:
    return study.analysis == DECIDE


def _by_arm(evidence: Evidence) -> Evidence:
    """The evidence with its conditions named by logging.group, where each has one group of its own; else the evidence
    itself."""
    named = Evidence(evidence.study, [ARM], evidence.lr_range)
    rows = [*evidence.study.rows, *evidence.study.missing]
    pairs = {(tuple(text(row.get(key)) for key in evidence.group), text(row.get(ARM))) for row in rows}
    conditions, arms = map(set, zip(*pairs, strict=True))
    alone = named.group == [ARM] and len(pairs) == len(conditions) == len(arms)
    return named if alone else evidence


def _claims(
    paper: Paper | None, evidence: Evidence, verdicts: Sequence[tuple[Claim, Verdict]], gone: Sequence[str]
) -> Markup:
    more = [f"D{_not_judged(gone)[1:]}"] if gone else []
    if not verdicts:
        names = "sweep.json names no experiment of a paper; --experiment chooses one."
        return page.paragraphs([names if paper is None else "The paper makes no claim about this experiment.", *more])
    declared = f"{HOW_JUDGED} Declared: {recorded_in(evidence.study)}." if evidence.is_declared else NOT_DECLARED
    declared = " ".join([declared, *more])
    claims = [(str(claim), verdict.word, verdict.words, claim.estimand) for claim, verdict in verdicts]
    return page.render("claims", claims=claims, declared=declared)


def _panels(experiment: Experiment, evidence: Evidence) -> tuple[list[Panel], list[str]]:
    """The panels, and the reasons why others cannot be drawn."""
    drawn: list[Panel] = []
    reasons: list[str] = []
    for make in (_decision_panels, _sensitivity_panels, _quantity_panels, _trace_panels, _curvature_panels):
        try:
            drawn += make(experiment, evidence)
        except UserError as error:
            reasons.append(str(error))
    return drawn, reasons


def _decision_panels(experiment: Experiment, evidence: Evidence) -> list[Panel]:
    return panels.decision_panels(decide(evidence.study, evidence.group)) if _decides(evidence.study) else []


def _sensitivity_panels(experiment: Experiment, evidence: Evidence) -> list[Panel]:
    if not any(LR in row for row in evidence.study.rows):
        return []
    if experiment.against is not None:
        against = panels.against_key(
            evidence.curves, experiment.against, capped_loss, panels.LOSS_LABEL, title="Final loss"
        )
        if against.lines:
            return [against]
    several = len({lr for curve in evidence.curves for lr in curve.lrs}) > 1
    return panels.sensitivity_panels(evidence.sensitivities) if several else []


def _quantity_panels(experiment: Experiment, evidence: Evidence) -> list[Panel]:
    drawn = []
    for quantity in experiment.quantities:
        made = instability.analyse(evidence.study, evidence.group, quantity, _holds_out(evidence))
        drawn += panels.instability_panels(*made, quantity)

        def measured(row: Row, quantity=quantity) -> float | None:
            return instability.value_of(row, quantity)

        label = panels.quantity_word(quantity)
        drawn.append(panels.against_lr(evidence.curves, measured, label, y_log=True, title=f"At each rate: {label}"))
    return drawn


def _trace_panels(experiment: Experiment, evidence: Evidence) -> list[Panel]:
    drawn = []
    for name in experiment.traces:
        log = name.split("/")[0] in ("attention_logit_max", "grad_rms", "update_rms", "q_rms", "k_rms")
        drawn += panels.trace_panels(evidence.study, evidence.curves, name, log)
    return drawn


def _curvature_panels(experiment: Experiment, evidence: Evidence) -> list[Panel]:
    if not table_of(evidence.study).exists():
        return []
    return [panels.curvature_panel(evidence.curves, evidence.curvatures)]


def _decisions(evidence: Evidence) -> Markup:
    """The table of `analyze decide` with the setting that distinguishes the conditions."""
    if not _decides(evidence.study):
        return Markup()
    try:
        found = decide(evidence.study, evidence.group)
    except UserError as error:
        return page.paragraphs([str(error)])
    remarks = page.paragraphs(f"{one[:1].upper()}{one[1:]}." for one in found.remarks)
    return page.table(found.records(), shared=True) + remarks


def _final_losses(evidence: Evidence) -> Markup:
    """The mean final loss of each condition and size, for a study without an axis of rates."""
    if not any(LR in row for row in evidence.study.rows) or any(len(curve.lrs) > 1 for curve in evidence.curves):
        return Markup()
    records = []
    for curve in evidence.curves:
        losses = [loss for row in curve.runs.values() if math.isfinite(loss := final_loss(row))]
        mean = statistics.fmean(losses) if losses else None
        spread = statistics.stdev(losses) if len(losses) > 1 else None
        at = {**curve.condition, SIZE: curve.n_params, LR: curve.lrs[0]}
        counts = {"runs": len(curve.runs), "without a loss": len(curve.runs) - len(losses) or None}
        records.append({**at, "val_loss": mean, "deviation over seeds": spread, **counts})
    return page.table(records, shared=True) if len(records) > 1 else Markup()


def _sensitivity(evidence: Evidence) -> Markup:
    if not any(LR in row for row in evidence.study.rows):
        return Markup()  # rows without a learning rate, e.g. of another project
    try:
        found = evidence.sensitivities
    except UserError as error:
        return page.paragraphs([str(error)])
    if all(len(one.curve.lrs) < 2 for one in found):
        return Markup()  # one rate for each size gives no sensitivity
    said = [f"{lr_sensitivity.DEFINITION} {rates_note(found, evidence.lr_range)}"]
    said += [lr_sensitivity.BEST_LOSS] if any(len(one.curve.seeds) > 1 for one in found) else []
    return page.paragraphs(said) + page.table([one.record() for one in found], shared=True)


def _extrapolation(experiment: Experiment, evidence: Evidence) -> Markup:
    parts = []
    for quantity in experiment.quantities:
        try:
            series, made = instability.analyse(evidence.study, evidence.group, quantity, _holds_out(evidence))
        except UserError as error:
            parts.append(page.paragraphs([str(error)]))
            continue
        parts.append(page.paragraphs(instability.notes(series, quantity)))
        parts.append(page.table([one.record() for one in made]))
    return Markup("").join(parts)


def _holds_out(evidence: Evidence) -> bool:
    """Whether to hold out the largest size: no run is left to predict, and enough sizes remain for a fit."""
    return not evidence.missing and len({curve.shape for curve in evidence.curves if curve.runs}) > 3


def _grid(study: Study) -> Markup:
    states = Counter(row.get("status", "finished") for row in [*study.rows, *study.missing])
    total = sum(states.values())
    said = ", ".join(f"{number} {state}" for state, number in sorted(states.items()))
    sizes = _distinct(study.rows, lambda row: row.get(SIZE), lambda n: f"{n:,}")
    rates = _distinct(study.rows, lambda row: row.get(LR), lambda lr: f"{lr:g}")
    lines = [f"{total} runs: {said}."]
    lines += [
        f"{what}: {values}." for what, values in (("N (non-embedding)", sizes), ("Learning rates", rates)) if values
    ]
    lines += [f"Without a result: {'; '.join(map(name_of, study.missing))}."] if study.missing else []
    lines += [f"{line}." for line in about_hopeless(study.missing)]
    return page.paragraphs(lines)


def _shortened(study: Study, paper: Paper | None) -> Markup:
    """The differences from the settings of the paper; empty if there are none beside the scale."""
    records = []
    for key, theirs in (paper.settings if paper else {}).items():
        own = list(
            dict.fromkeys(text(row.get("steps_planned" if key == "budget.steps" else key)) for row in study.rows)
        )
        if own and own not in (["null"], [text(theirs)]):
            records.append({"setting": word(key), "key": key, "paper": text(theirs), "here": ", ".join(own)})
    scaled = records and study.scale not in (None, "paper")
    scale = [{"setting": "scale", "key": None, "paper": "paper", "here": study.scale}] if scaled else []
    return page.table([*scale, *records])


def _provenance(study: Study) -> Markup:
    asked = {
        "seeds": lambda row: row.get("seed"),
        "devices": lambda row: row.get("device"),
        "precision": lambda row: row.get("precision"),
        "versions": lambda row: ", ".join(f"{k} {v}" for k, v in (row.get("versions") or {}).items()) or None,
        "commits": lambda row: row.get("git_commit"),
        "plug-ins": lambda row: (
            ", ".join(f"{Path(k).name} {v[:12]}" for k, v in (row.get("plugins") or {}).items()) or None
        ),
        "data": lambda row: row.get("data_fingerprint"),
    }
    records = [{"what": what, "found": _distinct(study.rows, ask)} for what, ask in asked.items()]
    return page.table([record for record in records if record["found"]])


def _distinct(rows: Sequence[Row], ask: Callable, form: Callable = str) -> str:
    values = {value for row in rows if (value := ask(row)) is not None}
    return ", ".join(form(value) if _order(value)[0] == 0 else text(value) for value in sorted(values, key=_order))


def _cost(study: Study) -> Markup:
    """What the runs took, for each size."""
    timed = [row for row in study.rows if isinstance(row.get("wall_seconds"), (int, float))]
    if not timed:
        return Markup()
    records = []
    sizes = sorted({number(row, SIZE) for row in timed if row.get(SIZE) is not None})
    for size in [*sizes, None]:
        own = [row for row in timed if size is None or row.get(SIZE) == size]
        hours = sum(row["wall_seconds"] * (row.get("world_size") or 1) for row in own) / 3600
        # Of a run that began in the state of another, the part that it computed itself.
        tokens, flops = (
            sum(row.get(f"{key}_here") or row.get(key) or 0 for row in own) for key in ("n_tokens", "flops")
        )
        place = "all" if size is None else f"{size:,.0f}"
        took = {"runs": len(own), "process-hours": f"{hours:.3g}"}
        records.append({SIZE: place, **took, "n_tokens": compact(tokens) if tokens else None})
        records[-1]["flops"] = compact(flops, flops=True) if flops else None
    said = [HOW_COUNTED]
    if less := len(study.rows) - len(timed):
        said.append(f"{less} more runs recorded no time.")
    return page.table(records if len(sizes) > 1 else records[-1:]) + page.paragraphs(said)


def _sources(study: Study, path: Path, figures: Sequence[Path], command: str) -> Markup:
    """How the page and its runs are made again, and the files that it shows."""
    facts = [("Its runs", run, True)] if (run := _run_command(study)) else []
    kept = (collected(study.path) if study.path.is_dir() else None) or study.path
    facts.append(("Rows", page.link(kept.name, kept, path), False))
    beside = [file for folder in (study.path, study.path / "analysis") for file in sorted(folder.glob("*.*"))]
    linked = {file.resolve(): file for file in (*beside, *figures) if file.suffix in (".csv", *FIGURES)}
    for file in linked.values():
        facts.append(("Table" if file.suffix == ".csv" else "Figure", page.link(file.name, file, path), False))
    more = ["Words that were typed after it, if any, stand in the overrides of each row."] if run else []
    return page.made(command, facts) + page.paragraphs(more)


def _run_command(study: Study) -> str:
    """The command that runs a study's sweep, without what was typed after it; empty if sweep.json names no sweep."""
    if study.sweep is None:
        return ""
    names = {row.get("name") for row in study.rows}
    scale = f" scale={study.scale}" if study.scale else ""
    named = names.pop() if len(names) == 1 else None
    usual = (None, study.sweep, f"{study.sweep}_{study.scale}")
    own = "" if named in usual else f" name={named}"
    return f"python -m scaling_testbed.sweep run sweep={study.sweep}{scale}{own}"


def _runs(study: Study, group: Sequence[str], path: Path) -> Markup:
    keys = [key for key in group if key != "scan"]
    shown = ("run_id", SIZE, *keys, LR, "seed", "status", "val_loss", "val_loss_initial", "diverged_at_step")
    everything = sorted(
        [*study.rows, *study.missing],
        key=lambda row: (_order(row.get(SIZE)), *(text(row.get(k)) for k in keys), _order(row.get(LR))),
    )
    records = [{key: row.get(key) for key in shown} for row in everything]
    for record in records:
        run_id = record["run_id"]
        if isinstance(run_id, str) and (study.path / run_id / "result.json").is_file():
            record["run_id"] = page.link(run_id, study.path / run_id, path)
    return page.render("folded", summary=f"{len(records)} runs", content=page.table(records))


def _order(value: object) -> tuple:
    """A sort key that puts numbers before other values, which a hand-made table may hold."""
    is_number = isinstance(value, (int, float)) and value == value
    return (0, value, "") if is_number else (1, 0.0, text(value))
