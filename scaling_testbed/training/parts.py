"""The parts of a run, built once from its configuration."""

import dataclasses
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from scaling_testbed.config.compute import steps_of, training_flops
from scaling_testbed.config.memory import largest_micro_batch, rows_of_evaluation
from scaling_testbed.config.run import RunConfig, interventions_of
from scaling_testbed.data.batches import TrainingBatches, ValidationBatches
from scaling_testbed.data.cutting import DOCUMENTS
from scaling_testbed.data.preparing.preparation import prepare
from scaling_testbed.data.shards import PreparedData, open_prepared
from scaling_testbed.errors import ConfigError, listed
from scaling_testbed.evaluation.scoring import Questions
from scaling_testbed.learning.averaging import Averages
from scaling_testbed.learning.config import CrossEntropyConfig
from scaling_testbed.learning.interventions.base import Context, Intervention
from scaling_testbed.learning.loss import choose_loss_impl
from scaling_testbed.learning.loss_model import LossModel
from scaling_testbed.learning.objectives import Built
from scaling_testbed.learning.optimizers import create_state, leave_out_where
from scaling_testbed.model.attention import check_impls
from scaling_testbed.model.config import ModelConfig
from scaling_testbed.model.counting import ParamCounts, count_params
from scaling_testbed.model.transformer import Transformer
from scaling_testbed.processes.compilation import choose_compile, compile_blocks
from scaling_testbed.processes.device import (
    choose_device,
    choose_precision,
    configure_torch,
    free_memory_bytes,
    peak_flops,
)
from scaling_testbed.processes.group import Processes
from scaling_testbed.processes.placement import Replica, parallelize
from scaling_testbed.processes.world import World
from scaling_testbed.progress import Clock
from scaling_testbed.runs.folder import RunFolder
from scaling_testbed.runs.identity import recorded
from scaling_testbed.training.data import (
    MAIN_SET,
    open_questions,
    open_sets,
    open_training_batches,
    open_validation_sets,
    read_task_files,
)
from scaling_testbed.training.length import Length
from scaling_testbed.training.measurement import Measurement
from scaling_testbed.training.mixing import Mixing, open_mixing
from scaling_testbed.training.surroundings import surroundings

# Type of device -> Parts.ahead where the optimizer can leave out bad updates. A GPU then always has an update to work
# on. A CPU has nothing to wait for.
AHEAD = {"cuda": 2}
_VARY = "{} gives each step another number of targets, by which its loss is divided"


@dataclass(frozen=True, kw_only=True)
class Parts:
    """The parts of one run on one of its processes. Weights, moments and states of interventions change during
    training; the parts stay the same.

    precision: fp32 | bf16. loss: with its `impl` chosen. objective: at work. prepared: the corpora by the name of the
    validation set that they give, the run's own first. validation_sets: in the same order. questions: of
    evaluation.tasks. length: in steps. micro_batch: sequences in a pass of this process, as chosen at this start.
    compiled: whether the blocks of the model are compiled. model: the plain module. placed: the same model on its
    devices. interventions: by name, in the order in which a step runs them. averages: of the weights. mixing: the
    weights of sources that follow from losses; None without data.online. ahead: how many further updates may be made
    before the values of one are read. bad: 1.0 on the device from the first update on whose loss or gradient norm is
    not finite, else 0.0; None: the values of each update are read before the optimizer's step. captures: whether an
    update is one CUDA graph.
    """

    run: RunConfig
    folder: RunFolder
    processes: Processes
    device: torch.device
    precision: str
    loss: CrossEntropyConfig
    objective: Built
    prepared: dict[str, PreparedData]
    batches: TrainingBatches
    validation_sets: dict[str, ValidationBatches]
    questions: Questions
    counts: ParamCounts
    length: Length
    micro_batch: int
    compiled: bool
    model: Transformer
    placed: Replica
    optimizer: torch.optim.Optimizer
    interventions: dict[str, Intervention]
    averages: Averages
    mixing: Mixing | None
    measurement: Measurement
    ahead: int = 0
    bad: torch.Tensor | None = None
    captures: bool = False

    @property
    def steps(self) -> int:
        """Those of the whole run; with budget.hours an upper limit until the clock has chosen them."""
        return self.length.steps

    def evaluate_as(self, micro_batch: int) -> None:
        """Let evaluations take as many sequences at a time as evaluation.rows means with this micro-batch, which the
        run chose."""
        config = self.model.config
        rows = rows_of_evaluation(self.run, config, self.precision, self.device.type, micro_batch)
        for batches in self.validation_sets.values():
            batches.rows = rows

    @property
    def data(self) -> PreparedData:
        """The corpus that the run is trained on."""
        return self.prepared[MAIN_SET]

    def flops(self, made: int) -> float:
        """FLOPs of the first `made` updates, including interventions."""
        return training_flops(self.run, self.model.config, self.steps, made)

    def n_tokens(self, made: int) -> int:
        """The tokens of the batches of the first `made` updates: all their positions without padding, targets of the
        loss or not."""
        return sum(self.batches.tokens_by_source(0, made).values())

    def tokens_per_second(self, clock: Clock, made: int) -> float | None:
        """Mean tokens per second of `clock` after `made` updates, which had as many tokens each as all have on average;
        None where it is not known."""
        return clock.tokens_per_second(self.n_tokens(made) / made if made else self.run.batch.tokens)

    def mfu(self, made: int, tokens_per_second: float | None) -> float | None:
        """Model FLOPs utilisation at this rate, with the mean FLOPs of a token in the first `made` updates; None where
        the rate or the peak of the device is not known."""
        if not tokens_per_second or not (peak := peak_flops(self.device, self.precision)):
            return None
        flops_per_token = self.flops(made) / self.n_tokens(made)
        return tokens_per_second * flops_per_token / (peak * self.processes.world.size)

    def recorded(self) -> dict[str, Any]:
        """What a row and a checkpoint record of the data."""
        tasks = {task.name: task.sha256 for task in self.questions.tasks}
        teacher = None if self.objective.teacher is None else dict(self.objective.teacher)
        return {**recorded(self.run, self.data, self.prepared, tasks), "teacher": teacher}

    @functools.cached_property
    def parameters(self) -> list[torch.nn.Parameter]:
        """Those of the model; to list them takes time, and they stay the same."""
        return list(self.model.parameters())


def build_parts(run: RunConfig, folder: RunFolder, processes: Processes, *, quiet: bool = False) -> Parts:
    """Choose the device and the paths, prepare the data, make the process group, and build the model and its optimizer.

    Every rank calls this. Raises UserError for an error that the user can correct. A run that is not possible is
    refused before data is prepared.
    """
    configure_torch(run.compute)
    device, precision, loss = processes.together(lambda: _choose_paths(run, processes.world.local_rank))
    files = processes.together(lambda: read_task_files(run))
    # Rank 0 prepares, which may take hours. The others wait for it.
    prepared = Path(processes.on_main(lambda: str(_prepare(run, quiet)), at_once=True))
    sets = processes.together(lambda: open_sets(run, open_prepared(prepared)))
    questions = processes.together(lambda: open_questions(run, files, sets[MAIN_SET]))
    # Machines without a common file system can have other data under the same path.
    alike = {f"the fingerprint of {found.folder}": found.fingerprint for found in sets.values()}
    processes.check_alike(alike | {f"the sha256 of {task.path}": task.sha256 for task in questions.tasks})
    config = run.model.resolved(sets[MAIN_SET].vocab_size)
    counts = count_params(config)
    # Rank 0 decides, because free memory differs a little between processes.
    micro_batch = processes.on_main(lambda: _micro_batch(run, config, counts, precision, device, processes.world))
    rows = _rows_of_evaluation(run, config, precision, device, micro_batch)
    batches, validation_sets = processes.together(
        lambda: (open_training_batches(run, sets[MAIN_SET]), open_validation_sets(run, sets, rows))
    )
    around = surroundings(run, folder, processes, sets[MAIN_SET], batches, (config, loss, device, precision))
    objective = run.objective.build(around)
    if objective.teacher is not None:
        processes.check_alike({"the sha256 of the teacher's weights": objective.teacher["weights_sha256"]})
    batches.lay_beside(objective.beside)
    if run.compute.cuda_graph is True and (reason := batches.why_targets_vary):
        raise ConfigError(f"compute.cuda_graph=true cannot be: {_VARY.format(reason)}; use compute.cuda_graph=auto")
    mixing = processes.together(lambda: open_mixing(run, sets[MAIN_SET], batches))
    processes.connect(device)

    steps = steps_of(run, config)
    where = torch.device("meta") if run.parallelism.is_sharded else device
    model = Transformer(config, run.parametrization, device=where, run_on=device)
    _check_counts(run, counts, model)
    model.recompute_every = run.parallelism.activation_checkpointing
    model.narrow_residual = run.compute.residual_dtype == "bf16"
    placed = parallelize(LossModel(model, loss, objective.terms), run.parallelism, device, precision, run.seed)
    optimizer = run.optimizer.for_length(run.schedule.length(steps)).build(model)
    create_state(run.optimizer, optimizer)
    interventions = interventions_of(run)
    for intervention in interventions.values():
        intervention.attach(Context(model=model, optimizer=optimizer, sum=processes.sum, largest=processes.largest))
    ahead, bad = 0, None
    # An intervention looks at the values of an update before the next one is made.
    if device.type in AHEAD and not interventions:
        flag = torch.zeros((), device=device)
        if leave_out_where(optimizer, flag):
            ahead, bad = AHEAD[device.type], flag
    measurement = Measurement(run.diagnostics, run.parallelism, placed, processes, device, precision)
    if compiled := choose_compile(run.compute, device):
        compile_blocks(model)
    return Parts(
        run=run,
        folder=folder,
        processes=processes,
        device=device,
        precision=precision,
        loss=loss,
        objective=objective,
        prepared=sets,
        batches=batches,
        validation_sets=validation_sets,
        questions=questions,
        counts=counts,
        length=Length(run, steps),
        micro_batch=micro_batch,
        compiled=compiled,
        model=model,
        placed=placed,
        optimizer=optimizer,
        interventions=interventions,
        averages=Averages(run.averaging, dict(model.named_parameters())),
        mixing=mixing,
        measurement=measurement,
        ahead=ahead,
        bad=bad,
        captures=run.compute.cuda_graph is True,
    )


def why_no_graph(run: RunConfig, device: torch.device) -> str | None:
    """Why an update of `run` cannot be captured in a CUDA graph; None if it can."""
    if device.type not in AHEAD:
        return f"the device is {device.type}"
    if run.parallelism.kind != "single":
        return f"parallelism={run.parallelism.kind} exchanges gradients in a step"
    if interventions := sorted(interventions_of(run)):
        return f"{listed(interventions)} needs the host in a step"
    if run.batch.packing == DOCUMENTS:
        return _VARY.format(f"batch.packing={DOCUMENTS}")
    if not run.optimizer.can_be_captured:
        return f"optimizer={run.optimizer.name} has no fused step here, and only AdamW's fused step can be captured"
    return None


def _check_counts(run: RunConfig, counts: ParamCounts, model: Transformer) -> None:
    """Raise ConfigError if the number of parameters is not the one that the facts of the model's parts give. Plan,
    budget, FLOPs and row would then describe another model."""
    there = sum(parameter.numel() for parameter in model.parameters())
    if there != counts.n_params:
        raise ConfigError(
            f"model={run.model.name} has {there:,} parameters, but the facts of its parts give {counts.n_params:,}; "
            "correct the facts of the part that the plug-in registers, such as gains or roles (model/parts.py)"
        )


def _choose_paths(run: RunConfig, local_rank: int) -> tuple[torch.device, str, CrossEntropyConfig]:
    """The device, precision and loss of the run. `auto` is resolved once, and the row records the result."""
    device = choose_device(run.compute, local_rank)
    precision = choose_precision(run.compute, device)
    if run.compute.residual_dtype == "bf16" and precision != "bf16":
        raise ConfigError(
            f"compute.residual_dtype=bf16 needs compute.precision=bf16, and auto means {precision} on {device.type}; "
            "type compute.precision=bf16 too"
        )
    if run.compute.cuda_graph is True and (reason := why_no_graph(run, device)):
        raise ConfigError(f"compute.cuda_graph=true cannot be: {reason}; use compute.cuda_graph=auto")
    loss = dataclasses.replace(run.loss, impl=choose_loss_impl(run.loss, device))
    check_impls(run.model, device)
    return device, precision, loss


def _prepare(run: RunConfig, quiet: bool) -> Path:
    return prepare(run.data, run.tokenizer, data_dir=Path(run.data_dir), workers=run.data_workers, quiet=quiet)


def _rows_of_evaluation(
    run: RunConfig, model: ModelConfig, precision: str, device: torch.device, micro_batch: int
) -> int:
    rows = micro_batch if run.batch.is_auto else run.batch.micro_batch or run.batch.sequences
    return rows_of_evaluation(run, model, precision, device.type, rows)


def _micro_batch(
    run: RunConfig, model: ModelConfig, counts: ParamCounts, precision: str, device: torch.device, world: World
) -> int:
    """Sequences in a forward and backward pass of each process."""
    here = run.batch.sequences // world.size
    if not run.batch.is_auto:
        return min(run.batch.micro_batch or here, here)
    free = free_memory_bytes(device, world.size_here)
    if free is None:
        return here  # an error of memory makes it smaller
    return largest_micro_batch(run, model, counts.n_params, precision, world.size, free, device.type)
