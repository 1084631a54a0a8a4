"""Sweep files, which give the overrides of each run of a grid.

    description: one line
    paper: small_scale_proxies          # with experiment: its question and claims, which `report` judges
    experiment: qknorm_lr
    analysis: lr_sensitivity            # the analysis that reads the results; null: none
    declared: {lr_range: [3e-4, 3e-1], margins: {S: 0.05}}      # how it will be judged; see papers/declaration.py
    overrides: [key=value, ...]         # of every run
    axes: {key: [values], ...}          # every combination is a run; a group (model, data, ...) is a key too
    together:                           # keys that move together: one row of values at a time; the first leads
      - {model: [a, b], batch.sequences: [64, 512]}
      - [{model.residual: pre}, {model.residual: peri, model.norm: rmsnorm}]    # the same, written row by row
    exclude:                            # runs left out: they match every key of an entry, of a list any value
      - {model: b, budget.tokens_per_param: [320, 640]}
    rules: {optimizer.lr: 0.0047*(n_params/108e6)**(-1/3)}      # values computed for each run; see rules.py
    draw: {samples: 20, axes: {optimizer.lr: {log_uniform: [1e-4, 1e-1]}}}      # random values; see draw.py
    seeds: [0, 1]
    plugins: [NAME, FILE.py]            # modules from outside, installed or also named on the command line
    configs: [DIR]                      # folders that are searched for choices, beside configs/
    base: NAME                          # a file of configs/sweep/base/ that this file extends
    scales: {NAME: {any key but base and scales}, ...}     # sizes of the same sweep; `scale=NAME`, else the first

A relative path starts at the folder of the file that contains it.

Four layers are merged in this order: base, scale of the base, file, scale of the file. Axes, rows of keys that move
together (identified by their first key) and seeds replace those of the same name in earlier layers. Overrides,
exclusions, plugins and configs are added, and so are declarations, rules and draws key by key; null leaves a rule or a
drawn key out. An override, a row or a drawn key also replaces an axis of an earlier layer. Descriptions are joined,
that of the file before that of its base. A key that one layer sets twice is refused.

A value is written as on the command line. YAML's own reading of it does not count, so 010 is 10 and not 8. `seed=7`
among the overrides means `seeds: [7]`. After the name of the sweep, `key=value` and `key=a,b` replace an axis, select
rows of keys that move together by their first key, or apply to every run. `key=range(1,4)` and `model=glob(nano_*)` are
lists of values too. `++key=...` does the same as `key=...`, and adds the key if there is none. `rules.KEY=EXPRESSION`
is a rule. `draw.samples=20` and `draw.axes.KEY={KIND: [...]}` are parts of a draw.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scaling_testbed.config.search import CONFIG_DIR, check_no_doubles, choices, config_folder
from scaling_testbed.config.words import (
    check_choice_of_group,
    check_no_resolver,
    has_several,
    key_of,
    override_values,
    paths_of,
    read,
    same_value,
    slot_of,
)
from scaling_testbed.errors import ConfigError, check_choice
from scaling_testbed.files import read_yaml
from scaling_testbed.papers import declaration
from scaling_testbed.papers.declaration import Declaration
from scaling_testbed.papers.paper import paper_named
from scaling_testbed.plugins import load_named_in, load_plugins, plugin_name
from scaling_testbed.sweeps import draw, rules
from scaling_testbed.sweeps.columns import (
    check_column,
    column_slot,
    columns_of,
    row_of,
    spelled,
    tied_columns,
    without_columns,
)
from scaling_testbed.sweeps.draw import Draw

SWEEP_DIR = CONFIG_DIR / "sweep"
# Verbs of `analyze`.
ANALYSES = ("lr_sensitivity", "instability", "decide", "report", "fit", "frontier", "critical_batch", "curvature")
MOST_RUNS = 100_000  # to compose them takes half an hour
KEYS = (
    *("description", "paper", "experiment", "analysis", "declared", "overrides", "axes", "together", "exclude"),
    *("rules", "draw", "seeds", "shared_trunk", "parent", "plugins", "configs"),
)


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """A sweep file read at one scale, with every value spelled as on the command line.

    name: of the file. folder: of its runs, which is the name, followed by the scale unless that is the first. scale:
    None if the file has no scales. paper, experiment: names in papers.paper.PAPERS. Both can be None. A paper without
    an experiment means that the runs have its settings. declared: how the results are judged; None if the file does not
    say it. draw: the drawn keys, if any. shared_trunk: whether runs that differ only in the budget share the part
    before their decay (trunks.py). parent: the overrides by which the run that each run begins from differs from it;
    None: the runs begin at step 0. plugins, configs: of every run, typed or in the file, with absolute paths.
    """

    name: str
    folder: str = ""
    scale: str | None = None
    description: str = ""
    paper: str | None = None
    experiment: str | None = None
    analysis: str | None = None
    declared: Declaration | None = None
    overrides: list[str] = field(default_factory=list)
    axes: dict[str, list[str]] = field(default_factory=dict)
    together: list[dict[str, list[str | None]]] = field(default_factory=list)  # None: the row does not set the key
    exclude: list[dict[str, list[str]]] = field(default_factory=list)
    rules: dict[str, str] = field(default_factory=dict)
    draw: Draw | None = None
    seeds: list[str] = field(default_factory=lambda: ["0"])
    shared_trunk: bool = False
    parent: list[str] | None = None
    plugins: list[str] = field(default_factory=list)
    configs: list[str] = field(default_factory=list)

    def points(self) -> list[dict[str, str]]:
        """The runs in order, as {key: value} of what differs between them; the first axis changes slowest. Raises
        ConfigError for more than MOST_RUNS combinations."""
        rows = [[row_of(t, values) for values in zip(*t.values(), strict=True)] for t in self.together]
        axes = [[{key: value} for value in values] for key, values in self.axes.items()]
        seeds = [[{"seed": seed} for seed in self.seeds]]
        count = math.prod(map(len, [*rows, *axes, *seeds])) * ((self.draw and self.draw.samples) or 1)
        if count > MOST_RUNS:
            raise ConfigError(f"sweep {self.name} has {count:,} combinations; a sweep has at most {MOST_RUNS:,}")
        drawn = [self.draw.points()] if self.draw else []
        found = (_merged(parts) for parts in itertools.product(*rows, *axes, *drawn, *seeds))
        return [point for point in found if not any(_fits(point, entry) for entry in self.exclude)]


def load_sweep(
    name: str, scale: str | None = None, *, plugins: Sequence[str] = (), configs: Sequence[str] = ()
) -> Sweep:
    """Read the sweep `name` of configs/sweep/, or the YAML file at the path `name`, at one of its scales (None: the
    first).

    plugins, configs: as typed; the folders are searched for sweeps too. Raises ConfigError, which names the file and
    its error, or the known scales. Raises UserError for a plug-in that only the file names and that is not installed.
    """
    typed_plugins = [plugin.name for plugin in load_plugins(plugins)]
    typed_configs = [config_folder(folder) for folder in configs]
    check_no_doubles(typed_configs)
    is_path, known = name.endswith((".yaml", ".yml")), choices("sweep", typed_configs)
    path = Path(name) if is_path else known.get(name)
    try:
        content = read_yaml(path, as_written=True) if path else None
    except FileNotFoundError:
        raise ConfigError(f"sweep={name}: there is no such file") from None
    if path is None:
        names = ", ".join(sorted(known))
        raise ConfigError(f"there is no sweep {name!r}; it is one of {names}, or the path of a .yaml file")
    try:
        scales, layers = _layers(content, scale, path, typed_configs)
        chosen = scale or next(iter(scales), None)
        folder = path.stem if chosen == next(iter(scales), None) else f"{path.stem}_{chosen}"
        content = functools.reduce(_laid_over, layers)
        texts = [layer.get("description", "").strip() for layer in [*layers[-2:], *layers[:-2]]]
        content["description"] = " ".join(filter(None, texts))
        named = load_named_in(path, content.get("plugins", []), "plugins=")
        content["plugins"] = list(dict.fromkeys([*typed_plugins, *(plugin.name for plugin in named)]))
        content["configs"] = list(dict.fromkeys([*typed_configs, *content.get("configs", [])]))
        sweep = _parse(content, name=path.stem, folder=folder, scale=chosen)
        _check_excluded(sweep, layers)
        return sweep
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def _layers(content: Any, scale: str | None, path: Path, configs: Sequence[str]) -> tuple[list[str], list[dict]]:
    """The names of the scales, and the layers that are merged at `scale` (None: the first), in this order."""
    file, scales = _parted(content, path.parent)
    files = [(file, scales)]
    if (base := file.pop("base", None)) is not None:
        bases = choices("sweep/base", [*configs, *file.get("configs", [])])
        if base not in bases:
            raise ConfigError(f"there is no base {base!r}; it is one of {', '.join(sorted(bases))}")
        files.insert(0, _parted(read_yaml(bases[base], as_written=True), bases[base].parent))
    names = list(dict.fromkeys(name for _, scales in files for name in scales))
    if scale is None:
        scale = names[0] if names else None
    elif scale not in names:
        there = f"it has {', '.join(names)}" if names else "it has none"
        raise ConfigError(f"there is no scale {scale!r}; {there}")
    at_scale = scale or ""  # if the files have no scales: no scale has this name
    return names, [layer for file, scales in files for layer in (file, scales.get(at_scale, {}))]


def _parted(content: Any, folder: Path) -> tuple[dict, dict[str, dict]]:
    """Split a file into its content without scales, and its scales. folder: where its relative paths start."""
    file = _checked(content, [*KEYS, "base", "scales"], folder)
    scales = file.pop("scales", {})
    if not isinstance(scales, dict):
        raise ConfigError("scales must be a mapping")
    found = {}
    for name, entry in scales.items():
        try:
            found[str(name)] = _checked(entry or {}, KEYS, folder)
        except ConfigError as error:
            raise ConfigError(f"scales.{name}: {error}") from None
    return file, found


def _checked(content: Any, known: Sequence[str], folder: Path) -> dict:
    if not isinstance(content, dict):
        raise ConfigError(f"a sweep file is a mapping with the keys {', '.join(known)}")
    content = {key: value for key, value in content.items() if value is not None}
    for key, value in content.items():
        check_no_resolver(str(key), value)
    if unknown := [key for key in content if key not in known]:
        raise ConfigError(f"there is no key {unknown[0]}; a sweep has {', '.join(known)}")
    for key in ("description", "paper", "experiment", "base"):
        if not isinstance(content.get(key, ""), str):
            raise ConfigError(f"{key} must be a text; got {content[key]!r}")
    for key, kind in (
        ("axes", dict),
        *((key, list) for key in ("overrides", "together", "exclude", "seeds", "parent")),
    ):
        if not isinstance(content.get(key, kind()), kind):
            raise ConfigError(f"{key} must be a {'mapping' if kind is dict else 'list'}")
    if "axes" in content:
        content["axes"] = columns_of("axes", content["axes"])
    if "together" in content:
        content["together"] = [tied_columns(entry) for entry in content["together"]]
    if {} in content.get("together", []):
        raise ConfigError("together holds an entry without keys; write {key: [values], ...}")
    if "analysis" in content:
        check_choice("analysis", content["analysis"], ANALYSES)
    if "declared" in content:
        declaration.parsed(content["declared"])
    if "rules" in content:
        content["rules"] = rules.checked(content["rules"])
    if "draw" in content:
        content["draw"] = draw.checked(content["draw"])
    if "shared_trunk" in content:
        check_choice("shared_trunk", content["shared_trunk"], ("true", "false"))
    if content.get("seeds") == []:
        raise ConfigError("seeds must hold one number or more; got []")
    for key in ("overrides", "parent"):
        if bad := [text for text in content.get(key, []) if not isinstance(text, str) or "=" not in text]:
            raise ConfigError(f"{key}: overrides are written key=value; got {bad[0]!r}")
    _take_seeds(content)
    if several := [text for text in content.get("overrides", []) if has_several(text)]:
        raise ConfigError(f"{several[0]} stands for several values; write axes: {{{key_of(several[0])}: [...]}}")
    for key, absolute in (("plugins", plugin_name), ("configs", config_folder)):
        names = [content[key]] if isinstance(content.get(key), str) else content.get(key, [])
        if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
            raise ConfigError(f"{key} must be a list of names; got {names!r}")
        if names:
            content[key] = [absolute(name, folder) for name in names]
    return content


def _take_seeds(content: dict) -> None:
    """Move `seed=` from the overrides of a layer to its seeds."""
    found = [text for text in content.get("overrides", []) if key_of(text) == "seed"]
    if not found:
        return
    if "seeds" in content or len(found) > 1:
        raise ConfigError(f"seed is given twice, by {found[0]} and by {found[1] if found[1:] else 'seeds'}")
    if found[0].startswith(("~", "+")) and not found[0].startswith("++"):
        raise ConfigError(f"{found[0]}: every run has a seed; write seed=NUMBER, without a sign")
    content["seeds"] = override_values(found[0])[1]
    content["overrides"] = [text for text in content["overrides"] if text not in found]


def _laid_over(below: dict, above: dict) -> dict:
    """Merge two checked contents. A new axis of `above` comes before those of `below`, so it changes more slowly."""
    merged = below | above
    upper, rows_above = above.get("overrides", []), above.get("together", [])
    own = {slot_of(text) for text in upper}
    drawn = {column_slot(*column) for column in Draw(**draw.laid_over({}, above.get("draw", {}))).columns()}
    settled = own | drawn | {column_slot(*column) for entry in rows_above for column in entry.items()}
    axes = {key: values for key, values in below.get("axes", {}).items() if column_slot(key, values) not in settled}
    new = {key: values for key, values in above.get("axes", {}).items() if key not in axes}
    merged["axes"] = new | axes | above.get("axes", {})
    # A row without the key has the value of an override, so such a column stays.
    tied = [column for entry in below.get("together", []) for column in entry.items()]
    whole = {column_slot(*column) for column in tied if None not in column[1]}
    rows = {next(iter(entry)): without_columns(entry, (own | drawn) & whole) for entry in below.get("together", [])}
    rows |= {next(iter(entry)): entry for entry in rows_above}
    merged["together"] = list(rows.values())
    columns = [*above.get("axes", {}).items(), *(column for entry in rows_above for column in entry.items())]
    varied = drawn | {column_slot(*column) for column in columns if None not in column[1]}  # None: a row without it
    shared = [text for text in below.get("overrides", []) if slot_of(text) not in varied or slot_of(text)[1]]
    merged["overrides"] = [*overrides_before(shared, upper), *upper]
    declared = [layer["declared"] for layer in (below, above) if "declared" in layer]
    if len(declared) > 1:
        merged["declared"] = {
            **declared[0],
            **declared[1],
            **{key: declared[0].get(key, {}) | declared[1].get(key, {}) for key in ("margins", "seed_sd")},
        }
    merged["rules"] = below.get("rules", {}) | above.get("rules", {})
    under = draw.without(below.get("draw", {}), own | {column_slot(*column) for column in columns})
    merged["draw"] = draw.laid_over(under, above.get("draw", {}))
    for key in ("exclude", "plugins", "configs"):
        merged[key] = [*below.get(key, []), *above.get(key, [])]
    return merged


def overrides_before(shared: Sequence[str], own: Sequence[str]) -> list[str]:
    """The shared overrides that stay in front of `own`: all but the plain values that `own` sets again, because + could
    not add a key again. If several set one key, the last one applies."""
    again = {text.partition("=")[0] for text in own if not slot_of(text)[1]}
    added = {key_of(key) for key in again if key.startswith("+") and not key.startswith("++")}
    return [
        text for text in shared if slot_of(text)[1] or not (text.partition("=")[0] in again or key_of(text) in added)
    ]


def _parse(content: dict, **named: Any) -> Sweep:
    content = dict(content)
    excluded = [columns_of("exclude", entry, scalars=True) for entry in content.get("exclude", [])]
    if {} in excluded:
        raise ConfigError("exclude holds an entry without keys, which every run matches; write {key: value, ...}")
    content["exclude"] = [{key_of(key): values for key, values in entry.items()} for entry in excluded]
    content["shared_trunk"] = content.get("shared_trunk") == "true"
    content["seeds"] = [spelled(seed) for seed in content.get("seeds", [0])]
    content["rules"] = {key: text for key, text in content.get("rules", {}).items() if text is not None}
    content["draw"] = _draw_of(draw.laid_over({}, content.get("draw", {})))
    if "declared" in content:
        content["declared"] = declaration.parsed(content["declared"])
    check_column("seeds", "seed", content["seeds"])
    sweep = Sweep(**named, **content)
    _check_experiment(sweep)
    for entry in sweep.together:
        if len({len(values) for values in entry.values()}) > 1:
            lengths = ", ".join(f"{key} has {len(values)}" for key, values in entry.items())
            raise ConfigError(f"keys that move together need the same number of values: {lengths}")
    keys = [*map(key_of, sweep.axes), *(key_of(key) for entry in sweep.together for key in entry), "seed"]
    known, keys = keys, [*keys, *map(key_of, sweep.draw.axes if sweep.draw else ())]
    if twice := [key for key in keys if keys.count(key) > 1]:
        also = "; write seeds: [0, 1]" if twice[0] == "seed" else ""
        raise ConfigError(f"{twice[0]} is given twice among axes, together, draw and seeds{also}")
    if astray := [key for entry in sweep.exclude for key in entry if key not in known]:
        raise ConfigError(f"exclude names {astray[0]}, which no axis varies")
    if sweep.shared_trunk and sweep.parent is not None:
        raise ConfigError("shared_trunk and parent both say where the runs begin; leave one out")
    _check_draw(sweep)
    _check_set_once(sweep)
    return sweep


def _check_draw(sweep: Sweep) -> None:
    if sweep.draw is not None:
        sweep.draw.check()


def _check_excluded(sweep: Sweep, layers: Sequence[dict]) -> None:
    """Raise ConfigError if an exclusion names a value that no layer gives to its key: it would leave out nothing."""
    known: dict[str, list[str]] = {"seed": ["0"]}
    for layer in layers:
        tied = (column for entry in layer.get("together", []) for column in entry.items())
        seeds = map(spelled, layer.get("seeds", []))
        for key, values in [*layer.get("axes", {}).items(), *tied, ("seed", seeds)]:
            known.setdefault(key_of(key), []).extend(value for value in values if value is not None)
    for key, values in (column for entry in sweep.exclude for column in entry.items()):
        if astray := [value for value in values if not any(same_value(value, one) for one in known[key])]:
            there = ", ".join(dict.fromkeys(known[key]))
            raise ConfigError(f"exclude names {key}={astray[0]}, which no run has; {key} has {there}")


def _check_set_once(sweep: Sweep) -> None:
    """Raise ConfigError if an override and an axis, or two axes, set one key: one of them would have no effect."""
    columns: list[tuple[str, Sequence[str | None]]] = [*sweep.axes.items()]
    columns += [column for entry in sweep.together for column in entry.items()]
    columns += sweep.draw.columns() if sweep.draw else []
    set_by = {"seed": "seeds"}
    for rule in sweep.rules:
        if (key := key_of(rule)) in set_by:
            raise ConfigError(f"{key} is given twice, by {set_by[key]} and by {rules.PREFIX}{rule}")
        set_by[key] = f"{rules.PREFIX}{rule}"
    for key, values in columns:
        paths: set[str] = set()
        for value in values:
            paths |= paths_of(f"{key}={value}") if value is not None else set()
        for path in sorted(paths):
            if path in set_by:
                raise ConfigError(f"{path} is given twice, by {set_by[path]} and by {key}")
            if None not in values:
                set_by[path] = key
    for text in sweep.overrides:
        if twice := sorted(set_by.keys() & paths_of(text)):
            raise ConfigError(f"{twice[0]} is given twice, by {text} and by the values of {set_by[twice[0]]}")


def _check_experiment(sweep: Sweep) -> None:
    if sweep.paper is None and sweep.experiment is not None:
        raise ConfigError(f"experiment: {sweep.experiment} also needs paper:, the name of its paper")
    paper = sweep.paper and paper_named(sweep.paper)
    if paper and sweep.experiment is not None:
        paper.experiment(sweep.experiment)


def narrowed(sweep: Sweep, typed: Sequence[str]) -> Sweep:
    """The sweep with typed overrides applied in their order. Raises ConfigError for a word that cannot be read, for a
    value that keys moving together do not have, and for a word that would have no effect beside an axis."""
    for text in typed:
        sweep = _narrowed(sweep, text)
    if sweep.shared_trunk and sweep.parent is not None:
        raise ConfigError("shared_trunk and parent both say where the runs begin; leave one out")
    _check_draw(sweep)
    _check_set_once(sweep)
    return sweep


def _narrowed(sweep: Sweep, text: str) -> Sweep:
    if (rule := rules.typed(text)) is not None:
        own = sweep.rules | {rule[0]: rule[1] or ""}
        return dataclasses.replace(sweep, rules={name: expression for name, expression in own.items() if expression})
    if (part := draw.typed(text)) is not None:
        return _drawn(sweep, part)
    key, values = override_values(text, sweep.configs)
    check_choice_of_group(text, sweep.configs)
    slot = slot_of(text)
    columns: list[tuple[str, Sequence[str | None]]] = [*sweep.axes.items(), ("seed", sweep.seeds)]
    columns += [next(iter(entry.items())) for entry in sweep.together]
    columns += sweep.draw.columns() if sweep.draw else []
    varied = {column_slot(other, column): other for other, column in columns}
    if slot in varied:
        _check_replaces(text, varied[slot])
    if sweep.draw:
        sweep = dataclasses.replace(sweep, draw=_draw_of(draw.without(vars(sweep.draw), {slot})))
    if key == "seed":
        return dataclasses.replace(sweep, seeds=values)
    if any(slot == column_slot(*next(iter(entry.items()))) for entry in sweep.together):
        return dataclasses.replace(sweep, together=[_rows_of(entry, key, values) for entry in sweep.together])
    if slot in varied or len(values) > 1:
        axis = varied.get(slot, text.partition("=")[0])
        if slot not in varied and axis in sweep.axes:
            raise ConfigError(f"{text}: the sweep varies {key} already; type the keys below it, {key}.KEY=a,b")
        overrides = [other for other in sweep.overrides if slot_of(other) != slot or slot[1]]
        return dataclasses.replace(_without(sweep, slot), axes=sweep.axes | {axis: values}, overrides=overrides)
    sweep = _without(sweep, slot)
    return dataclasses.replace(sweep, overrides=[*overrides_before(sweep.overrides, [text]), text])


def _drawn(sweep: Sweep, part: dict[str, Any]) -> Sweep:
    """The sweep with a typed part of its draw. A drawn key takes the place of its axis, override or column."""
    merged = draw.laid_over(vars(sweep.draw) if sweep.draw else {}, part)
    for key in (key for key, axis in part.get("axes", {}).items() if axis):
        slot = column_slot(key, merged["axes"][key].values)
        axes = {other: values for other, values in sweep.axes.items() if column_slot(other, values) != slot}
        overrides = [other for other in sweep.overrides if slot_of(other) != slot or slot[1]]
        sweep = _without(dataclasses.replace(sweep, axes=axes, overrides=overrides), slot)
    return dataclasses.replace(sweep, draw=_draw_of(merged))


def _draw_of(parts: dict[str, Any]) -> Draw | None:
    return Draw(**parts) if parts else None


def _check_replaces(text: str, varied: str) -> None:
    """Raise ConfigError unless a word sets a key, as the sweep spells it in `varied`, that runs have already."""
    override, key = read(text), key_of(text)
    if override.is_delete():
        raise ConfigError(f"{text}: the sweep varies {key}; type {key}=VALUE to give all runs one value")
    if override.is_add() and not varied.startswith("+"):
        raise ConfigError(f"{text}: {key} exists already; type it without the plus, {text.lstrip('+')}")


def _rows_of(entry: dict[str, list[str | None]], key: str, values: list[str]) -> dict[str, list[str | None]]:
    if key != key_of(lead := next(iter(entry))):
        return entry
    # Every row has the leading key.
    known_of = {row: known for row, known in enumerate(entry[lead]) if known is not None}
    if missing := [value for value in values if not any(same_value(value, known) for known in known_of.values())]:
        tied, there = ", ".join(list(entry)[1:]), ", ".join(known_of.values())
        raise ConfigError(f"{key} moves together with {tied}; it must be one of {there}, got {missing[0]}")
    rows = [row for row, known in known_of.items() if any(same_value(value, known) for value in values)]
    chosen = {other: [column[row] for row in rows] for other, column in entry.items()}
    return {other: column for other, column in chosen.items() if any(value is not None for value in column)}


def _without(sweep: Sweep, slot: tuple[str, bool]) -> Sweep:
    """The sweep without what `slot` sets among the keys that move together, because one value applies to every run."""
    kept = [key for key, values in sweep.axes.items() if column_slot(key, values) == slot]
    exclude = [entry for entry in sweep.exclude if slot[1] or slot[0] not in entry or kept]
    together = [without_columns(entry, {slot}) for entry in sweep.together]
    return dataclasses.replace(sweep, together=together, exclude=exclude)


def _merged(parts: Sequence[dict[str, str]]) -> dict[str, str]:
    return {key: value for part in parts for key, value in part.items()}


def _fits(point: dict[str, str], entry: dict[str, list[str]]) -> bool:
    values = {key_of(key): value for key, value in point.items()}
    return all(key in values and any(same_value(values[key], one) for one in entry[key]) for key in entry)
