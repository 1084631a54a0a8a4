"""The configuration of one run, as frozen dataclasses; no Hydra here.

Every default lives in a dataclass; the files in configs/ say only what deviates.
"""

import contextlib
import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scaling_testbed.config.budget import BudgetConfig
from scaling_testbed.config.sections import (
    BatchConfig,
    CheckpointConfig,
    ComputeConfig,
    EvaluationConfig,
    LoggingConfig,
    ParallelismConfig,
)
from scaling_testbed.data.sources import SOURCES
from scaling_testbed.data.tokenizers import TOKENIZERS
from scaling_testbed.diagnostics.config import DiagnosticsConfig
from scaling_testbed.errors import ConfigError, check_positive
from scaling_testbed.keys import ADDED_LATER, EXECUTION_ONLY
from scaling_testbed.learning.config import CrossEntropyConfig
from scaling_testbed.learning.interventions.base import Intervention
from scaling_testbed.learning.interventions.chosen import choose_interventions
from scaling_testbed.learning.optimizers import OPTIMIZERS, rate_meaning
from scaling_testbed.learning.schedules import SCHEDULES
from scaling_testbed.model import counting
from scaling_testbed.model.config import ModelConfig, ParametrizationConfig
from scaling_testbed.model.parametrization import check_parametrization
from scaling_testbed.model.parts import LINEARS

# Config group -> the dataclasses a file of that group can fill, by kind; a group of one kind has the key "".
GROUPS = {
    "model": {"": ModelConfig},
    "parametrization": {"": ParametrizationConfig},
    "optimizer": OPTIMIZERS,
    "schedule": SCHEDULES,
    "loss": {"cross_entropy": CrossEntropyConfig},
    "data": SOURCES,
    "tokenizer": TOKENIZERS,
    "diagnostics": {"": DiagnosticsConfig},
    "parallelism": {"": ParallelismConfig},
    "logging": {"": LoggingConfig},
}


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that decides one run. Fields typed Any hold one of the dataclasses of their group in GROUPS.

    name: the folder under runs_dir that this run is filed in. data_dir: where prepared corpora lie.
    data_workers: processes that tokenise; None: the usable cores, at most 16. seed: of the
    initial weights and the order of the data. interventions: name -> arguments of a registered intervention, which
    acts in every step (learning/interventions/base.py). plugins: modules from outside that register what other keys
    name: dotted names, or paths of .py files. configs: folders that are searched for choices of every group, besides
    configs/. overrides: what was typed to get here, for the record.
    """

    name: str = field(default="default", metadata=EXECUTION_ONLY)
    seed: int = 0
    runs_dir: str = field(default="runs", metadata=EXECUTION_ONLY)
    data_dir: str = field(default="data", metadata=EXECUTION_ONLY)
    data_workers: int | None = field(default=None, metadata=EXECUTION_ONLY)
    model: Any = None
    parametrization: Any = None
    optimizer: Any = None
    schedule: Any = None
    loss: Any = None
    interventions: dict[str, Any] = field(default_factory=dict, metadata=ADDED_LATER)
    data: Any = None
    tokenizer: Any = None
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    diagnostics: Any = field(default=None, metadata=EXECUTION_ONLY)
    parallelism: Any = field(default=None, metadata=EXECUTION_ONLY)
    logging: Any = field(default=None, metadata=EXECUTION_ONLY)
    plugins: list[str] = field(default_factory=list, metadata=EXECUTION_ONLY)
    configs: list[str] = field(default_factory=list, metadata=EXECUTION_ONLY)
    overrides: list[str] = field(default_factory=list, metadata=EXECUTION_ONLY)

    def __post_init__(self):
        if not self.name or self.name.startswith((".", "/")) or ".." in self.name.split("/"):
            raise ConfigError(f"name must be a plain folder name; got {self.name!r}")
        check_positive("data_workers", self.data_workers)
        if self.seed < 0:
            raise ConfigError(f"seed must not be negative; got {self.seed}")
        if self.model is not None and self.parametrization is not None:
            check_parametrization(self.parametrization, self.model)
        if self.optimizer is not None and self.model is not None:
            interventions_of(self)
        if self.parallelism is not None and self.parallelism.is_sharded and (found := unshardable(self)):
            key, reason = found
            raise ConfigError(f"{key} cannot be sharded: {reason}; use parallelism=single or parallelism=ddp")
        micro = self.batch.micro_batch_sequences
        if micro is not None and self.batch.sequences % micro:
            raise ConfigError(
                f"batch.micro_batch_sequences must divide batch.sequences={self.batch.sequences}; got {micro}"
            )


def unshardable(run: RunConfig) -> tuple[str, str] | None:
    """The key=value of `run` that parallelism=fsdp has no place for and the reason, or None."""
    if run.optimizer is not None and (reason := run.optimizer.needs_whole_tensors):
        return f"optimizer={run.optimizer.name}", reason
    if run.model is not None and (reason := LINEARS[run.model.linear].needs_whole_tensors):
        return f"model.linear={run.model.linear}", reason
    for name, intervention in interventions_of(run).items():
        if reason := intervention.needs_whole_tensors:
            key = intervention.key
            return (f"interventions.{name}" if key is None else f"{key}={flatten(run)[key]}"), reason
    return None


def rate_means(run: RunConfig) -> str:
    """What one unit of `run`'s learning rate is: two runs of which it differs are never compared in one S."""
    return rate_meaning(run.optimizer, run.model.linear)


def interventions_of(run: RunConfig) -> dict[str, Intervention]:
    """Name -> what acts in the steps of `run`, new objects each time. Raises ConfigError as choose_interventions."""
    if run.optimizer is None or run.model is None:
        return {}
    return choose_interventions(run.optimizer, run.model, run.interventions)


def flops_per_token(run: RunConfig, model: ModelConfig) -> float:
    """FLOPs of training `run` on one token with its resolved `model`: those of the model
    (model.counting.flops_per_token) and those that its interventions add."""
    length = run.batch.sequence_length
    added = sum(found.flops_per_token(model, length) for found in interventions_of(run).values())
    return counting.flops_per_token(model, length) + added


def run_id(run: RunConfig) -> str:
    """The name of a run's folder: a hash of what it computes, without paths, logging and how it is executed."""
    canonical = json.dumps(_identity(run), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:12]


def run_folder_path(run: RunConfig) -> Path:
    """runs_dir/name/run_id: the same command finds its own folder again."""
    return Path(run.runs_dir) / run.name / run_id(run)


def _identity(value: Any) -> Any:
    """`value` as plain data without the fields marked {"identity": False}, or "if_set" and at their default."""
    if dataclasses.is_dataclass(value):
        entries = [(f, getattr(value, f.name)) for f in dataclasses.fields(value)]
        return {f.name: _identity(entry) for f, entry in entries if _counts(f, entry)}
    return value


def _counts(f: dataclasses.Field, entry: Any) -> bool:
    rule = f.metadata.get("identity", True)
    if rule != "if_set":
        return rule
    return entry != (f.default if f.default_factory is dataclasses.MISSING else f.default_factory())


def flatten(run: RunConfig) -> dict[str, Any]:
    """The configuration as one level of dotted keys, for the result row: {"model.d_model": 64, ...}."""
    flat: dict[str, Any] = {}

    def walk(prefix, value):
        if isinstance(value, dict) and value:
            for key, entry in value.items():
                walk(f"{prefix}.{key}" if prefix else key, entry)
        else:
            flat[prefix] = value

    walk("", dataclasses.asdict(run))
    return flat


def outcome_of(folder: Path) -> str | None:
    """How the run in `folder` failed, diverged or was interrupted, from its result.json; None where it finished or has
    no row."""
    said = {"failed": "failed", "diverged": "diverged", "preempted": "was interrupted"}
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
        row = json.loads((folder / "result.json").read_text())
        return f"the run {said[row['status']]}: {row['error']}"
    return None
