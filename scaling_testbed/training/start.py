"""The first state of a run: new weights, or what another run has left at one of its steps (start.run).

The parent's checkpoint is verified and read, and never changed. The step's number, if it is taken, decides data and
rate. Tokens and FLOPs of all runs before are counted in the lineage.
"""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from scaling_testbed.config.run import RunConfig, changes, interventions_of
from scaling_testbed.config.start import OPTIMIZER, STEP
from scaling_testbed.diagnostics.summary import Summary
from scaling_testbed.errors import ConfigError, UserError
from scaling_testbed.files import read_yaml
from scaling_testbed.learning.schedules import SCHEDULES
from scaling_testbed.model.config import GrowthConfig, ModelConfig
from scaling_testbed.model.growth import check_growth, grow
from scaling_testbed.runs import checkpoint, state
from scaling_testbed.runs.identity import weights_sha256
from scaling_testbed.training.parent import check_tokenizer, read_parent
from scaling_testbed.training.parts import Parts
from scaling_testbed.training.progress import Progress, restore_states, restore_tensors

MODEL = ("model.", "parametrization.")
LENGTH = ("budget.", "schedule.steps ", "evaluation.", "start.")  # keys that change no step before the end
MEASURED = "evaluation.tokens "  # the tokens by whose losses data.online chooses weights
SIZES = tuple(f"model.{name} " for name in ("name", "d_model", "n_layers", "n_heads", "n_kv_heads", "d_head", "d_ff"))
BATCH = ("batch.sequences", "batch.sequence_length", "batch.packing")


def begin(parts: Parts) -> Progress:
    """The progress of a run that has made no step, with its weights and moments in place. Every rank calls this.

    Raises UserError if the checkpoint to begin from is not there or is damaged, and ConfigError if it does not fit this
    run.
    """
    run, summary = parts.run, Summary(parts.run.diagnostics)
    torch.manual_seed(run.seed)
    if run.start.run is None:
        return Progress(summary=summary, micro_batches={0: parts.micro_batch})
    path, first = run.start.checkpoint, run.start.first_step
    plain, lineage = parts.processes.on_main(lambda: _of_parent(parts, path))
    moments, sharded = OPTIMIZER in run.start.take, run.parallelism.is_sharded
    grown = None if run.start.growth is None else _grown(parts, _configuration(run.start.folder), run.start.growth)
    averages = parts.averages if moments and _averages_alike(parts) else None
    state.begin_from(
        path,
        parts.model,
        parts.optimizer,
        parts.device,
        sharded=sharded,
        moments=moments,
        averages=averages.tensors if averages is not None else {},
        grown=grown,
    )
    if averages is not None:
        averages.n = plain.get("averaged", 0)
    if moments:
        had = _configuration(run.start.folder).get("interventions") or {}
        # The parent has no state of one that is new here. One that a key switches on has no tensors.
        known = {name: one for name, one in parts.interventions.items() if one.key is not None or name in had}
        with state.refused_in_one_line(path):
            restore_states(known, plain.get("updates", {}))
            restore_tensors(known, path)
    if parts.mixing is not None and _mixed_alike(parts):
        parts.mixing.restore(plain["mixing"])
    return Progress(
        summary=summary,
        micro_batches={first: parts.micro_batch},
        step=first,
        record={"step": first},
        lineage=lineage,
    )


def _averages_alike(parts: Parts) -> bool:
    """Whether the parent has the average of weights that this run has. It then goes on, else it begins anew."""
    return bool(_configuration(parts.run.start.folder).get("averaging") == asdict(parts.run.averaging))


def _mixed_alike(parts: Parts) -> bool:
    """Whether the weights of the sources go on as the parent's would: from its step, by the same losses and rule."""
    recorded, own = _configuration(parts.run.start.folder), asdict(parts.run)
    recorded["data"] = recorded.get("data", {}) | {"skip_steps": own["data"]["skip_steps"]}
    return STEP in parts.run.start.take and recorded["data"] == own["data"]


def _of_parent(parts: Parts, path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The plain data of the parent's checkpoint, and the lineage of this run. Raises as `begin`."""
    start = parts.run.start
    plain = read_parent(start)
    recorded = _configuration(start.folder)
    _check_fits(parts, recorded, plain)
    spent = plain.get("spent") or _spent_then(recorded, start.number)
    parent = {
        "run_id": start.run_id,
        "folder": str(start.run),
        "step": start.number,
        "weights_sha256": weights_sha256(path),
        "data_fingerprint": plain.get("data_fingerprint"),
        "val_loss_initial": _initial_loss(plain),
        **spent,
    }
    return plain, [*plain.get("lineage", []), parent]


def _initial_loss(plain: dict[str, Any]) -> float | None:
    """The loss at step 0 of the first run of a lineage, from a checkpoint of the last one; None if it is unknown."""
    if lineage := plain.get("lineage"):
        return lineage[-1].get("val_loss_initial")
    return plain.get("summary", {}).get("val_loss_initial")


def _configuration(folder: Path) -> dict[str, Any]:
    """The configuration of the parent, as it was recorded."""
    try:
        recorded = read_yaml(folder / "config.yaml")
    except FileNotFoundError:
        recorded = None
    if not isinstance(recorded, dict):
        raise UserError(f"start.run={folder} has no configuration in config.yaml, which says what its weights are of")
    return recorded


def _check_fits(parts: Parts, recorded: dict[str, Any], plain: dict[str, Any]) -> None:
    """Raise ConfigError unless this run can go on with what it takes from its parent."""
    run, start = parts.run, parts.run.start
    differing = changes(recorded, run)
    if start.same_run and (why := _not_the_same(recorded, run, parts.steps)):
        raise ConfigError(
            f"start.run={start.run} did not make the first steps of this run: {why}; leave out start.same_run"
        )
    kept = SIZES if start.growth is not None else ()
    if other := [text for text in differing if text.startswith(MODEL) and not text.startswith(kept)]:
        raise ConfigError(f"start.run={start.run} has weights of another model: {other[0]}")
    check_tokenizer(start, plain, parts.data)
    if OPTIMIZER in start.take and (other := [text for text in differing if text.startswith("optimizer.name ")]):
        raise ConfigError(
            f"start.run={start.run} has moments of another optimizer: {other[0]}; type {without(run, OPTIMIZER)}"
        )
    tensors = {} if OPTIMIZER in start.take else checkpoint.read_tensors(start.checkpoint, "interventions")
    if needed := [name for name in parts.interventions if name in tensors]:
        raise ConfigError(
            f"interventions.{needed[0]} goes on with the tensors that start.run={start.run} keeps for it; type "
            f"start.take=[{','.join([*start.take, OPTIMIZER])}], or leave the intervention out"
        )
    if why := _pruned_otherwise(parts, recorded, differing):
        raise ConfigError(why)
    if STEP in start.take and (other := [text for text in differing if text.startswith(BATCH)]):
        raise ConfigError(
            f"start.run={start.run} has steps of another batch, which are no steps of this run: {other[0]}; type "
            f"{without(run, STEP)}"
        )


def _pruned_otherwise(parts: Parts, recorded: dict[str, Any], differing: list[str]) -> str | None:
    """Why the weights that are pruned where this run begins are not those that its number of steps says, from which its
    FLOPs and counts follow; None if they are."""
    start = parts.run.start
    for name, intervention in parts.interventions.items():
        if not intervention.prunes:
            continue
        events = intervention.pruned(parts.model.config, parts.steps)
        said = f"interventions.{name} cannot go on from start.run={start.run}: "
        if name not in (recorded.get("interventions") or {}):
            if early := [step for step, _ in events if step < start.first_step]:
                return f"{said}it prunes from step {early[0]:,} on, and the parent has pruned nothing before"
        elif STEP not in start.take:
            return f"{said}the weights that are pruned there stay so, and the steps begin at 0; leave one of them out"
        elif other := [text for text in differing if text.startswith(("budget.", "interventions "))]:
            return f"{said}it prunes at parts of all steps, and {other[0]}; use those of the parent, or leave it out"
    return None


def _not_the_same(recorded: dict[str, Any], run: RunConfig, steps: int) -> str | None:
    """In what the steps that the parent made differ from those that this run would have made; None if in nothing."""
    differing = changes(recorded, run)
    if run.data.online_rule is not None and (other := [one for one in differing if one.startswith(MEASURED)]):
        return f"{other[0]}, and data.online follows the losses on them"
    if other := [text for text in differing if not text.startswith(LENGTH)]:
        return other[0]
    if recorded.get("budget", {}).get("hours") is not None:
        return "budget.hours ended it, so its number of steps is not known"
    try:
        then = SCHEDULES[recorded["schedule"]["name"]](**recorded["schedule"])
        parent_steps = int(recorded["budget"]["steps"] or recorded["schedule"]["steps"] or 0)
    except (LookupError, TypeError, ValueError) as error:
        return f"its schedule is not known here ({error})"
    if needing := [name for name, one in interventions_of(run).items() if one.needs_steps]:
        return f"interventions.{needing[0]} is told the number of all steps"
    decays = [run.optimizer.for_length(one.length(n)) for one, n in ((then, parent_steps), (run.schedule, steps))]
    if decays[0] != decays[1]:
        return "optimizer.weight_decay_steps divides the decay by all steps"
    peak, batch = run.optimizer.lr, run.batch.tokens
    for step in range(run.start.first_step):
        if then.lr(step, parent_steps, peak, batch) != run.schedule.lr(step, steps, peak, batch):
            return f"its rate was another one in step {step:,}"
    return None


def _grown(
    parts: Parts, recorded: dict[str, Any], how: GrowthConfig
) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    """The function that makes the weights of this run's model of those of its parent. Raises ConfigError if the parent
    is of no size from which it can be made."""
    model, seed = parts.model, parts.run.seed
    try:
        old = ModelConfig(**recorded["model"]).resolved(model.config.known_vocab_size)
    except (LookupError, TypeError) as error:
        raise UserError(f"{parts.run.start.folder}/config.yaml has no model that is known here: {error}") from None
    check_growth(old, model.config, how)
    shapes = {name: value.shape for name, value in model.named_parameters()}
    info = model.parameter_info()
    return lambda weights: grow(
        weights, old, model.config, how, info, shapes, lambda name: model.initial_weight(name, seed), seed
    )


def without(run: RunConfig, name: str) -> str:
    """The override that takes all but `name`."""
    return f"start.take=[{','.join(entry for entry in run.start.take if entry != name)}]"


def _spent_then(recorded: dict[str, Any], step: int) -> dict[str, Any]:
    """What a run of an earlier version had spent at `step`: its checkpoint does not say it. Its FLOPs are unknown."""
    try:
        tokens = step * int(recorded["batch"]["sequences"]) * int(recorded["batch"]["sequence_length"])
    except (LookupError, TypeError, ValueError):
        tokens = None
    return {"steps": step, "n_tokens": tokens, "flops": None}
