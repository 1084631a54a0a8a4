"""Whether and how torch.compile compiles the model of a run.

Each block is compiled for itself. Blocks of the same shape share their code, so the number of layers does not change
how long the compiler works. The hooks of DDP and FSDP act between blocks, so gradients are exchanged while earlier
blocks still compute theirs.

PyTorch keeps compiled code on the disk, for later processes of the same user: in TORCHINDUCTOR_CACHE_DIR, which is
/tmp/torchinductor_USER unless it is set.
"""

import contextlib
import os
import sys
from collections.abc import Iterator

import torch

from scaling_testbed.config.sections import AUTO, ComputeConfig
from scaling_testbed.model.transformer import Transformer

# Types of devices on which `auto` compiles. On a CPU an update of nano_s, nano_l and proxy_2m takes 0.91 to 0.97 of the
# time with compiled blocks. But a process needs 3 CPU-seconds to load them and 26 to compile them, so only runs of
# hundreds to thousands of steps gain (benchmarks/compiled.py). On a GPU nothing is measured yet.
AUTO_COMPILES_ON: frozenset[str] = frozenset()

# How many versions of the code of a block a process may hold. A run needs about three: for training, for evaluation and
# for smaller micro-batches. A process that trains several runs needs more than PyTorch's 8.
MOST_VERSIONS = 64


def choose_compile(config: ComputeConfig, device: torch.device) -> bool:
    """Whether the model of a run on `device` is compiled."""
    return device.type in AUTO_COMPILES_ON if config.compile == AUTO else bool(config.compile)


def compile_blocks(model: Transformer) -> None:
    """Let each block be compiled at its first call. This sets switches of the compiler for the whole process."""
    import torch._dynamo.config
    import torch._inductor.config

    torch._dynamo.config.recompile_limit = MOST_VERSIONS
    torch._dynamo.config.optimize_ddp = False  # it would cut a block where a bucket of gradients ends
    # Without this, the compiler measures versions of a kernel and takes the fastest, which may be another next time.
    asked = os.environ.get("TORCHINDUCTOR_DETERMINISTIC") == "1"
    torch._inductor.config.deterministic = asked or torch.are_deterministic_algorithms_enabled()
    for block in model.blocks:
        # fullgraph: what cannot be compiled is an error. Else it would be slow, and nobody would know.
        block.compile(fullgraph=True, dynamic=False)


@contextlib.contextmanager
def uncompiled(model: Transformer) -> Iterator[None]:
    """Context in which the blocks are not compiled. Compiled blocks would ignore hooks on the modules in them, or be
    compiled again."""
    compiled = [block._compiled_call_impl for block in model.blocks]
    try:
        for block in model.blocks:
            block._compiled_call_impl = None
        yield
    finally:
        for block, call in zip(model.blocks, compiled, strict=True):
            block._compiled_call_impl = call


def is_compile_error(error: BaseException) -> bool:
    """Whether torch.compile raised `error`."""
    errors = sys.modules.get("torch._dynamo.exc")  # not loaded: nothing was compiled
    return errors is not None and isinstance(error, (errors.TorchDynamoException, errors.FailOnRecompileLimitHit))
