"""The diagnostics by name, with their meaning and unit."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """A number in a line of metrics.jsonl. unit: empty if it has none."""

    name: str
    meaning: str
    unit: str = ""


# B is the number of a block, H the number of a head, TENSOR the name of a parameter. A name without a slash belongs to
# the whole model.
DIAGNOSTICS = (
    Metric("attention_logit_max", "The largest scaled q.k that a query may see, before a softcap, of all blocks."),
    Metric("attention_logit_max/B", "The same of one block."),
    Metric("attention_logit_max/B/H", "The same of one head, with diagnostics.per_head."),
    Metric("attention_logit_mean/B", "Mean of the scaled q.k that a query may see."),
    Metric("attention_logit_rms/B", "Root mean square of the scaled q.k that a query may see."),
    Metric(
        "attention_entropy/B",
        "Entropy of the attention weights, mean over queries and heads; only where the weights sum to one.",
        "nats",
    ),
    Metric("q_rms/B", "Root mean square of the queries before the qk-norm."),
    Metric("k_rms/B", "Root mean square of the keys before the qk-norm."),
    Metric("q_normed_rms/B", "Root mean square of the queries after the qk-norm."),
    Metric("k_normed_rms/B", "Root mean square of the keys after the qk-norm."),
    Metric("qk_cosine/B", "Mean cosine of each query and the key of its own position, normed, before the rotation."),
    Metric("qk_gain_max/B", "The largest |gain| of the qk-norm; only where it has gains."),
    Metric("attention_out_rms/B", "Root mean square of the output of attention, before any norm of it."),
    Metric("mlp_out_rms/B", "Root mean square of the output of the MLP, before any norm of it."),
    Metric("residual_rms/B", "Root mean square of the residual stream after the block."),
    Metric("final_norm_input_rms", "Root mean square of the input of the last norm."),
    Metric("output_logit_mean", "Mean of the output logits."),
    Metric("output_logit_rms", "Root mean square of the output logits."),
    Metric("output_logit_min", "The smallest output logit."),
    Metric("output_logit_max", "The largest output logit."),
    Metric("log_z_mean", "Mean of log Z, the log of the sum of exponentials of the output logits."),
    Metric("log_z_mean_square", "Mean of log^2 Z, which the z-loss multiplies by its coefficient."),
    Metric("grad_rms/TENSOR", "Root mean square of the gradient, before clipping."),
    Metric("grad_norm/TENSOR", "Norm of the gradient, before clipping."),
    Metric("param_rms/TENSOR", "Root mean square of the parameter, before the update."),
    Metric(
        "update_rms/TENSOR",
        "Root mean square of the optimizer's update, before the learning rate and without the decay: for AdamW m / "
        "(sqrt(v) + eps), bias-corrected (Wortsman et al. 2023, E.13). Only where the optimizer's state tells its "
        "update.",
    ),
    Metric("update_ratio/TENSOR", "The tensor's learning rate times update_rms / param_rms."),
    Metric(
        "below_eps/TENSOR",
        "Share of coordinates whose sqrt(v) is below eps (Wortsman et al. 2023, section 3.4); only where there is an "
        "eps.",
    ),
)
WHOLE_MODEL = tuple(metric.name for metric in DIAGNOSTICS if "/" not in metric.name)


def is_diagnostic(name: str) -> bool:
    """Whether a name in a line of metrics.jsonl is the name of a diagnostic."""
    return "/" in name or name in WHOLE_MODEL
