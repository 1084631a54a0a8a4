"""The curvature of the loss at a saved checkpoint: the trace of the Fisher information, and that of the Hessian.

Shapes in names: B sequences, T positions, N = B T tokens, V vocabulary.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from scaling_testbed.config.run import RunConfig, flatten
from scaling_testbed.data.batches import ValidationBatches
from scaling_testbed.data.cutting import NO_TARGET, Batch
from scaling_testbed.errors import UserError, listed
from scaling_testbed.evaluation.loading import load_model
from scaling_testbed.model.parts import IMPLS
from scaling_testbed.model.transformer import Transformer
from scaling_testbed.processes.device import choose_device, to_device
from scaling_testbed.progress import Progress
from scaling_testbed.runs.checkpoint import by_step

BATCH_TOKENS = 2048  # a batch is one sample of the trace, so that few tokens in each make its standard error smaller
SIZES = ("name", "d_model", "n_layers", "n_heads", "n_kv_heads", "d_head", "d_ff", "d_ff_rule", "vocab_size", *IMPLS)
DEFINITION = (
    "fisher_trace is the trace of the Fisher information of a token, with labels drawn from the model; se is its\n"
    "standard error over batches. loss is the cross-entropy of the same tokens, in nats"
)
OF_HESSIAN = "hessian_trace is the trace of the Hessian of the loss with the real labels (Hutchinson's estimator)"


@dataclass(frozen=True)
class Estimate:
    """A mean over batches, weighted by their tokens. se: its standard error; None for one batch."""

    mean: float
    se: float | None


@dataclass(frozen=True, kw_only=True)
class Curvature:
    """The curvature of a model at some batches. n_tokens: predicted tokens. loss: mean cross-entropy of the real
    labels, in nats. fisher, hessian: traces, in nats per token and squared unit of the parameters."""

    n_tokens: int
    loss: float
    fisher: Estimate
    hessian: Estimate | None


def curvature(
    run: RunConfig, folder: Path, *, tokens: int, step: int | None = None, hutchinson: bool = False, seed: int = 0
) -> dict[str, Any]:
    """The record of a checkpoint of `run` in its `folder`, the newest unless `step` is given.

    tokens: how many validation tokens at most, spread evenly over the run's validation data. hutchinson: also estimate
    the trace of the Hessian. Everything is computed in fp32, with the reference paths, which have second derivatives.
    Raises UserError if the checkpoint does not exist or is damaged, if its data has changed, or if a value is not
    finite.
    """
    device, length = choose_device(run.compute), run.batch.sequence_length
    step, model, data = load_model(run, folder, step=step, device=device, reference=True)
    rows = max(1, min(BATCH_TOKENS, tokens) // length)
    cutting = run.batch.cutting
    batches = ValidationBatches(data.validation, sequence_length=length, max_tokens=tokens, rows=rows, cutting=cutting)
    on_device = (batch.map(lambda x: to_device(x, device)) for batch in batches)
    found = measure(model, on_device, seed, hutchinson=hutchinson)
    record = {
        "run": str(folder),
        "step": step,
        "data_fingerprint": data.fingerprint,
        "n_params": sum(parameter.numel() for parameter in model.parameters()),
        "tokens": found.n_tokens,
        "loss": found.loss,
        "fisher_trace": found.fisher.mean,
        "fisher_trace_se": found.fisher.se,
    }
    if found.hessian is not None:
        record |= {"hessian_trace": found.hessian.mean, "hessian_trace_se": found.hessian.se}
    if not all(math.isfinite(value) for value in record.values() if isinstance(value, float)):
        raise UserError(f"step {step} of {folder} gives a curvature that is not finite: has the run diverged?")
    return record


def run_folders(paths: Sequence[Path]) -> list[Path]:
    """`paths`, with the folder of a sweep replaced by those of all its runs."""
    found: list[Path] = []
    for path in paths:
        found += [file.parent for file in sorted(path.glob("*/config.yaml"))] or [path]
    return found


def curvatures(
    runs: Sequence[RunConfig], folders: Sequence[Path], *, tokens: int, hutchinson: bool = False
) -> tuple[list[dict[str, Any]], list[str]]:
    """The records of all checkpoints of `runs` in their `folders`, by run and step, and warnings about those that are
    left out because `curvature` raises. Shows the progress on standard error. Raises the first UserError if no
    checkpoint can be measured."""
    records, errors, progress = [], [], Progress(prefix="curvature: ", errors=True)
    progress.start(len(runs))
    for done, (run, folder) in enumerate(zip(runs, folders, strict=True)):
        steps: list[int | None] = [*by_step(folder / "checkpoints")]
        for step in steps or [None]:  # the newest of none: `curvature` says why there is none
            progress.move(done, str(folder))
            try:
                records.append(curvature(run, folder, tokens=tokens, step=step, hutchinson=hutchinson))
            except UserError as error:
                errors.append(error)
        left = progress.left(done + 1)
        progress.say(f"{done + 1} of {len(runs)} runs, {len(records)} checkpoints{left and ', '}{left}")
    progress.close()
    if not records:
        raise errors[0]
    return records, [f"left out: {error}" for error in errors]


def measure(model: Transformer, batches: Iterable[Batch], seed: int, *, hutchinson: bool = False) -> Curvature:
    """The curvature of `model` at `batches` on its device, a pure function of the arguments. Only positions with a
    target count.

    The trace of the Fisher information F of one token is E ||grad log p(y)||^2 with y drawn from the model. Labels at
    different positions are independent given the tokens, and each gradient has the mean zero. So for the gradient g of
    the sum of -log p(y) over the N tokens of a batch, E ||g||^2 = N tr F: one backward pass a batch. F is the
    generalised Gauss-Newton matrix of the cross-entropy. It is equal to the Hessian only where the labels are as the
    model predicts them.

    hutchinson: also z.Hz for the Hessian H of the mean loss with the real labels, with one z of +-1 a batch
    (Hutchinson 1989); it takes a second backward pass.
    """
    parameters = list(model.parameters())
    generator = torch.Generator(parameters[0].device).manual_seed(seed)
    sizes: list[int] = []
    losses, fishers, hessians = [], [], []
    for batch in batches:
        tokens_BS, targets_BT, begins_BT = batch.tensors
        targets_N = (tokens_BS[:, 1:] if targets_BT is None else targets_BT).flatten()
        logits_NV = model.logits(tokens_BS[:, :-1], begins_BT).flatten(0, 1)
        if targets_BT is not None:
            logits_NV, targets_N = logits_NV[targets_N != NO_TARGET], targets_N[targets_N != NO_TARGET]
        p_NV = logits_NV.detach().nan_to_num().softmax(-1)  # nothing can be drawn by NaN; the loss still shows it
        drawn_N = torch.multinomial(p_NV, 1, generator=generator)[:, 0]
        loss = F.cross_entropy(logits_NV, targets_N)
        sampled = F.cross_entropy(logits_NV, drawn_N, reduction="sum")
        gradients = torch.autograd.grad(sampled, parameters, retain_graph=hutchinson, materialize_grads=True)
        sizes.append(len(drawn_N))
        losses.append(loss.item())
        fishers.append(_inner(gradients, gradients) / len(drawn_N))
        if hutchinson:
            hessians.append(_quadratic_form(loss, parameters, _signs(parameters, generator)))
    loss_of_all = sum(size * loss for size, loss in zip(sizes, losses, strict=True)) / sum(sizes)
    return Curvature(
        n_tokens=sum(sizes),
        loss=loss_of_all,
        fisher=_estimate(fishers, sizes),
        hessian=_estimate(hessians, sizes) if hutchinson else None,
    )


def _signs(parameters: Sequence[torch.Tensor], generator: torch.Generator) -> list[torch.Tensor]:
    """Independent values of +-1 in the shapes of `parameters`."""
    return [2.0 * torch.empty_like(x).bernoulli_(0.5, generator=generator) - 1.0 for x in parameters]


def _quadratic_form(loss: torch.Tensor, parameters: Sequence[torch.Tensor], z: Sequence[torch.Tensor]) -> float:
    """z.Hz of the Hessian of `loss`."""
    gradients = torch.autograd.grad(loss, parameters, create_graph=True, materialize_grads=True)
    slope = torch.stack([(x * sign).sum() for x, sign in zip(gradients, z, strict=True)]).sum()
    return _inner(z, torch.autograd.grad(slope, parameters, materialize_grads=True))


def _inner(a: Sequence[torch.Tensor], b: Sequence[torch.Tensor]) -> float:
    return sum((x * y).sum().item() for x, y in zip(a, b, strict=True))


def _estimate(values: Sequence[float], sizes: Sequence[int]) -> Estimate:
    weights = [size / sum(sizes) for size in sizes]
    mean = sum(weight * value for weight, value in zip(weights, values, strict=True))
    if (n := len(values)) < 2:
        return Estimate(mean, None)
    spread = sum((weight * (value - mean)) ** 2 for weight, value in zip(weights, values, strict=True))
    return Estimate(mean, math.sqrt(spread * n / (n - 1)))


def warnings(runs: Sequence[RunConfig], records: Sequence[dict[str, Any]]) -> list[str]:
    """Why the traces in the `records` of `runs` may not be compared, one line for each reason."""
    found, settings = [], [_parametrisation(run) for run in runs]
    for key in dict.fromkeys(key for setting in settings for key in setting):
        values = list(dict.fromkeys(str(setting.get(key)) for setting in settings))
        if len(values) > 1:
            found.append(
                f"{key} varies ({listed(values)}), and the trace depends on the parametrisation: compare runs with one "
                "value of it"
            )
    if len({record["data_fingerprint"] for record in records}) > 1:
        found.append("the runs have different data: compare runs with the same data")
    return found


def _parametrisation(run: RunConfig) -> dict[str, Any]:
    """The keys of the model of `run`, except its sizes and the paths that compute it."""
    sizes = {f"model.{name}" for name in SIZES}
    parts = ("model.", "parametrization.")
    return {key: value for key, value in flatten(run).items() if key.startswith(parts) and key not in sizes}
