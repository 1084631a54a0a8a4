"""Rank and number of processes, from the variables that torchrun or srun set. Does not import torch."""

import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

from scaling_testbed.errors import ConfigError, UserError

FIRST_PORT, PORTS = 10000, 20000  # below the ports that Linux gives to outgoing connections


@dataclass(frozen=True)
class World:
    """The place of this process among the processes of a run.

    rank: from 0 to size - 1. local_rank: the index of its GPU among those that it sees. address, port: of the store,
    which rank 0 keeps; None if torchrun keeps it.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    address: str | None = None
    port: int | None = None

    @property
    def size_here(self) -> int:
        """The number of its processes on this machine; all of them if the launcher does not say."""
        tasks = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("SLURM_STEP_TASKS_PER_NODE", "").partition("(")[0]
        return min(int(tasks), self.size) if tasks.isdigit() and int(tasks) else self.size

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which holds the run's folder, writes files, and prints."""
        return self.rank == 0


def world_from_environment(environment: Mapping[str, str] = os.environ) -> World:
    """The world of torchrun, or of another launcher that sets the same variables, or of a step of srun with several
    tasks, or of one process.

    Raises UserError if the environment describes only a part of a world.
    """
    if "RANK" in environment or "WORLD_SIZE" in environment:
        return _described_world(environment)
    tasks = environment.get("SLURM_STEP_NUM_TASKS", environment.get("SLURM_NTASKS", "1"))
    # A batch script has SLURM_NTASKS too, but only a step has started so many processes.
    if "SLURM_STEP_ID" in environment and int(tasks) > 1:
        return _slurm_world(environment, int(tasks))
    return World()


def is_main_process(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this process is rank 0 or the only one. It needs no complete environment."""
    slurm = environment.get("SLURM_PROCID", "0") if "SLURM_STEP_ID" in environment else "0"
    return environment.get("RANK", slurm) == "0"


def _described_world(environment: Mapping[str, str]) -> World:
    """The world in RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, as torchrun, Kubeflow or mpirun's
    scripts set them. Only torchrun keeps the store itself."""
    size = _number("WORLD_SIZE", environment, 1)
    needed = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    if size > 1 and (missing := [key for key in needed if not environment.get(key)]):
        raise UserError(f"WORLD_SIZE={size}, but {', '.join(missing)} is not set: start the processes with torchrun")
    rank, local_rank = _number("RANK", environment, 0), _number("LOCAL_RANK", environment, 0)
    if not 0 <= rank < max(1, size):
        raise UserError(f"RANK={rank} must be from 0 to WORLD_SIZE - 1, which is {size - 1}")
    if size <= 1 or environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return World(rank, size, local_rank)
    return World(rank, size, local_rank, environment["MASTER_ADDR"], _typed_port(environment))


def _number(key: str, environment: Mapping[str, str], default: int) -> int:
    try:
        return int(environment.get(key, default))
    except ValueError:
        raise UserError(f"the environment variable {key} must be an integer; got {environment[key]!r}") from None


def _typed_port(environment: Mapping[str, str]) -> int:
    port = _number("MASTER_PORT", environment, 0)
    if not 0 < port < 2**16:
        raise UserError(f"MASTER_PORT={port} must be from 1 to 65535")
    return port


def _slurm_world(environment: Mapping[str, str], size: int) -> World:
    address = environment.get("MASTER_ADDR") or _first_host(environment)
    port = _typed_port(environment) if environment.get("MASTER_PORT") else _port(environment)
    # With --gpus-per-task a process sees only its own GPU, as number 0.
    sees_one_gpu = environment.get("CUDA_VISIBLE_DEVICES", ",").count(",") == 0
    local_rank = 0 if sees_one_gpu else int(environment["SLURM_LOCALID"])
    return World(int(environment["SLURM_PROCID"]), size, local_rank, address, port)


def _port(environment: Mapping[str, str]) -> int:
    """A port that differs between jobs, tasks of an array (each has its own job id) and steps of a job."""
    job, step = int(environment["SLURM_JOB_ID"]), int(environment["SLURM_STEP_ID"])
    return FIRST_PORT + (job + 1009 * step) % PORTS


def _first_host(environment: Mapping[str, str]) -> str:
    """The host of rank 0. For a step on one machine no query is needed."""
    if environment.get("SLURM_STEP_NUM_NODES", environment.get("SLURM_NNODES")) == "1":
        return "127.0.0.1"
    nodes = environment.get("SLURM_STEP_NODELIST") or environment["SLURM_JOB_NODELIST"]
    if "[" not in nodes:
        return nodes.split(",")[0]
    try:
        command = ["scontrol", "show", "hostnames", nodes]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        raise UserError(f"scontrol cannot list the machines of {nodes}; set MASTER_ADDR to the first one") from None


def check_world(world: World, parallelism, sequences: int) -> None:
    """Raise ConfigError if `world` does not fit the ParallelismConfig or a batch of `sequences`."""
    if parallelism.kind == "single" and world.size > 1:
        raise ConfigError(
            f"the run has {world.size} processes, but parallelism=single uses one; add parallelism=ddp or "
            "parallelism=fsdp"
        )
    if sequences % world.size:
        raise ConfigError(f"batch.sequences must be a multiple of the {world.size} processes; got {sequences}")
    if world.size % (parallelism.shard_size or 1):
        raise ConfigError(
            f"parallelism.shard_size must divide the {world.size} processes; got {parallelism.shard_size}"
        )
