"""The columns that laws ask for, from rows of any origin."""

import contextlib
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, median

from scaling_testbed.analysis.laws.forms import LAWS, Law
from scaling_testbed.analysis.laws.frontier import budget_starts, loose
from scaling_testbed.analysis.rows import published
from scaling_testbed.analysis.rows.conditions import parse
from scaling_testbed.analysis.rows.study import Row, Study, load, name_of
from scaling_testbed.config.budget import CONVENTIONS
from scaling_testbed.errors import ConfigError, UserError, check_choice

ROUNDED = ("flops", "n_tokens")  # never quite what was planned, as steps and batches are whole
SHARES = ("error", "accuracy")
OWN = {"loss": "val_loss", "lr": "optimizer.lr"}  # what our rows call them
OTHERS = {
    *("loss", "tokens_per_param", "error", "accuracy", "steps", "epochs", "batch_tokens", *CONVENTIONS),
    *("flops_6nd", "batch.sequences", "batch.sequence_length", *OWN.values()),
    *("run_id", "name", "seed", "dataset", "data_fingerprint"),
}  # what --map may name beside the columns of the laws


def read(path: str | Path, source: str | None, mapping: Sequence[str], size: str) -> tuple[list[Row], list[str]]:
    """Rows with the columns of laws under their names, and what is to be said about rows that were left out.

    source: a published layout (see published.py), else what rows.load reads. mapping: `column=Name of theirs`. size:
    the column that is N. Raises UserError and ConfigError."""
    if source is None:
        return of_study(load(path), mapping, size)
    check_choice("--source", source, published.SOURCES)
    return _named(published.SOURCES[source](Path(path)), [], path, _pairs(mapping), size)


def of_study(study: Study, mapping: Sequence[str] = (), size: str = "n_params") -> tuple[list[Row], list[str]]:
    """What `read` does, of a study: its runs that are neither unfinished nor diverged."""
    said: list[str] = []
    pairs = _pairs(mapping)
    rows, missing = study.rows, study.missing
    if pairs.get("loss", "val_loss") != "val_loss":  # a row with that loss is none without a result
        done = [row for row in missing if row.get("status") == "missing" and row.get(pairs["loss"]) is not None]
        rows = [*rows, *({key: row[key] for key in row if key not in ("label", "status")} for row in done)]
        missing = [row for row in missing if row not in done]
    if missing:
        named = "; ".join(name_of(row) for row in missing[:5])
        said.append(f"{len(missing)} runs are not finished and are left out: {named}")
    diverged = [row for row in rows if row.get("status") == "diverged"]
    if diverged:
        said.append(f"{len(diverged)} diverged runs are left out")
        rows = [row for row in rows if row.get("status") != "diverged"]
    return _named(rows, said, study.path, pairs, size)


def _named(
    rows: Sequence[Row], said: Sequence[str], path: str | Path, pairs: dict[str, str], size: str
) -> tuple[list[Row], list[str]]:
    """The rows with the columns of laws, and what is to be said of them after what was said of others."""
    check_choice("--size", size, CONVENTIONS)
    if not rows:
        raise UserError(f"{path}: no finished run is left; {'; '.join(said)}")
    taken = {ours: _column(ours, theirs, rows) for ours, theirs in pairs.items()}
    rows = [{**row, **{ours: _times(row.get(name), factor) for ours, (name, factor) in taken.items()}} for row in rows]
    if "flops" in pairs:
        rows = [{key: value for key, value in row.items() if key != "flops_6nd"} for row in rows]
    _check_size(rows, size)
    rows = [derived(row, size) for row in rows]
    return rows, [*said, *_repeated(rows), *_units(rows)]


def _column(ours: str, theirs: str, rows: Sequence[Row]) -> tuple[str, float]:
    """The column that --map names, and what its numbers are multiplied with: `Params (M)*1e6`."""
    if any(theirs in row for row in rows):
        return theirs, 1.0
    name, _, factor = theirs.rpartition("*")
    with contextlib.suppress(ValueError):
        if any(name in row for row in rows) and math.isfinite(float(factor)):
            return name, float(factor)
    columns = ", ".join(list(dict.fromkeys(key for row in rows for key in row))[:12])
    raise ConfigError(f"--map {ours}={theirs}: no row has the column {theirs!r}; it has {columns}")


def _times(value: object, factor: float) -> object:
    number = _finite(value)
    return value if factor == 1 or number is None else number * factor


def _units(rows: Sequence[Row]) -> list[str]:
    """What looks like millions, billions or thousands where ones are meant."""
    sizes = [tuple(_finite(row.get(key)) for key in ("n_params", "n_tokens", "flops")) for row in rows]
    pairs = [(n, d) for n, d, _ in sizes if n and d]
    meant = 'are these parameters, tokens and FLOPs? A column in millions is --map n_params="COLUMN*1e6"'
    if pairs and max(d / n for n, d in pairs) < 0.1:
        return [f"no row has even a tenth of a token for each parameter: {meant}"]
    ratios = [c / (6 * n * d) for n, d, c in sizes if n and d and c]
    if ratios and not 0.1 < median(ratios) < 10:
        return [f"FLOPs are {median(ratios):.2g} times 6 N D: {meant}"]
    return []


def _repeated(rows: Sequence[Row]) -> list[str]:
    """What is there twice counts twice, and narrows every interval."""
    kept = {repr(sorted((key, repr(value)) for key, value in row.items() if key != "row")) for row in rows}
    more = len(rows) - len(kept)
    return [f"{more} of {len(rows)} rows repeat another one in every column"] if more else []


def _pairs(mapping: Sequence[str]) -> dict[str, str]:
    pairs: dict[str, str] = {}
    for typed in mapping:
        ours, equals, theirs = typed.partition("=")
        if not (ours and equals and theirs):
            raise ConfigError(f'--map {typed}: write --map column="their column", e.g. --map n_params="Model Size"')
        known = OTHERS.union(*((*law.inputs, law.output) for law in LAWS.values()))
        if ours not in known:
            raise ConfigError(f"--map {typed}: {ours} is no column that laws use; those are {', '.join(sorted(known))}")
        if ours in pairs:
            raise ConfigError(f"--map {typed}: {ours} is mapped already, to {pairs[ours]!r}")
        pairs[ours] = theirs
    return pairs


def _check_size(rows: Sequence[Row], size: str) -> None:
    """A hand-made table has one count of parameters, which must not pass for another."""
    if size != "n_params" and all(row.get(size) in (None, row.get("n_params")) for row in rows):
        raise ConfigError(f"--size {size}: no row counts N so; name a column of it by --map {size}=COLUMN")


def derived(row: Row, size: str = "n_params") -> Row:
    """The row with what follows from its columns: D = C/6N or M N, C = 6ND, M = D/N, steps and tokens of a batch,
    unique tokens from epochs, error from accuracy. A column that is there stays, but n_params, which becomes the N that
    `size` counts, and in rows of our own flops, which there are counted operations and in laws are 6ND."""
    row = {**row, **{ours: row[theirs] for ours, theirs in OWN.items() if theirs in row and ours not in row}}
    if size != "n_params":
        row["n_params"] = row.get(size)
    if row.get("flops_6nd") is not None:
        row["flops"] = None
    n, d, c = (_finite(row.get(key)) for key in ("n_params", "n_tokens", "flops"))
    ratio = _finite(row.get("tokens_per_param"))
    if n and d is None and c:
        d = row["n_tokens"] = c / (6 * n)
    elif n and d is None and ratio:
        d = row["n_tokens"] = ratio * n
    if n and d and c is None:
        row["flops"] = 6 * n * d
    if n and d:
        row["tokens_per_param"] = d / n
    if n:
        row.setdefault("n_params_average", n)
    return _with_batch(_with_error(row), d)


def _with_batch(row: Row, n_tokens: float | None) -> Row:
    sequences, length = _finite(row.get("batch.sequences")), _finite(row.get("batch.sequence_length"))
    if sequences and length:
        row.setdefault("batch_tokens", sequences * length)
    batch, steps = _finite(row.get("batch_tokens")), _finite(row.get("steps"))
    if n_tokens and batch and steps is None:
        row["steps"] = n_tokens / batch
    if n_tokens and steps and batch is None:
        row["batch_tokens"] = n_tokens / steps
    epochs = _finite(row.get("epochs"))
    if n_tokens and epochs:
        row.setdefault("unique_tokens", n_tokens / max(epochs, 1.0))
    return row


def _with_error(row: Row) -> Row:
    for one, other in (("error", "accuracy"), ("accuracy", "error")):
        if row.get(one) is None and _finite(row.get(other)) is not None:
            row[one] = 1 - row[other]
    return row


def _finite(value: object) -> float | None:
    if isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300:
        return float(value)
    return None  # not NaN either, which is below nothing


def select(
    rows: Sequence[Row], where: Sequence[str], hold_out: Sequence[str], option: str = "--where"
) -> tuple[list[Row], list[Row]]:
    """Rows to fit and rows held out. where: all must hold; `option` is what it was typed behind. hold_out: any may.
    Raises UserError where nothing is left, ConfigError where a hold-out takes no row."""
    every = rows  # what a column holds does not hang on the other conditions
    for typed in where:
        fits = parse(option, typed, every)
        rows = [row for row in rows if fits(row)]
        if not rows:
            raise UserError(f"{option} {typed}: no row fits")
    held = [parse("--hold-out", typed, every) for typed in hold_out]
    for typed, fits in zip(hold_out, held, strict=True):
        if not any(map(fits, rows)):
            raise ConfigError(f"--hold-out {typed}: no row fits, so that nothing would be held out")
    kept = [row for row in rows if not any(fits(row) for fits in held)]
    if not kept:
        raise UserError("every row is held out, and none is left to fit")
    return kept, [row for row in rows if any(fits(row) for fits in held)]


def values(rows: Sequence[Row], law: Law) -> tuple[dict[str, list[float]], list[float]]:
    """A law's inputs and output of each row. Raises UserError as check does."""
    needed = (*law.inputs, law.output)
    found = {key: check(rows, key, needed) for key in needed}
    return {key: found[key] for key in law.inputs}, found[law.output]


def best_of_each(rows: Sequence[Row], law: Law) -> tuple[list[Row], list[str]]:
    """For a law about the best runs one row for each value of its inputs: the first with the output whose mean loss
    over seeds is least; and what is to be said about it. FLOPs and tokens within a tenth are one value, as budgets
    are. Raises UserError where several outputs have no loss to judge."""
    needed = (*law.inputs, law.output)
    places = zip(*(_places(check(rows, key, needed), key in ROUNDED) for key in law.inputs), strict=True)
    groups: dict[tuple, dict[float, list[Row]]] = {}
    for row, place, output in zip(rows, places, check(rows, law.output, needed), strict=True):
        groups.setdefault(place, {}).setdefault(output, []).append(row)
    if len(groups) == len(rows):
        return list(rows), []

    def mean_loss(group: Sequence[Row]) -> float:
        return fmean(check(group, "loss", (*needed, "loss")))

    kept, at_end = [], 0
    for outputs in groups.values():
        best = min(outputs, key=lambda output: mean_loss(outputs[output])) if len(outputs) > 1 else next(iter(outputs))
        kept.append(outputs[best][0])
        at_end += len(outputs) > 1 and best in (min(outputs), max(outputs))
    words = f"{len(kept)} of {len(rows)} rows have the least loss of their {' and '.join(law.inputs)}"
    said = [f"{law.name} is about the best {law.output}: {words}, and are taken"]
    said += [text for key in law.inputs if key in ROUNDED for text in loose([row[key] for row in rows], key)]
    ends = f"{at_end} of {len(kept)} best {law.output} are the least or the largest that was tried: better ones may lie"
    return kept, [*said, *([f"{ends} beyond, and the law be that of the grid"] if at_end else [])]


def _places(values: Sequence[float], rounded: bool) -> list[float]:
    """What each value counts as."""
    starts = budget_starts(values) if rounded else {}
    return [starts.get(value, value) for value in values]


def check(rows: Sequence[Row], key: str, needed: Sequence[str]) -> list[float]:
    """A column. Raises UserError naming the run where it is not a finite positive number, and all that is `needed`."""
    found = []
    for row in rows:
        value = _finite(row.get(key))
        if key in SHARES and value is not None and value > 1:
            raise UserError(f"{name_of(row)}: {key} is {value:g}, and must be a share of one, not of a hundred")
        if value is None or value <= 0:
            got = row.get(key, "no such column")
            wanted = f"{', '.join(needed)} must be numbers greater than zero; use --map {key}=COLUMN, or --where"
            raise UserError(f"{name_of(row)}: {key} is {got}, and {wanted}")
        found.append(value)
    return found
