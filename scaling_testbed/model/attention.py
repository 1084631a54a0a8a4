"""Causal self-attention: norm and rotation of q and k -> scores -> scale -> softcap -> normaliser -> values.

Shapes in names: B sequences, T positions, D model width, H query heads, G key and value heads,
K features of a head, R = K/2 rotated pairs.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from scaling_testbed.errors import ConfigError
from scaling_testbed.kernels.attention import reference
from scaling_testbed.kernels.qk_norm_rope.rotation import rotate
from scaling_testbed.kernels.reference import wide, without_autocast
from scaling_testbed.model.config import ModelConfig
from scaling_testbed.model.layers import Gain, cast_for_matmul
from scaling_testbed.model.parts import (
    ATTENTION_IMPLS,
    AUTO,
    IMPLS,
    LINEARS,
    NORMALISERS,
    QK_NORM_IMPLS,
    QKV_IMPLS,
    SDPA_WIDENED_ON_CPU,
)
from scaling_testbed.registry import resolve


class QKNorm(Gain):
    """Norm of queries or keys with a learned gain; the result is fp32. norm: parts.QKNorm.function."""

    def __init__(self, norm, width: int, eps: float, *, device=None):
        super().__init__(width, eps, device=device)
        self.norm = norm

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x, self.weight, self.eps)


class FixedQKNorm(nn.Module):
    """factor * norm(x), without a gain; the result is fp32. norm: parts.QKNorm.function."""

    def __init__(self, norm, eps: float, *, factor: float = 1.0):
        super().__init__()
        self.norm, self.eps, self.factor = norm, eps, factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.factor * self.norm(x, None, self.eps)


def make_qk_norm(config: ModelConfig, n_heads: int, device=None) -> QKNorm | FixedQKNorm | nn.Identity:
    """The norm of queries or keys of `n_heads` heads, or nn.Identity without a norm.

    With kappa it is sqrt(kappa) z / RMS(z), which sets the size of the attention logits (arXiv 2309.14322, Fig. 10).
    """
    part = config.query_key_norm
    if part.function is None:
        return nn.Identity()
    norm = resolve(part.function)
    if not part.gains:
        return FixedQKNorm(norm, config.norm_eps, factor=math.sqrt(config.kappa or 1.0))
    width = n_heads * config.head_width if config.norms_heads_together else config.head_width
    return QKNorm(norm, width, config.norm_eps, device=device)


# Paths of attention, with the arguments of reference.attention.


def sdpa_attention(
    q_BHTK,
    k_BGTK,
    v_BGTK,
    *,
    scale,
    softcap=None,
    window=None,
    normaliser=reference.softmax,
    begins_BT=None,
    mask_B1TT=None,
):
    """PyTorch's fused attention, with the softmax only. Small heads in bf16 on a CPU are computed in fp32, and the
    result is rounded to bf16. mask_B1TT: the documents_mask of begins_BT, which all layers share."""
    if softcap is not None or window is not None or normaliser is not reference.softmax:
        raise ValueError("sdpa has no softcap, no window and no normaliser except softmax")
    if begins_BT is not None and mask_B1TT is None:
        mask_B1TT = documents_mask(begins_BT, q_BHTK.dtype, k_BGTK.shape[3])
    options = {"is_causal": mask_B1TT is None, "attn_mask": mask_B1TT}
    options |= {"scale": scale, "enable_gqa": q_BHTK.shape[1] != k_BGTK.shape[1]}
    if not _is_widened(q_BHTK.dtype, q_BHTK.device, k_BGTK.shape[2] * k_BGTK.shape[3]):
        return F.scaled_dot_product_attention(q_BHTK, k_BGTK, v_BGTK, **options)
    with without_autocast(q_BHTK.device.type):  # it would round the widened tensors again
        wide_BHTK = F.scaled_dot_product_attention(wide(q_BHTK), wide(k_BGTK), wide(v_BGTK), **options)
    return wide_BHTK.to(q_BHTK.dtype)


def _is_widened(dtype: torch.dtype, device: torch.device, keys: int) -> bool:
    """Whether sdpa computes heads with so many numbers in their keys in fp32."""
    return keys <= SDPA_WIDENED_ON_CPU and dtype is torch.bfloat16 and device.type == "cpu"


def documents_mask(begins_BT: torch.Tensor, dtype: torch.dtype, d_head: int) -> torch.Tensor:
    """[B, 1, T, T]: 0 where a query sees a key of its document, else -inf, in the type in which sdpa computes queries
    of type `dtype`. begins_BT: as of reference.attention. PyTorch would make a mask of this type of a Boolean one in
    each layer, and keep it."""
    T = begins_BT.shape[1]
    if _is_widened(dtype, begins_BT.device, T * d_head):
        dtype = torch.float32
    allowed_B1TT = reference.allowed_keys(T, None, begins_BT.device, begins_BT)
    zero = torch.zeros((), dtype=dtype, device=begins_BT.device)
    return torch.where(allowed_B1TT, zero, float("-inf"))


def triton_attention(q_BHTK, k_BGTK, v_BGTK, *, normaliser=reference.softmax, **options):
    """Attention by the Triton kernel."""
    from scaling_testbed.kernels.attention.triton import attention  # this path is chosen only if Triton is installed

    if normaliser is not reference.softmax:
        raise ValueError("the Triton kernel has no normaliser except softmax")
    return attention(q_BHTK, k_BGTK, v_BGTK, **options)


def triton_statistics(q_BHTK, k_BGTK, *, normaliser=reference.softmax, **options) -> reference.AttentionStatistics:
    """reference.attention_statistics by the Triton kernel."""
    from scaling_testbed.kernels.attention.triton import attention

    if normaliser is not reference.softmax:
        raise ValueError("the Triton kernel has no normaliser except softmax")
    return attention(q_BHTK, k_BGTK, k_BGTK, return_statistics=True, **options)[1]


# Paths of the products. They return q_BTD, k_BTD and v_BTD in the type of the products.


def separate_products(attention: Attention, x_BTD) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Three products."""
    return attention.q(x_BTD), attention.k(x_BTD), attention.v(x_BTD)


def one_product(attention: Attention, x_BTD) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One product with the three weights side by side."""
    weights = [cast_for_matmul(linear.weight) for linear in (attention.q, attention.k, attention.v)]
    q_BTD, k_BTD, v_BTD = F.linear(x_BTD, torch.cat(weights)).split([len(weight) for weight in weights], dim=-1)
    return q_BTD, k_BTD, v_BTD


class Products(nn.Module):
    """Calls a path of the products. It is a module so that hooks see its results on every path."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, attention: Attention, x_BTD) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        q_BTD, k_BTD, v_BTD = self.function(attention, x_BTD)
        return q_BTD, k_BTD, v_BTD


# Paths of the norm and rotation. They return normed and rotated q_BHTK and k_BGTK in the type of the projections.


def plain_queries_and_keys(attention: Attention, q_BTD, k_BTD, cos_TR, sin_TR) -> tuple[torch.Tensor, torch.Tensor]:
    """Apply the norms of `attention`, then the rotation."""
    normed = attention.normed_heads(q_BTD, k_BTD)
    q_BHTK, k_BGTK = (rotate(x, cos_TR, sin_TR).to(q_BTD.dtype) for x in normed)
    return q_BHTK, k_BGTK


def fused_queries_and_keys(attention: Attention, q_BTD, k_BTD, cos_TR, sin_TR) -> tuple[torch.Tensor, torch.Tensor]:
    """Norm and rotate in one Triton kernel. A norm that the kernel lacks is applied before."""
    from scaling_testbed.kernels.qk_norm_rope.triton import qk_norm_rope, rotary

    dtype, kind = q_BTD.dtype, attention.fused_kind
    if kind is None:
        q_BHTK, k_BGTK = attention.normed_heads(q_BTD, k_BTD)
        return rotary(q_BHTK, k_BGTK, cos_TR, sin_TR, out_dtype=dtype)
    q_norm, k_norm = attention.q_norm, attention.k_norm
    assert isinstance(q_norm, QKNorm) and isinstance(k_norm, QKNorm), "a norm that the kernel supports has a gain"
    q_BHTK, k_BGTK = attention.heads(q_BTD), attention.heads(k_BTD)
    gains, together = (q_norm.weight, k_norm.weight), attention.norm_before_split
    options = {"kind": kind, "eps": q_norm.eps, "heads_together": together, "out_dtype": dtype}
    return qk_norm_rope(q_BHTK, k_BGTK, *gains, cos_TR, sin_TR, **options)


def check_impls(config: ModelConfig, device: torch.device) -> None:
    """Raise ConfigError if `config` names a path that cannot run on `device`."""
    for key, impls in IMPLS.items():
        named = getattr(config, key)
        if named != AUTO and (reason := impls[named].why_not(device)):
            raise ConfigError(f"model.{key}={named} cannot run: {reason}; use model.{key}={AUTO}")


class Attention(nn.Module):
    """Self-attention of one block.

    scale: the factor on q.k. impl: a key of ATTENTION_IMPLS. qk_norm_impl: a key of QK_NORM_IMPLS. qkv_impl: a key of
    QKV_IMPLS. If `records_logits` is set, a forward pass with a gradient also records the largest logit of each head,
    which `take_largest_logits` returns. This changes no other result.
    """

    def __init__(self, config: ModelConfig, *, scale: float, impl: str, qk_norm_impl: str, qkv_impl: str, device=None):
        super().__init__()
        self.n_heads, self.n_kv_heads, self.d_head = config.n_heads, config.kv_heads, config.head_width
        self.scale, self.softcap, self.window = scale, config.attention_softcap, config.attention_window
        self.config, self.impl = config, impl
        self.normaliser = NORMALISERS[config.attention_normaliser]
        self._weigh = resolve(self.normaliser.function)
        self._attend = resolve(ATTENTION_IMPLS[impl].function)
        self._norm_and_rotate = resolve(QK_NORM_IMPLS[qk_norm_impl].function)
        self.products = Products(resolve(QKV_IMPLS[qkv_impl].function))
        self.norm_before_split = config.norms_heads_together
        self.fused_kind = config.query_key_norm.fused_kind
        linear = resolve(LINEARS[config.linear].make)
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
        """The largest scale * q.k of each query head since the last call, before any softcap; fp32 [H].

        Only keys that a query may see count. Raises RuntimeError if no forward pass has recorded logits since the last
        call.
        """
        taken_H, self._largest_logit_H = self._largest_logit_H, None
        if taken_H is None:
            raise RuntimeError("no forward pass with a gradient recorded attention logits since the last call")
        return taken_H

    def _record_logits(self, q_BHTK, k_BGTK, begins_BT) -> None:
        largest_H = reference.largest_scores(q_BHTK, k_BGTK, scale=self.scale, window=self.window, begins_BT=begins_BT)
        before_H = largest_H if self._largest_logit_H is None else self._largest_logit_H
        self._largest_logit_H = torch.maximum(before_H, largest_H)

    def prepare(self, q_BTD, k_BTD, cos_TR, sin_TR) -> tuple[torch.Tensor, torch.Tensor]:
        """Normed and rotated q_BHTK and k_BGTK in the type of the projections q_BTD and k_BTD. The logits are
        scale * q.k."""
        return self._norm_and_rotate(self, q_BTD, k_BTD, cos_TR, sin_TR)

    def normed_heads(self, q_BTD, k_BTD) -> tuple[torch.Tensor, torch.Tensor]:
        """q_BHTK and k_BGTK after the norms and before the rotation; fp32 if a norm was applied."""
        if self.norm_before_split:
            return self.heads(self.q_norm(q_BTD)), self.heads(self.k_norm(k_BTD))
        return self.q_norm(self.heads(q_BTD)), self.k_norm(self.heads(k_BTD))

    @torch.no_grad()
    def statistics(self, q_BHTK, k_BGTK, begins_BT=None) -> reference.AttentionStatistics:
        """Statistics of the scores of normed and rotated queries and keys, from the first path that can compute them.
        begins_BT: as for `forward`.

        If the weights do not sum to one, the entropy is that of the softmax.
        """
        options = {"scale": self.scale, "softcap": self.softcap, "window": self.window}
        if self.normaliser.sums_to_one:
            options["normaliser"] = self._weigh
        if begins_BT is not None:
            options["begins_BT"] = begins_BT
        gather = next(self._gatherers(q_BHTK.device, documents=begins_BT is not None))
        return gather(q_BHTK, k_BGTK, **options)

    def _gatherers(self, device: torch.device, *, documents: bool):
        for name, impl in ATTENTION_IMPLS.items():
            lacks = impl.lacks if self.normaliser.sums_to_one else impl.lacks_scores
            usable = name == self.impl or impl.is_automatic_on(device)
            usable = usable and (impl.documents or not documents)
            if impl.statistics is not None and usable and lacks(self.config) is None:
                yield resolve(impl.statistics)

    def heads(self, x_BTD: torch.Tensor) -> torch.Tensor:
        """A view of x [B, T, heads * K] as [B, heads, T, K]."""
        return x_BTD.unflatten(-1, (-1, self.d_head)).transpose(1, 2)

    def forward(
        self,
        x_BTD: torch.Tensor,
        cos_TR: torch.Tensor,
        sin_TR: torch.Tensor,
        begins_BT: torch.Tensor | None = None,
        mask_B1TT: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Map [B, T, D] to [B, T, D] in the type of the products. cos_TR and sin_TR come from `rotary_tables`; each
        sequence may have its own, [B, 1, T, R]. begins_BT: as of reference.attention. mask_B1TT: their documents_mask,
        if the path takes one."""
        q_BTD, k_BTD, v_BTD = self.products(self, cast_for_matmul(x_BTD))
        q_BHTK, k_BGTK = self.prepare(q_BTD, k_BTD, cos_TR, sin_TR)
        if self.records_logits and torch.is_grad_enabled():
            self._record_logits(q_BHTK, k_BGTK, begins_BT)
        documents = {} if begins_BT is None else {"begins_BT": begins_BT}  # a path from outside may not know them
        if mask_B1TT is not None:
            documents["mask_B1TT"] = mask_B1TT
        out_BHTK = self._attend(
            q_BHTK,
            k_BGTK,
            self.heads(v_BTD),
            scale=self.scale,
            softcap=self.softcap,
            window=self.window,
            normaliser=self._weigh,
            **documents,
        )
        return self.attn_out(out_BHTK.transpose(1, 2).flatten(2))
