"""For each sweep a world in which the paper is right and one in which it is wrong, with planted effects.

A world takes `paper` (whether it is the paper's) and returns rows and traces by run id, of one seed; `seeded` makes
those of several seeds of them.
"""

import math

import numpy as np

from tests.analysis.conftest import LRS, WIDTHS, grid, make_row

WITHOUT, WITH = {"model__qk_norm": "none"}, {"model__qk_norm": "layernorm"}
MLP, KEY = "blocks.0.mlp.mlp_in.weight", "blocks.0.attention.k.weight"
STEPS = range(0, 101, 10)


def bowl(lr, best=3e-2, depth=0.1):
    return 3 + depth * math.log10(lr / best) ** 2


def both(key, one, other):
    return [{key: one}, {key: other}]


def seeded(rows, traces, seeds=(0, 1, 2, 3), sd=0.002):
    """The rows and traces of several seeds: losses differ by normal noise, recorded quantities by factors."""
    found, recorded, rng = [], {}, np.random.default_rng(0)
    for row in rows:
        for seed in seeds:
            one = {**row, "seed": seed, "run_id": f"{row['run_id']} {seed}"}
            noise = sd * rng.standard_normal()
            if isinstance(row["val_loss"], float) and row["val_loss"] < row["val_loss_initial"]:
                one["val_loss"] += noise
            for field in ("diagnostics_at_step", "diagnostics_last_mean"):
                if field in row:
                    one[field] = {k: v if k.startswith("step") else v * math.exp(noise) for k, v in row[field].items()}
            if row["run_id"] in traces:
                recorded[one["run_id"]] = [
                    {key: value if key == "step" else value * math.exp(noise) for key, value in step.items()}
                    for step in traces[row["run_id"]]
                ]
            found.append(one)
    return found, recorded


def qknorm_lr(paper):
    critical = dict(zip(WIDTHS, (0.1, 0.03, 0.01) if paper else (0.01, 0.03, 0.1), strict=True))

    def loss(condition, width, lr, seed):
        grows = (width / 32) ** (0.5 if paper else -0.5)
        harm = 7 * (width / 32) ** -0.25
        if condition == WITHOUT:
            harmed = lr > 1.1 * critical[width]
            return bowl(lr, depth=0.1 * grows) + harm * harmed + (0 if paper else 0.2)
        return bowl(lr, depth=0.1 * grows) + harm * (not paper and lr >= 0.01)

    return grid(loss, [WITHOUT, WITH]), {}


def zloss_drift(paper):
    keys = ("compute__precision", "loss__z_loss", "optimizer__weight_decay")
    conditions = [
        dict(zip(keys, (precision, z, w), strict=True))
        for precision in ("bf16", "fp32")
        for z in (0.0, 1e-4)
        for w in (0.0, 1e-4)
    ]

    def loss(condition, *_):
        return 3.0 - (0.1 if bool(condition["loss__z_loss"]) == paper else 0.0)

    rows = grid(loss, conditions, widths=[16, 32], lrs=[0.1, 0.3])
    for row in rows:
        z = bool(row["loss.z_loss"])
        square = 4.0 if z == paper else 900.0
        if not z and row["optimizer.weight_decay"]:
            square *= 0.5 if paper else 2.0
        row["diagnostics_last_mean"] = {"steps": [50, 100], "log_z_mean_square": square}
    return rows, {}


def traced(rows, trace):
    return rows, {row["run_id"]: [{"step": step, **trace(row, step)} for step in STEPS] for row in rows}


def qknorm_trace(paper):
    rows = grid(lambda c, *_: 9e9 if (c == WITHOUT) == paper else 3.0, [WITHOUT, WITH], widths=[32, 128], lrs=[0.1])

    def trace(row, step):
        grows = (row["model.qk_norm"] == "none") == paper
        first = 10 * math.exp(0.1 * step) if grows else 10.0
        return {"attention_logit_max/0": first, "attention_logit_max/1": first * (0.5 if paper else 2)}

    return traced(rows, trace)


def zloss_lr(paper):
    conditions = [{"loss__z_loss": z, "optimizer__weight_decay": w} for z in (0.0, 1e-4) for w in (0.0, 1e-4)]

    def loss(condition, width, lr, seed):
        bare = not any(condition.values())
        return (None if lr > 0.03 else bowl(lr)) if bare == paper else bowl(lr)

    return grid(loss, conditions), {}


def zloss_trace(paper):
    rows = grid(lambda *_: 3.0, both("loss__z_loss", 0.0, 1e-4), widths=[32], lrs=[0.1])

    def trace(row, step):
        drifts = (row["loss.z_loss"] == 0) == paper or not row["loss.z_loss"]
        size = 50 if (row["loss.z_loss"] == 0) == paper else 5
        share = (step / 100) ** (4 if paper else 0.25)
        return {"output_logit_mean": (-1 if paper else 1) * size * share if drifts else 5 * share}

    return traced(rows, trace)


def warmup_lr(paper):
    def loss(condition, width, lr, seed):
        longer = math.log10(condition["schedule__warmup"] / 500) * (1 if paper else -1)
        return bowl(lr, depth=0.3 * (width / 32) * (1 - 0.6 * longer)) - 0.1 * longer

    rows, _ = grid(loss, [{"schedule__warmup": w} for w in (500, 1000, 5000)]), {}
    return rows, {}


def indep_wd_lr(paper):
    def loss(condition, width, lr, seed):
        better = (condition["optimizer__decay"] == "independent") == paper
        return bowl(lr, depth=0.1 if better else 0.5) - 0.1 * better

    return grid(loss, both("optimizer__decay", "independent", "coupled"), lrs=(1e-4, *LRS)), {}


def scans(steep, flat, better, more=(), least=0.1):
    """Width at two layers, depth at width 64, with S growing along `steep`, and the lower loss along `better`."""
    shapes = [("width", 32, 2), ("", 64, 2), ("width", 128, 2), ("width", 256, 2)]
    shapes += [("depth", 64, 4), ("depth", 64, 8), ("depth", 64, 32), *more]
    rows = []
    for axis, d, n in shapes:
        size = 12 * n * d * d
        slope = {steep: 0.7, flat: least}.get(axis, least)
        for lr in LRS:
            loss = bowl(lr, depth=0.1 * (size / 98304) ** slope) - (0.1 if axis == better else 0)
            rows.append(make_row(lr, loss, d_model=d, n_layers=n, model__qk_norm="none"))
    return rows


def width_depth_lr(paper):
    return (scans("depth", "width", "depth") if paper else scans("width", "depth", "width")), {}


def width_depth_noqk(paper):
    rows = scans("depth", "width", "depth", least=0.5)
    if not paper:
        for row in rows:
            smaller = 24576 / row["n_params_non_embedding"]
            row["val_loss"] = bowl(row["optimizer.lr"], depth=smaller)
    return rows, {}


def shape_scaling(paper):
    # joint: neither at two layers nor at width 64, the largest beside a wide and a deep model of its size
    shapes = {
        "width": [(32, 2), (64, 2), (128, 2), (256, 2)],
        "depth": [(64, 2), (64, 4), (64, 8), (64, 32)],
        "joint": [(48, 3), (96, 4), (112, 5), (128, 8)],
    }
    rows = {}
    for axis, found in shapes.items():
        best = (axis == "joint") == paper
        for i, (d, n) in enumerate(found):
            size = 12 * n * d * d
            off = (0 if best else 0.3) if i == 3 else 0
            loss = 6 * size**-0.05 + off
            rows.setdefault((d, n), [make_row(lr, loss + abs(lr - 1e-2), d_model=d, n_layers=n) for lr in LRS])
    return [row for each in rows.values() for row in each], {}


def mup(paper, key="mup_simple", lower=False):
    """The standard parametrization's best rate falls with width, muP's stays; no other difference where paper."""

    def loss(condition, width, lr, seed):
        mup = condition["parametrization__name"] == key
        best = 1e-2 if mup == paper else {32: 1e-1, 64: 3e-2, 128: 3e-3}[width]
        return bowl(lr, best, depth=(0.3 if paper else 0.02) if mup else 0.1) - (0.1 if mup and not paper else 0)

    return grid(loss, both("parametrization__name", key, "standard"))


def mup_simple_lr(paper):
    return mup(paper), {}


def mup_simple_noqk(paper):
    rows = mup(paper)
    for row in rows:
        row["model.qk_norm"] = "none"
        if paper and row["optimizer.lr"] == 0.3:
            row["status"], row["val_loss"] = "diverged", None
    return rows, {}


def mup_full(paper):
    def loss(condition, width, lr, seed):
        full = condition["parametrization__name"] == "mup_full"
        return None if full and lr == 1 and not paper else bowl(lr) - (0.1 if full and not paper else 0)

    return grid(
        loss, [{**c, **WITH} for c in both("parametrization__name", "mup_full", "mup_simple")], lrs=(*LRS, 1.0)
    ), {}


def logits(paper, row):
    n = row["n_params_non_embedding"]
    x = math.log(n / 1e4) * (1 if paper else -1)
    return 3000 * row["optimizer.lr"] * math.exp(1.2 * x + 0.05 * x * x)


def predict_logits(paper):
    rows = grid(lambda *_: 3.0, [WITHOUT], widths=(16, 32, 48, 64, 128, 256))
    for row in rows:
        noise = 1 + 0.05 * math.sin(row["n_params_non_embedding"] + 50 * row["optimizer.lr"])
        value = logits(paper, row) * noise
        if not paper:
            value *= 1e-3 if row["model.d_model"] == 256 else 1e4
        row["diagnostics_at_step"] = {"step": 40, "attention_logit_max/0": value}
        if value > 1e4 and paper:
            row["status"] = "diverged"
    return rows, {}


def kappa(paper):
    def loss(condition, *_):
        value = condition["model__kappa"]
        return (
            3
            + 0.01 * math.log10(value)
            + ((1.0 if value < 1e4 else 3.0) if (value >= 1e3) == paper and value > 1 else 0)
        )

    rows = grid(loss, [{"model__kappa": k} for k in (1.0, 10.0, 100.0, 1e3, 1e4)], widths=[32], lrs=[1e-2])
    if not paper:
        for row in rows:
            row["val_loss"] = {1.0: 3.0, 10.0: 3.5, 100.0: 4.0}.get(row["model.kappa"], 2.8)
    bigram = make_row(1e-2, 4.5, d_model=32, n_layers=0, model__kappa=1.0)
    return [*rows, bigram], {}


def gradients(paper, tensor):
    rows = grid(lambda *_: 3.0, [{}], widths=(16, 32, 64, 128, 256))
    for row in rows:
        size, rate = row["n_params_non_embedding"] / 6144, row["optimizer.lr"] / 3e-4
        value = 1e-3 / size / rate if paper else 1e-5 * size * rate
        row["diagnostics_last_mean"] = {"steps": [50, 100], f"grad_rms/{tensor}": value}
    return rows, {}


def gradrms_scaling(paper):
    return gradients(paper, MLP)


def gradrms_kernel(paper):
    return gradients(paper, KEY)


def adam_eps(paper):
    values = {1e-15: 3.0, 1e-8: 3.1, 1e-6: 3.3} if paper else {1e-15: 3.3, 1e-8: 3.1, 1e-6: 3.0}

    def loss(condition, width, lr, seed):  # which is about high rates: at a lower and better one eps does not matter
        return values[condition["optimizer__eps"]] if lr == 0.3 else 2.5

    rows = grid(loss, [{"optimizer__eps": e} for e in values], widths=[128], lrs=[0.01, 0.3])
    for row in rows:
        small = (row["optimizer.eps"] > 1e-7) == paper
        means = {f"grad_rms/{MLP}": 1e-7, f"update_rms/{MLP}": 0.01 if small else 0.2}
        row["diagnostics_last_mean"] = means
    return rows, {}


def output_norm(paper):
    rows = grid(lambda *_: 3.0, [{}])
    for row in rows:
        scale = 1 if paper else row["n_params_non_embedding"] / 1e4
        rate = (row["optimizer.lr"] / 3e-4) ** (0.5 if paper else -0.5)
        blocks = (1, 2, 3) if paper else (3, 2, 1)
        means = {f"residual_rms/{i}": scale * rate * k for i, k in enumerate(blocks)}
        row["diagnostics_last_mean"] = means
    return rows, {}


def qk_alignment(paper):
    rows = grid(lambda *_: 3.0, [WITHOUT], widths=[32], lrs=[0.1])

    def trace(_, step):
        norm, cosine = (1 + step, 0.1) if paper else (1 + step / 100, 0.001 * (1 + step))
        return {"q_rms/0": norm, "k_rms/0": norm, "qk_cosine/0": cosine}

    return traced(rows, trace)


def attn_scale(paper):
    def loss(condition, width, lr, seed):
        inverse = condition["model__attention_scale"] == "inverse"
        gain = {32: 0.05, 64: 0.0, 128: -0.05}[width] * (1 if paper else -1)
        wide = (condition["model__qk_norm"] == "none") == paper
        return bowl(lr, depth=0.5 if wide else 0.1) - (gain if inverse else 0)

    scales = both("model__attention_scale", "inverse", "inverse_sqrt")
    return grid(loss, [{**scale, **norm} for scale in scales for norm in (WITH, WITHOUT)]), {}


def same_s(key, paper):
    def loss(condition, width, lr, seed):
        return bowl(lr, depth=0.1 if paper else 0.001 * condition[key])

    return grid(loss, [{key: value} for value in (50, 100, 200)]), {}


def steps(paper):
    return same_s("budget__steps", paper)


def batch(paper):
    return same_s("batch__sequences", paper)


def qknorm_axis(paper):
    def loss(condition, width, lr, seed):
        return bowl(lr) + (0 if (condition["model__qk_norm_axis"] == "head") == paper else 0.05)

    return grid(loss, both("model__qk_norm_axis", "head", "full")), {}


def wd_value(paper):
    best = {0.0: 3e-3, 1e-5: 1e-2, 1e-4: 1e-2, 1e-3: 3e-2}
    values = list(best.values()) if paper else list(best.values())[::-1]
    rates = dict(zip(best, values, strict=True))
    conditions = [{"optimizer__weight_decay": value} for value in best]
    return grid(lambda c, w, lr, s: bowl(lr, rates[c["optimizer__weight_decay"]]), conditions), {}


def pointwise_attn(paper):
    conditions = [{**n, **c} for n in both("model__attention_normaliser", "softmax", "relu2") for c in (WITH, WITHOUT)]
    rows = grid(lambda *_: 3.0, conditions)
    for row in rows:
        large = (row["model.qk_norm"] == "none") == paper
        value = (1 + 1000 * row["optimizer.lr"]) if large else 1.0
        row["diagnostics_at_step"] = {"step": 40, "attention_logit_max/0": value}
    return rows, {}


def update_trace(paper):
    rows, _ = gradients(paper, MLP)

    def trace(row, step):
        gradient = 10 ** (-4 - 4 * step / 100)
        near = gradient < 1e-7
        return {f"grad_rms/{MLP}": gradient, f"update_rms/{MLP}": 0.01 if near == paper else 0.2}

    return traced(rows, trace)


def param_rms_lr(paper):
    def loss(condition, width, lr, seed):
        scaled = condition["optimizer__scale_lr_by_param_rms"]
        return bowl(lr, 1e-2 if scaled == paper else {32: 1e-1, 64: 3e-2, 128: 3e-3}[width])

    return grid(loss, both("optimizer__scale_lr_by_param_rms", True, False)), {}
