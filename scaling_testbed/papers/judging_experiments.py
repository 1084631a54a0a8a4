"""Judges of claims that belong to one experiment each: warm-up, kappa, the shape of models, the attention scale."""

import math

import numpy as np

from scaling_testbed.analysis.curves.grouping import SCAN, Curve, label
from scaling_testbed.analysis.curves.lr_sensitivity import Sensitivity
from scaling_testbed.analysis.rows.conditions import text
from scaling_testbed.analysis.rows.study import number
from scaling_testbed.papers.evidence import (
    RESOLUTION,
    Evidence,
    Judge,
    Part,
    Verdict,
    apart,
    by_size_without,
    pairs,
    remaining,
    size_name,
    text_of,
    weigh,
)
from scaling_testbed.papers.judging_losses import best_losses


def falls_along(key: str, what: str) -> Judge:
    """`what`, "S" or "best loss", is lower at the largest value of a key than at the smallest, at each size."""

    def judge(evidence: Evidence) -> Verdict:
        parts, gaps = _gains(evidence, key, what)
        return weigh([part for _, part in parts], gaps, 2)

    return judge


def gain_grows(key: str) -> Judge:
    """What the largest value of a key takes from S is more at the largest size than at the smallest."""

    def judge(evidence: Evidence) -> Verdict:
        parts, gaps = _gains(evidence, key, "S")
        if gaps or len(parts) < 2:
            return weigh([part for _, part in parts], gaps, 2)
        (_, small), (_, large) = min(parts, key=lambda p: p[0]), max(parts, key=lambda p: p[0])
        more = large.gain - small.gain
        return weigh([Part(f"{small.words}; {large.words}", more, abs(more) >= RESOLUTION)])

    return judge


def _gains(evidence: Evidence, key: str, what: str) -> tuple[list[tuple[float, Part]], list[str]]:
    """For each size what S or the best loss loses from the smallest to the largest value of a key."""
    parts, gaps = [], []
    for found in by_size_without(key, evidence.sensitivities, lambda one: one.curve):
        found = sorted(found, key=lambda one: number(one.curve.settings, key))
        if len(found) < 2:
            continue
        short, long = found[0], found[-1]
        a, b = _measured(short, what), _measured(long, what)
        if not a or not b:
            gaps.append(f"{what} at {size_name(short.curve)}: {short.withheld or long.withheld}")
            continue
        names = [text(one.curve.settings[key]) for one in (short, long)]
        first, last = (one.s if what == "S" else float(np.mean(values)) for one, values in ((short, a), (long, b)))
        words = f"{size_name(short.curve)}: {what} {first:.3f} at {names[0]}, {last:.3f} at {names[1]}"
        parts.append((short.curve.n_params, Part(words, first - last, apart(a, b))))
    return parts, gaps


def _measured(one: Sensitivity, what: str) -> list[float]:
    """What tells whether two conditions differ: the seeds' losses at the best rate, or S and its interval."""
    if what == "best loss":
        return best_losses(one.curve) if one.curve.runs and not one.curve.missing else []
    return [value for value in (one.low, one.s, one.high) if value is not None]


def kappa_harmless(limit: float, margin: float = 0.1) -> Judge:
    """Up to kappa = limit the loss is within a margin, in nats, of that of the smallest kappa."""

    def judge(evidence: Evidence) -> Verdict:
        base, rest, gaps = _kappas(evidence, 0, limit)
        parts = [Part(words, 1.0 if gap <= margin else -1.0, True) for gap, words in rest]
        return weigh(parts if base else [], gaps, 1, f"values of kappa up to {limit:g}")

    return judge


def kappa_hurts(limit: float, margin: float = 0.1) -> Judge:
    """From kappa = limit on the loss is higher by a margin, in nats, than that of the smallest kappa."""

    def judge(evidence: Evidence) -> Verdict:
        base, rest, gaps = _kappas(evidence, limit, math.inf)
        parts = [Part(words, 1.0 if gap >= margin else -1.0, True) for gap, words in rest]
        return weigh(parts if base else [], gaps, 1, f"values of kappa from {limit:g} on")

    return judge


def kappa_below_bigram(limit: float) -> Judge:
    """From kappa = limit on the loss is above that of a model without layers."""

    def judge(evidence: Evidence) -> Verdict:
        bigrams = [curve for curve in evidence.curves if curve.settings.get("model.n_layers") == 0 and curve.runs]
        if not bigrams:
            return weigh([], evidence.missing, 1, "models without layers")
        base = float(np.mean(best_losses(bigrams[0])))
        parts = []
        for curve in _with_kappa(evidence):
            if number(curve.settings, "model.kappa") >= limit * (1 - 1e-9):
                loss = float(np.mean(best_losses(curve)))
                words = f"kappa={curve.settings['model.kappa']:g}: loss {loss:.3f}, without layers {base:.3f}"
                parts.append(Part(words, loss - base, apart(best_losses(curve), best_losses(bigrams[0]))))
        return weigh(parts, evidence.missing, 1, f"values of kappa from {limit:g} on")

    return judge


def _with_kappa(evidence: Evidence) -> list[Curve]:
    """By kappa. A model without layers has one in its configuration, and no attention that it would matter to."""
    found = [
        curve
        for curve in evidence.curves
        if curve.settings.get("model.kappa") is not None and curve.settings.get("model.n_layers") != 0 and curve.runs
    ]
    return sorted(found, key=lambda curve: number(curve.settings, "model.kappa"))


def _kappas(evidence: Evidence, low: float, high: float) -> tuple[float | None, list[tuple[float, str]], list[str]]:
    """Loss at the smallest kappa; (loss above it, words) for the others between low and high; what is missing."""
    found = _with_kappa(evidence)
    if len(found) < 2:
        return None, [], evidence.missing
    base, rest = float(np.mean(best_losses(found[0]))), []
    for curve in found[1:]:
        kappa, loss = number(curve.settings, "model.kappa"), float(np.mean(best_losses(curve)))
        if low * (1 - 1e-9) <= kappa <= high * (1 + 1e-9):
            rest.append((loss - base, f"kappa={kappa:g}: loss {loss:.3f}, at the smallest kappa {base:.3f}"))
    return base, rest, evidence.missing


def joint_best() -> Judge:
    """At the largest size of the joint scan its best loss is below those of width and depth of nearly that size."""

    def judge(evidence: Evidence) -> Verdict:
        found = [
            (joint, other)
            for axis in ("width", "depth")
            for joint, other in pairs(evidence.curves, SCAN, "joint", axis, lambda curve: curve, by_n=True)
            if joint.runs and other.runs
        ]
        top = max((joint.n_params for joint, _ in found), default=0)
        parts = []
        for joint, other in (pair for pair in found if pair[0].n_params == top):
            a, b = best_losses(joint), best_losses(other)
            words = f"{size_name(joint)}: best loss {np.mean(a):.4f} joint, {np.mean(b):.4f} {other.condition[SCAN]}"
            parts.append(Part(words, float(np.mean(b) - np.mean(a)), apart(a, b)))
        return weigh(parts, evidence.missing, 1, "joint models beside a wide or deep one of the same size")

    return judge


def joint_extrapolates_best() -> Judge:
    """A power law in N through the best losses of all but the largest model errs least on it for the joint scan."""

    def judge(evidence: Evidence) -> Verdict:
        errors = {}
        for axis in ("joint", "width", "depth"):
            points = sorted(
                (c.n_params, float(np.mean(best_losses(c)))) for c in evidence.curves if c.fits({SCAN: axis}) and c.runs
            )
            if len(points) >= 4:
                log_n, log_loss = np.log(np.array(points)).T
                foretold = np.polyval(np.polyfit(log_n[:-1], log_loss[:-1], 1), log_n[-1])
                errors[axis] = abs(math.exp(foretold) - points[-1][1])
        if "joint" not in errors or len(errors) < 2:
            return weigh([], evidence.missing, 1, "pairs of scans with four sizes each")
        others = min(error for axis, error in errors.items() if axis != "joint")
        words = "error at the largest size: " + ", ".join(f"{error:.4f} {axis}" for axis, error in errors.items())
        gain = others - errors["joint"]
        return weigh([Part(words, gain, abs(gain) >= RESOLUTION)], evidence.missing)

    return judge


def better_small_worse_large(key: str, one, other) -> Judge:
    """In each remaining condition the best loss is lower with one value of a key at the smallest size, and higher at
    the largest; every one of these differences must be clear."""

    def judge(evidence: Evidence) -> Verdict:
        found = [pair for pair in pairs(evidence.curves, key, one, other, lambda c: c) if pair[0].runs and pair[1].runs]
        parts = []
        for rest in dict.fromkeys(remaining(a, key) for a, _ in found):
            own = sorted((pair for pair in found if remaining(pair[0], key) == rest), key=lambda pair: pair[0].n_params)
            for (a, b), sign in ((own[0], 1), (own[-1], -1)) if own[0][0].n_params < own[-1][0].n_params else ():
                mine, yours = best_losses(a), best_losses(b)
                both = f"{np.mean(mine):.4f} with {text_of(one)}, {np.mean(yours):.4f} with {text_of(other)}"
                words = f"{label(dict(rest))} {size_name(a)}: best loss {both}"
                parts.append(Part(words, sign * float(np.mean(yours) - np.mean(mine)), apart(mine, yours)))
        if not parts:
            return weigh([], evidence.missing, 1, "pairs of sizes")
        clear = all(part.clear for part in parts)
        return weigh(parts, evidence.missing, 1 if clear else len(parts) + 1, "clear differences")

    return judge
