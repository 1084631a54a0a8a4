"""The sections of a run's configuration that have one kind each: batch, evaluation, checkpoints, device, processes,
logging. Free of torch."""

from dataclasses import dataclass, field

from scaling_testbed.errors import ConfigError, check_choice, check_positive
from scaling_testbed.keys import EXECUTION_ONLY


@dataclass(frozen=True, kw_only=True)
class BatchConfig:
    """sequences: the global batch, whatever the number of devices. sequence_length: tokens per sequence.

    micro_batch_sequences: sequences per forward and backward pass; gradients are accumulated over the rest. None: all.
    """

    sequences: int = 32
    sequence_length: int = 128
    micro_batch_sequences: int | None = field(default=None, metadata=EXECUTION_ONLY)

    def __post_init__(self):
        for key in ("sequences", "sequence_length", "micro_batch_sequences"):
            check_positive(key, getattr(self, key))

    @property
    def tokens(self) -> int:
        """Tokens per step."""
        return self.sequences * self.sequence_length


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Validation on the same `tokens` tokens of each set, spread evenly over it; always at step 0 and at the end.

    every_steps: also every so many steps; 0: never in between. sets: name -> folder of another prepared corpus whose
    validation split is scored too. rows: sequences per forward pass; None: the micro-batch.
    """

    every_steps: int = 200
    tokens: float = 131072
    sets: dict[str, str] = field(default_factory=dict)
    rows: int | None = field(default=None, metadata=EXECUTION_ONLY)

    def __post_init__(self):
        if self.every_steps < 0:
            raise ConfigError(f"every_steps must not be negative; got {self.every_steps}")
        check_positive("tokens", self.tokens)
        check_positive("rows", self.rows)


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """every_steps: 0: only at the end and on a signal. at_end: whether the last step is saved too; a run that only
    wants its row can do without. keep_last: how many stay; keep_steps: steps that always stay (and are saved even
    between the regular ones)."""

    every_steps: int = field(default=500, metadata=EXECUTION_ONLY)
    at_end: bool = field(default=True, metadata=EXECUTION_ONLY)
    keep_last: int = field(default=2, metadata=EXECUTION_ONLY)
    keep_steps: list[int] = field(default_factory=list, metadata=EXECUTION_ONLY)

    def __post_init__(self):
        if self.every_steps < 0:
            raise ConfigError(f"every_steps must not be negative; got {self.every_steps}")
        check_positive("keep_last", self.keep_last)


@dataclass(frozen=True, kw_only=True)
class ComputeConfig:
    """device: auto (cuda, then cpu) | cpu | cuda | mps.

    precision: auto (bf16 on cuda, fp32 elsewhere) | fp32 | bf16 (autocast: matrix products in bf16; parameters,
    residual stream and optimizer stay fp32). compile: torch.compile. deterministic: refuse non-deterministic kernels.
    threads: CPU threads; None: PyTorch's choice. The number of threads can change the last bits of a result.
    """

    device: str = field(default="auto", metadata=EXECUTION_ONLY)
    precision: str = "auto"
    compile: bool = field(default=False, metadata=EXECUTION_ONLY)
    deterministic: bool = field(default=False, metadata=EXECUTION_ONLY)
    threads: int | None = field(default=None, metadata=EXECUTION_ONLY)

    def __post_init__(self):
        check_choice("device", self.device, ("auto", "cpu", "cuda", "mps"))
        check_choice("precision", self.precision, ("auto", "fp32", "bf16"))
        check_positive("threads", self.threads)

    @property
    def precision_on_gpu(self) -> str:
        """What `precision` means on a GPU that has bf16."""
        return "bf16" if self.precision == "auto" else self.precision


@dataclass(frozen=True, kw_only=True)
class ParallelismConfig:
    """How one run is spread over the processes that torchrun or srun started; it changes nothing but rounding.

    kind: single (one process) | ddp (each holds the whole model) | fsdp (each holds a part of every parameter, gradient
    and moment). shard_size: for fsdp, how many ranks share one copy (inside a machine, say); None: all of them.
    activation_checkpointing: k: the activations of every k-th block are computed again in the backward pass, 1: of
    every block; None: all are kept. timeout_seconds: how long a rank waits for the others before it gives up.
    """

    kind: str = field(default="single", metadata=EXECUTION_ONLY)
    shard_size: int | None = field(default=None, metadata=EXECUTION_ONLY)
    activation_checkpointing: int | None = field(default=None, metadata=EXECUTION_ONLY)
    timeout_seconds: float = field(default=600, metadata=EXECUTION_ONLY)

    def __post_init__(self):
        check_choice("kind", self.kind, ("single", "ddp", "fsdp"))
        for key in ("shard_size", "activation_checkpointing", "timeout_seconds"):
            check_positive(key, getattr(self, key))
        if self.shard_size is not None and not self.is_sharded:
            raise ConfigError(f"shard_size must be null for parallelism={self.kind}; only fsdp shards")

    @property
    def is_sharded(self) -> bool:
        """Whether each process holds a part of every parameter."""
        return self.kind == "fsdp"


@dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    """metrics.jsonl is always written, one line every `every_steps` steps; Weights & Biases can mirror it.

    line_every_steps: steps between printed lines where there is no terminal for a progress bar.
    wandb_mode: auto (online when a key is found, else offline) | online | offline.
    """

    name: str = "jsonl"
    every_steps: int = 10
    line_every_steps: int = 100
    wandb: bool = False
    wandb_mode: str = "auto"
    project: str = "scaling-testbed"
    entity: str | None = None
    group: str | None = None

    def __post_init__(self):
        check_positive("every_steps", self.every_steps)
        check_positive("line_every_steps", self.line_every_steps)
        check_choice("wandb_mode", self.wandb_mode, ("auto", "online", "offline"))
