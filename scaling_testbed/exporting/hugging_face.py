"""A checkpoint in the format of Hugging Face: config.json, model.safetensors, the tokenizer and a README.md.

A model with RMSNorms, SwiGLU, and rotary positions that pair features r and r + d_head/2 as in Hugging Face, becomes

    without a qk-norm, pre-norm residual            LlamaForCausalLM
    with an RMS qk-norm per head, pre-norm          Qwen3ForCausalLM
    with an RMS qk-norm over the full width, norms
    after the branches (model.residual=reordered)   Olmo2ForCausalLM

An attention scale of 1/d_head, kappa and sigma_reparam only change values of weights, so they are folded into the
weights. The scale of the embedding's gradient is not part of the model. Everything else that these three classes cannot
compute is refused.
"""

import json
import math
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from scaling_testbed.config.run import RunConfig
from scaling_testbed.errors import ConfigError, UserError
from scaling_testbed.evaluation.loading import load_model, pruned_weights
from scaling_testbed.exporting.tokenizer import tokenizer_files
from scaling_testbed.files import write_json, write_text
from scaling_testbed.model.config import ModelConfig
from scaling_testbed.model.parts import LINEARS, MLPS, NORMALISERS, NORMS, QK_NORMS, RESIDUALS
from scaling_testbed.model.transformer import Block, Transformer

WEIGHTS_FILE, MASKS_FILE = "model.safetensors", "masks.safetensors"


@dataclass(frozen=True)
class Family:
    """A model class of transformers. residual: model.parts.Residual.counterpart. norms: its names for the norms of
    attention and MLP in a block."""

    model_type: str
    architecture: str
    residual: str
    norms: tuple[str, str]


BEFORE, AFTER = "norms before the branches", "norms after the branches"
LLAMA = Family("llama", "LlamaForCausalLM", BEFORE, ("input_layernorm", "post_attention_layernorm"))
QWEN3 = Family("qwen3", "Qwen3ForCausalLM", BEFORE, ("input_layernorm", "post_attention_layernorm"))
OLMO2 = Family("olmo2", "Olmo2ForCausalLM", AFTER, ("post_attention_layernorm", "post_feedforward_layernorm"))
FAMILIES = (LLAMA, QWEN3, OLMO2)
# Key of ModelConfig -> the registered parts, and the counterparts that these model classes have.
PARTS: Mapping[str, tuple[Mapping[str, Any], set[str | None]]] = {
    "norm": (NORMS, {"rms_norm"}),
    "mlp": (MLPS, {"silu"}),
    "attention_normaliser": (NORMALISERS, {"softmax"}),
    "qk_norm": (QK_NORMS, {"none", "rms_norm"}),
    "residual": (RESIDUALS, {family.residual for family in FAMILIES}),
}
# Keys without a counterpart in any of these classes.
ABSENT = ("attention_softcap", "final_softcap")


def family_of(config: ModelConfig) -> Family:
    """The model class that computes the same as a resolved `config`. Raises ConfigError, which names each key and value
    that has no counterpart."""
    wrong = [key for key, (parts, theirs) in PARTS.items() if parts[getattr(config, key)].counterpart not in theirs]
    wrong += [key for key in ABSENT if getattr(config, key) is not None]
    if wrong:
        keys = [f"model.{key}={getattr(config, key)}" for key in wrong]
        raise _no_counterpart(keys, ", ".join(family.architecture for family in FAMILIES))
    family = LLAMA if not _norms_queries(config) else OLMO2 if config.norms_heads_together else QWEN3
    if RESIDUALS[config.residual].counterpart != family.residual:
        raise _no_counterpart(
            [f"model.residual={config.residual}"], f"{family.architecture}, which {_qk_norm(config)} needs"
        )
    if config.attention_window is not None and family is not QWEN3:
        raise _no_counterpart([f"model.attention_window={config.attention_window}"], family.architecture)
    if config.d_model % config.n_heads and family is LLAMA:
        raise _no_counterpart([f"model.n_heads={config.n_heads}"], f"{LLAMA.architecture}: it must divide d_model")
    return family


def _no_counterpart(wrong: list[str], where: str) -> ConfigError:
    return ConfigError(f"{', '.join(wrong)} {'has' if len(wrong) == 1 else 'have'} no counterpart in {where}")


def _norms_queries(config: ModelConfig) -> bool:
    return config.query_key_norm.function is not None


def _qk_norm(config: ModelConfig) -> str:
    if config.kappa is not None:
        return f"model.kappa={config.kappa}"
    axis = f" model.qk_norm_axis={config.qk_norm_axis}" if _norms_queries(config) else ""
    return f"model.qk_norm={config.qk_norm}{axis}"


def config_json(model: Transformer, family: Family, *, max_length: int, eos_id: int | None) -> dict:
    """The content of config.json."""
    config = model.config
    window: dict[str, Any] = {}
    if config.attention_window is not None:
        layers = ["sliding_attention"] * config.n_layers
        window = {"use_sliding_window": True, "sliding_window": config.attention_window}
        window |= {"max_window_layers": 0, "layer_types": layers}
    return {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.d_head,
        "hidden_act": MLPS[config.mlp].counterpart,
        "max_position_embeddings": max_length,
        "rms_norm_eps": config.norm_eps,
        # Under both names: transformers 5 reads the second, earlier ones and other readers the first.
        "rope_theta": config.rope_base,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_base},
        "tie_word_embeddings": config.tied_head,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": None,
        "eos_token_id": eos_id,
        "pad_token_id": None,
        "torch_dtype": "float32",
        **window,
    }


@torch.no_grad()
def weights(model: Transformer, family: Family) -> dict[str, torch.Tensor]:
    """Name in `family` -> tensor, in fp32, contiguous, on the CPU. A tied head is stored once."""
    found = {"model.embed_tokens.weight": model.embedding.weight, "model.norm.weight": _gain(model.final_norm)}
    if model.head is not None:
        found["lm_head.weight"] = model.head_weight_VD
    for number, block in enumerate(model.typed_blocks):
        for name, tensor in _block_weights(block, model.config, family).items():
            found[f"model.layers.{number}.{name}.weight"] = tensor
    return {name: tensor.detach().float().cpu().contiguous() for name, tensor in found.items()}


def _block_weights(block: Block, config: ModelConfig, family: Family) -> dict[str, torch.Tensor]:
    attention, mlp = block.attention, block.mlp
    linears = {"self_attn.q_proj": attention.q, "self_attn.k_proj": attention.k, "self_attn.v_proj": attention.v}
    linears |= {"self_attn.o_proj": attention.attn_out, "mlp.gate_proj": mlp.mlp_gate, "mlp.up_proj": mlp.mlp_in}
    linears["mlp.down_proj"] = mlp.mlp_out
    found = {name: linear.effective_weight() for name, linear in linears.items()}
    of_attention, of_mlp = family.norms
    found |= {of_attention: _gain(block.attention_norms[0]), of_mlp: _gain(block.mlp_norms[0])}
    if config.kappa is not None:
        gain_K = torch.full((config.head_width,), math.sqrt(config.kappa))
        found |= {"self_attn.q_norm": gain_K, "self_attn.k_norm": gain_K.clone()}
    elif _norms_queries(config):
        found |= {"self_attn.q_norm": _gain(attention.q_norm), "self_attn.k_norm": _gain(attention.k_norm)}
    # All three classes divide q.k by sqrt(d_head). Another factor of q goes into the gain of its norm, or into its
    # projection if there is no norm. The rotation does not change it, but a norm after the projection would remove it.
    surplus = attention.scale * math.sqrt(config.head_width)
    if not math.isclose(surplus, 1.0):
        last = "self_attn.q_norm" if "self_attn.q_norm" in found else "self_attn.q_proj"
        found[last] = found[last] * surplus
    return found


def masks(model: Transformer, family: Family, pruned: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Name of each pruned tensor in an export -> whether each of its weights is pruned. pruned: the same by the names
    of `model`, which is changed: it gets zeros where a weight is pruned and ones elsewhere."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0)
            if name in pruned:
                parameter.masked_fill_(pruned[name], 0.0)
    found = {name: value == 0 for name, value in weights(model, family).items()}
    return {name: mask for name, mask in found.items() if mask.any()}


def _gain(norm: nn.Module) -> torch.Tensor:
    """The learned gain of a norm that has one."""
    return norm.get_parameter("weight")


def folded(model: Transformer) -> list[str]:
    """The settings of the model that an export folds into the weights, as printed text."""
    config, found = model.config, []
    scales = [block.attention.scale for block in model.typed_blocks]
    if any(not math.isclose(scale * math.sqrt(config.head_width), 1.0) for scale in scales):
        found.append("attention scale 1/d_head")
    if config.kappa is not None:
        found.append(f"model.kappa={config.kappa}")
    if LINEARS[config.linear].makes_weight_anew:
        found.append(f"model.linear={config.linear}")
    return found


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
    lines = [
        f"{family.architecture}, {sum(x.numel() for x in model.parameters()):,} parameters in fp32: step {step:,} of "
        f"run {folder.resolve().name}{', the average of its weights' if average else ''}",
        f"folded into its weights: {', '.join(folded(model)) or 'nothing'}",
        _tokenizer_line(data.manifest["tokenizer"]),
    ]
    if pruned:
        n = sum(int(mask.sum()) for mask in pruned.values())
        lines.append(f"{n:,} weights are pruned: they are zero, and {MASKS_FILE} has them as true")
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
        for file in work.glob("*.safetensors"):
            shutil.copymode(work / "config.json", file)  # other users cannot read a file of safetensors
        write_text(work / "README.md", _readme(run, family, [*lines, _training_line(length, eos_id)]))
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


def _training_line(length: int, eos_id: int | None) -> str:
    documents = "" if eos_id is None else ", in which each document ends with EOS and none starts with BOS"
    return f"trained on sequences of {length:,} tokens{documents}"


def _readme(run: RunConfig, family: Family, lines: list[str]) -> str:
    facts = "".join(f"- {line}\n" for line in lines)
    return (
        f"# {run.name}\n\nA checkpoint of the scaling testbed, for `transformers.{family.architecture}`.\n\n{facts}"
        f"\nThe model:\n\n```\n{json.dumps(_plain(run.model), indent=1)}\n```\n"
    )


def _plain(config: ModelConfig) -> dict:
    return {key: value for key, value in vars(config).items() if value is not None}
