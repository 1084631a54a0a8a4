"""Statistics of a forward pass, measured by hooks that do not change it. names.py defines each statistic.

Shapes in names: B sequences, T positions, D model width, H query heads, G key heads, K features of a head, N tokens,
V vocabulary.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F

from scaling_testbed.diagnostics.reductions import LARGEST, MEAN, RMS, SMALLEST, Reductions
from scaling_testbed.diagnostics.states import Hooked
from scaling_testbed.kernels.reference import softcap_scores, wide
from scaling_testbed.model.attention import Attention, QKNorm
from scaling_testbed.model.transformer import Transformer

LOGITS_BYTES = 2**28  # bytes of logits held at once


class ForwardProbe(Hooked):
    """A context in which every forward pass of `model` adds its statistics to `found`. Use it under no_grad."""

    def __init__(self, model: Transformer, found: Reductions, *, per_head: bool = False):
        super().__init__()
        self.model, self.found, self.per_head = model, found, per_head
        self._raw: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def __enter__(self):
        for number, block in enumerate(self.model.typed_blocks):
            attention = block.attention
            self._hook(attention.products, partial(self._keep, number))
            self._hook(attention, partial(self._attention, number))
            self._hook(block.mlp, partial(self._rms, f"mlp_out_rms/{number}"))
            self._hook(block, partial(self._rms, f"residual_rms/{number}"))
        self._hook(self.model.final_norm, self._hidden)
        return self

    def __exit__(self, *_):
        super().__exit__()
        self._raw.clear()

    def _keep(self, number: int, _module, _inputs, output) -> None:
        self._raw[number] = output[:2]

    def _rms(self, name: str, _module, _inputs, output) -> None:
        self.found.add(name, RMS, wide(output).square().mean())

    def _attention(self, number: int, attention: Attention, inputs, output) -> None:
        self._rms(f"attention_out_rms/{number}", None, None, output)
        q_BTD, k_BTD = self._raw.pop(number)
        self._rms(f"q_rms/{number}", None, None, q_BTD)
        self._rms(f"k_rms/{number}", None, None, k_BTD)
        self._normed(number, attention, q_BTD, k_BTD)
        _, cos_TR, sin_TR, begins_BT, _ = inputs
        q_BHTK, k_BGTK = attention.prepare(q_BTD, k_BTD, cos_TR, sin_TR)
        self._scores(number, attention, q_BHTK, k_BGTK, begins_BT)

    def _normed(self, number: int, attention: Attention, q_BTD, k_BTD) -> None:
        q_BHTK, k_BGTK = (wide(x) for x in attention.normed_heads(q_BTD, k_BTD))
        self._rms(f"q_normed_rms/{number}", None, None, q_BHTK)
        self._rms(f"k_normed_rms/{number}", None, None, k_BGTK)
        shared = q_BHTK.shape[1] // k_BGTK.shape[1]
        cosine = F.cosine_similarity(q_BHTK, k_BGTK.repeat_interleave(shared, 1), dim=-1)
        self.found.add(f"qk_cosine/{number}", MEAN, cosine.mean())
        gains = [norm.weight.abs().max() for norm in (attention.q_norm, attention.k_norm) if isinstance(norm, QKNorm)]
        if gains:
            self.found.add(f"qk_gain_max/{number}", LARGEST, torch.stack(gains).max())

    def _scores(self, number: int, attention: Attention, q_BHTK, k_BGTK, begins_BT) -> None:
        statistics = attention.statistics(q_BHTK, k_BGTK, begins_BT)
        self.found.add(f"attention_logit_max/{number}", LARGEST, statistics.largest_H.max())
        self.found.add("attention_logit_max", LARGEST, statistics.largest_H.max())
        self.found.add(f"attention_logit_mean/{number}", MEAN, statistics.mean_H.mean())
        self.found.add(f"attention_logit_rms/{number}", RMS, statistics.rms_H.square().mean())
        if attention.normaliser.sums_to_one:
            self.found.add(f"attention_entropy/{number}", MEAN, statistics.entropy_H.mean())
        if self.per_head:
            for head, largest in enumerate(statistics.largest_H):
                self.found.add(f"attention_logit_max/{number}/{head}", LARGEST, largest)

    def _hidden(self, _norm, inputs, output_BTD) -> None:
        self._rms("final_norm_input_rms", None, None, inputs[0])
        hidden_ND = output_BTD.flatten(0, 1)
        weight_VD, softcap = self.model.head_weight_VD, self.model.config.final_softcap
        rows = max(1, LOGITS_BYTES // (4 * weight_VD.shape[0]))
        parts = [_logit_statistics(part, weight_VD, softcap) for part in hidden_ND.split(rows)]
        counts = torch.tensor([float(len(part)) for part in hidden_ND.split(rows)], device=hidden_ND.device)
        stacked = {name: torch.stack([part[name] for part in parts]) for name in parts[0]}
        self.found.add("output_logit_max", LARGEST, stacked.pop("output_logit_max").max())
        self.found.add("output_logit_min", SMALLEST, stacked.pop("output_logit_min").min())
        for name, values in stacked.items():
            mean = (values * counts).sum() / counts.sum()
            self.found.add(name, RMS if name.endswith("_rms") else MEAN, mean)


def _logit_statistics(hidden_ND, weight_VD, softcap) -> dict[str, torch.Tensor]:
    logits_NV = softcap_scores(wide(F.linear(hidden_ND, weight_VD)), softcap)
    log_z_N = logits_NV.logsumexp(-1)
    return {
        "output_logit_mean": logits_NV.mean(),
        "output_logit_rms": logits_NV.square().mean(),
        "output_logit_max": logits_NV.max(),
        "output_logit_min": logits_NV.min(),
        "log_z_mean": log_z_N.mean(),
        "log_z_mean_square": log_z_N.square().mean(),
    }
