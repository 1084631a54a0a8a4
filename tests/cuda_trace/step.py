"""Train for some steps on the stand-in, and print what one step asks of the GPU.

python -m tests.cuda_trace.step '{"NAME": ["OVERRIDE", ...], ...}'
"""

import contextlib
import gc
import json
import sys
import tempfile
from typing import Any
from unittest import mock

import torch

from benchmarks.traffic import counting
from scaling_testbed.config.compose import compose
from scaling_testbed.model.transformer import Transformer
from scaling_testbed.training import run as training
from tests.cuda_trace import stand_in

SETTLED, COUNTED = 3, 5  # the steps, from 0, whose launches and whose bytes are counted
QUIET = [
    "data=noise",
    "data.n_tokens=1200000",
    "checkpoint.every_steps=0",
    "checkpoint.at_end=false",
    "evaluation.every_steps=0",
    f"budget.steps={COUNTED + 2}",
    "name=trace",
]


def trace(overrides: list[str]) -> dict[str, Any]:
    """What a step of the run with these overrides asks of the GPU."""
    found: dict[str, Any] = {}
    real, number, until_next = training.make_update, 0, contextlib.ExitStack()

    def make_update(parts, *args):
        nonlocal number
        until_next.close()
        tokens, before = parts.run.batch.tokens, stand_in.counts()
        with stand_in.places_of_waits() as places, counting() if number == COUNTED else _nothing() as traffic:
            update = real(parts, *args)
        if number == SETTLED:
            step = stand_in.counts() - before
            found.update(counts=step, launches=stand_in.launches(step), waits=dict(places))
            found["peak_bytes"] = torch.cuda.max_memory_allocated()
            found["waits_between"] = until_next.enter_context(stand_in.places_of_waits())
        if traffic is not None:
            found["bytes_per_token"] = traffic.total.bytes / tokens
            found["flops_per_token"] = traffic.total.flops / tokens
            found["floor_seconds"] = traffic.total.seconds
            found["attention"] = {name: n for name, n in traffic.operators.items() if "attention" in name}
        number += 1
        return update

    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as held:
        held.enter_context(mock.patch.object(training, "make_update", make_update))
        # To draw the weights of large models takes minutes, and their values do not matter here.
        held.enter_context(mock.patch.object(Transformer, "init_weights", lambda model, seed: None))
        held.enter_context(contextlib.redirect_stdout(sys.stderr))
        run = compose([*QUIET, f"runs_dir={folder}/runs", f"data_dir={folder}/data", *overrides])
        row = training.train(run, quiet=True)
    kept = ("status", "attention_impl", "qk_norm_impl", "loss_impl", "precision")
    return found | {name: row[name] for name in kept}


@contextlib.contextmanager
def _nothing():
    yield None


if __name__ == "__main__":
    stand_in.replace_cudnn_attention()
    print(json.dumps({name: trace(overrides) for name, overrides in json.loads(sys.argv[1]).items()}))
