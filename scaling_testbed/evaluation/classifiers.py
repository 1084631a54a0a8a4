"""Two linear classifiers of frozen features: Gaussian naive Bayes in closed form, and logistic regression.

The first one needs fewer labels (Ng and Jordan 2001, "On discriminative vs. generative classifiers"). With many labels
the second one is better where features depend on each other.

Shapes in names: N examples, D features, C classes.
"""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F

PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
ITERATIONS = 100  # of L-BFGS

Scores = Callable[[np.ndarray], np.ndarray]  # features [N, D] -> scores [N, C]; the class is the largest


def naive_bayes(x_ND: np.ndarray, class_N: np.ndarray, n_classes: int) -> Scores:
    """Gaussian classes with the mean of each, and one variance of each feature for all classes; equal priors.

    Features of variance 0 within the classes have the smallest other variance. Closed form, fp64.
    """
    x_ND = np.asarray(x_ND, np.float64)
    mean_CD = np.stack([x_ND[class_N == c].mean(0) for c in range(n_classes)])
    variance_D = np.square(x_ND - mean_CD[class_N]).sum(0) / max(1, len(x_ND) - n_classes)
    positive_D = variance_D[variance_D > 0]
    variance_D = np.maximum(variance_D, positive_D.min() if len(positive_D) else 1.0)
    weight_CD = mean_CD / variance_D
    bias_C = -(weight_CD * mean_CD).sum(1) / 2
    return lambda other_ND: np.asarray(other_ND, np.float64) @ weight_CD.T + bias_C


def logistic(x_ND: np.ndarray, class_N: np.ndarray, n_classes: int, rng: np.random.Generator) -> Scores:
    """Multinomial logistic regression on standardised features: the mean cross-entropy plus penalty / 2 times the sum
    of the squared weights, minimised by L-BFGS in fp64.

    The penalty is the one of PENALTIES with the lowest cross-entropy on a quarter of the examples of each class, one at
    least, fitted on the others. All examples are then fitted with it. A class needs two examples.
    """
    x_ND = np.asarray(x_ND, np.float64)
    shift_D, scale_D = x_ND.mean(0), x_ND.std(0)
    scale_D[scale_D == 0] = 1.0
    x = torch.from_numpy((x_ND - shift_D) / scale_D)
    y = torch.from_numpy(np.asarray(class_N, np.int64))
    held = np.zeros(len(x), bool)
    for c in range(n_classes):
        places = rng.permutation(np.flatnonzero(class_N == c))
        held[places[: max(1, len(places) // 4)]] = True
    fit, told = torch.from_numpy(np.flatnonzero(~held)), torch.from_numpy(np.flatnonzero(held))
    losses = []
    for penalty in PENALTIES:
        weight_CD, bias_C = _fitted(x[fit], y[fit], n_classes, penalty)
        losses.append(F.cross_entropy(x[told] @ weight_CD.T + bias_C, y[told]).item())
    best = PENALTIES[int(np.argmin(losses))]
    weight, bias = (values.numpy() for values in _fitted(x, y, n_classes, best))
    return lambda other_ND: (np.asarray(other_ND, np.float64) - shift_D) / scale_D @ weight.T + bias


def _fitted(x: torch.Tensor, y: torch.Tensor, n_classes: int, penalty: float) -> tuple[torch.Tensor, torch.Tensor]:
    weight_CD = torch.zeros(n_classes, x.shape[1], dtype=torch.float64, requires_grad=True)
    bias_C = torch.zeros(n_classes, dtype=torch.float64, requires_grad=True)
    search = torch.optim.LBFGS([weight_CD, bias_C], max_iter=ITERATIONS, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        search.zero_grad()
        loss = F.cross_entropy(x @ weight_CD.T + bias_C, y) + penalty / 2 * weight_CD.square().sum()
        loss.backward()
        return loss

    search.step(closure)
    return weight_CD.detach(), bias_C.detach()


def balanced_accuracy(scores_NC: np.ndarray, class_N: np.ndarray) -> float:
    """The mean over the classes of the share of their examples that are found."""
    found_N = scores_NC.argmax(1) == class_N
    return float(np.mean([found_N[class_N == c].mean() for c in np.unique(class_N)]))
