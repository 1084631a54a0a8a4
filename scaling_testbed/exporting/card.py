"""The model card of an export, README.md: how to load it, and the numbers that its run recorded."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scaling_testbed.config.run import RunConfig, run_id
from scaling_testbed.data.shards import PreparedData
from scaling_testbed.exporting.families import Family
from scaling_testbed.model.config import ModelConfig
from scaling_testbed.runs.folder import METRICS, RunFolder, read_metrics

# Field of a row -> how the card calls it, with {} in the place of the value.
OF_ROW = {
    "status": "{}",
    "steps": "{:,} of training",
    "n_tokens": "{:,} training tokens",
    "flops": "{:.4g} training FLOPs (matrix products and attention)",
    "flops_6nd": "{:.4g} FLOPs by 6 N D",
    "val_loss": "{:.5f} nats per token on the validation split",
    "val_bpb": "{:.5f} bits per byte on the validation split",
    "wall_seconds": "{:.1f} s of training and evaluation",
    "device": "{}",
    "precision": "{} in matrix products while it trained",
}


def card(
    run: RunConfig,
    folder: Path,
    data: PreparedData,
    family: Family,
    step: int,
    average: bool,
    lines: Sequence[str],
) -> str:
    """The text of README.md. step, average: which weights of the run in `folder` are exported. lines: what is said of
    the export. Everything is read from the records of the run; the card draws no conclusion."""
    row = RunFolder(folder).result() or {}
    sections = [
        f"---\nlibrary_name: transformers\npipeline_tag: text-generation\n---\n\n# {run.name} {run_id(run)}\n\n"
        f"A checkpoint of the scaling testbed, for `transformers.AutoModelForCausalLM`.\n\n{_bullets(lines)}",
        f"## Loading\n\n```python\n{_loading(family, data)}```\n",
        f"## These weights\n\n{_bullets(_of_weights(folder, row, step, average))}",
        f"## The run at its end\n\n{_bullets(_of_row(row))}",
        f"## The run\n\n{_bullets(_of_run(run, row, data))}",
        f"## The model\n\n```json\n{json.dumps(_plain(run.model), indent=1)}\n```\n",
    ]
    return "\n".join(sections)


def _bullets(lines: Sequence[str]) -> str:
    return "".join(f"- {line}\n" for line in lines)


def _loading(family: Family, data: PreparedData) -> str:
    trust = ", trust_remote_code=True" if family.own_code else ""
    names, text = "AutoModelForCausalLM", f'model = AutoModelForCausalLM.from_pretrained("FOLDER"{trust})\n'
    if data.manifest["tokenizer"] is not None:
        names, text = f"{names}, AutoTokenizer", f'{text}tokenizer = AutoTokenizer.from_pretrained("FOLDER")\n'
    return f"from transformers import {names}\n\n{text}"


def _of_weights(folder: Path, row: dict[str, Any], step: int, average: bool) -> list[str]:
    """What the run measured of the exported weights. metrics.jsonl may have no evaluation at their step."""
    key = "val_loss_average" if average else "val_loss"
    found = {one["step"]: one.get(key) for one in read_metrics(folder / METRICS)}
    loss = found.get(step)
    if loss is None and row.get("steps") == step:
        loss = row.get(key)
    said = "not measured at this step" if loss is None else f"{loss:.5f} nats per token on the validation split"
    return [f"step: {step:,}{', the average of the weights' if average else ''}", f"{key}: {said}"]


def _of_row(row: dict[str, Any]) -> list[str]:
    if not row:
        return ["the run has no row yet"]
    known = {key: row[key] for key in OF_ROW if row.get(key) is not None}
    errors = {key: row[key] for key in row if key.startswith("error/") and row[key] is not None}
    return [f"{key}: {OF_ROW[key].format(value)}" for key, value in known.items()] + [
        f"{key}: {value:.4f} (1 - accuracy; {row['task_documents'][key.partition('/')[2]]:,} questions)"
        for key, value in errors.items()
    ]


def _of_run(run: RunConfig, row: dict[str, Any], data: PreparedData) -> list[str]:
    versions = row.get("versions") or {}
    facts = {
        "run_id": run_id(run),
        "seed": run.seed,
        "optimizer": f"{run.optimizer.name}, learning rate {run.optimizer.lr:g}, schedule {run.schedule.name}",
        "batch": f"{run.batch.sequences:,} sequences of {run.batch.sequence_length:,} tokens"
        + (f", {run.batch.cutting.settings}" if run.batch.cutting.needs_documents else ""),
        "data": data.folder.name,
        "data_fingerprint": row.get("data_fingerprint", data.fingerprint),
        "tokenizer_fingerprint": row.get("tokenizer_fingerprint", data.tokenizer_fingerprint),
        "git_commit": row.get("git_commit"),
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()) or None,
    }
    return [f"{key}: `{value}`" for key, value in facts.items() if value is not None]


def _plain(config: ModelConfig) -> dict[str, Any]:
    return {key: value for key, value in vars(config).items() if value is not None}
