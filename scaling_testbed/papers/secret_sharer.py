"""Memorisation of planted random strings, by how often they were planted and by the size of the model.

Carlini et al. 2019 plant canaries in the training text and measure their exposure. The strings, the sizes and all
limits are the testbed's own. They were declared before any run of the sweep, after one exploratory run of the smallest
size with another seed: 4.88 nats on strings never planted, 4.79 once, 4.79, 4.33, 3.16 and 1.15 after 4, 16, 64, 256.
"""

from scaling_testbed.papers.combinators import positive
from scaling_testbed.papers.lines import RISES, along
from scaling_testbed.papers.measures import RATE, Evidence, Measure, Place, Value
from scaling_testbed.papers.paper import Claim, Experiment, Paper

NEVER = "never"  # the source that is in no batch


def gain(planted: str, over: str = NEVER) -> Measure:
    """The measure of the loss on strings of one source less that on those of another, in nats per token."""

    def of(evidence: Evidence, place: Place) -> Value | None:
        found = {seed: row.get("val_loss_by_set") for seed, row in place.rows.items()}
        by_seed = {seed: losses[over] - losses[planted] for seed, losses in found.items() if losses}
        return Value(by_seed, f"{sum(by_seed.values()) / len(by_seed):.3f}") if by_seed else None

    times = {"once": "once", NEVER: "never"}.get
    said = [times(name, f"{name[1:]} times") for name in (over, planted)]
    return Measure(f"loss on strings planted {said[0]} less that on those planted {said[1]}", of, "loss", RATE)


MEMORISATION = Experiment(
    name="memorisation",
    question="How do size and repeats decide which random strings a model knows by heart?",
    claims=[
        Claim("Strings that are planted 256 times are known better than those planted 64 times, at each size (here: by "
              "0.3 nats per token).", positive(gain("x256", "x64"), every=True)),
        Claim("What 256 repeats gain over strings never planted rises with the size of the model (here: by 0.3 nats "
              "per tenfold N).", along(gain("x256"), "N", RISES)),
        Claim("What 64 repeats gain rises with the size, too.", along(gain("x64"), "N", RISES)),
        Claim("What one repeat gains does not rise with the size.", along(gain("once"), "N", RISES, contrary=True)),
    ],
)  # fmt: skip

PAPER = Paper(
    name="secret_sharer",
    authors="Carlini et al. 2019",
    title="The secret sharer: evaluating and testing unintended memorization in neural networks",
    arxiv="1802.08232",
    experiments=[MEMORISATION],
)
