"""The experiments of Wortsman et al. 2023 (arXiv 2309.14322) and the claims of the paper about each."""

from scaling_testbed.analysis.curves.grouping import SCAN
from scaling_testbed.analysis.curves.instability import LAST_MEAN, Quantity
from scaling_testbed.papers import combinators as by
from scaling_testbed.papers import lines
from scaling_testbed.papers import measures as of
from scaling_testbed.papers.lines import FALLS, RISES, STEADY
from scaling_testbed.papers.paper import Claim, Experiment, Paper

QK = "model.qk_norm"
NORMED = ("layernorm", "rmsnorm")
WITHOUT, WITH = {QK: "none"}, {QK: NORMED}
PAR = "parametrization.name"
KAPPA, BIGRAM = "model.kappa", {"model.n_layers": 0}  # a bigram model has no attention, so no kappa
PRECISION, DECAY = "compute.precision", "optimizer.weight_decay"
LOGIT = Quantity(name="attention_logit_max/0")
LOG_Z = Quantity(name="log_z_mean_square", field=LAST_MEAN, threshold=100)  # |log Z| of 10
FIRST_MLP = "blocks.0.mlp.mlp_in.weight"
SECOND_BLOCK = Quantity(name="residual_rms/1", field=LAST_MEAN, threshold=1e4)
KEY_PROJECTION = "blocks.0.attention.k.weight"


def _gradient(tensor: str) -> Quantity:
    return Quantity(name=f"grad_rms/{tensor}", field=LAST_MEAN, threshold=1e-8, above=False)


def _gradient_claims(tensor: str) -> list[Claim]:
    quantity = _gradient(tensor)
    return [
        Claim("The RMS of the gradient falls as N grows.", lines.along(of.measured_as(quantity), "N", FALLS)),
        Claim("It falls as the learning rate grows.", lines.along(of.measured_as(quantity), "lr", FALLS)),
        Claim(
            "At the largest N and rate it comes down to AdamW's eps of 1e-8 (here: within a factor of ten).",
            by.positive(of.headroom(quantity, within=10), at=by.HIGHEST),
        ),
    ]


EXPERIMENTS = [
    Experiment(
        name="qknorm_lr", figure="Figure 1", group=[QK],
        sweeps=["qknorm_lr", "demo", "nano_lr"],  # the others are small versions of the first
        question="Does qk-layernorm keep high learning rates trainable as models grow?",
        claims=[
            Claim("qk-layernorm lowers learning-rate sensitivity.", by.compare(of.S, QK, NORMED, "none")),
            Claim("It raises the critical rate.", by.compare(of.CRITICAL_LR, QK, "none", NORMED)),
            Claim("Without it the critical rate falls as N grows (in the paper: the lowest rate that diverges).",
                  lines.along(of.CRITICAL_LR, "N", FALLS, WITHOUT)),
            Claim("With it the largest model trains at a rate of 0.3 (here: it keeps over half of the best gain).",
                  by.positive(of.kept_gain(0.3), WITH, at=by.LARGEST)),
            Claim("Without it sensitivity grows with N.", lines.along(of.S, "N", RISES, WITHOUT)),
            Claim("With it sensitivity grows with N too.", lines.along(of.S, "N", RISES, WITH)),
            Claim("Up to the best rate both curves coincide.", by.coincide_below_best(QK, NORMED, "none")),
        ],
    ),
    Experiment(
        name="qknorm_trace", figure="Figure 2", group=[QK], traces=["train_loss", "attention_logit_max/0"],
        question="What do attention scores do in a run that diverges, small or large?",
        claims=[
            Claim("Without qk-layernorm runs are unstable at a high rate, with it they are not (here: 0.25 nats).",
                  by.compare(of.LOSS, QK, NORMED, "none", margin=0.25)),
            Claim("Without it the largest attention score of block 0 grows far past that of the stable run (here: ten "
                  "times).", by.compare(of.traced(of.peak, "attention_logit_max/0"), QK, NORMED, "none", factor=10)),
            Claim("Block 0 typically has the largest scores.",
                  by.positive(of.first_block_over_others("attention_logit_max"), WITHOUT)),
        ],
    ),
    Experiment(
        name="zloss_lr", figure="Figure 3", group=["loss.z_loss", "optimizer.weight_decay"],
        question="Does z-loss, or weight decay, prevent the divergence of output logits?",
        claims=[
            Claim("Without weight decay, z-loss lowers sensitivity.",
                  by.compare(of.S, "loss.z_loss", 1e-4, 0, {"optimizer.weight_decay": 0})),
            Claim("Without z-loss, weight decay lowers it for the larger models.",
                  by.compare(of.S, "optimizer.weight_decay", 1e-4, 0, {"loss.z_loss": 0}, at=by.LARGEST)),
            Claim("With neither, training is unstable at the highest rate at every size.",
                  by.positive(of.kept_gain(), {"loss.z_loss": 0, "optimizer.weight_decay": 0}, every=True, below=True)),
        ],
    ),
    Experiment(
        name="zloss_drift", figure="Figures 3 and 4", group=["loss.z_loss", "optimizer.weight_decay", PRECISION],
        traces=["log_z_mean"], quantities=[LOG_Z],
        question="Does log Z drift without z-loss, does z-loss hold it, and does the loss follow?",
        claims=[
            Claim("Without weight decay, log Z ends further from zero without z-loss (here: log^2 Z nine times as "
                  "large).",
                  by.compare(of.measured_as(LOG_Z), "loss.z_loss", 1e-4, 0, {DECAY: 0}, factor=9)),
            Claim("With weight decay too.",
                  by.compare(of.measured_as(LOG_Z), "loss.z_loss", 1e-4, 0, {DECAY: 1e-4}, factor=9)),
            Claim("With z-loss log Z stays near zero (here: log^2 Z below 100).",
                  by.positive(of.headroom(LOG_Z, within=1), {"loss.z_loss": 1e-4})),
            Claim("Without z-loss, weight decay holds log Z nearer to zero.",
                  by.compare(of.measured_as(LOG_Z), "optimizer.weight_decay", 1e-4, 0, {"loss.z_loss": 0})),
            Claim("In bf16 z-loss lowers the loss at high rates.",
                  by.compare(of.LOSS, "loss.z_loss", 1e-4, 0, {PRECISION: "bf16", "optimizer.weight_decay": 0})),
            Claim("In fp32 too.",
                  by.compare(of.LOSS, "loss.z_loss", 1e-4, 0, {PRECISION: "fp32", "optimizer.weight_decay": 0})),
        ],
    ),
    Experiment(
        name="zloss_trace", figure="Figure 4", group=["loss.z_loss"],
        traces=["train_loss", "output_logit_mean", "log_z_mean"],
        question="What do output logits do over a run without z-loss?",
        claims=[
            Claim("Without z-loss the mean output logit drifts further (here: twice as far).",
                  by.compare(of.traced(of.drift, "output_logit_mean"), "loss.z_loss", 1e-4, 0, factor=2)),
            Claim("The drift is downwards, to very negative logits.",
                  by.positive(of.traced(of.depth_below_zero, "output_logit_mean", ratio=False, margin="logit"),
                              {"loss.z_loss": 0})),
            Claim("It comes late in training.",
                  by.positive(of.traced(of.lateness_of_drift, "output_logit_mean", ratio=False), {"loss.z_loss": 0})),
        ],
    ),
    Experiment(
        name="warmup_lr", figure="Figure 5", group=["schedule.warmup"],
        question="Does a longer warm-up lower learning-rate sensitivity?",
        claims=[
            Claim("Sensitivity falls with the length of the warm-up.",
                  lines.along(of.S, "schedule.warmup", FALLS)),
            Claim("The critical rate rises with it.", lines.along(of.CRITICAL_LR, "schedule.warmup", RISES)),
            Claim("The loss at the best rate falls with it too.",
                  lines.along(of.BEST_LOSS, "schedule.warmup", FALLS)),
            Claim("The gain in sensitivity is the largest for the largest model.",
                  lines.more_at_largest(of.S, "schedule.warmup", FALLS)),
        ],
    ),
    Experiment(
        name="indep_wd_lr", figure="Figure 6", group=["optimizer.decay"],
        question="Does weight decay that does not scale with the learning rate lower its sensitivity?",
        claims=[
            Claim("Independent decay has the lower sensitivity, coupled decay scored with its better range.",
                  by.compare(of.S, "optimizer.decay", "independent", "coupled")),
            Claim("It has the lower loss at the best rate too.",
                  by.compare(of.BEST_LOSS, "optimizer.decay", "independent", "coupled")),
        ],
    ),
    Experiment(
        name="width_depth_lr", figure="Figure 7", group=[SCAN],
        question="Does sensitivity grow faster with depth or with width?",
        claims=[
            Claim("Sensitivity grows faster with depth than with width.",
                  lines.differ(of.S, lines.TREND, SCAN, "width", "depth")),
            Claim("Depth still gives the lower loss at the largest common size.",
                  by.compare(of.BEST_LOSS, SCAN, "depth", "width", at=by.LARGEST)),
        ],
    ),
    Experiment(
        name="mup_simple_lr", figure="Figure 8", group=[PAR],
        question="Does muParam (simple) lower sensitivity, or only hold the best learning rate in place?",
        claims=[
            Claim("The best rate falls less with width with muParam (simple) than without.",
                  lines.differ(of.BEST_LR, lines.TREND, PAR, "standard", "mup_simple")),
            Claim("With muParam it stays (here: it changes by less than the margin).",
                  lines.along(of.BEST_LR, "N", STEADY, {PAR: "mup_simple"})),
            Claim("muParam does not lower the loss at the best rate.",
                  by.compare(of.BEST_LOSS, PAR, "mup_simple", "standard", contrary=True)),
            Claim("muParam does not lower sensitivity.",
                  by.compare(of.S, PAR, "mup_simple", "standard", contrary=True)),
        ],
    ),
    Experiment(
        name="predict_logits", figure="Figure 9", group=[QK], quantities=[LOGIT],
        question="Do the attention scores of small models foretell at which size and rate training diverges?",
        claims=[
            Claim("At a given rate the largest score of block 0 grows with N.",
                  lines.along(of.measured_as(LOGIT), "N", RISES, WITHOUT)),
            Claim("Runs whose score passes 1e4 are harmed, and others are not (here: nine of ten).",
                  by.HarmedPastThreshold(LOGIT, WITHOUT)),
            Claim("A quadratic fit to the smaller sizes foretells the largest (here: within a factor of 3).",
                  by.largest_foretold(LOGIT)),
        ],
    ),
    Experiment(
        name="kappa", figure="Figure 10", group=["model.kappa"], against="model.kappa",
        question="How large may attention scores be before they hurt?",
        claims=[
            Claim("Up to kappa = 100 the loss stays near its best (here: 0.1 nats).",
                  by.loss_beside(KAPPA, BIGRAM, 0, 100, within=0.1)),
            Claim("From kappa = 1,000 on the loss is worse (here: 0.1 nats).",
                  by.loss_beside(KAPPA, BIGRAM, 1e3, above=0.1)),
            Claim("At kappa = 10,000 it is worse than that of a model without layers.",
                  by.loss_beside(KAPPA, BIGRAM, 1e4)),
        ],
    ),
    Experiment(
        name="gradrms_scaling", figure="Figure 11", quantities=[_gradient(FIRST_MLP)],
        question="Do gradients fall to AdamW's eps as models and learning rates grow?",
        claims=_gradient_claims(FIRST_MLP),
    ),
    Experiment(
        name="adam_eps", figure="Figures 12, 13 and E.15", group=["optimizer.eps"], against="optimizer.eps",
        traces=["train_loss", f"grad_rms/{FIRST_MLP}", f"update_rms/{FIRST_MLP}"],
        question="Does AdamW's eps stop learning where gradients are small?",
        claims=[
            Claim("At a high rate (here: the highest) eps = 1e-15 has a lower loss than 1e-8.",
                  by.compare(of.LOSS, "optimizer.eps", 1e-15, 1e-8, at=by.HIGHEST)),
            Claim("There eps = 1e-6 is worse than 1e-8 (in the paper it diverges).",
                  by.compare(of.LOSS, "optimizer.eps", 1e-8, 1e-6, at=by.HIGHEST)),
            Claim("Updates are smaller where the gradient's RMS is below eps.",
                  by.smaller_below_eps(f"grad_rms/{FIRST_MLP}", f"update_rms/{FIRST_MLP}")),
        ],
    ),
    Experiment(
        name="output_norm", figure="Figure C.1", quantities=[SECOND_BLOCK],
        question="How does the size of the residual stream depend on N, learning rate and depth?",
        claims=[
            Claim("The RMS after block 2 (here the second, which every size has) hardly depends on N (here: by less "
                  "than a factor of two for a tenfold N).",
                  lines.along(of.measured_as(SECOND_BLOCK), "N", STEADY, factor=2)),
            Claim("It rises with the learning rate.", lines.along(of.measured_as(SECOND_BLOCK), "lr", RISES)),
            Claim("It rises with depth.", by.positive(of.last_block_over_first("residual_rms"))),
        ],
    ),
    Experiment(
        name="qk_alignment", figure="Figure E.1", group=[QK], traces=["q_rms/0", "k_rms/0", "qk_cosine/0"],
        question="Do attention scores grow because queries and keys grow, or because they align?",
        claims=[
            Claim("The norms of queries and keys grow by more than their cosine.",
                  by.positive(of.traced(of.growth_of_norms_over_cosine, "q_rms/0", "k_rms/0", "qk_cosine/0"), WITHOUT)),
        ],
    ),
    Experiment(
        name="width_depth_noqk", figure="Figure E.2", group=[SCAN],
        question="Without qk-layernorm, do both ways to scale bring instability?",
        claims=[
            Claim("Without qk-layernorm sensitivity grows along width.",
                  lines.along(of.S, "N", RISES, {**WITHOUT, SCAN: "width"})),
            Claim("It grows along depth.", lines.along(of.S, "N", RISES, {**WITHOUT, SCAN: "depth"})),
        ],
    ),
    Experiment(
        name="shape_scaling", figure="Figure E.3", group=[SCAN],
        question="Which way to scale a model has the lowest loss at its best learning rate?",
        claims=[
            Claim("Scaling width and depth together is best at the largest size.",
                  by.compare(of.BEST_LOSS, SCAN, "joint", by.Each(("width", "depth")), at=by.LARGEST)),
            Claim("A power law through its smaller sizes extrapolates best.",
                  lines.differ(of.BEST_LOSS, lines.MISS_AT_LARGEST, SCAN, "joint", by.Each(("width", "depth")))),
        ],
    ),
    Experiment(
        name="mup_simple_noqk", figure="Figure E.4", group=[PAR],
        question="Does muParam (simple) replace qk-layernorm?",
        claims=[
            Claim("The best rate is steady over widths with muParam (simple).",
                  lines.along(of.BEST_LR, "N", STEADY, {PAR: "mup_simple"})),
            Claim("Without qk-layernorm the largest model with muParam still is unstable at the highest rate.",
                  by.positive(of.kept_gain(), {PAR: "mup_simple", **WITHOUT}, at=by.LARGEST, below=True)),
        ],
    ),
    Experiment(
        name="mup_full", figure="Figure E.5", group=[PAR, QK],
        question="What does the full muParam change over its simple form?",
        claims=[
            Claim("With qk-layernorm the full muParam trains at a rate of 1.",
                  by.positive(of.kept_gain(1.0), {PAR: "mup_full", **WITH}, at=by.LARGEST)),
            Claim("It does not lower the best loss at the largest size.",
                  by.compare(of.BEST_LOSS, PAR, "mup_full", "mup_simple", WITH, at=by.LARGEST, contrary=True)),
        ],
    ),
    Experiment(
        name="attn_scale", figure="Figure E.6", group=["model.attention_scale", QK],
        question="Does dividing attention scores by d_head replace qk-layernorm?",
        claims=[
            Claim("1/d_head is slightly better at the smallest size, slightly worse at the largest.",
                  by.opposite_at_ends(of.BEST_LOSS, "model.attention_scale", "inverse", "inverse_sqrt")),
            Claim("With 1/d_head, qk-layernorm still lowers sensitivity.",
                  by.compare(of.S, QK, NORMED, "none", {"model.attention_scale": "inverse"})),
        ],
    ),
    Experiment(
        name="steps", figure="Figure E.7", group=["budget.steps"],
        question="Does sensitivity depend on the number of steps?",
        claims=[Claim("Sensitivity does not change with the number of steps.",
                      lines.along(of.S, "budget.steps", STEADY))],
    ),
    Experiment(
        name="qknorm_axis", figure="Figure E.8", group=["model.qk_norm_axis"],
        question="Should queries and keys be normed per head or over the full width?",
        claims=[Claim("Per head is slightly better at the best rate.",
                      by.compare(of.BEST_LOSS, "model.qk_norm_axis", "head", "full"))],
    ),
    Experiment(
        name="batch", figure="Figure E.9", group=["batch.sequences"],
        question="Does sensitivity depend on the batch, at a fixed number of tokens?",
        claims=[Claim("Sensitivity does not change with the batch.",
                      lines.along(of.S, "batch.sequences", STEADY))],
    ),
    Experiment(
        name="wd_value", figure="Figure E.10", group=["optimizer.weight_decay"],
        question="Where does more weight decay move the best learning rate?",
        claims=[Claim("More decay moves the best rate slightly up.",
                      lines.along(of.BEST_LR, "optimizer.weight_decay", RISES))],
    ),
    Experiment(
        name="pointwise_attn", figure="Figure E.11", group=["model.attention_normaliser", QK], quantities=[LOGIT],
        traces=["train_loss", "attention_logit_max/0"],
        question="Is softmax the cause of growing attention scores?",
        claims=[
            Claim("Scores grow without softmax too: past those with qk-layernorm (here: ten times).",
                  by.compare(of.measured_as(LOGIT), QK, NORMED, "none", {"model.attention_normaliser": "relu2"},
                             at=by.HIGHEST, factor=10)),
        ],
    ),
    Experiment(
        name="gradrms_kernel", figure="Figure E.12", quantities=[_gradient(KEY_PROJECTION)],
        question="Do the gradients of the key projection fall as those of the MLP do?",
        claims=_gradient_claims(KEY_PROJECTION),
    ),
    Experiment(
        name="update_trace", figure="Figure E.13", traces=[f"grad_rms/{FIRST_MLP}", f"update_rms/{FIRST_MLP}"],
        question="What do updates do when gradients near eps?",
        claims=[
            Claim("Updates shrink when the gradient's RMS nears eps.",
                  by.positive(of.traced(of.update_far_from_eps_over_near, f"grad_rms/{FIRST_MLP}",
                                        f"update_rms/{FIRST_MLP}"))),
            Claim("Gradients come closest to eps at the largest N.",
                  lines.along(of.measured_as(_gradient(FIRST_MLP)), "N", FALLS)),
        ],
    ),
    Experiment(
        name="param_rms_lr", figure="Figure E.14", group=["optimizer.scale_lr_by_param_rms"],
        question="Does a learning rate relative to the size of the parameters hold the best one in place?",
        claims=[
            Claim("With the scaled rate the best one is steady over sizes.",
                  lines.along(of.BEST_LR, "N", STEADY, {"optimizer.scale_lr_by_param_rms": True})),
        ],
    ),
    Experiment(
        name="mitigations", group=["logging.group"],
        question="What else keeps high learning rates trainable without qk-layernorm?",
    ),
]  # fmt: skip

PAPER = Paper(
    name="small_scale_proxies",
    authors="Wortsman et al. 2023",
    title="Small-scale proxies for large-scale Transformer training instabilities",
    arxiv="2309.14322",
    settings={"budget.steps": 1e5, "batch.sequences": 256, "batch.sequence_length": 512, "data.name": "c4"},
    experiments=EXPERIMENTS,
)
