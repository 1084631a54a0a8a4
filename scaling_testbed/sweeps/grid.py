"""Sweep files, which give the overrides of each run of a grid.

    description: one line
    paper: small_scale_proxies          # with experiment: its question and claims, which `report` judges
    experiment: qknorm_lr
    analysis: lr_sensitivity            # the analysis that reads the results; null: none
    overrides: [key=value, ...]         # of every run
    axes: {key: [values], ...}          # every combination is a run; a group (model, data, ...) is a key too
    together:                           # keys that move together: one row of values at a time; the first leads
      - {model: [a, b], batch.sequences: [64, 512]}
      - [{model.residual: pre}, {model.residual: peri, model.norm: rmsnorm}]    # the same, written row by row
    exclude:                            # runs left out: they match every key of an entry, of a list any value
      - {model: b, budget.tokens_per_param: [320, 640]}
    seeds: [0, 1]
    plugins: [NAME, FILE.py]            # modules from outside, installed or also named on the command line
    configs: [DIR]                      # folders that are searched for choices, beside configs/
    base: NAME                          # a file of configs/sweep/base/ that this file extends
    scales: {NAME: {any key but base and scales}, ...}     # sizes of the same sweep; `scale=NAME`, else the first

A relative path starts at the folder of the file that contains it.

Four layers are merged in this order: base, scale of the base, file, scale of the file. Axes, rows of keys that move
together (identified by their first key) and seeds replace those of the same name in earlier layers. Overrides,
exclusions, plugins and configs are added. An override or a row also replaces an axis of an earlier layer. Descriptions
are joined, that of the file before that of its base.

A value is written as on the command line. After the name of the sweep, `key=value` and `key=a,b` replace an axis,
select rows of keys that move together by their first key, or apply to every run.
"""

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scaling_testbed.config.compose import override_values
from scaling_testbed.config.search import CONFIG_DIR, check_no_doubles, choices, config_folder
from scaling_testbed.errors import ConfigError, check_choice
from scaling_testbed.files import read_yaml
from scaling_testbed.papers.paper import paper_named
from scaling_testbed.plugins import load_named_in, load_plugins, plugin_name

SWEEP_DIR = CONFIG_DIR / "sweep"
ANALYSES = ("lr_sensitivity", "instability", "report", "fit", "frontier")  # of `analyze`
KEYS = (
    *("description", "paper", "experiment", "analysis", "overrides", "axes", "together", "exclude", "seeds"),
    *("plugins", "configs"),
)


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """A sweep file read at one scale, with every value spelled as on the command line.

    name: of the file. folder: of its runs, which is the name, followed by the scale unless that is the first. scale:
    None if the file has no scales. paper, experiment: names in papers.paper.PAPERS. Both can be None. A paper without
    an experiment means that the runs have its settings. plugins, configs: of every run, typed or in the file, with
    absolute paths.
    """

    name: str
    folder: str = ""
    scale: str | None = None
    description: str = ""
    paper: str | None = None
    experiment: str | None = None
    analysis: str | None = None
    overrides: list[str] = field(default_factory=list)
    axes: dict[str, list[str]] = field(default_factory=dict)
    together: list[dict[str, list[str | None]]] = field(default_factory=list)  # None: the row does not set the key
    exclude: list[dict[str, list[str]]] = field(default_factory=list)
    seeds: list[str] = field(default_factory=lambda: ["0"])
    plugins: list[str] = field(default_factory=list)
    configs: list[str] = field(default_factory=list)

    def points(self) -> list[dict[str, str]]:
        """The runs in order, as {key: value} of what differs between them; the first axis changes slowest."""
        rows = [[_row(t, values) for values in zip(*t.values(), strict=True)] for t in self.together]
        axes = [[{key: value} for value in values] for key, values in self.axes.items()]
        seeds = [[{"seed": seed} for seed in self.seeds]]
        found = (_merged(parts) for parts in itertools.product(*rows, *axes, *seeds))
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
        content = read_yaml(path) if path else None
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
        return _parse(content, name=path.stem, folder=folder, scale=chosen)
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
        files.insert(0, _parted(read_yaml(bases[base]), bases[base].parent))
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
    if unknown := [key for key in content if key not in known]:
        raise ConfigError(f"there is no key {unknown[0]}; a sweep has {', '.join(known)}")
    for key in ("description", "paper", "experiment", "base"):
        if not isinstance(content.get(key, ""), str):
            raise ConfigError(f"{key} must be a text; got {content[key]!r}")
    for key, kind in (("axes", dict), *((key, list) for key in ("overrides", "together", "exclude", "seeds"))):
        if not isinstance(content.get(key, kind()), kind):
            raise ConfigError(f"{key} must be a {'mapping' if kind is dict else 'list'}")
    if "axes" in content:
        content["axes"] = _columns("axes", content["axes"])
    if "together" in content:
        content["together"] = [_together(entry) for entry in content["together"]]
    if {} in content.get("together", []):
        raise ConfigError("together holds an entry without keys; write {key: [values], ...}")
    if "analysis" in content:
        check_choice("analysis", content["analysis"], ANALYSES)
    if bad := [text for text in content.get("overrides", []) if not isinstance(text, str) or "=" not in text]:
        raise ConfigError(f"overrides are written key=value; got {bad[0]!r}")
    for key, absolute in (("plugins", plugin_name), ("configs", config_folder)):
        names = [content[key]] if isinstance(content.get(key), str) else content.get(key, [])
        if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
            raise ConfigError(f"{key} must be a list of names; got {names!r}")
        if names:
            content[key] = [absolute(name, folder) for name in names]
    return content


def _laid_over(below: dict, above: dict) -> dict:
    """Merge two checked contents. A new axis of `above` comes before those of `below`, so it changes more slowly."""
    merged = below | above
    upper = above.get("overrides", [])
    settled = {key for entry in above.get("together", []) for key in entry} | {text.partition("=")[0] for text in upper}
    axes = {key: values for key, values in below.get("axes", {}).items() if key not in settled}
    new = {key: values for key, values in above.get("axes", {}).items() if key not in axes}
    merged["axes"] = new | axes | above.get("axes", {})
    rows = {next(iter(entry)): entry for entry in below.get("together", [])}
    rows |= {next(iter(entry)): entry for entry in above.get("together", [])}
    merged["together"] = list(rows.values())
    merged["overrides"] = [*overrides_before(below.get("overrides", []), upper), *upper]
    for key in ("exclude", "plugins", "configs"):
        merged[key] = [*below.get(key, []), *above.get(key, [])]
    return merged


def overrides_before(shared: Sequence[str], own: Sequence[str]) -> list[str]:
    """The shared overrides of keys that `own` does not set. If several set one key, the last one applies."""
    keys = {text.partition("=")[0] for text in own}
    return [text for text in shared if text.partition("=")[0] not in keys]


def _parse(content: dict, **named: Any) -> Sweep:
    content = dict(content)
    content["exclude"] = [_columns("exclude", entry, scalars=True) for entry in content.get("exclude", [])]
    content["seeds"] = [spelled(seed) for seed in content.get("seeds", [0])]
    sweep = Sweep(**named, **content)
    _check_experiment(sweep)
    for entry in sweep.together:
        if len({len(values) for values in entry.values()}) > 1:
            lengths = ", ".join(f"{key} has {len(values)}" for key, values in entry.items())
            raise ConfigError(f"keys that move together need the same number of values: {lengths}")
    keys = [*sweep.axes, *(key for entry in sweep.together for key in entry), "seed"]
    if twice := [key for key in keys if keys.count(key) > 1]:
        raise ConfigError(f"{twice[0]} is given twice among axes, together and seeds")
    if astray := [key for entry in sweep.exclude for key in entry if key not in keys]:
        raise ConfigError(f"exclude names {astray[0]}, which no axis varies")
    return sweep


def _check_experiment(sweep: Sweep) -> None:
    if sweep.paper is None and sweep.experiment is not None:
        raise ConfigError(f"experiment: {sweep.experiment} also needs paper:, the name of its paper")
    paper = sweep.paper and paper_named(sweep.paper)
    if paper and sweep.experiment is not None:
        paper.experiment(sweep.experiment)


def _together(entry: Any) -> dict[str, list[str | None]]:
    """Keys that move together as columns, from columns or from a list of rows. Each row has the leading key."""
    if not isinstance(entry, list):
        return {key: [*values] for key, values in _columns("together", entry).items()}
    if not entry or not all(isinstance(row, dict) and row for row in entry):
        raise ConfigError(f"together takes mappings of keys to lists of values, or lists of rows; got {entry!r}")
    lead = next(iter(entry[0]))
    if without := [row for row in entry if lead not in row]:
        raise ConfigError(f"every row of keys that move together needs the leading key {lead}; got {without[0]!r}")
    keys = dict.fromkeys(str(key) for row in entry for key in row)
    return {key: [spelled(row[key]) if key in row else None for row in entry] for key in keys}


def _row(entry: dict[str, list[str | None]], values: Sequence[str | None]) -> dict[str, str]:
    return {key: value for key, value in zip(entry, values, strict=True) if value is not None}


def _columns(what: str, entry: Any, scalars: bool = False) -> dict[str, list[str]]:
    if not isinstance(entry, dict):
        raise ConfigError(f"{what} takes mappings of keys to lists of values; got {entry!r}")
    columns = {}
    for key, values in entry.items():
        if scalars and not isinstance(values, list):
            values = [values]
        if not isinstance(values, list) or not values:
            raise ConfigError(f"{what}.{key} must be a list of values; got {values!r}")
        columns[str(key)] = [spelled(value) for value in values]
    return columns


def spelled(value: Any) -> str:
    """A YAML value as it is typed after `key=`."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{','.join(map(spelled, value))}]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{spelled(entry)}" for key, entry in value.items()) + "}"
    return str(value)


def narrowed(sweep: Sweep, typed: Sequence[str]) -> Sweep:
    """The sweep with typed overrides applied. Raises ConfigError for a value that keys moving together do not have."""
    for text in typed:
        key, values = override_values(text)
        if key == "seed":
            sweep = dataclasses.replace(sweep, seeds=values)
        elif any(key == next(iter(entry)) for entry in sweep.together):
            sweep = dataclasses.replace(sweep, together=[_rows_of(entry, key, values) for entry in sweep.together])
        elif key in sweep.axes or len(values) > 1:
            sweep = dataclasses.replace(_without(sweep, key), axes=sweep.axes | {key: values})
        else:
            sweep = _without(sweep, key)
            sweep = dataclasses.replace(sweep, overrides=[*sweep.overrides, text])
    return sweep


def _rows_of(entry: dict[str, list[str | None]], key: str, values: list[str]) -> dict[str, list[str | None]]:
    if key not in entry:
        return entry
    # Every row has the leading key.
    known_of = {row: known for row, known in enumerate(entry[key]) if known is not None}
    if missing := [value for value in values if not any(_same(value, known) for known in known_of.values())]:
        tied, there = ", ".join(list(entry)[1:]), ", ".join(known_of.values())
        raise ConfigError(f"{key} moves together with {tied}; it must be one of {there}, got {missing[0]}")
    rows = [row for row, known in known_of.items() if any(_same(value, known) for value in values)]
    return {other: [column[row] for row in rows] for other, column in entry.items()}


def _without(sweep: Sweep, key: str) -> Sweep:
    """The sweep without `key` among the keys that move together, because one value applies to every run."""
    together = [{k: values for k, values in entry.items() if k != key} for entry in sweep.together]
    exclude = [entry for entry in sweep.exclude if key not in entry or key in sweep.axes]
    return dataclasses.replace(sweep, together=[entry for entry in together if entry], exclude=exclude)


def _merged(parts: Sequence[dict[str, str]]) -> dict[str, str]:
    return {key: value for part in parts for key, value in part.items()}


def _fits(point: dict[str, str], entry: dict[str, list[str]]) -> bool:
    return all(key in point and any(_same(point[key], value) for value in values) for key, values in entry.items())


def _same(a: str, b: str) -> bool:
    """Whether two spellings mean one value: 1e-3 and 0.001."""
    try:
        return a == b or float(a) == float(b)
    except ValueError:
        return False
