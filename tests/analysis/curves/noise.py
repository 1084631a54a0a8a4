"""Loss curves of nano models with the noise of their seeds, as exploratory runs of qknorm_lr have it (three seeds).

Means at seven rates from 1e-3 to 1, and standard deviations over seeds: small at good rates, large at bad ones. A third
of the variance is common to the rates of a seed, which share weights and batches.
"""

import numpy as np

LRS = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)
MEANS = {
    ("none", 16): (2.361, 2.163, 2.041, 2.065, 2.304, 3.021, 3.245),
    ("none", 32): (2.067, 1.866, 1.839, 2.022, 2.717, 2.995, 3.093),
    ("none", 64): (1.799, 1.649, 1.709, 2.124, 2.762, 2.838, 3.146),
    ("layernorm", 16): (2.379, 2.144, 2.017, 2.063, 2.140, 2.398, 2.722),
    ("layernorm", 32): (2.076, 1.858, 1.804, 1.879, 1.951, 2.191, 2.705),
    ("layernorm", 64): (1.797, 1.632, 1.641, 1.723, 1.804, 2.023, 2.695),
    ("flat", 0): (2.05, 2.045, 2.04, 2.04, 2.06, 2.2, 2.6),  # the best rate is hard to tell
}
SDS = {
    "none": (0.012, 0.012, 0.015, 0.03, 0.1, 0.12, 0.08),
    "layernorm": (0.012, 0.01, 0.012, 0.015, 0.02, 0.05, 0.1),
    "flat": (0.02, 0.02, 0.02, 0.02, 0.03, 0.05, 0.1),
}
COMMON = 1 / 3


def losses(rng, place, n_seeds, shared_S=None):
    """Losses [seeds, rates] of one condition and size. shared_S: what a seed adds in all conditions, in its SDs."""
    own_SL = rng.standard_normal((n_seeds, len(LRS)))
    shared_S = rng.standard_normal(n_seeds) if shared_S is None else shared_S
    noise_SL = np.sqrt(COMMON) * shared_S[:, None] + np.sqrt(1 - COMMON) * own_SL
    return np.array(MEANS[place]) + np.array(SDS[place[0]]) * noise_SL
