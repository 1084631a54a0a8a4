"""A model of the scaling testbed for transformers, without its package. Trained in fp32, with norms in fp32.

Shapes in names: B sequences, T positions of this call, N keys (those of the cache, then T), D width, V vocabulary,
H query heads, G key and value heads, K features of a head, R = K/2 rotated pairs.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_scaling_testbed import ScalingTestbedConfig

CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"  # by version


def _layer_norm(x, gain, eps):
    return F.layer_norm(x.float(), gain.shape, gain.float(), None, eps)


def _rms_norm(x, gain, eps):
    return F.rms_norm(x.float(), gain.shape, gain.float(), eps)


NORMS = {"layer_norm": _layer_norm, "rms_norm": _rms_norm}
ACTIVATIONS = {
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu2": lambda x: F.relu(x).square(),
    "silu": F.silu,
}


def _softmax(scores_BHTN, allowed_BTN, length_B):
    return scores_BHTN.masked_fill(~allowed_BTN[:, None], float("-inf")).softmax(dim=-1)


def _relu_squared(scores_BHTN, allowed_BTN, length_B):
    weights_BHTN = scores_BHTN.masked_fill(~allowed_BTN[:, None], 0).relu().square()
    return weights_BHTN * length_B[:, None, None, None].float().rsqrt()


# Scores, allowed keys and the length of each sequence -> weights.
NORMALISERS = {"softmax": _softmax, "relu2": _relu_squared}
# Those of which the weights of a position depend on positions after it, so that no cache can hold them.
WITHOUT_CACHE = ("relu2",)

# The place of the norms -> (norms of a branch, whether there is a norm after the last block, the sum). The sum has the
# stream x, the branch f, its norms n and the number of layers.
RESIDUALS = {
    "norms before the branches": (1, True, lambda x, f, n, layers: x + f(n[0](x))),
    "norms after the branches": (1, True, lambda x, f, n, layers: x + n[0](f(x))),
    "norms around the branches": (2, True, lambda x, f, n, layers: x + n[1](f(n[0](x)))),
    "norms after the sums": (1, False, lambda x, f, n, layers: n[0](x + f(x))),
    "norms after the sums, deepnorm": (1, False, lambda x, f, n, layers: n[0]((2 * layers) ** 0.25 * x + f(x))),
}


class Norm(nn.Module):
    """A norm in fp32 with a gain; the result has the type of the input."""

    def __init__(self, kind, width, eps):
        super().__init__()
        self.function, self.eps = NORMS[kind], eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return self.function(x, self.weight, self.eps).to(x.dtype)


def _rotated(x_BHTK, cos_BTR, sin_BTR):
    """Rotate the pairs (x[r], x[r + K/2])."""
    first, second = x_BHTK.float().chunk(2, dim=-1)
    cos, sin = cos_BTR[:, None], sin_BTR[:, None]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x_BHTK.dtype)


def _capped(x, softcap):
    return x if softcap is None else softcap * torch.tanh(x / softcap)


class Attention(nn.Module):
    """Norm and rotation of queries and keys, scores, softcap, normaliser, values."""

    def __init__(self, config, layer):
        super().__init__()
        self.config, self.layer = config, layer
        heads, groups, width = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, heads * width, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, groups * width, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, groups * width, bias=False)
        self.o_proj = nn.Linear(heads * width, config.hidden_size, bias=False)
        if config.query_key_norm in NORMS:
            together = config.norms_heads_together
            self.q_norm = Norm(config.query_key_norm, heads * width if together else width, config.norm_eps)
            self.k_norm = Norm(config.query_key_norm, groups * width if together else width, config.norm_eps)
        else:
            self.q_norm = self.k_norm = nn.Identity()

    def _heads(self, x_BTD):
        return x_BTD.unflatten(-1, (-1, self.config.head_dim)).transpose(1, 2)

    def _normed(self, x_BTD, norm):
        if self.config.norms_heads_together:
            return self._heads(norm(x_BTD))
        return norm(self._heads(x_BTD))

    def forward(self, x_BTD, cos_BTR, sin_BTR, allowed_BTN, length_B, cache):
        config = self.config
        q_BHTK = _rotated(self._normed(self.q_proj(x_BTD), self.q_norm), cos_BTR, sin_BTR)
        k_BGNK = _rotated(self._normed(self.k_proj(x_BTD), self.k_norm), cos_BTR, sin_BTR)
        v_BGNK = self._heads(self.v_proj(x_BTD))
        if cache is not None:
            k_BGNK, v_BGNK = cache.update(k_BGNK, v_BGNK, self.layer)
        share = config.num_attention_heads // config.num_key_value_heads
        k_BHNK, v_BHNK = (x.repeat_interleave(share, dim=1).float() for x in (k_BGNK, v_BGNK))
        scores_BHTN = config.attention_scale * (q_BHTK.float() @ k_BHNK.transpose(-1, -2))
        weigh = NORMALISERS[config.attention_normaliser]
        weights_BHTN = weigh(_capped(scores_BHTN, config.attention_softcap), allowed_BTN, length_B)
        return self.o_proj((weights_BHTN @ v_BHNK).to(x_BTD.dtype).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """out(act(in(x))), or out(act(gate(x)) * in(x))."""

    def __init__(self, config):
        super().__init__()
        self.activation = ACTIVATIONS[config.hidden_act]
        sizes = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(*sizes, bias=False) if config.gated_mlp else None
        self.up_proj = nn.Linear(*sizes, bias=False)
        self.down_proj = nn.Linear(*reversed(sizes), bias=False)

    def forward(self, x):
        if self.gate_proj is None:
            return self.down_proj(self.activation(self.up_proj(x)))
        return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """Attention, then MLP, each in the residual layout."""

    def __init__(self, config, layer):
        super().__init__()
        self.n_layers = config.num_hidden_layers
        count, _, self.residual = RESIDUALS[config.residual]
        norms = [[Norm(config.norm, config.hidden_size, config.norm_eps) for _ in range(count)] for _ in range(2)]
        self.attention_norms, self.mlp_norms = map(nn.ModuleList, norms)
        self.self_attn, self.mlp = Attention(config, layer), MLP(config)

    def forward(self, x_BTD, *of_attention):
        def attend(y_BTD):
            return self.self_attn(y_BTD, *of_attention)

        x_BTD = self.residual(x_BTD, attend, self.attention_norms, self.n_layers)
        return self.residual(x_BTD, self.mlp, self.mlp_norms, self.n_layers)


class ScalingTestbedForCausalLM(PreTrainedModel, GenerationMixin):
    """The model with its head. A cache of keys and values may be given, except with a normaliser of WITHOUT_CACHE."""

    config_class = ScalingTestbedConfig
    base_model_prefix = ""
    supports_gradient_checkpointing = False
    _no_split_modules = ["Block"]
    _tied_weights_keys = {"lm_head.weight": "embed_tokens.weight"}

    def __init__(self, config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        has_final_norm = RESIDUALS[config.residual][1]
        self.norm = Norm(config.norm, config.hidden_size, config.norm_eps) if has_final_norm else nn.Identity()
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def _init_weights(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, 0.0, self.config.initializer_range)
        elif isinstance(module, Norm):
            nn.init.ones_(module.weight)

    def get_input_embeddings(self):
        return self.embed_tokens

    def set_input_embeddings(self, value):
        self.embed_tokens = value

    def get_output_embeddings(self):
        return self.lm_head

    def set_output_embeddings(self, value):
        self.lm_head = value

    def _allowed(self, attention_mask, n_sequences, n_before, n_new, device):
        """allowed_BTN, whether each position sees each key, and length_B, the number of positions of each sequence that
        are no padding. A position sees itself, so that padding stays finite."""
        query_T = torch.arange(n_before, n_before + n_new, device=device)
        key_N = torch.arange(n_before + n_new, device=device)
        distance_TN = query_T[:, None] - key_N[None, :]
        allowed_TN = distance_TN >= 0
        if self.config.attention_window is not None:
            allowed_TN = allowed_TN & (distance_TN < self.config.attention_window)
        if attention_mask is None:
            length_B = torch.full((n_sequences,), len(key_N), device=device)
            return allowed_TN.expand(n_sequences, -1, -1), length_B
        if attention_mask.ndim != 2 or attention_mask.shape[-1] != len(key_N):
            raise ValueError(
                f"attention_mask must be [sequences, {len(key_N)} positions with those of the cache], got "
                f"{list(attention_mask.shape)}"
            )
        real_BN = attention_mask.to(device).bool()
        return (allowed_TN & real_BN[:, None]) | (distance_TN == 0), real_BN.sum(-1)

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        cache=None,
        inputs_embeds=None,
        labels=None,
        use_cache=None,
        logits_to_keep=0,
        past_key_values=None,
        **kwargs,
    ):
        """Logits [B, T, V], and the loss where `labels` are given. attention_mask: [B, N], 0 for padding. cache: keys
        and values of the positions before; past_key_values is its name in earlier versions of transformers."""
        config = self.config
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        x_BTD = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        use_cache = config.use_cache if use_cache is None else use_cache
        cache = past_key_values if cache is None else cache
        if config.attention_normaliser in WITHOUT_CACHE and (use_cache or cache is not None):
            raise ValueError(
                f"attention_normaliser={config.attention_normaliser} depends on the length of the whole text, so keys "
                "and values cannot be kept: pass use_cache=False"
            )
        if getattr(cache, "is_compileable", False):
            raise ValueError("a static cache is not supported: leave out cache_implementation, or pass a DynamicCache")
        if use_cache and cache is None:
            cache = DynamicCache()
        for number, block in enumerate(self.layers):
            if number == 0:
                places = self._places(x_BTD, attention_mask, position_ids, cache)
            x_BTD = block(x_BTD, *places, cache)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits_BTV = _capped(self.lm_head(self.norm(x_BTD)[:, kept]).float(), config.final_softcap)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits_BTV, labels=labels, vocab_size=config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits_BTV, **{CACHE: cache if use_cache else None})

    def _places(self, x_BTD, attention_mask, position_ids, cache):
        """The tables of the rotation, allowed_BTN and length_B, for all blocks."""
        n_before = 0 if cache is None else cache.get_seq_length()
        if position_ids is None:
            position_ids = torch.arange(n_before, n_before + x_BTD.shape[1], device=x_BTD.device)[None]
        allowed = self._allowed(attention_mask, x_BTD.shape[0], n_before, x_BTD.shape[1], x_BTD.device)
        return *self._tables(position_ids), *allowed

    def _tables(self, position_ids):
        """Cosines and sines [B, T, R] of the angles position * theta^(-2 r / K), fp32."""
        width = self.config.head_dim
        pairs_R = torch.arange(0, width, 2, dtype=torch.float32, device=position_ids.device)
        angles_BTR = position_ids.float()[..., None] * self.config.rope_theta ** (-pairs_R / width)
        return angles_BTR.cos(), angles_BTR.sin()
