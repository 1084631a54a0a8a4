"""Causal self-attention: q, k preparation (norm, rotation) -> scale -> softcap -> normaliser -> values.

Shapes in names: B sequences, T positions, D model width, H query heads, G key and value heads,
K features of a head, R = K/2 rotated pairs.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from scaling_testbed.errors import ConfigError
from scaling_testbed.kernels import support
from scaling_testbed.kernels.attention import reference
from scaling_testbed.kernels.qk_norm_rope.reference import apply_rotary, qk_norm
from scaling_testbed.model.config import TRITON_D_HEADS, TRITON_WIDEST_QK_HEAD, ModelConfig
from scaling_testbed.model.layers import LINEARS, Gain, cast_for_matmul


class QKNorm(Gain):
    """Norm of queries or keys with a learned gain; the result is fp32."""

    def __init__(self, width: int, kind: str, eps: float, *, device=None):
        super().__init__(width, eps, device=device)
        self.kind = kind

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return qk_norm(x, self.weight, self.kind, self.eps)


class KappaNorm(nn.Module):
    """sqrt(kappa) z / RMS(z), to impose the size of the attention logits (arXiv 2309.14322, Fig. 10)."""

    def __init__(self, kappa: float, eps: float):
        super().__init__()
        self.root_kappa = math.sqrt(kappa)
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.root_kappa * qk_norm(x, None, "rmsnorm", self.eps)


def make_qk_norm(config: ModelConfig, n_heads: int, device=None) -> nn.Module:
    """The norm of queries (n_heads of them) or keys (n_kv_heads): QKNorm, KappaNorm or nothing."""
    if config.kappa is not None:
        return KappaNorm(config.kappa, config.norm_eps)
    if config.qk_norm == "none":
        return nn.Identity()
    width = config.d_head if config.qk_norm_axis == "head" else n_heads * config.d_head
    return QKNorm(width, config.qk_norm, config.norm_eps, device=device)


def sdpa_attention(q_BHTK, k_BGTK, v_BGTK, *, scale, softcap=None, window=None, normaliser="softmax"):
    """PyTorch's fused attention, with reference.attention's arguments: the plain softmax of it, no more."""
    if softcap is not None or window is not None or normaliser != "softmax":
        raise ValueError("sdpa has no softcap, no window and no other normaliser than softmax")
    grouped = q_BHTK.shape[1] != k_BGTK.shape[1]
    return F.scaled_dot_product_attention(q_BHTK, k_BGTK, v_BGTK, is_causal=True, scale=scale, enable_gqa=grouped)


def triton_attention(q_BHTK, k_BGTK, v_BGTK, *, normaliser="softmax", **options):
    """The Triton kernel, with reference.attention's arguments."""
    from scaling_testbed.kernels.attention.triton import attention  # where it is chosen, Triton is there

    if normaliser != "softmax":
        raise ValueError("the Triton kernel has no other normaliser than softmax")
    return attention(q_BHTK, k_BGTK, v_BGTK, **options)


ATTENTION_IMPLS = {"reference": reference.attention, "sdpa": sdpa_attention, "triton": triton_attention}


def check_impls(config: ModelConfig, device: torch.device) -> None:
    """Raise ConfigError where `config` names a path that cannot run on `device`."""
    for key in ("attention_impl", "qk_norm_impl"):
        if getattr(config, key) == "triton" and (reason := support.why_not(device)):
            raise ConfigError(f"model.{key}=triton cannot run: {reason}; use model.{key}=auto")


def choose_attention_impl(config: ModelConfig, device: torch.device) -> str:
    """The path that the resolved `config.attention_impl` means on `device`: auto is sdpa where sdpa can compute what
    the config asks for, else triton on a GPU that can, else reference."""
    if config.attention_impl != "auto":
        return config.attention_impl
    softmax = config.attention_normaliser == "softmax"
    if softmax and config.attention_softcap is None and config.attention_window is None:
        return "sdpa"
    fits = softmax and config.d_head in TRITON_D_HEADS
    return "triton" if fits and device.type == "cuda" and support.why_not(device) is None else "reference"


def choose_qk_norm_impl(config: ModelConfig, device: torch.device) -> str:
    """The path that `config.qk_norm_impl` means on `device`: auto is triton on a GPU that can, else reference."""
    if config.qk_norm_impl != "auto":
        return config.qk_norm_impl
    fits = config.d_head <= TRITON_WIDEST_QK_HEAD
    return "triton" if fits and device.type == "cuda" and support.why_not(device) is None else "reference"


class Attention(nn.Module):
    """Self-attention of one block. `scale` multiplies q.k; `impl` is a key of ATTENTION_IMPLS, `qk_norm_impl`
    reference or triton. Where `records_logits` is set, a forward pass with a gradient also finds the largest logit of
    each head, which `take_largest_logits` gives; it changes no other result."""

    def __init__(self, config: ModelConfig, *, scale: float, impl: str, qk_norm_impl: str, device=None):
        super().__init__()
        self.n_heads, self.n_kv_heads, self.d_head = config.n_heads, config.n_kv_heads, config.d_head
        self.scale, self.softcap, self.window = scale, config.attention_softcap, config.attention_window
        self.normaliser, self.impl, self.qk_norm_impl = config.attention_normaliser, impl, qk_norm_impl
        self.norm_before_split = config.qk_norm_axis == "full" and config.kappa is None
        linear = LINEARS[config.linear]
        queries, keys = self.n_heads * self.d_head, self.n_kv_heads * self.d_head
        self.q = linear(config.d_model, queries, role="q", device=device)
        self.k = linear(config.d_model, keys, role="k", device=device)
        self.v = linear(config.d_model, keys, role="v", device=device)
        self.attn_out = linear(queries, config.d_model, role="attn_out", device=device)
        self.q_norm = make_qk_norm(config, self.n_heads, device)
        self.k_norm = make_qk_norm(config, self.n_kv_heads, device)
        self.records_logits = False
        self._largest_logit_H: torch.Tensor | None = None

    def take_largest_logits(self) -> torch.Tensor:
        """The largest scale * q.k of each query head that a query could see since the last call, before any softcap;
        fp32 [H]."""
        taken_H, self._largest_logit_H = self._largest_logit_H, None
        return taken_H

    def _record_logits(self, q_BHTK, k_BGTK) -> None:
        largest_H = reference.largest_scores(q_BHTK, k_BGTK, scale=self.scale, window=self.window)
        before_H = largest_H if self._largest_logit_H is None else self._largest_logit_H
        self._largest_logit_H = torch.maximum(before_H, largest_H)

    def queries_and_keys(self, x_BTD, cos_TR, sin_TR) -> tuple[torch.Tensor, torch.Tensor]:
        """Normed and rotated q_BHTK and k_BGTK in the type of the products; scale * q.k are the logits."""
        return self.prepare(self.q(x_BTD), self.k(x_BTD), cos_TR, sin_TR)

    def prepare(self, q_BTD, k_BTD, cos_TR, sin_TR) -> tuple[torch.Tensor, torch.Tensor]:
        """`queries_and_keys` from the projections."""
        dtype = q_BTD.dtype
        if self.qk_norm_impl == "triton":
            return self._fused_queries_and_keys(q_BTD, k_BTD, cos_TR, sin_TR, dtype)
        q_BHTK, k_BGTK = self.normed_heads(q_BTD, k_BTD)
        return tuple(apply_rotary(x, cos_TR, sin_TR).to(dtype) for x in (q_BHTK, k_BGTK))

    def _fused_queries_and_keys(self, q_BTD, k_BTD, cos_TR, sin_TR, dtype):
        """One kernel norms and rotates; a norm that it does not know (over the full width, or kappa's) comes before."""
        from scaling_testbed.kernels.qk_norm_rope.triton import qk_norm_rope, rotary

        if isinstance(self.q_norm, QKNorm) and not self.norm_before_split:
            q_BHTK, k_BGTK = self._heads(q_BTD), self._heads(k_BTD)
            gains, kind, eps = (self.q_norm.weight, self.k_norm.weight), self.q_norm.kind, self.q_norm.eps
            return qk_norm_rope(q_BHTK, k_BGTK, *gains, cos_TR, sin_TR, kind=kind, eps=eps, out_dtype=dtype)
        return rotary(*self.normed_heads(q_BTD, k_BTD), cos_TR, sin_TR, out_dtype=dtype)

    def normed_heads(self, q_BTD, k_BTD):
        """q_BHTK and k_BGTK, fp32 where they were normed, not rotated."""
        if self.norm_before_split:
            return self._heads(self.q_norm(q_BTD)), self._heads(self.k_norm(k_BTD))
        return self.q_norm(self._heads(q_BTD)), self.k_norm(self._heads(k_BTD))

    @torch.no_grad()
    def statistics(self, q_BHTK, k_BGTK) -> reference.AttentionStatistics:
        """Of the scores of normed and rotated queries and keys, with the softmax: from the Triton kernel where it can
        run."""
        options = {"scale": self.scale, "softcap": self.softcap, "window": self.window}
        on_gpu = q_BHTK.device.type == "cuda" and support.why_not(q_BHTK.device) is None
        if self.impl == "triton" or (on_gpu and self.d_head in TRITON_D_HEADS):
            from scaling_testbed.kernels.attention.triton import attention

            return attention(q_BHTK, k_BGTK, k_BGTK, return_statistics=True, **options)[1]
        return reference.attention_statistics(q_BHTK, k_BGTK, **options)

    def _heads(self, x_BTD):
        """[B, T, heads * K] -> [B, heads, T, K], a view."""
        return x_BTD.unflatten(-1, (-1, self.d_head)).transpose(1, 2)

    def forward(self, x_BTD: torch.Tensor, cos_TR: torch.Tensor, sin_TR: torch.Tensor) -> torch.Tensor:
        """[B, T, D] -> [B, T, D] in the type of the products; the tables are rotary_tables'."""
        x_BTD = cast_for_matmul(x_BTD)
        q_BHTK, k_BGTK = self.queries_and_keys(x_BTD, cos_TR, sin_TR)
        if self.records_logits and torch.is_grad_enabled():
            self._record_logits(q_BHTK, k_BGTK)
        out_BHTK = ATTENTION_IMPLS[self.impl](
            q_BHTK,
            k_BGTK,
            self._heads(self.v(x_BTD)),
            scale=self.scale,
            softcap=self.softcap,
            window=self.window,
            normaliser=self.normaliser,
        )
        return self.attn_out(out_BHTK.transpose(1, 2).flatten(2))
