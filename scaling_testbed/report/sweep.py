"""One page about a sweep: a single HTML file without scripts and without anything from the network."""

import gzip
import html
import json
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from scaling_testbed.analysis.curves import instability, lr_sensitivity
from scaling_testbed.analysis.curves.lr_sensitivity import capped, final_loss, rates_note
from scaling_testbed.analysis.figures import panels
from scaling_testbed.analysis.figures.drawing import Panel, save
from scaling_testbed.analysis.rows.conditions import text
from scaling_testbed.analysis.rows.study import LR, SIZE, Row, Study, name_of, number
from scaling_testbed.errors import UserError
from scaling_testbed.papers.evidence import Evidence, Verdict
from scaling_testbed.papers.small_scale_proxies import Claim, Experiment, experiment_of, judged
from scaling_testbed.report import law as law_report
from scaling_testbed.report import page, tables

PAPER = {"budget.steps": 1e5, "batch.sequences": 256, "batch.sequence_length": 512, "data.name": "c4"}


def write_report(study: Study, path: Path, figures: Sequence[Path] = ()) -> list[str]:
    """Write the page, and its figures to the files `figures` (.png, .svg); returns what to say about it: each claim
    with its verdict, and where the files are. Raises UserError where one cannot be written."""
    experiment = experiment_of(study.name)
    evidence = Evidence(study, experiment.group)
    verdicts = judged(study.name, evidence)
    drawn, reasons = _panels(experiment, evidence)
    laws = law_sections(study.path)
    sections = [
        ("Claims of the paper", _claims(experiment, verdicts) if verdicts or not laws else ""),
        ("Figures", page.figures(drawn) + page.paragraphs(reasons) if drawn or reasons else ""),
        *laws,
        ("Learning-rate sensitivity", _sensitivity(evidence)),
        ("Extrapolation in N", _extrapolation(experiment, evidence)),
        ("The grid", _grid(study)),
        ("What was shortened", _shortened(study)),
        ("Versions, devices, seeds", _provenance(study)),
        ("All runs", _runs(study, evidence.group)),
    ]
    title = study.name + (f" at scale {study.scale}" if study.scale else "")
    page.write(path, title, _intro(study, experiment), sections)
    written = [path, *(save(drawn, figures) if figures and drawn else [])]
    said = [f"{verdict:11}  {claim.text}\n             {words}" for claim, (verdict, words) in verdicts]
    return [*said, f"wrote {', '.join(map(str, written))}"]


def write_laws(folder: Path, path: Path) -> None:
    """Write a page of the laws that a folder without rows keeps."""
    page.write(path, folder.resolve().name, [], law_sections(folder))


def law_sections(folder: Path) -> list[tuple[str, str]]:
    """A section for each law that is kept beside the rows; of one that is damaged what is wrong with it."""
    sections = []
    for index, path in enumerate(law_report.laws_of(folder)):
        try:
            sections.append(law_report.section(path, f"law{index}-"))
        except UserError as error:
            print(f"warning: {error}", file=sys.stderr)
            sections.append((html.escape(path.name), page.paragraphs([str(error)])))
    return sections


def write_traces(study: Study, folder: Path) -> list[Path]:
    """Write what the study's experiment looks at over the steps of its runs as folder/<run_id>.jsonl.gz, for a study
    that is kept without its runs' folders; returns the paths, none where it looks at no trace."""
    quantities = {name.partition("/")[0] for name in experiment_of(study.name).traces}
    paths = []
    for row in study.rows if quantities else ():
        steps = study.trace(row)
        kept = [{key: value for key, value in step.items() if key == "step" or key.partition("/")[0] in quantities}
                for step in steps]  # fmt: skip
        lines = "".join(json.dumps(step) + "\n" for step in kept if len(step) > 1)
        if lines:
            tables.prepare(folder)
            paths.append(folder / f"{row['run_id']}.jsonl.gz")
            paths[-1].write_bytes(gzip.compress(lines.encode(), mtime=0))
    return paths


def _intro(study: Study, experiment: Experiment) -> list[str]:
    source = f"{experiment.figure} of Wortsman et al. 2023 (arXiv 2309.14322)" if experiment.figure else ""
    return [line for line in (experiment.question, source, study.description) if line]


def _claims(experiment: Experiment, verdicts: Sequence[tuple[Claim, Verdict]]) -> str:
    if not verdicts:
        return "<p>The paper has no experiment of this name.</p>"
    items = [
        f'<li class="{verdict.replace(" ", "-")}"><span class="verdict">{verdict.capitalize()}.</span> '
        f'{html.escape(claim.text)}<p class="number">{html.escape(words)}</p></li>'
        for claim, (verdict, words) in verdicts
    ]
    return f'<ul class="claims">{"".join(items)}</ul>'


def _panels(experiment: Experiment, evidence: Evidence) -> tuple[list[Panel], list[str]]:
    """What can be drawn, and why the rest cannot."""
    drawn: list[Panel] = []
    reasons: list[str] = []
    for make in (_sensitivity_panels, _quantity_panels, _trace_panels):
        try:
            drawn += make(experiment, evidence)
        except UserError as error:
            reasons.append(str(error))
    return drawn, reasons


def _sensitivity_panels(experiment: Experiment, evidence: Evidence) -> list[Panel]:
    if experiment.against is not None:
        against = panels.against_key(evidence.curves, experiment.against, _capped_loss, panels.LOSS_LABEL)
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

        drawn.append(panels.against_lr(evidence.curves, measured, quantity.label, y_log=True))
    return drawn


def _trace_panels(experiment: Experiment, evidence: Evidence) -> list[Panel]:
    drawn = []
    for name in experiment.traces:
        log = name.split("/")[0] in ("attention_logit_max", "grad_rms", "update_rms", "q_rms", "k_rms")
        drawn += panels.trace_panels(evidence.study, evidence.curves, name, log)
    return drawn


def _capped_loss(row: Row) -> float:
    return float(capped(final_loss(row), number(row, "val_loss_initial")))


def _sensitivity(evidence: Evidence) -> str:
    try:
        found = evidence.sensitivities
    except UserError as error:
        return page.paragraphs([str(error)])
    if all(len(one.curve.lrs) < 2 for one in found):
        return ""  # a study at one rate, or at the best of each size, says nothing of sensitivity
    said = f"{lr_sensitivity.DEFINITION} {rates_note(found, lr_sensitivity.DEFAULT_RANGE)}"
    return page.paragraphs([said]) + page.table([one.record() for one in found])


def _extrapolation(experiment: Experiment, evidence: Evidence) -> str:
    parts = []
    for quantity in experiment.quantities:
        try:
            series, made = instability.analyse(evidence.study, evidence.group, quantity, _holds_out(evidence))
        except UserError as error:
            parts.append(page.paragraphs([str(error)]))
            continue
        parts.append(page.paragraphs(instability.notes(series, quantity)))
        parts.append(page.table([one.record() for one in made]))
    return "".join(parts)


def _holds_out(evidence: Evidence) -> bool:
    """The largest size is held out where nothing is left to predict, and enough sizes remain for a fit."""
    return not evidence.missing and len({curve.shape for curve in evidence.curves if curve.runs}) > 3


def _grid(study: Study) -> str:
    states = Counter(row.get("status", "finished") for row in [*study.rows, *study.missing])
    total = sum(states.values())
    said = ", ".join(f"{number} {state}" for state, number in sorted(states.items()))
    sizes = _distinct(study.rows, lambda row: row.get(SIZE), lambda n: f"{n:,}")
    rates = _distinct(study.rows, lambda row: row.get(LR), lambda lr: f"{lr:g}")
    lines = [f"{total} runs: {said}.", f"N (non-embedding): {sizes}.", f"Learning rates: {rates}."]
    lines += [f"Without a result: {'; '.join(map(name_of, study.missing))}."] if study.missing else []
    return page.paragraphs(lines)


def _shortened(study: Study) -> str:
    """What differs from the paper's setting, beside what the sweep varies."""
    records = (
        [{"setting": "scale", "paper": "paper", "here": study.scale}] if study.scale not in (None, "paper") else []
    )
    for key, paper in PAPER.items():
        own = list(
            dict.fromkeys(text(row.get("steps_planned" if key == "budget.steps" else key)) for row in study.rows)
        )
        if own and own not in (["null"], [text(paper)]):
            records.append({"setting": key, "paper": text(paper), "here": ", ".join(own)})
    return page.table(records) if records else ""


def _provenance(study: Study) -> str:
    asked = {
        "seeds": lambda row: row.get("seed"),
        "devices": lambda row: row.get("device"),
        "precision": lambda row: row.get("precision"),
        "versions": lambda row: ", ".join(f"{k} {v}" for k, v in (row.get("versions") or {}).items()) or None,
        "commits": lambda row: row.get("git_commit"),
        "data": lambda row: row.get("data_fingerprint"),
    }
    records = [{"what": what, "found": _distinct(study.rows, ask)} for what, ask in asked.items()]
    return page.table([record for record in records if record["found"]])


def _distinct(rows: Sequence[Row], ask: Callable, form: Callable = str) -> str:
    values = {value for row in rows if (value := ask(row)) is not None}
    return ", ".join(form(value) if _order(value)[0] == 0 else text(value) for value in sorted(values, key=_order))


def _runs(study: Study, group: Sequence[str]) -> str:
    keys = [key for key in group if key != "scan"]
    shown = ("run_id", SIZE, *keys, LR, "seed", "status", "val_loss", "val_loss_initial", "diverged_at_step")
    everything = sorted(
        [*study.rows, *study.missing],
        key=lambda row: (_order(row.get(SIZE)), *(text(row.get(k)) for k in keys), _order(row.get(LR))),
    )
    records = [{key: row.get(key) for key in shown} for row in everything]
    return f"<details><summary>{len(records)} runs</summary>{page.table(records)}</details>"


def _order(value: object) -> tuple:
    """Numbers first, then what a hand-made table may hold in their place."""
    is_number = isinstance(value, (int, float)) and value == value
    return (0, value, "") if is_number else (1, 0.0, text(value))
