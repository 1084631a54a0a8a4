"""The tensors of an exported model, by the names of its class."""

import math

import torch
from torch import nn

from scaling_testbed.exporting.families import MLP_NAMES, Family
from scaling_testbed.model.config import ModelConfig
from scaling_testbed.model.parts import LINEARS, MLPS, RESIDUALS
from scaling_testbed.model.transformer import Block, Transformer

Tensors = dict[str, torch.Tensor]


@torch.no_grad()
def weights(model: Transformer, family: Family) -> Tensors:
    """Name in `family` -> tensor, in fp32, contiguous, on the CPU. A tied head is stored once."""
    found = {f"{family.inner}embed_tokens.weight": model.embedding.weight}
    if RESIDUALS[model.config.residual].final_norm:
        found[f"{family.inner}norm.weight"] = _gain(model.final_norm)
    if model.head is not None:
        found["lm_head.weight"] = model.head_weight_VD
    for number, block in enumerate(model.typed_blocks):
        for name, tensor in _block_weights(block, model.config, family).items():
            found[f"{family.inner}layers.{number}.{name}.weight"] = tensor
    return {name: tensor.detach().float().cpu().contiguous() for name, tensor in found.items()}


def _block_weights(block: Block, config: ModelConfig, family: Family) -> Tensors:
    attention, of_attention, of_mlp = block.attention, *family.norms
    linears = {"self_attn.q_proj": attention.q, "self_attn.k_proj": attention.k, "self_attn.v_proj": attention.v}
    linears |= {"self_attn.o_proj": attention.attn_out}
    linears |= {MLP_NAMES[role]: getattr(block.mlp, role) for role in MLPS[config.mlp].roles}
    found = {name: linear.effective_weight() for name, linear in linears.items()}
    found |= {of_attention.format(number): _gain(norm) for number, norm in enumerate(block.attention_norms)}
    found |= {of_mlp.format(number): _gain(norm) for number, norm in enumerate(block.mlp_norms)}
    if config.query_key_norm.gains:
        found |= {"self_attn.q_norm": _gain(attention.q_norm), "self_attn.k_norm": _gain(attention.k_norm)}
    elif config.query_key_norm.function is not None:
        gain_K = torch.full((config.head_width,), math.sqrt(config.kappa or 1.0))
        found |= {"self_attn.q_norm": gain_K, "self_attn.k_norm": gain_K.clone()}
    # The classes of transformers divide q.k by sqrt(d_head). Another factor of q goes into the gain of its norm, or
    # into its projection if there is no norm. The rotation does not change it, but a norm after the projection would
    # remove it.
    if not family.own_code and not math.isclose(surplus := _surplus(block), 1.0):
        last = "self_attn.q_norm" if "self_attn.q_norm" in found else "self_attn.q_proj"
        found[last] = found[last] * surplus
    return found


def _surplus(block: Block) -> float:
    """The attention scale as a multiple of 1 / sqrt(d_head)."""
    return block.attention.scale * math.sqrt(block.attention.d_head)


def masks(model: Transformer, family: Family, pruned: Tensors) -> Tensors:
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


def folded(model: Transformer, family: Family) -> list[str]:
    """The settings of the model that an export folds into the weights, as printed text."""
    config, found = model.config, []
    if not family.own_code and any(not math.isclose(_surplus(block), 1.0) for block in model.typed_blocks):
        found.append("attention scale 1/d_head")
    if config.kappa is not None:
        found.append(f"model.kappa={config.kappa}")
    if LINEARS[config.linear].makes_weight_anew:
        found.append(f"model.linear={config.linear}")
    return found
