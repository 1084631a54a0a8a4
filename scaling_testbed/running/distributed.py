"""Which of how many processes this is. One for now: everything that will differ by rank asks here."""

import os
from dataclasses import dataclass

from scaling_testbed.errors import ConfigError


@dataclass(frozen=True)
class World:
    """rank of size processes; local_rank counts within the machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0


def world_from_environment() -> World:
    """The world torchrun set up, or one process. Raises ConfigError for more than one, which a run cannot use yet."""
    environment = {key: int(os.environ.get(key, default)) for key, default in _DEFAULTS.items()}
    world = World(environment["RANK"], environment["WORLD_SIZE"], environment["LOCAL_RANK"])
    if world.size > 1:
        raise ConfigError(
            f"torchrun started {world.size} processes, but a run uses one device so far; use --nproc-per-node=1"
        )
    return world


_DEFAULTS = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0}
