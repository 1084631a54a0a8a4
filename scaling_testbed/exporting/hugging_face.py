"""A checkpoint in the format of Hugging Face: the weights, the configuration, the tokenizer and a model card, and the
code of the model where transformers has no class for it."""

import os
import shutil
from pathlib import Path

import torch

from scaling_testbed.config.run import RunConfig
from scaling_testbed.errors import ConfigError, UserError
from scaling_testbed.evaluation.loading import load_model, pruned_weights
from scaling_testbed.exporting.card import card
from scaling_testbed.exporting.families import config_json, family_of, generation_json, why_own_code
from scaling_testbed.exporting.tokenizer import tokenizer_files
from scaling_testbed.exporting.weights import folded, masks, weights
from scaling_testbed.files import write_json, write_text
from scaling_testbed.model.transformer import Transformer

WEIGHTS_FILE, MASKS_FILE = "model.safetensors", "masks.safetensors"
REMOTE = Path(__file__).parent / "remote"


def export(run: RunConfig, folder: Path, out: Path, *, step: int | None = None, average: bool = False) -> list[str]:
    """Export a checkpoint of `run` in its `folder`, the newest unless `step` is given, to the folder `out`, which is
    either complete or absent afterwards. average: the average of its weights. Returns lines of text about the export.

    Raises ConfigError for a model without a counterpart, before anything is read, and for an `out` that contains files.
    Raises UserError if the checkpoint does not exist, its data has changed, or writing fails.
    """
    family = family_of(run.model.resolved(run.model.vocab_size or 1))
    library = _safetensors()
    out = _new_folder(out)
    step, model, data = load_model(run, folder, step=step, device=torch.device("cpu"), average=average)
    pruned = pruned_weights(folder, step)
    length, eos_id = run.batch.sequence_length, data.manifest["eos_id"]
    files = tokenizer_files(data.folder, data.manifest["tokenizer"], length)
    files["config.json"] = config_json(model, family, max_length=length, eos_id=eos_id)
    files["generation_config.json"] = generation_json(model.config, eos_id)
    code = sorted(REMOTE.glob("*.py")) if family.own_code else []
    lines = [
        f"{family.architecture}, {sum(x.numel() for x in model.parameters()):,} parameters in fp32: step {step:,} of "
        f"run {folder.resolve().name}{', the average of its weights' if average else ''}",
        *([why_own_code(model.config)] if family.own_code else []),
        f"folded into its weights: {', '.join(folded(model, family)) or 'nothing'}",
        _tokenizer_line(data.manifest["tokenizer"]),
        *_cache_line(model),
    ]
    if pruned:
        n = sum(int(mask.sum()) for mask in pruned.values())
        lines.append(f"{n:,} weights are pruned: they are zero, and {MASKS_FILE} has them as true")
    text = card(run, folder, data, family, step, average, [*lines, _training_line(length, eos_id)])
    work = out.with_name(f".{out.name}.partial")
    try:
        shutil.rmtree(work, ignore_errors=True)  # left by an export that was killed
        work.mkdir(parents=True)
        library.torch.save_file(weights(model, family), work / WEIGHTS_FILE, metadata={"format": "pt"})
        if pruned:
            named = masks(model, family, pruned)
            library.torch.save_file(named, work / MASKS_FILE, metadata={"format": "pt"})
        for name, content in files.items():
            write_json(work / name, content)
        for path in code:
            write_text(work / path.name, path.read_text())
        for file in work.glob("*.safetensors"):
            shutil.copymode(work / "config.json", file)  # other users cannot read a file of safetensors
        write_text(work / "README.md", text)
        os.rename(work, out)
    except (OSError, library.SafetensorError) as error:
        raise UserError(f"cannot write {out}: {getattr(error, 'strerror', None) or error}") from None
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return lines


def _new_folder(out: Path) -> Path:
    """`out` with its links resolved. Raises ConfigError if it exists and is not an empty folder."""
    try:
        found = out.resolve()
        taken = found.exists() and (not found.is_dir() or any(found.iterdir()))
    except (OSError, ValueError) as error:
        raise ConfigError(f"OUT_DIR {out} is not a valid folder name: {getattr(error, 'strerror', error)}") from None
    if taken:
        raise ConfigError(f"OUT_DIR {out} exists and is not empty; give another folder, or delete it")
    if found == Path.cwd():
        raise ConfigError(f"OUT_DIR {out} is the current folder; name a folder in it")
    return found


def _safetensors():
    try:
        import safetensors.torch
    except ImportError:
        raise UserError("an export needs safetensors, which is not installed: pip install -e '.[export]'") from None
    return safetensors


def _tokenizer_line(description: dict | None) -> str:
    if description is None:
        return "no tokenizer: the run's data was given as token ids"
    if description["kind"] == "bytes":
        return "tokenizer bytes, written as a byte-level BPE without merges: the same ids, 0 to 255 and EOS"
    return f"tokenizer {description['name']}; as in training, it adds no special tokens to a text and reads none in it"


def _cache_line(model: Transformer) -> list[str]:
    config = model.config
    if generation_json(config, None)["use_cache"]:
        return []
    return [
        f"model.attention_normaliser={config.attention_normaliser} depends on the length of the whole text, so "
        "generate() works without a cache of keys and values, and a given one is refused"
    ]


def _training_line(length: int, eos_id: int | None) -> str:
    documents = ", in which each document ends with EOS and none starts with BOS; EOS is also for padding"
    return f"trained on sequences of {length:,} tokens{'' if eos_id is None else documents}"
