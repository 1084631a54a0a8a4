"""A training step in fp32, in bf16, and in bf16 with a residual stream in bf16: from which size on bf16 pays on a CPU.

    python -m benchmarks.precision [--quick] [--seconds S] [--rounds N] [--out DIR]

Every variant trains its own copy of a model on the same synthetic tokens, with one thread. The variants alternate. The
time is CPU time, so that other processes on the machine matter less. "loss" is that of step 24, and the last column is
the largest difference from the losses of fp32 in the first 24 steps.
"""

from __future__ import annotations

import statistics
import sys
import time
from dataclasses import dataclass
from functools import partial

import torch

from benchmarks import harness
from benchmarks.report import Budget, Report
from scaling_testbed.config.compose import compose
from scaling_testbed.learning.loss_model import LossModel
from scaling_testbed.model.transformer import Transformer
from scaling_testbed.processes.device import autocast

CPU = torch.device("cpu")
VOCABULARIES = {"proxy_2m": 32000}  # of the others: 256
MODELS = ("nano_s", "nano_m", "nano_l", "proxy_2m")
BATCHES = ((32, 128), (8, 128), (4, 64))  # sequences, tokens of a sequence
LOSSES = 24  # of the first steps are compared
VARIANTS = {
    "fp32": [],
    "bf16": ["compute.precision=bf16"],
    "bf16, stream in bf16": ["compute.precision=bf16", "compute.residual_dtype=bf16"],
}
COLUMNS = [
    ("median_s", "CPU ms a step", "ms"),
    ("low_s", "min", "ms"),
    ("high_s", "max", "ms"),
    ("speed", "speed over fp32", "ratio"),
    ("loss", "loss", "loss"),
    ("loss_difference", "losses differ by", "small"),
]


@dataclass
class Trained:
    """A model in training, with its optimizer and the precision of its products."""

    losses: LossModel
    optimizer: torch.optim.Optimizer
    precision: str

    def step(self, tokens_BS: torch.Tensor) -> tuple[float, float]:
        """The CPU seconds of one update, and its loss per token."""
        began, n_tokens = time.process_time(), tokens_BS[:, 1:].numel()
        with autocast(CPU, self.precision):
            terms = self.losses(tokens_BS)
        (terms.loss / n_tokens).backward()
        loss = terms.ce.item() / n_tokens
        torch.nn.utils.clip_grad_norm_(self.losses.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return time.process_time() - began, loss


def build(model: str, vocab_size: int, words: list[str]) -> Trained:
    """A model with the initial weights of seed 0, and AdamW at a rate of 1e-2."""
    run = compose([f"model={model}", f"model.vocab_size={vocab_size}", *words])
    built = Transformer(run.model.resolved(vocab_size), run.parametrization, device=CPU)
    built.init_weights(0)
    built.narrow_residual = run.compute.residual_dtype == "bf16"
    return Trained(LossModel(built, run.loss), run.optimizer.build(built), run.compute.precision)


def compare(report: Report, rounds: int, model: str, batch: tuple[int, int], seconds: float) -> None:
    """Add the case of one model and batch. There are at least LOSSES rounds, and then as many as the time allows."""
    (sequences, length), vocab_size = batch, VOCABULARIES.get(model, 256)
    trained = {name: build(model, vocab_size, words) for name, words in VARIANTS.items()}
    times: dict[str, list[float]] = {name: [] for name in VARIANTS}
    losses: dict[str, list[float]] = {name: [] for name in VARIANTS}
    generator = torch.Generator().manual_seed(0)
    zipf = 1 / torch.arange(1, vocab_size + 1)
    budget = Budget(2 * seconds)
    for number in range(max(rounds, LOSSES) + 1):
        if number > LOSSES and budget.left() < 0:
            break
        tokens = torch.multinomial(zipf, sequences * (length + 1), replacement=True, generator=generator)
        names = list(VARIANTS)
        for name in names[number % len(names) :] + names[: number % len(names)]:
            taken, loss = trained[name].step(tokens.view(sequences, length + 1))
            losses[name].append(loss)
            if number:
                times[name].append(taken)
    medians = {name: statistics.median(found) for name, found in times.items()}
    rows = [
        {
            "variant": name,
            "ours": True,
            "status": "ok",
            "seconds": times[name],
            "median_s": medians[name],
            "low_s": min(times[name]),
            "high_s": max(times[name]),
            "speed": medians["fp32"] / medians[name],
            "loss": losses[name][LOSSES - 1],
            "loss_difference": max(abs(a - b) for a, b in zip(losses[name][:LOSSES], losses["fp32"], strict=False)),
        }
        for name in VARIANTS
    ]
    report.add({"label": f"{model}, {sequences} x {length} tokens, vocabulary {vocab_size:,}", "rows": rows})


def main(argv: list[str] | None = None) -> int:
    options = harness.arguments(__doc__, argv, seconds=1200, peers=False)
    if options.device == "cuda":
        print("benchmarks.precision measures a CPU; use benchmarks.trainer for a GPU", file=sys.stderr)
        return 2
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    report = Report("precision", harness.describe_machine(CPU), COLUMNS, out=options.out, smoke=options.quick)
    cases = [("nano_s", (4, 64))] if options.quick else [(model, batch) for model in MODELS for batch in BATCHES]
    work = {f"{model} {batch}": partial(compare, report, options.rounds, model, batch) for model, batch in cases}
    return report.run(work, Budget(options.seconds))


if __name__ == "__main__":
    sys.exit(main())
