"""The records of a run during training: metrics.jsonl, its mirrors, and printed lines."""

import dataclasses
from typing import Any

import torch

from scaling_testbed.config.compute import pruned_of
from scaling_testbed.config.memory import estimate_memory
from scaling_testbed.data.summary import remarks
from scaling_testbed.diagnostics.summary import Summary
from scaling_testbed.errors import listed
from scaling_testbed.processes.device import device_name, free_memory_bytes
from scaling_testbed.progress import DETAIL, LINE, LOGGER, RunProgress
from scaling_testbed.runs.environment import environment, source_change
from scaling_testbed.runs.mirrors.chosen import open_mirrors
from scaling_testbed.runs.mirrors.mirror import Mirror
from scaling_testbed.runs.row import Row
from scaling_testbed.training.parts import Parts
from scaling_testbed.training.progress import Progress


class Records:
    """The open records of one start of a run. Only rank 0 writes.

    git: commit of the source, and hash of its uncommitted changes, each None if it is unknown or absent.
    """

    def __init__(self, parts: Parts, progress: Progress, *, quiet: bool):
        """Record this start, and truncate metrics.jsonl to `progress`. Sets its summary from the file if this is whole,
        and the number of restarts."""
        self._parts = parts
        self._mirrors: list[Mirror] = []
        self._earlier: list[dict[str, Any]] = []  # the records before this start, on rank 0
        progress.restarts, self.git, self._source_change, kept = parts.processes.on_main(lambda: self._open(progress))
        if kept is not None:
            progress.summary = Summary.of_state(parts.run.diagnostics, kept)
        line_every = parts.run.logging.line_every_steps
        self._is_limit = parts.length.by_clock and parts.length.chosen is None
        self._shown = RunProgress(
            parts.steps, progress.step, line_every=line_every, quiet=quiet, is_limit=self._is_limit
        )
        self._announce(progress)

    def _open(self, progress: Progress) -> tuple[int, dict[str, Any], str | None, dict[str, Any] | None]:
        parts = self._parts
        here = environment(device_name(parts.device), parts.precision, parts.run.plugins)
        restarts = parts.folder.start(dataclasses.asdict(parts.run), here)
        before = progress.step + (progress.record is None)
        rows, whole = parts.folder.open_metrics(before, progress.metrics)
        self._earlier = rows
        # With the file, a run that goes on can have another diagnostics.at_step. Without it, the checkpoint counts.
        summary = Summary.of_records(parts.run.diagnostics, rows).state() if whole else None
        return max(restarts, progress.restarts), here["git"], source_change(parts.folder.path), summary

    def _announce(self, progress: Progress) -> None:
        parts, run, say = self._parts, self._parts.run, self._shown.say
        say(
            f"run {parts.folder.path}: {parts.model.config.name}, {parts.counts.n_params:,} parameters "
            f"({parts.counts.n_params_non_embedding:,} without embedding and head), on {_devices(parts)} in "
            f"{parts.precision}"
        )
        upper = f"{run.budget.hours:g} hours, at most " if self._is_limit else ""
        say(
            f"{upper}{parts.steps:,} steps of {run.batch.tokens:,} tokens, "
            f"{parts.batches.epochs(parts.steps):.2f} epochs of {parts.data.folder}{_of_sources(parts)}; "
            f"attention {parts.model.attention_impl}, qk-norm {parts.model.qk_norm_impl}, "
            f"loss {parts.loss.impl}{', compiled' if parts.compiled else ''}"
        )
        for remark in remarks(parts.data.manifest):
            say(remark)
        for remark in parts.batches.remarks():
            say(remark)
        for remark in parts.questions.remarks():
            say(f"note: {remark}")
        if stray := parts.data.stray_shards():
            say(f"{parts.data.folder} also holds {listed(stray)}: not in its manifest, not read")
        if rounding := run.budget.rounding(parts.counts, run.batch.tokens, pruned_of(run, parts.model.config)):
            say(rounding)
        if (run.diagnostics.at_step or 0) > parts.steps:
            say(f"diagnostics.at_step={run.diagnostics.at_step} is after the last step and is not measured")
        if nothing := run.averaging.remark(run.start.first_step, parts.steps):
            say(nothing)
        if progress.step > run.start.first_step:
            say(f"resumed at step {progress.step:,} (start {progress.restarts + 1} of this run)")
            if self._source_change:
                say(f"note: what it is computed with has changed since the last start: {self._source_change}")
        elif run.start.run is not None:
            say(f"begins with {listed(run.start.take)} of {run.start.run} at its step {run.start.number:,}")
        if progress.compiled_before not in (None, parts.compiled):
            now, before = ("compiled", "not") if parts.compiled else ("not compiled", "compiled")
            say(f"the model is {now} from here on, and was {before} before: the last bits of the losses may differ")
        if progress.captured_before not in (None, parts.captures):
            now, before = ("", " not") if parts.captures else (" not", "")
            say(f"steps are{now} a CUDA graph from here on, and were{before} before: the last bits may differ")
        changes = list(progress.micro_batches.items())
        if len(changes) > 1 and changes[-1][0] == progress.step:
            say(f"micro-batches of {changes[-1][1]} sequences from here on, in place of {changes[-2][1]}")
        elif run.batch.is_auto:
            say(f"micro-batches of {progress.micro_batch} sequences, by the estimate of memory")
        if LOGGER.isEnabledFor(DETAIL):
            for detail in details(parts):
                say(detail, DETAIL)

    def say(self, text: str, level: int = LINE) -> None:
        """Print a line beside the progress of the run."""
        self._shown.say(text, level)

    def shorten(self, said: str) -> None:
        """Print `said` and show the progress towards the steps that the clock has chosen."""
        self._shown.shorten(self._parts.steps)
        self.say(said)

    def start_mirrors(self) -> None:
        """Open the mirrors that the run asks for, beside the first steps."""
        if self._parts.processes.world.is_main:
            self._mirrors = open_mirrors(self._parts.run, self._parts.folder, self._earlier)
        self._earlier = []

    def write(self, progress: Progress) -> None:
        """Write the open record if it has more than the step, and close it."""
        record = progress.record
        if record is None:
            return
        if len(record) > 1 and self._parts.processes.world.is_main:
            written = self._parts.folder.write_metrics(record)
            self._shown.update(record)
            for mirror in self._mirrors:
                mirror.log(written)
        progress.summary.add(record)
        progress.record = None

    def close(self) -> None:
        """Remove the progress bar."""
        self._shown.close()

    def finish(self, row: Row) -> dict[str, Any]:
        """Write the row of the run and return it as written. Only rank 0 calls this."""
        written = row.as_dict()
        self._parts.folder.write_result(written)
        for mirror in self._mirrors:
            mirror.finish(written)
        return written


def details(parts: Parts) -> list[str]:
    """What -v prints of a run at its start, a line each."""
    run, model, world = parts.run, parts.model.config, parts.processes.world
    compute = f"{device_name(parts.device)}, {torch.get_num_threads()} CPU threads; queries, keys and values "
    compute += f"{parts.model.qkv_impl}, blocks{'' if parts.compiled else ' not'} compiled, steps"
    compute += f"{'' if parts.captures else ' not'} captured, at most {parts.ahead} updates ahead of the host"
    batch = dataclasses.replace(run.batch, micro_batch_sequences=parts.micro_batch)
    with_batch = dataclasses.replace(run, batch=batch)
    estimate = estimate_memory(with_batch, model, parts.counts.n_params, parts.precision, world.size, parts.device.type)
    found = [f"{name.replace('_', ' ')} {_mib(n_bytes)}" for name, n_bytes in vars(estimate).items() if n_bytes]
    free = free_memory_bytes(parts.device, world.size_here)
    left = f"; {_mib(free)} are left with the model and its optimizer there" if free is not None else ""
    memory = f"memory of a process by the estimate: {_mib(estimate.total)} ({', '.join(found)}){left}"
    return [compute, f"micro-batches of {parts.micro_batch} sequences; {memory}"]


def _mib(n_bytes: int) -> str:
    return f"{n_bytes / 2**20:,.1f} MiB"


def _devices(parts: Parts) -> str:
    if not parts.processes.grouped:
        return parts.device.type
    return f"{parts.processes.world.size} x {parts.device.type} ({parts.run.parallelism.kind})"


def _of_sources(parts: Parts) -> str:
    """The epochs of each source of a mixture, those before the first step of this run left out."""
    epochs = parts.batches.epochs_by_source(parts.run.start.first_step, parts.steps)
    if not parts.batches.is_mixture:
        return ""
    so_far = "" if parts.mixing is None else "with the weights so far: "
    return f" ({so_far}{', '.join(f'{name} {n:.2f}' for name, n in epochs.items())})"
