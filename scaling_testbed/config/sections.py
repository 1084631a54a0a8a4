"""The sections of a run's configuration that have only one kind: batch, evaluation, checkpoints, device, processes and
logging. Does not import torch."""

import re
from dataclasses import dataclass
from pathlib import Path

from scaling_testbed.data.cutting import PACKINGS, WINDOWS, Cutting
from scaling_testbed.errors import ConfigError, check_positive
from scaling_testbed.keys import ADDED_LATER, EXECUTION_ONLY, check_choices, key

AUTO = "auto"

TASKS_OF_CORPUS = ("continuation", "identifier", "bracket")  # see evaluation/corpus_tasks.py

LARGEST_BATCH = 2**31  # sequences, and tokens of a sequence
_STEPS = re.compile(r"(\d{1,12}):(\d{1,12})")  # of profile_steps


@dataclass(frozen=True, kw_only=True)
class BatchConfig:
    """The batch of a step."""

    sequences: int = key(32, "Sequences in the global batch, for any number of devices.")
    sequence_length: int = key(128, "Tokens in a sequence.")
    micro_batch_sequences: int | str | None = key(
        None,
        "Sequences in one forward and backward pass of a process. Gradients are accumulated until the batch is done, "
        "so this changes the memory, and the result only by rounding. null: all sequences at once. auto: the most that "
        "fit the memory by the estimate; half of them after an error of memory. A run that is continued keeps its "
        "choice, and the row has it.",
        identity=EXECUTION_ONLY,
    )
    packing: str = key(
        WINDOWS,
        "How documents become sequences. windows: the corpus is one text, cut every sequence_length tokens. documents: "
        "whole documents are packed into sequences by best fit, and only longer ones are split; positions that stay "
        "free are padding, which carries no loss and counts no tokens.",
        identity=ADDED_LATER,
        choices=PACKINGS,
    )
    document_masking: bool = key(
        False,
        "Whether the documents of a sequence are told apart: a token attends to its own document alone, and positions "
        "count from the start of the document in the sequence. The corpus needs EOS tokens.",
        identity=ADDED_LATER,
    )

    def __post_init__(self) -> None:
        check_choices(self)
        for name in ("sequences", "sequence_length"):
            check_positive(name, getattr(self, name))
            if getattr(self, name) > LARGEST_BATCH:
                raise ConfigError(f"{name} must be at most {LARGEST_BATCH:,}; got {getattr(self, name):,}")
        if isinstance(self.micro_batch_sequences, str):
            if self.micro_batch_sequences != AUTO:
                raise ConfigError(
                    f"micro_batch_sequences must be a number, auto or null; got {self.micro_batch_sequences!r}"
                )
        else:
            check_positive("micro_batch_sequences", self.micro_batch_sequences)

    @property
    def is_auto(self) -> bool:
        """Whether the run chooses its micro-batch by itself."""
        return self.micro_batch_sequences == AUTO

    @property
    def micro_batch(self) -> int | None:
        """The micro-batch that is set, in sequences of a process; None if all sequences are taken at once, or if the
        run chooses."""
        return None if isinstance(self.micro_batch_sequences, str) else self.micro_batch_sequences

    @property
    def tokens(self) -> int:
        """Positions of a step, which are its tokens unless some are padding."""
        return self.sequences * self.sequence_length

    @property
    def cutting(self) -> Cutting:
        """How a corpus is cut into the sequences of batches."""
        return Cutting(packing=self.packing, document_masking=self.document_masking)


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """When the validation loss is computed, and on which data. It is always computed at step 0 and at the end. Tasks
    are always scored at the end."""

    every_steps: int = key(200, "Steps between two validations. 0: only at step 0 and at the end.")
    tokens: float = key(
        131072,
        "Validation tokens of each set. They are the same at every evaluation, and spread evenly over the validation "
        "split.",
    )
    sets: dict[str, str] = key(
        {},
        "Further validation sets: a name, and the folder of a prepared corpus. Type +evaluation.sets.NAME=FOLDER. The "
        "corpus must have the tokenizer of the run.",
    )
    rows: int | str | None = key(
        None,
        "Sequences in one forward pass of an evaluation. null: as in a micro-batch. auto: as many as fit the memory of "
        "a pass of training by the estimate, on a CPU at most 8,192 tokens. Another number changes the loss only by "
        "rounding. On a CPU nano models are evaluated fastest with 4,096 to 8,192 tokens in a pass.",
        identity=EXECUTION_ONLY,
    )
    ce_scaled: bool = key(
        False,
        "Whether each validation also computes ce_scaled, the cross-entropy after one temperature that is fitted on "
        "every other window, of the windows between. An objective that is no cross-entropy has it in any case. It "
        "takes another pass over the validation tokens.",
        identity=ADDED_LATER,
    )
    tasks: list[str] = key(
        [],
        "Multiple-choice tasks that the weights are scored on, the final ones for the errors in the row. An entry is a "
        "file as `analyze score` reads it (.jsonl), or continuation, identifier or bracket: a task of this kind is "
        "then made of the validation split of the run's corpus.",
        identity=ADDED_LATER,
    )
    tasks_every_steps: int = key(
        0,
        "Steps between two scorings of the tasks, from step 0 on. 0: at the end only. metrics.jsonl has the errors of "
        "each scoring.",
        identity=ADDED_LATER,
    )
    task_questions: int = key(
        400, "Questions of each task that is made of the corpus, as in `analyze tasks`.", identity=ADDED_LATER
    )
    task_seed: int = key(
        0, "The seed of these questions. Runs with other seeds have the same ones.", identity=ADDED_LATER
    )

    def __post_init__(self) -> None:
        if self.every_steps < 0:
            raise ConfigError(f"every_steps must not be negative; got {self.every_steps}")
        if self.tasks_every_steps < 0:
            raise ConfigError(f"tasks_every_steps must not be negative; got {self.tasks_every_steps}")
        if self.tasks_every_steps and not self.tasks:
            raise ConfigError(
                f"tasks_every_steps={self.tasks_every_steps} has no tasks to score; name some in evaluation.tasks"
            )
        check_positive("tokens", self.tokens)
        if not isinstance(self.rows, str):
            check_positive("rows", self.rows)
        elif self.rows != AUTO:
            raise ConfigError(f"rows must be a number, auto or null; got {self.rows!r}")
        check_positive("task_questions", self.task_questions)
        if self.task_seed < 0:
            raise ConfigError(f"task_seed must not be negative; got {self.task_seed}")
        if odd := [task for task in self.tasks if task not in TASKS_OF_CORPUS and Path(task).suffix != ".jsonl"]:
            raise ConfigError(f"tasks must be files (.jsonl) or {', '.join(TASKS_OF_CORPUS)}; got {odd[0]!r}")
        names = [Path(task).stem for task in self.tasks]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ConfigError(f"tasks: two are named {twice[0]}; a file's stem is its name, so rename one of them")
        if odd := [name for name in names if "." in name]:  # columns with a point are keys of the configuration
            raise ConfigError(f"tasks: the name {odd[0]} has a point; rename the file")

    @property
    def task_files(self) -> list[Path]:
        """The tasks that are files."""
        return [Path(task) for task in self.tasks if task not in TASKS_OF_CORPUS]


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When a checkpoint is saved, and how long it is kept."""

    every_steps: int = key(
        500, "Steps between two checkpoints. 0: only at the end and if a signal stops the run.", identity=EXECUTION_ONLY
    )
    at_end: bool = key(
        True,
        "Whether a checkpoint of the last step is saved. A finished run is not continued, so its checkpoint is not "
        "needed where only its row is used.",
        identity=EXECUTION_ONLY,
    )
    asynchronous: bool = key(
        False,
        "Whether a thread writes a checkpoint beside training, from a copy of the state in host memory. Not with "
        "parallelism=fsdp.",
        identity=EXECUTION_ONLY,
    )
    keep_last: int = key(2, "How many of the newest checkpoints are kept.", identity=EXECUTION_ONLY)
    keep_steps: list[int] = key(
        [],
        "Steps whose checkpoint is always kept. They are saved even where every_steps does not save them.",
        identity=EXECUTION_ONLY,
    )

    def __post_init__(self) -> None:
        if self.every_steps < 0:
            raise ConfigError(f"every_steps must not be negative; got {self.every_steps}")
        check_positive("keep_last", self.keep_last)


@dataclass(frozen=True, kw_only=True)
class ComputeConfig:
    """Where and in which precision a run is computed."""

    device: str = key(
        "auto",
        "auto: a CUDA GPU where there is one, else the CPU.",
        identity=EXECUTION_ONLY,
        choices=("auto", "cpu", "cuda", "mps"),
    )
    precision: str = key(
        "auto",
        "bf16: autocast, which computes matrix products in bf16; parameters, optimizer and residual stream (unless "
        "residual_dtype=bf16) stay in fp32. auto: bf16 on a CUDA GPU, fp32 elsewhere.",
        choices=("auto", "fp32", "bf16"),
    )
    residual_dtype: str = key(
        "fp32",
        "The type of the residual stream, and of its gradient. bf16: what the embedding and each branch leave in the "
        "stream is rounded to bf16, and norms are computed in fp32. It needs precision=bf16.",
        identity=ADDED_LATER,
        choices=("fp32", "bf16"),
    )
    gpu_memory_gib: float | None = key(
        None,
        "The memory of a GPU in GiB that plans and dry runs compare with their estimate. null: that of the GPU here, "
        "and 80 for a cluster or where there is no GPU. It changes nothing in a run.",
        identity=EXECUTION_ONLY,
    )
    compile: bool | str = key(
        AUTO,
        "Whether the blocks of the model are compiled by torch.compile, which changes the last bits of a result. auto: "
        "not, because on a CPU it pays only in long runs, and on a GPU it is not yet measured.",
        identity=EXECUTION_ONLY,
    )
    cuda_graph: bool | str = key(
        AUTO,
        "Whether a step is one CUDA graph after the first steps, so that the host does not launch its kernels one by "
        "one. true is refused where a step cannot be captured. auto: false, because it has not been measured on a GPU. "
        "The row says what was used.",
        identity=EXECUTION_ONLY,
    )
    profile_steps: str | None = key(
        None,
        "Steps that torch.profiler traces, as A:B: those after step A, up to step B. The folder of the run then has a "
        "trace for Perfetto and a table of operators. The losses stay the same to the bit; these steps take longer.",
        identity=EXECUTION_ONLY,
    )
    deterministic: bool = key(
        False,
        "Whether a run on a GPU ends in the same bits each time: an operation without a deterministic kernel is an "
        "error, and PyTorch's attention takes its flash kernel, or the plain one where that has no kernel.",
        identity=EXECUTION_ONLY,
    )
    threads: int | None = key(
        None,
        "CPU threads. null: PyTorch's choice. The number of threads can change the last bits of a result.",
        identity=EXECUTION_ONLY,
    )

    def __post_init__(self) -> None:
        check_choices(self)
        for name in ("compile", "cuda_graph"):
            if (value := getattr(self, name)) not in (True, False, AUTO):
                raise ConfigError(f"{name} must be true, false or auto; got {value!r}")
        if self.residual_dtype == "bf16" and self.precision == "fp32":
            raise ConfigError("residual_dtype must be fp32 with precision=fp32; got bf16")
        if self.profile_steps is not None:
            if not (found := _STEPS.fullmatch(self.profile_steps)) or int(found[1]) >= int(found[2]):
                raise ConfigError(
                    "profile_steps must be A:B with A < B, such as 20:25, and in a YAML file in quotes; got "
                    f"{self.profile_steps!r}"
                )
            if self.cuda_graph is True:
                raise ConfigError(
                    "profile_steps cannot be with cuda_graph=true, whose replay hides the operators of a step; use "
                    "compute.cuda_graph=false"
                )
        check_positive("gpu_memory_gib", self.gpu_memory_gib)
        check_positive("threads", self.threads)

    @property
    def steps_to_profile(self) -> tuple[int, int] | None:
        """(A, B) of profile_steps=A:B: the updates with the numbers A to B - 1, from 0. None: no step is profiled."""
        if self.profile_steps is None:
            return None
        begin, _, end = self.profile_steps.partition(":")
        return int(begin), int(end)

    @property
    def precision_on_gpu(self) -> str:
        """The precision on a GPU that has bf16: there `auto` is bf16."""
        return "bf16" if self.precision == "auto" else self.precision


@dataclass(frozen=True, kw_only=True)
class ParallelismConfig:
    """How one run is spread over the processes that torchrun or srun started. It changes only rounding."""

    kind: str = key(
        "single",
        "single: one process. ddp: every process holds the whole model. fsdp: every process holds a part of each "
        "parameter, gradient and moment.",
        identity=EXECUTION_ONLY,
        choices=("single", "ddp", "fsdp"),
    )
    shard_size: int | None = key(
        None,
        "With fsdp, the number of processes that share one copy of the model, for example those of one machine. null: "
        "all of them.",
        identity=EXECUTION_ONLY,
    )
    activation_checkpointing: int | None = key(
        None,
        "k: the activations of every k-th block are computed again in the backward pass; 1: of every block. null: all "
        "activations are kept.",
        identity=EXECUTION_ONLY,
    )
    timeout_seconds: float = key(
        600,
        "How long the others wait for a process that does not go on in a step. Then the run ends, and its row names "
        "the process. It must be longer than the slowest compilation, evaluation or checkpoint of one process.",
        identity=EXECUTION_ONLY,
    )

    def __post_init__(self) -> None:
        check_choices(self)
        for name in ("shard_size", "activation_checkpointing", "timeout_seconds"):
            check_positive(name, getattr(self, name))
        if self.shard_size is not None and not self.is_sharded:
            raise ConfigError(f"shard_size must be null for parallelism={self.kind}; only fsdp shards")

    @property
    def is_sharded(self) -> bool:
        """Whether each process holds a part of every parameter."""
        return self.kind == "fsdp"


@dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    """What a run records while it trains. metrics.jsonl is always written; the mirrors hold the same records for other
    tools."""

    name: str = key("jsonl", "A label; it changes nothing.")
    every_steps: int = key(10, "Steps between two lines of metrics.jsonl.")
    line_every_steps: int = key(100, "Steps between two printed lines, where no terminal shows a progress bar.")
    csv: bool = key(False, "Whether metrics.csv, a table of the metrics, is written too.")
    tensorboard: bool = key(False, "Whether the metrics are written for TensorBoard too.")
    wandb: bool = key(False, "Whether the metrics are sent to Weights & Biases too.")
    wandb_mode: str = key(
        "auto", "auto: online where an API key is found, else offline.", choices=("auto", "online", "offline")
    )
    project: str = key("scaling-testbed", "The project in Weights & Biases.")
    entity: str | None = key(None, "The user or team in Weights & Biases. null: the account's default.")
    group: str | None = key(None, "The group of runs in Weights & Biases. null: the run's `name`.")
    tags: list[str] = key([], "The tags of the run in Weights & Biases.")
    notes: str | None = key(None, "The notes of the run in Weights & Biases.")

    def __post_init__(self) -> None:
        check_positive("every_steps", self.every_steps)
        check_positive("line_every_steps", self.line_every_steps)
        check_choices(self)
