"""The configuration of one run as frozen dataclasses. Does not import Hydra.

Every default is set in a dataclass. The files in configs/ hold only values that differ from it.
"""

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scaling_testbed.config.budget import BudgetConfig
from scaling_testbed.config.sections import (
    BatchConfig,
    CheckpointConfig,
    ComputeConfig,
    EvaluationConfig,
    LoggingConfig,
    ParallelismConfig,
)
from scaling_testbed.config.start import StartConfig
from scaling_testbed.data.sources import SOURCES
from scaling_testbed.data.sources.source import Source
from scaling_testbed.data.tokenizers import TOKENIZERS, TokenizerConfig
from scaling_testbed.diagnostics.config import DiagnosticsConfig
from scaling_testbed.errors import ConfigError, UserError, check_positive
from scaling_testbed.files import read_json
from scaling_testbed.keys import ADDED_LATER, EXECUTION_ONLY, REQUIRED, default_of, identifies, key
from scaling_testbed.learning.averaging import AVERAGINGS, Averaging, NoAveraging
from scaling_testbed.learning.config import CrossEntropyConfig
from scaling_testbed.learning.interventions.base import Intervention
from scaling_testbed.learning.interventions.chosen import choose_interventions
from scaling_testbed.learning.objectives import OBJECTIVES, Asked, CrossEntropyObjective, Objective
from scaling_testbed.learning.optimizers import OPTIMIZERS, OptimizerConfig, rate_meaning
from scaling_testbed.learning.schedules import SCHEDULES, Schedule
from scaling_testbed.model.config import ModelConfig, ParametrizationConfig
from scaling_testbed.model.parametrization import check_parametrization
from scaling_testbed.model.parts import ATTENTION_IMPLS, LINEARS, NORMALISERS

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

# Config group -> the dataclasses that a file of the group can fill, by kind. A group with one kind has the key "".
GROUPS: Mapping[str, Mapping[str, type["DataclassInstance"]]] = {
    "model": {"": ModelConfig},
    "parametrization": {"": ParametrizationConfig},
    "optimizer": OPTIMIZERS,
    "schedule": SCHEDULES,
    "loss": {"cross_entropy": CrossEntropyConfig},
    "objective": OBJECTIVES,
    "averaging": AVERAGINGS,
    "data": SOURCES,
    "tokenizer": TOKENIZERS,
    "diagnostics": {"": DiagnosticsConfig},
    "parallelism": {"": ParallelismConfig},
    "logging": {"": LoggingConfig},
}

PLANNED_RUN = "SCALING_TESTBED_PLANNED_RUN"  # the variable by which a sweep tells a run its planned run_id
LONGEST_NAME = 255  # bytes of a folder's name, on Linux and macOS


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The configuration of one run. A section that is a config group holds one of its dataclasses in GROUPS."""

    name: str = key("default", "The folder under runs_dir that the run is filed in.", identity=EXECUTION_ONLY)
    seed: int = key(0, "The seed of the initial weights and of the order of the data.")
    runs_dir: str = key("runs", "The folder of all runs.", identity=EXECUTION_ONLY)
    data_dir: str = key("data", "The folder of prepared corpora.", identity=EXECUTION_ONLY)
    data_workers: int | None = key(
        None,
        "Processes that tokenise a corpus. null: one for each usable core and mebibyte of text, at most 16.",
        identity=EXECUTION_ONLY,
    )
    model: ModelConfig = key(REQUIRED, "The architecture.")
    parametrization: ParametrizationConfig = key(REQUIRED, "How initialisation and learning rates depend on width.")
    optimizer: OptimizerConfig = key(REQUIRED, "The optimizer.")
    schedule: Schedule = key(REQUIRED, "The learning rate as a function of the step.")
    loss: CrossEntropyConfig = key(REQUIRED, "The cross-entropy and its z-loss, and the path that computes them.")
    objective: Objective = dataclasses.field(
        default_factory=CrossEntropyObjective,
        metadata={"help": "What training minimises.", "identity": ADDED_LATER},
    )
    interventions: dict[str, dict[str, object]] = key(
        {},
        "Interventions that act in every step: the name of a registered one, and its options. Type "
        "+interventions.NAME.OPTION=VALUE.",
        identity=ADDED_LATER,
    )
    averaging: Averaging = dataclasses.field(
        default_factory=NoAveraging,
        metadata={"help": "The average of the weights that is evaluated beside them.", "identity": ADDED_LATER},
    )
    data: Source = key(REQUIRED, "The source of the training and validation data.")
    tokenizer: TokenizerConfig = key(REQUIRED, "The tokenizer.")
    start: StartConfig = field(default_factory=StartConfig, metadata={"identity": ADDED_LATER})
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    diagnostics: DiagnosticsConfig = key(REQUIRED, "What is measured inside the model.", identity=EXECUTION_ONLY)
    parallelism: ParallelismConfig = key(REQUIRED, "How the run is spread over processes.", identity=EXECUTION_ONLY)
    logging: LoggingConfig = key(REQUIRED, "What is recorded while the run trains.", identity=EXECUTION_ONLY)
    plugins: list[str] = key(
        [],
        "Modules from outside that register what other keys name: dotted names, or paths of .py files.",
        identity=EXECUTION_ONLY,
    )
    configs: list[str] = key(
        [],
        "Folders that are searched for the choices of every group, in addition to configs/.",
        identity=EXECUTION_ONLY,
    )
    overrides: list[str] = key([], "The overrides as typed, for the record. It cannot be set.", identity=EXECUTION_ONLY)

    def __post_init__(self) -> None:
        parts = self.name.split("/")
        control = re.search(r"[\x00-\x1f\x7f]", self.name)
        if control or not self.name or self.name.startswith((".", "/")) or ".." in parts:
            raise ConfigError(f"name must be a plain folder name; got {self.name!r}")
        if any(len(part.encode(errors="replace")) > LONGEST_NAME for part in parts):
            raise ConfigError(f"name must have at most {LONGEST_NAME} bytes, as folders do; got {self.name[:40]!r}...")
        if empty := [name for name in ("runs_dir", "data_dir") if not getattr(self, name).strip()]:
            raise ConfigError(f"{empty[0]} must name a folder, and . is the current one; got an empty text")
        for place in ("runs_dir", "data_dir"):  # a shell does not do it in quotes and YAML
            object.__setattr__(self, place, os.path.expanduser(getattr(self, place)))
        check_positive("data_workers", self.data_workers)
        skipped = self.data.skip_steps
        if len(skipped) % 2 or any(end <= begin for begin, end in itertools.pairwise([-1, *skipped])):
            raise ConfigError(f"data.skip_steps must be pairs a,b of rising steps, as [300,320]; got {skipped}")
        if self.seed < 0:
            raise ConfigError(f"seed must not be negative; got {self.seed}")
        check_parametrization(self.parametrization, self.model)
        interventions_of(self)
        if self.budget.hours is not None and (reason := _why_no_hours(self)):
            raise ConfigError(f"budget.hours={self.budget.hours:g} cannot be with {reason}")
        if self.batch.cutting.needs_documents and (kinds := self.data.without_documents()):
            raise ConfigError(
                f"{self.batch.cutting} needs the ends of documents, and data={kinds[0]} has no EOS token (for token "
                "files give it as data.eos_id); use batch.document_masking=false and batch.packing=windows"
            )
        self.data.check_length(self.batch.sequence_length)
        if self.batch.document_masking and (setting := unmasked(self)):
            raise ConfigError(f"{setting}; use batch.document_masking=false")
        if lacking := self.loss.lacks(self.model.d_model):
            raise ConfigError(lacking)
        self.objective.check(
            Asked(
                model=self.model,
                sequence_length=self.batch.sequence_length,
                sources=tuple(self.data.parts()),
                weights_change=changes_weights(self.data),
                begins_in_run=self.start.run is not None,
                grows=self.start.growth is not None,
            )
        )
        if self.averaging.copies and (found := unaveraged(self)):
            setting, reason = found
            raise ConfigError(f"averaging={self.averaging.name} cannot be with {setting}: {reason}; use averaging=none")
        if self.parallelism.is_sharded and (found := unshardable(self)):
            setting, reason = found
            raise ConfigError(f"{setting} cannot be sharded: {reason}; use parallelism=single or parallelism=ddp")
        micro = self.batch.micro_batch
        if micro is not None and self.batch.sequences % micro:
            raise ConfigError(
                f"batch.micro_batch_sequences must divide batch.sequences={self.batch.sequences}; got {micro}"
            )


def _why_no_hours(run: RunConfig) -> str | None:
    """The key=value of `run` that needs the number of steps before the clock has chosen it, and what to type; None if
    none does."""
    schedule = run.schedule
    if schedule.steps is not None:
        return f"schedule.steps={schedule.steps}, which is another end of the schedule; leave one of them out"
    if schedule.shortest(1, 0) is None:
        return (
            f"schedule={schedule.name}, whose rates depend on the number of steps from the beginning; use schedule=wsd "
            "with a schedule.decay_fraction below 1, or schedule=constant"
        )
    if schedule.warmup_tokens is None and 0 < schedule.warmup < 1:
        return f"schedule.warmup={schedule.warmup:g}, a part of all steps; give it in steps, as schedule.warmup=100"
    if run.optimizer.weight_decay_steps is not None:
        return "optimizer.weight_decay_steps, which divides the decay by all steps; give optimizer.weight_decay alone"
    if needing := [name for name, one in interventions_of(run).items() if one.needs_steps]:
        return f"interventions.{needing[0]}, which is told the number of all steps; leave one of them out"
    if run.start.same_run:
        return "start.same_run=true, whose parent knows the number of steps; leave it out"
    return None


def unshardable(run: RunConfig) -> tuple[str, str] | None:
    """The key=value of `run` that parallelism=fsdp does not support, and the reason; None if it supports the run."""
    if reason := run.optimizer.needs_whole_tensors:
        return f"optimizer={run.optimizer.name}", reason
    if reason := LINEARS[run.model.linear].needs_whole_tensors:
        return f"model.linear={run.model.linear}", reason
    if run.checkpoint.asynchronous:
        return "checkpoint.asynchronous=true", "the processes write a sharded checkpoint together, between two steps"
    for name, intervention in interventions_of(run).items():
        if reason := intervention.needs_whole_tensors:
            asked_by = intervention.key
            return (f"interventions.{name}" if asked_by is None else f"{asked_by}={flatten(run)[asked_by]}"), reason
    return None


def changes_weights(data: Source) -> bool:
    """Whether the weights of the sources in `data` change during a run."""
    return data.online_rule is not None or len(data.weights_by_step(dict.fromkeys(data.parts(), 1))) > 1


def unmasked(run: RunConfig) -> str | None:
    """Why the attention of `run` cannot tell documents apart; None if it can."""
    normaliser, impl = run.model.attention_normaliser, run.model.attention_impl
    if NORMALISERS[normaliser].depends_on_length:
        return (
            f"batch.document_masking=true cannot be with model.attention_normaliser={normaliser}, whose weights depend "
            "on the length of the sequence"
        )
    if impl in ATTENTION_IMPLS and not ATTENTION_IMPLS[impl].documents:
        return f"batch.document_masking=true cannot be with model.attention_impl={impl}, which knows no documents"
    return None


def unaveraged(run: RunConfig) -> tuple[str, str] | None:
    """The key=value of `run` with which weights of different steps cannot be averaged, and the reason; None if they
    can."""
    if LINEARS[run.model.linear].makes_weight_anew:
        return f"model.linear={run.model.linear}", "its matrices are scaled by norms of the last weights"
    for name, intervention in interventions_of(run).items():
        if reason := intervention.not_averaged:
            return f"interventions.{name}", reason
    return None


def rate_means(run: RunConfig) -> str:
    """The meaning of one unit of the learning rate. Runs with different meanings are never compared in one S."""
    return rate_meaning(run.optimizer, run.model.linear)


def interventions_of(run: RunConfig) -> dict[str, Intervention]:
    """Name -> intervention of `run`; new objects at each call. Raises ConfigError as choose_interventions does."""
    return choose_interventions(run.optimizer, run.model, run.interventions)


def run_id(run: RunConfig) -> str:
    """The name of a run's folder: a hash of the configuration without paths, logging and fields of execution."""
    canonical = json.dumps(_identity(run), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:12]


def run_folder_path(run: RunConfig) -> Path:
    """The path runs_dir/name/run_id. The same command finds the same folder again."""
    return Path(run.runs_dir) / run.name / run_id(run)


def check_planned(run: RunConfig) -> None:
    """Raise ConfigError if a sweep started this process for another run than its words mean now."""
    planned = os.environ.get(PLANNED_RUN)
    if planned not in (None, run_id(run)):
        raise ConfigError(
            f"the plan was made for run {planned}, and its words mean run {run_id(run)} now, because a configuration "
            "file or this package has changed; restore it, or type the command of the sweep again"
        )


def _identity(value: Any, *, defaults: bool = False) -> Any:
    """Return `value` as plain data without the fields that are EXECUTION_ONLY, and unless `defaults` without those that
    are ADDED_LATER and have their default."""
    if isinstance(value, StartConfig):
        return value.identity()
    if dataclasses.is_dataclass(value):
        entries = [(f, getattr(value, f.name)) for f in dataclasses.fields(value)]
        entries = [(f, entry) for f, entry in entries if not (isinstance(entry, StartConfig) and entry.same_run)]
        kept = [(f, entry) for f, entry in entries if identifies(f, entry, defaults=defaults)]
        return {f.name: _identity(entry, defaults=defaults) for f, entry in kept}
    return value


def changes(recorded: Any, run: RunConfig) -> list[str]:
    """What the configuration of config.yaml and that of `run` say differently about what the run computes, such as
    "optimizer.lr was 0.01 and is 0.003". A key that config.yaml lacks, because it was added later, had its default."""
    then = dict(recorded) if isinstance(recorded, dict) else {}
    if isinstance(start := then.get("start"), dict) and isinstance(start.get("run"), str):
        then["start"] = start | {"run": Path(start["run"]).name}
    was, now, differing = map(_by_key, (then, _identity(run, defaults=True), _identity(run)))
    is_other = {key: key in was and was[key] != now[key] for key in now if not key.startswith("start.")}
    is_other |= {key: was.get(key, {}) != value for key, value in differing.items()}  # {}: a section without such a key
    return [
        f"{key} was {repr(was[key]) if key in was else 'not set'} and is {(now | differing)[key]!r}"
        for key, found in is_other.items()
        if found
    ]


def _by_key(content: dict[str, Any]) -> dict[str, Any]:
    """A configuration as one level of dotted keys, with all interventions under one key: without an option of one, it
    is not there."""
    rest = {key: value for key, value in content.items() if key != "interventions"}
    return _flat(rest) | {"interventions": content.get("interventions") or {}}


def flatten(run: RunConfig) -> dict[str, Any]:
    """The configuration as one level of dotted keys, for the result row: {"model.d_model": 64, ...}."""
    return _flat(dataclasses.asdict(run))


def _flat(content: dict[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, dict) and value:
            for key, entry in value.items():
                walk(f"{prefix}.{key}" if prefix else key, entry)
        else:
            flat[prefix] = value

    walk("", content)
    return flat


def with_later_keys(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row, or a configuration of a plan, with the keys that the version which wrote it did not have yet. A run of
    that version is a run with their defaults, and has the same run_id."""
    names = (str(row.get(f"{group}.name")) if len(kinds) > 1 else next(iter(kinds)) for group, kinds in GROUPS.items())
    found = dict(_later_defaults(tuple(names)))
    for mapping in [name for name, default in found.items() if default == {}]:
        if any(name.startswith(f"{mapping}.") for name in row):  # it has entries, each of which is a key
            del found[mapping]
    return {**found, **row}


@functools.cache
def _later_defaults(kinds: tuple[str, ...]) -> dict[str, Any]:
    """Dotted key -> its default, for the keys that are ADDED_LATER and whose default is not null. kinds: those of the
    groups. The name of data is that of its folder and may be no kind; then the keys that all sources have count."""
    chosen, found = dict(zip(GROUPS, kinds, strict=True)), {}
    for section in dataclasses.fields(RunConfig):
        name = section.name
        of_unknown = Source if name == "data" else None
        cls = GROUPS[name].get(chosen[name], of_unknown) if name in GROUPS else section.default_factory
        if section.metadata.get("identity") == ADDED_LATER:
            default = default_of(section)
            found[name] = dataclasses.asdict(default) if is_dataclass(section.default_factory) else default
        elif is_dataclass(cls):
            later = [field for field in dataclasses.fields(cls) if field.metadata.get("identity") == ADDED_LATER]
            found[name] = {field.name: default_of(field) for field in later}
    return {key: value for key, value in _flat(found).items() if "." in key and value is not None}


def outcome_of(folder: Path) -> str | None:
    """How the run in `folder` failed, diverged or was interrupted, from its result.json; None where it finished or has
    no row."""
    said = {"failed": "failed", "diverged": "diverged", "preempted": "was interrupted"}
    said |= {"hopeless": "was stopped as hopeless"}
    with contextlib.suppress(UserError, LookupError, TypeError):
        row = read_json(folder / "result.json")
        return f"the run {said[row['status']]}: {row['error']}"
    return None
