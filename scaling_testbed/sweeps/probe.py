"""The speed of this machine's processor, from some steps of models of a plan. Imports torch, which takes longer."""

import contextlib
import time
from collections.abc import Iterator, Sequence

import torch

from scaling_testbed.config.compose import compose_many
from scaling_testbed.config.run import RunConfig
from scaling_testbed.learning.loss_model import LossModel
from scaling_testbed.model.config import ModelConfig
from scaling_testbed.model.transformer import Transformer
from scaling_testbed.processes.device import autocast, choose_precision, device_name
from scaling_testbed.sweeps.plan import PlannedRun
from scaling_testbed.sweeps.speed import Point, Speed

SECONDS = 1.0  # of all probes together
SIZES = 3  # that are tried: the smallest, the largest, and one between them
CPU = torch.device("cpu")
MOST_PARAMS = 30_000_000  # of a model that is tried: building it takes time and memory
MOST_LOGITS = 2**29  # bytes
ASSUMED_RATE = 2e10  # FLOP/s before the first update


def probed(runs: Sequence[PlannedRun]) -> Speed | None:
    """The speed of the processor by updates of at most SIZES models of the runs, in about SECONDS; None if all models
    have more than MOST_PARAMS parameters.

    A model whose update would take longer is tried with fewer sequences. Weights and tokens are random. What a run does
    besides, such as evaluations, counts in proportion to its tokens.
    """
    by_cost = sorted({float(f"{_flops(run):.2g}"): run for run in runs if run.n_params <= MOST_PARAMS}.items())
    if not by_cost:
        return None
    chosen = [by_cost[place][1] for place in sorted({0, len(by_cost) // 2, len(by_cost) - 1})]
    points: list[Point] = []
    configs = compose_many([run.overrides for run in chosen])
    ends = time.monotonic() + SECONDS
    for number, (run, config) in enumerate(zip(chosen, configs, strict=True)):
        share = max(0.1, (ends - time.monotonic()) / (len(chosen) - number))
        rate = points[-1].flops / points[-1].seconds if points else ASSUMED_RATE
        points.append(_point(run, config, share, _flops(run) / rate))
    words = f"from a one-second probe of this CPU ({points[0].device}); expect a factor of 2"
    return Speed(False, words, points=tuple(points))


def _flops(run: PlannedRun) -> float:
    """For a token of a run."""
    return run.flops / (run.n_tokens - run.first_step * run.tokens_per_step)


def _point(run: PlannedRun, config: RunConfig, seconds: float, expected: float) -> Point:
    """The seconds for a token of a run, from updates in about so many `seconds`. expected: for a token; a third of the
    time is for the first update, which is not counted."""
    model = config.model.resolved(run.vocab_size)
    rows = config.batch.micro_batch or config.batch.sequences
    length = config.batch.sequence_length
    rows = max(1, min(rows, int(seconds / 3 / (expected * length))))
    while rows > 1 and config.loss.logits_bytes(rows * length, model.known_vocab_size) > MOST_LOGITS:
        rows //= 2
    with _threads(config.compute.threads):
        took = _seconds_of_update(config, model, rows, seconds)
    evaluated = _evaluated_tokens(config, run) / 3  # a forward pass has a third of the FLOPs
    per_token = took / (rows * length)
    return Point(_flops(run), per_token * (1 + evaluated / run.n_tokens), device_name(CPU))


def _seconds_of_update(config: RunConfig, model: ModelConfig, rows: int, seconds: float) -> float:
    """The mean time of an update with `rows` sequences, after a first one."""
    network = Transformer(model, config.parametrization, device=CPU)
    network.init_weights(config.seed)
    with_loss = LossModel(network, config.loss)
    optimizer = config.optimizer.for_length(1).build(network)
    parameters, precision = list(network.parameters()), choose_precision(config.compute, CPU)
    tokens_BS = torch.randint(model.known_vocab_size, (rows, config.batch.sequence_length + 1))
    made, began = -1, time.monotonic()
    while made < 1 or time.monotonic() - began < seconds / 2:
        if made == 0:
            began = time.monotonic()
        with autocast(CPU, precision):
            terms = with_loss(tokens_BS)
        (terms.loss / terms.n_tokens).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        made += 1
    return (time.monotonic() - began) / made


def _evaluated_tokens(config: RunConfig, run: PlannedRun) -> float:
    """The tokens of all evaluations of a run."""
    every = config.evaluation.every_steps
    times = 2 + ((run.steps - 1) // every if every else 0)
    return times * config.evaluation.tokens * (1 + len(config.evaluation.sets))


@contextlib.contextmanager
def _threads(number: int | None) -> Iterator[None]:
    """Context in which PyTorch uses so many threads; None: as many as it does."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(number or before)
        yield
    finally:
        torch.set_num_threads(before)
