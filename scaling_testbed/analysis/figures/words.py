"""Keys and recorded quantities in words, for axes, legends and pages.

A key without an entry here, such as one of a plug-in, is read as its last part: `model.mlp` is "mlp".
"""

import re
from collections.abc import Mapping

ARM = "logging.group"  # the key that names the arms of a study
WORDS = {
    ARM: "arm",
    "optimizer.lr": "learning rate",
    "lr": "learning rate",
    "n_params": "N",
    "n_params_non_embedding": "N, non-embedding parameters",
    "run_id": "run",
    "n_lrs": "rates",
    "n_seeds": "seeds",
    "lr_low": "lowest rate in S",
    "lr_high": "highest rate in S",
    "S_low": "S, low end",
    "S_high": "S, high end",
    "range_rule": "range of rates",
    "best_lr": "best rate",
    "first_diverging_lr": "lowest diverging rate",
    "critical_lr": "critical rate",
    "critical_low": "critical rate, low end",
    "critical_high": "critical rate, high end",
    "critical_above": "critical rate is above",
    "withheld": "why S is withheld",
    "rate_means": "meaning of the rate",
    "val_loss": "final validation loss",
    "val_loss_initial": "loss at initialisation",
    "diverged_at_step": "diverged at step",
    "ci95_low": "95 % low end",
    "ci95_high": "95 % high end",
    "n_tokens": "D, tokens",
    "tokens_per_param": "D/N, tokens per parameter",
    "flops": "FLOPs",
    "model.d_model": "width",
    "model.n_layers": "depth, layers",
    "model.qk_norm": "qk-norm",
    "model.qk_norm_axis": "axis of the qk-norm",
    "model.kappa": "kappa",
    "model.residual": "residual layout",
    "model.mlp": "MLP",
    "data.n_tasks": "tasks",
    "data.online.every_steps": "steps between updates of the weights",
    "optimizer.eps": "epsilon of the optimizer",
    "optimizer.scale_lr_by_param_rms": "rate scaled by the weights' RMS",
    "optimizer.beta1": "beta 1",
    "optimizer.beta2": "beta 2",
    "optimizer.decay": "kind of weight decay",
    "schedule.warmup": "warm-up",
    "schedule.min_lr": "final learning rate",
    "loss.z_loss": "z-loss",
    "batch.sequences": "sequences in a batch",
    "batch.sequence_length": "sequence length",
    "parametrization.name": "parametrization",
    "scan": "scan over",
    "start.grow.width": "growth",
    "start.grow.noise": "noise of the growth",
    "start.rewarm": "steps of rewarming",
    "start.take": "taken state",
    "interventions.magnitude_pruning.begin": "begin of pruning",
    "interventions.magnitude_pruning.end": "end of pruning",
    "train_loss": "training loss (nats/token)",
    "attention_logit_max": "largest attention logit",
    "attention_logit_rms": "RMS of the attention logits",
    "output_logit_mean": "mean output logit",
    "output_logit_max": "largest output logit",
    "log_z_mean": "mean log Z",
    "log_z_mean_square": "mean square of log Z",
    "q_rms": "RMS of the queries",
    "k_rms": "RMS of the keys",
    "qk_cosine": "cosine of query and key",
    "residual_rms": "RMS of the residual stream",
    "grad_rms": "gradient RMS",
    "update_rms": "update RMS",
    "param_rms": "parameter RMS",
}

WEIGHT_OF = "data.weights."  # and the name of a source of a mixture
MATRICES = {  # by the names of a block's linear layers
    "q": "query matrix",
    "k": "key matrix",
    "v": "value matrix",
    "attn_out": "attention output matrix",
    "mlp_in": "MLP input matrix",
    "mlp_gate": "MLP gate matrix",
    "mlp_out": "MLP output matrix",
}


def word(key: str) -> str:
    """A key, a column of a table, or a recorded quantity such as `attention_logit_max/0`, in words."""
    name, _, place = key.partition("/")
    if place and name in WORDS:
        return f"{WORDS[name]}, {f'block {place}' if place.isdecimal() else _tensor(place)}"
    if key in WORDS:
        return WORDS[key]
    if key.startswith(WEIGHT_OF):
        return f"weight of {key.removeprefix(WEIGHT_OF)}"
    own = key.removesuffix(".name").rpartition(".")[2]  # optimizer.name is "optimizer"
    return own.replace("_", " ")


def in_sentence(key: str) -> str:
    """The same for the middle of a sentence, without a unit: `attention_logit_max/0` is "largest attention logit of
    block 0"."""
    name, _, place = key.partition("/")
    if not place or name not in WORDS:
        return key if place else word(key).partition(" (")[0]
    part = f"block {place}" if place.isdecimal() else _tensor(place)
    return f"{WORDS[name]} of {'the ' * (' matrix of ' in part)}{part}"


def _tensor(name: str) -> str:
    """A parameter in words: `blocks.0.mlp.mlp_in.weight` is "MLP input matrix of block 0"."""
    found = re.fullmatch(r"blocks\.(\d+)\.\w+\.(\w+)\.weight", name)
    return f"{MATRICES[found[2]]} of block {found[1]}" if found and found[2] in MATRICES else name


def setting(key: str, value: str) -> str:
    """A setting for a sentence: "qk-norm none", or the name of an arm."""
    said = "not set" if value == "null" else value
    return said if key == ARM else f"{word(key)} {said}"


def settings(values: Mapping[str, str]) -> str:
    """Settings for a sentence, or "all runs" if there are none."""
    return ", ".join(setting(key, value) for key, value in values.items()) or "all runs"


def condition(values: Mapping[str, str]) -> str:
    """The text of a condition for a legend: "qk-norm: none", or the name of an arm; empty if nothing distinguishes
    conditions."""
    said = {key: "not set" if value == "null" else value for key, value in values.items()}
    return ", ".join(value if key == ARM else f"{word(key)}: {value}" for key, value in said.items())
