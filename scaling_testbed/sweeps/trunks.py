"""Runs of a warmup-stable-decay schedule that share their trunk (`shared_trunk: true` in a sweep file).

Until its decay begins, such a run does not depend on its budget. So runs that differ only in the budget have one trunk
at the constant rate, and each begins where its decay does (Haegele et al. 2024, arXiv 2405.18392). The trunk is made in
parts: each part ends where a decay begins, and the next part begins there. Every run then needs one whole run before
it. A run ends in the same bits as if it were trained whole, so it has the run_id of the whole run
(StartConfig.same_run), whatever the other budgets of the sweep are. A longer budget that is added later adds one part.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from scaling_testbed.config.budget import UNITS, BudgetConfig
from scaling_testbed.config.compose import compose_many
from scaling_testbed.config.run import RunConfig, interventions_of, run_folder_path, run_id
from scaling_testbed.config.start import StartConfig, checkpoint_of, finished_at
from scaling_testbed.config.words import key_of, paths_of, quoted
from scaling_testbed.errors import ConfigError
from scaling_testbed.sweeps.grid import overrides_before

if TYPE_CHECKING:
    from scaling_testbed.sweeps.plan import PlannedRun

TRUNK = "trunk"  # the folder of the parts, inside that of the sweep, so that no law takes one for a finished run
NO_TASKS = ["evaluation.tasks=[]", "evaluation.tasks_every_steps=0"]  # they are scored where a decay ends
OWN = ("start.", "schedule.steps", "name", "checkpoint.at_end", *(f"budget.{unit}" for unit in UNITS))


@dataclass(frozen=True)
class Branched:
    """A run of a sweep, or a part of a trunk. point: what it was planned for. after: the run_id of the run in whose
    state it begins; None if it begins at step 0."""

    run: RunConfig
    overrides: list[str]
    point: dict[str, str]
    after: str | None = None
    is_part: bool = False


def branched(
    runs: Sequence[RunConfig],
    lists: Sequence[list[str]],
    points: Sequence[dict[str, str]],
    steps_of: Callable[[RunConfig], int],
) -> list[Branched]:
    """The runs, those with a schedule that decays at its end as branches, and the parts of their trunks before them.

    lists: the overrides of each run. steps_of: a run -> its steps. Raises ConfigError if no run has such a schedule, or
    if the trunk of a run depends on its budget.
    """
    _check_no_hours("shared_trunk", runs)
    groups: dict[str, list[int]] = {}
    for number, run in enumerate(runs):
        if decay_begin(run, steps_of(run)) is not None:
            groups.setdefault(run_id(replace(run, budget=BudgetConfig(steps=1))), []).append(number)
    if not groups:
        raise ConfigError("shared_trunk: no run has schedule=wsd; leave the key out, or set the schedule")
    made: list[Branched] = []
    taken = {number for group in groups.values() for number in group}
    for numbers in groups.values():
        numbers.sort(key=lambda number: steps_of(runs[number]))
        _check_one_trunk([runs[number] for number in numbers], steps_of)
        made += _tree([(runs[number], lists[number], points[number]) for number in numbers], steps_of)
    return made + [
        Branched(run, list(lists[number]), points[number]) for number, run in enumerate(runs) if number not in taken
    ]


def _check_no_hours(key: str, runs: Sequence[RunConfig]) -> None:
    """Raise ConfigError if the clock ends one of the `runs`: which of its steps others share is not known before."""
    if hours := next((run.budget.hours for run in runs if run.budget.hours is not None), None):
        raise ConfigError(f"{key} cannot be with budget.hours={hours:g}: the clock chooses the steps; leave one out")


def _tree(
    ladder: Sequence[tuple[RunConfig, list[str], dict[str, str]]], steps_of: Callable[[RunConfig], int]
) -> list[Branched]:
    """The parts of one trunk and the branches of its runs, which come with their overrides by rising budget."""
    made: list[Branched] = []
    part: Branched | None = None
    for run, overrides, point in ladder:
        steps, begin = steps_of(run), decay_begin(run, steps_of(run))
        assert begin is not None
        if part is None or begin > steps_of(part.run):
            part = _part(run, overrides, point, steps, begin, part, steps_of)
            made.append(part)
        start = _start(part.run, begin)
        words = [*overrides, *_words(start)]
        branch = replace(run, start=start, overrides=words)
        made.append(Branched(branch, words, point, run_id(part.run)))
    return made


def _part(
    run: RunConfig,
    overrides: Sequence[str],
    point: dict[str, str],
    steps: int,
    end: int,
    before: Branched | None,
    steps_of: Callable[[RunConfig], int],
) -> Branched:
    """The part of the trunk that ends at step `end`, where the decay of `run` of `steps` steps begins."""
    kept = [text for text in overrides if key_of(text) not in OWN]
    own = [f"name={quoted(f'{run.name}/{TRUNK}')}", f"budget.steps={end}", f"schedule.steps={steps}"]
    own += [f"budget.{unit}=null" for unit in UNITS if unit != "steps" and getattr(run.budget, unit) is not None]
    own += ["checkpoint.at_end=true", *(NO_TASKS if run.evaluation.tasks else [])]
    start = _start(before.run, steps_of(before.run)) if before else run.start
    words = [*kept, *own, *_words(start)]
    made = replace(  # as the words say, without composing them
        run,
        name=f"{run.name}/{TRUNK}",
        budget=BudgetConfig(steps=float(end), params=run.budget.params),
        schedule=replace(run.schedule, steps=steps),
        checkpoint=replace(run.checkpoint, at_end=True),
        evaluation=replace(run.evaluation, tasks=[], tasks_every_steps=0),
        start=start,
        overrides=words,
    )
    there = {key: value for key, value in point.items() if not key.startswith("budget.")} | {"budget.steps": str(end)}
    return Branched(made, words, there, run_id(before.run) if before else None, is_part=True)


def _start(parent: RunConfig, step: int) -> StartConfig:
    return StartConfig(run=str(run_folder_path(parent)), step=step, same_run=True)


def _words(start: StartConfig) -> list[str]:
    if start.run is None:
        return []
    return [f"start.run={quoted(start.run)}", f"start.step={start.step}", "start.same_run=true"]


def _of_start(text: str) -> bool:
    """Whether a word sets keys of start only."""
    return all(path.startswith("start.") for path in paths_of(text))


def _from_scratch(words: Sequence[str]) -> bool:
    """Whether a run of a sweep with parents has start.run=null. Raises ConfigError if it has another run."""
    setting = [text for text in words if "start.run" in paths_of(text)]
    if odd := [text for text in setting if text != "start.run=null"]:
        raise ConfigError(
            f"{odd[0]}: with parent: in a sweep, a run begins in the state of its parent; leave start.run out, or "
            "write start.run=null for a run from scratch"
        )
    return bool(setting)


def with_parents(
    lists: Sequence[list[str]],
    parent: Sequence[str],
    points: Sequence[dict[str, str]],
    steps_of: Callable[[RunConfig], int],
    rules: Mapping[str, str],
    valued: Callable[[Mapping[str, str], Sequence[list[str]]], list[list[str]]],
) -> list[Branched]:
    """The runs with the overrides `lists`, each in the state of its parent, and the parents before them.

    The parent of a run has the run's overrides without those of start, and `parent` in place of those of the same keys.
    Runs whose parents are equal share one. Without start.step the runs begin where their parents end. A run with
    start.run=null has no parent. valued: rules and overrides -> the overrides with the values of the rules; a parent
    has its own values, and none for the keys of `parent`.
    """
    begun = [number for number, words in enumerate(lists) if not _from_scratch(words)]
    if not begun:
        raise ConfigError("parent: every run has start.run=null, so no run has a parent; leave parent out")
    plain = [[text for text in lists[number] if not _of_start(text)] for number in begun]
    own = {key_of(text) for text in parent}
    left = {key: rule for key, rule in rules.items() if not (key_of(key) in own or key_of(key).startswith("start."))}
    named = _in_trunk(valued(left, [[*overrides_before(words, parent), *parent] for words in plain]))
    words_of = dict(zip(begun, named, strict=True))
    parent_of = dict(zip(begun, compose_many(named), strict=True))
    _check_no_hours("parent", list(parent_of.values()))
    full = [list(words) for words in lists]
    for number, run in parent_of.items():
        typed, last = [text for text in lists[number] if key_of(text) == "start.step"], steps_of(run)
        step = [] if typed else [f"start.step={last}"]
        value = typed[-1].partition("=")[2] if typed else str(last)
        if not value.isdecimal() or int(value) > last:
            raise ConfigError(f"start.step must be a step of the parent, which has {last:,}; got {value}")
        full[number] += [f"start.run={quoted(str(run_folder_path(run)))}", *step]
    full = valued(rules, full)
    runs = compose_many(full)
    kept: dict[str, set[int]] = {}
    for number, run in parent_of.items():
        kept.setdefault(run_id(run), set()).add(runs[number].start.number)
    made: dict[str, Branched] = {}
    for number, run in parent_of.items():
        steps = ",".join(map(str, sorted(kept[run_id(run)] | set(run.checkpoint.keep_steps))))
        words = [*words_of[number], "checkpoint.at_end=true", f"checkpoint.keep_steps=[{steps}]"]
        made.setdefault(run_id(run), Branched(run, words, _point_of(points[number], words), is_part=True))
    after = {number: run_id(run) for number, run in parent_of.items()}
    branches = zip(runs, full, points, strict=True)
    return [*made.values(), *(Branched(*branch, after.get(number)) for number, branch in enumerate(branches))]


def _in_trunk(lists: Sequence[list[str]]) -> list[list[str]]:
    """The overrides with the folder of the parents as their name."""
    return [
        [*(text for text in words if key_of(text) != "name"), f"name={quoted(f'{run.name}/{TRUNK}')}"]
        for words, run in zip(lists, compose_many(lists), strict=True)
    ]


def _point_of(point: dict[str, str], words: Sequence[str]) -> dict[str, str]:
    """The point of a run as one of its parent, which has these overrides, without keys of start."""
    was_set = dict(text.partition("=")[::2] for text in words)
    return {key: was_set.get(key, value) for key, value in point.items() if not key_of(key).startswith("start.")}


def saving(runs: Sequence["PlannedRun"]) -> str | None:
    """What shared trunks save of the FLOPs of a plan, in a sentence; None without trunks."""
    branches = [run for run in runs if run.after and not run.is_part]
    if not branches:
        return None
    cost = sum(run.flops for run in runs if run.is_part or run.after)
    whole = sum(run.flops / run.share for run in branches)
    parts = sum(run.is_part for run in runs)
    return (
        f"{len(branches)} runs share trunks in {parts} parts: {cost:.3g} FLOPs, {cost / whole:.0%} of the {whole:.3g} "
        "of whole runs"
    )


def without_checkpoint(runs: Sequence["PlannedRun"]) -> list[str]:
    """Runs that have finished and do not have the checkpoint in which unfinished runs of a plan begin, a line each."""
    folders = {run.run_id: Path(run.folder) for run in runs}
    lost: dict[tuple[Path, int], int] = {}
    for run in runs:
        if run.after is None or finished_at(folders[run.run_id]):
            continue
        before, step = folders[run.after], run.config["start.step"]
        if finished_at(before) and not checkpoint_of(before, step).is_dir():
            lost[before, step] = lost.get((before, step), 0) + 1
    return [
        f"{folder} has finished without a checkpoint of step {step:,}, in which {count} unfinished runs begin; delete "
        "this folder, and `sweep run` trains it again"
        for (folder, step), count in lost.items()
    ]


def decay_begin(run: RunConfig, steps: int) -> int | None:
    """The step of a run of `steps` steps at which the rate begins to decay; None if it falls from the warm-up on."""
    return run.schedule.decay_begin(steps, run.batch.tokens)


def _check_one_trunk(runs: Sequence[RunConfig], steps_of: Callable[[RunConfig], int]) -> None:
    """Raise ConfigError unless these runs, which differ only in the budget, have the same trunk."""
    first = runs[0]
    if first.start.run is not None or first.schedule.steps is not None:
        key = "start.run" if first.start.run is not None else "schedule.steps"
        raise ConfigError(f"shared_trunk: {key} is set by the sweep itself; leave it out")
    warmups = [run.schedule.warmup_steps(steps_of(run), run.batch.tokens) for run in runs]
    if len(set(warmups)) > 1:
        raise ConfigError(
            f"shared_trunk: runs of other budgets have other warm-ups ({min(warmups):,} to {max(warmups):,} steps); "
            "give schedule.warmup= in steps (1 or more), or schedule.warmup_tokens="
        )
    begin = decay_begin(first, steps_of(first))
    if begin is not None and begin <= warmups[0]:
        raise ConfigError(
            f"shared_trunk: the decay of the shortest run begins at step {begin:,}, in its warm-up of {warmups[0]:,} "
            "steps; give a larger budget or a shorter warm-up"
        )
    if needing := [name for name, one in interventions_of(first).items() if one.needs_steps]:
        raise ConfigError(
            f"shared_trunk: interventions.{needing[0]} is told the number of all steps, so runs of other budgets have "
            "no common trunk; leave one of them out"
        )
    optimizers = {repr(run.optimizer.for_length(run.schedule.length(steps_of(run)))) for run in runs}
    if len(optimizers) > 1:
        raise ConfigError(
            "shared_trunk: the weight decay of these runs depends on their length, so they have no common trunk; "
            "see optimizer.weight_decay"
        )
