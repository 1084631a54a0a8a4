"""The columns that laws need, from rows of any origin."""

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

ROUNDED = ("flops", "n_tokens")  # differ a little from the plan, because steps and batches are whole numbers
SHARES = ("error", "accuracy")
OWN = {"loss": "val_loss", "lr": "optimizer.lr"}  # the names in rows of this testbed
OTHERS = {
    *("loss", "tokens_per_param", "error", "accuracy", "steps", "epochs", "batch_tokens", *CONVENTIONS),
    *("flops_6nd", "batch.sequences", "batch.sequence_length", *OWN.values()),
    *("run_id", "name", "seed", "dataset", "data_fingerprint"),
}  # names that --map accepts besides the columns of the laws


def read(path: str | Path, source: str | None, mapping: Sequence[str], size: str) -> tuple[list[Row], list[str]]:
    """Read rows with the columns of laws, and notes on rows that were left out.

    source: a published layout (see published.py), or None for a study. mapping: `column=name in the file`. size: the
    column that is N. Raises UserError or ConfigError.
    """
    if source is None:
        return of_study(load(path), mapping, size)
    check_choice("--source", source, published.SOURCES)
    return _named(published.SOURCES[source](Path(path)), [], path, _pairs(mapping), size)


def of_study(study: Study, mapping: Sequence[str] = (), size: str = "n_params") -> tuple[list[Row], list[str]]:
    """Rows and notes as from `read`, of the runs of a study that finished without divergence."""
    said: list[str] = []
    pairs = _pairs(mapping)
    rows, missing = study.rows, study.missing
    if pairs.get("loss", "val_loss") != "val_loss":  # a row that has the mapped loss does have a result
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
    """The rows with the columns of laws, and `said` followed by notes on these rows."""
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
    """The column that --map names, and the factor for its numbers: `Params (M)*1e6`."""
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
    """A warning about numbers that seem to count thousands, millions or billions instead of ones."""
    sizes = [tuple(_finite(row.get(key)) for key in ("n_params", "n_tokens", "flops")) for row in rows]
    pairs = [(n, d) for n, d, _ in sizes if n and d]
    meant = 'are these parameters, tokens and FLOPs? A column in millions is --map n_params="COLUMN*1e6"'
    if pairs and max(d / n for n, d in pairs) < 0.1:
        return [f"every row has less than a tenth of a token per parameter: {meant}"]
    ratios = [c / (6 * n * d) for n, d, c in sizes if n and d and c]
    if ratios and not 0.1 < median(ratios) < 10:
        return [f"FLOPs are {median(ratios):.2g} times 6 N D: {meant}"]
    return []


def _repeated(rows: Sequence[Row]) -> list[str]:
    """A warning about duplicate rows, which count twice and narrow every interval."""
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
            raise ConfigError(f"--map {typed}: no law uses the column {ours}; choose from {', '.join(sorted(known))}")
        if ours in pairs:
            raise ConfigError(f"--map {typed}: {ours} is already mapped to {pairs[ours]!r}")
        pairs[ours] = theirs
    return pairs


def _check_size(rows: Sequence[Row], size: str) -> None:
    """Raise ConfigError if no row has the count `size`. A hand-made table has one count, of unknown convention."""
    if size != "n_params" and all(row.get(size) in (None, row.get("n_params")) for row in rows):
        raise ConfigError(f"--size {size}: no row has this count; name its column with --map {size}=COLUMN")


def derived(row: Row, size: str = "n_params") -> Row:
    """The row with the columns that follow from its own.

    These are D = C/6N or M N, C = 6ND, M = D/N, steps and tokens per batch, unique tokens from epochs, and error from
    accuracy. Columns of the row keep their values, with two exceptions: n_params becomes the N that `size` counts, and
    flops of this testbed's rows, which are counted operations, become 6ND as in the laws.
    """
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
    return None  # also for NaN: every comparison with it is false


def select(
    rows: Sequence[Row], where: Sequence[str], hold_out: Sequence[str], option: str = "--where"
) -> tuple[list[Row], list[Row]]:
    """Split rows into rows to fit and held-out rows.

    where: conditions that must all hold; `option` is the option they were typed with. hold_out: a row that matches any
    of these is held out. Raises UserError if no row is left, and ConfigError if a hold-out matches no row.
    """
    every = rows  # a condition is checked against the columns of all rows, not of those that other conditions left
    for typed in where:
        fits = parse(option, typed, every)
        rows = [row for row in rows if fits(row)]
        if not rows:
            raise UserError(f"{option} {typed}: no row matches")
    held = [parse("--hold-out", typed, every) for typed in hold_out]
    for typed, fits in zip(hold_out, held, strict=True):
        if not any(map(fits, rows)):
            raise ConfigError(f"--hold-out {typed}: no row matches, so nothing would be held out")
    kept = [row for row in rows if not any(fits(row) for fits in held)]
    if not kept:
        raise UserError("every row is held out, so there is no row to fit")
    return kept, [row for row in rows if any(fits(row) for fits in held)]


def values(rows: Sequence[Row], law: Law) -> tuple[dict[str, list[float]], list[float]]:
    """A law's inputs and output, with one value for each row. Raises UserError as check does."""
    needed = (*law.inputs, law.output)
    found = {key: check(rows, key, needed) for key in needed}
    return {key: found[key] for key in law.inputs}, found[law.output]


def best_of_each(rows: Sequence[Row], law: Law) -> tuple[list[Row], list[str]]:
    """For a law about the best runs, the best row at each value of its inputs, and notes on the choice.

    The best row is the first one with the output that has the lowest mean loss over seeds. FLOPs and tokens within a
    tenth count as one value, as for budgets. Raises UserError if several outputs have no loss to compare.
    """
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
    words = f"{len(kept)} of {len(rows)} rows have the lowest loss for their {' and '.join(law.inputs)}"
    said = [f"{law.name} is about the best {law.output}: {words}, and only these are used"]
    said += [text for key in law.inputs if key in ROUNDED for text in loose([row[key] for row in rows], key)]
    ends = (
        f"{at_end} of {len(kept)} best {law.output} are the smallest or the largest that was tried: better ones may lie"
    )
    return kept, [*said, *([f"{ends} beyond, and the fit may only show the grid"] if at_end else [])]


def _places(values: Sequence[float], rounded: bool) -> list[float]:
    """The value that each value counts as: the start of its budget if `rounded`."""
    starts = budget_starts(values) if rounded else {}
    return [starts.get(value, value) for value in values]


def check(rows: Sequence[Row], key: str, needed: Sequence[str]) -> list[float]:
    """The values of a column. Raises UserError, which names the run, if a value is not a finite positive number."""
    found = []
    for row in rows:
        value = _finite(row.get(key))
        if key in SHARES and value is not None and value > 1:
            raise UserError(f"{name_of(row)}: {key} is {value:g}; it must be a share of 1, not a percentage")
        if value is None or value <= 0:
            got = row.get(key, "no such column")
            wanted = f"{', '.join(needed)} must be numbers greater than zero; use --map {key}=COLUMN, or --where"
            raise UserError(f"{name_of(row)}: {key} is {got}, and {wanted}")
        found.append(value)
    return found
