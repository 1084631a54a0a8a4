"""Parameters and FLOPs in closed form, without torch and without building the model.

With L layers, d width, a = n_heads d_head, g = n_kv_heads d_head, f = d_ff, m matrices in an MLP, V vocabulary:

    matrices of a block     2 d a + 2 d g + m d f
    gains of a block        2 d norms_per_branch + qk gains (2 d_head per head, a + g over the full width)
    extra of its linears    extra_per_matrix for each of the 4 + m matrices of a block, and for an untied head
    outside the blocks      V d, another V d for an untied head, d for the final norm
    forward FLOPs a token   2 (L matrices + V d) + 4 L a T
"""

from __future__ import annotations

from dataclasses import dataclass

from scaling_testbed.errors import ConfigError
from scaling_testbed.model.config import ModelConfig
from scaling_testbed.model.parts import LINEARS, MLPS, NORMS, RESIDUALS


@dataclass(frozen=True)
class ParamCounts:
    """The number of parameters of one model by four conventions.

    n_params                     all parameters
    n_params_non_embedding       all but embedding and head (Kaplan et al.; Wortsman et al. 2023)
    n_params_no_input_embedding  all but the embedding; a tied matrix counts as the head
    n_params_no_qk_gains         all but the gains of the qk-norm: the published counts of Gadre et al. 2024
    """

    n_params: int
    n_params_non_embedding: int
    n_params_no_input_embedding: int
    n_params_no_qk_gains: int


def count_params(config: ModelConfig) -> ParamCounts:
    """Count the parameters of `config`, whose vocab_size must be known."""
    config = _resolved(config)
    layout, extra = RESIDUALS[config.residual], LINEARS[config.linear].extra_per_matrix
    norm = NORMS[config.norm].gains * config.d_model
    n_matrices = 4 + MLPS[config.mlp].n_matrices
    beside_matrices = 2 * layout.norms_per_branch * norm + _qk_gains(config) + n_matrices * extra
    body = config.n_layers * (block_matrices(config) + beside_matrices) + layout.final_norm * norm
    table = config.known_vocab_size * config.d_model
    if not config.tied_head:
        body += extra
    n_params = body + (table if config.tied_head else 2 * table)
    return ParamCounts(
        n_params=n_params,
        n_params_non_embedding=body,
        n_params_no_input_embedding=body + table,
        n_params_no_qk_gains=n_params - config.n_layers * _qk_gains(config),
    )


def forward_flops(config: ModelConfig, sequence_length: int) -> int:
    """FLOPs of the forward pass of one token in a sequence of `sequence_length` tokens.

    All matrix products count, including the head; a multiply-add is two FLOPs. Attention counts all T x T scores,
    although half of them are masked, or more where documents are told apart, as torch's FlopCounterMode does. Norms,
    activations, normalisers, the rotation, the embedding look-up and matrix-vector products (those of sigma_reparam) do
    not count.
    """
    config = _resolved(config)
    products = config.n_layers * block_matrices(config) + config.known_vocab_size * config.d_model
    attention = config.n_layers * 2 * config.n_heads * config.head_width * sequence_length
    return 2 * (products + attention)


def flops_per_token(config: ModelConfig, sequence_length: int) -> int:
    """FLOPs of training on one token: 3 x forward, because the backward pass has two products for each forward product.

    This is exact for the reference attention. A fused attention computes the scores again in its backward pass. That
    work does not count, and neither does any other recomputation, so that a model has the same FLOPs on every path.
    """
    return 3 * forward_flops(config, sequence_length)


def block_matrices(config: ModelConfig) -> int:
    """Number of weights in the matrices of one block of a resolved `config`."""
    attention = 2 * config.d_model * config.head_width * (config.n_heads + config.kv_heads)
    return attention + MLPS[config.mlp].n_matrices * config.d_model * config.ff_width


def weights_by_role(config: ModelConfig) -> dict[str, int]:
    """Role (parametrization.ROLES) -> number of parameters of a resolved `config`. A learned factor is a gain here."""
    heads, kv_heads = config.head_width * config.n_heads, config.head_width * config.kv_heads
    widths = {"q": heads, "k": kv_heads, "v": kv_heads, "attn_out": heads}
    for role in MLPS[config.mlp].roles:
        widths[role] = widths.get(role, 0) + config.ff_width
    found = {role: config.n_layers * config.d_model * width for role, width in widths.items()}
    found["embedding"] = config.known_vocab_size * config.d_model
    found["head"] = 0 if config.tied_head else found["embedding"]
    return {**found, "norm": count_params(config).n_params - sum(found.values())}


def _qk_gains(config: ModelConfig) -> int:
    heads = config.n_heads + config.kv_heads if config.norms_heads_together else 2
    return config.query_key_norm.gains * heads * config.head_width


def _resolved(config: ModelConfig) -> ModelConfig:
    if config.vocab_size is None:
        raise ConfigError("vocab_size must be known to count parameters, got None: use config.resolved(vocab_size)")
    return config.resolved(config.vocab_size)
