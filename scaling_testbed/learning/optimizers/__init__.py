"""The optimizers, one file each. Importing them does not import torch, so that a grid can be planned without torch."""

from scaling_testbed.learning.optimizers.adam_atan2 import AdamAtan2Config
from scaling_testbed.learning.optimizers.adamw import AdamWConfig, StableAdamWConfig
from scaling_testbed.learning.optimizers.base import (
    AS_ADAMW,
    OPTIMIZERS,
    OptimizerConfig,
    Update,
    clip_coefficient,
    clip_divisor,
    create_state,
    kept_where,
    leave_out_where,
    local_part,
    parameter_groups,
    rate_meaning,
    set_lr,
    state_bytes,
    take_back,
)
from scaling_testbed.learning.optimizers.muon import MuonConfig
from scaling_testbed.learning.optimizers.sgd import SGDConfig

__all__ = [
    "AS_ADAMW",
    "OPTIMIZERS",
    "AdamAtan2Config",
    "AdamWConfig",
    "MuonConfig",
    "OptimizerConfig",
    "SGDConfig",
    "StableAdamWConfig",
    "Update",
    "clip_coefficient",
    "clip_divisor",
    "create_state",
    "kept_where",
    "leave_out_where",
    "local_part",
    "parameter_groups",
    "rate_meaning",
    "set_lr",
    "state_bytes",
    "take_back",
]
