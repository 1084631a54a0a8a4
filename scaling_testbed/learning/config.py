"""What can be set about the loss, free of torch so that a grid can be planned without importing it."""

from dataclasses import dataclass, field

from scaling_testbed.errors import check_choice, check_not_negative, check_positive
from scaling_testbed.keys import EXECUTION_ONLY

LOSS_IMPLS = ("auto", "reference", "chunked", "triton")


@dataclass(frozen=True, kw_only=True)
class CrossEntropyConfig:
    """Cross-entropy plus z-loss, z_loss * mean(log^2 Z) (Chowdhery et al. 2022, PaLM, section 5).

    impl: reference (all logits at once) | chunked (a part of the tokens at a time) | triton (the same in Triton
        kernels, on a GPU) | auto (triton where it can run on a GPU, else chunked).
    chunk_mib: MiB of logits held at once by chunked and triton; None: 64 on a CPU; on a GPU 1024, or
        what 4096 tokens take if that is more and at most a sixteenth of its memory.
    """

    name: str = "cross_entropy"
    z_loss: float = 1e-4
    impl: str = "auto"
    chunk_mib: int | None = field(default=None, metadata=EXECUTION_ONLY)

    def __post_init__(self):
        check_choice("impl", self.impl, LOSS_IMPLS)
        check_positive("chunk_mib", self.chunk_mib)
        check_not_negative("z_loss", self.z_loss)

    def logits_bytes(self, tokens: int, vocab_size: int) -> int:
        """Bytes of logits that a GPU holds at once for so many tokens: of the reference's the logits, their softmax and
        their gradient, of the others' a chunk."""
        everything = 4 * tokens * vocab_size
        if self.impl == "reference":
            return 3 * everything
        return min(self.chunk_mib * 2**20 if self.chunk_mib else 2**30, everything)
