"""The experiments of Gadre et al. 2024 (arXiv 2403.08540) and the claims of the paper about its testbed of 104 models.

The numbers are those of the paper. A limit that the paper does not give is chosen here, and its claim says "here".
"""

from scaling_testbed.papers import entropies
from scaling_testbed.papers import law_claims as by
from scaling_testbed.papers import predictions as of
from scaling_testbed.papers.paper import Claim, Experiment, Paper

RPJ = "redpajama"
SINGLE_TASKS = ("arc_easy", "lambada_openai", "openbook_qa", "hellaswag_zeroshot")
# A small error counts only if the prediction is for this many times the compute of the fitted runs (paper: 300 and 20).
FAR_LOSS, FAR_ERROR = 100, 10

TESTBED = Experiment(
    name="overtraining",
    figure="Figures 1 to 3 and 5, Table 2",
    question="Do laws fitted to cheap runs predict the loss and the downstream error of over-trained ones?",
    claims=[
        Claim("The loss of a 1.4B model at 640 tokens per parameter (RedPajama) is predicted to 0.7%, from five runs "
              "of 300 times less compute.",
              by.within(of.error_at(of.OVER_TRAINED, data=RPJ), 0.0075, FAR_LOSS), "section 4, Figure 1 left"),
        Claim("So is that of a 6.9B model at 20 tokens per parameter, to 0.7%.",
              by.within(of.error_at(of.LARGEST_SIZE, data=RPJ), 0.0075, FAR_LOSS), "section 4"),
        Claim("Errors are uniformly low over data sets, sizes and multipliers (here: 2% in the mean from M=10 on).",
              by.within(of.mean_error(least_m=10), 0.02), "section 4, Figure 5"),
        Claim("At each multiplier from 20 on the reducible loss is a power law of compute, with about the same "
              "exponent (here: within a factor of 1.25).",
              by.within(of.EXPONENT_SPREAD, by.SAME), "section 2.2, Figures 2 and 17"),
        Claim("The exponent of the law is about the same for all training sets (here: within a factor of 1.25).",
              by.same_over(of.ETA), "Table 6"),
        Claim("At 5 tokens per parameter scaling lies off the trend: errors are larger than from 20 on.",
              by.less(of.mean_error(least_m=20), of.mean_error(least_m=5, most_m=5)), "section 4"),
        Claim("The average error over 17 tasks decays exponentially with the loss (here: R2 of 0.95).",
              by.within(of.unexplained("error_17"), 0.05), "section 2.3, Figure 3"),
        Claim("It is predicted to 0.05% for the 6.9B model (RedPajama), from 20 times less compute.",
              by.within(of.error_at(of.LARGEST_SIZE, "error_17", RPJ), 0.00055, FAR_ERROR), "section 4, Table 2"),
        Claim("It is predicted to 3.6% for the 1.4B model at 640 tokens per parameter.",
              by.within(of.error_at(of.OVER_TRAINED, "error_17", RPJ), 0.0365, FAR_ERROR), "section 4"),
        Claim("So is the average over all 46 tasks, of every data set (here: to 5%), at 6.9B.",
              by.within(of.error_at(of.LARGEST_SIZE, "error_46"), 0.05, FAR_ERROR), "Figure 11"),
        Claim("Single tasks are predicted far worse than their average at 6.9B (here: the median of four).",
              by.less(of.error_at(of.LARGEST_SIZE, "error_17"), of.single_task_error(of.LARGEST_SIZE, SINGLE_TASKS)),
              "Table 2"),
        Claim("Without the 1.4B run in its fit the error of the 6.9B model is predicted worse (RedPajama 10.64%).",
              by.less(of.error_at(of.LARGEST_SIZE, "error_17"),
                      of.error_at(of.LARGEST_SIZE, "error_17", calibrated=False)), "section 4, Table 7"),
        Claim("Models trained on C4 have a lower loss on C4 than those trained on other data (here: at 19 of 20 sizes "
              "and multipliers).",
              by.within(of.share_not_lower("loss", "c4"), 0.05), "Figure 13"),
        Claim("Their downstream error is not lower for that (here: not at most sizes and multipliers).",
              by.within(of.share_not_lower("error_17", "c4"), 0.5, beyond=True), "Figure 13"),
        Claim("Trained on English C4, the loss on German is predicted better than that on programming languages.",
              by.less(of.mean_error("loss_c4_german", 10, data="c4"),
                      of.mean_error("loss_paloma_100_languages", 10, data="c4")), "section 4, Figure 10"),
    ],
)  # fmt: skip

KNOWN_ENTROPY = Experiment(
    name="known_entropy",
    question="How far can the E of a fitted law be trusted?",
    claims=[
        Claim("Fitted to the runs that have learned, the law of over-training finds E to 1% (here).",
              by.within(entropies.off("over_training"), 0.01), "Table 1"),
        Claim("So does the law of Chinchilla (here: to 1%).",
              by.within(entropies.off("chinchilla"), 0.01), "Hoffmann et al. 2022, section 3.3"),
        Claim("Fitted to all runs, the law of over-training has a larger error of E (here: by a factor of 1.1).",
              by.less(entropies.off("over_training"), entropies.off("over_training", learned=False)), "here"),
        Claim("At least nine of ten hulls of three laws' 95% intervals hold the true E (here).",
              by.within(entropies.missed(), 0.1), "here"),
    ],
)  # fmt: skip

PAPER = Paper(
    name="over_training",
    authors="Gadre et al. 2024",
    title="Language models scale reliably with over-training and on downstream tasks",
    arxiv="2403.08540",
    settings={"batch.sequence_length": 2048, "tokenizer.name": "gpt_neox", "optimizer.decay": "coupled"},
    experiments=[
        TESTBED,
        Experiment(name="overtraining_lr", question="Which learning rate suits each size of the over-trained grid?"),
        Experiment(name="isoflop", question="Which size has the least loss for a budget of compute?"),
        KNOWN_ENTROPY,
    ],
)
