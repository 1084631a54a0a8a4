"""For each law inputs that tell its parameters apart, and parameters to find again."""

import numpy as np

from scaling_testbed.analysis.laws.forms import LAWS


def _grid(**axes):
    mesh = np.meshgrid(*axes.values(), indexing="ij")
    return {key: values.ravel() for key, values in zip(axes, mesh, strict=True)}


SIZES, TOKENS = np.geomspace(1e6, 1e9, 6), np.geomspace(1e8, 1e11, 6)
ND = _grid(n_params=SIZES, n_tokens=TOKENS)
FLOPS = {"flops": np.geomspace(1e15, 1e21, 12)}
LOSSES = {"loss": np.linspace(2.0, 5.0, 12)}
CHINCHILLA = {"E": 1.7, "A": 400.0, "B": 410.0, "alpha": 0.34, "beta": 0.28}

INPUTS = {
    "over_training": ND,
    "chinchilla": ND,
    "coupled": ND,
    "kaplan_n": {"n_params": SIZES},
    "kaplan_d": {"n_tokens": TOKENS},
    "kaplan_c": FLOPS,
    "compute": FLOPS,
    "kaplan_nd": ND,
    "data_constrained": _grid(n_params=SIZES, n_tokens=TOKENS, unique_tokens=[1e7, 1e8, 1e9]),
    "loss_steps": _grid(n_params=SIZES, steps=np.geomspace(1e3, 1e5, 4)),
    "batch": _grid(n_params=SIZES[::2], steps=np.geomspace(1e3, 1e5, 4), batch_tokens=np.geomspace(1e4, 1e7, 4)),
    "average_params": _grid(n_params_average=SIZES, n_tokens=TOKENS),
    "bivariate": _grid(n_params_encoder=SIZES, n_params_decoder=SIZES),
    "loss_to_error": LOSSES,
    "sigmoid": LOSSES,
    "loss_to_loss": LOSSES,
    "optimal_n": FLOPS,
    "lr_power": FLOPS,
    "batch_power": FLOPS,
    "optimal_lr": {"n_params": SIZES},
    "optimal_lr_nd": ND,
    "optimal_lr_curved": {"n_params": SIZES},
    "optimal_batch": {"n_tokens": TOKENS},
}

PLANTED = {
    "over_training": {"E": 1.7, "a": 150.0, "b": 250.0, "eta": 0.13},
    "chinchilla": CHINCHILLA,
    "coupled": CHINCHILLA | {"k": 0.6},
    "kaplan_n": {"Nc": 8.8e13, "alpha_N": 0.076},
    "kaplan_d": {"Dc": 5.4e13, "alpha_D": 0.095},
    "kaplan_c": {"Cc": 2.7e28, "alpha_C": 0.05},
    "compute": {"E": 1.4, "C0": 2.5e19, "alpha": 0.17},
    "kaplan_nd": {"Nc": 6.4e13, "Dc": 1.8e13, "alpha_N": 0.076, "alpha_D": 0.103},
    "data_constrained": CHINCHILLA | {"R_D": 15.4, "R_N": 5.3},
    "loss_steps": {"Nc": 6.5e13, "alpha_N": 0.077, "Sc": 2.1e3, "alpha_S": 0.76},
    "batch": {"Nc": 1.5e14, "alpha_N": 0.076, "Sc": 2.6e3, "alpha_S": 0.67, "B_star": 1.7e8, "alpha_B": 0.205},
    "average_params": CHINCHILLA,
    "bivariate": {"E": 1.2, "alpha": 1.5, "p_e": 0.2, "p_d": 0.3},
    "loss_to_error": {"epsilon": 0.85, "k": 2.1, "gamma": 0.75},
    "sigmoid": {"a": 0.6, "b": 0.25, "k": 3.0, "L0": 3.0},
    "loss_to_loss": {"K": 0.9, "kappa": 1.1, "E0": 0.8, "E1": 0.6},
    "optimal_n": {"N0": 9e7, "C0": 1e18, "p": 0.5},
    "lr_power": {"lr0": 1.8e-3, "C0": 1e18, "p": -0.125},
    "batch_power": {"B0": 2.3e5, "C0": 1e18, "p": 0.3271},
    "optimal_lr": {"lr0": 4e-3, "N0": 3.16e7, "p": -0.3},
    "optimal_lr_nd": {"lr0": 2e-2, "N0": 3.16e7, "D0": 3.16e9, "p": -0.713, "q": 0.307},
    "optimal_lr_curved": {"lr0": 4e-3, "N0": 3.16e7, "p": -0.3, "c": 0.05},
    "optimal_batch": {"B0": 2e5, "D0": 3.16e9, "p": 0.571},
}


def observations(name):
    """Inputs and exact outputs of a law."""
    inputs = INPUTS[name]
    return inputs, LAWS[name].predict(PLANTED[name], inputs)
