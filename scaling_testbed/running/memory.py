"""How much memory a run will take on one device, before it is run; free of torch.

An estimate: parameters, gradients and optimizer state in fp32 are exact; activations are what autograd keeps on the
reference path on a CPU, counted tensor by tensor (within 5%, a test compares); bf16 copies of weights, and the logits,
are reckoned and not measured; what the allocator adds is not in it.
"""

from dataclasses import dataclass

from scaling_testbed.config.schema import RunConfig
from scaling_testbed.model.config import GATED_MLPS, ModelConfig

# Bytes per parameter: fp32 weights, fp32 gradients, AdamW's two fp32 moments. Under bf16 autocast each matrix is held
# once more in bf16 until its backward pass.
WEIGHTS, GRADIENTS, MOMENTS, BF16_COPY = 4, 4, 8, 2
LOGITS_BYTES = 2**30  # the chunked head's buffer on a GPU, see loss.chunk_mib


@dataclass(frozen=True)
class Memory:
    """Bytes on one device."""

    states: int  # parameters, gradients, optimizer
    activations: int  # of one micro-batch
    logits: int

    @property
    def total(self) -> int:
        return self.states + self.activations + self.logits


def estimate_memory(run: RunConfig, model: ModelConfig, n_params: int, precision: str = "bf16") -> Memory:
    """Memory of a step of `run` with the resolved `model` of `n_params` parameters, on a GPU in bf16 or fp32."""
    rows = run.batch.micro_batch_sequences or run.batch.sequences
    tokens = rows * run.batch.sequence_length
    copies = BF16_COPY if precision == "bf16" else 0
    all_logits = tokens * model.vocab_size * 4
    buffer = run.loss.chunk_mib * 2**20 if run.loss.chunk_mib else LOGITS_BYTES
    return Memory(
        states=n_params * (WEIGHTS + GRADIENTS + MOMENTS + copies),
        activations=tokens * activation_bytes_per_token(model, precision),
        # The reference holds logits, their softmax and their gradient.
        logits=3 * all_logits if run.loss.impl == "reference" else min(buffer, all_logits),
    )


def activation_bytes_per_token(model: ModelConfig, precision: str) -> int:
    """What autograd keeps for a token. With D width, a = heads x d_head, F the MLP's width, a block keeps
    4 D (two norms' inputs and outputs), 5 a (q, k, v, their attention and its product), 2 a more with qk-norm, and 2 F
    (4 F gated); in bf16 the norms' inputs and what the qk-norm reads and gives stay fp32. After the blocks: the final
    norm's input."""
    D, F = model.d_model, model.d_ff
    a = model.n_heads * model.d_head
    a_normed = 0 if model.qk_norm == "none" else 2 * a
    mlp = (4 if model.mlp in GATED_MLPS else 2) * F
    elements = 4 * D + 5 * a + a_normed + mlp
    if precision == "fp32":
        return model.n_layers * 4 * elements + 4 * D
    stay_fp32 = 2 * D + a_normed
    return model.n_layers * (2 * elements + 2 * stay_fp32) + 4 * D
