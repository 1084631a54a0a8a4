"""Sort rows into curves. A curve has one condition and one size, with all learning rates and seeds."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scaling_testbed.analysis.rows.conditions import same, text
from scaling_testbed.analysis.rows.names import nearest_first
from scaling_testbed.analysis.rows.study import LR, SIZE, Row, Study, name_of, number
from scaling_testbed.errors import ConfigError, UserError

# Settings that are not conditions: the axes of a curve, and settings that change no result.
SHAPE = ("name", "d_model", "n_layers", "n_heads", "n_kv_heads", "d_head", "d_ff", "d_ff_rule", "vocab_size")
NO_CONDITION = {LR, "optimizer.fused", "loss.chunk_mib", "batch.micro_batch_sequences", *(f"model.{k}" for k in SHAPE)}
NO_CONDITION |= {
    "start.run",
    "start.step",
    "start.same_run",
}  # each seed has a parent of its own; two runs of one seed are an error
NO_CONDITION |= {"objective.teacher", "objective.targets"}  # places; teacher_run and fingerprint say what lies there
RESULTS = ("run_id", "row", "status", "val_loss", "value", "name", "label", "n_params", SIZE)
NO_CONDITION_IN = (
    "logging.",
    "checkpoint.",
    "evaluation.",
    "compute.",
    "parallelism.",
    "diagnostics.",
    "metrics.",
    "summary.",
)
SCAN = "scan"  # derived from the shapes: a model belongs to the scan over width, to that over depth, or to neither


@dataclass(frozen=True)
class Curve:
    """All runs of one condition and size.

    condition: the grouping keys and their values. runs: (lr, seed) -> row. planned: (lr, seed) -> the configuration of
    a run without a row. missing: names of expected runs without a row. settings: one of its rows or planned runs, for
    the values of keys that are not part of the condition. shown_size: the N that names its size, where that of another
    condition does; None: n_params.
    """

    condition: dict[str, str]
    n_params: float
    shape: tuple
    lrs: list[float]
    seeds: list[int]
    runs: dict[tuple[float, int], Row]
    planned: dict[tuple[float, int], Row]
    missing: list[str]
    settings: Row
    shown_size: float | None = None

    @property
    def label(self) -> str:
        return label(self.condition)

    def rows(self, lr: float) -> list[Row]:
        """The rows at a learning rate, one for each seed that has one."""
        return [self.runs[lr, seed] for seed in self.seeds if (lr, seed) in self.runs]

    def fits(self, conditions: Mapping[str, object]) -> bool:
        """Whether its settings have these values. A tuple lists alternatives."""
        return all(
            same(self.condition[key] if key in self.condition else self.settings.get(key), value)
            for key, value in conditions.items()
        )


def label(condition: dict[str, str]) -> str:
    """The text of a condition for a legend."""
    short = {key.removeprefix("model.").removeprefix("logging."): value for key, value in condition.items()}
    return ", ".join(f"{key}={value}" for key, value in short.items()) or "all runs"


def grouping_keys(study: Study, group: Sequence[str] | None = None, preferred: Sequence[str] = ()) -> list[str]:
    """The configuration keys that distinguish conditions, `preferred` ones first.

    These are `group` if given. Otherwise they are all keys that vary and are not determined by the size and the other
    keys. Raises ConfigError if no row has a key of `group`.
    """
    rows = [*study.rows, *study.missing]
    if group:
        for key in group:
            if key != SCAN and not any(key in row for row in rows):
                there = nearest_first(key, (name for row in rows for name in row))
                raise ConfigError(f"--group {key}: no row has this key; the keys are {there}")
        return list(group)
    found = [SCAN] if SCAN in preferred and _scans(rows) else []
    candidates = [*preferred, *dict.fromkeys(key for row in rows for key in row)]
    for key in dict.fromkeys(candidates):
        if (key in preferred or _may_be_condition(key)) and not _follows(rows, key, found):
            found.append(key)
    return found


def _may_be_condition(key: str) -> bool:
    own = key not in NO_CONDITION and not key.startswith(NO_CONDITION_IN) and not key.endswith("_impl")
    return "." in key and own


def _follows(rows: Sequence[Row], key: str, found: Sequence[str]) -> bool:
    """Whether `key` has one value for each shape and each combination of the keys found so far."""
    values: dict[tuple, str] = {}
    plain = [name for name in found if name != SCAN]
    for row in rows:
        place = (shape_of(row), *(text(row.get(name)) for name in plain))
        if values.setdefault(place, text(row.get(key))) != text(row.get(key)):
            return False
    return True


def shape_of(row: Row, size: str = SIZE) -> tuple:
    """The shape that makes models of different conditions comparable: width and depth, or the number of parameters."""
    if row.get("model.d_model") is not None and row.get("model.n_layers") is not None:
        return (row["model.d_model"], row["model.n_layers"])
    return (row.get(size),)


def curves(
    study: Study, group: Sequence[str], size: str = SIZE, lr_range: tuple[float, float] = (0.0, float("inf"))
) -> list[Curve]:
    """The study's curves within a range of learning rates, ordered by condition and size.

    The expected runs of a curve are the planned ones; without a plan, every learning rate and seed of the study. Raises
    UserError if a row lacks its size or learning rate, or if two rows of one condition, size, rate and seed differ.
    """
    cells: dict[tuple, list[Row]] = defaultdict(list)
    every = [*study.rows, *study.missing]
    scans = _scans(every) if SCAN in group else {}
    for row in every:
        lr = _checked(row, LR, least=1e-30)
        if not lr_range[0] * (1 - 1e-9) <= lr <= lr_range[1] * (1 + 1e-9):
            continue
        for condition in _conditions(row, group, scans):
            cells[tuple(condition.items()), shape_of(row, size), _checked(row, size)].append(row)
    _check_one_size(cells)
    rows = [row for cell in cells.values() for row in cell]
    grid = {(number(row, LR), seed_of(row)) for row in rows}
    order = sorted(cells, key=lambda place: ([_sortable(value) for _, value in place[0]], place[2]))
    return [_curve(place, cells[place], None if study.planned else grid) for place in order]


def _curve(place: tuple, rows: list[Row], grid: set[tuple[float, int]] | None) -> Curve:
    condition, shape, n_params = place
    runs: dict[tuple[float, int], Row] = {}
    planned: dict[tuple[float, int], Row] = {}
    for row in rows:
        at = (number(row, LR), seed_of(row))
        if "label" in row:
            planned[at] = row
        elif at in runs and _result(runs[at]) != _result(row):
            raise UserError(_two_rows(runs[at], row, at))
        else:
            runs[at] = row
    planned = {at: row for at, row in planned.items() if at not in runs}
    missing = {at: name_of(row) for at, row in planned.items()}
    for lr, seed in (grid or set()) - set(runs) - set(planned):
        missing[lr, seed] = f"lr={lr:g} seed={seed} of {label(dict(condition))} N={n_params:g} (no row)"
    lrs, seeds = sorted({lr for lr, _ in [*runs, *missing]}), sorted({seed for _, seed in [*runs, *missing]})
    names = [missing[at] for at in sorted(missing)]
    return Curve(dict(condition), n_params, shape, lrs, seeds, runs, planned, names, rows[0])


def _check_one_size(cells: dict[tuple, list[Row]]) -> None:
    """Raise UserError if a condition has two models of one shape but different N.

    Example: the gains of a qk-norm add parameters, and the qk-norm is not part of the condition.
    """
    seen: dict[tuple, list[Row]] = {}
    for (condition, shape, _), rows in cells.items():
        other = seen.setdefault((condition, shape), rows)
        if other is not rows:
            raise UserError(_two_rows(other[0], rows[0], (number(rows[0], LR), seed_of(rows[0]))))


def _checked(row: Row, key: str, least: float = 0.0) -> float:
    """A finite number of a row. Zero is valid for N: a model without layers has no non-embedding parameters."""
    value = number(row, key)
    if not least <= value < float("inf"):
        sign = "greater than zero" if least else "zero or more"
        raise UserError(f"{name_of(row)}: {key} must be a number, {sign}; got {text(row.get(key))}")
    return value


def seed_of(row: Row) -> int:
    """The seed of a row, 0 if it has none. Raises UserError if it is not a whole number."""
    seed = row.get("seed") or 0
    if isinstance(seed, bool) or not isinstance(seed, (int, float)) or seed != seed or seed != int(seed):
        raise UserError(f"{name_of(row)}: seed must be a whole number, got {text(seed)}")
    return int(seed)


def _result(row: Row) -> tuple:
    return (row.get("status", "finished"), row.get("val_loss"), row.get("value"))


def _two_rows(first: Row, second: Row, at: tuple[float, int]) -> str:
    keys = [key for key in second if key not in RESULTS and text(first.get(key)) != text(second[key])]
    settings = [key for key in keys if key.startswith(("model.", "compute."))]
    keys = [key for key in keys if _may_be_condition(key)] or settings or keys
    differ = f"; they differ in {', '.join(keys)}: use --group or --where KEY=VALUE" if keys else "; remove one"
    return f"{name_of(first)} and {name_of(second)} both have lr={at[0]:g} seed={at[1]} and differ{differ}"


def _conditions(row: Row, group: Sequence[str], scans: dict[tuple, list[str]]) -> list[dict[str, str]]:
    """The conditions of a row: one, or two for a shape that belongs to both scans."""
    names = scans.get(shape_of(row), ["joint"]) if SCAN in group else [""]
    return [{key: name if key == SCAN else text(row.get(key)) for key in group} for name in names]


def _scans(rows: Sequence[Row]) -> dict[tuple, list[str]]:
    """Shape -> its scans. The width scan is at the depth with the most widths, the depth scan at the width with the
    most depths."""
    shapes = {shape_of(row) for row in rows}
    if not shapes or any(len(shape) != 2 for shape in shapes):
        return {}
    by_width, by_depth = defaultdict(set), defaultdict(set)
    for width, depth in shapes:
        by_width[width].add(depth)
        by_depth[depth].add(width)
    width = max(by_width, key=lambda value: (len(by_width[value]), -value))
    depth = max(by_depth, key=lambda value: (len(by_depth[value]), -value))
    if len(by_width[width]) < 2 or len(by_depth[depth]) < 2:
        return {}
    found: dict[tuple, list[str]] = defaultdict(list)
    for shape in shapes:
        found[shape] += ["depth"] if shape[0] == width else []
        found[shape] += ["width"] if shape[1] == depth else []
        found[shape] += [] if found[shape] else ["joint"]
    return dict(found)


def _sortable(value: str) -> tuple:
    try:
        return (0, float(value), "")
    except ValueError:
        return (1, 0.0, value)
