"""Train for some steps on the stand-in, and print what one step asks of the GPU.

python -m tests.cuda_trace.step '{"NAME": ["OVERRIDE", ...], ...}'
"""

import contextlib
import gc
import json
import sys
import tempfile
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
import torch._inductor.config
from torch._inductor.graph import GraphLowering

from benchmarks.traffic import counting
from scaling_testbed.config.compose import compose
from scaling_testbed.model.transformer import Transformer
from scaling_testbed.training import run as training
from tests.cuda_trace import stand_in

# The steps, from 0, whose launches and whose bytes are counted. In its first ten steps, DDP waits to measure its times.
SETTLED, TRAFFIC = 12, 14
QUIET = [
    "data=noise",
    "data.n_tokens=1200000",
    "checkpoint.every_steps=0",
    "checkpoint.at_end=false",
    "evaluation.every_steps=0",
    f"budget.steps={TRAFFIC + 2}",
    "name=trace",
]


def trace(overrides: list[str]) -> dict[str, Any]:
    """What a step of the run with these overrides asks of the GPU, from its inputs to those of the next step. Only
    `error` if the run fails."""
    found: dict[str, Any] = {}
    codes: list[str] = []  # of what Inductor has compiled
    real, number, step = training.inputs, 0, contextlib.ExitStack()

    def inputs(parts, *args):
        nonlocal number
        step.close()
        tokens = parts.run.batch.tokens
        if number == SETTLED:
            step.enter_context(counted(found))
        if number == TRAFFIC and parts.run.compute.compile is not True:  # operators are not seen in compiled code
            step.enter_context(traffic(found, tokens))
        number += 1
        return real(parts, *args)

    torch._dynamo.reset()
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as held:
        held.enter_context(mock.patch.object(training, "inputs", inputs))
        # To draw the weights of large models takes minutes, and their values do not matter here.
        held.enter_context(mock.patch.object(Transformer, "init_weights", lambda model, seed: None))
        held.enter_context(contextlib.redirect_stdout(sys.stderr))
        held.enter_context(mock.patch.object(GraphLowering, "save_output_code", staticmethod(codes.append)))
        run = compose([*QUIET, f"runs_dir={folder}/runs", f"data_dir={folder}/data", *overrides])
        try:
            row = training.train(run, quiet=True)
        except Exception as error:
            return {"error": f"{type(error).__name__}: {error}"}
    found |= {"compiled": len(codes), "atomics": sum(code.count("tl.atomic_") for code in codes)}
    kept = ("status", "attention_impl", "qk_norm_impl", "loss_impl", "precision")
    return found | {name: row[name] for name in kept}


@contextlib.contextmanager
def counted(found: dict[str, Any]) -> Iterator[None]:
    before = stand_in.counts()
    with stand_in.places_of_waits() as places:
        yield
    counts = stand_in.counts() - before
    found.update(counts=counts, launches=stand_in.launches(counts), waits=dict(places))
    found["collectives"] = stand_in.collectives(before)
    found["peak_bytes"] = torch.cuda.max_memory_allocated()


@contextlib.contextmanager
def traffic(found: dict[str, Any], tokens: int) -> Iterator[None]:
    with counting() as counted:
        yield
    total = counted.total
    found.update(bytes_per_token=total.bytes / tokens, flops_per_token=total.flops / tokens)
    found["floor_seconds"] = total.seconds
    found["attention"] = {name: n for name, n in counted.operators.items() if "attention" in name}


if __name__ == "__main__":
    stand_in.complete()
    torch._inductor.config.force_disable_caches = True  # what is in a cache is not compiled, and its code is not seen
    print(json.dumps({name: trace(overrides) for name, overrides in json.loads(sys.argv[1]).items()}))
