"""Causal self-attention: q, k preparation (norm, rotation) -> scale -> softcap -> normaliser -> values.

Shapes in names: B sequences, T positions, D model width, H query heads, G key and value heads,
K features of a head, R = K/2 rotated pairs.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from scaling_testbed.kernels import reference
from scaling_testbed.model.config import ModelConfig
from scaling_testbed.model.layers import Gain, Linear, cast_for_matmul


class QKNorm(Gain):
    """Norm of queries or keys with a learned gain; the result is fp32."""

    def __init__(self, width: int, kind: str, eps: float, *, device=None):
        super().__init__(width, eps, device=device)
        self.kind = kind

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return reference.qk_norm(x, self.weight, self.kind, self.eps)


class KappaNorm(nn.Module):
    """sqrt(kappa) z / RMS(z), to impose the size of the attention logits (arXiv 2309.14322, Fig. 10)."""

    def __init__(self, kappa: float, eps: float):
        super().__init__()
        self.root_kappa = math.sqrt(kappa)
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.root_kappa * reference.qk_norm(x, None, "rmsnorm", self.eps)


def make_qk_norm(config: ModelConfig, n_heads: int, device=None) -> nn.Module:
    """The norm of queries (n_heads of them) or keys (n_kv_heads): QKNorm, KappaNorm or nothing."""
    if config.kappa is not None:
        return KappaNorm(config.kappa, config.norm_eps)
    if config.qk_norm == "none":
        return nn.Identity()
    width = config.d_head if config.qk_norm_axis == "head" else n_heads * config.d_head
    return QKNorm(width, config.qk_norm, config.norm_eps, device=device)


def sdpa_attention(q_BHTK, k_BGTK, v_BGTK, *, scale: float, softcap: None = None, normaliser: str = "softmax"):
    """PyTorch's fused attention, with reference.attention's arguments: the plain softmax of it, no more."""
    if softcap is not None or normaliser != "softmax":
        raise ValueError("fused attention has neither softcap nor another normaliser than softmax")
    grouped = q_BHTK.shape[1] != k_BGTK.shape[1]
    return F.scaled_dot_product_attention(q_BHTK, k_BGTK, v_BGTK, is_causal=True, scale=scale, enable_gqa=grouped)


ATTENTION_IMPLS = {"reference": reference.attention, "sdpa": sdpa_attention}


def choose_attention_impl(config: ModelConfig) -> str:
    """The path `config.attention_impl` means: auto is sdpa where sdpa can compute what the config asks for. A
    named path that could not run has been refused by ModelConfig."""
    if config.attention_impl != "auto":
        return config.attention_impl
    plain = config.attention_softcap is None and config.attention_normaliser == "softmax"
    return "sdpa" if plain else "reference"


class Attention(nn.Module):
    """Self-attention of one block. `scale` multiplies q.k; `impl` is a key of ATTENTION_IMPLS."""

    def __init__(self, config: ModelConfig, *, scale: float, impl: str, device=None):
        super().__init__()
        self.n_heads, self.n_kv_heads, self.d_head = config.n_heads, config.n_kv_heads, config.d_head
        self.scale, self.softcap = scale, config.attention_softcap
        self.normaliser, self.impl = config.attention_normaliser, impl
        self.norm_before_split = config.qk_norm_axis == "full" and config.kappa is None
        queries, keys = self.n_heads * self.d_head, self.n_kv_heads * self.d_head
        self.q = Linear(config.d_model, queries, role="q", device=device)
        self.k = Linear(config.d_model, keys, role="k", device=device)
        self.v = Linear(config.d_model, keys, role="v", device=device)
        self.attn_out = Linear(queries, config.d_model, role="attn_out", device=device)
        self.q_norm = make_qk_norm(config, self.n_heads, device)
        self.k_norm = make_qk_norm(config, self.n_kv_heads, device)

    def queries_and_keys(self, x_BTD, cos_TR, sin_TR) -> tuple[torch.Tensor, torch.Tensor]:
        """Normed and rotated q_BHTK and k_BGTK, fp32 where they were normed; scale * q.k are the logits."""
        q_BHTK = self._prepare(self.q(x_BTD), self.q_norm, self.n_heads, cos_TR, sin_TR)
        k_BGTK = self._prepare(self.k(x_BTD), self.k_norm, self.n_kv_heads, cos_TR, sin_TR)
        return q_BHTK, k_BGTK

    def _prepare(self, x, norm, n_heads, cos_TR, sin_TR):
        split = (n_heads, self.d_head)
        x_BTHK = norm(x).unflatten(-1, split) if self.norm_before_split else norm(x.unflatten(-1, split))
        return reference.apply_rotary(x_BTHK.transpose(1, 2), cos_TR, sin_TR)

    def forward(self, x_BTD: torch.Tensor, cos_TR: torch.Tensor, sin_TR: torch.Tensor) -> torch.Tensor:
        """[B, T, D] -> [B, T, D] in the type of the products; the tables are reference.rotary_tables'."""
        x_BTD = cast_for_matmul(x_BTD)
        q_BHTK, k_BGTK = self.queries_and_keys(x_BTD, cos_TR, sin_TR)
        v_BGTK = self.v(x_BTD).unflatten(-1, (self.n_kv_heads, self.d_head)).transpose(1, 2)
        out_BHTK = ATTENTION_IMPLS[self.impl](
            q_BHTK.to(v_BGTK.dtype),
            k_BGTK.to(v_BGTK.dtype),
            v_BGTK,
            scale=self.scale,
            softcap=self.softcap,
            normaliser=self.normaliser,
        )
        return self.attn_out(out_BHTK.transpose(1, 2).flatten(2))
