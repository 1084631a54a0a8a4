"""The plan of a sweep: its runs and what they cost, before any of them is started."""

import contextlib
import errno
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, get_args, get_origin

from scaling_testbed.analysis.rows.study import claims_of, declared_in, draws_in
from scaling_testbed.config.compose import check_no_code, compose_many, outside_overrides, words_looked_up
from scaling_testbed.config.compute import params_in_use, steps_of, training_flops
from scaling_testbed.config.run import RunConfig, flatten, rate_means, run_folder_path, run_id
from scaling_testbed.config.words import key_of, quoted
from scaling_testbed.data.batches import ONLY
from scaling_testbed.data.manifest import read_manifest
from scaling_testbed.data.preparing.preparation import find_prepared
from scaling_testbed.errors import ConfigError, UserError
from scaling_testbed.files import check_version, read_json, write_bytes, write_json
from scaling_testbed.model.config import ModelConfig
from scaling_testbed.model.counting import count_params
from scaling_testbed.papers.declaration import Declaration, recorded
from scaling_testbed.papers.paper import experiment_named, records_of
from scaling_testbed.processes.world import World, check_world
from scaling_testbed.progress import say
from scaling_testbed.runs.environment import source_state
from scaling_testbed.runs.row import is_number
from scaling_testbed.sweeps.columns import telling_apart
from scaling_testbed.sweeps.gpu_memory import ASSUMED_GIB, fits, fitting, fitting_overrides, planned_memory
from scaling_testbed.sweeps.grid import Sweep, overrides_before
from scaling_testbed.sweeps.rules import with_values
from scaling_testbed.sweeps.trunks import TRUNK, Branched, branched, with_parents
from scaling_testbed.sweeps.unusual import unusual

Found = TypeVar("Found")

PLAN_FILE = "plan.jsonl"
SWEEP_FILE = "sweep.json"
NOT_KEPT = ("unusual", "processes", "nodes", "cpu_hours")  # of a PlannedRun
LONGEST_WORD = 2**17  # bytes of an argument of a process, on Linux
WITHOUT_FLOCK = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)  # the errors of file systems without flock


@dataclass(frozen=True, kw_only=True)
class PlannedRun:
    """One run of a sweep.

    varied: the keys and values in which it differs from the other runs. n_params, n_params_average and flops_6nd: as in
    a row. budget_n_params: the N of the budget, counted by its convention `params`.
    flops: counted from the matrix products, including those of interventions, of the steps from first_step on: a run
    that begins in the state of another one has that many steps before it. after: the run_id of this other run, if it is
    of the sweep too. is_part: whether the run is a part of a trunk (trunks.py). memory_bytes: an estimate for each GPU
    of the run. gpu_memory_gib: the memory of a GPU, for comparison. fits_with: the overrides that make the run fit this
    GPU; None if it fits, or if none is known. config: the configuration, the counts of parameters by every convention,
    and the meaning of the learning rate, flat as in a row, so that a plan can be read without composing; empty in plans
    of older versions. unusual: as in `unusual`; not kept in plan.jsonl.
    """

    run_id: str
    folder: str
    varied: dict[str, str]
    overrides: list[str]
    params: str
    budget_n_params: int
    n_params: int
    vocab_size: int
    n_tokens: int
    tokens_per_step: int
    steps: int
    flops_6nd: float
    flops: float
    memory_bytes: int
    gpu_hours: float | None = None
    n_params_average: float | None = None
    gpu_memory_gib: float = ASSUMED_GIB
    fits_with: list[str] | None = None
    first_step: int = 0
    after: str | None = None
    is_part: bool = False
    config: dict[str, Any] = field(default_factory=dict, repr=False)
    unusual: dict[str, str] = field(default_factory=dict, repr=False, compare=False)
    processes: int = 1
    nodes: int = 1
    cpu_hours: float | None = None

    def record(self) -> dict[str, Any]:
        """The run as one object for --json, without its configuration, which can be composed from `overrides`."""
        return {key: value for key, value in asdict(self).items() if key != "config"}

    @property
    def fits(self) -> bool:
        """Whether the estimate of memory fits a GPU of gpu_memory_gib, or the run uses no GPU."""
        return self.config.get("compute.device") == "cpu" or fits(self.memory_bytes, self.gpu_memory_gib)

    @property
    def hours(self) -> float | None:
        """The time of all of its devices, GPUs or processors."""
        return self.cpu_hours if self.gpu_hours is None else self.gpu_hours

    @property
    def share(self) -> float:
        """The share of its steps that the run makes itself."""
        return 1 - self.first_step / self.steps

    @property
    def budget_flops_6nd(self) -> float:
        """6 N D with the N of the budget, without pruned weights."""
        pruned = 0.0 if self.n_params_average is None else self.n_params - self.n_params_average
        return 6.0 * (self.budget_n_params - pruned) * self.n_tokens

    @property
    def label(self) -> str:
        """The run in printed text: the keys and values in which it differs from others, or its id if it has none."""
        return " ".join(f"{key}={value}" for key, value in self.varied.items()) or self.run_id


def plan(
    sweep: Sweep,
    processes: int | None = 1,
    gpu_memory_gib: float = ASSUMED_GIB,
    runs_per_gpu: int = 1,
    nodes: int = 1,
    fewest_gpus: bool = False,
) -> tuple[list[PlannedRun], int]:
    """Compose all runs of `sweep`. Returns the runs in order without duplicates, and the number of duplicates.

    processes: of each run, one for each GPU; None: the runs are only displayed. gpu_memory_gib: of a GPU, where
    compute.gpu_memory_gib is null. runs_per_gpu: how many runs share it. nodes: among which the processes are divided.
    fewest_gpus: a run that does not fit its GPUs gets the overrides and the GPUs that make it fit, if some are known.
    Raises ConfigError, which names the key, for a run that cannot be composed.
    """
    points = sweep.points()
    if not points:
        raise ConfigError(f"sweep {sweep.name}: exclude leaves no run")
    lists = [_overrides(sweep, point) for point in points]
    # By data, because to look whether data is prepared may read a folder tree.
    known: dict[str, tuple[int, dict[str, int] | None]] = {}

    def of_data(run: RunConfig) -> tuple[int, dict[str, int] | None]:
        data = repr((run.data_dir, run.data.name, run.data.description(), run.tokenizer, run.model.vocab_size))
        if data not in known:
            known[data] = planned_vocab_size(run), planned_train_tokens(run)
        return known[data]

    def resolved(run: RunConfig) -> ModelConfig:
        return run.model.resolved(of_data(run)[0])

    found: dict[str, PlannedRun] = {}
    folders: set[str] = set()
    hidden = {key for entry in sweep.together for key in entry if key not in telling_apart(entry)}
    keys = dict.fromkeys(key for point in points for key in point)
    varied = [key for key in keys if key not in hidden and len({point.get(key) for point in points}) > 1]
    shown_points = [{key: point[key] for key in varied if key in point} for point in points]
    members = _members(sweep, lists, shown_points, resolved)
    for member in members:
        run = member.run
        if processes is not None:
            check_world(World(size=processes), run.parallelism, run.batch.sequences)
        planned = _planned(
            member, of_data(run), processes or 1, nodes, (run.compute.gpu_memory_gib or gpu_memory_gib) / runs_per_gpu
        )
        if fewest_gpus and not planned.fits:
            planned = _fitted(member, of_data(run), planned)
        found.setdefault(planned.run_id, planned)
        folders.add(str(sweep_folder([planned])))
    if len(folders) > 1:
        raise ConfigError(
            f"name= and runs_dir= must be the same for all runs of a sweep; got {' and '.join(sorted(folders))}"
        )
    return list(found.values()), len(members) - len(found)


def _members(
    sweep: Sweep,
    lists: Sequence[list[str]],
    points: Sequence[dict[str, str]],
    resolved: Callable[[RunConfig], ModelConfig],
) -> list[Branched]:
    """The runs with the overrides `lists` and the values of rules, after their parents or the parts of their trunks."""

    def steps(run: RunConfig) -> int:
        return steps_of(run, resolved(run))

    def valued(rules: Mapping[str, str], lists: Sequence[list[str]]) -> list[list[str]]:
        return with_values(rules, lists, resolved)

    if sweep.parent is not None:
        return with_parents(lists, sweep.parent, points, steps, sweep.rules, valued)
    lists = valued(sweep.rules, lists)
    runs = compose_many(lists)
    # What was looked up stays as it is now, also if another run goes on before this one is started.
    lists = [
        [
            *words,
            *(words_looked_up("start", run.start) if run.start.run is not None else []),
            *words_looked_up("objective", run.objective),
        ]
        for run, words in zip(runs, lists, strict=True)
    ]
    if sweep.shared_trunk:
        return branched(runs, lists, points, steps)
    return [Branched(*entry) for entry in zip(runs, lists, points, strict=True)]


def _overrides(sweep: Sweep, point: dict[str, str]) -> list[str]:
    """The overrides of one run, the more specific ones later. A typed name has priority."""
    named = [text for text in sweep.overrides if key_of(text) == "name"]
    values = [f"{key}={value}" for key, value in point.items()]
    own = [*([] if named else [f"name={quoted(sweep.folder)}"]), *overrides_before(sweep.overrides, values), *values]
    check_no_code(own, f"sweep {sweep.name}")
    if long := [text for text in own if len(text.encode()) >= LONGEST_WORD]:
        raise ConfigError(
            f"{key_of(long[0])} has {len(long[0].encode()):,} bytes, and a word of a command has at most "
            f"{LONGEST_WORD:,}; name files by a folder or a glob"
        )
    return [*outside_overrides(sweep.plugins, sweep.configs), *own]


def _fitted(member: Branched, of_data: tuple[int, dict[str, int] | None], planned: PlannedRun) -> PlannedRun:
    """The run with what makes it fit; as it is planned where nothing does."""
    model, gib = member.run.model.resolved(of_data[0]), planned.gpu_memory_gib
    if (found := fitting(member.run, model, planned.n_params, planned.processes, gib)) is None:
        return planned
    words = [*overrides_before(member.overrides, found.own_words), *found.own_words]
    changed = replace(member, run=replace(found.run, overrides=words), overrides=words)
    return _planned(changed, of_data, found.gpus, found.nodes, gib)


def _planned(
    member: Branched, of_data: tuple[int, dict[str, int] | None], processes: int, nodes: int, gib: float
) -> PlannedRun:
    run, (vocab_size, train_tokens) = member.run, of_data
    model = run.model.resolved(vocab_size)
    counts = count_params(model)
    steps, first = steps_of(run, model), run.start.first_step
    n_tokens = steps * run.batch.tokens
    in_use = params_in_use(run, model, steps, steps)
    average = None if in_use is None else in_use[0]
    flops = training_flops(run, model, steps, steps) - training_flops(run, model, steps, first)
    config = {key: value for key, value in flatten(run).items() if "." in key or key == "seed"}
    n_bytes = planned_memory(run, model, counts.n_params, processes, gib).total
    return PlannedRun(
        run_id=run_id(run),
        folder=str(run_folder_path(run)),
        varied=member.point,
        overrides=member.overrides,
        params=run.budget.params,
        budget_n_params=getattr(counts, run.budget.params),
        n_params=counts.n_params,
        vocab_size=model.known_vocab_size,
        n_tokens=n_tokens,
        tokens_per_step=run.batch.tokens,
        steps=steps,
        n_params_average=average,
        flops_6nd=float(6 * (counts.n_params if average is None else average) * n_tokens),
        flops=float(flops),
        memory_bytes=n_bytes,
        gpu_memory_gib=gib,
        fits_with=None if fits(n_bytes, gib) else fitting_overrides(run, model, counts.n_params, processes, gib),
        first_step=first,
        after=member.after,
        is_part=member.is_part,
        config=config | asdict(counts) | {"rate_means": rate_means(run)},
        unusual=unusual(run, model, counts, steps, train_tokens),
        processes=processes,
        nodes=nodes,
    )


def planned_vocab_size(run: RunConfig) -> int:
    """The vocabulary size of the run's data, from the prepared data or else from its source or tokenizer. Raises
    ConfigError if it is known only after the data is prepared."""
    if found := _prepared(run, lambda manifest: manifest["vocab_size"]):
        return found
    known = getattr(run.data, "vocab_size", None) or getattr(run.tokenizer, "vocab_size", None) or run.model.vocab_size
    if known is None:
        raise ConfigError(
            f"the vocabulary of data={run.data.name} tokenizer={run.tokenizer.name} is not known before it is "
            "prepared; run `prepare` first, or give tokenizer.vocab_size="
        )
    return known


def planned_train_tokens(run: RunConfig) -> dict[str, int] | None:
    """The tokens of the prepared train split of each source of the run's mixture, or of its ONLY source; None if its
    data is not prepared."""

    def tokens(manifest: dict[str, Any]) -> dict[str, int]:
        sources = manifest.get("sources") or {ONLY: manifest}
        return {name: source["splits"]["train"]["n_tokens"] for name, source in sources.items()}

    return _prepared(run, tokens)


def _prepared(run: RunConfig, entry: Callable[[dict[str, Any]], Found]) -> Found | None:
    """An entry of the manifest of the run's prepared data; None if the data is not prepared or its source does not
    exist."""
    try:
        folder = find_prepared(run.data, run.tokenizer, Path(run.data_dir))
        return None if folder is None else entry(read_manifest(folder))
    except (OSError, UserError):
        return None


def on_gpus(overrides: Sequence[str]) -> list[str]:
    """The overrides of a run on GPUs. Without a GPU the run fails instead of using the CPU, unless the overrides name a
    device."""
    return ["compute.device=cuda", *overrides]


def sweep_folder(runs: Sequence[PlannedRun]) -> Path:
    """The folder of all runs of one sweep."""
    folder = Path(runs[0].folder).parent
    return folder.parent if runs[0].is_part else folder


@contextlib.contextmanager
def alone_in(folder: Path):
    """Context manager in which no other process changes the plan in a sweep's folder or submits its runs. It waits for
    a process that does so. Without flock it has no effect. Raises UserError if the folder cannot be written."""
    import filelock

    # Without flock no lock file is used, because the file of a killed process would stop all others.
    lock = filelock.FileLock(folder / ".lock", fallback_to_soft=False)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except OSError as error:
        if error.errno not in WITHOUT_FLOCK:
            raise UserError(f"cannot write {folder}: {error.strerror}; set runs_dir=") from None
    try:
        yield
    finally:
        lock.release()


def told_apart(runs: Iterable[PlannedRun]) -> list[PlannedRun]:
    """The runs, the last of each id, with the value of each run for every key that varies in any of them: a key can
    vary in the whole sweep but not in a part that was typed. A number has one spelling: 1e-3 and 0.001 are one
    column."""
    runs = list(runs)
    keys = dict.fromkeys(key for run in runs for key in run.varied)
    spelling: dict[tuple[str, float | str], str] = {}

    def spelled(key: str, value: str) -> str:
        with contextlib.suppress(ValueError):
            return spelling.setdefault((key, float(value)), value)
        return value

    def varied(run: PlannedRun) -> dict[str, str]:
        was_set = dict(text.partition("=")[::2] for text in run.overrides) | run.varied
        return {key: spelled(key, was_set[key]) for key in keys if key in was_set}

    return list({run.run_id: replace(run, varied=varied(run)) for run in runs}.values())


def remember(runs: Sequence[PlannedRun], sweep: Sweep) -> None:
    """Add the runs to plan.jsonl in their folder, so that `status` can show them without the typed overrides.
    sweep.json names their sweep, its paper and its experiment, and holds its rules and its declaration, and all draws
    of the folder. If another sweep created the folder, which `name=` allows, sweep.json still names that sweep. A line
    of a later version stays as it is. A plan with a damaged line is kept beside the new one. Raises UserError if a
    later version has written sweep.json, and for drawn runs in the folder of a declared grid."""
    folder = sweep_folder(runs)
    about = {key: getattr(sweep, key) for key in ("scale", "paper", "experiment", "description", "analysis")}
    about = {"sweep": sweep.name, **about, **({"rules": sweep.rules} if sweep.rules else {})}
    path = folder / PLAN_FILE
    with alone_in(folder):
        first, declared, draws = _sweep_of(folder)
        if sweep.draw and declared:
            raise UserError(f"{folder} holds a declared grid, which drawn runs are not; type name= for another folder")
        before, others = _read_plan(path)
        known = told_apart([*before, *runs])
        ids = {run.run_id for run in known}
        later = [line for line in others if _run_id_in(line) not in (None, *ids)]
        if any(_run_id_in(line) is None for line in others):
            aside = path.with_suffix(".damaged.jsonl")
            write_bytes(aside, path.read_bytes())
            say(f"warning: {path} is damaged and is written anew; it is kept as {aside.name}", errors=True)
        lines = [json.dumps(_kept(run)).encode() for run in known] + later
        write_bytes(path, b"".join(line + b"\n" for line in lines))
        if first in (None, (sweep.name, sweep.scale)):
            about["declared"] = _declared(sweep, runs, declared, folder)
        elif sweep.draw:
            about = read_json(folder / SWEEP_FILE)
        else:
            return
        about["draws"] = _with_draw(draws, sweep)
        dropped = [key for key in ("declared", "draws") if not about.get(key)]
        write_json(folder / SWEEP_FILE, {key: value for key, value in about.items() if key not in dropped})


def _with_draw(draws: list[dict[str, Any]], sweep: Sweep) -> list[dict[str, Any]]:
    """The draws of a folder with that of the sweep, which takes the place of an equal one with fewer samples."""
    if sweep.draw is None:
        return draws
    new = sweep.draw.record()
    others = [one for one in draws if {**one, "samples": None} != {**new, "samples": None}]
    most = max((one["samples"] for one in draws if one not in others), default=0)
    return [*others, {**new, "samples": max(most, new["samples"])}]


def _kept(run: PlannedRun) -> dict[str, Any]:
    return {key: value for key, value in asdict(run).items() if key not in NOT_KEPT}


def _declared(
    sweep: Sweep, runs: Sequence[PlannedRun], before: Declaration | None, folder: Path
) -> dict[str, Any] | None:
    """The sweep's declaration for sweep.json, with its seeds and rates, its claims, its date and commit.

    before: what sweep.json holds. It stays if nothing is declared anew; one of an earlier version, without claims, is
    declared anew with them as long as no run has a result. Other sweeps in the folder do not count, and neither do
    drawn runs: a declaration is about the grid of the sweep.
    """
    if sweep.declared is None or sweep.draw is not None:
        return before.record() if before else None
    seeds = {int(run.config["seed"]) for run in runs if is_number(run.config.get("seed"))}
    rates = {float(run.config["optimizer.lr"]) for run in runs if is_number(run.config.get("optimizer.lr"))}
    if before:  # typed overrides may select a part of the sweep
        seeds, rates = seeds | set(before.seeds), rates | set(before.rates)
    claims = records_of(experiment_named(sweep.paper, sweep.experiment, sweep.name)[1])
    new = replace(
        sweep.declared,
        experiment=claims_of(vars(sweep)),
        seeds=sorted(seeds),
        rates=sorted(rates),
        claims=claims,
    )
    results = sum(1 for _ in folder.glob("*/result.json"))
    if before and before.judges_as(new) and (before.claims is not None or results):
        return before.record()
    state, _ = source_state()
    commit = state["commit"] and state["commit"] + (" with uncommitted changes" if state["dirty"] else "")
    today = datetime.now(UTC).date().isoformat()
    changed = bool(before and results)
    first = (before.first or before) if before and changed else None
    return replace(new, date=today, commit=commit, results=results, changed=changed, first=first).record()


def _sweep_of(folder: Path) -> tuple[tuple[str, str | None] | None, Declaration | None, list[dict[str, Any]]]:
    """Name and scale of the sweep that created `folder`, and its declaration, None what is unknown; and all draws of
    the folder."""
    path = folder / SWEEP_FILE
    try:
        about = read_json(path)
    except UserError:
        return None, None, []
    check_version(path, about.get("schema_version"), 1)
    declared = None
    with contextlib.suppress(ConfigError):  # a damaged one is declared anew
        declared = recorded(declared_in(about))
    named = (about["sweep"], about.get("scale")) if "sweep" in about else None
    return named, declared, draws_in(about, folder)


def remembered(folder: Path) -> list[PlannedRun]:
    """The runs that `remember` wrote in `folder`, which may have been moved since. Lines that cannot be read are left
    out, with a warning."""
    return _read_plan(folder / PLAN_FILE)[0]


def _read_plan(path: Path) -> tuple[list[PlannedRun], list[bytes]]:
    """The runs in a plan, and its other lines, which are reported on stderr."""
    runs, others = [], []
    for number, line in enumerate(path.read_bytes().splitlines() if path.exists() else [], 1):
        with contextlib.suppress(ValueError, TypeError, RecursionError):
            run = _remembered_run(json.loads(line))
            place = path.parent / TRUNK if run.is_part else path.parent
            runs.append(replace(run, folder=str(place / Path(run.folder).name)))
            continue
        others.append(line)
        say(f"warning: {path}:{number} holds no planned run and is left out", errors=True)
    return runs, others


def _run_id_in(line: bytes) -> str | None:
    """The run that a line of a later version plans; None if it is no such line."""
    with contextlib.suppress(ValueError, AttributeError, RecursionError):
        found = json.loads(line).get("run_id")
        return found if isinstance(found, str) else None
    return None


def _remembered_run(record: Any) -> PlannedRun:
    """The run of one line of a plan. Raises ValueError or TypeError if a field is missing, unknown or of another
    type."""
    run = PlannedRun(**record)
    for one in fields(PlannedRun):
        if not _is(getattr(run, one.name), one.type):
            raise ValueError(f"{one.name} is damaged")
    return run


def _is(value: Any, kind: Any) -> bool:
    """Whether a value of JSON has the type of a field of PlannedRun. Text can be written as UTF-8."""
    inside = get_args(kind)
    if isinstance(kind, UnionType):
        return any(_is(value, one) for one in inside)
    if kind is str:
        return isinstance(value, str) and "\0" not in value and value == value.encode(errors="ignore").decode()
    if get_origin(kind) is dict:
        return isinstance(value, dict) and all(_is(key, str) and _is(entry, inside[1]) for key, entry in value.items())
    if get_origin(kind) is list:
        return isinstance(value, list) and all(_is(entry, inside[0]) for entry in value)
    if kind in (int, float):
        return is_number(value) and (type(value) is int or kind is float)
    return kind is Any or isinstance(value, kind)
