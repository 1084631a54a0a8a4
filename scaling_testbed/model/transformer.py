"""The decoder-only Transformer.

    tokens -> embedding -> n_layers x (attention, MLP, each in the residual layout) -> final norm -> head

No biases, rotary positions, fp32 parameters. The residual stream is fp32 unless Transformer.narrow_residual is set.
Every choice is in ModelConfig.
Shapes in names: B sequences, T positions, D model width, V vocabulary, R rotated pairs of a head.
"""

from __future__ import annotations

import functools
import hashlib
from concurrent.futures import ThreadPoolExecutor
from typing import cast

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from scaling_testbed.errors import ConfigError
from scaling_testbed.kernels.qk_norm_rope.reference import rotary_tables
from scaling_testbed.kernels.reference import softcap_scores, wide
from scaling_testbed.model.attention import Attention, check_impls, documents_mask
from scaling_testbed.model.config import ModelConfig, ParametrizationConfig
from scaling_testbed.model.layers import Embedding, Linear, cast_for_matmul
from scaling_testbed.model.parametrization import (
    ParameterInfo,
    attention_scale,
    check_parametrization,
    init_std,
)
from scaling_testbed.model.parts import ATTENTION_IMPLS, LINEARS, MLPS, NORMS, RESIDUALS, choose_impl
from scaling_testbed.registry import resolve

# Standard deviation of N(0, 1) truncated to [-2, 2].
TRUNCATED_STD = 0.87962566103423978


class Block(nn.Module):
    """Attention, then MLP, each with the norms of the residual layout. Maps the residual stream [B, T, D] to itself.
    impls: the paths of Attention."""

    def __init__(self, config: ModelConfig, *, scale: float, device=None, **impls: str):
        super().__init__()
        self.n_layers = config.n_layers
        self.residual = resolve(RESIDUALS[config.residual].apply)
        self.attention_norms = _norms(config, device)
        self.attention = Attention(config, scale=scale, device=device, **impls)
        self.mlp_norms = _norms(config, device)
        self.mlp = resolve(MLPS[config.mlp].make)(config, device=device)

    def forward(
        self,
        x_BTD: torch.Tensor,
        cos_TR: torch.Tensor,
        sin_TR: torch.Tensor,
        begins_BT: torch.Tensor | None = None,
        mask_B1TT: torch.Tensor | None = None,
    ) -> torch.Tensor:
        def attend(y_BTD):
            return self.attention(y_BTD, cos_TR, sin_TR, begins_BT, mask_B1TT)

        # Norms are fp32, so a layout may widen the stream. It keeps its type.
        dtype = x_BTD.dtype
        x_BTD = self.residual(x_BTD, attend, self.attention_norms, self.n_layers).to(dtype)
        return self.residual(x_BTD, self.mlp, self.mlp_norms, self.n_layers).to(dtype)


def _norms(config: ModelConfig, device) -> nn.ModuleList:
    make, count = resolve(NORMS[config.norm].make), RESIDUALS[config.residual].norms_per_branch
    return nn.ModuleList(make(config.d_model, config.norm_eps, device=device) for _ in range(count))


@functools.lru_cache(maxsize=4)
def _cpu_tables(length: int, d_head: int, base: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The rotary tables on a CPU, where to compute them takes 2% of a step of 256 tokens."""
    with torch.inference_mode(False):  # a tensor of inference cannot be saved for a backward pass
        return rotary_tables(torch.arange(length, device="cpu"), d_head, base)


class Transformer(nn.Module):
    """The model of a resolved `config`. Its weights are NaN until `init_weights`.

    device                        the device of the parameters; None: PyTorch's default device
    run_on                        the device on which the model will run; None: `device`. The two differ if the model is
                                  built on meta
    attention_impl, qk_norm_impl, qkv_impl
                                  the paths in use: the named paths, or those that `auto` picked for `run_on`
    recompute_every               k: the activations of every k-th block are not kept. The backward pass computes them
                                  again, with bitwise identical results. None: all are kept
    narrow_residual               whether the residual stream has the type of the products: bf16 under autocast to bf16,
                                  and fp32 without autocast

    Raises ConfigError if `config` is not resolved, conflicts with `parametrization`, or names a path that cannot run on
    `run_on`.
    """

    def __init__(
        self,
        config: ModelConfig,
        parametrization: ParametrizationConfig = ParametrizationConfig(),  # noqa: B008 (frozen)
        device=None,
        run_on=None,
    ):
        super().__init__()
        if None in (config.n_kv_heads, config.d_head, config.d_ff, config.vocab_size):
            raise ConfigError("vocab_size must be known to build a model: use config.resolved(vocab_size)")
        check_parametrization(parametrization, config)
        self.config, self.parametrization = config, parametrization
        self.recompute_every: int | None = None
        self.narrow_residual = False
        where = run_on or (torch.get_default_device() if device is None else torch.device(device))
        check_impls(config, where)
        self.attention_impl = choose_impl("attention_impl", config, where)
        self.qk_norm_impl = choose_impl("qk_norm_impl", config, where)
        self.qkv_impl = choose_impl("qkv_impl", config, where)
        scale = attention_scale(parametrization, config)
        impls = {"impl": self.attention_impl, "qk_norm_impl": self.qk_norm_impl, "qkv_impl": self.qkv_impl}
        shrink = config.embedding_gradient_scale
        self.embedding = Embedding(config.known_vocab_size, config.d_model, gradient_scale=shrink, device=device)
        self.blocks = nn.ModuleList(Block(config, scale=scale, device=device, **impls) for _ in range(config.n_layers))
        self.final_norm: nn.Module = nn.Identity()
        self.head: Linear | None = None
        if RESIDUALS[config.residual].final_norm:
            self.final_norm = resolve(NORMS[config.norm].make)(config.d_model, config.norm_eps, device=device)
        if not config.tied_head:
            linear = resolve(LINEARS[config.linear].make)
            self.head = linear(config.d_model, config.known_vocab_size, role="head", device=device)
        self._parameter_info = self._collect_parameter_info()

    def forward(self, tokens_BT: torch.Tensor, begins_BT: torch.Tensor | None = None) -> torch.Tensor:
        """Map token ids [B, T] of any length to fp32 hidden states [B, T, D], normed, for the head.

        begins_BT: for each position the position at which its document begins, which never falls along a sequence. Then
        each document has the hidden states that it has alone: its positions count from 0, and no query sees a key of
        another document. None: the documents of a sequence are not told apart.
        """
        x_BTD = self.embedding(tokens_BT)
        if self.narrow_residual:
            x_BTD = cast_for_matmul(x_BTD)
        shared = self._of_positions(x_BTD, begins_BT)
        for number, block in enumerate(self.blocks):
            if self._is_recomputed(number):
                # A block draws no random numbers. With early_stop, the hooks of sharding would not complete.
                x_BTD = checkpoint(
                    block, x_BTD, *shared, use_reentrant=False, preserve_rng_state=False, early_stop=False
                )
            else:
                x_BTD = block(x_BTD, *shared)
        return wide(self.final_norm(x_BTD))

    def _of_positions(self, x_BTD: torch.Tensor, begins_BT: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        """What all blocks share, in the order of their arguments: cos_TR, sin_TR, begins_BT and mask_B1TT."""
        length, device = x_BTD.shape[1], x_BTD.device
        cos_TR, sin_TR = self._tables(length, device)
        if begins_BT is None:
            return cos_TR, sin_TR, None, None
        positions_BT = torch.arange(length, device=device) - begins_BT
        tables = cos_TR[positions_BT][:, None], sin_TR[positions_BT][:, None]
        mask_B1TT = None
        if ATTENTION_IMPLS[self.attention_impl].masks:
            of_products = cast_for_matmul(x_BTD[:0]).dtype
            mask_B1TT = documents_mask(begins_BT, of_products, self.config.head_width)
        return *tables, begins_BT, mask_B1TT

    def _tables(self, length: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """The rotary tables for a length. A GPU computes them in each pass; they are small and need not be saved."""
        width, base = self.config.head_width, self.config.rope_base
        if device.type == "cpu" and not torch.compiler.is_compiling():
            return _cpu_tables(length, width, base)
        return rotary_tables(torch.arange(length, device=device), width, base)

    def _is_recomputed(self, number: int) -> bool:
        if not self.recompute_every:
            return False
        return number % self.recompute_every == 0 and torch.is_grad_enabled()

    @property
    def typed_blocks(self) -> list[Block]:
        """The blocks, typed as Block. PyTorch types `blocks` as plain modules."""
        return [cast(Block, block) for block in self.blocks]

    @property
    def head_weight_VD(self) -> torch.Tensor:
        """The matrix that maps hidden states to logits: the head's weight, or the embedding if tied."""
        return self.embedding.weight if self.head is None else self.head.effective_weight()

    def logits(self, tokens_BT: torch.Tensor, begins_BT: torch.Tensor | None = None) -> torch.Tensor:
        """fp32 logits [B, T, V], with the softcap of the config. begins_BT: as for `forward`.

        Training does not call this. It passes hidden states and the head's weight to the loss, which need not hold all
        logits at once.
        """
        logits_BTV = wide(F.linear(self(tokens_BT, begins_BT), self.head_weight_VD))
        return softcap_scores(logits_BTV, self.config.final_softcap)

    def parameter_info(self) -> dict[str, ParameterInfo]:
        """Name in `named_parameters` -> role, fan-in and layer of the parameter."""
        return dict(self._parameter_info)

    def _collect_parameter_info(self) -> dict[str, ParameterInfo]:
        layer_of = {module: layer for layer, block in enumerate(self.blocks) for module in block.modules()}
        return {
            f"{path}.weight": ParameterInfo(role=module.role, fan_in=module.fan_in, layer=layer_of.get(module))
            for path, module in self.named_modules()
            if hasattr(module, "role")
        }

    def init_weights(self, seed: int) -> None:
        """Draw every parameter.

        A draw depends only on `seed` and on the parameter's name, shape and std. It does not depend on the device, the
        global random state or the other parameters, so threads can draw in parallel: billions of normal numbers take a
        minute on one core.
        """

        def draw(named: tuple[str, nn.Parameter]) -> None:
            with torch.no_grad():
                named[1].copy_(self.initial_weight(named[0], seed))

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(draw, self.named_parameters()))
        for module in self.modules():
            if isinstance(module, Linear):
                module.start()

    def initial_weight(self, name: str, seed: int) -> torch.Tensor:
        """The whole initial value of one parameter, fp32 on the CPU. A process may keep only a shard of it.

        Gains are one. Embeddings are normal. Other weights are normal, truncated at two standard deviations and scaled
        so that their std after the truncation is parametrization.init_std (arXiv 2309.14322, section 2.1).
        """
        info = self._parameter_info[name]
        value = torch.empty(self.get_parameter(name).shape, dtype=torch.float32, device="cpu")
        std = init_std(self.parametrization, info, self.config)
        if std == 0.0:
            return value.fill_(1.0 if info.role == "norm" else 0.0)
        digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
        generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest[:4], "little"))
        if info.role == "embedding":
            return value.normal_(0.0, std, generator=generator)
        sigma = std / TRUNCATED_STD
        return nn.init.trunc_normal_(value, 0.0, sigma, -2 * sigma, 2 * sigma, generator=generator)
