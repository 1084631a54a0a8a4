"""Scaling laws: formula, parameters with their bounds, and source. This module imports no library but numpy.

N is a number of parameters under a convention that the fit names. D is a number of tokens, C = 6 N D is compute in
FLOPs, M = D/N is tokens per parameter, and L is a loss in nats per token. A law is a function of two dictionaries,
parameters and inputs, whose values broadcast. It is written with numpy's operators and with the functions of slopes.py,
which differentiates it exactly.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from scaling_testbed.registry import Registry

# To add a law: `LAWS.add(NAME, Law(NAME, ...))`. The commands list, fit, predict and allocate and the figures use it.
LAWS: Registry["Law"] = Registry("law")
Values = Mapping[str, np.ndarray]
HUBER, LSQ, LSQ_LOG = "huber_log", "lsq", "lsq_log"  # objectives, see fitting.py


@dataclass(frozen=True)
class Param:
    """One parameter of a law.

    start: the range from which starts are drawn. low, high: bounds. log: whether the fit uses its logarithm; starts are
    then uniform in the logarithm. centre: an input; the parameter is fixed at the middle of its fitted values, where
    the law is best known.
    """

    name: str
    start: tuple[float, float]
    low: float = 0.0
    high: float = np.inf
    log: bool = False
    centre: str | None = None


@dataclass(frozen=True)
class Law:
    """A scaling law.

    inputs, output: columns of the rows. function: from parameters (arrays or numbers) and inputs to the output.
    objective: the default objective of its fit. of_best: whether the law is about the best run at each input, e.g. the
    law of the best learning rate.
    """

    name: str
    formula: str
    source: str
    inputs: tuple[str, ...]
    output: str
    params: tuple[Param, ...]
    function: Callable[[Any, Values], np.ndarray]
    objective: str = HUBER
    of_best: bool = False

    def predict(self, params: Mapping[str, float] | Values, inputs: Values) -> np.ndarray:
        """The output for inputs of any broadcastable shape."""
        with np.errstate(all="ignore"):  # far from the optimum a power may overflow; the fit then rejects inf
            return self.function(params, {key: np.asarray(inputs[key], float) for key in self.inputs})


def _scale(name: str, low: float, high: float) -> Param:
    return Param(name, (low, high), low=1e-30, high=1e60, log=True)


def _exponent(name: str, low: float = 0.05, high: float = 1.0, most: float = 4.0) -> Param:
    return Param(name, (low, high), low=0.0, high=most)


FLOOR = Param("E", (0.1, 3.0))


def _over_training(p: Values, x: Values) -> np.ndarray:
    compute = 6 * x["n_params"] * x["n_tokens"]
    ratio = x["n_tokens"] / x["n_params"]
    return p["E"] + (p["a"] * ratio ** p["eta"] + p["b"] * ratio ** -p["eta"]) * compute ** -p["eta"]


def _chinchilla(p: Values, x: Values) -> np.ndarray:
    return p["E"] + p["A"] * x["n_params"] ** -p["alpha"] + p["B"] * x["n_tokens"] ** -p["beta"]


def _coupled(p: Values, x: Values) -> np.ndarray:
    return p["E"] + (p["A"] * x["n_params"] ** -p["alpha"] + p["B"] * x["n_tokens"] ** -p["beta"]) ** p["k"]


def _average_params(p: Values, x: Values) -> np.ndarray:
    return p["E"] + p["A"] * x["n_params_average"] ** -p["alpha"] + p["B"] * x["n_tokens"] ** -p["beta"]


def _power(of: str, scale: str, exponent: str) -> Callable[[Values, Values], np.ndarray]:
    """(scale/x)^exponent."""
    return lambda p, x: (p[scale] / x[of]) ** p[exponent]


def _kaplan_nd(p: Values, x: Values) -> np.ndarray:
    inner = (p["Nc"] / x["n_params"]) ** (p["alpha_N"] / p["alpha_D"]) + p["Dc"] / x["n_tokens"]
    return inner ** p["alpha_D"]


def _data_constrained(p: Values, x: Values) -> np.ndarray:
    n, d, u = x["n_params"], x["n_tokens"], x["unique_tokens"]
    g = (p["alpha"] * p["A"] / (p["beta"] * p["B"])) ** (1 / (p["alpha"] + p["beta"]))
    optimal = g * (u * g) ** (p["beta"] / p["alpha"])  # the N whose compute-optimal D is the unique tokens
    unique_n = np.where(n < optimal.real, n, optimal)
    unique_d = np.minimum(d, u)
    repeats_n, repeats_d = n / unique_n - 1, d / unique_d - 1
    effective_n = unique_n * (1 + p["R_N"] * -np.expm1(-repeats_n / p["R_N"]))
    effective_d = unique_d * (1 + p["R_D"] * -np.expm1(-repeats_d / p["R_D"]))
    return p["E"] + p["A"] * effective_n ** -p["alpha"] + p["B"] * effective_d ** -p["beta"]


def _loss_steps(p: Values, x: Values) -> np.ndarray:
    return (p["Nc"] / x["n_params"]) ** p["alpha_N"] + (p["Sc"] / x["steps"]) ** p["alpha_S"]


def critical_batch(p: Values, loss: Any) -> Any:
    """B_crit = B_star / L^(1/alpha_B) in tokens, at a loss in nats per token (Su et al. 2024, arXiv 2403.06563)."""
    return p["B_star"] / loss ** (1 / p["alpha_B"])


def _batch(p: Values, x: Values) -> np.ndarray:
    """The loss of an implicit equation, by Newton's method from below.

    The function is increasing and concave, so the iterates rise to its root, without derivatives. One step of Newton's
    method from the root has the derivatives of the root in the parameters.
    """
    size = (p["Nc"] / x["n_params"]) ** p["alpha_N"]
    time = (p["Sc"] / x["steps"]) ** p["alpha_S"]
    ratio, power = p["B_star"] / x["batch_tokens"], 1 / p["alpha_B"]

    def step(loss, size, time, ratio, power, alpha):
        slowed = 1 + ratio * loss**-power
        value = loss - size - time * slowed**alpha
        slope = 1 + time * alpha * slowed ** (alpha - 1) * ratio * power * loss ** (-power - 1)
        return loss - value / slope

    real = [np.real(value) for value in (size, time, ratio, power, p["alpha_S"])]
    loss = real[0] + real[1]
    for _ in range(60):
        before, loss = loss, step(loss, *real)
        if not np.any(np.abs(loss - before) > 1e-15 * np.abs(loss)):
            break
    return step(loss, size, time, ratio, power, p["alpha_S"])


def _bivariate(p: Values, x: Values) -> np.ndarray:
    encoder, decoder = REFERENCE_N / x["n_params_encoder"], REFERENCE_N / x["n_params_decoder"]
    return p["E"] + p["alpha"] * encoder ** p["p_e"] * decoder ** p["p_d"]


def _error(p: Values, x: Values) -> np.ndarray:
    return p["epsilon"] - p["k"] * np.exp(-p["gamma"] * x["loss"])


def _sigmoid(p: Values, x: Values) -> np.ndarray:
    return p["b"] + p["a"] / (1 + np.exp(p["k"] * (x["loss"] - p["L0"])))


def _loss_to_loss(p: Values, x: Values) -> np.ndarray:
    above = x["loss"] - p["E0"]
    positive = above.real > 0  # below E0 the law gives E1
    return p["E1"] + np.where(positive, p["K"] * np.where(positive, above, 1.0) ** p["kappa"], 0.0)


def _grows(scale: str, of: str, centre: str) -> Callable[[Values, Values], np.ndarray]:
    return lambda p, x: p[scale] * (x[of] / p[centre]) ** p["p"]


REFERENCE_N = 1e8
KAPLAN = "Kaplan et al. 2020, arXiv 2001.08361"
SIGNED = Param("p", (-1.0, 1.0), low=-4.0, high=4.0)
C0, N0, D0 = (
    Param(f"{of[0]}0", (1.0, 1.0), low=1e-30, high=1e60, centre=of[1])
    for of in (("C", "flops"), ("N", "n_params"), ("D", "n_tokens"))
)
N_SCALE, D_SCALE = _scale("Nc", 1e6, 1e16), _scale("Dc", 1e8, 1e16)
CHINCHILLA_PARAMS = (
    FLOOR,
    _scale("A", 1.0, 1e4),
    _scale("B", 1.0, 1e5),
    _exponent("alpha"),
    _exponent("beta"),
)

for law in (
    Law(
        "over_training",
        "L = E + (a M^eta + b M^-eta) C^-eta",
        "Gadre et al. 2024, arXiv 2403.08540; the same as E + a 6^-eta N^-2eta + b 6^-eta D^-2eta",
        ("n_params", "n_tokens"),
        "loss",
        (FLOOR, _scale("a", 1.0, 1e4), _scale("b", 1.0, 1e4), _exponent("eta", 0.03, 0.5, 2.0)),
        _over_training,
    ),
    Law(
        "chinchilla",
        "L = E + A/N^alpha + B/D^beta",
        "Hoffmann et al. 2022, arXiv 2203.15556, section 3.3 (approach 3)",
        ("n_params", "n_tokens"),
        "loss",
        CHINCHILLA_PARAMS,
        _chinchilla,
    ),
    Law(
        "coupled",
        "L = E + (A/N^alpha + B/D^beta)^k",
        "Videau et al. 2026, arXiv 2608.07222; k = 1 is chinchilla, and the best size of a budget is the same function",
        ("n_params", "n_tokens"),
        "loss",
        (
            FLOOR,
            Param("A", (1.0, 1e4), 1e-6, 1e7, log=True),
            Param("B", (1.0, 1e5), 1e-6, 1e7, log=True),
            Param("alpha", (0.05, 1.0), 0.01, 2.0),
            Param("beta", (0.05, 1.0), 0.01, 2.0),
            Param("k", (0.3, 1.5), 0.01, 2.0),
        ),
        _coupled,
    ),
    Law(
        "kaplan_n",
        "L = (Nc/N)^alpha_N",
        f"{KAPLAN}, eq. 1.1; N without embeddings",
        ("n_params",),
        "loss",
        (N_SCALE, _exponent("alpha_N", 0.01, 0.3)),
        _power("n_params", "Nc", "alpha_N"),
    ),
    Law(
        "kaplan_d",
        "L = (Dc/D)^alpha_D",
        f"{KAPLAN}, eq. 1.2",
        ("n_tokens",),
        "loss",
        (D_SCALE, _exponent("alpha_D", 0.01, 0.3)),
        _power("n_tokens", "Dc", "alpha_D"),
    ),
    Law(
        "kaplan_c",
        "L = (Cc/C)^alpha_C",
        f"{KAPLAN}, eq. 1.3; C in FLOPs, of runs at the best size for it",
        ("flops",),
        "loss",
        (_scale("Cc", 1e12, 1e30), _exponent("alpha_C", 0.01, 0.3)),
        _power("flops", "Cc", "alpha_C"),
    ),
    Law(
        "compute",
        "L = E + (C0/C)^alpha",
        "a power law with a floor, as the grid search of Gadre et al. 2024 (arXiv 2403.08540) has it",
        ("flops",),
        "loss",
        (FLOOR, _scale("C0", 1e12, 1e30), _exponent("alpha", 0.01, 0.5)),
        lambda p, x: p["E"] + (p["C0"] / x["flops"]) ** p["alpha"],
    ),
    Law(
        "kaplan_nd",
        "L = ((Nc/N)^(alpha_N/alpha_D) + Dc/D)^alpha_D",
        f"{KAPLAN}, eq. 1.5",
        ("n_params", "n_tokens"),
        "loss",
        (N_SCALE, D_SCALE, _exponent("alpha_N", 0.02, 0.3), _exponent("alpha_D", 0.02, 0.3)),
        _kaplan_nd,
    ),
    Law(
        "data_constrained",
        "L = E + A/N'^alpha + B/D'^beta; D' = U_D + U_D R_D (1 - exp(-(D/U_D - 1)/R_D)), N' alike",
        "Muennighoff et al. 2023, arXiv 2305.16264; U_D = min(D, U), U_N = min(N, N*(U))",
        ("n_params", "n_tokens", "unique_tokens"),
        "loss",
        (*CHINCHILLA_PARAMS, Param("R_D", (1.0, 1e3), 1e-3, 1e9, True), Param("R_N", (1.0, 1e6), 1e-3, 1e9, True)),
        _data_constrained,
    ),
    Law(
        "loss_steps",
        "L = (Nc/N)^alpha_N + (Sc/S)^alpha_S",
        f"{KAPLAN}, eq. 1.6; S steps at one batch size, far above the critical one in the paper; fit it to --curves",
        ("n_params", "steps"),
        "loss",
        (N_SCALE, _exponent("alpha_N", 0.02, 0.3), _scale("Sc", 1e1, 1e5), _exponent("alpha_S", 0.2, 1.2)),
        _loss_steps,
    ),
    Law(
        "batch",
        "L = (Nc/N)^alpha_N + (Sc/S)^alpha_S (1 + B_crit/B)^alpha_S, B_crit = B_star / L^(1/alpha_B)",
        "Su et al. 2024, arXiv 2403.06563; implicit in L; S steps of B tokens",
        ("n_params", "steps", "batch_tokens"),
        "loss",
        (
            N_SCALE,
            _exponent("alpha_N", 0.02, 0.3),
            _scale("Sc", 1e1, 1e5),
            _exponent("alpha_S", 0.2, 1.2),
            _scale("B_star", 1e4, 1e10),
            Param("alpha_B", (0.1, 0.5), 0.02, 4.0),
        ),
        _batch,
    ),
    Law(
        "average_params",
        "L = E + A/N_avg^alpha + B/D^beta",
        "Jin et al. 2025, arXiv 2501.12486: N averaged over a run that prunes or grows; C = 6 N_avg D",
        ("n_params_average", "n_tokens"),
        "loss",
        CHINCHILLA_PARAMS,
        _average_params,
    ),
    Law(
        "bivariate",
        "L = E + alpha (1e8/N_e)^p_e (1e8/N_d)^p_d",
        "Ghorbani et al. 2021, arXiv 2109.07740: encoder and decoder; its reference sizes are 1e8 here",
        ("n_params_encoder", "n_params_decoder"),
        "loss",
        (FLOOR, _scale("alpha", 0.1, 10.0), _exponent("p_e"), _exponent("p_d")),
        _bivariate,
    ),
    Law(
        "loss_to_error",
        "error = epsilon - k exp(-gamma L)",
        "Gadre et al. 2024, arXiv 2403.08540",
        ("loss",),
        "error",
        (Param("epsilon", (0.3, 1.0), 0.0, 2.0), _scale("k", 0.1, 10.0), _exponent("gamma", 0.1, 3.0, 20.0)),
        _error,
        LSQ,
    ),
    Law(
        "sigmoid",
        "accuracy = b + a / (1 + exp(k (L - L0)))",
        "the second step of Bhagia et al. 2024, arXiv 2412.04403, and Dubey et al. 2024, arXiv 2407.21783",
        ("loss",),
        "accuracy",
        (
            Param("a", (0.1, 1.0), 0.0, 2.0),
            Param("b", (0.0, 0.5), -1.0, 1.0),
            _exponent("k", 0.5, 10.0, 100.0),
            Param("L0", (0.5, 5.0), 0.0, 20.0),
        ),
        _sigmoid,
        LSQ,
    ),
    Law(
        "loss_to_loss",
        "L_other = K (L - E0)^kappa + E1",
        "Brandfonbrener et al. 2024, arXiv 2411.12925; the two losses of one model, or of models paired by compute",
        ("loss",),
        "loss_other",
        (
            _scale("K", 0.1, 10.0),
            _exponent("kappa", 0.3, 2.0),
            Param("E0", (0.0, 2.0)),
            Param("E1", (0.0, 2.0)),
        ),
        _loss_to_loss,
    ),
    Law(
        "optimal_n",
        "N = N0 (C/C0)^p",
        "Hoffmann et al. 2022, arXiv 2203.15556, sections 3.1 and 3.2: the best size of each budget",
        ("flops",),
        "n_params",
        (_scale("N0", 1e3, 1e12), C0, SIGNED),
        _grows("N0", "flops", "C0"),
        LSQ_LOG,
        of_best=True,
    ),
    Law(
        "lr_power",
        "lr = lr0 (C/C0)^p",
        "DeepSeek-AI 2024, arXiv 2401.02954",
        ("flops",),
        "lr",
        (_scale("lr0", 1e-5, 1e1), C0, SIGNED),
        _grows("lr0", "flops", "C0"),
        LSQ_LOG,
        of_best=True,
    ),
    Law(
        "batch_power",
        "B = B0 (C/C0)^p",
        "DeepSeek-AI 2024, arXiv 2401.02954; B in tokens",
        ("flops",),
        "batch_tokens",
        (_scale("B0", 1e1, 1e9), C0, SIGNED),
        _grows("B0", "flops", "C0"),
        LSQ_LOG,
        of_best=True,
    ),
    Law(
        "optimal_lr",
        "lr = lr0 (N/N0)^p",
        "the best rate of each size, whose exponent muP should make zero (Yang et al. 2022, arXiv 2203.03466)",
        ("n_params",),
        "lr",
        (_scale("lr0", 1e-5, 1e1), N0, SIGNED),
        _grows("lr0", "n_params", "N0"),
        LSQ_LOG,
        of_best=True,
    ),
    Law(
        "optimal_lr_nd",
        "lr = lr0 (N/N0)^p (D/D0)^q",
        "Li et al. 2025 (Step law), arXiv 2503.04715",
        ("n_params", "n_tokens"),
        "lr",
        (_scale("lr0", 1e-5, 1e1), N0, D0, SIGNED, replace(SIGNED, name="q")),
        lambda p, x: p["lr0"] * (x["n_params"] / p["N0"]) ** p["p"] * (x["n_tokens"] / p["D0"]) ** p["q"],
        LSQ_LOG,
        of_best=True,
    ),
    Law(
        "optimal_lr_curved",
        "lr = lr0 (N/N0)^(p + c ln(N/N0))",
        "ln lr is a quadratic in ln N: Zhang et al. 2026, arXiv 2606.29158, find that it curves upwards",
        ("n_params",),
        "lr",
        (_scale("lr0", 1e-5, 1e1), N0, SIGNED, Param("c", (-0.3, 0.3), low=-4.0, high=4.0)),
        lambda p, x: p["lr0"] * (x["n_params"] / p["N0"]) ** (p["p"] + p["c"] * np.log(x["n_params"] / p["N0"])),
        LSQ_LOG,
        of_best=True,
    ),
    Law(
        "optimal_batch",
        "B = B0 (D/D0)^p",
        "Li et al. 2025 (Step law), arXiv 2503.04715; B in tokens",
        ("n_tokens",),
        "batch_tokens",
        (_scale("B0", 1e1, 1e9), D0, SIGNED),
        _grows("B0", "n_tokens", "D0"),
        LSQ_LOG,
        of_best=True,
    ),
):
    LAWS.add(law.name, law)
