"""Tables of a sweep for a terminal: its plan, the state of its runs, and its losses."""

import math
from collections.abc import Iterable, Mapping, Sequence

from rich.console import Group
from rich.text import Text

from scaling_testbed.analysis.curves.intervals import detectable
from scaling_testbed.config.memory import USABLE
from scaling_testbed.errors import UserError, listed
from scaling_testbed.papers.declaration import FACTORS, WORDS, Declaration
from scaling_testbed.papers.effects import Question
from scaling_testbed.papers.paper import Claim, paper_named
from scaling_testbed.progress import clock
from scaling_testbed.sweeps.gpu_memory import GIB
from scaling_testbed.sweeps.grid import Sweep
from scaling_testbed.sweeps.plan import PlannedRun
from scaling_testbed.sweeps.sizes import Size
from scaling_testbed.sweeps.speed import Speed
from scaling_testbed.sweeps.status import RunState, counts
from scaling_testbed.tables import LeftFirst, Whole, brief

LONGEST_ERROR = 60


def plan_table(runs: Sequence[PlannedRun], ruled: Sequence[str] = (), hours: str = "GPU-hours") -> Whole:
    """One line per run, and the totals. ruled: the keys that have a rule, whose values are shown. hours: of which
    device, as the head of the column."""
    varied, with_hours = _varied(runs), any(run.hours is not None for run in runs)
    counted = f"N ({', '.join(sorted({run.params for run in runs}))})"
    columns = ["run_id", *varied, *ruled, counted, "tokens", "steps", "6ND", "FLOPs", "memory"]
    rows = []
    for run in runs:
        cells = [run.run_id, *(run.varied.get(key, "") for key in varied)]
        values = dict(text.partition("=")[::2] for text in run.overrides)
        cells += [*(values[key] for key in ruled), f"{run.budget_n_params:,}"]
        cells += [f"{run.n_tokens:,}", _steps(run), f"{run.budget_flops_6nd:.3g}", f"{run.flops:.3g}"]
        cells += [f"{run.memory_bytes / GIB:,.1f} GiB{'' if run.fits else ' !'}"]
        rows.append([*cells, _hours([run]) or "?"])
    tokens = sum(run.n_tokens - run.first_step * run.tokens_per_step for run in runs)
    total = [f"{len(runs)} runs", *[""] * (len(varied) + len(ruled)), "", f"{tokens:,}"]
    total += [f"{sum(run.steps - run.first_step for run in runs):,}"]
    total += [f"{sum(run.budget_flops_6nd * run.share for run in runs):.3g}"]
    total += [f"{sum(run.flops for run in runs):.3g}", "", _hours(runs)]
    rows.append(total)
    return Whole([*columns, hours], rows) if with_hours else Whole(columns, [row[:-1] for row in rows])


def plan_summary(
    runs: Sequence[PlannedRun],
    on_gpu: bool = True,
    hours: str = "GPU-hours",
    limits: Mapping[str, str | None] | None = None,
) -> Whole:
    """One line per model, and the totals. Where the runs of a model differ, their least and largest values are shown.

    on_gpu: whether the processes of a run have GPUs. hours: of which device, as the head of the column. limits: the
    time limit of each run by its id, as sbatch takes it; None: not shown.
    """
    groups: dict[tuple[object, ...], list[PlannedRun]] = {}
    for run in runs:
        size = (run.config.get(key) for key in ("model.name", "model.d_model", "model.n_layers"))
        groups.setdefault(tuple(size), []).append(run)
    counted = f"N ({', '.join(sorted({run.params for run in runs}))})"
    columns = ["model", counted, "runs", "tokens", "steps", "FLOPs", "memory", "GPUs"]
    priced, limited = any(run.hours is not None for run in runs), any((limits or {}).values())
    rows = []
    for (name, *_), own in groups.items():
        too_large = "" if all(run.fits for run in own) else " !"
        cells = [str(name), _span((run.budget_n_params for run in own), "{:,}"), f"{len(own):,}"]
        cells += [_span((run.n_tokens for run in own), "{:,}"), _span((run.steps for run in own), "{:,}")]
        cells += [f"{sum(run.flops for run in own):.3g}"]
        cells += [_span((run.memory_bytes / GIB for run in own), "{:,.1f}") + f" GiB{too_large}"]
        cells += [_span((run.processes if on_gpu else 0 for run in own), "{:,}")]
        own_limits = dict.fromkeys((limits or {}).get(run.run_id) or "" for run in own)
        rows.append([*cells, _hours(own), ", ".join(own_limits)])
    total = ["all", "", f"{len(runs):,} runs", "", "", f"{sum(run.flops for run in runs):.3g}", "", ""]
    rows.append([*total, _hours(runs), ""])
    kept = [*range(len(columns)), *([len(columns)] if priced else []), *([len(columns) + 1] if limited else [])]
    columns += [hours, "time limit"]
    return Whole([columns[place] for place in kept], [[row[place] for place in kept] for row in rows])


def sizes_table(sizes: Sequence[Size], speed: Speed | None) -> Whole:
    """One line for each array job of a submission."""
    columns = ["array job", "tasks", "models", "GPUs", "memory", "time limit"]
    rows = []
    for number, size in enumerate(sizes, 1):
        cells = [f"{number}", f"{len(size.runs):,}", size.name, f"{size.n_gpus}", _memory(size.runs)]
        rows.append([*cells, size.config.time or "of the cluster", _hours(size.runs)])
    return Whole([*columns, speed.unit], rows) if speed else Whole(columns, [row[:-1] for row in rows])


def submission_line(sizes: Sequence[Size], n_jobs: int, speed: Speed | None) -> str:
    """What a submission costs, before it is sent, in `n_jobs` array jobs."""
    runs, config = [run for size in sizes for run in size.runs], sizes[0].config
    gpus = {size.n_gpus for size in sizes}
    each = f"{_span(gpus, '{}')} GPU{'s' * (max(gpus) > 1)}" if any(gpus) else "CPUs"
    tasks = f"{len(runs):,} tasks, each on {each}" + (f", in {n_jobs:,} array jobs" if n_jobs > 1 else "")
    memory = _memory(runs) + (" on each GPU" if any(gpus) else "")
    hours = "GPU-hours" if any(gpus) else "CPU-hours"
    counted = f"{_hours(runs)} {hours}, {speed.words}" if speed else f"{hours} not known without --flops-per-second"
    limits = dict.fromkeys(size.config.time for size in sizes)
    limit = next(iter(limits)) or "of the cluster" if len(limits) == 1 else "of each size"
    return "; ".join(
        [tasks, memory, counted, f"partition {config.partition or 'of the cluster'}", f"time limit {limit}"]
    )


def _memory(runs: Sequence[PlannedRun]) -> str:
    return f"{_span((run.memory_bytes / GIB for run in runs), '{:,.1f}')} GiB"


def _hours(runs: Sequence[PlannedRun]) -> str:
    """The sum of the hours, with two decimals or with two digits; empty where none is known."""
    hours = [run.hours for run in runs if run.hours is not None]
    if not hours:
        return ""
    return f"{sum(hours):,.2f}" if sum(hours) >= 0.1 else f"{sum(hours):.2g}"


def _span(values: Iterable[float], form: str) -> str:
    """The least and the largest value, or the only one."""
    least, *_, largest = sorted(values) * 2
    shown = [form.format(least), form.format(largest)]
    return shown[0] if shown[0] == shown[1] else " to ".join(shown)


def _steps(run: PlannedRun) -> str:
    return f"{run.steps:,} from {run.first_step:,}" if run.first_step else f"{run.steps:,}"


def detectable_effects(sweep: Sweep, runs: Sequence[PlannedRun]) -> list[str]:
    """Lines that say which effects the planned seeds can detect, by the spread that the sweep declares.

    Empty if it declares nothing. The effects are differences of two conditions, paired over seeds, in the mean over
    sizes, of the measures that the claims of the experiment use; a claim agrees only if the effect is at least the
    margin, too. The second line is for the strictest test of Holm's correction for these claims. A last line names the
    measures whose spread is not declared.
    """
    if sweep.declared is None:
        return []
    if sweep.draw:
        return ["no claim can be judged: verdicts are about the declared grid, and drawn values are none"]
    runs = [run for run in runs if not run.is_part]  # which no claim compares
    seeds = {run.config.get("seed") for run in runs}
    sizes = {(run.config.get("model.d_model"), run.config.get("model.n_layers")) for run in runs}
    counted = f"{len(seeds)} seed{'s' * (len(seeds) > 1)}, {len(sizes)} size{'s' * (len(sizes) > 1)}"
    if len(seeds) < 2:
        return [f"{counted}: no claim can be judged; two seeds are the least, e.g. seed=0,1,2"]
    claims = paper_named(sweep.paper).experiment(sweep.experiment).claims if sweep.paper and sweep.experiment else []
    margins = _margins(sweep.declared, claims)
    if not any(name in sweep.declared.seed_sd for name in margins):
        return [f"{counted}: the sweep declares no spread over seeds, so it is not known which effects they can detect"]
    unknown = [WORDS.get(name, name) for name in margins if name not in sweep.declared.seed_sd]
    open_ = [f"no spread over seeds is declared of {', '.join(unknown)}"] if unknown else []
    try:
        alone, strictest = (_detectable(sweep.declared, margins, len(seeds), len(sizes), n) for n in (1, len(claims)))
    except UserError as error:
        return [str(error)]
    if len(claims) < 2:
        return [f"{counted}: a claim of a difference of {alone} agrees in 4 of 5 such studies", *open_]
    return [
        f"{counted}: a claim of a difference of {alone} agrees in 4 of 5 such studies, if no other claim is judged",
        f"with Holm's correction for {len(claims)} claims, the strictest of them needs {strictest}",
        *open_,
    ]


def _margins(declared: Declaration, claims: Sequence[Claim]) -> dict[str, float]:
    """The measures that claims use and the least margin of each, on the scale of its differences. Without claims, the
    measures whose spread is declared."""
    asked = [(one.judge.measure, one.judge.margin) for one in claims if isinstance(one.judge, Question)]
    asked = asked if claims else [(name, None) for name in declared.seed_sd]
    found: dict[str, float] = {}
    for name, own in asked:
        margin = own if own is not None else declared.margin(name) or 0.0
        found[name] = min(margin, found.get(name, math.inf))
    return found


def _detectable(declared: Declaration, margins: Mapping[str, float], n_seeds: int, n_sizes: int, n_claims: int) -> str:
    found = []
    for name, sd in declared.seed_sd.items():
        if name not in margins:
            continue
        effect = detectable(sd / math.sqrt(n_sizes), n_seeds, margins[name], n_claims=max(n_claims, 1))
        least = f"a factor of {math.exp(effect):.2f}" if name in FACTORS else f"{effect:.3f}"
        found.append(f"{least} of {WORDS.get(name, name)}")
    return listed(found)


def too_large(runs: Sequence[PlannedRun]) -> list[str]:
    """Lines that name the runs whose estimate of memory does not fit a GPU, and the overrides that make them fit. Empty
    if all fit."""
    groups: dict[tuple[float, tuple[str, ...] | None], list[PlannedRun]] = {}
    for run in runs:
        if not run.fits:
            words = None if run.fits_with is None else tuple(run.fits_with)
            groups.setdefault((run.gpu_memory_gib, words), []).append(run)
    if not groups:
        return []
    number, size, part = sum(map(len, groups.values())), min(gib for gib, _ in groups), USABLE["cuda"]
    lines = [
        f"{number} of {len(runs)} runs need more than {part * size:.0f} GiB, which is {part:.0%} of a GPU of "
        f"{size:g} GiB (compute.gpu_memory_gib= names another size):"
    ]
    for (_, words), group in groups.items():
        needs = sorted(
            {f"{run.memory_bytes / GIB:,.0f}" for run in group}, key=lambda text: float(text.replace(",", ""))
        )
        needed = needs[0] if len(needs) == 1 else f"{needs[0]} to {needs[-1]}"
        way = "it fits with " + " ".join(words) if words else "no override that this command knows makes it fit"
        count = f"{len(group)} runs need" if len(group) > 1 else "1 run needs"
        lines.append(f"  {_which(group, runs)}: {count} {needed} GiB; {way}")
    return lines


def _which(group: Sequence[PlannedRun], runs: Sequence[PlannedRun]) -> str:
    """The values that the runs of `group` have of the keys for which other runs have other values too."""
    words = []
    for key in _varied(runs):
        own = list(dict.fromkeys(run.varied.get(key, "") for run in group))
        if len(own) < len({run.varied.get(key, "") for run in runs}):
            words.append(f"{key}={','.join(own)}")
    return " ".join(words) or ("all of them" if len(group) == len(runs) else ", ".join(run.run_id for run in group))


def status_table(states: Sequence[RunState]) -> LeftFirst:
    """One line per run with its state, time left, step, loss, the predicted final loss if any run has one, the values
    in which it differs from others, owner or job, and error. A narrow terminal cuts the last columns."""
    varied = _varied([found.run for found in states])
    predicted = [str(found.final or "") for found in states]
    shown = ["predicted final loss"] if any(predicted) else []
    rows = []
    for found, final in zip(states, predicted, strict=True):
        left = clock(found.eta_seconds) if found.eta_seconds is not None else ""
        cells = [found.run.run_id, found.state, left, f"{found.step:,}/{found.steps:,}", _loss(found)]
        cells += [final] if shown else []
        cells += [found.run.varied.get(key, "") for key in varied]
        cells += [f"job {found.job}" if found.job else str(found.owner or ""), brief(found.error or "", LONGEST_ERROR)]
        rows.append(cells)
    return LeftFirst(["run_id", "state", "left", "step", "loss", *shown, *varied, "where", "error"], rows)


def live_table(states: Sequence[RunState], left: float | None, rows: int) -> Group:
    """A running sweep in about `rows` lines: the runs that are running, failed or stopped, the time left for the sweep,
    and the number of runs in each state."""
    shown = [found for found in states if found.state in ("running", "failed", "stopped")][: max(1, rows - 6)]
    about = (f"about {clock(left)} left, " if left is not None else "") + counts(states)
    return Group(status_table(shown or states[:1]), Text(about))


def loss_table(states: Sequence[RunState]) -> Whole:
    """Final validation losses in nats per token. The longest axis gives the columns, all others the lines. A run
    without a loss shows its state, and a diverged run shows its last loss and its state. Parts of trunks are left out:
    their rate never decayed."""
    states = [found for found in states if not found.run.is_part]
    keys = _varied([found.run for found in states])
    sizes = {key: len({found.run.varied.get(key) for found in states}) for key in keys}
    across = max(reversed(keys), key=lambda key: sizes[key], default="")
    down = [key for key in keys if key != across]
    columns = list(dict.fromkeys(found.run.varied.get(across, "") for found in states))
    lines: dict[tuple[str, ...], dict[str, str]] = {}
    for found in states:
        line = lines.setdefault(tuple(found.run.varied.get(key, "") for key in down), {})
        line[found.run.varied.get(across, "")] = _final(found)
    heads = [*down, *(f"{across}={value}" if across else "val_loss" for value in columns)]
    return Whole(heads, [[*line, *(cells.get(value, "") for value in columns)] for line, cells in lines.items()])


def _final(found: RunState) -> str:
    if found.state == "finished":
        return _loss(found)
    return f"{_loss(found)} {found.state}".strip() if found.state == "diverged" else found.state


def _loss(found: RunState) -> str:
    return f"{found.loss:.4f}" if found.loss is not None else ""


def _varied(runs: Sequence[PlannedRun]) -> list[str]:
    return list(dict.fromkeys(key for run in runs for key in run.varied))
