"""The columns that laws need, from rows of any origin."""

import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean

from scaling_testbed.analysis.laws.forms import LAWS, Law
from scaling_testbed.analysis.laws.frontier import budget_starts, loose
from scaling_testbed.analysis.laws.settings import alike, setting_columns, varied
from scaling_testbed.analysis.rows import published
from scaling_testbed.analysis.rows.conditions import parse
from scaling_testbed.analysis.rows.names import (
    SPELLINGS,
    has_decimal_comma,
    meaning,
    nearest_first,
    number_in,
    plain_name,
)
from scaling_testbed.analysis.rows.study import ALIASES, Row, Study, about_hopeless, load, name_of
from scaling_testbed.analysis.rows.units import check_losses, check_units, of_values, said_unit
from scaling_testbed.config.budget import CONVENTIONS
from scaling_testbed.errors import ConfigError, UserError, check_choice
from scaling_testbed.tables import brief

ROUNDED = ("flops", "n_tokens")  # differ a little from the plan, because steps and batches are whole numbers
SHARES = ("error", "accuracy")
JUDGED = ("n_params", "n_tokens", "flops", "loss")  # where another column may have been meant
RUN = re.compile(r"^(run_|trial_|experiment_)?(id|name)$|^(run|trial)$")  # columns that tell the runs apart
IDS = re.compile(rf"{RUN.pattern}|^(index|number|label)$")
STEPS = ("step", "iteration", "iter")  # the last word of columns that count the steps of a run
OWN = {"loss": "val_loss", "lr": "optimizer.lr"}  # the names in rows of this testbed
OTHERS = {
    *("loss", "tokens_per_param", "error", "accuracy", "steps", "epochs", "batch_tokens", *CONVENTIONS),
    *("flops_6nd", "batch.sequences", "batch.sequence_length", *OWN.values()),
    *("run_id", "name", "seed", "dataset", "data_fingerprint", "run", "step"),
}  # names that --map accepts besides the columns of the laws
# What --map accepts besides the name of a column: pattern -> the number from the column's value and from the factor.
TERMS: tuple[tuple[str, Callable[[float, float], float]], ...] = (
    (r"10\*\*(?P<column>.+)", lambda value, _: 10.0**value),
    (r"2\*\*(?P<column>.+)", lambda value, _: 2.0**value),
    (r"exp\((?P<column>.+)\)", lambda value, _: math.exp(value)),
    (r"(?:log|ln)\((?P<column>.+)\)", lambda value, _: math.log(value)),
    (r"(?P<column>.+)\*(?P<factor>[^*]+)", lambda value, factor: value * factor),
    (r"(?P<column>.+)/(?P<factor>[^/]+)", lambda value, factor: value / factor),
)


def read(path: str | Path, source: str | None, mapping: Sequence[str], size: str) -> tuple[list[Row], list[str]]:
    """Read rows with the columns of laws, and notes on rows that were left out.

    source: a published layout (see published.py), or None for a study. mapping: `column=name in the file`. size: the
    column that is N. Raises UserError or ConfigError.
    """
    if source is None:
        return of_study(load(path), mapping, size)
    check_choice("--source", source, published.SOURCES)
    return _named(published.SOURCES[source](Path(path)), [], path, _pairs(mapping), size)


def of_study(
    study: Study, mapping: Sequence[str] = (), size: str = "n_params", of_steps: bool = False
) -> tuple[list[Row], list[str]]:
    """Rows and notes as from `read`, of the runs of a study that finished without divergence. of_steps: whether several
    rows of a run are wanted, one for each step."""
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
        said += about_hopeless(missing)
    diverged = [row for row in rows if row.get("status") == "diverged"]
    if diverged:
        said.append(f"{len(diverged)} diverged runs are left out")
        rows = [row for row in rows if row.get("status") != "diverged"]
    warm = [row for row in rows if row.get("lineage") and "step" not in (row.get("start.take") or [])]
    if warm and "n_tokens" not in pairs:
        said.append(
            f"{len(warm)} runs began with the weights of other runs, whose tokens n_tokens does not count, and are "
            "left out; --map n_tokens=n_tokens_total takes them in"
        )
        rows = [row for row in rows if row not in warm]
    return _named(rows, said, study.path, pairs, size, of_steps)


def _named(
    rows: Sequence[Row],
    said: Sequence[str],
    path: str | Path,
    pairs: dict[str, str],
    size: str,
    of_steps: bool = False,
) -> tuple[list[Row], list[str]]:
    """The rows with the columns of laws, and `said` followed by notes on these rows."""
    check_choice("--size", size, CONVENTIONS)
    if not rows:
        ended = "; the state of a run that has ended is finished, completed or success" if said else ""
        raise UserError(f"{path}: no finished run is left; {'; '.join(said)}{ended}")
    names = list(dict.fromkeys(key for row in rows for key in row if key != "row"))
    taken = {ours: _column(ours, theirs, names) for ours, theirs in pairs.items()}
    rows = [{**row, **{ours: _value(row, ours, pairs[ours], *term) for ours, term in taken.items()}} for row in rows]
    if "flops" in pairs:
        rows = [{key: value for key, value in row.items() if key != "flops_6nd"} for row in rows]
    _check_size(rows, size)
    said = [*said, *_two_columns(rows, pairs)]
    rows = [derived(row, size) for row in rows]
    return rows, [*said, *_repeated(rows), *([] if of_steps else _steps_of_a_run(rows))]


Term = tuple[str, Callable[[float, float], float] | None, float]  # a column, what is done with it, and a factor


def _column(ours: str, theirs: str, names: Sequence[str]) -> Term:
    """The column that --map names, and what is done with its numbers: `Params (M)*1e6`, `10**log10_N`, `log(ppl)`."""
    if (term := _term(theirs, names)) is not None:
        return term
    said = f"no row has the column {theirs!r}; the columns are {nearest_first(theirs, names)}"
    raise ConfigError(f"--map {ours}={theirs}: {said}")


def _term(theirs: str, names: Sequence[str]) -> Term | None:
    if theirs in names:
        return theirs, None, 1.0
    for pattern, function in TERMS:
        match = re.fullmatch(pattern, theirs)
        factor = number_in(match.groupdict().get("factor") or "1") if match else None
        if match and match["column"].strip() in names and factor and math.isfinite(factor):
            return match["column"].strip(), function, factor
    return None


def _value(
    row: Row, ours: str, theirs: str, name: str, function: Callable[[float, float], float] | None, factor: float
) -> object:
    value = row.get(name)
    if has_decimal_comma(ours, value):
        raise UserError(f"{name_of(row)}: {name} is {value!r}: write the decimal comma as a point")
    number = number_in(value)
    if number is None or function is None:
        return value if number is None else number
    try:
        return function(number, factor)
    except (ValueError, OverflowError):
        raise UserError(f"{name_of(row)}: {theirs} cannot be computed, because {name} is {value}") from None


def _two_columns(rows: Sequence[Row], pairs: dict[str, str]) -> list[str]:
    """Notes on columns of a table that mean the same as the column that is taken, and have other values. An example is
    loss, which may be a training loss, beside val_loss."""
    rows = [row for row in rows if row.get("schema_version") is None]
    said = []
    for ours in [one for one in JUDGED if one not in pairs]:
        names = dict.fromkeys(key for row in rows for key in row if key != ours)
        for theirs in [name for name in names if meaning(name) in (ours, OWN.get(ours, ours))]:
            both = [(row[ours], row[theirs]) for row in rows if None not in (row.get(ours), row.get(theirs))]
            if any(number_in(one) != number_in(other) for one, other in both):
                other = f'--map {ours}="{theirs}"' if " " in theirs else f"--map {ours}={theirs}"
                said.append(f"{ours} is the column {ours}, and {theirs} has other values: {other} takes that one")
                break
    return said


def check_sizes_and_losses(rows: Sequence[Row], needed: Sequence[str], mapping: Sequence[str]) -> list[str]:
    """Check the units of the columns `needed`, and return warnings. Raises ConfigError as units.py does."""
    names = list(dict.fromkeys(key for row in rows for key in row))
    pairs = _pairs(mapping)
    terms = {ours: term for ours, theirs in pairs.items() if (term := _term(theirs, names)) is not None}
    typed = {ours: name for ours, (name, *_) in terms.items()}
    told = {ours for ours, (_, function, _) in terms.items() if function is not None}
    said = check_units(rows, needed, typed, told)
    own = "val_loss" if all("loss" not in row or row["loss"] == row.get("val_loss") for row in rows) else "loss"
    return said + (check_losses(rows, typed.get("loss", own), "loss" in told) if "loss" in needed else [])


def _repeated(rows: Sequence[Row]) -> list[str]:
    """A warning about duplicate rows, which count twice and narrow every interval. Their names may differ."""
    named = [key for key in dict.fromkeys(key for row in rows for key in row) if IDS.search(plain_name(key))]
    for left_out, but in ([], ""), (named, " but its name"):
        kept = {
            repr(sorted((key, repr(value)) for key, value in row.items() if key not in ("row", *left_out)))
            for row in rows
        }
        if more := len(rows) - len(kept):
            return [f"{more} of {len(rows)} rows repeat another one in every column{but}"]
    return []


def _steps_of_a_run(rows: Sequence[Row]) -> list[str]:
    """A warning about several rows of one run, as a table of its history has them.

    A loss in mid-run, at a high learning rate, is no loss of a shorter run. A run is known by its id, or by its name
    where a column counts steps.
    """
    names = dict.fromkeys(key for row in rows for key in row if not key.startswith("start."))  # those of another run
    steps = [name for name in names if plain_name(name).split("_")[-1] in STEPS]
    for name in [one for one in names if RUN.search(plain_name(one))]:
        groups: dict[str, list[Row]] = {}
        for row in rows:
            if row.get(name) is not None:
                groups.setdefault(str(row[name]), []).append(row)
        places = [*steps] if plain_name(name).endswith("name") else [*steps, "n_tokens"]

        def is_history(group: Sequence[Row], places: Sequence[str] = places) -> bool:
            one_size = len({row.get("n_params") for row in group}) == 1
            return one_size and any(len({repr(row.get(place)) for row in group}) > 1 for place in places)

        if several := {one: group for one, group in groups.items() if is_history(group)}:
            one, count = next(iter(several)), sum(map(len, several.values()))
            return [
                f"{count} rows are of {len(several)} runs, e.g. {name} {one}: losses in mid-run are no losses of "
                "finished runs; keep the last row of each run"
            ]
    return []


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
        names = nearest_first(size, as_in_the_table(rows))
        said = f"no row has this count; name its column with --map {size}=COLUMN; the columns are {names}"
        raise ConfigError(f"--size {size}: {said}")


def derived(row: Row, size: str = "n_params") -> Row:
    """The row with the columns that follow from its own.

    These are D = C/6N or M N, C = 6ND (`derived` names them; N is here the mean over a run that prunes), M = D/N, steps
    and tokens per batch, unique tokens from epochs, and error from task_error or accuracy. Columns of the row keep
    their values, with two exceptions: n_params becomes the N that `size` counts, and flops of this testbed's rows,
    which are counted operations, become 6ND as in the laws.
    """
    row = {**row, **{ours: row[theirs] for ours, theirs in OWN.items() if theirs in row and ours not in row}}
    row = _with_average(row, size)
    if row.get("flops_6nd") is not None:
        row["flops"] = None
    n, d, c = (_finite(row.get(key)) for key in ("n_params", "n_tokens", "flops"))
    average = _finite(row.get("n_params_average"))
    ratio = _finite(row.get("tokens_per_param"))
    made = []
    of_c = c / (6 * average) if c and average else None
    if n and d is None and (of_c or ratio):
        d = row["n_tokens"] = of_c or (ratio or 0) * n
        made.append("n_tokens")
    if n and average and d and c is None:
        row["flops"] = 6 * average * d
        made.append("flops")
    if made:
        row["derived"] = made
    if n and d:
        row["tokens_per_param"] = d / n
    return _with_batch(_with_error(row), d)


def _with_average(row: Row, size: str) -> Row:
    """The row with the N that `size` counts, and with its mean over the run: without the weights that the run has
    pruned so far. These are in every N but n_params_non_embedding, which lacks those of the head: its mean is None."""
    whole, average, n = (_finite(row.get(key)) for key in ("n_params", "n_params_average", size))
    if size != "n_params":
        row = {**row, "n_params": row.get(size)}
        if average is not None and whole is not None and n is not None:
            known = size != "n_params_non_embedding" or average == whole
            return {**row, "n_params_average": n - (whole - average) if known else None}
    return {**row, "n_params_average": n} if average is None and n else row


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
    # In rows of this testbed `error` is the text of a failure.
    if row.get("error") is None and row.get("task_error") is not None:
        row["error"] = row["task_error"]
    for one, other in (("error", "accuracy"), ("accuracy", "error")):
        if row.get(one) is None and _finite(row.get(other)) is not None:
            row[one] = 1 - row[other]
    return row


def _finite(value: object) -> float | None:
    number = number_in(value)
    return float(number) if number is not None and abs(number) < 1e300 else None  # None also for nan


def select(
    rows: Sequence[Row], where: Sequence[str], hold_out: Sequence[str], option: str = "--where"
) -> tuple[list[Row], list[Row]]:
    """Split rows into rows to fit and held-out rows.

    where: conditions that must all hold; `option` is the option they were typed with. hold_out: a row that matches any
    of these is held out. Raises UserError if no row is left, and ConfigError if a hold-out matches no row.
    """
    every = rows  # a condition is checked against the columns of all rows, not of those that other conditions left
    for typed in where:
        fits, others = parse(option, typed, every), rows
        rows = [row for row in rows if fits(row)]
        if not rows:
            parse(option, typed, others)  # raises, and names the values of the rows that other conditions left
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

    The best row is the first one with the output that has the lowest loss. The loss of an output is a mean over seeds,
    at the settings that are best for it: losses at several batches, for example, are not averaged. FLOPs and tokens
    within a tenth count as one value, as for budgets. Raises UserError if several outputs have no loss to compare.
    """
    needed = (*law.inputs, law.output)
    inputs = zip(*(places(check(rows, key, needed), key) for key in law.inputs), strict=True)
    groups: dict[tuple, dict[float, list[Row]]] = {}
    for row, place, output in zip(rows, inputs, check(rows, law.output, needed), strict=True):
        groups.setdefault(place, {}).setdefault(output, []).append(row)
    if len(groups) == len(rows):
        return list(rows), []

    settings = setting_columns(rows, (*needed, *_own(needed)))

    def mean_loss(group: Sequence[Row]) -> float:
        return min(fmean(check(one, "loss", (*needed, "loss"))) for one in alike(group, settings))

    kept, at_end, chosen = [], 0, dict[str, None]()
    for outputs in groups.values():
        best = min(outputs, key=lambda output: mean_loss(outputs[output])) if len(outputs) > 1 else next(iter(outputs))
        kept.append(min(alike(outputs[best], settings), key=lambda one: mean_loss(one) if len(outputs) > 1 else 0)[0])
        chosen |= dict.fromkeys(key for group in outputs.values() for key in varied(group, settings))
        at_end += len(outputs) > 1 and best in (min(outputs), max(outputs))
    words = f"{len(kept)} of {len(rows)} rows have the lowest loss for their {' and '.join(law.inputs)}"
    said = [f"{law.name} is about the best {law.output}: {words}, and only these are used"]
    said += [text for key in law.inputs if key in ROUNDED for text in loose([row[key] for row in rows], key)]
    if chosen:
        said.append(f"each {law.output} is taken at its best {', '.join(chosen)}; choose others with --where")
    ends = (
        f"{at_end} of {len(kept)} best {law.output} are the smallest or the largest that was tried: better ones may lie"
    )
    return kept, [*said, *([f"{ends} beyond, and the fit may only show the grid"] if at_end else [])]


def _own(needed: Sequence[str]) -> list[str]:
    """The names of the columns `needed` in rows of this testbed."""
    batch = ("batch.sequences", "batch.sequence_length") if "batch_tokens" in needed else ()
    return [*(OWN[key] for key in needed if key in OWN), *batch]


def places(values: Sequence[float], key: str) -> list[float]:
    """The value that each value of a column counts as: the start of its budget for a column of ROUNDED."""
    starts = budget_starts(values) if key in ROUNDED else {}
    return [starts.get(value, value) for value in values]


def without_output(rows: Sequence[Row], law: Law) -> tuple[list[Row], list[str]]:
    """The rows whose output of a law is a number, and a note on the others: empty, nan or infinite."""
    kept = [row for row in rows if _finite(row.get(law.output)) is not None or isinstance(row.get(law.output), str)]
    if not kept or len(kept) == len(rows):
        return list(rows), []
    bad = [row for row in rows if not any(row is one for one in kept)]
    named = "; ".join(f"{name_of(row)} ({row.get(law.output)})" for row in bad[:5])
    return kept, [f"{len(bad)} rows have no finite {law.output} and are left out: {named}"]


def check(rows: Sequence[Row], key: str, needed: Sequence[str]) -> list[float]:
    """The values of a column.

    Raises UserError, which names the run, if a value is not a finite positive number (a share may be zero), and the
    columns that there are, if no row has it.
    """
    if not any(key in row for row in rows):
        raise UserError(_no_column(rows, needed))
    found = []
    for row in rows:
        value = _finite(row.get(key))
        for share in SHARES if key in SHARES and value is not None and not 0 <= value <= 1 else ():
            if (of := _finite(row.get(share))) is not None and of > 1:
                said = f"{share} is {of:g}; it must be a share of 1, not a percentage: --map {share}={share}/100"
                raise UserError(f"{name_of(row)}: {said}")
        if value is None or value < 0 or (value == 0 and key not in SHARES):
            got = row.get(key, "no such column")
            wanted = f"{', '.join(needed)} must be numbers greater than zero"
            where = f"{key}!={brief(got, 60)}" if isinstance(got, str) else f"{key}>0"
            mend = f'use --map {key}=COLUMN, or --where "{where}" to leave such rows out'
            raise UserError(f"{name_of(row)}: {key} is {got}, and {wanted}; {mend}")
        found.append(value)
    return found


def _no_column(rows: Sequence[Row], needed: Sequence[str]) -> str:
    """The message about columns that no row has: the columns that they may be, then all that there are."""
    names = as_in_the_table(rows)
    absent = [key for key in needed if not any(key in row for row in rows)]
    maps = " ".join(f"--map {key}={_guessed(key, names, rows)}" for key in absent)
    said = f"{', '.join(absent)} {'is' if len(absent) == 1 else 'are'} no such column"
    wanted = f"{', '.join(needed)} must be numbers greater than zero"
    return f"{said}, and {wanted}; use {maps}; the columns are {nearest_first(absent[0], names)}"


def _guessed(key: str, names: Sequence[str], rows: Sequence[Row]) -> str:
    """What --map may have for a column: one whose header names a unit of it, or one that ends in its name."""
    units = {name: found[1] for name in names if (found := said_unit(name)) and found[0] == key}
    said = [f'"{of_values(unit, key, rows, name).typed.format(name)}"' for name, unit in units.items()]
    like = [name for name in names if meaning(name) == key or plain_name(name).endswith(f"_{key}")]
    return next(iter([*said, *(f'"{name}"' if " " in name else name for name in like)]), "COLUMN")


def as_in_the_table(rows: Sequence[Row]) -> list[str]:
    """The columns of rows without those that were added to the table's own."""
    added = {
        "row",
        "derived",
        "n_params_average",
        "tokens_per_param",
        *(key for row in rows for key in row.get("derived", ())),
    }
    names = dict.fromkeys(key for row in rows for key in row if key not in added)
    for short, full in ALIASES.items():
        if short in names and all(row.get(short) == row.get(full) for row in rows):
            names.pop(full, None)
    theirs = {meaning(name) for name in names if name not in SPELLINGS}
    return [name for name in names if name not in theirs]
