"""The model classes that an export can be, and their config.json.

transformers has three classes for models of RMSNorms and SwiGLU whose rotary positions pair features r and
r + d_head/2:

    without a qk-norm, pre-norm residual            LlamaForCausalLM
    with an RMS qk-norm per head, pre-norm          Qwen3ForCausalLM
    with an RMS qk-norm over the full width, norms
    after the branches (model.residual=reordered)   Olmo2ForCausalLM

For any other model, the export has the class's code beside the weights (remote/). An attention scale that a class of
transformers lacks, kappa and sigma_reparam only change values of weights, so they are folded into the weights. The
scale of the embedding's gradient is not part of the model.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from scaling_testbed.errors import ConfigError
from scaling_testbed.model.config import ModelConfig
from scaling_testbed.model.parametrization import attention_scale
from scaling_testbed.model.parts import MLPS, NORMALISERS, NORMS, QK_NORMS, RESIDUALS
from scaling_testbed.model.transformer import Transformer


@dataclass(frozen=True)
class Family:
    """A model class for transformers.

    parts     key of ModelConfig -> the counterparts (model.parts) that it can compute
    plain_mlp whether its MLP may have no gate
    limits    keys that must be null, because it has nothing of the kind
    inner     where its tensors are, but for the head
    norms     its names for the norms of attention and MLP in a block; {} stands for the number of the norm
    own_code  whether its code is beside the weights
    """

    model_type: str
    architecture: str
    parts: Mapping[str, frozenset[str]]
    plain_mlp: bool = False
    limits: tuple[str, ...] = ()
    inner: str = "model."
    norms: tuple[str, str] = ("input_layernorm", "post_attention_layernorm")
    own_code: bool = False

    def lacks(self, config: ModelConfig) -> list[str]:
        """The settings of a resolved `config` that it cannot compute, as model.key=value."""
        wrong = [key for key, theirs in self.parts.items() if _counterpart(config, key) not in theirs]
        if "mlp" not in wrong and not (_is_gated(config) or self.plain_mlp):
            wrong.append("mlp")
        wrong += [key for key in self.limits if getattr(config, key) is not None]
        if config.kappa is not None:  # it stands in place of the named norm
            wrong = ["kappa" if key == "qk_norm" else key for key in wrong]
        return [f"model.{key}={getattr(config, key)}" for key in wrong]


# Key of ModelConfig -> the registered parts, whose `counterpart` a family may have.
PARTS: Mapping[str, Mapping[str, Any]] = {
    "norm": NORMS,
    "mlp": MLPS,
    "attention_normaliser": NORMALISERS,
    "qk_norm": QK_NORMS,
    "residual": RESIDUALS,
}
SOFTCAPS = ("attention_softcap", "final_softcap")
BEFORE, AFTER = "norms before the branches", "norms after the branches"


def _published(qk_norm: str, residual: str) -> dict[str, frozenset[str]]:
    known = {"norm": "rms_norm", "mlp": "silu", "attention_normaliser": "softmax"}
    return {key: frozenset({name}) for key, name in (known | {"qk_norm": qk_norm, "residual": residual}).items()}


LLAMA = Family("llama", "LlamaForCausalLM", _published("none", BEFORE), limits=(*SOFTCAPS, "attention_window"))
QWEN3 = Family("qwen3", "Qwen3ForCausalLM", _published("rms_norm", BEFORE), limits=SOFTCAPS)
OLMO2 = Family(
    "olmo2",
    "Olmo2ForCausalLM",
    _published("rms_norm", AFTER),
    limits=(*SOFTCAPS, "attention_window"),
    norms=("post_attention_layernorm", "post_feedforward_layernorm"),
)
# What remote/modeling_scaling_testbed.py computes; a test compares the two.
OWN = Family(
    "scaling_testbed",
    "ScalingTestbedForCausalLM",
    {
        "norm": frozenset({"layer_norm", "rms_norm"}),
        "mlp": frozenset({"gelu_pytorch_tanh", "relu2", "silu"}),
        "attention_normaliser": frozenset({"softmax", "relu2"}),
        "qk_norm": frozenset({"none", "layer_norm", "rms_norm"}),
        "residual": frozenset(
            {BEFORE, AFTER, "norms around the branches", "norms after the sums", "norms after the sums, deepnorm"}
        ),
    },
    plain_mlp=True,
    inner="",
    norms=("attention_norms.{}", "mlp_norms.{}"),
    own_code=True,
)
PUBLISHED = (LLAMA, QWEN3, OLMO2)
# The matrices of an MLP -> their names in every family.
MLP_NAMES = {"mlp_gate": "mlp.gate_proj", "mlp_in": "mlp.up_proj", "mlp_out": "mlp.down_proj"}


def _counterpart(config: ModelConfig, key: str) -> str | None:
    if key == "qk_norm":
        return config.query_key_norm.counterpart
    found: str | None = PARTS[key][getattr(config, key)].counterpart
    return found


def _is_gated(config: ModelConfig) -> bool:
    return set(MLPS[config.mlp].roles) == set(MLP_NAMES)


def family_of(config: ModelConfig) -> Family:
    """The model class that computes the same as a resolved `config`: one of transformers if there is one, else OWN.

    Raises ConfigError, which names each key and value that has no counterpart in any class.
    """
    if wrong := OWN.lacks(config):
        has = "has" if len(wrong) == 1 else "have"
        raise ConfigError(f"{', '.join(wrong)} {has} no counterpart in any class that an export can be")
    return next((family for family in PUBLISHED if not _why_not(family, config)), OWN)


def why_own_code(config: ModelConfig) -> str:
    """One line: the settings for which no class of transformers is the model, and how to load it."""
    lacking = min((_why_not(family, config) for family in PUBLISHED), key=len)
    return (
        f"no class of transformers computes {', '.join(lacking)}: the code is beside the weights, load it with "
        "trust_remote_code=True"
    )


def _why_not(family: Family, config: ModelConfig) -> list[str]:
    """What a class of transformers lacks, with the ways in which the parts must fit together."""
    wrong = family.lacks(config)
    if config.query_key_norm.function is not None and config.norms_heads_together != (family is OLMO2):
        wrong.append(f"model.qk_norm_axis={config.qk_norm_axis}")
    if family is LLAMA and config.d_model % config.n_heads:
        wrong.append(f"model.n_heads={config.n_heads} (it does not divide d_model)")
    return wrong


def config_json(model: Transformer, family: Family, *, max_length: int, eos_id: int | None) -> dict[str, Any]:
    """The content of config.json. pad_token_id is null, because transformers gives the embedding of this id no
    gradient; the tokenizer and generation_config.json name EOS for padding."""
    config = model.config
    about = _own_keys(model) if family.own_code else _published_keys(config)
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
        "rope_theta": config.rope_base,
        "tie_word_embeddings": config.tied_head,
        "use_cache": _has_cache(config),
        "bos_token_id": None,
        "eos_token_id": eos_id,
        "pad_token_id": None,
        "torch_dtype": "float32",
        **about,
    }


def _published_keys(config: ModelConfig) -> dict[str, Any]:
    window: dict[str, Any] = {}
    if config.attention_window is not None:
        layers = ["sliding_attention"] * config.n_layers
        window = {"use_sliding_window": True, "sliding_window": config.attention_window}
        window |= {"max_window_layers": 0, "layer_types": layers}
    return {
        "rms_norm_eps": config.norm_eps,
        # Beside rope_theta: transformers 5 reads this, earlier ones and other readers that.
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_base},
        "attention_bias": False,
        "attention_dropout": 0.0,
        **window,
    }


def _own_keys(model: Transformer) -> dict[str, Any]:
    config = model.config
    code = "modeling_scaling_testbed.ScalingTestbedForCausalLM"
    return {
        "auto_map": {
            "AutoConfig": "configuration_scaling_testbed.ScalingTestbedConfig",
            "AutoModelForCausalLM": code,
        },
        "gated_mlp": _is_gated(config),
        "norm": NORMS[config.norm].counterpart,
        "norm_eps": config.norm_eps,
        "query_key_norm": config.query_key_norm.counterpart,
        "norms_heads_together": config.norms_heads_together,
        "residual": RESIDUALS[config.residual].counterpart,
        "attention_scale": attention_scale(model.parametrization, config),
        "attention_normaliser": NORMALISERS[config.attention_normaliser].counterpart,
        "attention_softcap": config.attention_softcap,
        "attention_window": config.attention_window,
        "final_softcap": config.final_softcap,
    }


def generation_json(config: ModelConfig, eos_id: int | None) -> dict[str, Any]:
    """The content of generation_config.json: a text ends with EOS, which also pads. A document begins after EOS, so an
    empty prompt is this token."""
    return {"bos_token_id": eos_id, "eos_token_id": eos_id, "pad_token_id": eos_id, "use_cache": _has_cache(config)}


def _has_cache(config: ModelConfig) -> bool:
    """Whether keys and values of earlier positions stay the same when a text grows."""
    return not NORMALISERS[config.attention_normaliser].depends_on_length
