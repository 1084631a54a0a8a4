"""The configuration of the loss, without torch, so that a grid can be planned without torch."""

from dataclasses import dataclass

from scaling_testbed.errors import check_not_negative, check_positive
from scaling_testbed.kernels.limits import RECOMPUTED_HEAD_WIDEST_MODEL
from scaling_testbed.keys import EXECUTION_ONLY, check_choices, key

LOSS_IMPLS = ("auto", "reference", "chunked", "triton", "recompute")


@dataclass(frozen=True, kw_only=True)
class CrossEntropyConfig:
    """Cross-entropy plus z-loss, z_loss * mean(log^2 Z) (Chowdhery et al. 2022, PaLM, section 5)."""

    name: str = key("cross_entropy", "The loss.")
    z_loss: float = key(1e-4, "The coefficient of the z-loss. 0: no z-loss. It is never part of a reported val_loss.")
    impl: str = key(
        "auto",
        "The path that computes the loss. reference: all logits at once. chunked: the logits of a part of the tokens "
        "at a time. triton: the same by Triton kernels, on a GPU. recompute: Triton kernels that compute the logits "
        "again and never store them, on a GPU, for d_model up to 128. auto: triton where it can run on a GPU, else "
        "chunked.",
        choices=LOSS_IMPLS,
    )
    chunk_mib: int | None = key(
        None,
        "MiB of logits that chunked and triton hold at once. null: 64 on a CPU; on a GPU 1024, or the logits of 4096 "
        "tokens where these are more and at most a sixteenth of its memory.",
        identity=EXECUTION_ONLY,
    )

    def __post_init__(self) -> None:
        check_choices(self)
        check_positive("chunk_mib", self.chunk_mib)
        check_not_negative("z_loss", self.z_loss)

    def lacks(self, d_model: int) -> str | None:
        """The reason why the named path cannot compute the loss of a model of this width, or None."""
        if self.impl == "recompute" and d_model > RECOMPUTED_HEAD_WIDEST_MODEL:
            most = RECOMPUTED_HEAD_WIDEST_MODEL
            return f"loss.impl=recompute needs model.d_model of at most {most}; got {d_model}; use loss.impl=auto"
        return None

    def logits_bytes(self, tokens: int, vocab_size: int) -> int:
        """Bytes of logits that a GPU holds at once for `tokens` tokens.

        The reference path holds the logits, their softmax and their gradient. recompute holds none, and the other paths
        one chunk.
        """
        if self.impl == "recompute":
            return 0
        everything = 4 * tokens * vocab_size
        if self.impl == "reference":
            return 3 * everything
        return min(self.chunk_mib * 2**20 if self.chunk_mib else 2**30, everything)
