"""The experiments of Wortsman et al. 2023 (arXiv 2309.14322) by the name of their sweep, and what the paper claims of
each, with the function that judges it. A new experiment is one more entry in SWEEPS."""

from collections.abc import Sequence
from dataclasses import dataclass

from scaling_testbed.analysis.curves.grouping import SCAN
from scaling_testbed.analysis.curves.instability import LAST_MEAN, Quantity
from scaling_testbed.errors import UserError
from scaling_testbed.papers import judging_diagnostics as inside
from scaling_testbed.papers import judging_experiments as single
from scaling_testbed.papers import judging_losses as loss
from scaling_testbed.papers.evidence import CANNOT_TELL, Evidence, Judge, Verdict


@dataclass(frozen=True)
class Claim:
    """What the paper says, in our words, and how this data is asked."""

    text: str
    judge: Judge

    def verdict(self, evidence: Evidence) -> Verdict:
        """agrees | disagrees | cannot tell, and the number behind it; rows that cannot be read for it cannot tell."""
        try:
            return self.judge(evidence)
        except UserError as error:
            return CANNOT_TELL, str(error)


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """One sweep of the paper. group: the keys that tell its conditions apart, first ones first. quantities: fitted
    against N. traces: recorded quantities to draw over time. against: a key that the final loss is drawn against.
    """

    figure: str = ""
    question: str = "How does the final loss depend on the learning rate?"
    group: Sequence[str] = ()
    quantities: Sequence[Quantity] = ()
    traces: Sequence[str] = ()
    against: str | None = None
    claims: Sequence[Claim] = ()


QK = "model.qk_norm"
NORMED = ("layernorm", "rmsnorm")
WITHOUT, WITH = {QK: "none"}, {QK: NORMED}
PAR = "parametrization.name"
LOGIT = Quantity(name="attention_logit_max/0")
FIRST_MLP = "blocks.0.mlp.mlp_in.weight"
SECOND_BLOCK = Quantity(name="residual_rms/1", field=LAST_MEAN, threshold=1e4)
KEY_PROJECTION = "blocks.0.attention.k.weight"


def _gradient(tensor: str) -> Quantity:
    return Quantity(name=f"grad_rms/{tensor}", field=LAST_MEAN, threshold=1e-8, above=False)


def _gradient_claims(tensor: str) -> list[Claim]:
    quantity = _gradient(tensor)
    return [
        Claim("The RMS of the gradient falls as N grows.", inside.quantity_moves(quantity, "N", rising=False)),
        Claim("It falls as the learning rate grows.", inside.quantity_moves(quantity, "lr", rising=False)),
        Claim("At the largest N and rate it comes down to AdamW's eps of 1e-8.", inside.reaches(quantity, within=10)),
    ]


SWEEPS = {
    "qknorm_lr": Experiment(
        figure="Figure 1",
        question="Does qk-layernorm keep high learning rates trainable as models grow?",
        group=[QK],
        claims=[
            Claim("qk-layernorm lowers learning-rate sensitivity at each size.", loss.lower_s(QK, NORMED, "none")),
            Claim("Without it the lowest rate that diverges falls as N grows.", loss.first_divergence_falls(WITHOUT)),
            Claim("With it the largest model trains at a rate of 0.3.", loss.trains_at(0.3, WITH)),
            Claim("Sensitivity grows with N, with qk-layernorm and without.", loss.s_rises()),
            Claim("Below the critical rate both curves coincide.", loss.coincide_below_best(QK, NORMED, "none")),
        ],
    ),
    "qknorm_trace": Experiment(
        figure="Figure 2",
        question="What do attention scores do in a run that diverges, small or large?",
        group=[QK],
        traces=["train_loss", "attention_logit_max/0"],
        claims=[
            Claim("Without qk-layernorm runs diverge at a high rate, with it they do not.",
                  inside.diverges_only_with(QK, "none", NORMED)),
            Claim("Without it the largest attention score of block 0 grows far past that of the stable run (here: ten "
                  "times).", inside.trace_larger("attention_logit_max/0", inside.peak, QK, "none", NORMED, 10)),
            Claim("Block 0 typically has the largest scores.",
                  inside.first_block_largest("attention_logit_max", WITHOUT)),
        ],
    ),
    "zloss_lr": Experiment(
        figure="Figure 3",
        question="Does z-loss, or weight decay, prevent the divergence of output logits?",
        group=["loss.z_loss", "optimizer.weight_decay"],
        claims=[
            Claim("Without weight decay, z-loss lowers sensitivity at each size.",
                  loss.lower_s("loss.z_loss", 1e-4, 0, {"optimizer.weight_decay": 0})),
            Claim("Without z-loss, weight decay lowers it for the larger models.",
                  loss.lower_s("optimizer.weight_decay", 1e-4, 0, {"loss.z_loss": 0}, largest=True)),
            Claim("With neither, training is unstable at the highest rate at every size.",
                  loss.unstable_at_top({"loss.z_loss": 0, "optimizer.weight_decay": 0})),
        ],
    ),
    "zloss_trace": Experiment(
        figure="Figure 4",
        question="What do output logits do over a run without z-loss?",
        group=["loss.z_loss"],
        traces=["train_loss", "output_logit_mean", "log_z_mean"],
        claims=[
            Claim("Without z-loss the mean output logit drifts further (here: twice as far).",
                  inside.trace_larger("output_logit_mean", inside.drift, "loss.z_loss", 0, 1e-4, 2)),
            Claim("The drift is downwards, to very negative logits.",
                  inside.falls("output_logit_mean", {"loss.z_loss": 0})),
            Claim("It comes late in training.", inside.late("output_logit_mean", {"loss.z_loss": 0})),
        ],
    ),
    "warmup_lr": Experiment(
        figure="Figure 5",
        question="Does a longer warm-up lower learning-rate sensitivity?",
        group=["schedule.warmup"],
        claims=[
            Claim("The longest warm-up has a lower sensitivity than the shortest.",
                  single.falls_along("schedule.warmup", "S")),
            Claim("It has the lower loss at the best rate too.", single.falls_along("schedule.warmup", "best loss")),
            Claim("The gain is the largest for the largest model.", single.gain_grows("schedule.warmup")),
        ],
    ),
    "indep_wd_lr": Experiment(
        figure="Figure 6",
        question="Does weight decay that does not scale with the learning rate lower its sensitivity?",
        group=["optimizer.decay"],
        claims=[
            Claim("Independent decay has the lower sensitivity, coupled decay scored with its better range.",
                  loss.lower_s("optimizer.decay", "independent", "coupled")),
        ],
    ),
    "width_depth_lr": Experiment(
        figure="Figure 7",
        question="Does sensitivity grow faster with depth or with width?",
        group=[SCAN],
        claims=[
            Claim("Sensitivity grows faster with depth than with width.",
                  loss.s_rises(faster=(SCAN, "depth", "width"))),
            Claim("Depth still gives the lower loss at the largest common size.",
                  loss.lower_best_loss(SCAN, "depth", "width", largest=True)),
        ],
    ),
    "mup_simple_lr": Experiment(
        figure="Figure 8",
        question="Does muParam (simple) lower sensitivity, or only hold the best learning rate in place?",
        group=[PAR],
        claims=[
            Claim("The best rate moves less over widths with muParam (simple) than without.",
                  loss.best_lr_steady({PAR: "mup_simple"}, against={PAR: "standard"})),
            Claim("muParam does not lower the loss at the best rate.",
                  loss.lower_best_loss(PAR, "mup_simple", "standard", contrary=True)),
            Claim("muParam does not lower sensitivity.", loss.lower_s(PAR, "mup_simple", "standard", contrary=True)),
        ],
    ),
    "predict_logits": Experiment(
        figure="Figure 9",
        question="Do the attention scores of small models foretell at which size and rate training diverges?",
        group=[QK],
        quantities=[LOGIT],
        claims=[
            Claim("At a given rate the largest score of block 0 grows with N.",
                  inside.quantity_moves(LOGIT, "N", rising=True, where=WITHOUT)),
            Claim("Every run whose score passes 1e4 diverges.", inside.crossing_diverges(LOGIT, WITHOUT)),
            Claim("A quadratic fit to the smaller sizes foretells the largest.", inside.largest_predicted(LOGIT)),
        ],
    ),
    "kappa": Experiment(
        figure="Figure 10",
        question="How large may attention scores be before they hurt?",
        group=["model.kappa"],
        against="model.kappa",
        claims=[
            Claim("Up to kappa = 100 the loss stays near its best (here: 0.1 nats).", single.kappa_harmless(100)),
            Claim("From kappa = 1,000 on the loss is worse (here: 0.1 nats).", single.kappa_hurts(1000)),
            Claim("At kappa = 10,000 it is worse than that of a model without layers.", single.kappa_below_bigram(1e4)),
        ],
    ),
    "gradrms_scaling": Experiment(
        figure="Figure 11",
        question="Do gradients fall to AdamW's eps as models and learning rates grow?",
        quantities=[_gradient(FIRST_MLP)],
        claims=_gradient_claims(FIRST_MLP),
    ),
    "adam_eps": Experiment(
        figure="Figures 12, 13 and E.15",
        question="Does AdamW's eps stop learning where gradients are small?",
        group=["optimizer.eps"],
        against="optimizer.eps",
        traces=["train_loss", f"grad_rms/{FIRST_MLP}", f"update_rms/{FIRST_MLP}"],
        claims=[
            Claim("At a high rate (here: the highest) eps = 1e-15 has a lower loss than 1e-8.",
                  loss.lower_loss_at_top("optimizer.eps", 1e-15, 1e-8)),
            Claim("There eps = 1e-6 is worse than 1e-8 (in the paper it diverges).",
                  loss.lower_loss_at_top("optimizer.eps", 1e-8, 1e-6)),
            Claim("Updates are smaller where the gradient's RMS is below eps.",
                  inside.updates_shrink_below(f"grad_rms/{FIRST_MLP}", f"update_rms/{FIRST_MLP}")),
        ],
    ),
    "output_norm": Experiment(
        figure="Figure C.1",
        question="How does the size of the residual stream depend on N, learning rate and depth?",
        quantities=[SECOND_BLOCK],
        claims=[
            Claim("The RMS after block 2 (here the second, which every size has) hardly depends on N (here: within a "
                  "factor of two).", inside.steady_in_n(SECOND_BLOCK.name, 2)),
            Claim("It rises with the learning rate.", inside.quantity_moves(SECOND_BLOCK, "lr", rising=True)),
            Claim("It rises with depth.", inside.rises_with_block("residual_rms")),
        ],
    ),
    "qk_alignment": Experiment(
        figure="Figure E.1",
        question="Do attention scores grow because queries and keys grow, or because they align?",
        group=[QK],
        traces=["q_rms/0", "k_rms/0", "qk_cosine/0"],
        claims=[
            Claim("The norms of queries and keys grow by more than their cosine.",
                  inside.growth_is_in(["q_rms/0", "k_rms/0"], "qk_cosine/0", WITHOUT)),
        ],
    ),
    "width_depth_noqk": Experiment(
        figure="Figure E.2",
        question="Without qk-layernorm, do both ways to scale bring instability?",
        group=[SCAN],
        claims=[Claim("Without qk-layernorm sensitivity grows along width and along depth.", loss.s_rises(WITHOUT))],
    ),
    "shape_scaling": Experiment(
        figure="Figure E.3",
        question="Which way to scale a model has the lowest loss at its best learning rate?",
        group=[SCAN],
        claims=[
            Claim("Scaling width and depth together is best at the largest size.", single.joint_best()),
            Claim("A power law through its smaller sizes extrapolates best.", single.joint_extrapolates_best()),
        ],
    ),
    "mup_simple_noqk": Experiment(
        figure="Figure E.4",
        question="Does muParam (simple) replace qk-layernorm?",
        group=[PAR],
        claims=[
            Claim("The best rate is steady over widths with muParam (simple).",
                  loss.best_lr_steady({PAR: "mup_simple"})),
            Claim("Without qk-layernorm the largest model with muParam still is unstable at the highest rate.",
                  loss.unstable_at_top({PAR: "mup_simple", **WITHOUT}, largest=True)),
        ],
    ),
    "mup_full": Experiment(
        figure="Figure E.5",
        question="What does the full muParam change over its simple form?",
        group=[PAR, QK],
        claims=[
            Claim("With qk-layernorm the full muParam trains at a rate of 1.",
                  loss.trains_at(1.0, {PAR: "mup_full", **WITH})),
            Claim("It does not lower the best loss at the largest size.",
                  loss.lower_best_loss(PAR, "mup_full", "mup_simple", WITH, largest=True, contrary=True)),
        ],
    ),
    "attn_scale": Experiment(
        figure="Figure E.6",
        question="Does dividing attention scores by d_head replace qk-layernorm?",
        group=["model.attention_scale", QK],
        claims=[
            Claim("1/d_head is slightly better at the smallest size, slightly worse at the largest.",
                  single.better_small_worse_large("model.attention_scale", "inverse", "inverse_sqrt")),
            Claim("With 1/d_head, qk-layernorm still lowers sensitivity.",
                  loss.lower_s(QK, NORMED, "none", {"model.attention_scale": "inverse"})),
        ],
    ),
    "steps": Experiment(
        figure="Figure E.7",
        question="Does sensitivity depend on the number of steps?",
        group=["budget.steps"],
        claims=[Claim("Sensitivity does not change with the number of steps.", loss.s_unchanged("budget.steps"))],
    ),
    "qknorm_axis": Experiment(
        figure="Figure E.8",
        question="Should queries and keys be normed per head or over the full width?",
        group=["model.qk_norm_axis"],
        claims=[Claim("Per head is slightly better at the best rate.",
                      loss.lower_best_loss("model.qk_norm_axis", "head", "full"))],
    ),
    "batch": Experiment(
        figure="Figure E.9",
        question="Does sensitivity depend on the batch, at a fixed number of tokens?",
        group=["batch.sequences"],
        claims=[Claim("Sensitivity does not change with the batch.", loss.s_unchanged("batch.sequences"))],
    ),
    "wd_value": Experiment(
        figure="Figure E.10",
        question="Where does more weight decay move the best learning rate?",
        group=["optimizer.weight_decay"],
        claims=[Claim("More decay moves the best rate slightly up.", loss.best_lr_moves_up("optimizer.weight_decay"))],
    ),
    "pointwise_attn": Experiment(
        figure="Figure E.11",
        question="Is softmax the cause of growing attention scores?",
        group=["model.attention_normaliser", QK],
        quantities=[LOGIT],
        traces=["train_loss", "attention_logit_max/0"],
        claims=[
            Claim("Scores grow without softmax too: past those with qk-layernorm (here: ten times).",
                  inside.larger_at_step(LOGIT, QK, "none", NORMED, 10, {"model.attention_normaliser": "relu2"})),
        ],
    ),
    "gradrms_kernel": Experiment(
        figure="Figure E.12",
        question="Do the gradients of the key projection fall as those of the MLP do?",
        quantities=[_gradient(KEY_PROJECTION)],
        claims=_gradient_claims(KEY_PROJECTION),
    ),
    "update_trace": Experiment(
        figure="Figure E.13",
        question="What do updates do when gradients near eps?",
        traces=[f"grad_rms/{FIRST_MLP}", f"update_rms/{FIRST_MLP}"],
        claims=[
            Claim("Updates shrink when the gradient's RMS nears eps.",
                  inside.update_follows_gradient(f"grad_rms/{FIRST_MLP}", f"update_rms/{FIRST_MLP}")),
            Claim("Gradients come closest to eps at the largest N.",
                  inside.quantity_moves(_gradient(FIRST_MLP), "N", rising=False)),
        ],
    ),
    "param_rms_lr": Experiment(
        figure="Figure E.14",
        question="Does a learning rate relative to the size of the parameters hold the best one in place?",
        group=["optimizer.scale_lr_by_param_rms"],
        claims=[
            Claim("With the scaled rate the best one is steady over sizes.",
                  loss.best_lr_steady({"optimizer.scale_lr_by_param_rms": True})),
        ],
    ),
}  # fmt: skip
SWEEPS["nano_lr"] = SWEEPS["qknorm_lr"]  # its small picture
SWEEPS["mitigations"] = Experiment(
    question="What else keeps high learning rates trainable without qk-layernorm?", group=["logging.group"]
)


def experiment_of(name: str) -> Experiment:
    """The experiment of a sweep's name; one without claims where the paper has none of that name."""
    return SWEEPS.get(name, Experiment())


def judged(name: str, evidence: Evidence) -> list[tuple[Claim, Verdict]]:
    """The paper's claims for a sweep with this study's verdicts."""
    return [(claim, claim.verdict(evidence)) for claim in experiment_of(name).claims]
