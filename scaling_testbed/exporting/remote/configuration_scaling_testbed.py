"""The configuration of an exported model. modeling_scaling_testbed.py has the model."""

from transformers import PretrainedConfig


class ScalingTestbedConfig(PretrainedConfig):
    """A decoder-only Transformer of the scaling testbed.

    hidden_act, gated_mlp       out(act(in(x))), or out(act(gate(x)) * in(x))
    norm                        layer_norm or rms_norm, with a gain and no bias
    query_key_norm              the same, or none; norms_heads_together: over all heads instead of each head
    residual                    the place of the norms; modeling_scaling_testbed.RESIDUALS lists them
    attention_scale             the factor on q.k
    attention_normaliser        softmax or relu2: relu(z)^2 / sqrt(L) with L the length of the sequence
    attention_softcap, final_softcap
                                c: z becomes c tanh(z / c); None: z stays
    attention_window            number of keys that a query sees, its own included; None: all of the past
    """

    model_type = "scaling_testbed"
    keys_to_ignore_at_inference = ["past_key_values"]

    def __init__(
        self,
        vocab_size=257,
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=16,
        hidden_act="gelu_pytorch_tanh",
        gated_mlp=False,
        norm="layer_norm",
        norm_eps=1e-6,
        query_key_norm="none",
        norms_heads_together=False,
        residual="norms before the branches",
        attention_scale=0.25,
        attention_normaliser="softmax",
        attention_softcap=None,
        attention_window=None,
        final_softcap=None,
        rope_theta=10000.0,
        max_position_embeddings=2048,
        initializer_range=0.02,
        tie_word_embeddings=False,
        use_cache=True,
        **kwargs,
    ):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = head_dim
        self.hidden_act = hidden_act
        self.gated_mlp = gated_mlp
        self.norm = norm
        self.norm_eps = norm_eps
        self.query_key_norm = query_key_norm
        self.norms_heads_together = norms_heads_together
        self.residual = residual
        self.attention_scale = attention_scale
        self.attention_normaliser = attention_normaliser
        self.attention_softcap = attention_softcap
        self.attention_window = attention_window
        self.final_softcap = final_softcap
        self.rope_theta = rope_theta
        self.max_position_embeddings = max_position_embeddings
        self.initializer_range = initializer_range
        self.use_cache = use_cache
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)
