"""A sweep as a person sees it: tables of its plan, of its runs now, and of its losses."""

from collections.abc import Sequence

from rich.table import Table

from scaling_testbed.progress import clock
from scaling_testbed.sweeps.plan import PlannedRun
from scaling_testbed.sweeps.status import RunState, counts


def plan_table(runs: Sequence[PlannedRun]) -> Table:
    """One line per run, and the totals."""
    params = {run.params for run in runs}
    counted = f"N ({', '.join(sorted(params))})"
    table = _table("run_id", *_varied(runs), counted, "tokens", "steps", "6ND", "FLOPs", "memory")
    with_hours = any(run.gpu_hours is not None for run in runs)
    if with_hours:
        table.add_column("GPU-hours", justify="right")
    for run in runs:
        cells = [run.run_id, *(run.varied.get(key, "") for key in _varied(runs)), f"{run.budget_n_params:,}"]
        cells += [f"{run.n_tokens:,}", f"{run.steps:,}", f"{run.budget_flops_6nd:.3g}", f"{run.flops:.3g}"]
        cells += [f"{run.memory_bytes / 2**30:,.1f} GiB"]
        cells += [f"{run.gpu_hours:,.2f}" if run.gpu_hours is not None else "?"] if with_hours else []
        table.add_row(*cells)
    table.add_section()
    total = [f"{len(runs)} runs", *[""] * len(_varied(runs)), "", f"{sum(run.n_tokens for run in runs):,}"]
    total += [f"{sum(run.steps for run in runs):,}", f"{sum(run.budget_flops_6nd for run in runs):.3g}"]
    total += [f"{sum(run.flops for run in runs):.3g}", ""]
    total += [f"{sum(run.gpu_hours or 0 for run in runs):,.2f}"] if with_hours else []
    table.add_row(*total)
    return table


def status_table(states: Sequence[RunState]) -> Table:
    """One line per run with its state, step, loss, time left, owner or job, and what went wrong."""
    runs = [found.run for found in states]
    table = _table("run_id", *_varied(runs), "state", "step", "loss", "left", "where")
    table.add_column("error", overflow="ellipsis", no_wrap=True, max_width=60)
    for found in states:
        where = f"job {found.job}" if found.job else str(found.owner or "")
        cells = [found.run.run_id, *(found.run.varied.get(key, "") for key in _varied(runs)), found.state]
        cells += [f"{found.step:,}/{found.run.steps:,}", _loss(found)]
        cells += [clock(found.eta_seconds) if found.eta_seconds is not None else "", where, found.error or ""]
        table.add_row(*cells)
    return table


def live_table(states: Sequence[RunState], left: float | None, rows: int) -> Table:
    """The grid while it runs, in at most `rows` lines: what runs now, then what failed last."""
    shown = [found for found in states if found.state in ("running", "failed", "stopped")][: max(1, rows - 6)]
    table = status_table(shown or states[:1])
    table.caption = counts(states) + (f", about {clock(left)} left" if left is not None else "")
    return table


def loss_table(states: Sequence[RunState]) -> Table:
    """Final validation losses in nats per token: the longest axis across, all others down. A run without a number
    shows its state; so does a diverged one, beside its last loss."""
    keys = _varied([found.run for found in states])
    sizes = {key: len({found.run.varied.get(key) for found in states}) for key in keys}
    across = max(reversed(keys), key=lambda key: sizes[key], default=None)
    down = [key for key in keys if key != across]
    columns = list(dict.fromkeys(found.run.varied.get(across, "") for found in states))
    table = _table(*down, *(f"{across}={value}" if across else "val_loss" for value in columns))
    lines: dict[tuple[str, ...], dict[str, str]] = {}
    for found in states:
        line = lines.setdefault(tuple(found.run.varied.get(key, "") for key in down), {})
        line[found.run.varied.get(across, "")] = _final(found)
    for line, cells in lines.items():
        table.add_row(*line, *(cells.get(value, "") for value in columns))
    return table


def _final(found: RunState) -> str:
    if found.state == "finished":
        return _loss(found)
    return f"{_loss(found)} {found.state}".strip() if found.state == "diverged" else found.state


def _loss(found: RunState) -> str:
    return f"{found.loss:.4f}" if found.loss is not None else ""


def _varied(runs: Sequence[PlannedRun]) -> list[str]:
    return list(dict.fromkeys(key for run in runs for key in run.varied))


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", caption_justify="left")
    for column in columns:
        table.add_column(column, no_wrap=True)
    return table
