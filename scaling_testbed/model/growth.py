"""A larger model from the weights of a smaller one: twice the width, more layers, or both.

Width (function-preserving initialisation, bert2BERT, arXiv 2110.07143, as AquilaMoE uses it, arXiv 2408.06567): every
channel of the residual stream, every unit of an MLP and every head is there twice. A matrix that reads the two copies
of an input gives each half of the old weight, so that all results stay what they were. Heads are copied whole, with
their key and value heads, and the width of a head stays.

Equal copies get equal gradients for ever: such a model would stay the small one. So antisymmetric noise is added: +e to
the weights that read the first copy, and -e to those that read the second. It cancels as long as the copies are equal,
and lets them part in training.

Depth: `zero` adds blocks on top whose last matrices are zero, so that they change nothing at first; `repeat` puts each
block several times in place, and `stack` all blocks several times one after the other. The last two change the results.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping

import torch

from scaling_testbed.errors import ConfigError
from scaling_testbed.model.config import GrowthConfig, ModelConfig
from scaling_testbed.model.parametrization import HIDDEN_ROLES, ParameterInfo
from scaling_testbed.model.parts import LINEARS, RESIDUALS

LAYER = "blocks.{}."
LAST = ("attn_out", "mlp_out")  # the roles of the matrices that write into the residual stream


def check_growth(old: ModelConfig, new: ModelConfig, how: GrowthConfig) -> None:
    """Raise ConfigError, which names the key, unless `how` makes a model `new` of a model `old`; both are resolved."""
    keys = ("d_model", "n_heads", "n_kv_heads", "d_ff")
    for name in keys:
        factor = 1 if how.width is None else 2
        if getattr(new, name) != factor * getattr(old, name):
            wide = "with start.grow.width" if how.width else "without start.grow.width"
            raise ConfigError(
                f"model.{name} must be {factor * getattr(old, name)} {wide}, as that of the parent is "
                f"{getattr(old, name)}; got {getattr(new, name)}"
            )
    if new.d_head != old.d_head:
        raise ConfigError(f"model.d_head must be that of the parent, {old.d_head}, because heads are copied whole")
    if how.width and new.tied_head:
        raise ConfigError("start.grow.width needs model.tied_head=false: a tied head would double the logits")
    if LINEARS[new.linear].makes_weight_anew:
        raise ConfigError(
            f"start.grow cannot be with model.linear={new.linear}, which makes another matrix of its weights"
        )
    if how.depth is None and new.n_layers != old.n_layers:
        raise ConfigError(f"model.n_layers must be {old.n_layers} without start.grow.depth; got {new.n_layers}")
    if how.depth is not None and new.n_layers <= old.n_layers:
        raise ConfigError(f"model.n_layers must be above {old.n_layers} with start.grow.depth; got {new.n_layers}")
    if how.depth in ("repeat", "stack") and (not old.n_layers or new.n_layers % old.n_layers):
        raise ConfigError(
            f"model.n_layers must be a multiple of {old.n_layers} with start.grow.depth={how.depth}; got {new.n_layers}"
        )
    if how.depth == "zero" and not RESIDUALS[new.residual].skips_zero:
        able = " or ".join(name for name, layout in RESIDUALS.items() if layout.skips_zero)
        raise ConfigError(f"start.grow.depth=zero needs model.residual={able}; got {new.residual}")


def grow(
    weights: Mapping[str, torch.Tensor],
    old: ModelConfig,
    new: ModelConfig,
    how: GrowthConfig,
    info: Mapping[str, ParameterInfo],
    shapes: Mapping[str, torch.Size],
    initial: Callable[[str], torch.Tensor],
    seed: int,
) -> dict[str, torch.Tensor]:
    """The weights of a model `new`, by name, from those of a model `old`; whole tensors on the CPU.

    info, shapes: of the parameters of `new`. initial: the name of a parameter -> its value in a new model, for new
    blocks. seed: of the noise. A value depends only on the seed, the name and the weights. Raises ConfigError as
    `check_growth`.
    """
    check_growth(old, new, how)
    made = {}
    for name, about in info.items():
        source = None if about.layer is None else _source(about.layer, old, new, how)
        if source is not None and source < 0:  # a block that the parent does not have
            made[name] = torch.zeros(shapes[name]) if about.role in LAST else initial(name)
            continue
        there = name if source is None else name.replace(LAYER.format(about.layer), LAYER.format(source), 1)
        value = weights[there]
        if how.width is not None:
            above = name.replace(LAYER.format(about.layer), LAYER.format((source or 0) + 1), 1)
            more = weights.get(above, value) if how.width == "aki" and source is not None else value
            value = _widened(value, more, about.role, name, shapes[name], how.noise, seed)
        made[name] = value
    return made


def _source(layer: int, old: ModelConfig, new: ModelConfig, how: GrowthConfig) -> int:
    """The layer of the parent that a layer comes from; -1 if it comes from none."""
    if how.depth == "repeat":
        return layer // (new.n_layers // old.n_layers)
    if how.depth == "stack":
        return layer % old.n_layers
    return layer if layer < old.n_layers else -1


def _widened(
    value: torch.Tensor, more: torch.Tensor, role: str, name: str, shape: torch.Size, noise: float, seed: int
) -> torch.Tensor:
    """A tensor of the wider model. more: where the rows of the second copies come from."""
    if role == "embedding":
        return torch.cat([value, value], dim=1)
    if role == "head":
        return torch.cat([value / 2, value / 2], dim=1)
    if role not in HIDDEN_ROLES:  # gains; those of a norm over a head are shared by all heads
        return value if value.shape == shape else torch.cat([value, value])
    half = torch.cat([value, more]) / 2
    if not noise:
        return torch.cat([half, half], dim=1)
    digest = hashlib.sha256(f"{seed}/grow/{name}".encode()).digest()
    generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest[:4], "little"))
    std = noise * value.square().mean().sqrt().item()
    apart = std * torch.randn(half.shape, generator=generator)
    return torch.cat([half + apart, half - apart], dim=1)
