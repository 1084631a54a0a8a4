"""The experiments of Wortsman et al. 2023 (arXiv 2309.14322) and what the paper claims of each."""

from scaling_testbed.analysis.curves.grouping import SCAN
from scaling_testbed.analysis.curves.instability import LAST_MEAN, Quantity
from scaling_testbed.papers.combinators import (
    HIGHEST,
    LARGEST,
    MISS_AT_LARGEST,
    MOST,
    SLOPE,
    SPREAD,
    coincide_below_best,
    compare,
    each,
    largest_foretold,
    lines_differ,
    loss_beside,
    monotone,
    opposite_at_ends,
    past_threshold_diverges,
    smaller_below_eps,
    steady,
    trend,
)
from scaling_testbed.papers.measures import (
    BEST_LOSS,
    BEST_LR,
    DIVERGED,
    FIRST_DIVERGING_LR,
    LOSS,
    UNSTABLE_AT_TOP,
    S,
    best_loss,
    comes_to,
    drift,
    drifts_late,
    falls_below_zero,
    growth_is_in,
    largest_in_first_block,
    measured_as,
    peak,
    rises_with_block,
    shrinks_near_eps,
    traced,
    trains_at,
)
from scaling_testbed.papers.paper import Claim, Experiment, Paper

QK = "model.qk_norm"
NORMED = ("layernorm", "rmsnorm")
WITHOUT, WITH = {QK: "none"}, {QK: NORMED}
PAR = "parametrization.name"
KAPPA, INF, BIGRAM = (
    "model.kappa",
    float("inf"),
    {"model.n_layers": 0},
)  # which has no attention that kappa would matter to
GRID_STEP = 3.4  # neighbouring rates of the grid differ by 3 or 3.33
LOGIT = Quantity(name="attention_logit_max/0")
FIRST_MLP = "blocks.0.mlp.mlp_in.weight"
SECOND_BLOCK = Quantity(name="residual_rms/1", field=LAST_MEAN, threshold=1e4)
KEY_PROJECTION = "blocks.0.attention.k.weight"


def _gradient(tensor: str) -> Quantity:
    return Quantity(name=f"grad_rms/{tensor}", field=LAST_MEAN, threshold=1e-8, above=False)


def _gradient_claims(tensor: str) -> list[Claim]:
    quantity = _gradient(tensor)
    return [
        Claim("The RMS of the gradient falls as N grows.", trend(measured_as(quantity), "N", rising=False)),
        Claim("It falls as the learning rate grows.", trend(measured_as(quantity), "lr", rising=False)),
        Claim(
            "At the largest N and rate it comes down to AdamW's eps of 1e-8.",
            each(comes_to(quantity, within=10), at=HIGHEST),
        ),
    ]


PAPER = Paper(
    name="small_scale_proxies",
    authors="Wortsman et al. 2023",
    title="Small-scale proxies for large-scale Transformer training instabilities",
    arxiv="2309.14322",
    settings={"budget.steps": 1e5, "batch.sequences": 256, "batch.sequence_length": 512, "data.name": "c4"},
    experiments=[
    Experiment(
        name="qknorm_lr",
        sweeps=["qknorm_lr", "nano_lr"],  # the second is its small picture
        figure="Figure 1",
        question="Does qk-layernorm keep high learning rates trainable as models grow?",
        group=[QK],
        claims=[
            Claim("qk-layernorm lowers learning-rate sensitivity at each size.", compare(S, QK, NORMED, "none")),
            Claim("Without it the lowest rate that diverges falls as N grows.", monotone(FIRST_DIVERGING_LR, "N", rising=False, where=WITHOUT)),
            Claim("With it the largest model trains at a rate of 0.3.", each(trains_at(0.3), WITH, at=LARGEST)),
            Claim("Sensitivity grows with N, with qk-layernorm and without.", trend(S, "N")),
            Claim("Below the critical rate both curves coincide.", coincide_below_best(QK, NORMED, "none")),
        ],
    ),
    Experiment(
        name="qknorm_trace",
        figure="Figure 2",
        question="What do attention scores do in a run that diverges, small or large?",
        group=[QK],
        traces=["train_loss", "attention_logit_max/0"],
        claims=[
            Claim("Without qk-layernorm runs diverge at a high rate, with it they do not.",
                  compare(DIVERGED, QK, NORMED, "none")),
            Claim("Without it the largest attention score of block 0 grows far past that of the stable run (here: ten "
                  "times).", compare(traced("attention_logit_max/0", peak), QK, NORMED, "none", factor=10)),
            Claim("Block 0 typically has the largest scores.",
                  each(largest_in_first_block("attention_logit_max"), WITHOUT, typically=True)),
        ],
    ),
    Experiment(
        name="zloss_lr",
        figure="Figure 3",
        question="Does z-loss, or weight decay, prevent the divergence of output logits?",
        group=["loss.z_loss", "optimizer.weight_decay"],
        claims=[
            Claim("Without weight decay, z-loss lowers sensitivity at each size.",
                  compare(S, "loss.z_loss", 1e-4, 0, {"optimizer.weight_decay": 0})),
            Claim("Without z-loss, weight decay lowers it for the larger models.",
                  compare(S, "optimizer.weight_decay", 1e-4, 0, {"loss.z_loss": 0}, at=LARGEST)),
            Claim("With neither, training is unstable at the highest rate at every size.",
                  each(UNSTABLE_AT_TOP, {"loss.z_loss": 0, "optimizer.weight_decay": 0})),
        ],
    ),
    Experiment(
        name="zloss_trace",
        figure="Figure 4",
        question="What do output logits do over a run without z-loss?",
        group=["loss.z_loss"],
        traces=["train_loss", "output_logit_mean", "log_z_mean"],
        claims=[
            Claim("Without z-loss the mean output logit drifts further (here: twice as far).",
                  compare(traced("output_logit_mean", drift), "loss.z_loss", 1e-4, 0, factor=2)),
            Claim("The drift is downwards, to very negative logits.",
                  each(falls_below_zero("output_logit_mean"), {"loss.z_loss": 0})),
            Claim("It comes late in training.", each(drifts_late("output_logit_mean"), {"loss.z_loss": 0})),
        ],
    ),
    Experiment(
        name="warmup_lr",
        figure="Figure 5",
        question="Does a longer warm-up lower learning-rate sensitivity?",
        group=["schedule.warmup"],
        claims=[
            Claim("The longest warm-up has a lower sensitivity than the shortest.",
                  trend(S, "schedule.warmup", rising=False)),
            Claim("It has the lower loss at the best rate too.", trend(best_loss(3), "schedule.warmup", rising=False)),
            Claim("The gain is the largest for the largest model.", trend(S, "schedule.warmup", rising=False, more_at_largest=True)),
        ],
    ),
    Experiment(
        name="indep_wd_lr",
        figure="Figure 6",
        question="Does weight decay that does not scale with the learning rate lower its sensitivity?",
        group=["optimizer.decay"],
        claims=[
            Claim("Independent decay has the lower sensitivity, coupled decay scored with its better range.",
                  compare(S, "optimizer.decay", "independent", "coupled")),
        ],
    ),
    Experiment(
        name="width_depth_lr",
        figure="Figure 7",
        question="Does sensitivity grow faster with depth or with width?",
        group=[SCAN],
        claims=[
            Claim("Sensitivity grows faster with depth than with width.",
                  lines_differ(S, SLOPE, SCAN, "depth", "width", larger=True)),
            Claim("Depth still gives the lower loss at the largest common size.",
                  compare(BEST_LOSS, SCAN, "depth", "width", at=LARGEST)),
        ],
    ),
    Experiment(
        name="mup_simple_lr",
        figure="Figure 8",
        question="Does muParam (simple) lower sensitivity, or only hold the best learning rate in place?",
        group=[PAR],
        claims=[
            Claim("The best rate moves less over widths with muParam (simple) than without.",
                  lines_differ(BEST_LR, SPREAD, PAR, "mup_simple", "standard")),
            Claim("muParam does not lower the loss at the best rate.",
                  compare(BEST_LOSS, PAR, "mup_simple", "standard", contrary=True)),
            Claim("muParam does not lower sensitivity.", compare(S, PAR, "mup_simple", "standard", contrary=True)),
        ],
    ),
    Experiment(
        name="predict_logits",
        figure="Figure 9",
        question="Do the attention scores of small models foretell at which size and rate training diverges?",
        group=[QK],
        quantities=[LOGIT],
        claims=[
            Claim("At a given rate the largest score of block 0 grows with N.",
                  trend(measured_as(LOGIT), "N", where=WITHOUT)),
            Claim("Every run whose score passes 1e4 diverges.", past_threshold_diverges(LOGIT, WITHOUT)),
            Claim("A quadratic fit to the smaller sizes foretells the largest.", largest_foretold(LOGIT)),
        ],
    ),
    Experiment(
        name="kappa",
        figure="Figure 10",
        question="How large may attention scores be before they hurt?",
        group=["model.kappa"],
        against="model.kappa",
        claims=[
            Claim("Up to kappa = 100 the loss stays near its best (here: 0.1 nats).", loss_beside(KAPPA, 0, 100, higher=False, margin=0.1, plain=BIGRAM)),
            Claim("From kappa = 1,000 on the loss is worse (here: 0.1 nats).", loss_beside(KAPPA, 1e3, INF, higher=True, margin=0.1, plain=BIGRAM)),
            Claim("At kappa = 10,000 it is worse than that of a model without layers.", loss_beside(KAPPA, 1e4, INF, higher=True, margin=0, plain=BIGRAM, beside_plain=True)),
        ],
    ),
    Experiment(
        name="gradrms_scaling",
        figure="Figure 11",
        question="Do gradients fall to AdamW's eps as models and learning rates grow?",
        quantities=[_gradient(FIRST_MLP)],
        claims=_gradient_claims(FIRST_MLP),
    ),
    Experiment(
        name="adam_eps",
        figure="Figures 12, 13 and E.15",
        question="Does AdamW's eps stop learning where gradients are small?",
        group=["optimizer.eps"],
        against="optimizer.eps",
        traces=["train_loss", f"grad_rms/{FIRST_MLP}", f"update_rms/{FIRST_MLP}"],
        claims=[
            Claim("At a high rate (here: the highest) eps = 1e-15 has a lower loss than 1e-8.",
                  compare(LOSS, "optimizer.eps", 1e-15, 1e-8, at=HIGHEST)),
            Claim("There eps = 1e-6 is worse than 1e-8 (in the paper it diverges).",
                  compare(LOSS, "optimizer.eps", 1e-8, 1e-6, at=HIGHEST)),
            Claim("Updates are smaller where the gradient's RMS is below eps.",
                  smaller_below_eps(f"grad_rms/{FIRST_MLP}", f"update_rms/{FIRST_MLP}")),
        ],
    ),
    Experiment(
        name="output_norm",
        figure="Figure C.1",
        question="How does the size of the residual stream depend on N, learning rate and depth?",
        quantities=[SECOND_BLOCK],
        claims=[
            Claim("The RMS after block 2 (here the second, which every size has) hardly depends on N (here: within a "
                  "factor of two).", steady(measured_as(SECOND_BLOCK), factor=2)),
            Claim("It rises with the learning rate.", trend(measured_as(SECOND_BLOCK), "lr")),
            Claim("It rises with depth.", each(rises_with_block("residual_rms"))),
        ],
    ),
    Experiment(
        name="qk_alignment",
        figure="Figure E.1",
        question="Do attention scores grow because queries and keys grow, or because they align?",
        group=[QK],
        traces=["q_rms/0", "k_rms/0", "qk_cosine/0"],
        claims=[
            Claim("The norms of queries and keys grow by more than their cosine.",
                  each(growth_is_in(["q_rms/0", "k_rms/0"], "qk_cosine/0"), WITHOUT)),
        ],
    ),
    Experiment(
        name="width_depth_noqk",
        figure="Figure E.2",
        question="Without qk-layernorm, do both ways to scale bring instability?",
        group=[SCAN],
        claims=[Claim("Without qk-layernorm sensitivity grows along width and along depth.", trend(S, "N", where=WITHOUT))],
    ),
    Experiment(
        name="shape_scaling",
        figure="Figure E.3",
        question="Which way to scale a model has the lowest loss at its best learning rate?",
        group=[SCAN],
        claims=[
            Claim("Scaling width and depth together is best at the largest size.", compare(BEST_LOSS, SCAN, "joint", ("width", "depth"), at=LARGEST)),
            Claim("A power law through its smaller sizes extrapolates best.", lines_differ(BEST_LOSS, MISS_AT_LARGEST, SCAN, "joint", ("width", "depth"))),
        ],
    ),
    Experiment(
        name="mup_simple_noqk",
        figure="Figure E.4",
        question="Does muParam (simple) replace qk-layernorm?",
        group=[PAR],
        claims=[
            Claim("The best rate is steady over widths with muParam (simple).",
                  steady(BEST_LR, factor=GRID_STEP, where={PAR: "mup_simple"})),
            Claim("Without qk-layernorm the largest model with muParam still is unstable at the highest rate.",
                  each(UNSTABLE_AT_TOP, {PAR: "mup_simple", **WITHOUT}, at=LARGEST)),
        ],
    ),
    Experiment(
        name="mup_full",
        figure="Figure E.5",
        question="What does the full muParam change over its simple form?",
        group=[PAR, QK],
        claims=[
            Claim("With qk-layernorm the full muParam trains at a rate of 1.",
                  each(trains_at(1.0), {PAR: "mup_full", **WITH}, at=LARGEST)),
            Claim("It does not lower the best loss at the largest size.",
                  compare(BEST_LOSS, PAR, "mup_full", "mup_simple", WITH, at=LARGEST, contrary=True)),
        ],
    ),
    Experiment(
        name="attn_scale",
        figure="Figure E.6",
        question="Does dividing attention scores by d_head replace qk-layernorm?",
        group=["model.attention_scale", QK],
        claims=[
            Claim("1/d_head is slightly better at the smallest size, slightly worse at the largest.",
                  opposite_at_ends(BEST_LOSS, "model.attention_scale", "inverse", "inverse_sqrt")),
            Claim("With 1/d_head, qk-layernorm still lowers sensitivity.",
                  compare(S, QK, NORMED, "none", {"model.attention_scale": "inverse"})),
        ],
    ),
    Experiment(
        name="steps",
        figure="Figure E.7",
        question="Does sensitivity depend on the number of steps?",
        group=["budget.steps"],
        claims=[Claim("Sensitivity does not change with the number of steps.", steady(S, "budget.steps", slack=0.02))],
    ),
    Experiment(
        name="qknorm_axis",
        figure="Figure E.8",
        question="Should queries and keys be normed per head or over the full width?",
        group=["model.qk_norm_axis"],
        claims=[Claim("Per head is slightly better at the best rate.",
                      compare(BEST_LOSS, "model.qk_norm_axis", "head", "full"))],
    ),
    Experiment(
        name="batch",
        figure="Figure E.9",
        question="Does sensitivity depend on the batch, at a fixed number of tokens?",
        group=["batch.sequences"],
        claims=[Claim("Sensitivity does not change with the batch.", steady(S, "batch.sequences", slack=0.02))],
    ),
    Experiment(
        name="wd_value",
        figure="Figure E.10",
        question="Where does more weight decay move the best learning rate?",
        group=["optimizer.weight_decay"],
        claims=[Claim("More decay moves the best rate slightly up.", monotone(BEST_LR, "optimizer.weight_decay", rising=True))],
    ),
    Experiment(
        name="pointwise_attn",
        figure="Figure E.11",
        question="Is softmax the cause of growing attention scores?",
        group=["model.attention_normaliser", QK],
        quantities=[LOGIT],
        traces=["train_loss", "attention_logit_max/0"],
        claims=[
            Claim("Scores grow without softmax too: past those with qk-layernorm (here: ten times).",
                  compare(measured_as(LOGIT), QK, NORMED, "none", {"model.attention_normaliser": "relu2"}, at=MOST, factor=10)),
        ],
    ),
    Experiment(
        name="gradrms_kernel",
        figure="Figure E.12",
        question="Do the gradients of the key projection fall as those of the MLP do?",
        quantities=[_gradient(KEY_PROJECTION)],
        claims=_gradient_claims(KEY_PROJECTION),
    ),
    Experiment(
        name="update_trace",
        figure="Figure E.13",
        question="What do updates do when gradients near eps?",
        traces=[f"grad_rms/{FIRST_MLP}", f"update_rms/{FIRST_MLP}"],
        claims=[
            Claim("Updates shrink when the gradient's RMS nears eps.",
                  each(shrinks_near_eps(f"grad_rms/{FIRST_MLP}", f"update_rms/{FIRST_MLP}"))),
            Claim("Gradients come closest to eps at the largest N.",
                  trend(measured_as(_gradient(FIRST_MLP)), "N", rising=False)),
        ],
    ),
    Experiment(
        name="param_rms_lr",
        figure="Figure E.14",
        question="Does a learning rate relative to the size of the parameters hold the best one in place?",
        group=["optimizer.scale_lr_by_param_rms"],
        claims=[
            Claim("With the scaled rate the best one is steady over sizes.",
                  steady(BEST_LR, factor=GRID_STEP, where={"optimizer.scale_lr_by_param_rms": True})),
        ],
    ),
    Experiment(
        name="mitigations",
        question="What else keeps high learning rates trainable without qk-layernorm?",
        group=["logging.group"],
    ),
])  # fmt: skip
